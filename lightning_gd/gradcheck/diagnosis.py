"""Names what is wrong with an explicit gradient, from how it differs from the right one."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ALIKE = 1e-6  # float64 gradients agree to about 1e-13, usual mistakes differ by 1e-3 and more
STALE = "stale: a second call on the same batch returns something else"
DIFFERS = "gradients and loss_and_gradients return different gradients"
CUT = (
    "autograd differs from differences of loss: "
    "part of loss is cut off the graph (detach, no_grad, item)"
)
FACTORS = {1.0: "", 2.0: "a factor 2 too much", 0.5: "a factor 2 is missing (½)"}

Pair = tuple[Tensor, Tensor]  # explicit, autograd


def malformed(name: str, explicit: Mapping[str, Tensor], truth: Tensor) -> str | None:
    """Say what is wrong with the name or the shape of a gradient."""
    if name not in explicit:
        return f"missing: gradients returned only {list(explicit)}"
    value = explicit[name]
    if value.shape == truth.shape:
        return None
    shapes = f"shape {list(value.shape)} where {list(truth.shape)} is wanted"
    return f"transposed: {shapes}" if value.ndim == 2 and alike(value.T, truth) else shapes


def name_mistake(pairs: Sequence[Pair], wrong: Pair, rows: int, noise: float) -> str:
    """Name the mistake behind wrong numbers.

    `pairs` are the gradients on N rows before and after a random step, `wrong` the one of them
    that was found to differ.
    """
    given, moved = pairs
    measured = [pair for pair in (moved, given) if largest(pair[1]) > noise]
    factors = [k for pair in measured if (k := ratio(*pair, noise)) is not None]
    if factors and len(factors) == len(measured):
        same = math.isclose(factors[0], factors[-1], rel_tol=ALIKE)
        if same and (words := name_factor(factors[0], rows, moved[1].numel())):
            return words
    if largest(given[0]) > noise and alike(given[0], moved[0]):
        return "stale: the same at other weights"
    if moved[1].ndim == 2 and alike(moved[0].T, moved[1], noise):
        return "transposed"
    return _worst_entry("explicit", *wrong)


def name_factor(factor: float, rows: int, numbers: int, near: float = ALIKE) -> str | None:
    """Name a factor of so many numbers; None for 1, and for an odd factor of a single number."""
    size = abs(factor)
    if size <= near:
        return "it is zero, the term is left out"
    known = [(rows, 1.0), *((n, k) for n in (1, rows) for k in FACTORS)]
    fits = [(n, k) for n, k in known if math.isclose(size, n * k, rel_tol=near)]
    if math.isclose(factor, 1, rel_tol=near) or not fits and numbers == 1:
        return None
    count, part = fits[0] if fits else (1, size)
    words = [f"{factor:.6g} times the gradient of loss"]
    if count > 1:
        two = ", or a factor 2 too much" if rows == 2 == count * part else ""
        words.append(f"the sum over the rows instead of the mean (N = {rows}){two}")
    if part != 1:
        words.append(FACTORS.get(part, f"a factor {part:.6g}"))
    return ", ".join([*words, "the sign is wrong"] if factor < 0 else words)


def _worst_entry(name: str, actual: Tensor, expected: Tensor) -> str:
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
    return _worst_entry("p.grad", actual, expected)


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
