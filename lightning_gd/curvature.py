"""What the curvature of a quadratic loss says about the learning rate.

Gradient descent with momentum β is torch's SGD: v ← βv + g, w ← w − lr·v, v = 0 at the start. In
the eigenvectors of H each component of the error e = θ − θ* goes its own way,
e₊ = (1 + β − lr·λ) e − β e₋ with e₋ = e at the start; without momentum eₖ = (1 − lr·λ)ᵏ e₀.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gd.moments import Moments, rank_tolerance


class Curvature:
    """The eigenvalues of a Hessian H, which is constant and not negative: a least-squares loss.

    Index legend: P parameters, in the order of H: (w, b).

    Attributes:
        eigenvalues: λ in ascending order, shape [P]. Predictions use them all: a curvature near
            the noise still counts where the error along it is large.
        eigenvectors: One a column, shape [P, P].
        rank: Number of eigenvalues above the tolerance.
    """

    def __init__(self, hessian: Tensor, rtol: float | None = None) -> None:
        """Decompose the Hessian once.

        Args:
            hessian: H, shape [P, P], symmetric.
            rtol: Eigenvalues below rtol·λmax are noise; by default
                max(P, 32)·2⁻⁵².

        Raises:
            ValueError: H is not square, symmetric and finite, has a negative eigenvalue or is 0.
        """
        h = hessian.detach().double()
        if h.dim() != 2 or h.shape[0] != h.shape[1] or not len(h) or not h.isfinite().all():
            raise ValueError(f"hessian {list(h.shape)} must be finite and have shape [P, P]")
        # 1e-6 lets a float32 Hessian pass, which is symmetric to 1e-7 only.
        if (h - h.T).abs().max() > 1e-6 * h.abs().max():
            raise ValueError(f"hessian {list(h.shape)} must be symmetric")
        values, self.eigenvectors = torch.linalg.eigh((h + h.T) / 2)
        tolerance = values[-1] * (rank_tolerance(len(h)) if rtol is None else rtol)
        if values[-1] <= 0 or values[0] < -max(tolerance, 1e-6 * values[-1]):
            raise ValueError(
                f"the eigenvalues of this hessian lie in [{values[0]:.4g}, {values[-1]:.4g}]; that "
                "of a least-squares loss has none below 0 and at least one above"
            )
        self.eigenvalues = values.clamp(min=0)
        self.rank = max(1, int((values > tolerance).sum()))

    @property
    def largest(self) -> float:
        """λmax: the curvature along the steepest direction."""
        return self.eigenvalues[-1].item()

    @property
    def smallest(self) -> float:
        """λmin: the smallest eigenvalue above the tolerance."""
        return self.eigenvalues[-self.rank].item()

    @property
    def condition_number(self) -> float:
        """κ = λmax/λmin over the directions that the data determine."""
        return self.largest / self.smallest

    @property
    def auto_lr(self) -> float:
        """1/λmax: removes the steepest error component in one update and lets none oscillate."""
        return 1 / self.largest

    def max_lr(self, momentum: float = 0.0) -> float:
        """2(1+β)/λmax: at and above this rate the steepest error component does not shrink."""
        return 2 * (1 + _momentum(momentum)) / self.largest

    def best_lr(self, momentum: float = 0.0) -> float:
        """2(1+β)/(λmax+λmin): the rate with the smallest ``factor`` for this momentum."""
        return 2 * (1 + _momentum(momentum)) / (self.largest + self.smallest)

    def factor(self, lr: float, momentum: float = 0.0) -> float:
        """What one update multiplies the slowest error component by, in the long run (≥ 0).

        The largest root |z| of z² − (1 + β − lr·λ)z + β = 0 over all λ above the tolerance;
        |1 − lr·λ| without momentum. Below 1 the run converges. The loss above the optimum goes
        with its square, ``loss_factor``.
        """
        half = (1 + _momentum(momentum) - _rate(lr) * self.eigenvalues[-self.rank :]).abs() / 2
        root = (half.square() - momentum).clamp(min=0).sqrt()
        return torch.clamp(half + root, min=math.sqrt(momentum)).max().item()

    def loss_factor(self, lr: float, momentum: float = 0.0) -> float:
        """What one update multiplies the loss above the optimum by, in the long run."""
        return self.factor(lr, momentum) ** 2

    def top_factor(self, lr: float) -> float:
        """1 − lr·λmax with its sign: the steepest error component under plain gradient descent."""
        return 1 - _rate(lr) * self.largest

    def predict(
        self,
        theta0: Tensor,
        optimum_theta: Tensor,
        optimum_loss: Tensor | float,
        lr: float,
        momentum: float = 0.0,
        steps: int = 100,
    ) -> Tensor:
        """The losses L₀ … L_steps, shape [steps+1]: Lₖ = L* + ½ Σ λ eₖ².

        Rounding enters as 1e-16·λmax‖θ₀ − θ*‖²: 1e-10 on 2,000 digits, whose θ* is long.

        Args:
            theta0: θ at the start, (w, b) flattened, shape [P].
            optimum_theta: θ*, shape [P].
            optimum_loss: L*.
            lr: Learning rate.
            momentum: β, in [0, 1).
            steps: Number of updates.
        """
        errors = self._errors(theta0, optimum_theta, lr, momentum, steps)
        return errors.square() @ self.eigenvalues / 2 + optimum_loss

    def trajectory(
        self,
        theta0: Tensor,
        optimum_theta: Tensor,
        lr: float,
        momentum: float = 0.0,
        steps: int = 100,
    ) -> Tensor:
        """The parameters after 0 … steps updates, shape [steps+1, P]; see ``predict``."""
        errors = self._errors(theta0, optimum_theta, lr, momentum, steps)
        return optimum_theta.to(errors) + errors @ self.eigenvectors.T

    def updates_to(
        self,
        theta0: Tensor,
        optimum_theta: Tensor,
        lr: float,
        momentum: float = 0.0,
        fraction: float = 0.01,
        limit: int | None = None,
    ) -> int | None:
        """The first update after which the loss above the optimum is ≤ fraction of the start's.

        Without momentum the curve falls steadily: doubling and bisection, whatever the number. With
        momentum it may swing, so the curve is walked.

        Args:
            theta0: θ at the start, shape [P].
            optimum_theta: θ*, shape [P].
            lr: Learning rate.
            momentum: β, in [0, 1).
            fraction: In (0, 1].
            limit: Largest number looked at: by default 10⁹, and 10⁵ with momentum.

        Returns:
            The number, or None where the run diverges or needs more than ``limit``.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction} must lie in (0, 1]")
        start = self._components(theta0, optimum_theta)
        goal = fraction * (start.square() @ self.eigenvalues)
        if goal == 0 or fraction == 1:
            return 0
        if self.factor(lr, momentum) >= 1:
            return None
        if momentum:
            return self._walk(start, goal, lr, momentum, 10**5 if limit is None else limit)
        return self._bisect(start, goal, lr, 10**9 if limit is None else limit)

    def _bisect(self, start: Tensor, goal: Tensor, lr: float, limit: int) -> int | None:
        weights, base = start.square() * self.eigenvalues, 1 - lr * self.eigenvalues

        def reached(k: int) -> bool:
            return bool(base.pow(2 * k) @ weights <= goal)

        low, high = 0, min(1, limit)
        while not reached(high):
            if high >= limit:
                return None
            low, high = high, min(2 * high, limit)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high

    def _walk(
        self, start: Tensor, goal: Tensor, lr: float, momentum: float, limit: int
    ) -> int | None:
        done, previous, now, chunk = 0, start, start, 256
        while done < limit:
            errors = self._recurrence(previous, now, lr, momentum, min(chunk, limit - done))
            reached = (errors[1:].square() @ self.eigenvalues <= goal).nonzero()
            if len(reached):
                return done + 1 + int(reached[0])
            done, previous, now = done + len(errors) - 1, errors[-2], errors[-1]
        return None

    def _components(self, theta0: Tensor, optimum_theta: Tensor) -> Tensor:
        shape = self.eigenvalues.shape
        if theta0.shape != shape or optimum_theta.shape != shape:
            raise ValueError(
                f"theta0 {list(theta0.shape)} and optimum_theta {list(optimum_theta.shape)} must "
                f"both have shape {list(shape)}"
            )
        error = theta0.detach().to(self.eigenvalues) - optimum_theta.detach().to(self.eigenvalues)
        return self.eigenvectors.T @ error

    def _errors(
        self, theta0: Tensor, optimum_theta: Tensor, lr: float, momentum: float, steps: int
    ) -> Tensor:
        """Error components after 0 … steps updates, shape [steps+1, P]."""
        start = self._components(theta0, optimum_theta)
        if _momentum(momentum):
            return self._recurrence(start, start, _rate(lr), momentum, steps)
        exponents = torch.arange(steps + 1, dtype=start.dtype, device=start.device)
        return start * (1 - _rate(lr) * self.eigenvalues).pow(exponents[:, None])

    def _recurrence(
        self, previous: Tensor, now: Tensor, lr: float, momentum: float, steps: int
    ) -> Tensor:
        errors, slope = now.new_empty(steps + 1, len(now)), 1 + momentum - lr * self.eigenvalues
        errors[0] = now
        for k in range(steps):
            torch.sub(slope * now, previous, alpha=momentum, out=errors[k + 1])
            previous, now = now, errors[k + 1]
        return errors

    def report(
        self,
        lr: float,
        momentum: float = 0.0,
        theta0: Tensor | None = None,
        optimum_theta: Tensor | None = None,
    ) -> LearningRateReport:
        """All numbers for one rate; with θ₀ and θ* also the updates to 1 % of the loss above L*."""
        updates = None
        if theta0 is not None and optimum_theta is not None:
            updates = self.updates_to(theta0, optimum_theta, lr, momentum)
        return LearningRateReport(
            lr=lr,
            momentum=momentum,
            largest=self.largest,
            smallest=self.smallest,
            condition_number=self.condition_number,
            rank=self.rank,
            size=len(self.eigenvalues),
            max_lr=self.max_lr(momentum),
            best_lr=self.best_lr(momentum),
            auto_lr=self.auto_lr,
            factor=self.factor(lr, momentum),
            loss_factor=self.loss_factor(lr, momentum),
            top_factor=None if momentum else self.top_factor(lr),
            updates=updates,
        )


