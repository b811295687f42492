"""Compares the gradients of a model at two points with differences of its loss."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_gd.batch import is_current
from lightning_gd.gradcheck.bench import Bench
from lightning_gd.gradcheck.diagnosis import (
    ALIKE,
    CUT,
    DIFFERS,
    IGNORED,
    STALE,
    Slope,
    Suspect,
    alike,
    largest,
    malformed,
    worst_entry,
)
from lightning_gd.gradcheck.point import AUTOGRAD, FORMULA, Point, Weights
from lightning_gd.gradcheck.probing import direction, directions, slope_of, slopes_of
from lightning_gd.gradcheck.report import GradientReport, ParameterReport

FEW, SHORT = 8, 1e-10  # parameters that are not asked all together; eps of a short dtype
ROUGH = 1e-4  # of the slope: an uncertainty of this size is no reason for further calls
CANCELLED = 64  # eps of the larger loss: what is left of it in one that almost vanishes
MOST_NAMED = 8  # wrong parameters that are looked at further
MOVED = " after a random step of the weights"
NEAR = 1e-3  # of factors that are found by differences


class Comparison:
    """The gradients of a model before and after a step, compared with differences.

    Args:
        bench: The model.
        explicit: It has a formula.
        moved: The weights after the step; None for a random one.
    """

    def __init__(self, bench: Bench, explicit: bool, moved: Weights | None = None) -> None:
        fused = is_current(type(bench.model), "loss_and_gradients")
        self.method = ("loss_and_gradients" if fused else "gradients") if explicit else None
        self.bench, self.kinds = bench, [FORMULA, AUTOGRAD] if explicit else [AUTOGRAD]
        self.moved, self.points = moved, list[Point]()
        self.wrong: dict[str, dict[str, None]] = {kind: {} for kind in self.kinds}

    def report(self) -> GradientReport:
        """Return the verdict on each parameter."""
        bench, point = self.bench, self.bench.measure(self.bench.start, self.method)
        moved, given = self.moved or bench.moved(point.loss), point.gradients
        self.points = [point, bench.measure(moved, self.method)]
        words = self._malformed() if self.method else dict.fromkeys(bench.trained)
        found: dict[str, list[ParameterReport]] = {name: [] for name in words}
        sound = [name for name in words if not words[name]]
        # The error of a question is that of all its parameters, and sums round by more.
        few = len(sound) if bench.eps > SHORT else 2
        for point, groups in zip(self.points, (1, few if len(sound) <= FEW else 1), strict=True):
            for names in _groups(sound, groups):
                for report in self._compare(point, names):
                    found[report.name].append(report)
        if self.method:
            words |= self._not_repeated(sound)
        final = []
        for name, reports in found.items():
            nothing = ParameterReport(name)
            best = max(reports, key=lambda r: r.size / (r.bound or 1.0), default=nothing)
            final.append(replace(best, diagnosis=words[name] or self._name(name)))
        known = f"unknown name: named_parameters() are {list(bench.start)}"
        unknown = [name for name in given[self.kinds[0]] if name not in bench.start]
        final += [ParameterReport(name, diagnosis=known) for name in unknown]
        behind = frozenset(set().union(*bench.functions.values()))
        return GradientReport(tuple(final), functions=behind)

    def brief_report(self) -> GradientReport | None:
        """Compare the formula with autograd alone; None where that does not tell it right."""
        bench = self.bench
        self.points = [bench.measure(bench.moved(bench.loss(bench.start)), self.method)]
        words, unknown = self._malformed(), self.points[0].gradients[FORMULA].keys() - bench.start
        if unknown or any(words.values()) or any(bench.functions.values()) or bench.changed:
            return None
        found = [self._alike(self.points[0], name) for name in words]
        return GradientReport(tuple(found)) if all(p.error <= p.bound for p in found) else None

    def _alike(self, point: Point, name: str) -> ParameterReport:
        """Compare the entries of the formula with those of autograd."""
        formula, autograd = (point.gradients[kind][name] for kind in (FORMULA, AUTOGRAD))
        size = float(autograd.norm())
        bound = self.bench.rounding * max(size, abs(point.loss))
        return ParameterReport(name, largest(formula - autograd), size, bound)

    def _malformed(self) -> dict[str, str | None]:
        """Say what is wrong with the form of each gradient of the formula."""
        given, bench = self.points[0].gradients, self.bench
        names = [n for n in bench.start if n in bench.trained or n in given[FORMULA]]
        return {n: malformed(n, given[FORMULA], given[AUTOGRAD][n]) for n in names}

    def _not_repeated(self, names: Sequence[str]) -> dict[str, str | None]:
        """Say of which parameters a second call of the formula gives another gradient."""
        moved, changed = self.points[-1], ", ".join(sorted(self.bench.changed))
        again = self.bench.formula("gradients", moved.weights)
        same = {n: n in again and alike(again[n], moved.gradients[FORMULA][n]) for n in names}
        if self.method == "loss_and_gradients":
            return {n: DIFFERS for n in names if not same[n] and n not in self.wrong[FORMULA]}
        return {n: changed or STALE for n in names if changed or not same[n]}

    def _compare(self, point: Point, names: list[str]) -> Iterator[ParameterReport]:
        """Compare slopes along one direction of all parameters, and of halves where they differ."""
        slopes, errors, bound = self._slopes(point, names)
        wrong = [kind for kind in self.kinds if not errors[kind] <= bound]  # also nan
        if wrong and len(names) > 1:
            for half in _groups(names, 2):
                yield from self._compare(point, half)
            return
        for name in names:
            length, size = point.lengths[name], point.sizes[name]
            shown = {kind: slope / length for kind, slope in slopes.items()}
            error = errors[self.kinds[0]] / length
            report = ParameterReport(name, error, size, bound / length, slopes=shown)
            vanishes = size <= self.bench.rounding * abs(point.loss)
            if len(names) > 1 and not report.tested and not vanishes:
                yield from self._compare(point, [name])
                continue
            for kind in wrong:
                self.wrong[kind][name] = None
            yield report

    def _slopes(
        self, point: Point, names: list[str]
    ) -> tuple[dict[str, float], dict[str, float], float]:
        """Return the slopes by all means, the error of each gradient's, and what explains it."""
        bench, errors, bound = self.bench, {}, 0.0
        way = {name: direction(bench, point, name) for name in names}
        parts = {kind: slopes_of(point, kind, way) for kind in self.kinds}
        slopes = {kind: sum(values) for kind, values in parts.items()}
        size = max(sum(map(abs, values)) for values in parts.values())
        cast = bench.lifted.backward_error if bench.lifted else 0.0
        pairs = zip(parts[AUTOGRAD], way, strict=True)  # of slopes through hand-written Functions
        cast *= sum(abs(slope) for slope, name in pairs if bench.functions.get(name))
        cancelled = CANCELLED * bench.eps * max(abs(point.loss) for point in self.points)
        # More lengths are tried before a single one is called wrong.
        for exact in (ROUGH * size, 0.0)[: 3 - min(len(names), 2)]:
            slopes["differences"], doubt = slope_of(bench, point, way, exact)
            errors = {kind: abs(slopes[kind] - slopes["differences"]) for kind in self.kinds}
            bound = doubt + bench.rounding * max(size, abs(point.loss)) + cancelled
            bound += cast
            if all(error <= bound for error in errors.values()):
                break
        return slopes, errors, bound

    def _name(self, name: str) -> str | None:
        """Name the mistake in the gradient of one parameter, if there is one."""
        formula, autograd = (name in self.wrong.get(kind, ()) for kind in (FORMULA, AUTOGRAD))
        if autograd and self.method:
            return f"{CUT}; explicit is {'wrong too' if formula else 'right'}"
        if not formula and not autograd:
            return None
        if autograd and not self._repeats(name):
            return f"{STALE}{self._blamed()}"
        if autograd and self._ignores_scale(name):
            return f"{IGNORED}{self._blamed()}"
        if autograd and name in self.bench.by_design:
            return f"{self.bench.by_design[name]} gives another gradient than that of the loss"
        kind, points = self.kinds[0], self.points
        found, right = ([p.gradients[k][name] for p in points] for k in (kind, AUTOGRAD))
        truth = [self._truth(point, name) for point in points]
        near = ALIKE if formula else max(NEAR, 8 * self.bench.eps ** (1 / 3))
        if name not in list(self.wrong[kind])[-MOST_NAMED:]:  # these are nearest to the loss
            return "differs too"
        suspect = Suspect(
            kind, found, truth, lambda k: directions(self.bench, points[k], name), near
        )
        words = suspect.name_mistake(self.bench.rows)
        if formula:
            errors = [largest(one - other) for one, other in zip(found, right, strict=True)]
            k = int(errors[1] > errors[0])
            return words or worst_entry(kind, found[k], right[k]) + MOVED * k
        return f"{words or self._values(name)}{self._blamed()}"

    def _repeats(self, name: str) -> bool:
        """Tell whether a second backward pass gives the same, if the loss is the same."""
        bench, weights = self.bench, self.points[1].weights
        kept, bench.attributes = bench.attributes, None  # all calls would find what the first kept
        one, two = (bench.measure(weights) for _ in range(2))
        bench.attributes = kept
        first, second = (point.gradients[AUTOGRAD][name] for point in (one, two))
        same = alike(second, first) or not first.isfinite().all()
        return same or bench.differ(one.loss, two.loss)

    def _ignores_scale(self, name: str) -> bool:
        """Tell whether the gradient of half of the loss is that of the loss."""
        scale, found = self.bench.scale, self.points[1].gradients[AUTOGRAD][name]
        if scale == 1:
            return False
        self.bench.scale = 1.0
        try:
            one = self.bench.measure(self.points[1].weights).gradients[AUTOGRAD][name]
        finally:
            self.bench.scale = scale
        return largest(one) > 0 and alike(found, one / scale)

    def _truth(self, point: Point, name: str) -> Slope:
        """Return the function of a direction that returns the right slope, and its uncertainty."""
        right, rounding = point.gradients[AUTOGRAD][name], self.bench.rounding

        def by_autograd(way: Tensor) -> tuple[float, float]:
            noise = rounding * max(largest(right), abs(point.loss)) * float(way.norm())
            return float((right * way).sum()), noise

        def by_differences(way: Tensor) -> tuple[float, float]:
            slope, doubt = slope_of(self.bench, point, {name: way}, 0.0)
            return slope, doubt + rounding * max(abs(slope), abs(point.loss))

        return by_autograd if self.method else by_differences

    def _values(self, name: str) -> str:
        point = self.points[1]
        way = {name: direction(self.bench, point, name, along=0.0)}
        slope, _ = slope_of(self.bench, point, way, 0.0)
        mine = sum(slopes_of(point, AUTOGRAD, way))
        words = f"no usual mistake fits; along a random direction autograd gives {mine:.6g}"
        words += f" and differences {slope:.6g}"
        return words if self.bench.functions.get(name) else f"{CUT}; {words}"

    def _blamed(self) -> str:
        """Return the custom Functions that only the wrong gradients pass through."""
        behind, wrong = self.bench.functions, self.wrong[AUTOGRAD]
        passed = [behind.get(name, set()) for name in wrong]
        right = [behind.get(name, set()) for name in self.bench.trained if name not in wrong]
        common = set.intersection(*passed)
        names = common - set().union(*right) or common
        return f"; it passes through {', '.join(sorted(names))}" if names else ""


def _groups(names: Sequence[str], count: int) -> list[list[str]]:
    size = max(1, -(-len(names) // max(1, count)))
    return [list(names[i : i + size]) for i in range(0, len(names), size)]
