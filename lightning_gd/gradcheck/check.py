"""Compares explicit gradients with autograd, and autograd with differences of the loss."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_gd.batch import is_current, tensors
from lightning_gd.gradcheck.bench import Bench, Point, double
from lightning_gd.gradcheck.diagnosis import (
    CUT,
    STALE,
    alike,
    largest,
    malformed,
    name_mistake,
    name_reduction,
)
from lightning_gd.gradcheck.report import GradientReport, ParameterReport

SAFETY = 16  # times the rounding eps per term of a sum
NUDGE = 2.0**-10  # relative change of the parameters that shows the size of the terms of a sum
STEPS = 2.0**-13, 2.0**-17, 2.0**-21  # of differences, relative to the scale of the parameter
KINK = 1e-3  # of the terms: a smaller difference of two gradients does not come from a kink


def check_gradients(model: nn.Module, *batch: Any, seed: int = 0) -> GradientReport:
    """Compare a model's explicit gradients with autograd, and autograd with differences.

    This happens in float64 on a copy on the CPU, where every call sees the same random numbers;
    nothing of the model changes. Gradients are compared at the given weights and after a random
    step, since a gradient can vanish at zeros or at an optimum, where any multiple of it is right.

    Right means |explicit − autograd| ≤ 16 eps (N + D + H) · scale, where N rows, D numbers per
    row and H the largest dimension of a parameter count the terms of the sums, and `scale` is
    the size of these terms, or of the loss over that of the parameter if this is larger. Where
    the loss has a kink, both one-sided slopes are right.

    Args:
        model: With `loss(*batch)`, a mean over rows, and `gradients(*batch)`. If its class
            defines `loss_and_gradients` for them, this is checked, and `gradients` against it.
        *batch: Inputs and targets; or one tuple, dict or tensor as a DataLoader yields it.
        seed: Of the random step, and of random numbers that the model draws.

    Returns:
        A report on every parameter; what the model raises is a diagnosis in it.
    """
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        bench = Bench(model, batch[0] if len(batch) == 1 else batch, seed)
        try:
            return _Measured(bench).report()
        except Exception as error:  # whatever a model raises belongs in the report
            words = f"{bench.called} raised {type(error).__name__}: {error}"
            return GradientReport(tuple(ParameterReport(n, diagnosis=words) for n in bench.start))


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
        scale: Size of the summed terms, per parameter; by default the largest entry of all of
            `expected`, which is too strict close to the optimum.
        local: Gradient of the local rows: names a missing reduction.
    """
    largest_of_all = max((largest(g) for g in expected.values()), default=0.0)
    reports = []
    for name, gradient in expected.items():
        noise = SAFETY * torch.finfo(dtype).eps * math.sqrt(rows + gradient.numel())
        bound = noise * (scale[name] if scale else largest_of_all)
        right, found = double(gradient), double(actual.get(name, gradient * math.nan))
        error, size, words = largest(found - right), largest(right), None
        if not error <= bound:  # also nan
            own = double(local[name]) if local else None
            words = name_reduction(right, found, own, world_size, bound)
        reports.append(ParameterReport(name, error, size, bound, words))
    return GradientReport(tuple(reports))


class _Measured:
    """Gradients at the given weights and after a random step, and the size of the loss."""

    def __init__(self, bench: Bench) -> None:
        self.bench, once = bench, bench.batch
        fused = is_current(type(bench.model), "loss_and_gradients")
        method = "loss_and_gradients" if fused else "gradients"  # as in training
        self.given = bench.measure(bench.start, once, method)
        self.moved = bench.measure(bench.moved(), once, method)
        self.again = bench.measure(self.moved.weights, once, "gradients").explicit
        weights = self.moved.weights.items()
        nudged = {name: v + NUDGE * v * bench.random(v).sign() for name, v in weights}
        # A mean stays as it is where every row is given twice, a sum doubles.
        self.rows = len(next(tensors(once)))
        twice = apply_to_collection(once, Tensor, _repeated, self.rows)
        self.twice = bench.measure(nudged, twice, method)
        self.points = self.given, self.moved, self.twice
        change = abs(self.twice.loss - self.moved.loss) / NUDGE
        self.loss = max(change, *(abs(point.loss) for point in self.points))
        widest = max((size for value in bench.start.values() for size in value.shape), default=1)
        numbers = sum(t.numel() for t in tensors(once)) // self.rows
        terms = self.rows + numbers + widest
        self.rounding = SAFETY * torch.finfo(torch.float64).eps * terms

    def report(self) -> GradientReport:
        """Return the verdict on each parameter."""
        known, returned = self.bench.start, self.given.explicit
        names = [n for n in known if n in returned or n in self.bench.trained]
        words = f"unknown name: named_parameters() are {list(known)}"
        unknown = [ParameterReport(n, diagnosis=words) for n in returned if n not in known]
        return GradientReport((*(_Parameter(self, name).report() for name in names), *unknown))


