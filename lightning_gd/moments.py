"""Sufficient statistics of a least-squares loss: one pass over the rows, then no rows at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# uint8 less 128 lies in [-128, 127]; 1024 products of at most 128² sum to at most 2²⁴, up to which
# float32 holds every integer: so many rows and no more have an exact float32 product.
_BYTE_ROWS, _BYTE_SHIFT = 1024, 128
# Only the upper triangle of xᵀx is computed, in panels of so many rows of it.
_PANEL = 256


def rank_tolerance(size: int) -> float:
    """Eigenvalues of a [size, size] matrix below this share of the largest are rounding noise.

    max(size, 32)·2⁻⁵². On digits the noise lies at 1e-17 of the largest, true eigenvalues begin at
    2e-12: a coarser cut would drop pixels that are lit, faintly, in a single picture.
    """
    return max(size, 32) * torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Optimum:
    """The exact least-squares solution.

    Attributes:
        weight: w*, shape [D].
        bias: b*, shape [], or None for a model without bias.
        loss: L* = 1/N Σ r² at the solution, shape []; its rounding error is about 1e-15 of the
            terms of ``Moments.loss``, so where L* is smaller, take one pass over the residuals.
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
    """All that L = 1/N Σ r², r = xw + b − y, and its derivatives need to know of the data.

    Second moments are centred, Cov(u, v) = 1/N Σ (u − ū)(v − v̄), so that a large common offset
    costs no digits. Index legend: N rows, D columns.

    Attributes:
        n: Number of rows; 0 is an empty share.
        mean_x: Column means m, shape [D].
        mean_y: Target mean ȳ, shape [].
        cov_xx: C = Cov(x, x), shape [D, D], symmetric.
        cov_xy: c = Cov(x, y), shape [D].
        var_y: v = Cov(y, y), shape [].
    """

    n: int
    mean_x: Tensor
    mean_y: Tensor
    cov_xx: Tensor
    cov_xy: Tensor
    var_y: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, x: Any, y: Any, *, block_rows: int = 4096) -> Moments:
        """Read a table once, block by block, in constant extra memory.

        uint8 tables take the quick road: products in float32 that are exact, summed in float64.
        Integers, of whatever type, have exact sums as long as those stay below 2⁵³.

        Args:
            x: Inputs, shape [N, D]: a tensor or an array (a memmap too) of any real type.
            y: Targets, shape [N]: likewise.
            block_rows: Rows read at a time (at most 1024 are used for uint8).

        Returns:
            The moments in float64, on the device of ``x`` (on the CPU for devices without float64).

        Raises:
            ValueError: Shapes other than [N, D] and [N], complex numbers, or NaN and infinities.
        """
        _check_table(x, y, block_rows)
        n, size = x.shape
        if n == 0:
            return cls.zero(size)
        is_bytes = str(x.dtype).removeprefix("torch.") == "uint8"
        rows = min(block_rows, _BYTE_ROWS) if is_bytes else block_rows
        first = _block(x, 0, rows)
        shift_x = torch.full_like(first[0], _BYTE_SHIFT).double() if is_bytes else _shift(first)
        shift_y = _shift(_block(y, 0, rows)).to(first.device)
        sums = _Sums.zero(size, first.device)
        with _exact_float32(first.device.type):
            for start in range(0, n, rows):
                block, target = _block(x, start, rows), _block(y, start, rows).to(first.device)
                block = block.float().sub_(_BYTE_SHIFT) if is_bytes else block.double() - shift_x
                sums.add(block, target.double() - shift_y)
        moments = sums.centred(n, shift_x, shift_y)
        _check_finite(moments, x, y, rows)
        return moments

    @classmethod
    def zero(cls, size: int, device: torch.device | str | None = None) -> Moments:
        """The moments of no rows of ``size`` columns: neutral under ``+``."""
        zeros = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)
        return cls(0, zeros[0, 1:], zeros[0, 0], zeros[1:, 1:], zeros[1:, 0], zeros[0, 0])

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of rows together (Chan, Golub and LeVeque's update).

        Cov = (n₁ Cov₁ + n₂ Cov₂)/n + n₁n₂/n² δδᵀ with δ = mean₂ − mean₁.
        """
        if self.mean_x.shape != other.mean_x.shape:
            raise ValueError(
                f"cannot add moments of {len(self.mean_x)} and of {len(other.mean_x)} columns; "
                "both must have the same number"
            )
        if not (self.n and other.n):
            return self if other.n == 0 else other
        n, share = self.n + other.n, other.n / (self.n + other.n)
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y

        def blend(a: Tensor, b: Tensor, between: Tensor) -> Tensor:
            return a * (self.n / n) + b * share + between * (share * self.n / n)

        return Moments(
            n,
            self.mean_x + dx * share,
            self.mean_y + dy * share,
            blend(self.cov_xx, other.cov_xx, torch.outer(dx, dx)),
            blend(self.cov_xy, other.cov_xy, dx * dy),
            blend(self.var_y, other.var_y, dy * dy),
        )

    def reduce(self, reduce_sum: Callable[[Tensor], Tensor]) -> Moments:
        """Moments of the rows of all processes.

        Two calls: the first finds the common means, the second adds the sums about them. A process
        without rows takes part with zeros.

        Args:
            reduce_sum: Takes a flat float64 tensor, returns its elementwise sum over all processes.
        """
        size = len(self.mean_x)
        mean = torch.cat([self.mean_y[None], self.mean_x]).double()
        first = reduce_sum(torch.cat([mean.new_ones(1), mean]) * self.n)
        n = round(first[0].item())
        common = first[1:] / max(n, 1)
        cov = mean.new_empty(size + 1, size + 1)
        cov[0, 0], cov[0, 1:], cov[1:, 0] = self.var_y, self.cov_xy, self.cov_xy
        cov[1:, 1:] = self.cov_xx
        sums = (cov + torch.outer(mean - common, mean - common)) * self.n
        cov = reduce_sum(sums.flatten()).view_as(sums) / max(n, 1)
        return Moments(n, common[1:], common[0], cov[1:, 1:], cov[1:, 0], cov[0, 0])

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> Moments:
        """The moments of x·scale + shift, without reading x again.

        Args:
            scale: One factor for all columns or one a column, shape [] or [D].
            shift: What is added after scaling, shape [] or [D].
        """
        ones = torch.ones_like(self.mean_x)
        scale, shift = ones * _per_column("scale", scale, ones), _per_column("shift", shift, ones)
        cov_xx = self.cov_xx * torch.outer(scale, scale)
        mean_x = self.mean_x * scale + shift
        return Moments(self.n, mean_x, self.mean_y, cov_xx, self.cov_xy * scale, self.var_y)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Moments:
        """A copy on another device or in another precision (the dtype of the weights)."""
        fields = (self.mean_x, self.mean_y, self.cov_xx, self.cov_xy, self.var_y)
        return Moments(self.n, *(f.to(device=device, dtype=dtype) for f in fields))

    def loss(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """L = wᵀCw − 2wᵀc + v + e², e = mᵀw + b − ȳ: the mean of r² over the rows.

        Args:
            weight: w, shape [D].
            bias: b, shape [], or None for a model without bias.
        """
        half, error = self._half(weight, bias)
        return self._loss(weight, half, error)

    def gradients(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """∂L/∂w = 2(Cw − c) + 2e m, shape [D], and ∂L/∂b = 2e (None without bias)."""
        half, error = self._half(weight, bias)
        return self._gradients(half, error, bias)

    def loss_and_gradients(
        self, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss and its gradients for one product of matrix and vector."""
        half, error = self._half(weight, bias)
        return self._loss(weight, half, error), *self._gradients(half, error, bias)

    def _half(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cw − c and e: what the loss and its gradients have in common."""
        if weight.shape != self.mean_x.shape or (bias is not None and bias.dim()):
            raise ValueError(
                f"weight {list(weight.shape)} and bias {None if bias is None else list(bias.shape)}"
                f" do not fit these moments; they take [{len(self.mean_x)}] and [] or None"
            )
        error = torch.dot(self.mean_x, weight) - self.mean_y
        half = torch.addmv(self.cov_xy, self.cov_xx, weight, beta=-1)
        return half, error if bias is None else error + bias

    def _loss(self, weight: Tensor, half: Tensor, error: Tensor) -> Tensor:
        quadratic = torch.dot(weight, half - self.cov_xy)
        return torch.addcmul(quadratic + self.var_y, error, error)

    def _gradients(
        self, half: Tensor, error: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        twice = error + error
        return torch.addcmul(half + half, self.mean_x, twice), None if bias is None else twice

    def hessian(self, bias: bool = True) -> Tensor:
        """H = 2/N [x 1]ᵀ[x 1] in the order (w, b), shape [D+1, D+1]; [D, D] without bias."""
        mean = self.mean_x.double()
        second = self.cov_xx.double() + torch.outer(mean, mean)
        if not bias:
            return 2 * second
        top = torch.cat([second, mean[:, None]], dim=1)
        return 2 * torch.cat([top, torch.cat([mean, mean.new_ones(1)])[None]])

    def optimum(self, bias: bool = True, rtol: float | None = None) -> Optimum:
        """The exact least-squares solution, from an eigendecomposition of the centred matrix.

        Columns are first divided by their scale s (their standard deviation; without bias, their
        root mean square), so that units do not decide what counts as zero. Where the data leave
        weights undetermined, the solution has the smallest Σ (sⱼwⱼ)² — the minimum norm on
        standardised columns, not in the units of x, so rarely lit pixels may get large weights; nor
        where gradient descent from 0 ends, which has the same loss — and a constant column has
        weight 0. As with
        any normal equations, columns whose correlation matrix has condition κ lose log₁₀ κ of 16
        digits.

        Args:
            bias: Whether the model has a bias.
            rtol: Eigenvalues of the scaled matrix below rtol·λmax count as zero; by default
                max(D, 32)·2⁻⁵² (see ``rank_tolerance``).
        """
        m = self.to(dtype=torch.float64)
        matrix, right = m.cov_xx, m.cov_xy
        if not bias:
            matrix = matrix + torch.outer(m.mean_x, m.mean_x)
            right = right + m.mean_x * m.mean_y
        scale = matrix.diagonal().clamp(min=0).sqrt()
        # A spread in the last bits of the mean is rounding, not information.
        noise = 16 * torch.finfo(torch.float64).eps * m.mean_x.abs()
        inverse = torch.where(scale > noise, 1 / scale, 0.0)
        values, vectors = torch.linalg.eigh(matrix * torch.outer(inverse, inverse))
        kept = values > values[-1:] * (rank_tolerance(len(right)) if rtol is None else rtol)
        values, vectors = values[kept], vectors[:, kept]
        along = vectors.T @ (inverse * right)
        weight = inverse * (vectors @ (along / values))
        offset = m.mean_y - torch.dot(m.mean_x, weight) if bias else None
        return Optimum(weight, offset, m.loss(weight, offset).clamp(min=0), len(values))

    def excess_loss(self, weight: Tensor, bias: Tensor | None, optimum: Optimum) -> Tensor:
        """L − L* = ½(θ−θ*)ᵀH(θ−θ*) = δᵀCδ + (mᵀδ + δb)², without the cancellation of L − L*."""
        if (bias is None) != (optimum.bias is None):
            raise ValueError(f"bias is {bias} but the optimum has bias {optimum.bias}")
        delta = weight - optimum.weight.to(weight)
        error = torch.dot(self.mean_x, delta)
        if bias is not None and optimum.bias is not None:
            error = error + (bias - optimum.bias.to(bias))
        return torch.dot(delta, torch.mv(self.cov_xx, delta)) + error.square()


@dataclass
class _Sums:
    """Running sums over shifted rows, float64; of ``xx`` only the upper triangle is kept."""

    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zero(cls, size: int, device: torch.device) -> _Sums:
        shapes = ((size,), (), (size, size), (size,), ())
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows; ``x`` is float64, or float32 with integers whose sums are exact."""
        self.x += x.sum(0)
        self.y += y.sum()
        self.yy += torch.dot(y, y)
        small = x.dtype == torch.float32 and bool(((y == y.round()) & (y.abs() <= 128)).all())
        self.xy += x.T @ y.float() if small else x.double().T @ y
        for start in range(0, x.shape[1], _PANEL):
            stop = start + _PANEL
            self.xx[start:stop, start:] += x[:, start:stop].T @ x[:, start:]

    def centred(self, n: int, shift_x: Tensor, shift_y: Tensor) -> Moments:
        """Cov = (n Σuv − Σu Σv)/n²: of integers the numerator is exact, whatever the shift."""
        xx = self.xx.triu() + self.xx.triu(1).T
        return Moments(
            n,
            (self.x + n * shift_x) / n,
            (self.y + n * shift_y) / n,
            (n * xx - torch.outer(self.x, self.x)) / n**2,
            (n * self.xy - self.x * self.y) / n**2,
            (n * self.yy - self.y.square()) / n**2,
        )


@contextmanager
def _exact_float32(device_type: str) -> Iterator[None]:
    """Let float32 products use bfloat16 units where the processor has them, and no autocast.

    bfloat16 holds integers up to 256 exactly and the sums stay float32, so for bytes nothing is
    lost; processors without such units ignore the setting.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and later
    before = getattr(matmul, "fp32_precision", None)
    try:
        if before is not None:
            setattr(matmul, "fp32_precision", "bf16")  # noqa: B010 (unknown to type checkers)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before is not None:
            setattr(matmul, "fp32_precision", before)  # noqa: B010


def _block(table: Any, start: int, rows: int) -> Tensor:
    """Rows start … start + rows as a tensor; the block of an array is copied, never the array."""
    part = table[start : start + rows]
    part = part.detach() if isinstance(part, Tensor) else torch.tensor(part)
    return part.cpu() if part.device.type == "mps" else part  # MPS has no float64


def _shift(block: Tensor) -> Tensor:
    """A value near the mean; integers for integers, exactly the value of a constant column."""
    block = block.double()
    return block[0] + (block - block[0]).mean(0).round()


def _per_column(name: str, value: Tensor | float, ones: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=ones.dtype, device=ones.device)
    if value.shape not in (torch.Size([]), ones.shape):
        raise ValueError(
            f"{name} has shape {list(value.shape)}; it must be [] or [{len(ones)}], one a column"
        )
    return value


def _check_table(x: Any, y: Any, block_rows: int) -> None:
    shapes = [list(getattr(t, "shape", ())) for t in (x, y)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise ValueError(f"x {shapes[0]} and y {shapes[1]} must have shapes [N, D] and [N]")
    for name, table in (("x", x), ("y", y)):
        if "complex" in str(table.dtype):
            raise ValueError(f"{name} is {table.dtype}; it must be real")
    if block_rows < 1:
        raise ValueError(f"block_rows={block_rows} must be at least 1")


def _check_finite(moments: Moments, x: Any, y: Any, rows: int) -> None:
    """One NaN or infinity in the table leaves its mark in the diagonal; only then look for it."""
    diagonal = moments.cov_xx.diagonal().sum() + moments.var_y
    if torch.isfinite(diagonal):
        return
    for name, table in (("x", x), ("y", y)):
        for start in range(0, len(table), rows):
            block = _block(table, start, rows)
            for index in torch.isfinite(block).logical_not().nonzero()[:1]:
                place = [start + int(index[0]), *index[1:].tolist()]
                value = block[tuple(index)].item()
                raise ValueError(f"{name}{place} is {value}; every value must be finite")
    raise ValueError("the squares of these values overflow float64; scale the table down")
