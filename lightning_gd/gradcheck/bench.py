"""A copy of a model on which its loss and its gradients can be measured again and again."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gd.gradcheck.differences import Batch

Formula = Callable[[Any, Tensor, Tensor], Mapping[str, Tensor]]
Both = tuple[dict[str, Any], dict[str, Tensor]]  # explicit, autograd


class Bench:
    """A float64 copy of a model on which every call finds the same state and random numbers."""

    def __init__(self, model: nn.Module, formula: Formula, seed: int):
        """Copies the model; frozen parameters are set free in the copy."""
        self.model: Any = copy.deepcopy(model).to("cpu", torch.float64)
        self.formula = formula
        self.seed = seed
        self.free = {name for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = dict(self.model.named_parameters())
        for p in self.parameters.values():
            p.grad = None
            p.requires_grad_()
        self.values = {name: p.detach() for name, p in self.parameters.items()}

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the copy, on the graph."""
        torch.default_generator.manual_seed(self.seed)
        return self.model.loss(*(t.clone() for t in batch))

    def autograd(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients; zeros where the loss is cut off the graph."""
        loss = self.loss(batch)
        if not loss.requires_grad:
            return loss.item(), {name: torch.zeros_like(v) for name, v in self.values.items()}
        leaves = list(self.parameters.values())
        found = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return loss.item(), dict(zip(self.parameters, found, strict=True))

    @torch.no_grad()
    def explicit(self, batch: Batch, calls: int = 1) -> list[dict[str, Any]]:
        """Results of consecutive calls of the formula on one fresh copy of the model."""
        model, results = copy.deepcopy(self.model), []
        for _ in range(calls):
            torch.default_generator.manual_seed(self.seed)
            result = self.formula(model, *(t.clone() for t in batch))
            if not isinstance(result, Mapping):
                raise TypeError(f"a {type(result).__name__} instead of a dict by parameter name")
            results.append({name: _snapshot(value) for name, value in result.items()})
        return results

    def both(self, batch: Batch) -> Both:
        """Explicit gradients and gradients by autograd."""
        return self.explicit(batch)[0], self.autograd(batch)[1]

    def altered(self, batch: Batch) -> list[Both]:
        """Both roads on other numbers of the same shapes; none if the model does not take them."""
        x, y = batch
        x = 1.5 * x if x.is_floating_point() else x
        y = 0.75 * y if y.is_floating_point() else y
        try:
            return [self.both((x, y))]
        except Exception:  # only evidence for a diagnosis is lost
            return []

    def terms(self, batch: Batch) -> int:
        """N + D + H, the number of terms in the sums of a gradient."""
        widths = [size for value in self.values.values() for size in value.shape]
        return len(batch[0]) + batch[0][0].numel() + max(widths, default=1)


def repeated(batch: Batch) -> Batch:
    """The batch with every row twice: a mean stays, a sum doubles."""
    return torch.cat([batch[0], batch[0]]), torch.cat([batch[1], batch[1]])


def double(values: Tensor) -> Tensor:
    """A float64 copy on the CPU; labels and indices keep their dtype."""
    values = values.detach().cpu().clone()
    return values.double() if values.is_floating_point() else values


def _snapshot(value: Any) -> Any:
    """A copy that a later call cannot change, with the same `requires_grad`."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)
