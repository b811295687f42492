"""Notebooks 001 and 003, and the regressions of 004: a line through four points."""

from __future__ import annotations

from typing import Any

import numpy as np

from lessons.entries import Entry, experiment
from lessons.training import Run, descend, moments, points
from lessons.verdicts import Close
from lightning_gd.curvature import Curvature
from reference import Descent, gradient_descent

# Weight and bias from which nn.Linear had started, solved for from the digits that were printed:
# 001 from f(5) and its last losses, after 1000 updates more than it says; 004 from f(5) and the
# first loss. They are known to four digits, and the slow part of the loss to 1 %.
STARTS = {
    "nn_linear_rerun_cell34": (0.9533, 0.3465, 1000),
    "nn_linear_1000": (0.50947, -0.57435, 0),
}


# The product rounds once in the first notebook, and to float32 in the other.
@experiment("numpy_sum_gradient", ways=("NumPy 1: dot in float64", "reference"))
@experiment("numpy_sum_gradient_stale_print", ways=("NumPy 1: dot in float32", "reference"))
def numpy_sum(entry: Entry, way: str) -> dict[str, Any]:
    """The sum gradient; one notebook prints beside it the weight of another cell, 1.5."""
    if way == "reference":
        run = _summed(entry, np.float32)
        weights, losses = run.weights[:, 0], run.losses
    else:
        weights, losses = _numpy_1(entry, np.float64 if way.endswith("64") else np.float32)
    return {
        "before_f5": 5 * weights[0],
        "w_3dp": weights[1:],
        "loss_8dp": losses,
        "after_f5": 5 * weights[-1],
        "printed_w": np.full(entry.steps, 1.5),
        "true_w_3dp": weights[1:],
    }


def _summed(entry: Entry, dtype: type[np.floating] | None = None) -> Descent:
    x, y = (np.array(values, dtype) for values in points(entry))
    return gradient_descent(x, y, lr=entry.settings["lr"], steps=entry.steps, reduction="sum")


