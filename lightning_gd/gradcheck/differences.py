"""Central differences of a loss, with a bound on their own error, and the scale of rounding."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 64  # parameters up to this size are differentiated entry by entry
NUDGE = 2.0**-10  # relative change by which rounding sensitivity is measured
STEP = 2.0**-13  # about eps^(1/4) in float64, relative to the scale of the parameter

Batch = tuple[Tensor, Tensor]


class Slope(NamedTuple):
    """A derivative along one direction of one parameter.

    Attributes:
        direction: Unit vector, shape of the parameter.
        value: Central difference.
        bound: Largest error of `value` that truncation, kinks and rounding explain.
    """

    direction: Tensor
    value: float
    bound: float


class Scale(NamedTuple):
    """Magnitude of the terms that are summed up in a loss and in its gradients.

    Attributes:
        loss: Of the loss.
        gradients: Of each gradient, its largest entry.
    """

    loss: float
    gradients: dict[str, float]


def slopes(
    loss: Callable[[], float], parameter: Tensor, step: float, rounding: float, seed: int
) -> Iterator[Slope]:
    """Slopes of the loss along every entry, or along 8 random signs and 16 sampled entries.

    Args:
        loss: The loss at the present value of the parameter.
        parameter: Changed in place and put back.
        step: Longest step h.
        rounding: Absolute error of one evaluation of the loss.
        seed: Of the random directions.
    """
    start = parameter.clone()
    for direction in _directions(parameter, torch.Generator().manual_seed(seed)):

        def along(t: float, direction: Tensor = direction) -> float:
            parameter.copy_(start + t * direction)
            return loss()

        try:
            value, error = _central(along, step)
        finally:
            parameter.copy_(start)
        # Two losses divided by h at step h/2; the bound itself is noisy by as much again.
        yield Slope(direction, value, error + 4 * rounding / step)


def _directions(parameter: Tensor, generator: torch.Generator) -> Tensor:
    n = parameter.numel()
    if n <= SMALL:
        rows = torch.eye(n, dtype=parameter.dtype)
    else:
        signs = _signs((8, n), parameter.dtype, generator)
        rows = torch.zeros(16, n, dtype=parameter.dtype)
        rows[torch.arange(16), torch.randperm(n, generator=generator)[:16]] = 1
        rows = torch.cat([signs / math.sqrt(n), rows])
    return rows.reshape(-1, *parameter.shape)


def _central(f: Callable[[float], float], h: float) -> tuple[float, float]:
    """Central difference at h/2 and a bound on its error, from the step h.

    C(h) = (f(h) − f(−h)) / 2h is the slope, S(h) = (f(h) − 2f(0) + f(−h)) / h the jump between
    the slopes to the right and to the left. The bound is 2(|C(h) − C(h/2)| + |2S(h/2) − S(h)|).

    Smooth f: C errs by h²f‴/6, so |C(h) − C(h/2)| is already three times the error of C(h/2),
    and S(h) ∝ h cancels. A kink of size J at distance d = uh < h/2, as relu and Huber have:
    C(h/2) errs by J(½ − u), the first term is Ju/2, the second J|1 − 3u|; their sum is never
    less than the error, also at u = 0 (at the kink itself), where C alone would not notice. The
    2 is for several kinks.
    """
    zero, up, down, up2, down2 = f(0.0), f(h), f(-h), f(h / 2), f(-h / 2)
    wide, narrow = (up - down) / (2 * h), (up2 - down2) / h
    jump, jump2 = (up - 2 * zero + down) / h, 2 * (up2 - 2 * zero + down2) / h
    return narrow, 2 * (abs(wide - narrow) + abs(2 * jump2 - jump))


def scale_of_terms(
    evaluate: Callable[[Batch], tuple[float, dict[str, Tensor]]],
    parameters: dict[str, Tensor],
    batch: Batch,
    seed: int,
) -> Scale:
    """Magnitude of what is summed up, not of the sum, which may have cancelled.

    Rounding acts like a relative change of the data by eps. So the parameters and the batch are
    nudged by a relative 2⁻¹⁰ with random signs, and the change divided by 2⁻¹⁰: at the optimum,
    or where ŷ − y cancels, this is the size of the terms while the gradient is near 0. A
    resampled batch shows terms that cancel among the rows and do not move with the nudge. (A
    kink that the nudge crosses makes the scale at most 2¹⁰ times too large: a bound of 1e-9
    instead of 1e-12, still far below any mistake.)

    Args:
        evaluate: Loss and gradients at the present parameters on a batch.
        parameters: Changed in place and put back.
        batch: Inputs and targets, N rows.
        seed: Of the resampling and the nudges.
    """
    generator = torch.Generator().manual_seed(seed)
    loss, gradients = evaluate(batch)
    scale = Scale(abs(loss), {name: _size(g) for name, g in gradients.items()})
    start = {name: p.clone() for name, p in parameters.items()}
    for _ in range(3):
        rows = torch.randint(0, len(batch[0]), (len(batch[0]),), generator=generator)
        scale = _largest(scale, *evaluate((batch[0][rows], batch[1][rows])))
        for p in parameters.values():
            p.copy_(_nudged(p, generator))
        moved, changed = evaluate((_nudged(batch[0], generator), _nudged(batch[1], generator)))
        for name, p in parameters.items():
            p.copy_(start[name])
        change = {name: (g - gradients[name]) / NUDGE for name, g in changed.items()}
        scale = _largest(scale, (moved - loss) / NUDGE, change)
    return scale


def _nudged(values: Tensor, generator: torch.Generator) -> Tensor:
    if not values.is_floating_point():  # labels and indices are exact
        return values
    return values * (1 + NUDGE * _signs(values.shape, values.dtype, generator))


def _signs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), dtype=dtype, generator=generator) * 2 - 1


def _largest(scale: Scale, loss: float, gradients: dict[str, Tensor]) -> Scale:
    sizes = {name: max(scale.gradients[name], _size(g)) for name, g in gradients.items()}
    return Scale(max(scale.loss, abs(loss)), sizes)


def _size(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
