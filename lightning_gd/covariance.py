"""Mean and covariance of a table by one pass over its rows, exact for integers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# Bytes less 128 lie in [-128, 127]. Over 1,024 rows their products add up to at most
# 128²·1024 = 2²⁴, and float32 holds every integer up to there: the sums are exact.
ROWS, BYTE_SHIFT = 1024, 128
PANEL = 256  # rows of the symmetric product computed at once, each from the diagonal on


@torch.no_grad()
def mean_and_covariance(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Return the mean, shape [D+1], and the covariance, [D+1, D+1], of the rows (x, y).

    Sums of integers of any type are exact below 2⁵³. Bytes with small integers as targets are
    multiplied in float32, which is exact for them and several times as fast. See `Moments.of` for
    the arguments and the errors. Without rows the covariance is 0.
    """
    shapes = [list(getattr(table, "shape", ())) for table in (x, y)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise ValueError(f"x {shapes[0]} and y {shapes[1]} must have shapes [N, D] and [N]")
    shift = _shift(x, y)
    total, products = torch.zeros_like(shift), torch.zeros_like(torch.outer(shift, shift))
    with _exact_float32(shift.device.type):
        for start in range(0, len(y), ROWS):
            rows = _shifted_rows(x, y, start, shift)
            total += rows.sum(0)
            for first in range(0, len(shift), PANEL):
                panel = slice(first, first + PANEL)
                products[panel, first:] += rows[:, panel].T @ rows[:, first:]
    products = products.triu() + products.triu(1).T
    n = max(len(y), 1)
    covariance = (n * products - torch.outer(total, total)) / n**2  # exact up to the division
    if not covariance.diagonal().isfinite().all():
        _refuse_infinite(x, y)
    return (total + n * shift) / n, covariance


def rank_tolerance(size: int) -> float:
    """Return the relative size below which an eigenvalue of a [size, size] matrix is rounding.

    max(size, 32)·2⁻⁵² of the largest. On digits the rounding lies at 1e-17 and the smallest true
    eigenvalues at 2e-12: a coarser cut would drop pixels that are lit in a single picture.
    """
    return max(size, 32) * torch.finfo(torch.float64).eps


def _shift(x: Any, y: Any) -> Tensor:
    """Return a value near the mean of each column, shape [D+1], to subtract before squaring.

    Integers for integers, 128 for bytes, and exactly the value of a constant column.
    """
    inputs = _part(x, 0)
    rows = torch.cat([inputs.double(), _part(y, 0)[:, None].to(inputs.device).double()], dim=1)
    first = rows[:1].sum(0)  # zeros if there is no row
    shift = first + ((rows - first).sum(0) / max(len(rows), 1)).round()
    if inputs.dtype == torch.uint8:
        shift[:-1] = BYTE_SHIFT
    return shift


def _shifted_rows(x: Any, y: Any, start: int, shift: Tensor) -> Tensor:
    """Return rows (x, y) − shift, [n, D+1]: in float32 if its products are exact, else float64."""
    inputs, targets = _part(x, start), _part(y, start).to(shift.device).double() - shift[-1]
    small = (targets == targets.round()) & (targets.abs() <= BYTE_SHIFT)
    exact = inputs.dtype == torch.uint8 and bool(small.all())
    rows = shift.new_empty(len(inputs), len(shift), dtype=torch.float32 if exact else torch.float64)
    rows[:, :-1], rows[:, -1] = inputs, targets
    rows[:, :-1] -= shift[:-1].to(rows.dtype)
    return rows


def _part(table: Any, start: int) -> Tensor:
    """Return some rows as a tensor; of an array only these rows are copied."""
    part = table[start : start + ROWS]
    part = part.detach() if isinstance(part, Tensor) else torch.tensor(part)
    if part.is_complex():
        raise ValueError(f"a table of {part.dtype} has no moments; x and y must be real")
    return part.cpu() if part.device.type == "mps" else part  # MPS has no float64


@contextmanager
def _exact_float32(device_type: str) -> Iterator[None]:
    """Switch autocast off, and multiply float32 by the processor's bfloat16 units if it has them.

    bfloat16 holds integers up to 256 and the sums stay float32, so bytes lose nothing.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", SimpleNamespace())  # from torch 2.9
    before = getattr(matmul, "fp32_precision", "none")
    matmul.fp32_precision = "bf16"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


def _refuse_infinite(x: Any, y: Any) -> None:
    """Name the first value that is not finite; it was noticed on the diagonal."""
    for name, table in (("x", x), ("y", y)):
        for start in range(0, len(table), ROWS):
            part = _part(table, start)
            for index in part.isfinite().logical_not().nonzero()[:1].tolist():
                place, value = [start + index[0], *index[1:]], part[tuple(index)].item()
                raise ValueError(f"{name}{place} is {value}; every value must be finite")
    raise ValueError("the squares of these values overflow float64; scale the table down")
