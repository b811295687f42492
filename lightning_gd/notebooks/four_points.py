"""Notebooks 001 and 003, and the regressions of 004: a line through four points."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_gd.notebooks.golden import Entry, experiment
from lightning_gd.notebooks.training import ROADS, Run, descend, landscape, table
from lightning_gd.notebooks.verdicts import Close, Law
from lightning_gd.reference import Descent, gradient_descent

# Weight and bias from which nn.Linear had started, solved for from the digits that were printed:
# 001 from f(5) and its last losses, after 1000 updates more than it says; 004 from f(5) and the
# first loss. They are known to four digits, and the slow part of the loss to 1 %.
STARTS = {
    "nn_linear_rerun_cell34": (0.9533, 0.3465, 1000),
    "nn_linear_1000": (0.50947, -0.57435, 0),
}


@experiment("numpy_sum_gradient", roads=("NumPy 1: dot in float64", "reference"))
def numpy_fused(entry: Entry, road: str) -> dict[str, Any]:
    """The sum gradient with a product that rounds once."""
    return _numpy(entry, road, np.float64)


@experiment("numpy_sum_gradient_stale_print", roads=("NumPy 1: dot in float32", "reference"))
def numpy_stale(entry: Entry, road: str) -> dict[str, Any]:
    """The same with a product rounded to float32, beside the weight of another cell."""
    ours = _numpy(entry, road, np.float32)
    another_cell = np.float32(1.5)
    return {**ours, "printed_w": np.full(entry.steps, another_cell), "true_w_3dp": ours["w_3dp"]}


def _numpy(entry: Entry, road: str, dot: type[np.floating]) -> dict[str, Any]:
    x, y = (np.array(values, np.float32) for values in table(entry))
    lr = entry.settings["lr"]
    if road == "reference":
        run = gradient_descent(x, y, lr=lr, steps=entry.steps, reduction="sum")
        weights, losses = run.weights[:, 0], run.losses
    else:
        weights, losses = _numpy_1(x, y, lr, entry.steps, dot)
    return {
        "before_f5": 5 * weights[0],
        "w_3dp": weights[1:],
        "loss_8dp": losses,
        "after_f5": 5 * weights[-1],
    }


def _numpy_1(
    x: np.ndarray, y: np.ndarray, lr: float, steps: int, dot: type[np.floating]
) -> tuple[np.ndarray, np.ndarray]:
    """NumPy before 2.0: `w -= lr * gradient` makes w float64, `w * x` is float32 all the same."""
    w, weights, losses = 0.0, [0.0], []
    for _ in range(steps):
        r = np.float32(w) * x - y
        products = (2 * x).astype(dot) * r.astype(dot)
        w -= lr * float(np.float32(products.sum()))
        losses.append(float((r**2).mean()))
        weights.append(w)
    return np.array(weights), np.array(losses)


@experiment("numpy_sum_gradient_closed_form", roads=ROADS)
def sum_closed_form(entry: Entry, road: str) -> dict[str, Any]:
    """The sum gradient at λ is the mean gradient at N λ: trained so, it is the same curve."""
    summed, rows, lr = _reference(entry), len(table(entry)[0]), entry.settings["lr"]
    run = descend(entry, road, double=True, lr=rows * lr)
    curvature = landscape(entry).curvature
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
        "gradients": [summed.gradients[0, 0], descend(entry, road, steps=1).gradients[0, 0]],
    }


def _apart(summed: Descent, trained: Run) -> Close:
    return Close(float(np.abs(summed.weights - trained.weights).max()), 0.0, abs=1e-13)


def _reference(entry: Entry) -> Descent:
    x, y = (np.array(values) for values in table(entry))
    lr, steps = entry.settings["lr"], entry.steps
    return gradient_descent(x, y, lr=lr, steps=steps, reduction="sum")


def _laws(entry: Entry, run: Run | Descent, lr: float, rel: float) -> dict[str, Any]:
    """After update k = 1, 2, …: w = w*(1 − qᵏ) and L = L₀ q²⁽ᵏ⁻¹⁾, where q = 1 − λ · curvature."""
    _, curvature, optimum = landscape(entry)
    q, target, first = curvature.top_factor(lr), optimum.weight.item(), run.losses[0]
    k = np.arange(1, len(run.losses) + 1)
    w, loss = target * (1 - q**k), first * (q * q) ** (k - 1)
    return {
        "w": Law(f"{target:g}*(1-{q:g}**k)", run.weights[1:, 0], w, rel),
        "loss": Law(f"{first:g}*{q * q:g}**(k-1)", run.losses, loss, rel),
    }


@experiment("mean_gradient_closed_form", roads=ROADS)
def mean_closed_form(entry: Entry, road: str) -> dict[str, Any]:
    """The mean gradient follows its law: float64 to 1e-9, float32 as far as it can."""
    exact, run = descend(entry, road, double=True), descend(entry, road, steps=30)
    lr, limits = entry.settings["lr"], entry.tolerance or {}
    single = _laws(entry, run, lr, rel=0)
    w_error = np.abs(single["w"].measured - single["w"].predicted)
    loss_error = np.abs(single["loss"].measured / single["loss"].predicted - 1)
    return {
        **_laws(entry, exact, lr, rel=1e-9),
        "error of w in float32": Close(w_error.max(), 0.0, abs=limits["w_abs"]),
        "of 10 losses": Close(loss_error[:10].max(), 0.0, abs=limits["loss_rel_first_10"]),
        "of 30 losses": Close(loss_error.max(), 0.0, abs=limits["loss_rel_1_to_30"]),
    }


@experiment("torch_autograd_100", "torch_autograd_10", "torch_optim_sgd_10", roads=ROADS)
def by_epoch(entry: Entry, road: str) -> dict[str, Any]:
    """Line y = 2x by the mean gradient, as torch trains it."""
    return _by_epoch(entry, descend(entry, road))


def _by_epoch(entry: Entry, run: Run, before: int = 0) -> dict[str, Any]:
    """The loss before and the weight after each of the epochs printed, counted from 1."""
    after = np.array((entry.outputs or {})["epochs"]) + before
    return {
        "epochs": after - before,
        "w_3dp": run.weights[after, 0],
        "loss_8dp": run.losses[after - 1],
        "after_f5": run.predict(5.0),
    }


@experiment("nn_linear_rerun_cell34", "nn_linear_1000", roads=("formula", "autograd"))
def with_bias(entry: Entry, road: str) -> dict[str, Any]:
    """Line y = 2x with a bias: from the start that was recovered, the digits come back."""
    weight, intercept, before = STARTS[entry.experiment]
    run = descend(entry, road, steps=before + entry.steps, weight=[weight], intercept=intercept)
    ours = _by_epoch(entry, run, before)
    losses = Close(ours["loss_8dp"], rel=0.01)
    return {**ours, "before_f5": 5 * weight + intercept, "loss_8dp": losses}


@experiment("nn_linear_rate", roads=ROADS)
def rate(entry: Entry, road: str) -> dict[str, Any]:
    """From any start: once the fast part is gone, the loss falls at the rate of the slow one."""
    hessian, curvature, _ = landscape(entry, bias=True)
    lr, every = entry.settings["lr"], entry.steps
    any_start: dict[str, Any] = {"bias": True, "start": "linear"}
    slow = descend(entry, road, steps=400, double=True, trace=False, **any_start).losses[200:]
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


@experiment("nn_linear_1000_rate", roads=("formula", "one pass"))
def two_rates(entry: Entry, road: str) -> dict[str, Any]:
    """The fast part of the loss at first, the slow one at last."""
    weight, intercept, _ = STARTS["nn_linear_1000"]
    start = {"bias": True, "weight": [weight], "intercept": intercept}
    losses = descend(entry, road, steps=1001, double=True, trace=False, **start).losses
    ratios = losses[entry.steps :: entry.steps] / losses[: -entry.steps : entry.steps]
    return {"slow_loss_ratio_per_100": ratios[-1], "fast_loss_ratio_per_100": ratios[0]}


@experiment("numpy_sum_gradient_11", roads=("reference",))
def numpy_integers(entry: Entry, road: str) -> dict[str, Any]:
    """Line y = 3x by the sum gradient, before and after each update."""
    return _by_step(entry, _reference(entry))


def _by_step(entry: Entry, run: Descent) -> dict[str, Any]:
    steps = np.array((entry.outputs or {})["step"])
    return {
        "step": steps,
        "weight_before": run.weights[steps],
        "predictions": run.weights[steps] * table(entry)[0],
        "loss_3dp": run.losses[steps],
        "w_after_3dp": run.weights[steps + 1],
        "weight_before_step7": run.weights[7, 0],
    }


@experiment("numpy_sum_gradient_11_rest", roads=("reference",))
def numpy_integers_rest(entry: Entry, road: str) -> dict[str, Any]:
    """The steps that the notebook's text has lost, and the law of all."""
    run, (x, _), lr = _reference(entry), table(entry), entry.settings["lr"]
    trained = descend(entry, "formula", double=True, lr=len(x) * lr)
    return {
        **_by_step(entry, run),
        "final_rounded_pred": (run.weights[-2] * x).round(3),  # it predicts, then updates
        # The loss is the square of 1 − w/3, which has cancelled to 1e-4 of w.
        **_laws(entry, run, len(x) * lr, rel=1e-11),
        "sum at λ, mean at Nλ apart": _apart(run, trained),
        "w_end": run.weights[-1, 0],
        "rows": len(x),
        "lr": lr,
        "equivalent_lr": len(x) * lr,
    }


@experiment("torch_autograd_11", "torch_autograd_25", roads=ROADS)
def by_step(entry: Entry, road: str) -> dict[str, Any]:
    """Line y = 3x by the mean gradient; the weight printed is that after the step."""
    run, names = descend(entry, road), entry.outputs or {}
    steps = np.array(names["step"])
    return {
        "step": steps,
        "grad_4dp": run.gradients[steps],
        "w_after_4dp": run.weights[steps + 1, 0],
        "loss_printed": [run.losses[int(step)] for step in names["loss_printed"]],
        **{n: run.predictions[int(n[5:])] for n in names if n.startswith("pred_")},
    }


@experiment("torch_autograd_rest", roads=ROADS)
def by_step_rest(entry: Entry, road: str) -> dict[str, Any]:
    """The steps that the notebook's text has lost, and the law of all."""
    run, lr = descend(entry, road), entry.settings["lr"]
    return {
        "w_after_11": run.weights[11, 0],
        "loss_step10": run.losses[10],
        "w_after_25": run.weights[25],
        "loss_step24": run.losses[24],
        **_laws(entry, run, lr, rel=2e-5),
    }
