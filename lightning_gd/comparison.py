"""Four roads to the same gradient, from one start on one table, compared update by update."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_gd.callbacks.pictures import CurveMemory, shared_chart
from lightning_gd.cli import EXPERIMENTS, UsageError, experiments
from lightning_gd.curvature import Curvature, losses_along
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.models.linear import LinearRegression
from lightning_gd.moments import Moments
from lightning_gd.reference import gradient_descent

PARTS = ("train", "test")
SUM, SUM_SCALED = "NumPy, sum", "NumPy, sum, lr/N"
NUMPY, EXPLICIT, AUTOGRAD, TORCH = "NumPy", "explicit", "autograd", "nn.Linear + SGD"


@dataclass(frozen=True)
class Problem:
    """Where every road starts, and on what.

    Attributes:
        tables: For `train` and `test` inputs x, shape [N, D], and targets y, shape [N].
        weight: Start of w, shape [D].
        bias: Start of b, or None for a model without bias.
        lr: Learning rate.
        momentum: Momentum of every road.
    """

    tables: dict[str, tuple[Tensor, Tensor]]
    weight: Tensor
    bias: Tensor | None
    lr: float
    momentum: float = 0.0

    @property
    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The tables for NumPy."""
        return {part: (x.numpy(), y.numpy()) for part, (x, y) in self.tables.items()}


@dataclass(frozen=True)
class Road:
    """What one road did.

    Attributes:
        losses: For `train` and `test` the mean losses before each update, shape [steps].
        weight: w after the last update, shape [D].
        bias: b after the last update; 0 without bias.
    """

    losses: dict[str, np.ndarray]
    weight: np.ndarray
    bias: float

    @property
    def theta(self) -> np.ndarray:
        """(w, b) after the last update, shape [D + 1]."""
        return np.append(self.weight, self.weight.dtype.type(self.bias))


def load_problem(
    experiment: str, lr: float | None = None, dtype: torch.dtype = torch.float64
) -> Problem:
    """The start and the data of an experiment; every road takes the full batch of it.

    Args:
        experiment: Name of a packaged experiment, or path of a YAML file.
        lr: Learning rate in place of the experiment's.
        dtype: Of data and weights.

    Raises:
        UsageError: If there is no such experiment, or its model is not linear regression by SGD.
    """
    path = EXPERIMENTS / f"{experiment}.yaml" if experiment in experiments() else Path(experiment)
    if not path.is_file():
        raise UsageError(f"--config {experiment}: no file, and none of {', '.join(experiments())}")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    rate = {} if lr is None else {"lr": lr}
    model, data = _build(config["model"], **rate), _build(config["data"])
    _check_comparable(experiment, model)
    data.prepare_data()
    data.setup("fit")
    tables = {part: (t.x.to(dtype), t.y.to(dtype)) for part, t in data.tables.items()}
    if data.tables.get("test") in (data.tables["train"], None):
        tables["test"] = tables["train"]
    bias = model.bias.detach().to(dtype) if model.bias.requires_grad else None
    h = model.hparams
    return Problem(tables, model.weight.detach().to(dtype), bias, h["lr"], h["momentum"])


