"""Compares p.grad after the reduction over processes with the gradient of the global batch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gd.gradcheck.bench import double
from lightning_gd.gradcheck.diagnosis import alike, largest, ratio, worst_entry
from lightning_gd.gradcheck.report import GradientReport, ParameterReport


def check_reduced(
    expected: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    world_size: int,
    dtype: torch.dtype,
    rows: float,
    *,
    scale: Mapping[str, float] | None = None,
    local: Mapping[str, Tensor] | None = None,
) -> GradientReport:
    """Compare `p.grad` after the reduction over processes with that of the global batch.

    The bound is 16 eps √(N + D) · scale: at the N of a global batch the worst case N·eps would
    hide mistakes in float32, and rounding errors of independent sign add up like a random walk.

    Args:
        expected: Gradient of the loss on the global batch.
        actual: The gradient that the optimizer is about to see.
        world_size: Number of processes.
        dtype: Precision in which `actual` was computed.
        rows: N, rows of the global batch.
        scale: Size of the summed terms, per parameter; without it the largest entry of all of
            `expected`, which is too strict close to the optimum.
        local: Gradient of the local rows: names a missing reduction.
    """
    largest_of_all = max((largest(g) for g in expected.values()), default=0.0)
    reports = []
    for name, gradient in expected.items():
        noise = 16 * torch.finfo(dtype).eps * math.sqrt(rows + gradient.numel())
        bound = noise * (scale[name] if scale else largest_of_all)
        right, found = double(gradient), double(actual.get(name, gradient * math.nan))
        error, size, words = largest(found - right), largest(right), None
        if not error <= bound:  # also nan
            own = local[name] if local else None
            words = _name_mistake(right, found, own, world_size, bound)
        reports.append(ParameterReport(name, error, size, bound, words))
    return GradientReport(tuple(reports))


def _name_mistake(
    expected: Tensor, actual: Tensor, local: Tensor | None, world_size: int, noise: float
) -> str:
    if actual.isnan().any():
        return "p.grad is missing or nan"
    if local is not None and alike(actual, double(local), noise):
        return "the reduction is missing: this is the gradient of this process's own rows"
    k = ratio(actual, expected, noise)
    if k is None and world_size == 1:
        return worst_entry("p.grad", actual, expected)
    if k is None:
        return "no factor fits: the reduction is missing, or weights uneven processes alike"
    if world_size > 1 and abs(k - world_size) <= 1e-3 * world_size:
        return f"{world_size} times too large: summed over the processes instead of averaged"
    if world_size > 1 and abs(k * world_size - 1) <= 1e-3:
        return f"{world_size} times too small: divided by the number of processes twice"
    return f"a factor {k:.6g}"
