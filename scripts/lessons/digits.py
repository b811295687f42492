"""Notebook 002: odd or even, on the first 2,000 and 5,000 digits of MNIST."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lessons.entries import WAYS, Entry, experiment
from lessons.training import Run, fit, trained_by
from lessons.verdicts import Close
from lightning_gd import MNISTParityData, ParityRegressor
from lightning_gd.curvature import Curvature
from lightning_gd.data.mnist import RAW_FILES, SCALINGS
from lightning_gd.moments import Moments, Optimum

FETCH = "python scripts/reproduce.py 002 --data-root data --download"
DEFAULT_LR = 0.01  # of the notebook's function


class Digits(NamedTuple):
    """Digits at one scaling of the pixels, and what the moments of the training rows say."""

    data: MNISTParityData
    moments: Moments
    optimum: Optimum
    curvature: Curvature


def read_digits(scalings: Sequence[str] = tuple(SCALINGS), **source: Any) -> dict[str, Digits]:
    """Read the digits at these scalings; the further arguments are those of the DataModule."""
    found = {}
    for scaling in scalings:
        data = MNISTParityData(scaling=scaling, **source)  # pyright: ignore[reportArgumentType]
        data.prepare_data()
        data.setup("fit")
        moments = data.moments_of("train")
        found[scaling] = Digits(data, moments, moments.optimum(), Curvature(moments.hessian()))
    return found


def notebook_digits(root: str | Path, download: bool = False) -> dict[str, Digits]:
    """Read the digits of the notebook: the first 2,000 and 5,000 of the full MNIST.

    Raises:
        FileNotFoundError: If they are not there and not to be downloaded.
        ValueError: If a file is not that of MNIST.
    """
    raw = Path(root) / "MNIST" / "raw"
    if not download and not all((raw / name).is_file() for name in RAW_FILES):
        raise FileNotFoundError(f"{raw} does not hold the four files of MNIST; to fetch: {FETCH}")
    source = {"source": "torchvision", "root": str(root), "download": download}
    return read_digits(**source, num_train=2000, num_test=5000)


@experiment("shapes", ways=("MNISTParityData",), needs_digits=True)
def shapes(entry: Entry, way: str, digits: dict[str, Digits]) -> dict[str, Any]:
    """As many digits as the notebook takes, and the first of them a 5."""
    tables = next(iter(digits.values())).data.tables
    train, test = tables["train"], tables["test"]
    return {
        "x_train": list(train.raw.unflatten(1, (28, 28)).shape),
        "y_train": list(train.y.shape),
        "y_train0": train.y[0].item(),
        "x_train_flat": list(train.raw.shape),
        "x_test_flat_rows": len(test),
    }


@experiment("by_hand_gd_loss_curve", ways=(", ".join(WAYS),), needs_digits=True)
def part_2(entry: Entry, way: str, digits: dict[str, Digits]) -> dict[str, Any]:
    """The short run, and which learning rates are stable."""
    return _each_scaling(entry, digits, _rates)


@experiment("autograd_gd_loss_curve", ways=(", ".join(WAYS),), needs_digits=True)
def part_4(entry: Entry, way: str, digits: dict[str, Digits]) -> dict[str, Any]:
    """The long run, and the same from zeros."""
    return _each_scaling(entry, digits, _from_zeros)


def _each_scaling(
    entry: Entry,
    digits: dict[str, Digits],
    more: Callable[[Entry, Digits], dict[str, Any]],
) -> dict[str, Any]:
    """Return the curve from the uniform start and more, for each scaling."""
    found: dict[str, Any] = {}
    for scaling, mine in digits.items():
        ours = {**_from_uniform(entry, mine), **more(entry, mine)}
        found |= {f"{scaling}: {name}": value for name, value in ours.items()}
    return found


def _from_uniform(entry: Entry, digits: Digits) -> dict[str, Any]:
    run = _descend(entry, WAYS[0], digits, test=True)
    others = [_descend(entry, way, digits).losses for way in WAYS[1:]]
    apart = max(float((np.abs(run.losses - losses) / losses).max()) for losses in others)
    return {
        **_values(run, digits),
        "train mse falls": Close(bool((np.diff(run.losses) < 0).all()), "at every update"),
        # Float32 sums of 2,000 rows, in another order each way.
        "ways apart": Close(apart, 0.0, abs=1e-4),
        "majority": run.metrics["test/majority_accuracy"],
        "first": run.losses[0],
    }


def _from_zeros(entry: Entry, digits: Digits) -> dict[str, Any]:
    run = _descend(entry, WAYS[0], digits, start="zeros", test=True)
    values = {f"{name} from zeros": value for name, value in _values(run, digits).items()}
    return {**values, "optimum": digits.optimum.loss.item()}


def _rates(entry: Entry, digits: Digits) -> dict[str, Any]:
    limit = digits.curvature.max_lr()
    run = _descend(entry, WAYS[0], digits, steps=5, lr=DEFAULT_LR)
    rises = bool((np.diff(run.losses) > 0).all())
    return {
        "largest stable λ": limit,
        f"λ = {DEFAULT_LR:g}": Close(rises == (limit < DEFAULT_LR), "rises where it is above that"),
    }


def _descend(
    entry: Entry,
    way: str,
    digits: Digits,
    *,
    steps: int | None = None,
    test: bool = False,
    **settings: Any,
) -> Run:
    """Train on digits; the start has the notebook's distribution, not its random numbers."""
    steps, data = steps or entry.steps, digits.data
    settings = {"start": "uniform", "lr": entry.settings["lr"], **settings}
    data.passes_per_epoch = steps
    return fit(lambda: (trained_by(way, ParityRegressor, **settings), data), steps, test=test)


def _values(run: Run, digits: Digits) -> dict[str, float]:
    """Return the errors after the last update."""
    weight, bias = run.model.weight.detach().double(), run.model.bias.detach().double()
    loss = digits.moments.loss(weight, bias).item()
    return {
        "train mse": loss,
        "above optimum": loss - digits.optimum.loss.item(),
        "test mse": run.metrics["test/loss"],
        "test accuracy": run.metrics["test/accuracy"],
    }
