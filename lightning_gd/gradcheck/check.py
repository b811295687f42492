"""Checks explicit gradients against autograd and against finite differences of the loss."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gd.gradcheck.bench import Bench, Both, Formula, double, repeated
from lightning_gd.gradcheck.diagnosis import Evidence, malformed, mistaken, name_reduction
from lightning_gd.gradcheck.differences import STEP, Batch, Scale, Slope, scale_of_terms, slopes
from lightning_gd.gradcheck.report import GradientError, GradientReport, ParameterReport

__all__ = ["GradientError", "GradientReport", "ParameterReport", "check_gradients", "check_reduced"]

SAFETY = 16  # times eps times the number of terms
CUT = (
    "autograd differs from finite differences of loss: "
    "part of loss is cut off the graph (detach, no_grad, item)"
)
ROUNDING = SAFETY * torch.finfo(torch.float64).eps


def check_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    gradients: Formula | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> GradientReport:
    """Compares a model's explicit gradients with autograd and with central differences.

    All of it happens in float64 on copies of the model on the CPU, and every call sees the same
    random numbers; the model, its `.grad`, its mode and the random state stay as they are.

    Right means: |explicit − autograd| ≤ 16 eps (N + D + H) · scale, on the batch and on the
    batch with every row repeated, where N rows, D inputs a row and H the largest dimension of a
    parameter count the terms of the sums and `scale` is the magnitude of these terms, not of
    the result (`differences.scale_of_terms`), or that of the loss beside the size of the
    parameter if this is larger. Central differences know neither road, so they
    also notice a loss that is cut off the graph; their bound is in `differences`.

    Args:
        model: With `loss(x, y)`, a mean over rows, and `gradients(x, y)`.
        x: Inputs, shape [N, D].
        y: Targets, shape [N].
        gradients: Checked instead of `model.gradients`; called with (model, x, y), where the
            model is a copy.
        tolerance: Error allowed relative to `scale`, instead of 16 eps (N + D + H).
        seed: Of the random directions, and of random numbers that the model draws.

    Returns:
        A report on every parameter, in the order of `named_parameters()`, then unknown names.
    """
    formula = gradients or (lambda m, x, y: m.gradients(x, y))
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        bench = Bench(model, formula, seed)
        return _report(bench, (double(x), double(y)), tolerance)


def check_reduced(
    expected: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    world_size: int,
    dtype: torch.dtype,
    rows: int,
    *,
    scale: Mapping[str, float] | None = None,
    local: Mapping[str, Tensor] | None = None,
) -> GradientReport:
    """Compares `p.grad` after the reduction over processes with that of the global batch.

    The bound is 16 eps √(N + D) · scale: at the N of a global batch the worst case N·eps would
    hide mistakes in float32, and rounding errors of independent sign add up like a random walk.

    Args:
        expected: Gradient of the loss on the global batch.
        actual: The gradient that the optimizer is about to see.
        world_size: Number of processes.
        dtype: Precision in which `actual` was computed.
        rows: N, rows of the global batch.
        scale: Magnitude of the summed terms, per parameter; the largest entry of all of
            `expected` if not given, which is too strict close to the optimum.
        local: This process's gradient before the reduction: names a missing reduction.
    """
    largest = max((float(g.detach().abs().max()) for g in expected.values()), default=0.0)
    reports = [
        ParameterReport(name, diagnosis="unknown name: nothing is expected under it")
        for name in sorted(set(actual) - set(expected))
    ]
    for name, right in expected.items():
        noise = SAFETY * torch.finfo(dtype).eps * math.sqrt(rows + right.numel())
        bound = noise * (scale[name] if scale else largest)
        before = (local or {}).get(name)
        reports.append(_reduced(name, right, actual.get(name), before, world_size, bound))
    return GradientReport(tuple(reports))


def _reduced(
    name: str,
    expected: Tensor,
    actual: Tensor | None,
    local: Tensor | None,
    world_size: int,
    bound: float,
) -> ParameterReport:
    if actual is None or actual.shape != expected.shape:
        found = "nothing" if actual is None else list(actual.shape)
        words = f"shape {list(expected.shape)} is wanted, found {found}"
        return ParameterReport(name, diagnosis=words)
    expected, actual = double(expected), double(actual)
    error = float((actual - expected).abs().max())
    ok = error <= bound  # False for nan
    words = None
    if not ok:
        before = None if local is None else double(local)
        words = name_reduction(expected, actual, world_size, bound, before)
    relative = _over(error, float(expected.abs().max()))
    return ParameterReport(name, error, relative, bound, ok=ok, diagnosis=words)


class _Measured(NamedTuple):
    """Gradients on the batch and its altered copy, once and with every row repeated."""

    once: list[Both]
    twice: list[Both]
    again: dict[str, Any]
    scale: Scale
    rounding: float


def _report(bench: Bench, batch: Batch, tolerance: float | None) -> GradientReport:
    loss = bench.loss(batch).item()
    if not math.isfinite(loss):
        return _all_wrong(bench, f"the loss itself is {loss} on this batch")
    try:
        m = _measure(bench, batch)
    except Exception as error:  # whatever a formula raises belongs in the report
        shapes = f"x {list(batch[0].shape)}, y {list(batch[1].shape)} or each row twice"
        return _all_wrong(bench, f"gradients raised {type(error).__name__} on {shapes}: {error}")
    returned = m.once[0][0]
    reports = [
        _parameter(bench, batch, m, name, tolerance)
        for name in bench.values
        if name in returned or name in bench.free  # frozen parameters may be left out
    ]
    known = f"unknown name: named_parameters() are {list(bench.values)}"
    unknown = [ParameterReport(n, diagnosis=known) for n in returned if n not in bench.values]
    return GradientReport(tuple(reports + unknown))


def _measure(bench: Bench, batch: Batch) -> _Measured:
    first, again = bench.explicit(batch, calls=2)
    return _Measured(
        once=[(first, bench.autograd(batch)[1]), *bench.altered(batch)],
        twice=[bench.both(repeated(batch)), *bench.altered(repeated(batch))],
        again=again,
        scale=scale_of_terms(bench.autograd, bench.values, batch, bench.seed),
        rounding=ROUNDING * bench.terms(batch),
    )


def _parameter(
    bench: Bench, batch: Batch, m: _Measured, name: str, tolerance: float | None
) -> ParameterReport:
    (explicit, truth), value = m.once[0], bench.values[name]
    if name not in explicit:
        words = f"missing: gradients returned only {list(explicit)}"
        return ParameterReport(name, diagnosis=words)
    form = malformed(explicit[name], m.twice[0][0].get(name), value, truth[name])
    if form:
        return ParameterReport(name, diagnosis=form)
    size = m.scale.gradients[name]
    # Below this an error moves the loss by less than its rounding, over a change of the
    # parameter by its own size: a saturated tanh leaves such gradients, with 1 − h² all noise.
    floor = m.scale.loss / max(1.0, float(value.abs().max()))
    evidence = Evidence(
        parameter=value,
        rows=len(batch[0]),
        noise=(m.rounding if tolerance is None else tolerance) * max(size, floor),
        once=_pairs(m.once, name),
        twice=_pairs(m.twice, name),
        again=m.again[name],
        others={other: gradient for other, gradient in truth.items() if other != name},
    )
    step = _step(value, m.scale.loss, size)
    loss_error = m.rounding * (m.scale.loss + size * step)
    loss = torch.no_grad()(lambda: bench.loss(batch).item())
    probes = list(slopes(loss, value, step, loss_error, bench.seed))
    return _judge(name, evidence, probes)


def _judge(name: str, evidence: Evidence, probes: list[Slope]) -> ParameterReport:
    (explicit, truth), (explicit2, truth2) = evidence.once[0], evidence.twice[0]
    errors = [explicit - truth, explicit2 - truth2, evidence.again - explicit]
    error = float(torch.stack(errors).abs().max())
    gap, worst = _farthest(explicit, probes, evidence.noise)
    autograd_gap, cut = _farthest(truth, probes, evidence.noise)
    same, holds = error <= evidence.noise, gap <= worst.bound + evidence.noise
    words = None
    if not same and autograd_gap <= cut.bound + evidence.noise:
        words = mistaken(evidence)
    elif not same:
        words = f"{CUT}; explicit is {'right' if holds else 'wrong too'}"
    elif not holds:
        words = f"{CUT}, and explicit leaves out the same"
    return ParameterReport(
        name,
        error=error,
        relative_error=_over(error, float(truth.abs().max())),
        bound=evidence.noise,
        difference_error=gap,
        difference_relative_error=_over(gap, abs(worst.value)),
        difference_bound=worst.bound + evidence.noise,
        ok=same and holds,
        diagnosis=words,
    )


def _farthest(gradient: Tensor, probes: list[Slope], noise: float) -> tuple[float, Slope]:
    """The error of the gradient along the probe where it exceeds its bound most."""
    gaps = [(abs(float((gradient * p.direction).sum()) - p.value), p) for p in probes]
    return max(gaps, key=lambda pair: pair[0] - pair[1].bound)


def _pairs(both: list[Both], name: str) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for explicit, truth in both:
        value = explicit.get(name)
        if isinstance(value, Tensor) and value.shape == truth[name].shape:
            pairs.append((value, truth[name]))
    return pairs


def _all_wrong(bench: Bench, words: str) -> GradientReport:
    return GradientReport(tuple(ParameterReport(name, diagnosis=words) for name in bench.values))


def _step(value: Tensor, loss: float, gradient: float) -> float:
    """Longest step of the differences: short beside the parameter and beside loss / gradient."""
    natural = max(1.0, float(value.abs().max()))
    return STEP * (min(natural, loss / gradient) if loss * gradient > 0 else natural)


def _over(error: float, size: float) -> float:
    return error / size if size else math.inf if error else 0.0
