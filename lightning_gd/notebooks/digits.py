"""Notebook 002: odd or even, on the first 2,000 and 5,000 digits of MNIST."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lightning_gd.curvature import Curvature
from lightning_gd.data.mnist import SCALINGS, MNISTParityData
from lightning_gd.models.linear import Start
from lightning_gd.models.parity import ParityRegressor
from lightning_gd.moments import Moments, Optimum
from lightning_gd.notebooks.golden import Entry, experiment
from lightning_gd.notebooks.training import ROADS, Run, fit, on_road
from lightning_gd.notebooks.verdicts import Band, Close

# What the curves of the notebook, which it only plots, end at: five random starts, float32. The
# notebook does not say how it normalised the pixels, so each of the usual ways has its bands.
BANDS = {
    "by_hand_gd_loss_curve": {
        "unit": {"train mse": "293–326", "test accuracy": "0.512"},
        "symmetric": {"train mse": "176–212", "test accuracy": "0.418–0.445"},
        "standard": {"train mse": "852–978", "test accuracy": "0.430–0.447"},
    },
    "autograd_gd_loss_curve": {
        "unit": {
            "train mse": "4.33–5.25",
            "test mse": "5.12–5.99",
            "test accuracy": "0.559–0.613",
            "train mse from zeros": "0.4439",
            "test mse from zeros": "0.5472",
            "test accuracy from zeros": "0.8126",
        },
        "symmetric": {
            "train mse": "2.43–2.59",
            "test mse": "2.70–3.33",
            "test accuracy": "0.635–0.655",
            "train mse from zeros": "0.3851",
            "test mse from zeros": "0.4999",
            "test accuracy from zeros": "0.8354",
        },
        "standard": {
            "train mse": "3.49–3.75",
            "test mse": "4.24–5.13",
            "test accuracy": "0.621–0.638",
            "train mse from zeros": "0.3582",
            "test mse from zeros": "0.4934",
            "test accuracy from zeros": "0.8452",
        },
    },
}
LARGEST_STABLE = {"unit": "0.025251", "symmetric": "0.001921", "standard": "0.003887"}
DEFAULT_LR = 0.01  # of the notebook's function


class Digits:
    """The digits of one source, read once for all scalings.

    Args:
        scalings: Of the pixels, by name.
        **source: Arguments of `MNISTParityData`.
    """

    def __init__(self, scalings: Sequence[str] = tuple(SCALINGS), **source: Any) -> None:
        self.scalings, self.source = scalings, source

    @cached_property
    def data(self) -> dict[str, MNISTParityData]:
        """One DataModule a scaling, set up."""
        source = {**self.source, "test_every": 0}
        found = {s: MNISTParityData(**{**source, "scaling": s}) for s in self.scalings}
        for data in found.values():
            data.prepare_data()
            data.setup("fit")
        return found

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Those of the training rows: one pass over the bytes serves all scalings."""
        table = next(iter(self.data.values())).tables["train"]
        raw = Moments.of(table.raw, table.y)
        return {scaling: raw.affine(*SCALINGS[scaling]) for scaling in self.scalings}

    @cached_property
    def optimum(self) -> dict[str, Optimum]:
        """The exact least-squares solutions, by scaling."""
        return {scaling: moments.optimum() for scaling, moments in self.moments.items()}

    @cached_property
    def curvature(self) -> dict[str, Curvature]:
        """Of the loss, with bias, by scaling."""
        return {scaling: Curvature(m.hessian()) for scaling, m in self.moments.items()}


@experiment("shapes", roads=("MNISTParityData",), needs_digits=True)
def shapes(entry: Entry, road: str, digits: Digits) -> dict[str, Any]:
    """As many digits as the notebook takes, and the first of them a 5."""
    train, test = (digits.data["unit"].tables[part] for part in ("train", "test"))
    return {
        "x_train": list(train.raw.unflatten(1, (28, 28)).shape),
        "y_train": list(train.y.shape),
        "y_train0": train.y[0].item(),
        "x_train_flat": list(train.raw.shape),
        "x_test_flat_rows": len(test),
    }


