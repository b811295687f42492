"""Compares a Function under `torch.func.vmap` with a loop of its own calls."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_gd.gradcheck.bench import ROUNDING
from lightning_gd.gradcheck.delivered import compared
from lightning_gd.gradcheck.diagnosis import alike, first_line
from lightning_gd.gradcheck.randomness import RandomState
from lightning_gd.gradcheck.report import GradientReport, ParameterReport
from lightning_gd.gradcheck.twin import shaken

CALLS = 3  # that are made at once
APART = 1 / 16  # the relative difference of their inputs


def claims_vmap(function: Any) -> bool:
    """Tell whether a Function has a rule for `torch.func.vmap`, its own or a generated one."""
    if not (isinstance(function, type) and issubclass(function, Function)):
        return False
    return function.generate_vmap_rule or function.vmap is not Function.vmap


def check_vmap(
    function: Any, inputs: Sequence[Any], slots: Sequence[int], state: RandomState
) -> GradientReport:
    """Compare with all slots mapped over their first and last dimensions, and each slot alone."""
    found: dict[str, ParameterReport] = {}
    for dims in (dict.fromkeys(slots, 0), dict.fromkeys(slots, -1), *({k: 0} for k in slots)):
        for report in _compare(function, inputs, dims, state):
            if report.name not in found or not found[report.name].diagnosis:
                found[report.name] = report
    return GradientReport(tuple(found.values()))


def _compare(
    function: Any, inputs: Sequence[Any], dims: Mapping[int, int], state: RandomState
) -> Iterator[ParameterReport]:
    source, names = torch.Generator().manual_seed(0), [f"input {k}" for k in dims]
    stacks = {
        k: torch.stack([shaken(inputs[k].detach(), APART, source) for _ in range(CALLS)], dim)
        for k, dim in dims.items()
    }
    leaves = [stack.requires_grad_() for stack in stacks.values()]

    def call(form: Any, own: Mapping[int, Tensor]) -> tuple[Any, ...]:
        state.restore()
        return tuple_of(form(*(own.get(k, value) for k, value in enumerate(inputs))))

    apart = [{k: stacks[k].select(dim, n) for k, dim in dims.items()} for n in range(CALLS)]
    calls = zip(*(call(function.apply, own) for own in apart), strict=True)
    values, right, size = _derived(list(map(torch.stack, calls)), leaves)
    in_dims = tuple(map(dims.get, range(len(inputs))))
    try:
        mapped = torch.func.vmap(function.apply, in_dims, randomness="same")
        mine, found, _ = _derived(call(mapped, stacks), leaves)
    except Exception as error:  # whatever a rule raises belongs in the report
        words = f"under vmap raised {first_line(error)}"
        return (ParameterReport(name, diagnosis=words) for name in names)
    other = "" if all(map(alike, mine, values)) else "the value under vmap is another"
    sizes = (size / (float(leaf.detach().norm()) or 1.0) for leaf in leaves)
    return map(partial(_told, other), names, found, right, sizes)


def _told(other: str, name: str, found: Tensor, right: Tensor, least: float) -> ParameterReport:
    bound = ROUNDING * torch.finfo(right.dtype).eps * (float(right.norm()) + least)
    report = compared(name, found, right, bound, CALLS)
    words = report.diagnosis and f"the gradient under vmap: {report.diagnosis}"
    return replace(report, diagnosis=other or words)


def _derived(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[list[Tensor], Sequence[Tensor], float]:
    """Return the values, the gradients of Σ cotangent · value, and |cotangent| · |value|."""
    source, total, size = torch.Generator().manual_seed(1), 0 * leaves[0].sum(), 0.0
    for value in outputs:
        if value.requires_grad:
            cotangent = torch.randn(value.shape, generator=source).to(value)
            total = total + (cotangent * value).sum()
            size += float(cotangent.norm() * value.detach().norm())
    found = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [value.detach().double() for value in outputs], found, size


def tuple_of(value: Any) -> tuple[Any, ...]:
    """Return a tuple or list as a tuple, anything else as its only entry."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
