"""Compares explicit gradients with autograd, and autograd with differences of the loss."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_gd.batch import call, is_current
from lightning_gd.gradcheck.bench import Bench, Loss, Point, RandomState, Weights, isolated
from lightning_gd.gradcheck.diagnosis import (
    CUT,
    DIFFERS,
    STALE,
    alike,
    largest,
    malformed,
    name_mistake,
)
from lightning_gd.gradcheck.differences import check_autograd
from lightning_gd.gradcheck.report import GradientReport, ParameterReport

KINK = 1e-3  # of the terms: a smaller difference of two gradients does not come from a kink


def check_gradients(
    model: nn.Module,
    *batch: Any,
    loss: Loss | None = None,
    reference: Loss | None = None,
    seed: int = 0,
) -> GradientReport:
    """Compare a model's explicit gradients with autograd, and autograd with differences.

    A model with a method `gradients` is asked for its formula, by `loss_and_gradients` where its
    class defines it. The gradient of any other model is that of autograd, through every
    `autograd.Function` with a hand-written `backward`. Autograd is compared with differences of
    the loss along random directions. This happens in float64 on a copy, where every call sees the
    same random numbers and buffers; nothing of the model changes. A model that cannot run in
    float64 is checked in its own dtype, and the bounds in the report say what is seen there.

    Gradients are compared at the given weights and after a random step, since a gradient can
    vanish at zeros or at an optimum, where any multiple of it is right. A formula is right if
    |explicit − autograd| ≤ 1024 eps (N + D + H) · scale, where N rows, D numbers per row and H
    the largest dimension of a parameter count the terms of the sums, and `scale` is the larger
    gradient of both points, or the loss over the parameter if this is larger. Where the loss has
    a kink, both one-sided slopes are right. The disagreement of differences over several lengths
    is the bound of their error. What the model raises is in the report.

    Args:
        model: With `loss(*batch)`, a mean over rows, and `gradients(*batch)`; or any
            LightningModule, whose `training_step` returns the loss.
        *batch: Inputs and targets; or one tuple, dict or tensor as a DataLoader yields it.
        loss: Function of the model and the batch that returns the loss, instead of its methods.
        reference: The same function made of plain operations, which is differentiated instead.
        seed: Of the random step, and of random numbers that the model draws.
    """
    content = batch[0] if len(batch) == 1 else batch
    explicit = loss is None and callable(getattr(model, "gradients", None))
    state = RandomState.seeded(seed)
    return check_formula(model, content, loss or loss_of(model), state, explicit, reference)


def loss_of(model: nn.Module) -> Loss:
    """Return the function of a model and a batch that returns its loss."""
    if callable(getattr(model, "gradients", None)) or not isinstance(model, LightningModule):
        return lambda model, batch: call(model.loss, batch)
    return partial(loss_of_step, batch_idx=0)


def loss_of_step(model: Any, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss of a `training_step` of a LightningModule."""
    if is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2):
        found = model.training_step(batch, batch_idx)
    else:
        found = model.training_step(batch)
    found = found["loss"] if isinstance(found, dict) else found
    if not isinstance(found, Tensor):
        raise TypeError(f"training_step returned {found!r} and no loss: give loss=")
    return found


def check_formula(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    state: RandomState,
    explicit: bool,
    reference: Loss | None = None,
) -> GradientReport:
    """Check the formula of a model, or autograd; see `check_gradients`."""
    ask: Callable[[Bench], GradientReport] = _explicit if explicit else check_autograd
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
    raised = ""
    with isolated():
        for dtype in dict.fromkeys([torch.float64, own]):
            bench = Bench(model, batch, loss, state, dtype, reference)
            try:
                report = ask(bench)
            except Exception as error:  # whatever a model raises belongs in the report
                raised = raised or f"{bench.called} raised {type(error).__name__}: {error}"
            else:
                notes = [f"checked in {dtype}, because {raised}"] if raised else []
                note = "; ".join([*notes, *sorted(bench.changed)])
                return replace(report, note=note)
        return GradientReport(tuple(ParameterReport(n, diagnosis=raised) for n in bench.start))