@experiment("by_hand_gd_loss_curve", roads=(", ".join(ROADS),), needs_digits=True)
def part_2(entry: Entry, road: str, digits: Digits) -> dict[str, Any]:
    """The short run, and which learning rates are stable."""
    return _each(entry, digits, lambda scaling: _rates(entry, digits, scaling))


@experiment("autograd_gd_loss_curve", roads=(", ".join(ROADS),), needs_digits=True)
def part_4(entry: Entry, road: str, digits: Digits) -> dict[str, Any]:
    """The long run, and the same from zeros."""
    return _each(entry, digits, lambda scaling: _zeros(entry, digits, scaling))


def _each(entry: Entry, digits: Digits, more: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The curve from the uniform start and more, for each scaling, within the bands."""
    found: dict[str, Any] = {}
    for scaling in digits.scalings:
        ours = {**_uniform(entry, digits, scaling), **more(scaling)}
        for name, band in BANDS[entry.experiment][scaling].items():
            ours[name] = Band(ours[name], band)
        found |= {f"{scaling}: {name}": value for name, value in ours.items()}
    return found


def _uniform(entry: Entry, digits: Digits, scaling: str) -> dict[str, Any]:
    run = descend(entry, ROADS[0], digits, scaling, test=True)
    others = [descend(entry, road, digits, scaling).losses for road in ROADS[1:]]
    apart = max(float((np.abs(run.losses - losses) / losses).max()) for losses in others)
    return {
        **_values(run, digits, scaling),
        "train mse falls": Close(bool((np.diff(run.losses) < 0).all()), "at every update"),
        # Float32 sums of 2,000 rows, in another order on each road.
        "roads apart": Close(apart, 0.0, abs=1e-4),
        "majority": run.metrics["test/majority_accuracy"],
        "first": run.losses[0],
    }


def _zeros(entry: Entry, digits: Digits, scaling: str) -> dict[str, Any]:
    run = descend(entry, ROADS[0], digits, scaling, start="zeros", test=True)
    values = {f"{name} from zeros": v for name, v in _values(run, digits, scaling).items()}
    return {**values, "optimum": digits.optimum[scaling].loss.item()}


def _rates(entry: Entry, digits: Digits, scaling: str) -> dict[str, Any]:
    limit = digits.curvature[scaling].max_lr()
    run = descend(entry, ROADS[0], digits, scaling, steps=5, lr=DEFAULT_LR)
    rises = bool((np.diff(run.losses) > 0).all())
    return {
        "largest stable λ": Close(limit, LARGEST_STABLE[scaling], abs=1e-6),
        f"λ = {DEFAULT_LR:g}": Close(rises == (limit < DEFAULT_LR), "rises where it is above that"),
    }


def descend(
    entry: Entry,
    road: str,
    digits: Digits,
    scaling: str,
    *,
    steps: int | None = None,
    start: Start = "uniform",
    lr: float | None = None,
    test: bool = False,
) -> Run:
    """Train on digits; the start has the notebook's distribution, not its random numbers."""
    steps, lr, data = steps or entry.steps, lr or entry.settings["lr"], digits.data[scaling]
    data.passes_per_epoch = steps
    return fit(lambda: (on_road(ParityRegressor, road, start=start, lr=lr), data), steps, test=test)


def _values(run: Run, digits: Digits, scaling: str) -> dict[str, float]:
    """After the last update."""
    weight, bias = run.model.weight.detach().double(), run.model.bias.detach().double()
    loss = digits.moments[scaling].loss(weight, bias).item()
    return {
        "train mse": loss,
        "above optimum": loss - digits.optimum[scaling].loss.item(),
        "test mse": run.metrics["test/loss"],
        "test accuracy": run.metrics["test/accuracy"],
    }
