"""Notebook 000: one sample, x = 5, y = 0.92, from w = 0.15."""

from __future__ import annotations

from typing import Any

import torch

from lightning_gd.derivatives import vjp
from lightning_gd.notebooks.golden import Entry, experiment
from lightning_gd.notebooks.training import ROADS, descend, landscape
from lightning_gd.notebooks.verdicts import Law

ONE = torch.tensor(1.0, dtype=torch.float64)


@experiment("manual_forward_loss", roads=ROADS)
def forward(entry: Entry, road: str) -> dict[str, Any]:
    """Prediction and loss before any update, in float64."""
    run = descend(entry, road, steps=1, double=True)
    return {"y_pred": run.predictions[0], "loss": run.losses[0]}


@experiment("manual_chain_rule_step", roads=ROADS)
def chain_rule(entry: Entry, road: str) -> dict[str, Any]:
    """The two factors of the gradient one by one, and the update that they make."""
    run = descend(entry, road, steps=2, double=True)
    x, y, w = (ONE * entry.settings[name] for name in ("x", "y", "w0"))
    (outer,) = vjp(lambda prediction: (prediction - y) ** 2, w * x, ONE)
    (inner,) = vjp(lambda w: w * x, w, ONE)
    return {
        "dl_dy": outer.item(),
        "dy_dw": inner.item(),
        "dl_dw": run.gradients[0, 0],
        "new_weight": run.weights[1],
        "y_pred_after": run.predictions[1],
        "loss_after": run.losses[1],
    }


@experiment("torch_forward", "autograd_grad", roads=ROADS)
def first_update(entry: Entry, road: str) -> dict[str, Any]:
    """What is known before the first update, in float32."""
    run = descend(entry, road, steps=1)
    ours = {
        "w_4dp": run.weights[0, 0],
        "y_pred": run.predictions[0, 0],
        "loss_4dp": run.losses[0],
        "loss": run.losses[0],
        "grad_4dp": run.gradients[0, 0],
    }
    return {name: ours[name] for name in entry.outputs or ()}


@experiment("torch_sgd_2_epochs", "my_gradient_2_epochs", roads=ROADS)
def two_updates(entry: Entry, road: str) -> dict[str, Any]:
    """Two updates, of which the first raises the loss."""
    run = descend(entry, road)
    return {"loss": run.losses, "y_pred": run.predictions[:2]}


@experiment("divergence_law", roads=ROADS)
def divergence(entry: Entry, road: str) -> dict[str, Any]:
    """Why the loss rises: the curvature, and six updates that follow from it."""
    run, exact = descend(entry, road), descend(entry, road, double=True)
    _, curvature, optimum = landscape(entry)
    lr = entry.settings["lr"]
    factor, first = curvature.loss_factor(lr), exact.losses[0]
    ratios = exact.losses[1:] / exact.losses[:-1]
    predicted = [first * factor**k for k in range(entry.steps)]
    return {
        "error_factor": curvature.top_factor(lr),
        "loss_factor": factor,
        "curvature": curvature.largest,
        "lr_max": curvature.max_lr(),
        "lr_one_step": curvature.best_lr(),
        "w_star": optimum.weight.tolist(),
        "loss_formula": Law(f"{first:g}*{factor:g}**k", exact.losses, predicted, rel=1e-12),
        "loss_float32": run.losses,
        "w_float32": run.weights[1:, 0],
        "lr": lr,
        "w_start": entry.settings["w0"],
        "error_size": abs(curvature.top_factor(lr)),
        "loss_ratios": ", ".join(f"{ratio:.6g}" for ratio in ratios),
        "at_best": _one_step(entry, road, curvature.best_lr()),
    }


def _one_step(entry: Entry, road: str, lr: float) -> list[float]:
    return descend(entry, road, steps=1, double=True, lr=lr).weights[:, 0].tolist()
