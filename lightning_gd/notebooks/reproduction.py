"""Runs the experiments, sets what is printed beside ours, and tells the lessons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_gd.data.mnist import RAW_FILES
from lightning_gd.notebooks import autograd, four_points, one_sample  # noqa: F401  register
from lightning_gd.notebooks.digits import Digits
from lightning_gd.notebooks.golden import EXPERIMENTS, NOTEBOOKS, Entry, entries
from lightning_gd.notebooks.verdicts import Quantity, compare, plain

FETCH = "python scripts/reproduce.py 002 --data-root data --download"


@dataclass(frozen=True)
class Result:
    """One entry, reproduced.

    Attributes:
        entry: What the notebook prints.
        roads: By which ours was found.
        quantities: What was compared; the numbers shown are those of the first road, the
            differences the largest of all; empty where the digits are missing.
        facts: Our numbers by name, for the lesson.
    """

    entry: Entry
    roads: tuple[str, ...]
    quantities: list[Quantity]
    facts: dict[str, Any]

    @property
    def verdict(self) -> str:
        """`agrees`, `differs` or `needs data`."""
        if not self.quantities:
            return "needs data"
        return "agrees" if all(q.agrees for q in self.quantities) else "differs"


def notebook_digits(root: str | Path, download: bool = False) -> Digits:
    """The digits of notebook 002: the first 2,000 and 5,000 of the full MNIST, read.

    Raises:
        FileNotFoundError: If they are not there and not to be downloaded.
        ValueError: If a file is not that of MNIST.
    """
    raw = Path(root) / "MNIST" / "raw"
    if not download and not all((raw / name).is_file() for name in RAW_FILES):
        raise FileNotFoundError(f"{raw} does not hold the four files of MNIST; to fetch: {FETCH}")
    source = {"source": "torchvision", "root": str(root), "download": download}
    digits = Digits(**source, num_train=2000, num_test=5000)
    _ = digits.data
    return digits


def reproduce(notebooks: Sequence[str] = (), digits: Digits | None = None) -> Iterator[Result]:
    """Run the experiments of these notebooks, of all by default, one by one.

    Args:
        notebooks: Three-digit numbers.
        digits: Those of `notebook_digits`; without them, entries that need them are left open.
    """
    for entry in entries(notebooks):
        run, roads, needs_digits = EXPERIMENTS[entry.experiment]
        if needs_digits and digits is None:
            yield Result(entry, roads, [], {})
            continue
        more = (digits,) if needs_digits else ()
        ours = [run(entry, road, *more) for road in roads]
        found = [
            _worst(of_roads) for of_roads in zip(*(compare(entry, o) for o in ours), strict=True)
        ]
        yield Result(entry, roads, found, _facts(ours[0]))


def _facts(ours: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(value) for name, value in ours.items()}


def _worst(of_roads: tuple[Quantity, ...]) -> Quantity:
    return replace(
        of_roads[0],
        difference=max(q.difference for q in of_roads),
        agrees=all(q.agrees for q in of_roads),
    )


def show(console: Console, notebook: str, results: Sequence[Result]) -> None:
    """Print the table of one notebook."""
    table = Table(title=f"{notebook}  {NOTEBOOKS[notebook]}", title_justify="left", expand=True)
    table.caption = "ours: by the first road named; difference: the largest over all roads"
    table.add_column("experiment", ratio=1, overflow="fold")
    table.add_column(_grid([("quantity", "notebook", "ours", "difference", "verdict")]), ratio=4)
    for result in results:
        table.add_row(_heading(result), _grid(_rows(result)), end_section=True)
    console.print(table)


def _heading(result: Result) -> str:
    entry = result.entry
    notes = f"{entry.dtype}; {entry.reduction}\n{entry.kind}; by {', '.join(result.roads)}"
    return f"[bold]{entry.experiment}[/bold]\n[dim]{notes}[/dim]"


def _grid(rows: Iterable[tuple[str, ...]]) -> Table:
    """Rows with the same columns in every experiment; the two in the midst get most room."""
    grid = Table.grid(padding=(0, 1), expand=True)
    for ratio in (5, 8, 8):
        grid.add_column(ratio=ratio, overflow="fold")
    grid.add_column(width=10, justify="right")
    grid.add_column(width=10)
    for row in rows:
        grid.add_row(*row)
    return grid


def _rows(result: Result) -> Iterator[tuple[str, ...]]:
    if result.verdict == "needs data":
        yield "all", "needs the order of the full MNIST", FETCH, "", "[yellow]needs data[/]"
    for q in result.quantities:
        verdict = "[green]agrees[/]" if q.agrees else "[bold red]differs[/]"
        yield q.name, q.printed, q.ours, f"{q.difference:.1e}" if q.difference else "0", verdict


def closing_line(results: Sequence[Result]) -> str:
    """How many agree of how many, and what is open."""
    count = Counter(result.verdict for result in results)
    done = count["agrees"] + count["differs"]
    line = f"{count['agrees']} of {done} experiments agree with the notebooks"
    if count["differs"]:
        names = [r.entry.experiment for r in results if r.verdict == "differs"]
        line += f"; {count['differs']} differ: {', '.join(names)}"
    if count["needs data"]:
        line += f"; {count['needs data']} more need the full MNIST: {FETCH}"
    return line


def lesson(notebook: str, results: Sequence[Result]) -> str:
    """What a notebook teaches, in plain words, with the numbers of our own run filled in.

    Without the full MNIST, notebook 002 is told with the digits that come with the package.
    """
    facts = {r.entry.experiment: r.facts for r in results}
    facts["digits"] = {"name": "the first 2,000 and 5,000 digits of MNIST"}
    needing = [r.entry for r in results if r.verdict == "needs data" and r.entry.steps]
    if needing:
        offline = Digits(scalings=["standard"], source="offline")
        facts["digits"]["name"] = "the 2,000 and 3,000 offline digits, not those of the notebook"
        for entry in needing:
            found = EXPERIMENTS[entry.experiment].run(entry, "", offline)
            facts[entry.experiment] = _facts(found)
    text = files("lightning_gd.notebooks") / "lessons" / f"{notebook}.txt"
    return text.read_text("utf-8").format(**facts)