def _explicit(bench: Bench) -> GradientReport:
    fused = is_current(type(bench.model), "loss_and_gradients")
    method = "loss_and_gradients" if fused else "gradients"  # as in training
    given = bench.measure(bench.start, method)
    points = given, bench.measure(bench.moved(given.loss), method)
    again, known = bench.explicit("gradients"), bench.start
    words = f"unknown name: named_parameters() are {list(known)}"
    unknown = [ParameterReport(n, diagnosis=words) for n in given.explicit if n not in known]
    names = [n for n in known if n in given.explicit or n in bench.trained]
    reports = [_Parameter(bench, name, points).report(again, fused) for name in names]
    if bench.changed:  # a formula is a function of its batch and the weights
        words = ", ".join(sorted(bench.changed))
        reports = [replace(report, diagnosis=report.diagnosis or words) for report in reports]
    return GradientReport((*reports, *unknown))


class _Parameter:
    """The gradients of one parameter at two points, and the errors that rounding explains."""

    def __init__(self, bench: Bench, name: str, points: tuple[Point, Point]) -> None:
        self.bench, self.name, self.points = bench, name, points
        self.scale = max(largest(p.autograd[name].nan_to_num(0, 0, 0)) for p in points)
        self.loss = max(abs(point.loss) for point in points)
        size = largest(points[1].weights[name]) or 1.0
        # Below loss / parameter an error changes the loss by less than rounding: a saturated
        # tanh leaves such gradients, with 1 - h² all noise.
        self.noise = bench.rounding * max(self.scale, self.loss / size)
        self.slopes = (math.nan, math.nan)

    def report(self, again: Weights, fused: bool) -> ParameterReport:
        """Return the verdict, given what `gradients` returns in a second call or a first."""
        for point in self.points:
            truth = point.autograd[self.name]
            if words := malformed(self.name, point.explicit, truth):
                return ParameterReport(self.name, diagnosis=words)
        errors, sizes, found = zip(*map(self._compare, self.points), strict=True)
        words, moved = next(filter(None, found), None), self.points[1].explicit[self.name]
        same = self.name in again and alike(again[self.name], moved, 2 * self.noise)
        if not same and moved.isfinite().all():
            words = (words or DIFFERS) if fused else STALE
        return ParameterReport(self.name, max(errors), max(sizes), self.noise, words, self.slopes)

    def _compare(self, point: Point) -> tuple[float, float, str | None]:
        """Return the error, the gradient's size and the mistake; zeros where it is undefined."""
        explicit, truth = point.explicit[self.name], point.autograd[self.name]
        error, size = largest(explicit - truth), largest(truth)
        wrong = not error <= self.noise  # also nan
        if not wrong and point is self.points[0]:  # cut or not is the same at both points
            return error, size, None
        way = explicit - truth if wrong else self.bench.random(truth)
        way = way * (self.bench.length(point, self.name) / way.norm())
        slope, doubt = self.bench.slope(point, {self.name: way}, exact=self.noise)
        slopes = [float((gradient * way).sum()) for gradient in (explicit, truth)]
        fits = [abs(found - slope) <= doubt + self.noise for found in slopes]
        self.slopes = slopes[1], slope
        if not fits[1] and math.isfinite(doubt):
            also = "right" if wrong and fits[0] else "wrong too"
            return error, size, f"{CUT}; explicit is {also}"
        if fits[0] and KINK * self.scale < error < math.inf or not math.isfinite(size):
            return 0.0, 0.0, None
        if not wrong:
            return error, size, None
        pairs = [(p.explicit[self.name], p.autograd[self.name]) for p in self.points]
        return error, size, name_mistake(pairs, (explicit, truth), self.bench.rows, self.noise)
