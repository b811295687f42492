"""The exact solution of a least-squares problem, and how well its rows determine it."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

FREE = 1e-9  # the share of a direction outside of the row space that is not rounding


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
        dropped: Number of directions below the precision of moments. If they are not rounding,
            `loss` is above the minimum; `of_rows` resolves them.
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
        scale = nonconstant_scale(columns.square().mean(0).sqrt(), mean)
        inverse = inverse_of(scale)
        # R of QR has the singular values of the rows, and at most D + 1 rows itself.
        reduced = torch.linalg.qr(torch.cat([columns * inverse, goal[:, None]], 1), mode="r").R
        left, lengths, right = torch.linalg.svd(reduced[:, :-1], full_matrices=False)
        kept = lengths > lengths[0] * max(x.shape) * torch.finfo(torch.float64).eps
        lengths, directions = lengths[kept], inverse[:, None] * right[kept].T
        weight = directions @ (reduced[:, -1] @ left[:, kept] / lengths)
        loss, offset = (columns @ weight - goal).square().mean(), target - mean @ weight
        found = weight, offset if bias else None, loss
        return cls(*found, len(x), mean, scale, lengths, directions)

    def to(self, device: torch.device) -> "Optimum":
        """Return a copy on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def theta(self) -> Tensor:
        """(w*, b*) flattened in the order of the Hessian, shape [D+1]; [D] without bias."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[None]])

    @property
    def is_unique(self) -> Tensor:
        """Whether the rows determine each entry of w*, shape [D].

        False for linearly dependent and constant columns.
        """
        share = (self.directions * self.scale[:, None]).square().sum(1)  # of eⱼ in the row space
        return (self.scale > 0) & (share > 1 - FREE)

    def determines(self, g: Tensor) -> bool:
        """Tell whether Σ gⱼ wⱼ, with g of shape [D], is the same for all solutions w."""
        axes, scaled = self.directions * self.scale[:, None], g * inverse_of(self.scale)
        outside = scaled - axes @ (axes.T @ scaled)
        free = (self.scale == 0) & (g != 0)  # of constant columns
        return not free.any() and bool(outside.norm() <= FREE * scaled.norm())

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


def rank_tolerance(size: int) -> float:
    """Return the relative size below which an eigenvalue of a [size, size] matrix is rounding."""
    # On digits the rounding lies at 1e-17 and the smallest true eigenvalues at 2e-12: a coarser
    # cut would drop pixels that are lit in a single picture.
    return max(size, 32) * torch.finfo(torch.float64).eps


def nonconstant_scale(scale: Tensor, mean: Tensor) -> Tensor:
    """Return the scale of each column, and 0 of one that is constant but for its rounding."""
    return torch.where(scale > 16 * torch.finfo(torch.float64).eps * mean.abs(), scale, 0.0)


def inverse_of(scale: Tensor) -> Tensor:
    """Return 1/scale of each column, and 0 of one whose scale is 0."""
    return torch.where(scale > 0, 1 / scale, 0.0)
