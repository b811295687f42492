"""What the notebooks print, and which function of ours computes each entry."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
NOTEBOOKS = {
    "000": "Beginning gradient descent",
    "001": "Gradient descent with autograd and backpropagation",
    "002": "Gradient descent by hand on MNIST: odd or even",
    "003": "What is gradient descent",
    "004": "PyTorch gradient calculation",
}
# `gradients` alone; `loss_and_gradients`, which the model prefers; `backward()`.
WAYS = ("formula", "one pass", "autograd")


@dataclass(frozen=True)
class Entry:
    """One experiment of a notebook, as `golden.json` holds it.

    Attributes:
        notebook: Number and hash of the notebook; `001+004` where two hold the same experiment.
        experiment: Its name, by which our function is found.
        kind: `printed`; `derived`, where the notebook's text stops short and the rest is computed;
            `invariant`, a law that holds for any start; or `random`.
        settings: What it starts from.
        dtype: The precision that reproduces it.
        reduction: Whether its gradient is the mean or the sum over the rows.
        steps: Updates.
        outputs: What it prints, by name; digits as strings where they were rounded.
        tolerance: How far ours may differ, with its `mode`; null compares printed digits.
        note: Which cells these are, and what is odd about them.
        bands: Of numbers that vary with the random start, and curves that the notebook only
            plots, by name: the ends between which five float32 runs of ours lay, rounded. The
            notebook does not say how it normalised the pixels: each of the usual ways has its own.
    """

    notebook: str
    experiment: str
    kind: str
    settings: dict[str, Any]
    dtype: str
    reduction: str
    steps: int
    outputs: dict[str, Any] | None
    tolerance: dict[str, Any] | None
    note: str
    bands: dict[str, str] = field(default_factory=dict)

    @property
    def notebooks(self) -> list[str]:
        """The three-digit numbers of the notebooks that hold it."""
        return [name[:3] for name in self.notebook.split("+")]

    @property
    def printed(self) -> dict[str, Any]:
        """The outputs; empty where the notebook prints none."""
        return self.outputs or {}


def entries(notebooks: Sequence[str] = ()) -> list[Entry]:
    """Return the entries of these notebooks, of all by default, ordered by notebook."""
    found = [Entry(**entry) for entry in json.loads((FOLDER / "golden.json").read_text("utf-8"))]
    chosen = [e for e in found if not notebooks or set(e.notebooks) & set(notebooks)]
    return sorted(chosen, key=lambda entry: entry.notebooks[0])


class Experiment(NamedTuple):
    """How we compute the numbers of an entry.

    Attributes:
        run: Called with the entry and a way (and the digits, where it needs them); returns our
            numbers by the names in `outputs`, and further ones that the lesson tells.
        ways: Ways to the same numbers, each compared; the table shows the numbers of the first.
        needs_digits: Whether it needs the digits of the full MNIST, in their order.
    """

    run: Callable[..., dict[str, Any]]
    ways: tuple[str, ...]
    needs_digits: bool


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(*names: str, ways: tuple[str, ...] = WAYS, needs_digits: bool = False) -> Callable:
    """Register a function as our side of the entries of these names."""

    def register(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        EXPERIMENTS.update(dict.fromkeys(names, Experiment(run, ways, needs_digits)))
        return run

    return register
