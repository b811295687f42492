"""Notebook 000: one sample, x = 5, y = 0.92, from w = 0.15; and that of 004."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from derivatives import vjp
from lessons.entries import Entry, experiment
from lessons.training import descend, moments
from lessons.verdicts import Close
from lightning_gd.curvature import Curvature

ONE = torch.tensor(1.0, dtype=torch.float64)


@experiment("manual_forward_loss", "torch_forward", "autograd_grad", "torch_sgd_2_epochs")
@experiment("my_gradient_2_epochs", "chain_rule_scalar")
def first_updates(entry: Entry, way: str) -> dict[str, Any]:
    """What is known before each update, as many numbers of a kind as are printed."""
    double = entry.dtype.startswith("float64")
    run = descend(entry, way, steps=max(1, entry.steps), double=double)
    found = {
        "w": run.weights[:, 0],
        "y_pred": run.predictions[:, 0],
        "loss": run.losses,
        "grad": run.gradients[:, 0],
    }
    count = {name: np.size(printed) for name, printed in entry.printed.items()}
    return {name: found[name.removesuffix("_4dp")][:n] for name, n in count.items()}


@experiment("manual_chain_rule_step")
def chain_rule(entry: Entry, way: str) -> dict[str, Any]:
    """The two factors of the gradient one by one, and the update that they make."""
    run = descend(entry, way, steps=2, double=True)
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


@experiment("divergence_law")
def divergence(entry: Entry, way: str) -> dict[str, Any]:
    """Why the loss rises: the curvature, and six updates that follow from it."""
    run, exact = descend(entry, way), descend(entry, way, double=True)
    curvature = Curvature(moments(entry).hessian(bias=False))
    lr = entry.settings["lr"]
    factor, first = curvature.factor(lr) ** 2, exact.losses[0]
    ratios = exact.losses[1:] / exact.losses[:-1]
    predicted = [first * factor**k for k in range(entry.steps)]
    return {
        "error_factor": 1 - lr * curvature.largest,
        "loss_factor": factor,
        "curvature": curvature.largest,
        "lr_max": curvature.max_lr(),
        "lr_one_step": curvature.best_lr(),
        "w_star": moments(entry).optimum(bias=False).weight.tolist(),
        "loss_formula": Close(
            exact.losses, predicted, rel=1e-12, formula=f"{first:g}*{factor:g}**k"
        ),
        "loss_float32": run.losses,
        "w_float32": run.weights[1:, 0],
        "lr": lr,
        "w_start": entry.settings["w0"],
        "error_size": abs(1 - lr * curvature.largest),
        "loss_ratios": ", ".join(f"{ratio:.6g}" for ratio in ratios),
        "at_best": _one_step(entry, way, curvature.best_lr()),
    }


def _one_step(entry: Entry, way: str, lr: float) -> list[float]:
    return descend(entry, way, steps=1, double=True, lr=lr).weights[:, 0].tolist()
