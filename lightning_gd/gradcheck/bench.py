"""A float64 copy of a model whose loss and gradients can be measured at any weights."""

import copy
import math
from collections.abc import Mapping
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
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.trained = [name for name, p in self.parameters.items() if p.requires_grad]
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.called = ""  # the method called last
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._seed, self._random = seed, torch.Generator().manual_seed(seed)
        self.model.requires_grad_()

    def measure(self, weights: Weights, batch: Any, method: str) -> Point:
        """Return the loss, its gradient by autograd, and the explicit one of a method."""
        self.place(weights)
        loss, leaves = self._call("loss", batch), list(self.parameters.values())
        found = [torch.zeros_like(p) for p in leaves]
        if loss.requires_grad:  # not cut off the graph
            found = torch.autograd.grad(loss, leaves, materialize_grads=True)
        if not loss.isfinite():
            raise ValueError(f"it is {loss.item()} on this batch")
        with torch.no_grad():
            result = self._call(method, batch)
        explicit = result[1] if method == "loss_and_gradients" else result
        if not isinstance(explicit, Mapping):
            raise TypeError(f"a {type(explicit).__name__} instead of a dict by parameter name")
        autograd = dict(zip(self.parameters, found, strict=True))
        copies = apply_to_collection(dict(explicit), Tensor, lambda g: g.detach().clone())
        return Point(weights, batch, loss.item(), autograd, copies)

    @torch.no_grad()
    def loss(self, weights: Weights, batch: Any) -> float:
        """Return the loss after some of the weights were changed."""
        self.place(weights)
        return float(self._call("loss", batch))

    def moved(self) -> Weights:
        """Return the weights after a random step that changes the loss by half of its size.

        Where a fit starts or ends gradients vanish, and any multiple of zero is right; after this
        step they do not. The size of the loss is that at the given weights or at zero, whichever
        is larger: predictions then move by the scale of the targets, and cross kinks.
        """
        given = {name: self.start[name] for name in self.trained}
        way = {name: self.random(value) for name, value in given.items()}
        zero = abs(self.loss({n: torch.zeros_like(v) for n, v in given.items()}, self.batch))
        loss, moved = self.loss(given, self.batch), given
        wanted = max(abs(loss), zero if math.isfinite(zero) else 0.0) / 2 or 1.0
        for length in LENGTHS:
            weights = {name: v + length * way[name] for name, v in given.items()}
            change = abs(self.loss(weights, self.batch) - loss)
            moved = weights if math.isfinite(change) else moved
            if not change < wanted:
                break
        return {**self.start, **moved}

    def random(self, like: Tensor) -> Tensor:
        """Return normal random numbers in the shape of a parameter."""
        return torch.randn(like.shape, generator=self._random).to(like)

    @torch.no_grad()
    def place(self, weights: Weights) -> None:
        """Set parameters of the copy."""
        for name, value in weights.items():
            self.parameters[name].copy_(value)

    def _call(self, method: str, batch: Any) -> Any:
        self.called = method
        torch.default_generator.manual_seed(self._seed)
        for buffer, value in self._buffers:
            buffer.detach().copy_(value)
        batch = apply_to_collection(batch, Tensor, torch.clone)
        return call(getattr(self.model, method), batch)


def double(values: Tensor) -> Tensor:
    """Return a float64 copy on the CPU; labels and indices keep their dtype."""
    values = values.detach().cpu().clone()
    return values.double() if values.is_floating_point() else values
