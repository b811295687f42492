"""What the notebooks print, and which experiment of ours answers each entry."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

NOTEBOOKS = {
    "000": "Beginning gradient descent",
    "001": "Gradient descent with autograd and backpropagation",
    "002": "Gradient descent by hand on MNIST: odd or even",
    "003": "What is gradient descent",
    "004": "PyTorch gradient calculation",
}


@dataclass(frozen=True)
class Entry:
    """One experiment of a notebook.

    Attributes:
        notebook: Number and hash of the notebook; `001+004` where two hold the same experiment.
        experiment: Its name, by which ours is found.
        kind: `printed`; `derived`, where the notebook's text stops short and the rest is computed;
            `invariant`, a law that holds for any start; or `random`.
        settings: What it starts from.
        dtype: The precision that reproduces it.
        reduction: Whether its gradient is the mean or the sum over the rows.
        steps: Updates.
        outputs: What it prints, by name; digits as strings, where they were rounded.
        tolerance: How far ours may differ, with its `mode`; null compares printed digits.
        note: Which cells these are, and what is odd about them.
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

    @property
    def notebooks(self) -> list[str]:
        """The three-digit numbers of the notebooks that hold it."""
        return [name[:3] for name in self.notebook.split("+")]


def entries(notebooks: Sequence[str] = ()) -> list[Entry]:
    """The entries of these notebooks, of all by default, ordered by notebook."""
    text = (files("lightning_gd.notebooks") / "golden.json").read_text("utf-8")
    found = [Entry(**entry) for entry in json.loads(text)]
    chosen = [e for e in found if not notebooks or set(e.notebooks) & set(notebooks)]
    return sorted(chosen, key=lambda entry: entry.notebooks[0])


class Experiment(NamedTuple):
    """How we obtain the numbers of an entry.

    Attributes:
        run: Called with the entry and a road (and the digits, where it needs them); returns our
            numbers by the names in `outputs`, and further ones that the lesson tells.
        roads: Ways to the same numbers, each compared; the first is the one shown.
        needs_digits: Whether it takes the digits of the full MNIST, in their order.
    """

    run: Callable[..., dict[str, Any]]
    roads: tuple[str, ...]
    needs_digits: bool


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(*names: str, roads: tuple[str, ...], needs_digits: bool = False) -> Callable:
    """Register a function as our side of the entries of these names."""

    def register(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        EXPERIMENTS.update(dict.fromkeys(names, Experiment(run, roads, needs_digits)))
        return run

    return register
