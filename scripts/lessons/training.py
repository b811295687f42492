"""Training of the shipped models by `Trainer.fit`, with every update recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lessons.entries import Entry
from lightning_gd import LinearRegression, PointsData
from lightning_gd.data.tensors import TensorDataModule, tensor_data
from lightning_gd.moments import Moments
from quiet import quiet_trainer


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
        """Return ŷ for one input of one feature."""
        return self.model(torch.tensor([[x]]).to(self.model.weight)).item()


class Trace(Callback):
    """Keeps weights, predictions and gradients of every update."""

    def __init__(self) -> None:
        self.weights: list[list[float]] = []
        self.predictions: list[list[float]] = []
        self.gradients: list[list[float]] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Keep the state before the update, and the gradient that makes it."""
        self._keep(trainer, pl_module)
        self.gradients.append(pl_module.weight.grad.tolist())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state after the last update."""
        self._keep(trainer, pl_module)

    @torch.no_grad()
    def _keep(self, trainer: Trainer, model: Any) -> None:
        data = tensor_data(trainer)
        assert data is not None
        self.weights.append(model.weight.tolist())
        self.predictions.append(model(data.local("train")[0]).tolist())


def fit(
    make: Callable[[], tuple[LinearRegression, TensorDataModule]],
    steps: int,
    *,
    double: bool = False,
    trace: bool = False,
    test: bool = False,
) -> Run:
    """Train for so many updates on the CPU.

    Args:
        make: Returns model and data; called where the precision of the run is the default.
        steps: Updates.
        double: Train in float64 instead of float32.
        trace: Record weights, predictions and gradients of each update.
        test: Test afterwards.
    """
    kept = Trace()
    trainer = quiet_trainer(steps, double, *([kept] if trace else []))
    with trainer.init_module():
        model, data = make()
    trainer.fit(model, datamodule=data)
    losses = np.array(model.curves.history["train/loss"][1])  # testing may begin new curves
    metrics = trainer.test(model, datamodule=data, verbose=False) if test else [{}]
    weights, predictions = np.array(kept.weights), np.array(kept.predictions)
    gradients = np.array(kept.gradients)
    return Run(losses, weights, predictions, gradients, dict(metrics[0]), model)


def descend(
    entry: Entry,
    way: str,
    *,
    steps: int | None = None,
    double: bool = False,
    **settings: Any,
) -> Run:
    """Train `LinearRegression` on the points of an entry, from its start and at its rate.

    Args:
        entry: Of which the settings are taken.
        way: One of `WAYS`.
        steps: Updates, if not the entry's.
        double: Train in float64.
        **settings: Of the model, instead of the entry's.
    """
    s, steps = entry.settings, entry.steps if steps is None else steps
    own: dict[str, Any] = {"bias": s.get("bias", False), "lr": s.get("lr", 0.01)}
    if start := [s[name] for name in ("w0", "w") if name in s]:
        own["weight"] = start

    def make() -> tuple[LinearRegression, TensorDataModule]:
        model = trained_by(way, LinearRegression, **{**own, **settings})
        return model, PointsData(*points(entry), passes_per_epoch=steps)

    return fit(make, steps, double=double, trace=True)


def trained_by(way: str, cls: type[LinearRegression], **settings: Any) -> LinearRegression:
    """Return a model of this class that trains by one of `WAYS`."""

    class FormulaAlone(cls):
        gradients = cls.gradients  # a class that defines it inherits no shortcut such as one pass

    made = FormulaAlone if way == "formula" else cls
    return made(gradient="autograd" if way == "autograd" else "explicit", **settings)


def points(entry: Entry) -> tuple[list[float], list[float]]:
    """Return the inputs and targets of an entry, one feature; y = 2x where it names none."""
    s, line = entry.settings, {"x": [1, 2, 3, 4], "y": [2, 4, 6, 8]}
    x, y = (np.ravel(s.get(k.upper(), s.get(k, line[k]))).astype(float) for k in line)
    return x.tolist(), y.tolist()


def moments(entry: Entry) -> Moments:
    """Return the moments of the points of an entry."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in points(entry))
    return Moments.of(x[:, None], y)