def _build(section: dict[str, Any], **changes: Any) -> Any:
    module, _, name = section["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return cls(**{**section.get("init_args", {}), **changes})


def _check_comparable(experiment: str, model: Any) -> None:
    plain = {"optimizer": "SGD", "optimizer_args": None, "scheduler": None}
    plain |= {"gradient_clip_val": None, "accumulate_grad_batches": 1}
    if getattr(type(model), "loss", None) is not LinearRegression.loss:
        raise UsageError(
            f"--config {experiment} trains {type(model).__name__}: the four roads are written for "
            "the squared loss of LinearRegression and ParityRegressor"
        )
    for name, value in plain.items():
        if model.hparams[name] != value:
            raise UsageError(
                f"--config {experiment} sets {name}={model.hparams[name]!r}: the four roads are "
                f"written for {name}={value!r}"
            )


def numpy_road(
    problem: Problem,
    steps: int,
    reduction: Literal["mean", "sum"] = "mean",
    lr: float | None = None,
) -> Road:
    """The notebooks' loop."""
    tables = problem.arrays
    with np.errstate(over="ignore", invalid="ignore"):  # a rate that diverges is worth seeing
        run = gradient_descent(
            *tables["train"],
            lr=problem.lr if lr is None else lr,
            steps=steps,
            weight=problem.weight.numpy(),
            bias=None if problem.bias is None else float(problem.bias),
            momentum=problem.momentum,
            reduction=reduction,
        )
        x, y = tables["test"]
        residuals = x @ run.weights[:-1].T + run.biases[:-1] - y[:, None]
        losses = {"train": run.losses, "test": (residuals**2).mean(0)}
    return Road(losses, run.weights[-1], float(run.biases[-1]))


def trainer_road(problem: Problem, steps: int, gradient: Literal["explicit", "autograd"]) -> Road:
    """`Trainer.fit` on `LinearRegression`."""
    memory = CurveMemory()
    model = LinearRegression(
        len(problem.weight),
        bias=problem.bias is not None,
        gradient=gradient,
        lr=problem.lr,
        momentum=problem.momentum,
    ).to(problem.weight.dtype)
    model.weight.data.copy_(problem.weight)
    if problem.bias is not None:
        model.bias.data.copy_(problem.bias)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        precision="64-true" if problem.weight.dtype == torch.float64 else "32-true",
        logger=memory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=_GivenTables(problem.tables, passes_per_epoch=steps))
    losses = {
        part: np.array(memory[f"{part}/loss"][1], problem.weight.numpy().dtype) for part in PARTS
    }
    return Road(losses, model.weight.detach().numpy(), model.bias.item())


