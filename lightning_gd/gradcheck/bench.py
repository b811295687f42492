"""A float64 copy of a model whose loss and gradients can be measured at any weights."""

import copy
import math
from typing import Any, NamedTuple

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_gd.batch import call, tensors

# Rounding per term of a sum, relative to the gradient. Terms that cancel are larger than it: 16 eps
# were exceeded by 3 of 19,000 random models. Mistakes are 1e-3 and more.
FLOAT64 = 1024 * torch.finfo(torch.float64).eps
LENGTHS = [8.0**power for power in range(-7, 3)]  # tried for a random step

Weights = dict[str, Tensor]


class Point(NamedTuple):
    """What was measured at one set of weights."""

    weights: Weights
    loss: float
    autograd: Weights
    explicit: Weights


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
        self.rows = len(next(tensors(self.batch)))
        numbers = sum(t.numel() for t in tensors(self.batch)) // self.rows
        widest = max(size for value in self.start.values() for size in (*value.shape, 1))
        self.rounding = FLOAT64 * (self.rows + numbers + widest)  # of a sum, relative

    def measure(self, weights: Weights, method: str) -> Point:
        """Return the loss, its gradient by autograd, and the explicit one of a method."""
        self._place(weights)
        loss = self._call("loss")
        if not loss.isfinite():
            raise ValueError(f"it is {loss.item()} on this batch")
        found = torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True)
        autograd = dict(zip(self.parameters, found, strict=True))
        return Point(weights, loss.item(), autograd, self.explicit(method))

    @torch.no_grad()
    def explicit(self, method: str) -> Weights:
        """Return the explicit gradients of a method at the weights of the last call."""
        found = self._call(method)
        found = found[1] if method == "loss_and_gradients" else found
        return {name: gradient.detach().clone() for name, gradient in found.items()}

    @torch.no_grad()
    def loss(self, weights: Weights) -> float:
        """Return the loss at other weights."""
        self._place(weights)
        return float(self._call("loss"))

    def moved(self, loss: float) -> Weights:
        """Return the weights after a random step that changes the loss by half of its size.

        Where a fit starts or ends gradients vanish, and any multiple of zero is right; after this
        step they do not. The size of the loss is that at the given weights or at zero, whichever
        is larger: predictions then move by the scale of the targets, and cross kinks.
        """
        way = {name: self.random(self.start[name]) for name in self.trained}
        zero = abs(self.loss({**self.start, **{n: torch.zeros_like(v) for n, v in way.items()}}))
        wanted = max(abs(loss), zero if math.isfinite(zero) else 0.0) / 2 or 1.0
        moved = self.start
        for length in LENGTHS:
            step = {name: self.start[name] + length * value for name, value in way.items()}
            change = abs(self.loss({**self.start, **step}) - loss)
            moved = {**self.start, **step} if math.isfinite(change) else moved
            if not change < wanted:
                break
        return moved

    def random(self, like: Tensor) -> Tensor:
        """Return normal random numbers in the shape of a parameter."""
        return torch.randn(like.shape, generator=self._random).to(like)

    def _place(self, weights: Weights) -> None:
        for name, value in weights.items():
            self.parameters[name].data = value

    def _call(self, method: str) -> Any:
        self.called = method
        torch.default_generator.manual_seed(self._seed)
        for buffer, value in self._buffers:
            buffer.detach().copy_(value)
        batch = apply_to_collection(self.batch, Tensor, torch.clone)
        return call(getattr(self.model, method), batch)


def double(values: Tensor) -> Tensor:
    """Return a float64 copy on the CPU; labels and indices keep their dtype."""
    values = values.detach().cpu().clone()
    return values.double() if values.is_floating_point() else values