@dataclass(frozen=True)
class LearningRateReport:
    """What to expect of a learning rate; the fields are those of ``Curvature`` by name.

    ``size`` is the number of parameters, ``top_factor`` is None with momentum, ``updates`` is the
    number until 1 % of the loss above the optimum is left (None: diverges, or not asked).
    """

    lr: float
    momentum: float
    largest: float
    smallest: float
    condition_number: float
    rank: int
    size: int
    max_lr: float
    best_lr: float
    auto_lr: float
    factor: float
    loss_factor: float
    top_factor: float | None
    updates: int | None

    @property
    def diverges(self) -> bool:
        """Whether the rate is above ``max_lr``, so that the loss grows without end."""
        return self.lr > self.max_lr

    def lines(self) -> list[str]:
        """The report in words, one sentence a line, numbers to 4 digits."""
        beta = f" with momentum {self.momentum:.4g}" if self.momentum else ""
        flat = self.size - self.rank
        lines = [
            f"curvature: the largest eigenvalue of the Hessian is {self.largest:.4g}, the smallest "
            f"{self.smallest:.4g} (condition number {self.condition_number:.4g})",
            f"the largest stable rate{beta} is {self.max_lr:.4g}, the best {self.best_lr:.4g}; "
            f'lr "auto" is {self.auto_lr:.4g}',
            self._verdict(),
        ]
        if flat:
            lines.insert(1, f"{flat} of {self.size} directions do not change the loss at all")
        if self.updates is not None:
            lines.append(f"1 % of the loss above the optimum is left after {self.updates} updates")
        return lines

    def _verdict(self) -> str:
        if self.diverges or self.factor >= 1:
            top = self.factor if self.top_factor is None else self.top_factor
            return (
                f"WARNING: lr {self.lr:.4g} {'diverges' if self.diverges else 'does not converge'}:"
                f" each update multiplies the error by {_signed(top)} and the loss by "
                f"{self.loss_factor:.4g}; the largest stable rate is {self.max_lr:.4g}"
            )
        swing = self.top_factor is not None and self.top_factor < 0
        swing = "; the steepest part changes sign at each update" if swing else ""
        if 1 - self.factor < 1e-4:
            halving = f"{math.log(0.5) / math.log(self.factor):.2g}" if self.factor < 1 else "∞"
            return (
                f"lr {self.lr:.4g} converges, slowly along the flattest direction: halving the "
                f"error there takes {halving} updates{swing}"
            )
        return (
            f"lr {self.lr:.4g} converges: in the long run each update multiplies the error by "
            f"{self.factor:.4g} and the loss above the optimum by {self.loss_factor:.4g}{swing}"
        )