class _GivenTables(TensorDataModule):
    def __init__(self, given: dict[str, tuple[Tensor, Tensor]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given = given

    def load(self) -> dict[str, Table]:
        return {part: Table(*table) for part, table in self.given.items()}


def torch_road(problem: Problem, steps: int) -> Road:
    """`nn.Linear`, `mse_loss`, `backward()` and `torch.optim.SGD`, in a plain loop."""
    model = nn.Linear(len(problem.weight), 1, problem.bias is not None, dtype=problem.weight.dtype)
    model.weight.data.copy_(problem.weight[None])
    if problem.bias is not None:
        model.bias.data.copy_(problem.bias[None])
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr, momentum=problem.momentum)

    def loss(part: str) -> Tensor:
        x, y = problem.tables[part]
        return nn.functional.mse_loss(model(x).squeeze(1), y)

    losses: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.no_grad():
            losses["test"].append(loss("test").item())
        train = loss("train")
        losses["train"].append(train.item())
        train.backward()
        optimizer.step()
    weight = model.weight.detach()[0].numpy()
    arrays = {part: np.array(values, weight.dtype) for part, values in losses.items()}
    return Road(arrays, weight, 0.0 if problem.bias is None else model.bias.item())


def all_roads(problem: Problem, steps: int, reduction: Literal["mean", "sum"]) -> dict[str, Road]:
    """The four roads; with `sum` NumPy's takes λ/N, and one more shows what λ itself does."""
    rows = len(problem.tables["train"][1])
    if reduction == "mean":
        numpy = {NUMPY: numpy_road(problem, steps)}
    else:
        numpy = {
            SUM: numpy_road(problem, steps, "sum"),
            SUM_SCALED: numpy_road(problem, steps, "sum", problem.lr / rows),
        }
    return {
        **numpy,
        EXPLICIT: trainer_road(problem, steps, "explicit"),
        AUTOGRAD: trainer_road(problem, steps, "autograd"),
        TORCH: torch_road(problem, steps),
    }


def ulps(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, in units in the last place of the largest magnitude compared.

    max |aᵢ − bᵢ| / spacing(max(|a|, |b|)), the spacing being that of the arrays' dtype: 1 means
    that two numbers as large as the largest would be neighbours. One scale serves the whole
    array, because rounding errors of a sum have the size of its largest terms: a small entry is
    not asked to agree in digits that it never had. NaN where a number is not finite.
    """
    scale = np.spacing(np.maximum(np.abs(a), np.abs(b)).max())
    return float(np.abs(a - b).max() / scale)


def coinciding(roads: Mapping[str, Road]) -> dict[str, Road]:
    """The roads that ought to agree: all but the sum at an unchanged learning rate."""
    return {name: road for name, road in roads.items() if name != SUM}


def differences(roads: Mapping[str, Road]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """For each pair: ulps between train losses, test losses, and weights after the last update."""
    with np.errstate(invalid="ignore"):
        return {
            (a, b): (
                *(ulps(roads[a].losses[part], roads[b].losses[part]) for part in PARTS),
                ulps(roads[a].theta, roads[b].theta),
            )  # pyright: ignore[reportReturnType]
            for a, b in combinations(roads, 2)
        }


def predicted_losses(problem: Problem, steps: int) -> dict[str, np.ndarray]:
    """The exact curves before each of `steps` updates, from the eigenvalues of the Hessian."""
    train, with_bias = Moments.of(*problem.tables["train"]), problem.bias is not None
    optimum, curvature = train.optimum(with_bias), Curvature(train.hessian(with_bias))
    start = (
        problem.weight if problem.bias is None else torch.cat([problem.weight, problem.bias[None]])
    )
    rate = (problem.lr, problem.momentum, steps - 1)
    curves = {"train": curvature.predict(start, optimum.theta, optimum.loss, *rate)}
    if problem.tables["test"] is problem.tables["train"]:
        curves["test"] = curves["train"]  # which does not cancel digits where the loss nears 0
    else:
        path = curvature.trajectory(start, optimum.theta, *rate)
        curves["test"] = losses_along(Moments.of(*problem.tables["test"]), path)
    return {part: curve.numpy() for part, curve in curves.items()}


def sum_lesson(problem: Problem, roads: Mapping[str, Road]) -> list[str]:
    """Why gradients by hand seemed faster, in sentences with this comparison's numbers."""
    x, y = problem.arrays["train"]
    bias = None if problem.bias is None else float(problem.bias)
    start = {"weight": problem.weight.numpy(), "bias": bias, "lr": problem.lr, "steps": 1}
    total, mean = (
        float(np.linalg.norm(gradient_descent(x, y, **start, reduction=r).gradients))
        for r in ("sum", "mean")
    )
    curvature = Curvature(Moments.of(*problem.tables["train"]).hessian(problem.bias is not None))
    stable = curvature.max_lr(problem.momentum)
    steps = min(10, len(roads[SUM].losses["train"]) - 1)
    after = {name: roads[name].losses["train"][steps] for name in (SUM, EXPLICIT)}
    gap = ulps(roads[SUM_SCALED].losses["train"], roads[EXPLICIT].losses["train"])
    return [
        f"The gradient summed over N = {len(y):,} rows is N times the gradient of the mean loss: "
        f"at the start its length is {total:.6g} instead of {mean:.6g}, {total / mean:.6g} times.",
        f"With the same λ = {problem.lr:g} it is a run with N·λ = {problem.lr * len(y):g}: after "
        f"{steps} updates the loss is {after[SUM]:.4g} instead of {after[EXPLICIT]:.4g}. The "
        f"largest stable λ of the mean is {stable:.4g}, that of the sum {stable / len(y):.4g}.",
        f"With λ/N = {problem.lr / len(y):g} the sum gives the curve of the mean (losses differ by "
        f"{gap:.3g} ulps at most).",
        '"By hand is faster" compared two learning rates, not two ways to a gradient.',
    ]


def write_tensorboard(losses: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> None:
    """One run a road with the tags `train/loss` and `test/loss`, and one chart for all of them."""
    from torch.utils.tensorboard import SummaryWriter

    for road, curves in losses.items():
        folder = out / re.sub(r"\W+", "-", road).lower()
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()  # or the curves of an earlier comparison would be drawn with these
        with SummaryWriter(str(folder)) as writer:
            writer.add_custom_scalars(shared_chart("train/loss", "test/loss"))
            for part, values in curves.items():
                for step, value in enumerate(values.tolist()):
                    writer.add_scalar(f"{part}/loss", value, step)
