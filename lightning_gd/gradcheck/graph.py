"""Gradients through the graph of autograd, and what lies in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def gradients_of(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], scale: float, module: nn.Module
) -> dict[str, Tensor]:
    """Return the gradients by `backward`, dense and zero where there is none; `grad` stays None.

    Nor does the `grad` of tensors change that are no parameters of the module.
    """
    own = {id(p) for p in module.parameters()}
    others = [(leaf, leaf.grad) for leaf in _leaves(loss) if id(leaf) not in own]
    for leaf, _ in others:
        leaf.grad = None
    loss.backward(loss.new_full(loss.shape, scale))  # `autograd.grad` is not for every Function
    for leaf, gradient in others:
        leaf.grad = gradient
    found = {}
    for name, parameter in parameters.items():
        gradient, parameter.grad = parameter.grad, None
        found[name] = torch.zeros_like(parameter) if gradient is None else dense(gradient)
    return found


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient, of an embedding perhaps, as a dense tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def embeddings_of(model: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Return the rows that get no gradient by design, by parameter, and options that change it."""
    names, padding, options = {id(p): name for name, p in model.named_parameters()}, {}, {}
    for module in model.modules():
        known = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if known and (name := names.get(id(module.weight))):
            if module.padding_idx is not None:
                padding[name] = module.padding_idx
            if module.scale_grad_by_freq:
                options[name] = "scale_grad_by_freq=True"
            if module.max_norm is not None:
                options[name] = f"max_norm={module.max_norm}"
    return padding, options


def functions_behind(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, set[str]]:
    """Return the names of the custom `autograd.Function`s between the loss and each parameter."""
    names = {id(p): name for name, p in parameters.items()}
    found: dict[str, set[str]] = {}
    start = loss.grad_fn
    passed: dict[Any, set[str]] = {}
    waiting = [(start, frozenset[str]())] if start is not None else []
    while waiting:
        node, above = waiting.pop()
        custom = isinstance(node, torch.autograd.function.BackwardCFunction)
        here = above | {node.name().removesuffix("Backward")} if custom else above
        if node in passed and here <= passed[node]:
            continue
        passed.setdefault(node, set()).update(here)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            found.setdefault(names[id(leaf)], set()).update(here)
        waiting += [(following, here) for following, _ in node.next_functions if following]
    return found


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the tensors whose `grad` a backward pass changes."""
    waiting, seen = [loss.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            if (leaf := getattr(node, "variable", None)) is not None:
                yield leaf


@contextmanager
def precision_seen() -> Iterator[list[float]]:
    """Collect the eps of the numbers that autograd saves inside a `with` block."""
    found: list[float] = []

    def pack(values: Tensor) -> Tensor:
        if values.is_floating_point():
            found.append(torch.finfo(values.dtype).eps)
        return values.detach()  # itself would be kept for ever by a node that nothing leads to

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        yield found
