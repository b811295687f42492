"""Compares explicit gradients with autograd, and autograd with differences of the loss."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gd.batch import is_current
from lightning_gd.gradcheck.bench import Bench, Point, Weights, double
from lightning_gd.gradcheck.diagnosis import (
    CUT,
    DIFFERS,
    STALE,
    alike,
    largest,
    malformed,
    name_mistake,
    name_reduction,
)
from lightning_gd.gradcheck.report import GradientReport, ParameterReport

STEPS = 2.0**-13, 2.0**-20  # of differences, relative to the scale of the parameter
KINK = 1e-3  # of the terms: a smaller difference of two gradients does not come from a kink


def check_gradients(model: nn.Module, *batch: Any, seed: int = 0) -> GradientReport:
    """Compare a model's explicit gradients with autograd, and autograd with differences.

    This happens in float64 on a copy on the CPU, where every call sees the same random numbers;
    nothing of the model changes. Gradients are compared at the given weights and after a random
    step, since a gradient can vanish at zeros or at an optimum, where any multiple of it is right.

    Right means |explicit − autograd| ≤ 1024 eps (N + D + H) · scale, where N rows, D numbers per
    row and H the largest dimension of a parameter count the terms of the sums, and `scale` is
    the larger gradient of both points, or the loss over the parameter if this is larger. Where
    the loss has a kink, both one-sided slopes are right. What the model raises is in the report.

    Args:
        model: With `loss(*batch)`, a mean over rows, and `gradients(*batch)`. If its class
            defines `loss_and_gradients` for them, this is checked, and `gradients` against it.
        *batch: Inputs and targets; or one tuple, dict or tensor as a DataLoader yields it.
        seed: Of the random step, and of random numbers that the model draws.
    """
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        bench = Bench(model, batch[0] if len(batch) == 1 else batch, seed)
        try:
            return _report(bench)
        except Exception as error:  # whatever a model raises belongs in the report
            words = f"{bench.called} raised {type(error).__name__}: {error}"
            return GradientReport(tuple(ParameterReport(n, diagnosis=words) for n in bench.start))


def check_reduced(
    expected: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    bounds: Mapping[str, float],
    world_size: int,
) -> GradientReport:
    """Compare `p.grad` after the reduction with the gradient of the loss on the global batch.

    `bounds` are the largest errors that rounding explains; the number of processes `world_size`
    is a usual mistake.
    """
    reports = []
    for name, gradient in expected.items():
        right, found = double(gradient), double(actual.get(name, gradient * math.nan))
        error, words = largest(found - right), None
        if not error <= bounds[name]:  # also nan
            words = name_reduction(right, found, world_size, bounds[name])
        reports.append(ParameterReport(name, error, largest(right), bounds[name], words))
    return GradientReport(tuple(reports))


def _report(bench: Bench) -> GradientReport:
    fused = is_current(type(bench.model), "loss_and_gradients")
    method = "loss_and_gradients" if fused else "gradients"  # as in training
    given = bench.measure(bench.start, method)
    points = given, bench.measure(bench.moved(given.loss), method)
    again, known = bench.explicit("gradients"), bench.start
    words = f"unknown name: named_parameters() are {list(known)}"
    unknown = [ParameterReport(n, diagnosis=words) for n in given.explicit if n not in known]
    names = [n for n in known if n in given.explicit or n in bench.trained]
    reports = [_Parameter(bench, name, points).report(again, fused) for name in names]
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
        self.length = max(size, 1.0)  # along which the loss changes by its own size
        if self.scale and self.loss:
            self.length = min(self.length, self.loss / self.scale)

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
        return ParameterReport(self.name, max(errors), max(sizes), self.noise, words)

    def _compare(self, point: Point) -> tuple[float, float, str | None]:
        """Return the error, the gradient's size and the mistake; zeros where it is undefined."""
        explicit, truth = point.explicit[self.name], point.autograd[self.name]
        error, size = largest(explicit - truth), largest(truth)
        wrong = not error <= self.noise  # also nan
        if not wrong and point is self.points[0]:  # cut or not is the same at both points
            return error, size, None
        way = explicit - truth if wrong else self.bench.random(truth)
        holds = wrong and all(self._fits(point, explicit, way))
        if not any(self._fits(point, truth, way)):
            return error, size, f"{CUT}; explicit is {'right' if holds else 'wrong too'}"
        if holds and KINK * self.scale < error < math.inf or not math.isfinite(size):
            return 0.0, 0.0, None
        if not wrong:
            return error, size, None
        pairs = [(p.explicit[self.name], p.autograd[self.name]) for p in self.points]
        rows, noise = self.bench.rows, self.noise
        return error, size, name_mistake(pairs, (explicit, truth), rows, noise)

    def _fits(self, point: Point, gradient: Tensor, way: Tensor) -> Iterator[bool]:
        """Tell for each step whether a gradient fits the one-sided slopes along a direction.

        It must lie between them, up to their difference: h f″ for a smooth loss f, which is more
        than the error of their mean, and the whole jump at a kink.
        """
        start, way = point.weights[self.name], way / way.norm()
        for h in (step * self.length for step in STEPS):
            left, right = (
                (self.bench.loss({**point.weights, self.name: start + t * way}) - point.loss) / t
                for t in (-h, h)
            )
            rounding = self.noise + 4 * self.bench.rounding * (self.loss / h + self.scale)
            error = abs(float((gradient * way).sum()) - (left + right) / 2)
            yield not error > abs(right - left) + rounding
