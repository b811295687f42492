"""Sums over the rows of a table, in one pass: exact for bytes, in float64 for other numbers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# Bytes less 128 lie in [-128, 127]. Over 1,024 rows their products add up to at most
# 128²·1024 = 2²⁴, and float32 holds every integer up to there: the sums are exact.
ROWS, BYTE_SHIFT = 1024, 128
NARROW = 64  # columns up to which more rows at once are faster
PANEL = 256  # rows of the symmetric product computed at once, each from the diagonal on


@torch.no_grad()
def sums(blocks: Iterable[tuple[Any, Any]]) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return N, s, Σ (z − s) and the upper part of Σ (z − s)(z − s)ᵀ over the rows z = (x, y).

    The blocks are x, shape [n, D], and y, shape [n]; s, shape [D+1], is near the mean of the first.

    Raises:
        ValueError: For other shapes, complex numbers, and if there is no block.
    """
    count, shift = 0, torch.empty(0)
    total = products = shift
    with _bfloat16_products():
        for x, y in blocks:
            _check_form(x, y)
            if not count:
                shift = _shift(x, y)
                total, products = torch.zeros_like(shift), shift.new_zeros(2 * shift.shape)
            step = ROWS if len(shift) > NARROW or _part(x, 0, 1).dtype == torch.uint8 else 4 * ROWS
            for start in range(0, len(y), step):
                rows = _shifted_rows(x, y, start, step, shift)
                total += rows.sum(0)
                for i in range(0, len(shift), PANEL):
                    part = rows.new_empty(0)  # autocast leaves products with out= alone
                    torch.mm(rows[:, i : i + PANEL].T, rows[:, i:], out=part)
                    products[i : i + PANEL, i:] += part
            count += len(y)
    if not len(shift):
        raise ValueError("moments need at least one block (x, y), with or without rows")
    return count, shift, total, products


def _check_form(x: Any, y: Any) -> None:
    fits = len(x.shape) == 2 and len(y.shape) == 1 and len(x) == len(y)
    if not fits or any(_part(part, 0, 1).is_complex() for part in (x, y)):
        raise ValueError(f"x {list(x.shape)}, y {list(y.shape)} must be real [N, D] and [N] tables")


def _shift(x: Any, y: Any) -> Tensor:
    """Return a number near the mean of each column, [D+1]: whole for integers, 128 for bytes."""
    inputs, targets = _part(x, 0, ROWS), _part(y, 0, ROWS)
    rows = torch.cat([inputs.double(), targets[:, None].to(inputs.device).double()], dim=1)
    first = rows[:1].sum(0)  # so that a constant column becomes exactly 0; 0 without rows
    shift = first + ((rows - first).sum(0) / max(len(rows), 1)).round()
    if inputs.dtype == torch.uint8:
        shift[:-1] = BYTE_SHIFT
    return shift


def _shifted_rows(x: Any, y: Any, start: int, step: int, shift: Tensor) -> Tensor:
    """Return rows (x, y) − shift, [n, D+1]: in float32 if its products are exact, else float64."""
    inputs, targets = _part(x, start, step), _part(y, start, step).to(shift) - shift[-1]
    small = (targets == targets.round()) & (targets.abs() <= BYTE_SHIFT)
    dtype = torch.float32 if inputs.dtype == torch.uint8 and small.all() else torch.float64
    return torch.cat([inputs.to(dtype) - shift[:-1].to(dtype), targets.to(dtype)[:, None]], dim=1)


def _part(table: Any, start: int, count: int) -> Tensor:
    """Return some rows as a tensor; of an array only these rows are copied."""
    part = table[start : start + count]
    part = part if isinstance(part, Tensor) else torch.tensor(part)
    return part.cpu() if part.device.type == "mps" else part  # MPS has no float64


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Multiply float32 by bfloat16 units where there are any; they are exact for bytes less 128."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision="none"))
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"  # from torch 2.9 on
    try:
        yield
    finally:
        matmul.fp32_precision = before
