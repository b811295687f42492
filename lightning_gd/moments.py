"""Moments of a table: all that a least-squares loss and its gradients depend on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_gd import arrow
from lightning_gd.batch import Batch, is_current
from lightning_gd.optimum import Optimum, inverse_of, nonconstant_scale, rank_tolerance
from lightning_gd.sums import sums


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
        inverse = inverse_of(deviation)  # so that units cost no digits
        values, vectors = torch.linalg.eigh(cov * torch.outer(inverse, inverse))
        distances = (vectors * (values.clamp(min=0) * len(values)).sqrt()).T * deviation
        z = torch.cat([mean + distances, mean - distances]).to(self.mean.dtype)
        return z[:, :-1], z[:, -1]

    def scale(self, bias: bool = True) -> Tensor:
        """Return the standard deviation of each column of x, without bias its root mean square.

        Shape [D]; 0 for a column that is constant but for its rounding.
        """
        squares = self.cov.diagonal() + (0 if bias else self.mean.square())
        return nonconstant_scale(squares.clamp(min=0).sqrt(), self.mean)[:-1]

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
        inverse = inverse_of(scale)
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
