"""Four implementations of gradient descent, from one start on one table, update by update."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_gd import LinearRegression
from lightning_gd.callbacks.test_curve import TestCurve
from lightning_gd.cli import UsageError, resolve
from lightning_gd.curvature import Curvature
from lightning_gd.curves import KEPT
from lightning_gd.data.tables import Table
from lightning_gd.data.tensors import TensorDataModule
from lightning_gd.moments import Moments
from quiet import quiet_trainer
from reference import gradient_descent

PARTS = ("train", "test")
SUM, SUM_SCALED = "NumPy, sum", "NumPy, sum, lr/N"
NUMPY, EXPLICIT, AUTOGRAD, TORCH = "NumPy", "explicit", "autograd", "nn.Linear + SGD"


@dataclass(frozen=True)
class Problem:
    """Where every implementation starts, and on what.

    Attributes:
        tables: For `train` and `test` inputs x, shape [N, D], and targets y, shape [N].
        weight: Start of w, shape [D].
        bias: Start of b, or None for a model without bias.
        lr: Learning rate.
        momentum: Momentum of every implementation.
    """

    tables: dict[str, tuple[Tensor, Tensor]]
    weight: Tensor
    bias: Tensor | None
    lr: float
    momentum: float = 0.0

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """The moments of both tables."""
        return {part: Moments.of(*table) for part, table in self.tables.items()}

    @cached_property
    def curvature(self) -> Curvature:
        """The curvature of the training loss."""
        return Curvature(self.moments["train"].hessian(self.bias is not None))


@dataclass(frozen=True)
class Descent:
    """What one implementation did.

    Attributes:
        losses: For `train` and `test` the mean losses before each update, shape [steps].
        path: (w, b) before each update and after the last, shape [steps + 1, D + 1]; b is 0 for a
            model without bias.
    """

    losses: dict[str, np.ndarray]
    path: np.ndarray

    @property
    def theta(self) -> np.ndarray:
        """(w, b) after the last update."""
        return self.path[-1]


def load_problem(
    experiment: str, lr: float | None = None, dtype: torch.dtype = torch.float64
) -> Problem:
    """Return the start and the data of an experiment, of which the full batch is used.

    Args:
        experiment: Name of a packaged experiment, or path of a YAML file.
        lr: Learning rate in place of the experiment's.
        dtype: Of data and weights.

    Raises:
        UsageError: If there is no such experiment, or its model is not linear regression by SGD.
    """
    words = resolve(["--config", experiment])
    path = Path(words[words.index("--config") + 1])
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    model_class, settings = _class_of(config["model"])
    if getattr(model_class, "loss", None) is not LinearRegression.loss:
        raise UsageError(
            f"--config {experiment} trains {model_class.__name__}: the comparison is for the "
            "squared loss of LinearRegression and ParityRegressor"
        )
    data_class, data_settings = _class_of(config["data"])
    data = data_class(**data_settings)
    data.prepare_data()
    data.setup("fit")
    tables = {part: (t.x.to(dtype), t.y.to(dtype)) for part, t in data.tables.items()}
    if data.tables.get("test") in (data.tables["train"], None):
        tables["test"] = tables["train"]
    settings |= {"num_features": tables["train"][0].shape[1]} | ({} if lr is None else {"lr": lr})
    return _problem(experiment, model_class(**settings), tables, dtype)


def _class_of(section: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a class that an experiment names, and its arguments."""
    module, _, name = section["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name), dict(section.get("init_args", {}))


def _problem(
    experiment: str, model: Any, tables: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Problem:
    """Refuse what the other implementations do not do, and read the start off the model."""
    h, plain = model.hparams, {"optimizer": "SGD", "optimizer_args": None, "scheduler": None}
    plain |= {"gradient_clip_val": None, "accumulate_grad_batches": 1}
    for name, value in plain.items():
        if h[name] != value:
            raise UsageError(
                f"--config {experiment} sets {name}={h[name]!r}: the comparison is "
                f"for {name}={value!r}"
            )
    weight, bias = (p.detach().to(dtype) for p in (model.weight, model.bias))
    trained = bias if model.bias.requires_grad else None
    problem = Problem(tables, weight, trained, 0.0, h["momentum"])
    return replace(problem, lr=problem.curvature.auto_lr if h["lr"] == "auto" else h["lr"])


def by_numpy(
    problem: Problem,
    steps: int,
    reduction: Literal["mean", "sum"] = "mean",
    lr: float | None = None,
) -> Descent:
    """Run the notebooks' loop."""
    (x, y), (x_test, y_test) = ((t.numpy() for t in problem.tables[part]) for part in PARTS)
    with np.errstate(over="ignore", invalid="ignore"):  # a rate that diverges is worth seeing
        run = gradient_descent(
            x,
            y,
            lr=problem.lr if lr is None else lr,
            steps=steps,
            weight=problem.weight.numpy(),
            bias=None if problem.bias is None else float(problem.bias),
            momentum=problem.momentum,
            reduction=reduction,
        )
        residuals = x_test @ run.weights[:-1].T + run.biases[:-1] - y_test[:, None]
        losses = {"train": run.losses, "test": (residuals**2).mean(0)}
    return Descent(losses, np.column_stack([run.weights, run.biases]))


def by_trainer(problem: Problem, steps: int, gradient: Literal["explicit", "autograd"]) -> Descent:
    """Run `Trainer.fit` on `LinearRegression`."""
    model = LinearRegression(
        len(problem.weight),
        bias=problem.bias is not None,
        gradient=gradient,
        lr=problem.lr,
        momentum=problem.momentum,
    ).to(problem.weight.dtype)
    _start(problem, model.weight, model.bias)
    double = problem.weight.dtype == torch.float64
    keep = _KeepWeights()
    trainer = quiet_trainer(steps, double, TestCurve(every_n_updates=1), keep)
    trainer.fit(model, datamodule=_GivenTables(problem.tables, passes_per_epoch=steps))
    path, history = np.array(keep.path), model.curves.history
    losses = {part: np.array(history[f"{part}/loss"][1], path.dtype) for part in PARTS}
    return Descent(losses, path)


class _KeepWeights(Callback):
    """Keeps the weights before each update and after the last, [D + 1] each."""

    def __init__(self) -> None:
        self.path: list[np.ndarray] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.path.append(_theta(pl_module.weight, pl_module.bias))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.path.append(_theta(pl_module.weight, pl_module.bias))


def _theta(weight: Tensor, bias: Tensor | None) -> np.ndarray:
    """Return a copy of (w, b), shape [D + 1]."""
    numbers = weight.detach().flatten().numpy()
    return np.append(numbers, numbers.dtype.type(0) if bias is None else bias.detach().numpy())


class _GivenTables(TensorDataModule):
    def __init__(self, given: dict[str, tuple[Tensor, Tensor]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given = given

    def load(self) -> dict[str, Table]:
        return {part: Table(*table) for part, table in self.given.items()}


def by_torch(problem: Problem, steps: int) -> Descent:
    """Run `nn.Linear`, `mse_loss`, `backward()` and `torch.optim.SGD` in a plain loop."""
    model = nn.Linear(len(problem.weight), 1, problem.bias is not None, dtype=problem.weight.dtype)
    _start(problem, model.weight, model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr, momentum=problem.momentum)

    def loss(part: str) -> Tensor:
        x, y = problem.tables[part]
        return nn.functional.mse_loss(model(x).squeeze(1), y)

    losses: dict[str, list[float]] = {part: [] for part in PARTS}
    path = [_theta(model.weight, model.bias)]
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.no_grad():
            losses["test"].append(loss("test").item())
        train = loss("train")
        losses["train"].append(train.item())
        train.backward()
        optimizer.step()
        path.append(_theta(model.weight, model.bias))
    arrays = {part: np.array(values, path[0].dtype) for part, values in losses.items()}
    return Descent(arrays, np.array(path))


@torch.no_grad()
def _start(problem: Problem, weight: Tensor, bias: Tensor) -> None:
    weight.copy_(problem.weight.view_as(weight))
    if problem.bias is not None:
        bias.copy_(problem.bias.view_as(bias))


def all_four(problem: Problem, steps: int, reduction: Literal["mean", "sum"]) -> dict[str, Descent]:
    """Run the four; with `sum` NumPy takes λ/N, and one more run shows what λ itself does."""
    if steps > KEPT:
        raise UsageError(f"--steps {steps} must be at most {KEPT}: a run keeps so many points")
    if reduction == "mean":
        runs = {NUMPY: by_numpy(problem, steps)}
    else:
        scaled = problem.lr / len(problem.tables["train"][1])
        runs = {
            SUM: by_numpy(problem, steps, "sum"),
            SUM_SCALED: by_numpy(problem, steps, "sum", scaled),
        }
    return {
        **runs,
        EXPLICIT: by_trainer(problem, steps, "explicit"),
        AUTOGRAD: by_trainer(problem, steps, "autograd"),
        TORCH: by_torch(problem, steps),
    }


def ulps(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference, in units in the last place of the largest magnitude.

    max |aᵢ − bᵢ| / spacing(max(|a|, |b|)), the spacing being that of the arrays' dtype: 1 means
    that two numbers as large as the largest would be neighbours. One scale serves the whole
    array, because rounding errors of a sum are proportional to its largest terms: a small entry
    need not agree in digits that it never had. NaN where a number is not finite.
    """
    scale = np.spacing(np.maximum(np.abs(a), np.abs(b)).max())
    return float(np.abs(a - b).max() / scale)


def differences(runs: Mapping[str, Descent]) -> dict[tuple[str, str], list[float]]:
    """Return for each pair the ulps between train losses, test losses and last weights.

    The sum at an unchanged learning rate is left out: it is another run.
    """
    found, same = {}, {name: run for name, run in runs.items() if name != SUM}
    with np.errstate(invalid="ignore"):
        for (a, first), (b, second) in combinations(same.items(), 2):
            losses = [ulps(first.losses[part], second.losses[part]) for part in PARTS]
            found[a, b] = [*losses, ulps(first.theta, second.theta)]
    return found


def predicted_losses(problem: Problem, steps: int) -> dict[str, np.ndarray]:
    """Return the exact curves before each of `steps` updates, from the Hessian's eigenvalues."""
    curvature, bias = problem.curvature, problem.bias
    optimum = problem.moments["train"].optimum(bias is not None)
    start = problem.weight if bias is None else torch.cat([problem.weight, bias[None]])
    errors = curvature.errors(start, optimum.theta, problem.lr, problem.momentum, steps - 1)
    train = optimum.loss + errors.square() @ curvature.eigenvalues / 2
    # On the training rows the second formula would cancel digits where the loss nears 0.
    same = problem.tables["test"] is problem.tables["train"]
    path, size = optimum.theta + errors @ curvature.eigenvectors.T, len(problem.weight)
    test = problem.moments["test"].loss(path[:, :size], path[:, size:].sum(1))
    return {"train": train.numpy(), "test": (train if same else test).numpy()}


def sum_lesson(problem: Problem, runs: Mapping[str, Descent]) -> list[str]:
    """Explain why gradients by hand seemed faster, with the numbers of this comparison."""
    (x, y), w, lr = problem.tables["train"], problem.weight, problem.lr
    r, rows = x @ w + (0 if problem.bias is None else problem.bias) - y, len(y)
    total = (2 * r @ x).norm().item()
    bias = 0.0 if problem.bias is None else problem.bias
    mean = problem.moments["train"].loss_and_gradients(w.double(), bias)[1].norm().item()
    stable = problem.curvature.max_lr(problem.momentum)
    summed, scaled, explicit = (runs[n].losses["train"] for n in (SUM, SUM_SCALED, EXPLICIT))
    k = min(10, len(explicit) - 1)
    return [
        f"The gradient summed over N = {rows:,} rows is N times the gradient of the mean loss: "
        f"at the start its length is {total:.6g} instead of {mean:.6g}, {total / mean:.6g} times.",
        f"With the same λ = {lr:g} it is a run with N·λ = {lr * rows:g}: after {k} updates the "
        f"loss is {summed[k]:.4g} instead of {explicit[k]:.4g}. The largest stable λ of the mean "
        f"is {stable:.4g}, that of the sum {stable / rows:.4g}.",
        f"With λ/N = {lr / rows:g} the sum gives the curve of the mean (losses differ by "
        f"{ulps(scaled, explicit):.3g} ulps at most).",
        '"By hand is faster" compared two learning rates, not two ways to a gradient.',
    ]


def write_tensorboard(losses: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> None:
    """Write one run per implementation with `train/loss` and `test/loss`, in one chart for all."""
    from torch.utils.tensorboard import SummaryWriter

    tags = [f"{part}/loss" for part in PARTS]
    for name, curves in losses.items():
        folder = out / re.sub(r"\W+", "-", name).lower()
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()  # or the curves of an earlier comparison would be drawn with these
        with SummaryWriter(str(folder)) as writer:
            writer.add_custom_scalars({"loss": {" and ".join(tags): ["Multiline", tags]}})
            for part, values in curves.items():
                for step, value in enumerate(values.tolist()):
                    writer.add_scalar(f"{part}/loss", value, step)
