"""Training of the shipped models by `Trainer.fit`, with every update recorded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger

from lightning_gd.curvature import Curvature
from lightning_gd.data.points import PointsData
from lightning_gd.data.tensors import TensorDataModule
from lightning_gd.models.linear import LinearRegression
from lightning_gd.moments import Moments, Optimum
from lightning_gd.notebooks.golden import Entry

# `gradients` as it is written; `loss_and_gradients`, which the model prefers; `backward()`.
ROADS = ("formula", "one pass", "autograd")


class Run(NamedTuple):
    """What a training did, in float64, which holds float32 exactly; empty where not traced.

    Attributes:
        losses: Before each update, shape [steps].
        weights: Before each update and after the last, shape [steps + 1, D].
        predictions: Likewise, shape [steps + 1, N].
        gradients: Of the weights, shape [steps, D].
        metrics: Those of the test after the last update, by tag.
        model: With the weights after the last update.
    """

    losses: np.ndarray
    weights: np.ndarray
    predictions: np.ndarray
    gradients: np.ndarray
    metrics: dict[str, float]
    model: LinearRegression

    def predict(self, x: float) -> float:
        """ŷ for one input of one feature."""
        return self.model(torch.tensor([[x]]).to(self.model.weight)).item()


class Points(Logger):
    """Keeps the points of the curves, as the model hands them over."""

    name = property(lambda self: "notebooks")
    version = property(lambda self: 0)

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, dict[str, float]]] = []

    def log_points(self, points: list[tuple[int, dict[str, float]]]) -> None:
        """Keep `(step, {tag: value})`."""
        self.points += points

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Drop the metrics of the closing test, which `Trainer.test` returns."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Drop the settings: the entry holds them."""

    def curve(self, tag: str) -> np.ndarray:
        """The values of one curve by step."""
        return np.array([values[tag] for _, values in self.points if tag in values])


class Trace(Callback):
    """Keeps weights, predictions and gradients; its hooks make each update a step of its own."""

    def __init__(self) -> None:
        self.weights: list[list[float]] = []
        self.predictions: list[list[float]] = []
        self.gradients: list[list[float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, _: int) -> None:
        """Before the update."""
        self._x = batch.x
        self._look(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """The gradient that made the update."""
        self.gradients.append(pl_module.weight.grad.tolist())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last update."""
        self._look(pl_module)

    @torch.no_grad()
    def _look(self, model: Any) -> None:
        self.weights.append(model.weight.tolist())
        self.predictions.append(model(self._x).tolist())


def fit(
    make: Callable[[], tuple[LinearRegression, TensorDataModule]],
    steps: int,
    *,
    double: bool = False,
    trace: Trace | None = None,
    test: bool = False,
) -> Run:
    """Train for so many updates on the CPU.

    Args:
        make: Returns model and data; called where the precision of the run is the default.
        steps: Updates.
        double: Train in float64 instead of float32.
        trace: Records each update.
        test: Whether to test afterwards.
    """
    points = Points()
    with _quiet():
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            precision="64-true" if double else "32-true",
            logger=points,
            log_every_n_steps=1,
            limit_val_batches=0,
            callbacks=[] if trace is None else [trace],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with trainer.init_module():
            model, data = make()
        trainer.fit(model, datamodule=data)
        metrics = trainer.test(model, datamodule=data, verbose=False) if test else [{}]
    kept = trace or Trace()
    return Run(
        points.curve("train/loss"),
        np.array(kept.weights),
        np.array(kept.predictions),
        np.array(kept.gradients),
        dict(metrics[0]),
        model,
    )


def descend(
    entry: Entry,
    road: str,
    *,
    steps: int | None = None,
    double: bool = False,
    trace: bool = True,
    **settings: Any,
) -> Run:
    """Train `LinearRegression` on the points of an entry, from its start and at its rate.

    Args:
        entry: Of which the settings are taken.
        road: One of `ROADS`.
        steps: Updates, if not the entry's.
        double: Train in float64.
        trace: Record each update; without, only the losses, which is quicker.
        **settings: Of the model, instead of the entry's.
    """
    s, steps = entry.settings, entry.steps if steps is None else steps
    own: dict[str, Any] = {"bias": s.get("bias", False), "lr": s.get("lr", 0.01)}
    if "w0" in s:
        own["weight"] = [s["w0"]]

    def make() -> tuple[LinearRegression, TensorDataModule]:
        model = on_road(LinearRegression, road, **{**own, **settings})
        return model, PointsData(*table(entry), passes_per_epoch=steps, test_every=0)

    return fit(make, steps, double=double, trace=Trace() if trace else None)


def on_road(cls: type[LinearRegression], road: str, **settings: Any) -> LinearRegression:
    """A model of this class that trains on one of `ROADS`."""
    gradient: Any = "autograd" if road == "autograd" else "explicit"
    return (_as_written(cls) if road == "formula" else cls)(gradient=gradient, **settings)


def _as_written(cls: type[LinearRegression]) -> type[LinearRegression]:
    class AsWritten(cls):
        # A class that overrides `gradients` does not inherit shortcuts such as one pass.
        def gradients(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return super().gradients(x, y)

    return AsWritten


def table(entry: Entry) -> tuple[list[float], list[float]]:
    """The inputs and targets of an entry, one feature; y = 2x where it names none."""
    s, line = entry.settings, {"x": [1, 2, 3, 4], "y": [2, 4, 6, 8]}
    x, y = (np.ravel(s.get(k.upper(), s.get(k, line[k]))).astype(float) for k in line)
    return x.tolist(), y.tolist()


class Landscape(NamedTuple):
    """The loss on the points of an entry: its Hessian, what that says, and the optimum."""

    hessian: torch.Tensor
    curvature: Curvature
    optimum: Optimum


def landscape(entry: Entry, bias: bool = False) -> Landscape:
    """From one pass over the points, for a model with or without bias."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in table(entry))
    moments = Moments.of(x[:, None], y)
    hessian = moments.hessian(bias=bias)
    return Landscape(hessian, Curvature(hessian), moments.optimum(bias=bias))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's banner; its other warnings stay."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Raised inside Lightning by a newer torch; nothing that a user could change.
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
            warnings.filterwarnings("ignore", message=".*available but not used")
            yield
    finally:
        log.setLevel(level)