class _Parameter:
    """The gradients of one parameter, and their errors that rounding explains."""

    def __init__(self, measured: _Measured, name: str) -> None:
        self.name, self.all, self.points = name, measured, measured.points
        change = (measured.twice.autograd[name] - measured.moved.autograd[name]) / NUDGE
        gradients = [change, *(point.autograd[name] for point in self.points)]
        self.scale = max(largest(g.nan_to_num(0, 0, 0)) for g in gradients)
        size = largest(measured.moved.weights[name]) or 1.0
        # Below loss / parameter an error changes the loss by less than rounding: a saturated
        # tanh leaves such gradients, with 1 - h² all noise.
        self.noise = measured.rounding * max(self.scale, measured.loss / size)
        self.length = max(size, 1.0)  # along which the loss changes by its own size
        if self.scale and measured.loss:
            self.length = min(self.length, measured.loss / self.scale)

    def report(self) -> ParameterReport:
        """Return the verdict."""
        for point in self.points:
            if words := malformed(self.name, point.explicit, point.autograd[self.name]):
                return ParameterReport(self.name, diagnosis=words)
        found = [self._compare(point) for point in self.points]
        words = next((words for *_, words in found if words), None)
        again, moved = self.all.again.get(self.name), self.all.moved.explicit[self.name]
        same = isinstance(again, Tensor) and alike(again, moved, 2 * self.noise)
        if not same and moved.isfinite().all():
            words = STALE
        error, size = max(error for error, *_ in found), max(size for _, size, _ in found)
        return ParameterReport(self.name, error, size, self.noise, words)

    def _compare(self, point: Point) -> tuple[float, float, str | None]:
        """Return the error, the gradient's size and the mistake; zeros where it is undefined."""
        explicit, truth = point.explicit[self.name], point.autograd[self.name]
        difference, size = explicit - truth, largest(truth)
        error = largest(difference)
        wrong = not error <= self.noise  # also nan
        way = difference if wrong else self.all.bench.random(truth)
        holds = wrong and all(self._fits(point, explicit, way))
        if not any(self._fits(point, truth, way)):
            return error, size, f"{CUT}; explicit is {'right' if holds else 'wrong too'}"
        kink = holds and KINK * self.scale < error < math.inf
        if kink or not math.isfinite(size):
            return 0.0, 0.0, None
        if not wrong:
            return error, size, None
        pairs = [(p.explicit[self.name], p.autograd[self.name]) for p in self.points]
        return error, size, name_mistake(pairs, (explicit, truth), self.all.rows, self.noise)

    def _fits(self, point: Point, gradient: Tensor, way: Tensor) -> Iterator[bool]:
        """Tell for each step whether a gradient fits the one-sided slopes along a direction.

        It must lie between them, up to their difference: h f″ for a smooth loss f, which is more
        than the error of their mean, and the whole jump at a kink.
        """
        bench, start, way = self.all.bench, point.weights[self.name], way / way.norm()
        bench.place(point.weights)
        for h in (step * self.length for step in STEPS):
            left, right = (
                (bench.loss({self.name: start + t * way}, point.batch) - point.loss) / t
                for t in (-h, h)
            )
            rounding = self.noise + 4 * self.all.rounding * (self.all.loss / h + self.scale)
            error = abs(float((gradient * way).sum()) - (left + right) / 2)
            yield not error > abs(right - left) + rounding


def _repeated(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, values]) if values.ndim and len(values) == rows else values
