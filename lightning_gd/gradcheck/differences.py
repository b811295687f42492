"""Compares autograd with differences of the loss, and finds which part of it is wrong."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gd.gradcheck.bench import Bench, Point, Weights
from lightning_gd.gradcheck.diagnosis import CUT, alike, largest, name_factor
from lightning_gd.gradcheck.report import GradientReport, ParameterReport

GROUPS = 2  # of parameters that are asked together where there are more than eight
FEW = 8
EXACT, ROUGH = 1e-7, 1e-4  # of the slope: a smaller uncertainty is not worth further calls
NEAR = 1e-3  # relative error of a factor that is named

Slopes = tuple[float, float, float]  # of a gradient, by differences, and the largest difference


def check_autograd(bench: Bench) -> GradientReport:
    """Compare autograd with differences at the given weights and after a random step.

    The parameters move together, each along its gradient and a random direction at once, by a
    length that changes the loss by its size. Where the slopes differ each is asked alone.
    """
    given = bench.measure(bench.start)
    moved = bench.measure(bench.moved(given.loss))
    found: dict[str, list[ParameterReport]] = {name: [] for name in bench.trained}
    for point, groups in ((given, 1), (moved, GROUPS)):
        for names in _groups(bench.trained, groups):
            for report in _compare(bench, point, names):
                found[report.name].append(report)
    wrong = {name for name, reports in found.items() if any(r.diagnosis for r in reports)}
    blamed = _blamed(bench, wrong)
    final = []
    for name, reports in found.items():
        best = max(reports, key=lambda r: (r.diagnosis is not None, r.size / (r.bound or 1.0)))
        words = None
        if name in wrong:
            words = f"{_name(bench, (given, moved), name)}{blamed}"
        final.append(replace(best, diagnosis=words))
    behind = frozenset(set().union(*bench.functions.values()))
    return GradientReport(tuple(final), functions=behind)


def _groups(names: Sequence[str], count: int) -> list[list[str]]:
    if len(names) <= FEW and count > 1:
        return [[name] for name in names]
    size = max(1, -(-len(names) // count))
    return [list(names[i : i + size]) for i in range(0, len(names), size)]


def _compare(bench: Bench, point: Point, names: list[str]) -> Iterator[ParameterReport]:
    way = {name: _way(bench, point, name) for name in names}
    found, slope, bound = _slopes(bench, point, way)
    error, alone = abs(found - slope), len(names) == 1
    wrong = not error <= bound
    for name in names:
        length, size = bench.length(point, name), float(point.autograd[name].norm())
        words, slopes = "differs" if wrong else None, (found / length, slope / length)
        report = ParameterReport(name, error / length, size, bound / length, words, slopes)
        vanishes = size <= bench.rounding * abs(point.loss)
        if alone or not wrong and (report.tested or vanishes):
            yield report
        else:
            yield from _compare(bench, point, [name])


def _way(bench: Bench, point: Point, name: str, along: float = 1.0) -> Tensor:
    """Return a direction of the parameter's length, along its gradient and a random one."""
    gradient, other = point.autograd[name], bench.random(point.autograd[name])
    size = gradient.norm()
    direction = other / other.norm() + (along * gradient / size if size > 0 else 0.0)
    if not direction.norm() > 0.1:  # the two point against each other
        direction = other
    return direction * (bench.length(point, name) / direction.norm())


def _slopes(bench: Bench, point: Point, way: Weights, gradient: Weights | None = None) -> Slopes:
    """Return the slopes of a gradient and by differences along a direction, and the bound."""
    slopes = [float(((gradient or point.autograd)[n] * v).sum()) for n, v in way.items()]
    size = sum(map(abs, slopes))
    rounding = bench.rounding * max(size, abs(point.loss))
    found, slope, bound = sum(slopes), math.nan, 0.0
    for exact in (ROUGH * size, 0.0):  # more lengths are tried before it is called wrong
        slope, doubt = bench.slope(point, way, exact)
        bound = doubt + rounding
        if abs(found - slope) <= bound:
            break
    return found, slope, bound


def _fits(
    bench: Bench, point: Point, ways: Iterable[Weights], gradient: Weights | None = None
) -> bool:
    slopes = (_slopes(bench, point, way, gradient) for way in ways)
    return all(abs(found - slope) <= bound for found, slope, bound in slopes)


def _blamed(bench: Bench, wrong: set[str]) -> str:
    """Return the custom Functions that the wrong gradients pass through, and the right do not."""
    passed = [bench.functions.get(name, set()) for name in wrong]
    right = [bench.functions.get(name, set()) for name in bench.trained if name not in wrong]
    common = set.intersection(*passed) if passed else set()
    names = common - set().union(*right) or common
    return f"; it passes through {', '.join(sorted(names))}" if names else ""


def _name(bench: Bench, points: tuple[Point, Point], name: str) -> str:
    """Name the mistake in the gradient by autograd of one parameter."""
    given, moved = points
    for point in (moved, given):
        gradient = point.autograd[name]
        if not gradient.isfinite().all():
            return f"autograd gives {gradient[~gradient.isfinite()][0].item()}"
        factor = _factor(bench, point, name)
        if factor is None:
            continue
        if abs(factor - 1) > NEAR and (words := name_factor(factor, bench.rows, 2, NEAR)):
            return words
    gradient = moved.autograd[name]
    if largest(gradient) and alike(given.autograd[name], gradient):
        return "the same at other weights: stale or constant"
    if gradient.ndim == 2 and len(gradient) == len(gradient.T):
        if _fits(bench, moved, _ways(bench, moved, name), {name: gradient.T}):
            return "transposed"
    return _slice(bench, moved, name) or _values(bench, moved, name)


def _ways(bench: Bench, point: Point, name: str) -> Iterator[Weights]:
    return ({name: _way(bench, point, name, along)} for along in (1.0, 0.0, -1.0))


def _factor(bench: Bench, point: Point, name: str) -> float | None:
    """Return the k of gradient = k · differences along all directions; None if there is none."""
    factors = []
    for way in _ways(bench, point, name):
        mine = float((point.autograd[name] * way[name]).sum())
        slope, doubt = bench.slope(point, way, EXACT * abs(mine))
        if not abs(slope) > 8 * doubt:
            return None
        factors.append(mine / slope)
    k = sorted(factors)[1]
    return k if all(math.isclose(k, f, rel_tol=NEAR, abs_tol=1e-9) for f in factors) else None


def _slice(bench: Bench, point: Point, name: str) -> str | None:
    """Return the first or last slice along a dimension outside which the gradient is right."""
    gradient = point.autograd[name]
    for dim in range(gradient.ndim):
        for index, word in ((0, "first"), (gradient.shape[dim] - 1, "last")):
            if gradient.shape[dim] < 2:
                continue
            at = torch.tensor([index], device=gradient.device)
            rest = torch.ones_like(gradient).index_fill(dim, at, 0)
            ways = ({name: way[name] * rest} for way in _ways(bench, point, name))
            if _fits(bench, point, ways):
                return f"wrong only in the {word} slice of dimension {dim}"
    return None


def _values(bench: Bench, point: Point, name: str) -> str:
    way = {name: _way(bench, point, name, 0.0)}
    mine = float((point.autograd[name] * way[name]).sum())
    slope, _ = bench.slope(point, way, EXACT * abs(mine))
    words = f"no usual mistake fits; along a random direction autograd gives {mine:.6g}"
    words += f" and differences {slope:.6g}"
    return words if bench.functions.get(name) else f"{CUT}; {words}"
