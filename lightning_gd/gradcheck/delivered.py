"""Compares `p.grad` with the gradient of the loss on the rows of an update."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gd.gradcheck.bench import Loss, Weights
from lightning_gd.gradcheck.diagnosis import largest, name_reduction
from lightning_gd.gradcheck.report import GradientReport, ParameterReport
from lightning_gd.gradcheck.twin import RandomState, converted, isolated, shaken, twin

SHAKES = 4  # times that weights and rows are changed in their last digit
# Errors of sums that are rounded at every step, in units of what one rounding of the weights and
# rows does. Products in bfloat16 and float16 are added up in float32.
SAFETY, SAFETY_SHORT = 32, 8
CLOSE = 64  # eps: between two ways to the same sums


@dataclass(frozen=True)
class Part:
    """A local batch of an update, what its loss weighs in a mean, and the state it begins with."""

    batch: Any
    loss: Loss
    weight: float
    state: RandomState | None  # None continues after the part before


class Delivery(NamedTuple):
    """What the optimizer is about to get, and how it should have come about."""

    gradients: Weights  # p.grad by name
    parts: Sequence[Part]
    # Σ weight · gradient and Σ weight of the parts, shape [n, P + 1], to the mean, shape [P]
    mean: Callable[[Tensor], Tensor]
    known: Mapping[str, float]  # usual wrong factors, by what they count
    precision: Callable[[], AbstractContextManager[Any]]  # the autocast of the run
    eps: float  # of that precision
    replayed: bool  # p.grad came about by autograd of the same loss


def check_delivered(
    model: nn.Module, delivery: Delivery, agree: Callable[[bool], bool], trusted: bool
) -> GradientReport:
    """Compare `p.grad` with autograd on all rows of an update.

    In the precision of the run first, up to 64 eps for another order of sums. A formula that
    differs by more, and the gradient of a loss with a hand-written backward, is compared in
    float64 too: with the gradient at the weights and rows, and after four random changes of them
    by eps, the rounding of one number. What rounding explains is the largest change of the
    gradient and eps of the largest gradient of all parameters, times 32 (8 for bfloat16 and
    float16).

    Args:
        model: As it was before the update; nothing of it changes.
        delivery: What is compared.
        agree: Tells whether something holds on every process.
        trusted: The loss is made of plain operations.
    """
    names = list(delivery.gradients)
    found = {name: gradient.detach().double() for name, gradient in delivery.gradients.items()}
    dtype = next(model.parameters()).dtype
    (same,) = _means(model, delivery, names, dtype, 0)
    close = CLOSE * torch.finfo(dtype).eps
    bounds = {name: close * _most(same) for name in names}
    report = _compared(same, found, bounds, delivery.known)
    right = agree(report.ok)
    if right and (trusted or not delivery.replayed) or delivery.replayed and not right:
        return report
    mean, *near = _means(model, delivery, names, torch.float64, SHAKES)
    safety = SAFETY_SHORT if delivery.eps > torch.finfo(dtype).eps else SAFETY
    for name, gradient in mean.items():
        spread = max(largest(other[name] - gradient) for other in near)
        bounds[name] = safety * (spread + delivery.eps * _most(mean))
    exact = _compared(mean, found, bounds, delivery.known)
    return report if delivery.replayed and agree(exact.ok) else exact


def _most(gradients: Weights) -> float:
    """Return the largest entry of all: terms that cancel in one gradient are of this size."""
    return max(largest(gradient) for gradient in gradients.values())


def _compared(
    mean: Weights, found: Weights, bounds: Mapping[str, float], known: Mapping[str, float]
) -> GradientReport:
    reports = []
    for name, right in mean.items():
        error, words = largest(found[name] - right), None
        if not error <= bounds[name]:  # also nan
            words = name_reduction(right, found[name], known, bounds[name])
        reports.append(ParameterReport(name, error, largest(right), bounds[name], words))
    return GradientReport(tuple(reports))


def _means(
    model: nn.Module, delivery: Delivery, names: list[str], dtype: torch.dtype, shakes: int
) -> list[Weights]:
    """Return the mean gradient over all processes, and those near it, in float64."""
    shapes = [dict(model.named_parameters())[name].shape for name in names]
    precision = delivery.precision if not shakes else nullcontext
    means = []
    for k in range(shakes + 1):
        with isolated(dtype):
            with precision():
                sums = _gradients(model, delivery.parts, names, dtype, delivery.eps * bool(k), k)
        pieces = delivery.mean(sums).double().split([shape.numel() for shape in shapes])
        means.append({n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)})
    return means


def _gradients(
    model: nn.Module,
    parts: Sequence[Part],
    names: Sequence[str],
    dtype: torch.dtype,
    eps: float,
    seed: int,
) -> Tensor:
    """Return weight · gradient of each part, flat, and last its weight, shape [n, P + 1]."""
    copied, source = twin(model, dtype), torch.Generator().manual_seed(seed)
    named = dict(copied.named_parameters())
    trained = [named[name] for name in names]
    for parameter in copied.parameters() if eps else ():
        parameter.data = shaken(parameter.data, eps, source)
    rows = []
    for part in parts:
        flat = trained[0].new_zeros(sum(p.numel() for p in trained) + 1)
        if part.weight:
            batch = converted(part.batch, dtype)
            batch = shaken(batch, eps, source) if eps else batch
            if part.state is not None:
                part.state.restore()
            loss = part.loss(copied, batch)
            found = torch.autograd.grad(loss, trained, materialize_grads=True)
            flat = part.weight * torch.cat([*map(torch.flatten, found), flat.new_ones(1)])
        rows.append(flat.detach())
    return torch.stack(rows)
