"""What the curvature of a least-squares loss says about the learning rate."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from lightning_gd.optimum import rank_tolerance

MOST_UPDATES, MOST_WALKED = 10**9, 10**4  # that are counted without and with momentum
SLOW = 10**4  # updates until the loss above the optimum is halved
FAR = 1e-2  # a rate below this part of the fastest one is called far below it
MOST_PRODUCTS = 200  # of a Hessian and a vector


class Curvature:
    """The eigenvalues of the Hessian of a least-squares loss, which is constant and not negative.

    Methods take θ at the start and the best θ* as (w, b) flattened, shape [P], a learning rate
    lr ≥ 0 and a momentum β in [0, 1) of torch's SGD. Along each eigenvector, with eigenvalue λ,
    the error e = θ − θ* follows e₊ = (1 + β − lr·λ) e − β e₋, with e₋ = e at the start.

    Attributes:
        eigenvalues: λ of all P parameters in ascending order, shape [P].
        eigenvectors: One per column, shape [P, P].
        rank: Number of eigenvalues above `rank_tolerance`; the others are rounding errors.
        largest, smallest: λmax and λmin, of the eigenvalues above the tolerance.
        auto_lr: 1/λmax, the learning rate that removes the steepest error in one update.

    Raises:
        ValueError: If H, shape [P, P], has no positive eigenvalue.
    """

    def __init__(self, hessian: Tensor) -> None:
        values, self.eigenvectors = torch.linalg.eigh(hessian.double())
        if not values[-1] > 0:
            raise ValueError("the loss has no curvature: every x is 0, or its square is in float64")
        self.eigenvalues = values.clamp(min=0)
        self.rank = int((values > values[-1] * rank_tolerance(len(values))).sum())
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

        The largest root |z| of z² − (1 + β − lr·λ)z + β = 0 over all λ above the tolerance. The
        run converges if it is below 1.
        """
        half = (1 + momentum - lr * self.eigenvalues[-self.rank :]).abs() / 2
        root = (half.square() - momentum).clamp(min=0).sqrt()
        return torch.clamp(half + root, min=math.sqrt(momentum)).max().item()

    def errors(self, start: Tensor, best: Tensor, lr: float, momentum: float, steps: int) -> Tensor:
        """Return e along the eigenvectors after 0 … steps updates, shape [steps+1, P].

        The losses are L* + ½ Σ λ e², the parameters θ* + `errors @ eigenvectors.T`.
        """
        return torch.stack(list(islice(self._walk(start, best, lr, momentum), steps + 1)))

    def _walk(
        self, start: Tensor, best: Tensor, lr: float, momentum: float, before: Tensor | None = None
    ) -> Iterator[Tensor]:
        now, previous = (
            self.eigenvectors.T @ (theta.double() - best)
            for theta in (start, start if before is None else before)
        )
        slope = 1 + momentum - lr * self.eigenvalues
        while True:
            yield now
            now, previous = torch.sub(slope * now, previous, alpha=momentum), now

    def updates_needed(
        self, start: Tensor, best: Tensor, lr: float, momentum: float, before: Tensor | None = None
    ) -> int | None:
        """Return the number of updates after which the loss above L* stays below 1 % of the first.

        `before` is θ one update before the start of a resumed run. None if the run diverges,
        starts at L*, or needs 10⁹ updates (10⁴ with momentum) or more.
        """
        walk, slope = self._walk(start, best, lr, momentum, before), 1 - lr * self.eigenvalues
        parts = self.eigenvalues * next(walk).square()
        goal = 0.01 * parts.sum()
        if goal == 0 or self.factor(lr, momentum) >= 1:
            return None
        if momentum:  # the loss swings
            losses = (error.square() @ self.eigenvalues for error in islice(walk, MOST_WALKED))
            updates = max((k for k, loss in enumerate(losses, 2) if loss > goal), default=1)
            return updates if updates <= MOST_WALKED else None
        counts = range(MOST_UPDATES)
        updates = bisect_left(counts, True, key=lambda k: bool(slope.pow(2 * k) @ parts <= goal))
        return updates if updates in counts else None

    def rates(self, momentum: float) -> str:
        """Return which learning rates converge, in one sentence."""
        beta = f" (momentum {momentum:.4g})" if momentum else ""
        return (
            f"lr below {self.max_lr(momentum):.4g} converges{beta}; fastest "
            f'{self.best_lr(momentum):.4g}, "auto" {self.auto_lr:.4g}'
        )

    def verdict(self, lr: float, momentum: float) -> str:
        """Return whether this learning rate converges, and how fast, in one sentence."""
        factor = self.factor(lr, momentum)
        if factor >= 1:
            word = "diverges" if lr > self.max_lr(momentum) else "does not converge"
            return (
                f"WARNING: lr {lr:.6g} {word}: each update multiplies the loss by {factor**2:.6g}"
            )
        halving = math.log(0.5) / math.log(factor**2) if factor else 0.0
        if halving > SLOW and lr < FAR * self.best_lr(momentum):
            return f"lr {lr:.4g} converges slowly: it is far below the fastest rate"
        if halving > SLOW:
            return f"lr {lr:.4g} converges, more and more slowly: some directions are nearly flat"
        number = f"{halving:.2g}" if halving < 100 else f"{halving:,.0f}"
        pace = f"every {number} updates" if halving > 1 else "at each update"
        return f"lr {lr:.4g} converges: the loss above the optimum in the end halves {pace}"

    def details(self, lr: float, momentum: float) -> list[str]:
        """Return what the learning rates follow from, one sentence per line."""
        flat, top = len(self.eigenvalues) - self.rank, 1 - lr * self.largest
        swing = f"; along the steepest direction by {top:.4g}".replace("-", "−")
        return [
            f"eigenvalues of the Hessian: {self.largest:.4g} to {self.smallest:.4g}, condition "
            f"number {self.condition_number:.4g}; {flat} of {len(self.eigenvalues)} directions do "
            "not change the loss",
            f"each update multiplies the error by {self.factor(lr, momentum):.6g} in the long run"
            + ("" if momentum else swing),
        ]


def largest_eigenvalue(hvp: Callable[[Tensor], Tensor], like: Tensor, rtol: float = 1e-6) -> float:
    """Return λmax of a Hessian H known only by its products, by Lanczos iteration.

    `hvp` maps v to Hv, both with the shape [P], dtype and device of `like`. The error is at most
    rtol times the largest |λ|; a ValueError says that 200 products did not reach that.
    """
    found = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    basis = products = like.new_empty(0, len(like))
    for _ in range(MOST_PRODUCTS):
        basis = torch.cat([basis, found[None] / found.norm()])
        products = torch.cat([products, hvp(basis[-1])[None]])
        values, vectors = torch.linalg.eigh(basis @ products.T)
        found = vectors[:, -1] @ products - values[-1] * (vectors[:, -1] @ basis)  # the residual
        if found.norm() <= rtol * values.abs().max():
            return values[-1].item()
        for _ in range(2):  # once is not enough to stay orthogonal in floating point
            found = found - (basis @ found) @ basis
    raise ValueError(f"λmax was not found to rtol={rtol} in {MOST_PRODUCTS} products")
