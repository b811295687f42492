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
    value = explicit.get(name)
    if not isinstance(value, Tensor):
        return f"missing: no tensor of this name among {list(explicit)}"
    if value.shape == truth.shape:
        return None
    shapes = f"shape {list(value.shape)} where {list(truth.shape)} is wanted"
    return f"transposed: {shapes}" if value.ndim == 2 and alike(value.T, truth) else shapes


def name_mistake(pairs: Sequence[Pair], n: int, noise: float) -> str:
    """Name the mistake behind wrong numbers.

    The pairs are the gradients at the given weights, after a random step, there with each of the N
    rows given twice, and the ones among them that were found to differ.
    """
    given, moved, twice, wrong = pairs
    k, at_twice = ratio(*moved, noise), ratio(*twice, noise)
    if k is not None and at_twice is not None and (words := _name_factor(k, at_twice, n)):
        return words
    if largest(given[0]) > noise and alike(given[0], moved[0]):
        return "stale: the same at other weights"
    if moved[1].ndim == 2 and alike(moved[0].T, moved[1], noise):
        return "transposed"
    return _worst_entry("explicit", *wrong)


def name_reduction(
    expected: Tensor, actual: Tensor, local: Tensor | None, world_size: int, noise: float
) -> str:
    """Name the mistake in a gradient that was reduced over `world_size` processes."""
    if actual.isnan().any():
        return "p.grad is missing or nan"
    if world_size > 1 and local is not None and alike(actual, local, noise):
        return "the reduction is missing: this is the gradient of this process's own rows"
    k = ratio(actual, expected, noise)
    if k is None:
        return _worst_entry("p.grad", actual, expected)
    if world_size > 1 and math.isclose(k, world_size, rel_tol=1e-3):
        return f"{world_size} times too large: summed over the processes instead of averaged"
    if world_size > 1 and math.isclose(k * world_size, 1, rel_tol=1e-3):
        return f"{world_size} times too small: divided by the number of processes twice"
    return f"a factor {k:.6g}"


def _name_factor(k: float, at_twice: float, n: int) -> str | None:
    """Name a factor that is k on N rows and `at_twice` on 2N."""
    if max(abs(k), abs(at_twice)) <= ALIKE:
        return "it is zero, the term is left out"
    words = f"{k:.6g} times the gradient of loss" + ", the sign is wrong" * (k < 0)
    if math.isclose(at_twice, 2 * k, rel_tol=ALIKE):
        return f"{words}, the sum over the rows instead of the mean (N = {n})"
    constant = math.isclose(at_twice, k, rel_tol=ALIKE)
    return words if constant and not math.isclose(k, 1, rel_tol=ALIKE) else None


def _worst_entry(name: str, actual: Tensor, expected: Tensor) -> str:
    k = (actual - expected).abs().argmax()
    index = [int(i) for i in torch.unravel_index(k, expected.shape)]
    values = f"{name} {actual.flatten()[k]:.6g}, autograd {expected.flatten()[k]:.6g}"
    return f"no usual mistake fits; the worst entry {index} is {values}"


def alike(actual: Tensor, expected: Tensor, noise: float = 0.0) -> bool:
    """Tell whether two tensors agree in shape and up to noise and a relative 1e-6."""
    same = actual.shape == expected.shape
    return same and largest(actual - expected) <= noise + ALIKE * largest(expected)


def ratio(actual: Tensor, expected: Tensor, noise: float) -> float | None:
    """Return the k of actual = k · expected, None if there is none."""
    if largest(expected) <= noise:
        return None
    k = float((actual * expected).sum() / expected.square().sum())
    return k if alike(actual, k * expected, noise) else None


def largest(values: Tensor) -> float:
    """Return the largest absolute value; nan if one is nan."""
    return float(values.detach().abs().max()) if values.numel() else 0.0
