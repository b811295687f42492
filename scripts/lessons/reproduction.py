"""Runs the experiments, shows what is printed beside ours, and tells the lessons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lessons import autograd, four_points, one_sample  # noqa: F401  register their experiments
from lessons.digits import FETCH, Digits, read_digits
from lessons.entries import EXPERIMENTS, FOLDER, NOTEBOOKS, Entry, entries
from lessons.verdicts import Quantity, compare, plain


@dataclass(frozen=True)
class Result:
    """One entry, reproduced.

    Attributes:
        entry: What the notebook prints.
        ways: By which ours was found.
        quantities: What was compared; the numbers shown are those of the first way, the
            differences the largest of all; empty where the digits are missing.
        facts: Our numbers by name, for the lesson.
    """

    entry: Entry
    ways: tuple[str, ...]
    quantities: list[Quantity]
    facts: dict[str, Any]

    @property
    def verdict(self) -> str:
        """`agrees`, `differs` or `needs data`."""
        if not self.quantities:
            return "needs data"
        return "agrees" if all(q.agrees for q in self.quantities) else "differs"


def reproduce(
    notebooks: Sequence[str] = (), digits: dict[str, Digits] | None = None
) -> Iterator[Result]:
    """Run the experiments of these notebooks, of all by default, one by one.

    Args:
        notebooks: Three-digit numbers.
        digits: Those of `notebook_digits`; without them, entries that need them are left open.
    """
    for entry in entries(notebooks):
        run, ways, needs_digits = EXPERIMENTS[entry.experiment]
        if needs_digits and digits is None:
            yield Result(entry, ways, [], {})
            continue
        more = (digits,) if needs_digits else ()
        ours = [run(entry, way, *more) for way in ways]
        compared = zip(*(compare(entry, numbers) for numbers in ours), strict=True)
        yield Result(entry, ways, [_worst(found) for found in compared], _facts(ours[0]))


def _facts(ours: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(value) for name, value in ours.items()}


def _worst(of_ways: tuple[Quantity, ...]) -> Quantity:
    return replace(
        of_ways[0],
        difference=max(q.difference for q in of_ways),
        agrees=all(q.agrees for q in of_ways),
    )


def show(console: Console, notebook: str, results: Sequence[Result]) -> None:
    """Print the table of one notebook."""
    table = Table(title=f"{notebook}  {NOTEBOOKS[notebook]}", title_justify="left", expand=True)
    table.caption = "ours: by the first way named; difference: the largest over all ways"
    table.add_column("experiment", ratio=1, overflow="fold")
    table.add_column(_grid([("quantity", "notebook", "ours", "difference", "verdict")]), ratio=4)
    for result in results:
        entry = result.entry
        notes = f"{entry.dtype}; {entry.reduction}\n{entry.kind}; by {', '.join(result.ways)}"
        heading = f"[bold]{entry.experiment}[/bold]\n[dim]{notes}[/dim]"
        table.add_row(heading, _grid(_rows(result)), end_section=True)
    console.print(table)


def _grid(rows: Iterable[tuple[str, ...]]) -> Table:
    """Return a table with the same columns in every experiment, the numbers' being the widest."""
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
    """Return how many agree of how many, and what is open."""
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
    """Return what a notebook teaches, with the numbers of our own run filled in.

    Without the full MNIST, notebook 002 is told with the digits that come with the package.
    """
    facts = {r.entry.experiment: r.facts for r in results}
    facts["digits"] = {"name": "the first 2,000 and 5,000 digits of MNIST"}
    needing = [r.entry for r in results if r.verdict == "needs data" and r.entry.steps]
    if needing:
        offline = read_digits(["standard"], source="offline")
        facts["digits"]["name"] = "the 2,000 and 3,000 offline digits, not those of the notebook"
        for entry in needing:
            found = EXPERIMENTS[entry.experiment].run(entry, "", offline)
            facts[entry.experiment] = _facts(found)
    return (FOLDER / "texts" / f"{notebook}.txt").read_text("utf-8").format(**facts)
