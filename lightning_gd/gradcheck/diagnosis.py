"""Names what is wrong with a gradient, from how it differs from the right one."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

ALIKE = 1e-6  # float64 gradients agree to about 1e-13, usual mistakes differ by 1e-3 and more
STALE = "stale: a second call on the same batch returns something else"
DIFFERS = "gradients and loss_and_gradients return different gradients"
CUT = (
    "autograd differs from differences of loss: "
    "part of loss is cut off the graph (detach, no_grad, item)"
)
IGNORED = (
    "grad_output is taken as 1: scaling the loss, as accumulation and GradScaler do, does not "
    "scale this gradient"
)
FACTORS = {1.0: "", 2.0: "a factor 2 too much", 0.5: "a factor 2 is missing (½)"}

Slope = Callable[[Tensor], tuple[float, float]]  # along a direction, and how uncertain it is


def malformed(name: str, explicit: Mapping[str, Tensor], truth: Tensor) -> str | None:
    """Say what is wrong with the name or the shape of a gradient."""
    if name not in explicit:
        return f"missing: gradients returned only {list(explicit)}"
    value = explicit[name]
    if value.shape == truth.shape:
        finite = value.isfinite().all() or not truth.isfinite().all()
        return None if finite else worst_entry("explicit", value, truth)
    shapes = f"shape {list(value.shape)} where {list(truth.shape)} is wanted"
    return f"transposed: {shapes}" if value.ndim == 2 and alike(value.T, truth) else shapes


def unfit(found: Tensor, wanted: Tensor) -> str:
    """Say that a gradient has another shape or dtype than wanted."""
    kinds = [f"shape {list(values.shape)} of {values.dtype}" for values in (found, wanted)]
    return "" if kinds[0] == kinds[1] else f"{kinds[0]} where {kinds[1]} is wanted"


class Suspect:
    """A gradient that is wrong at one of two points, and the right slopes there.

    Args:
        kind: `explicit` or `autograd`, for the words.
        found: The gradient before and after a random step.
        truth: Functions that return the right slope along a direction, and its uncertainty.
        ways: Function that returns directions in which to look at a point.
        near: The relative error of the right slopes.
    """

    def __init__(
        self,
        kind: str,
        found: Sequence[Tensor],
        truth: Sequence[Slope],
        ways: Callable[[int], Iterator[Tensor]],
        near: float,
    ) -> None:
        self.kind, self.found, self.truth, self.ways, self.near = kind, found, truth, ways, near

    def name_mistake(self, rows: int) -> str | None:
        """Name a usual mistake in the gradient of a mean over so many rows."""
        given, moved = self.found
        for gradient in (moved, given):
            if not gradient.isfinite().all():
                return f"{self.kind} gives {gradient[~gradient.isfinite()][0].item()}"
        factors = [self._factor(point) for point in (1, 0)]
        known = [k for k in factors if k is not None]
        if known and not math.isnan(sum(known)):
            same = math.isclose(known[0], known[-1], rel_tol=self.near, abs_tol=self.near)
            if same and (words := name_factor(known[0], rows, moved.numel(), self.near)):
                return words
        if largest(given) and alike(given, moved):
            return "stale: the same at other weights"
        square = moved.ndim == 2 and len(moved) == len(moved.T)
        if square and self._fits(moved.T, torch.ones_like(moved)):
            return "transposed"
        return self._slice()

    def _factor(self, point: int) -> float | None:
        """Return the k of gradient = k · truth; nan if there is none, None where both vanish."""
        factors = []
        for way in self.ways(point):
            slope, doubt = self.truth[point](way)
            if not abs(slope) > 8 * doubt:
                return None
            factors.append(float((self.found[point] * way).sum()) / slope)
        k = sorted(factors)[len(factors) // 2]
        same = all(math.isclose(k, f, rel_tol=self.near, abs_tol=self.near) for f in factors)
        return k if same else math.nan

    def _fits(self, gradient: Tensor, mask: Tensor) -> bool:
        """Tell whether a gradient has the right slopes along directions inside a mask."""
        for way in self.ways(1):
            slope, doubt = self.truth[1](way * mask)
            if not abs(float((gradient * way * mask).sum()) - slope) <= doubt:
                return False
        return True

    def _slice(self) -> str | None:
        """Return the first or last slice along a dimension outside which the gradient is right."""
        gradient = self.found[1]
        for dim, size in enumerate(gradient.shape):
            for index, word in ((0, "first"), (size - 1, "last")) if size > 1 else ():
                at = torch.tensor([index], device=gradient.device)
                rest = torch.ones_like(gradient).index_fill(dim, at, 0)
                if self._fits(gradient, rest):
                    return f"wrong only in the {word} slice of dimension {dim}"
        return None


def name_factor(factor: float, rows: int, numbers: int, near: float = ALIKE) -> str | None:
    """Name a factor of so many numbers; None for 1, and for an odd factor of a single number."""
    size = abs(factor)
    if size <= near:
        return "it is zero, the term is left out"
    known = [(rows, 1.0), *((n, k) for n in (1, rows) for k in FACTORS)]
    fits = [(n, k) for n, k in known if math.isclose(size, n * k, rel_tol=near)]
    twice = math.isclose(size * rows, 1, rel_tol=near)
    if math.isclose(factor, 1, rel_tol=near) or not fits and not twice and numbers == 1:
        return None
    count, part = fits[0] if fits else (1, size)
    if fits:  # without the error of differences
        factor = math.copysign(count * part, factor)
    words = [f"{factor:.6g} times the gradient of loss"]
    if not fits and twice:
        part = 1.0
        words.append(f"divided by the number of rows twice (N = {rows})")
    if count > 1:
        two = ", or a factor 2 too much" if rows == 2 == count * part else ""
        words.append(f"the sum over the rows instead of the mean (N = {rows}){two}")
    if part != 1:
        words.append(FACTORS.get(part, f"a factor {part:.6g}"))
    return ", ".join([*words, "the sign is wrong"] if factor < 0 else words)


def worst_entry(name: str, actual: Tensor, expected: Tensor) -> str:
    """Return the entry that differs most, with both numbers."""
    k = int((actual - expected).abs().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(k), expected.shape)]
    values = f"{name} {actual.flatten()[k]:.6g}, autograd {expected.flatten()[k]:.6g}"
    return f"no usual mistake fits; the worst entry {index} is {values}"


def name_reduction(
    expected: Tensor, actual: Tensor, known: Mapping[str, float], noise: float
) -> str:
    """Name the mistake in `p.grad`; `known` are usual factors by what they count."""
    if actual.isnan().any():
        return "p.grad is nan"
    k, several = ratio(actual, expected, noise), {w: n for w, n in known.items() if n > 1}
    for what, number in several.items():
        if k is not None and math.isclose(k, number, rel_tol=1e-3):
            return f"{number:g} times too large: summed over the {what} instead of averaged"
        if k is not None and math.isclose(k, 1 / number, rel_tol=1e-3):
            return f"{number:g} times too small: divided by the number of {what} twice"
    if k is not None and expected.numel() > 1:
        return f"p.grad is {k:.6g} times the gradient of loss"
    if several:
        uneven = " or ".join(several)
        return f"no factor fits: the reduction is missing, or weights uneven {uneven} alike"
    return worst_entry("p.grad", actual, expected)


def alike(actual: Tensor, expected: Tensor, noise: float = 0.0) -> bool:
    """Tell whether two tensors agree in shape and up to noise and a relative 1e-6."""
    if actual.shape != expected.shape:
        return False
    error = largest(actual - expected)
    return error < math.inf and error <= noise + ALIKE * largest(expected)


def ratio(actual: Tensor, expected: Tensor, noise: float) -> float | None:
    """Return the k of actual = k · expected, None if there is none."""
    if largest(expected) <= noise:
        return None
    k = float((actual * expected).sum() / expected.square().sum())
    return k if alike(actual, k * expected, noise) else None


def largest(values: Tensor) -> float:
    """Return the largest absolute value; nan if one is nan."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
