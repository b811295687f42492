"""Notebook 004, and the vector function of 002: what autograd does, without a regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from derivatives import per_sample_jacobian, vjp
from lessons.entries import Entry, experiment
from lessons.training import descend


@experiment("autograd_vector", ways=("vjp",))
def vector_function(entry: Entry, way: str) -> dict[str, Any]:
    """T = a³ − 2b² with v = (1, 1): vᵀJ is 3a² and −4b."""
    a, b = (torch.tensor(entry.settings[name]) for name in "ab")

    def t(a: Tensor, b: Tensor) -> Tensor:
        return a**3 - 2 * b**2

    da, db = vjp(t, (a, b), torch.tensor(entry.settings["gradient"]))
    return {
        "T": t(a, b).tolist(),
        "a_grad": da.tolist(),
        "b_grad": db.tolist(),
        "check_a": (da == 3 * a**2).tolist(),
        "check_b": (db == -4 * b).tolist(),
    }


@experiment("vector_grad_ones", ways=("vjp",))
def ones(entry: Entry, way: str) -> dict[str, Any]:
    """Y = x + 2 with v = ones, at any x."""
    x = torch.rand(3, generator=torch.Generator().manual_seed(0))
    return {"x_grad": vjp(lambda x: x + 2, x, torch.ones(3))[0].tolist()}


@experiment("accumulated_grad_bug", ways=("backward",))
def accumulated(entry: Entry, way: str) -> dict[str, Any]:
    """Two calls of backward without zeroing add up; vjp alone gives the true gradient."""
    x = torch.tensor(entry.settings["x"], requires_grad=True)
    y = x + 2
    y.backward(torch.ones(3), retain_graph=True)
    before, z = grad_of(x), 2 * y**2
    z.mean().backward()
    (true,) = vjp(lambda x: (2 * (x + 2) ** 2).mean(), x, torch.tensor(1.0))
    formula = (4 * (x + 2) / 3).detach()
    return {
        "y": y.tolist(),
        "z_vec": z.tolist(),
        "z": z.mean().item(),
        "printed_grad": grad_of(x),
        "correct_grad": true.tolist(),
        "formula_printed": torch.allclose(torch.tensor(grad_of(x)), 1 + formula),
        "formula_correct": torch.allclose(true, formula),
        "left_over": before,
    }


@experiment("jacobian", ways=("per_sample_jacobian",))
def jacobian(entry: Entry, way: str) -> dict[str, Any]:
    """The Jacobian of each of ten samples, by our way and by three others."""
    t = torch.arange(10.0)
    x = torch.stack([t, t, t], dim=1)
    ours = per_sample_jacobian(field, x)
    with_grad = x.clone().requires_grad_()
    rows = [
        torch.autograd.grad(column.sum(), with_grad, retain_graph=True)[0]
        for column in field(with_grad).unbind(1)
    ]
    full = torch.autograd.functional.jacobian(field, x)
    others = [
        torch.stack(rows, dim=1),
        full.diagonal(dim1=0, dim2=2).permute(2, 0, 1),
        torch.func.vmap(torch.func.jacrev(lambda row: field(row[None])[0]))(x),
    ]
    return {
        "B": field(x).tolist(),
        "jacobian": ours.tolist(),
        "shape": list(ours.shape),
        "routes_equal": [torch.equal(ours, other) for other in others],
        "full_shape": list(full.shape),
    }


def field(x: Tensor) -> Tensor:
    """B = (x³ − y², y² + z², z³ − x²) for rows (x, y, z), shape [N, 3]."""
    x, y, z = x.unbind(1)
    return torch.stack([x**3 - y**2, y**2 + z**2, z**3 - x**2], dim=1)


@experiment("grad_accumulation", "grad_zeroed", ways=("backward",))
def accumulation(entry: Entry, way: str) -> dict[str, Any]:
    """Σ 3w backward three times over, with and without zeroing in between."""
    w = torch.tensor(entry.settings["w"], dtype=torch.float32, requires_grad=True)
    outputs, gradients = [], []
    for _ in range(entry.steps):
        if entry.settings["zero"]:
            w.grad = None
        output = (3 * w).sum()
        output.backward()
        outputs.append(output.item())
        gradients.append(grad_of(w))
    return {"output": outputs, "grad": gradients}


@experiment("detach_no_grad_random", ways=("torch",))
def untracked(entry: Entry, way: str) -> dict[str, Any]:
    """Three ways to stop autograd from recording, and the one by which a bias is frozen."""
    x = torch.rand(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    detached = x.detach()
    with torch.no_grad():
        inside = x + 2
    switched = x.clone().detach().requires_grad_().requires_grad_(False)
    frozen, free = (
        descend(entry, "one pass", steps=100, weight=[0.0], bias=bias).model
        for bias in (False, True)
    )
    return {
        "assert_": [
            not (switched + 2).requires_grad,
            torch.equal(detached, x) and not detached.requires_grad,
            not inside.requires_grad and (x + 2).requires_grad,
        ],
        "frozen": frozen.bias.item(),
        "free": free.bias.item(),
    }


def grad_of(x: Tensor) -> list[float]:
    """Return a copy of what `.grad` holds."""
    assert x.grad is not None
    return x.grad.tolist()
