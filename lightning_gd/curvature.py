"""What the curvature of a least-squares loss says about the learning rate.

Gradient descent with momentum β is torch's SGD: v ← βv + g, w ← w − lr·v, with v = 0 at the start.
Along each eigenvector of the Hessian H, with eigenvalue λ, the error e = θ − θ* follows

    e₊ = (1 + β − lr·λ) e − β e₋,  with e₋ = e at the start.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_gd.covariance import rank_tolerance
from lightning_gd.moments import Moments

MOST_UPDATES, MOST_WALKED, WALK = 10**9, 10**5, 256  # without and with momentum; walked at once


class Curvature:
    """The eigenvalues of the Hessian of a least-squares loss, which is constant and not negative.

    Methods take θ₀ at the start and θ* of the optimum as (w, b) flattened, shape [P], a learning
    rate lr ≥ 0 and a momentum β in [0, 1).

    Attributes:
        eigenvalues: λ of all P parameters in ascending order, shape [P].
        eigenvectors: One per column, shape [P, P].
        rank: Number of eigenvalues above the tolerance; the others are rounding errors.
        largest: λmax, along the steepest direction.
        smallest: λmin, the smallest eigenvalue above the tolerance.
        condition_number: λmax/λmin.
        auto_lr: 1/λmax, the learning rate that removes the steepest error in one update.

    Args:
        hessian: H, shape [P, P], symmetric.
        rtol: Eigenvalues below rtol·λmax are rounding; by default max(P, 32)·2⁻⁵².

    Raises:
        ValueError: If H has no positive eigenvalue, or a negative one.
    """

    def __init__(self, hessian: Tensor, rtol: float | None = None) -> None:
        values, self.eigenvectors = torch.linalg.eigh(hessian.detach().double())
        tolerance = values[-1] * (rank_tolerance(len(values)) if rtol is None else rtol)
        if not values[-1] > 0 or values[0] < -max(tolerance, 1e-6 * values[-1]):
            raise ValueError(
                f"the eigenvalues of this Hessian lie in [{values[0]:.4g}, {values[-1]:.4g}]; that "
                "of a least-squares loss has none below 0 and at least one above"
            )
        self.eigenvalues = values.clamp(min=0)
        self.rank = max(1, int((values > tolerance).sum()))
        self.largest, self.smallest = values[-1].item(), values[-self.rank].item()
        self.condition_number, self.auto_lr = self.largest / self.smallest, 1 / self.largest

    def max_lr(self, momentum: float = 0.0) -> float:
        """Return 2(1+β)/λmax, the learning rate from which the steepest error does not shrink."""
        return 2 * (1 + momentum) / self.largest

    def best_lr(self, momentum: float = 0.0) -> float:
        """Return 2(1+β)/(λmax+λmin), the rate with the smallest `factor` for this momentum."""
        return 2 * (1 + momentum) / (self.largest + self.smallest)

    def factor(self, lr: float, momentum: float = 0.0) -> float:
        """Return what one update multiplies the slowest error by in the long run, 0 or more.

        The largest root |z| of z² − (1 + β − lr·λ)z + β = 0 over all λ above the tolerance;
        |1 − lr·λ| without momentum. The run converges if it is below 1.
        """
        half = (1 + momentum - lr * self.eigenvalues[-self.rank :]).abs() / 2
        root = (half.square() - momentum).clamp(min=0).sqrt()
        return torch.clamp(half + root, min=math.sqrt(momentum)).max().item()

    def loss_factor(self, lr: float, momentum: float = 0.0) -> float:
        """Return what one update multiplies the loss above the optimum by in the long run."""
        return self.factor(lr, momentum) ** 2

    def top_factor(self, lr: float) -> float:
        """Return 1 − lr·λmax: what one update multiplies the steepest error by, for β = 0."""
        return 1 - lr * self.largest

    def errors(
        self, theta0: Tensor, optimum_theta: Tensor, lr: float, momentum: float, steps: int
    ) -> Tensor:
        """Return e along the eigenvectors after 0 … steps updates, shape [steps+1, P].

        The losses are L* + ½ Σ λ e², or ``L* + errors.square() @ eigenvalues / 2``.
        """
        start = self._error(theta0, optimum_theta)
        return _recurrence(start, start, 1 + momentum - lr * self.eigenvalues, momentum, steps)

    def trajectory(
        self, theta0: Tensor, optimum_theta: Tensor, lr: float, momentum: float, steps: int
    ) -> Tensor:
        """Return the parameters after 0 … steps updates, shape [steps+1, P]."""
        errors = self.errors(theta0, optimum_theta, lr, momentum, steps)
        return optimum_theta.to(errors) + errors @ self.eigenvectors.T

    def updates_to(
        self, theta0: Tensor, optimum_theta: Tensor, lr: float, momentum: float, fraction: float
    ) -> int | None:
        """Return the updates until the loss above L* stays at or below a fraction of the first.

        None if the run diverges, or needs more than 10⁹ updates (10⁵ with momentum).
        """
        start, slope = self._error(theta0, optimum_theta), 1 + momentum - lr * self.eigenvalues
        parts = self.eigenvalues * start.square()
        goal = fraction * parts.sum()
        if goal == 0 or self.factor(lr, momentum) >= 1:
            return 0 if goal == 0 else None
        if momentum:
            return self._walk(start, goal, slope, momentum)
        updates = range(MOST_UPDATES + 1)
        found = bisect_left(updates, True, key=lambda k: bool(slope.pow(2 * k) @ parts <= goal))
        return found if found < len(updates) else None

    def _walk(self, start: Tensor, goal: Tensor, slope: Tensor, momentum: float) -> int | None:
        """Return the first update from which the loss, which swings, stays below the goal."""
        # Errors with complex or negative roots swing; the sum of e² over all updates still to come,
        # which follows from e₊ = slope·e − βe₋, bounds each of them. The others only shrink.
        inverse = (1 - momentum) * (1 + momentum - slope.square() / (1 + momentum))
        previous, now, last = start, start, -1
        for done in range(0, MOST_WALKED, WALK):
            errors = _recurrence(previous, now, slope, momentum, WALK)
            above = (errors.square() @ self.eigenvalues > goal).nonzero()
            last = done + int(above[-1]) if len(above) else last
            previous, now = errors[-2], errors[-1]
            cross = 2 * momentum / (1 + momentum) * slope * now * previous
            to_come = (now.square() - cross + (momentum * previous).square()) / inverse
            bound = torch.where(slope < 2 * math.sqrt(momentum), to_come, now.square())
            if bound @ self.eigenvalues <= goal:
                return last + 1
        return None

    def _error(self, theta0: Tensor, optimum_theta: Tensor) -> Tensor:
        error = theta0.detach().to(self.eigenvalues) - optimum_theta.detach().to(self.eigenvalues)
        return self.eigenvectors.T @ error

    def report(
        self, lr: float, momentum: float, theta0: Tensor, optimum_theta: Tensor
    ) -> list[str]:
        """Return what to expect of a run, one sentence per line, numbers with 4 digits."""
        size, flat = len(self.eigenvalues), len(self.eigenvalues) - self.rank
        beta = f" with momentum {momentum:.4g}" if momentum else ""
        lines = [
            f"curvature: the largest eigenvalue of the Hessian is {self.largest:.4g}, the smallest "
            f"{self.smallest:.4g} (condition number {self.condition_number:.4g})",
            f"the largest stable rate{beta} is {self.max_lr(momentum):.4g}, the best "
            f'{self.best_lr(momentum):.4g}; lr "auto" is {self.auto_lr:.4g}',
            self._verdict(lr, momentum),
        ]
        if flat:
            lines.insert(1, f"{flat} of {size} directions do not change the loss at all")
        updates = self.updates_to(theta0, optimum_theta, lr, momentum, fraction=0.01)
        if updates is not None:
            lines.append(f"1 % of the loss above the optimum is left after {updates} updates")
        return lines

    def _verdict(self, lr: float, momentum: float) -> str:
        factor, stable = self.factor(lr, momentum), self.max_lr(momentum)
        top = factor if momentum else self.top_factor(lr)
        if lr > stable or factor >= 1:
            signed = f"{top:.4g}".replace("-", "−")
            return (
                f"WARNING: lr {lr:.4g} {'diverges' if lr > stable else 'does not converge'}: each "
                f"update multiplies the error by {signed} and the loss by {factor**2:.4g}; the "
                f"largest stable rate is {stable:.4g}"
            )
        swing = "; the steepest part changes sign at each update" if top < 0 else ""
        if 1 - factor < 1e-4:
            return (
                f"lr {lr:.4g} converges, slowly along the flattest direction: halving the error "
                f"there takes {math.log(0.5) / math.log(factor):.2g} updates{swing}"
            )
        return (
            f"lr {lr:.4g} converges: in the long run each update multiplies the error by "
            f"{factor:.4g} and the loss above the optimum by {factor**2:.4g}{swing}"
        )


def losses_along(moments: Moments, parameters: Tensor) -> Tensor:
    """Return the losses of many parameter vectors, shape [K]: a predicted test curve.

    Args:
        moments: Of any data with the same inputs, such as the test rows.
        parameters: (w, b), shape [K, D+1], or w alone, [K, D], as `trajectory` returns them.
    """
    size = len(moments.mean_x)
    u = pad(parameters[:, :size], (0, 1), value=-1.0)
    error = u @ moments.mean + parameters[:, size:].sum(1)
    return (u @ moments.cov * u).sum(1) + error.square()


def largest_eigenvalue(
    hvp: Callable[[Tensor], Tensor], like: Tensor, rtol: float = 1e-6, max_iterations: int = 200
) -> float:
    """Return λmax of a Hessian known only by its products, by Lanczos iteration.

    Args:
        hvp: v ↦ Hv, both of shape [P].
        like: Any tensor with the shape, dtype and device of v.
        rtol: Stop when the residual ‖Hu − λu‖ is at most rtol·|λ|.
        max_iterations: Largest number of products.

    Raises:
        ValueError: If a product is not finite, or `max_iterations` do not meet the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    basis = products = found.new_empty(0, len(like))
    for _ in range(min(len(like), max_iterations)):
        basis = torch.cat([basis, found[None] / found.norm()])
        products = torch.cat([products, hvp(basis[-1])[None]])
        if not products[-1].isfinite().all():
            raise ValueError("a Hessian-vector product is not finite")
        values, vectors = torch.linalg.eigh(basis @ products.T)
        top, along = values[-1], vectors[:, -1]
        found = along @ products - top * (along @ basis)  # the residual
        if len(basis) == len(like) or found.norm() <= rtol * top.abs():
            return top.item()
        for _ in range(2):  # once is not enough to stay orthogonal in floating point
            found = found - (basis @ found) @ basis
    raise ValueError(f"λmax was not found to rtol={rtol} in max_iterations={max_iterations}")


def _recurrence(
    previous: Tensor, now: Tensor, slope: Tensor, momentum: float, steps: int
) -> Tensor:
    """Return the errors now and after each of `steps` updates, shape [steps+1, P]."""
    errors = now.new_empty(steps + 1, len(now))
    errors[0] = now
    for k in range(steps):
        torch.sub(slope * now, previous, alpha=momentum, out=errors[k + 1])
        previous, now = now, errors[k + 1]
    return errors
