"""What is measured of a loss at one set of weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_gd.gradcheck.diagnosis import largest

FARTHEST = 8  # times the size of a parameter, or 1: the longest direction
FORMULA, AUTOGRAD = "explicit", "autograd"  # kinds of gradients

Weights = dict[str, Tensor]
Loss = Callable[[Any, Any], Tensor]  # of a model and a batch, shape []


@dataclass
class Point:
    """What was measured at one set of weights."""

    weights: Weights
    loss: float
    gradients: dict[str, Weights]  # by kind: those of FORMULA, if there is one, and AUTOGRAD
    noise: float | None = None  # of the loss: what rounding changes, once that was asked for

    @cached_property
    def sizes(self) -> dict[str, float]:
        """The 2-norm of each gradient by autograd."""
        return {name: float(value.norm()) for name, value in self.gradients[AUTOGRAD].items()}

    @cached_property
    def lengths(self) -> dict[str, float]:
        """The length of a step of each parameter that changes the loss by its size."""
        return {name: self._length(name, size) for name, size in self.sizes.items()}

    def _length(self, name: str, size: float) -> float:
        most, loss = FARTHEST * max(largest(self.weights[name]), 1.0), abs(self.loss)
        return min(most, loss / size) if size * loss > 0 else most