def _numpy_1(entry: Entry, dot: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    """NumPy before 2.0: `w -= lr * gradient` makes w float64, `w * x` is float32 all the same."""
    x, y = (np.array(values, np.float32) for values in points(entry))
    w, weights, losses = 0.0, [0.0], []
    for _ in range(entry.steps):
        r = np.float32(w) * x - y
        products = (2 * x).astype(dot) * r.astype(dot)
        w -= entry.settings["lr"] * float(np.float32(products.sum()))
        losses.append(float((r**2).mean()))
        weights.append(w)
    return np.array(weights), np.array(losses)


@experiment("numpy_sum_gradient_closed_form")
def sum_closed_form(entry: Entry, way: str) -> dict[str, Any]:
    """The sum gradient at λ is the mean gradient at N λ: trained so, it is the same curve."""
    summed, rows, lr = _summed(entry), len(points(entry)[0]), entry.settings["lr"]
    run = descend(entry, way, double=True, lr=rows * lr)
    curvature = Curvature(moments(entry).hessian(bias=False))
    return {
        **_laws(entry, run, rows * lr, rel=1e-9),
        "w_values": run.weights[1:],
        "loss_values": run.losses,
        "equivalent_mean_lr": rows * lr,
        "lr_max_sum": curvature.max_lr() / rows,
        "lr_max_mean": curvature.max_lr(),
        "sum at λ, mean at Nλ apart": _apart(summed, run),
        "rows": rows,
        "lr": lr,
        "steps": entry.steps,
        "gradients": [summed.gradients[0, 0], descend(entry, way, steps=1).gradients[0, 0]],
    }


def _apart(summed: Descent, trained: Run) -> Close:
    return Close(float(np.abs(summed.weights - trained.weights).max()), 0.0, abs=1e-13)


def _laws(entry: Entry, run: Run | Descent, lr: float, rel: float) -> dict[str, Close]:
    """After update k = 1, 2, …: w = w*(1 − qᵏ) and L = L₀ q²⁽ᵏ⁻¹⁾, where q = 1 − λ · curvature."""
    q = 1 - lr * Curvature(moments(entry).hessian(bias=False)).largest
    target, first = moments(entry).optimum(bias=False).weight.item(), run.losses[0]
    k = np.arange(1, len(run.losses) + 1)
    w, loss = target * (1 - q**k), first * (q * q) ** (k - 1)
    return {
        "w": Close(run.weights[1:, 0], w, rel, formula=f"{target:g}*(1-{q:g}**k)"),
        "loss": Close(run.losses, loss, rel, formula=f"{first:g}*{q * q:g}**(k-1)"),
    }


@experiment("mean_gradient_closed_form")
def mean_closed_form(entry: Entry, way: str) -> dict[str, Any]:
    """The mean gradient follows its law: float64 to 1e-9, float32 as far as it can."""
    exact, run = descend(entry, way, double=True), descend(entry, way, steps=30)
    lr, limits = entry.settings["lr"], entry.tolerance or {}
    w, loss = _laws(entry, run, lr, rel=0).values()
    w_error, loss_error = np.abs(w.value - w.expected), np.abs(loss.value / loss.expected - 1)
    return {
        **_laws(entry, exact, lr, rel=1e-9),
        "error of w in float32": Close(w_error.max(), 0.0, abs=limits["w_abs"]),
        "of 10 losses": Close(loss_error[:10].max(), 0.0, abs=limits["loss_rel_first_10"]),
        "of 30 losses": Close(loss_error.max(), 0.0, abs=limits["loss_rel_1_to_30"]),
    }


@experiment("torch_autograd_100", "torch_autograd_10", "torch_optim_sgd_10")
def by_epoch(entry: Entry, way: str) -> dict[str, Any]:
    """Line y = 2x by the mean gradient, as torch trains it."""
    return _by_epoch(entry, descend(entry, way))


def _by_epoch(entry: Entry, run: Run, before: int = 0) -> dict[str, Any]:
    """The loss before and the weight after each of the epochs printed, counted from 1."""
    after = np.array(entry.printed["epochs"]) + before
    return {
        "epochs": after - before,
        "w_3dp": run.weights[after, 0],
        "loss_8dp": run.losses[after - 1],
        "after_f5": run.predict(5.0),
    }


@experiment("nn_linear_rerun_cell34", "nn_linear_1000", ways=("formula", "autograd"))
def with_bias(entry: Entry, way: str) -> dict[str, Any]:
    """Line y = 2x with a bias: from the start that was recovered, the digits come back."""
    weight, intercept, before = STARTS[entry.experiment]
    run = descend(entry, way, steps=before + entry.steps, weight=[weight], intercept=intercept)
    ours = _by_epoch(entry, run, before)
    losses = Close(ours["loss_8dp"], rel=0.01)
    return {**ours, "before_f5": 5 * weight + intercept, "loss_8dp": losses}


@experiment("nn_linear_rate")
def rate(entry: Entry, way: str) -> dict[str, Any]:
    """From any start: once the fast part is gone, the loss falls at the rate of the slow one."""
    hessian = moments(entry).hessian()
    curvature = Curvature(hessian)
    lr, every = entry.settings["lr"], entry.steps
    any_start: dict[str, Any] = {"bias": True, "start": "linear"}
    slow = descend(entry, way, steps=400, double=True, **any_start).losses[200:]
    ratios = slow[every:] / slow[:-every]
    return {
        "hessian": hessian.tolist(),
        "eig": curvature.eigenvalues.tolist(),
        "cond": curvature.condition_number,
        "lr_max": curvature.max_lr(),
        "loss_ratio_per_10_epochs": (1 - lr * curvature.smallest) ** (2 * every),
        "printed_ratios_min": ratios.min(),
        "printed_ratios_max": ratios.max(),
    }


@experiment("nn_linear_1000_rate", ways=("formula", "one pass"))
def two_rates(entry: Entry, way: str) -> dict[str, Any]:
    """The fast part of the loss at first, the slow one at last."""
    weight, intercept, _ = STARTS["nn_linear_1000"]
    start = {"bias": True, "weight": [weight], "intercept": intercept}
    losses = descend(entry, way, steps=1001, double=True, **start).losses
    ratios = losses[entry.steps :: entry.steps] / losses[: -entry.steps : entry.steps]
    return {"slow_loss_ratio_per_100": ratios[-1], "fast_loss_ratio_per_100": ratios[0]}


@experiment("numpy_sum_gradient_11", "numpy_sum_gradient_11_rest", ways=("reference",))
def numpy_integers(entry: Entry, way: str) -> dict[str, Any]:
    """Line y = 3x by the sum gradient, before and after each update; and the law of all."""
    run, (x, _), lr = _summed(entry), points(entry), entry.settings["lr"]
    steps = np.array(entry.printed["step"])
    ours = {
        "step": steps,
        "weight_before": run.weights[steps],
        "predictions": run.weights[steps] * x,
        "loss_3dp": run.losses[steps],
        "w_after_3dp": run.weights[steps + 1],
        "weight_before_step7": run.weights[7, 0],
    }
    if entry.kind == "printed":
        return ours
    trained = descend(entry, "formula", double=True, lr=len(x) * lr)
    return {
        **ours,
        "final_rounded_pred": (run.weights[-2] * x).round(3),  # it predicts, then updates
        # The loss is the square of 1 − w/3, which has cancelled to 1e-4 of w.
        **_laws(entry, run, len(x) * lr, rel=1e-11),
        "sum at λ, mean at Nλ apart": _apart(run, trained),
        "w_end": run.weights[-1, 0],
        "rows": len(x),
        "lr": lr,
        "equivalent_lr": len(x) * lr,
    }


@experiment("torch_autograd_11", "torch_autograd_25")
def by_step(entry: Entry, way: str) -> dict[str, Any]:
    """Line y = 3x by the mean gradient; the weight printed is that after the step."""
    run, names = descend(entry, way), entry.printed
    steps = np.array(names["step"])
    return {
        "step": steps,
        "grad_4dp": run.gradients[steps],
        "w_after_4dp": run.weights[steps + 1, 0],
        "loss_printed": [run.losses[int(step)] for step in names["loss_printed"]],
        **{n: run.predictions[int(n[5:])] for n in names if n.startswith("pred_")},
    }


@experiment("torch_autograd_rest")
def by_step_rest(entry: Entry, way: str) -> dict[str, Any]:
    """The steps that the notebook's text has lost, and the law of all."""
    run, lr = descend(entry, way), entry.settings["lr"]
    return {
        "w_after_11": run.weights[11, 0],
        "loss_step10": run.losses[10],
        "w_after_25": run.weights[25],
        "loss_step24": run.losses[24],
        **_laws(entry, run, lr, rel=2e-5),
    }
