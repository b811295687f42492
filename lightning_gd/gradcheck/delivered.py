"""Compares `p.grad` with the gradient of the loss on the rows of an update."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gd.gradcheck.bench import SCALE
from lightning_gd.gradcheck.diagnosis import (
    first_line,
    largest,
    name_factor,
    name_reduction,
    ratio,
)
from lightning_gd.gradcheck.graph import gradients_of, precision_seen
from lightning_gd.gradcheck.point import Loss, Weights
from lightning_gd.gradcheck.precision import eager
from lightning_gd.gradcheck.randomness import RandomState, generators_of, torch_states
from lightning_gd.gradcheck.report import GradientReport, NoLoss, ParameterReport
from lightning_gd.gradcheck.twin import converted, shaken, shaken_batch, twin

SHAKES = 4  # times that weights and rows are changed in their last digit
# Of sums that are rounded at every step: their error in units of what one rounding of the weights
# and rows does, and the eps between two orders of adding up. SHORT replaces both in bfloat16 and
# float16, whose products are added up in float32.
SAFETY, CLOSE, SHORT = 32, 64, 8
DRAWS = "the loss draws random numbers"


@dataclass(frozen=True)
class Part:
    """A local batch of an update, what its loss weighs in a mean, and the state it begins with."""

    batch: Any
    loss: Loss
    weight: float
    state: RandomState | None  # None continues after the part before
    # What happens to the loss before `backward`: the products of short numbers round by it.
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss
    pure: bool = False  # the loss is known to leave its batch as it is


@dataclass(frozen=True)
class Delivery:
    """What the optimizer is about to get, and how it should have come about."""

    gradients: Weights  # p.grad by name
    parts: Sequence[Part]
    # Σ weight · gradient and Σ weight of the parts, shape [n, P + 1], to the mean, shape [P]
    mean: Callable[[Tensor], Tensor]
    known: Mapping[str, float]  # usual wrong factors, by what they count
    precision: Callable[[], AbstractContextManager[Any]]  # the autocast of the run
    eps: float  # of that precision
    replayed: bool  # p.grad came about by autograd of the same loss
    copy: Callable[[nn.Module, torch.dtype | None], Any] = twin


def check_delivered(
    model: nn.Module, delivery: Delivery, agree: Callable[[bool], bool], trusted: bool
) -> GradientReport:
    """Compare `p.grad` with autograd on all rows of an update.

    In the precision of the run first, up to 64 eps of the largest gradient of all parameters, for
    another order of sums. A formula that differs by more, and the gradient of a loss with a
    hand-written backward, is compared in float64 too: with the gradient at the weights and rows,
    and after four random changes of them by eps, the rounding of one number. What rounding
    explains is the largest change of the gradient and eps of the largest gradient of all
    parameters, times 32. In bfloat16 and float16 both factors are 8. Random numbers are others in
    float64, so a loss that draws them is not compared there.

    The random state is left as the loss leaves it.

    Args:
        model: As it was before the update; nothing of it changes.
        delivery: What is compared.
        agree: Tells whether something holds on every process.
        trusted: The loss is made of plain operations.
    """
    local = _Local(model, delivery)
    same = _mean(delivery, local.gradients())
    delivery = replace(delivery, eps=max(delivery.eps, local.eps))  # of an autocast inside the loss
    epses = {name: torch.finfo(value.dtype).eps for name, value in delivery.gradients.items()}
    bounds = {name: _factor(eps, CLOSE) * eps * _most(same) for name, eps in epses.items()}
    report = _compared(delivery, same, bounds)
    right = agree(report.ok)
    if right and trusted or delivery.replayed and not right:
        return report
    sums, why = _in_float64(model, delivery) if not local.draws else ([], DRAWS)
    if not agree(not why):
        # A Function for one dtype was compared with differences in it.
        told = f"p.grad was not compared in float64: {why or 'another process cannot'}"
        return replace(report, note="" if delivery.replayed and not local.draws else told)
    mean, *near = (_mean(delivery, each) for each in sums)
    noise, safety = delivery.eps * _most(mean), _factor(delivery.eps, SAFETY)
    for name, gradient in mean.items():
        spread = max(largest(other[name] - gradient) for other in near)
        bounds[name] = safety * (spread + noise)
    exact = _compared(delivery, mean, bounds)
    return report if right and agree(exact.ok) else exact


def _in_float64(model: nn.Module, delivery: Delivery) -> tuple[list[Tensor], str]:
    """Return the local gradients, and those near them, or why they cannot be had in float64."""
    local = _Local(model, delivery, torch.float64)
    try:
        sums = [local.gradients(shake) for shake in range(SHAKES + 1)]
    except Exception as error:  # whatever a model raises in float64 belongs in the report
        return [], first_line(error)
    return sums, DRAWS if local.draws else ""


def _factor(eps: float, usual: int) -> int:
    return usual if eps < torch.finfo(torch.float16).eps else SHORT


def _most(gradients: Weights) -> float:
    """Return the largest entry of all: terms that cancel in one gradient are of this size."""
    return max(largest(gradient) for gradient in gradients.values())


def _compared(delivery: Delivery, mean: Weights, bounds: Mapping[str, float]) -> GradientReport:
    reports = []
    for name, right in mean.items():
        found, words = delivery.gradients[name].detach().double(), None
        error = largest(found - right)
        if not error <= bounds[name]:  # also nan
            words = name_reduction(right, found, delivery.known, bounds[name])
        reports.append(ParameterReport(name, error, largest(right), bounds[name], words))
    return GradientReport(tuple(reports))


def _mean(delivery: Delivery, sums: Tensor) -> Weights:
    sizes = [value.numel() for value in delivery.gradients.values()]
    pieces = zip(delivery.gradients.items(), delivery.mean(sums).double().split(sizes), strict=True)
    return {name: piece.view(value.shape) for (name, value), piece in pieces}


class _Local:
    """Gradients of the local parts of an update, on copies of the model.

    Args:
        model: As it was before the update.
        delivery: What is compared.
        dtype: Of the copies and batches; None for those of the run.

    Attributes:
        draws: Whether the loss draws random numbers, of what was asked for so far.
        eps: Of the shortest dtype on the way to the loss.
    """

    def __init__(
        self, model: nn.Module, delivery: Delivery, dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.delivery, self.dtype, self.is_own = model, delivery, dtype, dtype is None
        dtypes = {gradient.dtype for gradient in delivery.gradients.values()}
        self._longest = dtype or min(dtypes, key=lambda kind: torch.finfo(kind).eps)
        # New tensors are of the dtype of the run, which is not that of all parameters if they mix.
        self._usual = self._longest if len(dtypes) == 1 else dtype or torch.get_default_dtype()
        self.draws, self.eps = False, 0.0

    def gradients(self, shake: int = 0) -> Tensor:
        """Return weight · gradient of each part, flat, and last its weight, shape [n, P + 1].

        A `shake` above 0 is the seed of random changes of weights and rows by eps.
        """
        given, source = self.delivery, torch.Generator().manual_seed(shake)
        with eager(self._usual):
            copied = given.copy(self.model, self.dtype)
            for parameter in copied.parameters() if shake else ():
                parameter.data = shaken(parameter.data, given.eps, source)
            changed = partial(shaken_batch, eps=given.eps, source=source) if shake else None
            return torch.stack([self._of(part, copied, changed) for part in given.parts])

    def _of(self, part: Part, copied: Any, changed: Callable[[Any], Any] | None) -> Tensor:
        named = dict(copied.named_parameters())
        trained = {name: named[name] for name in self.delivery.gradients}
        size, like = sum(p.numel() for p in trained.values()) + 1, next(iter(trained.values()))
        flat = like.new_zeros(size, dtype=self._longest)
        if not part.weight:
            return flat
        is_kept = self.is_own and part.pure
        batch = part.batch if is_kept else converted(part.batch, self.dtype)
        found = self._found(part, copied, changed(batch) if changed else batch, trained)
        if found is None:  # Lightning makes no backward pass
            flat[-1] = part.weight
            return flat
        scale = SCALE * part.scaled(flat.new_ones(1))
        flat = torch.cat([*map(torch.flatten, found.values()), scale])
        return (flat * (part.weight / flat[-1])).detach()

    def _found(
        self, part: Part, copied: Any, batch: Any, trained: dict[str, nn.Parameter]
    ) -> Weights | None:
        """Return the gradients of a part, times `SCALE`; None without a loss."""
        if part.state is not None:
            part.state.restore()
        before = torch_states(generators := generators_of(copied))
        # `backward` is outside of autocast, as in the run.
        autocast = self.delivery.precision() if self.is_own else nullcontext()
        try:
            with autocast, precision_seen() as seen:
                loss = part.loss(copied, batch)
        except NoLoss:
            return None
        self.eps = max([self.eps, *seen])
        found = gradients_of(part.scaled(loss), trained, SCALE, copied)
        self.draws |= not all(map(torch.equal, before, torch_states(generators)))
        return found


def explained(gradients: Sequence[Tensor], eps: float, size: float = 0.0) -> float:
    """Return the error of the first gradient that rounding explains; the others are near it."""
    spread = max(float((other - gradients[0]).norm()) for other in gradients)
    return _factor(eps, SAFETY) * (spread + eps * max(float(gradients[0].norm()), size))


def compared(name: str, found: Tensor, right: Tensor, bound: float, rows: int) -> ParameterReport:
    """Compare a gradient with the right one in the 2-norm."""
    found, size = found.to(right), float(right.norm())
    error, words = float((found - right).norm()), None
    if not error <= bound:  # also nan
        k = ratio(found, right, bound)
        words = None if k is None else name_factor(k, rows, right.numel(), bound / size)
        words = words or "the error is larger than rounding explains"
    return ParameterReport(name, error, size, bound, words)
