"""Moments of a table: all that a least-squares loss and its gradients depend on."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_gd import arrow
from lightning_gd.batch import Batch, is_current
from lightning_gd.sums import sums


@dataclass(frozen=True, eq=False)
class Optimum:
    """The exact least-squares solution w*, b* of N rows, and how well they determine it.

    Attributes:
        weight: w*, shape [D]. Of several solutions it is that with the smallest Σ (sⱼwⱼ)², where
            sⱼ is the standard deviation of a column, or without bias its root mean square.
        bias: b*, shape []; None without bias.
        loss: L*, shape [], with a rounding error of about 1e-15 of the variance of y.
        rows: N.
        mean: Mean of each column, shape [D]; 0 without bias.
        scale: sⱼ, shape [D]; 0 for a column that is constant but for its rounding.
        lengths: Singular values of the centred columns, each divided by sⱼ, shape [rank].
        directions: The change of w along each of them, shape [D, rank].
        dropped: Directions along which columns vary, but too little for moments in float64: where
            they are no rounding, L* is above the least loss, and `of_rows` finds that.
    """

    weight: Tensor
    bias: Tensor | None
    loss: Tensor
    rows: int
    mean: Tensor
    scale: Tensor
    lengths: Tensor
    directions: Tensor
    dropped: int = 0

    @classmethod
    def of_rows(cls, x: Tensor, y: Tensor, bias: bool = True) -> "Optimum":
        """Return the exact solution from the singular values of x, shape [N, D], y, shape [N].

        It keeps digits that moments lose, whose condition number is the square of that of x, in
        time N·D·min(N, D).
        """
        x, y = x.double().cpu(), y.double().cpu()
        mean, target = x.mean(0) * bias, y.mean() * bias
        columns, goal = x - mean, y - target
        scale = _varying(columns.square().mean(0).sqrt(), mean)
        inverse = _inverse(scale)
        # R of QR has the singular values of the rows, and at most D + 1 rows itself.
        reduced = torch.linalg.qr(torch.cat([columns * inverse, goal[:, None]], 1), mode="r").R
        left, lengths, right = torch.linalg.svd(reduced[:, :-1], full_matrices=False)
        kept = lengths > lengths[0] * max(x.shape) * torch.finfo(torch.float64).eps
        lengths, directions = lengths[kept], inverse[:, None] * right[kept].T
        weight = directions @ (reduced[:, -1] @ left[:, kept] / lengths)
        loss, offset = (columns @ weight - goal).square().mean(), target - mean @ weight
        found = weight, offset if bias else None, loss
        return cls(*found, len(x), mean, scale, lengths, directions)

    @property
    def theta(self) -> Tensor:
        """(w*, b*) flattened in the order of the Hessian, shape [D+1]; [D] without bias."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[None]])

    @property
    def is_unique(self) -> Tensor:
        """Whether the rows determine each entry of w*, shape [D]: not of dependent columns."""
        return self.directions.norm(dim=1) * self.scale > 1 - 1e-6  # exactly 1, or far below

    @property
    def condition_number(self) -> float:
        """λmax/λmin of the covariance of the columns scaled to one variance."""
        return float(self.lengths.max() / self.lengths.min()) ** 2 if len(self.lengths) else 1.0

    @property
    def spread(self) -> Tensor:
        """W, shape [D+1, k], with W Wᵀ the pseudo-inverse of XᵀX in the order (w, b).

        k is the number of parameters that the rows determine. Without bias the last row is 0.
        """
        spread = pad(self.directions / self.lengths, (0, int(self.bias is not None), 0, 1))
        if self.bias is not None:  # b* = ȳ − m·w*, of which ȳ varies by σ²/N whatever w* is
            spread[-1] = -self.mean @ spread[:-1]
            spread[-1, -1] = self.rows**-0.5
        return spread

    @property
    def deviation(self) -> float:
        """√(Σ r² / (N − k)), the standard deviation of the residuals; NaN unless N > k."""
        freedom = self.rows - len(self.lengths) - (self.bias is not None)
        return float(self.loss * self.rows / freedom) ** 0.5 if freedom > 0 else math.nan


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of the rows z = (x, y) of a table with D inputs and one target.

    With u = (w, −1) a residual is r = x w + b − y = z·u + b, so that

        L = 1/N Σ r² = uᵀ Cov u + e²,  e = mean·u + b
        ∂L/∂w = 2 Cov u + 2e mean (the first D entries),  ∂L/∂b = 2e

    The covariance is centred, so that a large common offset of a column costs no digits.

    Attributes:
        n: Number of rows N, 0 or more.
        mean: 1/N Σ z, shape [D+1].
        cov: 1/N Σ (z − mean)(z − mean)ᵀ, shape [D+1, D+1], symmetric.
    """

    n: int
    mean: Tensor
    cov: Tensor

    @property
    def size(self) -> int:
        """Number of inputs D."""
        return len(self.mean) - 1

    @classmethod
    @torch.no_grad()
    def of(cls, x: Any, y: Any) -> "Moments":
        """Read a table once, some rows at a time, and return its moments in float64.

        x, shape [N, D], and y, shape [N], are tensors or arrays (also memmaps) of any real type.
        Sums of integers are exact below 2⁵³; bytes with small integers as targets are multiplied
        in float32, which is exact for them and several times as fast.

        Raises:
            ValueError: For other shapes, complex numbers, NaN and infinities.
        """
        return cls.of_blocks([(x, y)])

    @classmethod
    @torch.no_grad()
    def of_blocks(cls, blocks: Iterable[tuple[Any, Any]]) -> "Moments":
        """Read a table that comes in blocks `(x, y)` of rows, as `of` reads one, in bounded memory.

        Raises:
            ValueError: As in `of`, and if there is no block.
        """
        count, shift, total, products = sums(blocks)
        products, n = products.triu() + products.triu(1).T, max(count, 1)
        cov = (n * products - torch.outer(total, total)) / n**2  # exact up to the division
        if not cov.isfinite().all():
            raise ValueError("x and y must be finite numbers whose squares do not overflow float64")
        return cls(count, (total + n * shift) / n, cov)

    @classmethod
    def of_arrow(cls, source: Any, target: str, features: Sequence[str] | None = None) -> "Moments":
        """Read Arrow batches once, one at a time: of DuckDB, Polars, pandas, a dataset's reader.

        Args:
            source: Any object with the method `__arrow_c_stream__`.
            target: Name of the column y.
            features: Names of the columns of x; None for all others, in their order.

        Raises:
            ValueError: For a name that is no column, nulls, columns that are no real numbers, and
                as in `of`.
            ImportError: Without pyarrow, the extra `arrow` of this package.
        """
        return cls.of_blocks(arrow.blocks(source, target, features))

    def reduce(self, reduce_sum: Callable[[Tensor], Tensor]) -> "Moments":
        """Return the moments of all processes' rows; `reduce_sum` adds up a flat tensor of each."""
        sums = reduce_sum(pad(self.mean, (0, 1), value=1.0) * self.n)
        n = round(sums[-1].item())
        mean = sums[:-1] / max(n, 1)
        squares = (self.cov + torch.outer(self.mean - mean, self.mean - mean)) * self.n
        return Moments(n, mean, reduce_sum(squares.flatten()).view_as(squares) / max(n, 1))

    def example(self) -> tuple[Tensor, Tensor]:
        """Return 2(D+1) rows x, y with these moments: mean ± √(D+1) times the columns of √cov."""
        mean, cov = self.mean.cpu().double(), self.cov.cpu().double()
        deviation = cov.diagonal().clamp(min=0).sqrt()
        inverse = _inverse(deviation)  # so that units cost no digits
        values, vectors = torch.linalg.eigh(cov * torch.outer(inverse, inverse))
        distances = (vectors * (values.clamp(min=0) * len(values)).sqrt()).T * deviation
        z = torch.cat([mean + distances, mean - distances]).to(self.mean.dtype)
        return z[:, :-1], z[:, -1]

    def scale(self, bias: bool = True) -> Tensor:
        """Return the standard deviation of each column of x, without bias its root mean square.

        Shape [D]; 0 for a column that is constant but for its rounding.
        """
        squares = self.cov.diagonal() + (0 if bias else self.mean.square())
        return _varying(squares.clamp(min=0).sqrt(), self.mean)[:-1]

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> "Moments":
        """Return the moments of (x·scale + shift, y): one number each, or shape [D]."""
        factors, offsets = torch.ones_like(self.mean), torch.zeros_like(self.mean)
        factors[:-1], offsets[:-1] = scale, shift
        cov = self.cov * torch.outer(factors, factors)
        return Moments(self.n, self.mean * factors + offsets, cov)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Moments":
        """Return a copy on another device or in another precision (that of the weights)."""
        return Moments(self.n, self.mean.to(device, dtype), self.cov.to(device, dtype))

    def loss(self, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """Return L for w, shape [D], and b, shape []; or K losses for w [K, D] and b [K]."""
        u = pad(weight, (0, 1), value=-1.0)
        return (u @ self.cov * u).sum(-1) + (u @ self.mean + bias).square()

    def loss_and_gradients(
        self, weight: Tensor, bias: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return L, ∂L/∂w and ∂L/∂b from one product of matrix and vector."""
        u = pad(weight, (0, 1), value=-1.0)
        product, error = torch.mv(self.cov, u), torch.dot(self.mean, u) + bias
        loss, twice = torch.addcmul(torch.dot(u, product), error, error), error + error
        return loss, torch.addcmul(product + product, self.mean, twice)[:-1], twice

    def hessian(self, bias: bool = True) -> Tensor:
        """Return H = 2/N [x 1]ᵀ[x 1] in the order (w, b), shape [D+1, D+1]; [D, D] without bias."""
        ones = int(bias)
        mean = pad(self.mean[:-1], (0, ones), value=1.0)
        return 2 * (torch.outer(mean, mean) + pad(self.cov[:-1, :-1], (0, ones, 0, ones)))

    def optimum(self, bias: bool = True) -> Optimum:
        """Return the exact solution for a model with or without bias.

        Each column is divided by its scale sⱼ, so that units do not decide which eigenvalues count
        as zero. As in all normal equations, the condition κ of the scaled matrix costs log₁₀ κ of
        16 digits; see `Optimum.dropped` for what is beyond.
        """
        second = self.cov if bias else self.cov + torch.outer(self.mean, self.mean)
        scale = self.scale(bias)
        inverse = _inverse(scale)
        values, vectors = torch.linalg.eigh(second[:-1, :-1] * torch.outer(inverse, inverse))
        kept = values > values[-1] * rank_tolerance(self.size)
        values, directions = values[kept], inverse[:, None] * vectors[:, kept]
        weight = directions @ (directions.T @ second[:-1, -1] / values)
        mean, dropped = self.mean * bias, int((inverse > 0).sum() - kept.sum())
        offset = mean[-1] - torch.dot(mean[:-1], weight)
        loss, lengths = self.loss(weight, offset).clamp(min=0), (self.n * values).sqrt()
        found = weight, offset if bias else None, loss
        return Optimum(*found, self.n, mean[:-1], scale, lengths, directions, dropped)


class MomentsBatch(Batch):
    """Moments in place of the local rows: the cost of an update does not depend on their number."""

    def __init__(self, moments: Moments) -> None:  # no dataclass: Lightning would convert it
        self.moments = moments

    def loss(self, model: Any) -> Tensor:
        return model.loss_from_moments(self.moments)

    def loss_and_gradients(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return model.loss_and_gradients_from_moments(self.moments)

    def rows(self, model: Any) -> float:
        return self.moments.n

    def to(self, device: torch.device | str) -> "MomentsBatch":
        return MomentsBatch(self.moments.to(device))


def takes_moments(model: object) -> bool:
    """Tell whether `model` computes its own loss, which is least squares, from moments."""
    return is_current(type(model), "loss_and_gradients_from_moments")


def rank_tolerance(size: int) -> float:
    """Return the relative size below which an eigenvalue of a [size, size] matrix is rounding."""
    # On digits the rounding lies at 1e-17 and the smallest true eigenvalues at 2e-12: a coarser
    # cut would drop pixels that are lit in a single picture.
    return max(size, 32) * torch.finfo(torch.float64).eps


def _varying(scale: Tensor, mean: Tensor) -> Tensor:
    """Return the scale of each column, and 0 of one that is constant but for its rounding."""
    return torch.where(scale > 16 * torch.finfo(torch.float64).eps * mean.abs(), scale, 0.0)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1/scale of each column, and 0 of one whose scale is 0."""
    return torch.where(scale > 0, 1 / scale, 0.0)
