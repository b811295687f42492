"""Moments of a table: all that a least-squares loss and its gradients depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_gd.batch import Batch, is_current
from lightning_gd.covariance import mean_and_covariance, rank_tolerance


@dataclass(frozen=True, eq=False)
class Optimum:
    """The exact least-squares solution.

    Attributes:
        weight: w*, shape [D].
        bias: b*, shape [], or None for a model without bias.
        loss: L*, shape [], with a rounding error of about 1e-15 of the variance of y.
        rank: Number of directions of weight space that the data determine.
    """

    weight: Tensor
    bias: Tensor | None
    loss: Tensor
    rank: int

    @property
    def theta(self) -> Tensor:
        """(w*, b*) flattened in the order of the Hessian, shape [D+1]; [D] without bias."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[None]])


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
    def mean_x(self) -> Tensor:
        """Mean of the inputs, shape [D]."""
        return self.mean[:-1]

    @property
    def cov_xx(self) -> Tensor:
        """Covariance of the inputs, shape [D, D]."""
        return self.cov[:-1, :-1]

    @classmethod
    def of(cls, x: Any, y: Any) -> Moments:
        """Read a table once, some rows at a time; see `mean_and_covariance`.

        Args:
            x: Inputs, shape [N, D]: a tensor or an array (also a memmap) of any real type.
            y: Targets, shape [N]: likewise.

        Returns:
            The moments in float64, on the device of ``x`` (on the CPU if it has no float64).

        Raises:
            ValueError: For shapes other than [N, D] and [N], complex numbers, NaN and infinities.
        """
        mean, cov = mean_and_covariance(x, y)
        return cls(len(y), mean, cov)

    @classmethod
    def zero(cls, size: int) -> Moments:
        """Return the moments of no rows with ``size`` inputs, which ``+`` leaves out."""
        zeros = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        return cls(0, zeros[0], zeros)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows (Chan, Golub and LeVeque's update).

        Cov = (n₁ Cov₁ + n₂ Cov₂)/n + n₁n₂/n² δδᵀ with δ = mean₂ − mean₁.
        """
        if self.n == 0 or other.n == 0:
            return self if other.n == 0 else other
        n, delta = self.n + other.n, other.mean - self.mean
        first, second = self.n / n, other.n / n
        cov = first * self.cov + second * other.cov + first * second * torch.outer(delta, delta)
        return Moments(n, self.mean + second * delta, cov)

    def reduce(self, reduce_sum: Callable[[Tensor], Tensor]) -> Moments:
        """Return the moments of the rows of all processes.

        A process without rows calls this too: it adds zeros.

        Args:
            reduce_sum: Takes a flat float64 tensor, returns its elementwise sum over all processes.
        """
        mean = self.mean.double()
        sums = reduce_sum(torch.cat([mean.new_ones(1), mean]) * self.n)
        n = round(sums[0].item())
        common = sums[1:] / max(n, 1)
        squares = (self.cov + torch.outer(mean - common, mean - common)) * self.n
        return Moments(n, common, reduce_sum(squares.flatten()).view_as(squares) / max(n, 1))

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> Moments:
        """Return the moments of (x·scale + shift, y), without reading x again.

        Args:
            scale: One factor for all inputs, or one per input, shape [D].
            shift: Added after scaling: one number, or one per input, shape [D].
        """
        factors, offsets = torch.ones_like(self.mean), torch.zeros_like(self.mean)
        factors[:-1], offsets[:-1] = scale, shift
        cov = self.cov * torch.outer(factors, factors)
        return Moments(self.n, self.mean * factors + offsets, cov)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Moments:
        """Return a copy on another device or in another precision (that of the weights)."""
        return Moments(self.n, self.mean.to(device, dtype), self.cov.to(device, dtype))

    def loss(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return L for w, shape [D], and b, shape [] or None for a model without bias."""
        return self.loss_and_gradients(weight, bias)[0]

    def gradients(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return ∂L/∂w, shape [D], and ∂L/∂b, shape [] (None without bias)."""
        return self.loss_and_gradients(weight, bias)[1:]

    def loss_and_gradients(
        self, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return L, ∂L/∂w and ∂L/∂b from one product of matrix and vector."""
        size = len(self.mean) - 1
        if weight.shape != (size,) or (bias is not None and bias.dim()):
            raise ValueError(
                f"weight {list(weight.shape)} and bias {None if bias is None else list(bias.shape)}"
                f" do not fit these moments; they take [{size}] and [] or None"
            )
        return self._at(pad(weight, (0, 1), value=-1.0), bias)

    def _at(self, u: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        product, error = torch.mv(self.cov, u), torch.dot(self.mean, u)
        if bias is not None:
            error = error + bias
        loss, twice = torch.addcmul(torch.dot(u, product), error, error), error + error
        gradient = torch.addcmul(product + product, self.mean, twice)[:-1]
        return loss, gradient, None if bias is None else twice

    def excess_loss(self, theta: Tensor, optimum: Optimum) -> Tensor:
        """Return L − L* = δᵀ Cov(x, x) δ + (mean·δ + δb)², which does not cancel near the optimum.

        Args:
            theta: (w, b), shape [D+1], or w alone, shape [D]; δ = w − w* and δb = b − b*.
            optimum: The exact solution, of a model with bias if ``theta`` holds one.
        """
        delta, size = theta - optimum.theta.to(theta), len(self.mean_x)
        return self._at(pad(delta[:size], (0, 1)), delta[size:].sum())[0]

    def hessian(self, bias: bool = True) -> Tensor:
        """Return H = 2/N [x 1]ᵀ[x 1] in the order (w, b), shape [D+1, D+1]; [D, D] without bias."""
        m, size = self.to(dtype=torch.float64), len(self.mean_x)
        mean = pad(m.mean_x, (0, 1), value=1.0) if bias else m.mean_x
        hessian = torch.outer(mean, mean)
        hessian[:size, :size] += m.cov_xx
        return 2 * hessian

    def optimum(self, bias: bool = True) -> Optimum:
        """Return the exact solution for a model with or without bias.

        Each column is divided by its scale s, the standard deviation or without bias the root mean
        square, so that units do not decide which eigenvalues count as zero. Of several solutions
        it is that with the smallest Σ (sⱼwⱼ)²; gradient descent from 0 ends at another one with
        the same loss. As in all normal equations, the condition κ of the scaled matrix costs
        log₁₀ κ of 16 digits.
        """
        m = self.to(dtype=torch.float64)
        second = m.cov if bias else m.cov + torch.outer(m.mean, m.mean)
        matrix, right = second[:-1, :-1], second[:-1, -1]
        scale = matrix.diagonal().clamp(min=0).sqrt()
        # A deviation in the last bits of the mean is rounding.
        rounding = 16 * torch.finfo(torch.float64).eps * m.mean_x.abs()
        inverse = torch.where(scale > rounding, 1 / scale, 0.0)
        values, vectors = torch.linalg.eigh(matrix * torch.outer(inverse, inverse))
        kept = values > values[-1:] * rank_tolerance(len(right))
        values, vectors = values[kept], vectors[:, kept]
        weight = inverse * (vectors @ (vectors.T @ (inverse * right) / values))
        offset = m.mean[-1] - torch.dot(m.mean_x, weight) if bias else None
        return Optimum(weight, offset, m.loss(weight, offset).clamp(min=0), len(values))


class MomentsBatch(Batch):
    """Moments in place of the local rows: the cost of an update does not depend on their number.

    Args:
        moments: Of the local rows, in the precision of the weights.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def loss(self, model: Any) -> Tensor:
        """Call `model.loss_from_moments`."""
        return model.loss_from_moments(self.moments)

    def loss_and_gradients(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Call `model.loss_and_gradients_from_moments`."""
        return model.loss_and_gradients_from_moments(self.moments)

    def rows(self, model: Any) -> float:
        """Return the number of rows that the moments are of."""
        return self.moments.n

    def to(self, device: torch.device | str) -> MomentsBatch:
        """Move the moments."""
        return MomentsBatch(self.moments.to(device))


def takes_moments(model: object) -> bool:
    """Tell whether the loss of `model` is least squares, computed from moments.

    True if its class defines `loss_and_gradients_from_moments` at or below the class that last
    overrides `forward`, `loss` or `gradients`.
    """
    return is_current(type(model), "loss_and_gradients_from_moments")