def losses_along(moments: Moments, parameters: Tensor) -> Tensor:
    """The losses of many parameter vectors on the data of ``moments``: a predicted test curve.

    Args:
        moments: Of any data with the same columns, such as the test rows.
        parameters: (w, b), shape [K, D+1], or w alone, [K, D], as ``trajectory`` returns them.

    Returns:
        The losses, shape [K].
    """
    size = len(moments.mean_x)
    if parameters.dim() != 2 or parameters.shape[1] not in (size, size + 1):
        raise ValueError(
            f"parameters {list(parameters.shape)} must have shape [K, {size}] or [K, {size + 1}]"
        )
    weight, bias = parameters[:, :size], parameters[:, size:].sum(1)
    error = weight @ moments.mean_x + bias - moments.mean_y
    half = weight @ moments.cov_xx - 2 * moments.cov_xy
    return (weight * half).sum(1) + moments.var_y + error.square()


def largest_eigenvalue(
    hvp: Callable[[Tensor], Tensor],
    size: int,
    *,
    rtol: float = 1e-6,
    max_iterations: int = 200,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> float:
    """λmax of a Hessian known only by its products, by Lanczos iteration from a fixed start.

    Args:
        hvp: v ↦ Hv, both of shape [size].
        size: Number of parameters.
        rtol: Stop when the residual ‖Hu − λu‖ is at most rtol·|λ|.
        max_iterations: Largest number of products.
        dtype: Of the vectors handed to ``hvp``.
        device: Of the vectors handed to ``hvp``.

    Raises:
        ValueError: A product is not finite, or the tolerance was not met in ``max_iterations``.
    """
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = (start / start.norm()).to(device=device, dtype=dtype)[None]
    rows: list[Tensor] = []
    for _ in range(min(size, max_iterations)):
        rest = hvp(basis[-1])
        if not rest.isfinite().all():
            raise ValueError("a Hessian-vector product is not finite")
        rows.append(basis @ rest)
        for _ in range(2):  # once is not enough to stay orthogonal in floating point
            rest = rest - basis.T @ (basis @ rest)
        norm = rest.norm().item()
        values, vectors = torch.linalg.eigh(_symmetric(rows))
        top = values[-1].item()
        if norm * abs(vectors[-1, -1].item()) <= rtol * abs(top) or len(rows) == size:
            return top
        basis = torch.cat([basis, rest[None] / norm])
    raise ValueError(f"λmax was not found to rtol={rtol} in max_iterations={max_iterations}")


def _symmetric(rows: list[Tensor]) -> Tensor:
    """H in the basis found so far: column k holds its products with vectors 0 … k."""
    upper = torch.stack([torch.nn.functional.pad(r, (0, len(rows) - len(r))) for r in rows]).T
    return upper + upper.triu(1).T


def _signed(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _rate(lr: float) -> float:
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr={lr} must be a finite number, 0 or more")
    return lr


def _momentum(momentum: float) -> float:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1)")
    return momentum
