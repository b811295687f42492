"""A float64 copy of a model whose loss and gradients can be measured at any weights."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_gd.batch import call

LENGTHS = [4.0**power for power in range(-10, 4)]  # tried for a random step

Weights = dict[str, Tensor]


class Point(NamedTuple):
    """What was measured at one set of weights on one batch."""

    weights: Weights
    batch: Any
    loss: float
    autograd: Weights
    explicit: dict[str, Any]


class Bench:
    """A copy of a model, on which every call finds the same buffers and random numbers."""

    def __init__(self, model: nn.Module, batch: Any, seed: int) -> None:
        self.model: Any = copy.deepcopy(model).to("cpu", torch.float64)
        self.batch = apply_to_collection(batch, Tensor, double)
        self.trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.called = ""  # the method called last
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._seed, self._random = seed, torch.Generator().manual_seed(seed)
        self.model.requires_grad_()

    def measure(self, weights: Weights, batch: Any, method: str) -> Point:
        """Return the loss, its gradient by autograd, and the explicit one of a method."""
        loss = self._call("loss", weights, batch)
        found = autograd(loss, list(self.model.parameters()))
        if not loss.isfinite():
            raise ValueError(f"it is {loss.item()} on this batch")
        with torch.no_grad():
            result = self._call(method, weights, batch)
        explicit = dict(result[1] if method == "loss_and_gradients" else result)
        copies = apply_to_collection(explicit, Tensor, lambda g: g.detach().clone())
        return Point(weights, batch, loss.item(), dict(zip(weights, found, strict=True)), copies)

    @torch.no_grad()
    def loss(self, weights: Weights, batch: Any) -> float:
        """Return the loss at any weights."""
        return float(self._call("loss", weights, batch))

    def moved(self) -> Weights:
        """Return the weights after a random step that changes the loss by half of its size.

        Where a fit starts or ends gradients vanish, and any multiple of zero is right; after this
        step they do not. The size of the loss is that at the given weights or at zero, whichever
        is larger: predictions then move by the scale of the targets, and cross kinks.
        """
        way = {name: self.random(self.start[name]) for name in self.trained}
        zero = {name: torch.zeros_like(self.start[name]) for name in self.trained}
        loss, moved = self.loss(self.start, self.batch), self.start
        wanted = max(abs(loss), abs(self.loss(self.start | zero, self.batch))) / 2 or 1.0
        for length in LENGTHS:
            step = {name: self.start[name] + length * way[name] for name in self.trained}
            change = abs(self.loss(self.start | step, self.batch) - loss)
            moved = self.start | step if math.isfinite(change) else moved
            if not change < wanted:
                break
        return moved

    def random(self, like: Tensor) -> Tensor:
        """Return normal random numbers in the shape of a parameter."""
        return torch.randn(like.shape, generator=self._random).to(like)

    def _call(self, method: str, weights: Weights, batch: Any) -> Any:
        self.called = method
        torch.default_generator.manual_seed(self._seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
            for buffer, value in self._buffers:
                buffer.detach().copy_(value)
        return call(getattr(self.model, method), apply_to_collection(batch, Tensor, torch.clone))


def autograd(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradient of a loss, zeros for what is cut off its graph."""
    anchored = loss + torch.zeros_like(loss).requires_grad_()
    return torch.autograd.grad(anchored, parameters, materialize_grads=True)


def double(values: Tensor) -> Tensor:
    """Return a float64 copy on the CPU; labels and indices keep their dtype."""
    values = values.detach().cpu().clone()
    return values.double() if values.is_floating_point() else values
