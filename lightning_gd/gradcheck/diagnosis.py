"""Names what is wrong with an explicit gradient, from how it differs from the right one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ALIKE = 1e-6  # float64 gradients agree to about 1e-13, usual mistakes differ by 1e-3 and more
STALE = "stale: a second call on the same batch returns something else"
CUT = (
    "autograd differs from differences of loss: "
    "part of loss is cut off the graph (detach, no_grad, item)"
)

Pair = tuple[Tensor, Tensor]  # explicit, autograd


def malformed(name: str, explicit: Mapping[str, Any], truth: Tensor) -> str | None:
    """Say what is wrong with the name, type or shape of a gradient."""
    if name not in explicit:
        return f"missing: gradients returned only {list(explicit)}"
    value = explicit[name]
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} where a tensor is wanted"
    if value.shape == truth.shape:
        return None
    shapes = f"shape {list(value.shape)} where {list(truth.shape)} is wanted"
    return f"transposed: {shapes}" if value.ndim == 2 and alike(value.T, truth) else shapes


def name_mistake(pairs: Sequence[Pair], wrong: Pair, rows: int, noise: float) -> str:
    """Name the mistake behind wrong numbers.

    `pairs` are the gradients at the given weights, after a random step, and there with each of
    the N rows given twice; `wrong` is the pair among them that was found to differ.
    """
    (given, _), (moved, truth), twice = pairs
    if words := _name_factor(ratio(moved, truth, noise), ratio(*twice, noise), rows):
        return words
    if largest(given) > noise and alike(given, moved):
        return "stale: the same at other weights"
    if truth.ndim == 2 and alike(moved.T, truth, noise):
        return "transposed"
    return worst_entry("explicit", *wrong)


def worst_entry(name: str, actual: Tensor, expected: Tensor) -> str:
    """Return the entry that differs most, with both numbers."""
    k = int((actual - expected).abs().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(k), expected.shape)]
    values = f"{name} {actual.flatten()[k]:.6g}, autograd {expected.flatten()[k]:.6g}"
    return f"no usual mistake fits; the worst entry {index} is {values}"


def _name_factor(once: float | None, twice: float | None, n: int) -> str | None:
    """Name a factor that is `once` on N rows and `twice` on 2N; None for 1 and no known law."""
    if once is None or twice is None:
        return None
    words, size = [f"{once:.6g} times the gradient of loss"], abs(once)
    if max(size, abs(twice)) <= ALIKE:
        return "it is zero, the term is left out"
    if math.isclose(twice, 2 * once, rel_tol=ALIKE):
        words.append(f"the sum over the rows instead of the mean (N = {n})")
        size /= n
    elif not math.isclose(twice, once, rel_tol=ALIKE):
        return None
    if not math.isclose(size, 1, rel_tol=ALIKE):
        known = {"2": "a factor 2 too much", "0.5": "a factor 2 is missing (½)"}
        words.append(known.get(f"{size:.6g}", f"a factor {size:.6g}"))
    if once < 0:
        words.append("the sign is wrong")
    return ", ".join(words) if len(words) > 1 else None


def name_reduction(
    expected: Tensor, actual: Tensor, local: Tensor | None, world_size: int, noise: float
) -> str:
    """Name the mistake in a gradient that was reduced over `world_size` processes."""
    if actual.isnan().any():
        return "p.grad is missing or nan"
    k = ratio(actual, expected, noise)
    if world_size == 1:
        return worst_entry("p.grad", actual, expected) if k is None else f"a factor {k:.6g}"
    if local is not None and alike(actual, local, noise):
        return "the reduction is missing: this is the gradient of this process's own rows"
    if k is None:
        return "no factor fits: the reduction is missing, or weights uneven processes alike"
    if abs(k - world_size) <= 1e-3 * world_size:
        return f"{world_size} times too large: summed over the processes instead of averaged"
    if abs(k * world_size - 1) <= 1e-3:
        return f"{world_size} times too small: divided by the number of processes twice"
    return f"a factor {k:.6g}"


def alike(actual: Tensor, expected: Tensor, noise: float = 0.0) -> bool:
    """Tell whether two tensors agree in shape and up to noise and a relative 1e-6."""
    if actual.shape != expected.shape:
        return False
    return largest(actual - expected) <= noise + ALIKE * largest(expected)


def ratio(actual: Tensor, expected: Tensor, noise: float) -> float | None:
    """Return the k of actual = k · expected, None if there is none."""
    if largest(expected) <= noise:
        return None
    k = float((actual * expected).sum() / expected.square().sum())
    return k if alike(actual, k * expected, noise) else None


def largest(values: Tensor) -> float:
    """Return the largest absolute value; nan if one is nan."""
    return float(values.detach().abs().max()) if values.numel() else 0.0
