"""Measures rows: each side in a process of its own, in turns, and refused unless they agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from benchmarks.team import Job, Run, Side, Team

LONG = 2.0  # seconds: a first run that takes longer needs no warm-up, and counts
SHORT = 0.8  # seconds per round: a row that takes less goes on, up to four times the repeats
BUDGET = 5.0  # seconds per round: a row that takes more stops after half of the repeats


@dataclass(frozen=True)
class Row:
    """The same work by several sides, ours first.

    Attributes:
        name: For `--only`.
        work: What is done.
        sides: Ours, then the peers.
        unit: Of the time; its prefix and what it is divided by, such as `ms/update`.
        digits: Whether it needs the full MNIST.
        memory: Whether peak memory is compared, and not time.
    """

    name: str
    work: str
    sides: tuple[Side, ...]
    unit: str = "s"
    digits: bool = False
    memory: bool = False


@dataclass
class Measured:
    """What was measured of one side: seconds per unit, bytes, and its distance from our result."""

    side: Side
    seconds: list[float] = field(default_factory=list)
    memory: float = 0.0
    difference: float = 0.0
    ratio: float = 1.0  # ours / this side's: median time, or memory

    def add(self, run: Run, timed: bool = True) -> None:
        """Keep the time of a run and the largest memory of all."""
        self.seconds += [(run.seconds or 0.0) / run.units] if timed else []
        self.memory = max(self.memory, run.memory or 0.0)

    @property
    def median(self) -> float:
        """The median time of a unit."""
        return statistics.median(self.seconds)

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is as good as wanted; `None` where nothing is."""
        if self.side.faster is not None:
            return 1 / self.ratio >= self.side.faster
        return None if self.side.at_most is None else self.ratio <= self.side.at_most


@dataclass
class Outcome:
    """A row and what came of it; `refused` and `skipped` say why there is no ratio."""

    row: Row
    sides: list[Measured] = field(default_factory=list)
    refused: str | None = None
    skipped: str | None = None


def measure(row: Row, job: Job, repeats: int, tick: Callable[[], None] = lambda: None) -> Outcome:
    """Measure one row, A B A B.

    Args:
        row: The row.
        job: What every side gets.
        repeats: Rounds; short rows get up to four times as many, long ones at least half.
        tick: Called after each run.

    Returns:
        The times and ratios, or why they are refused: the results differ, or a side failed.
    """
    outcome = Outcome(row, [Measured(side) for side in row.sides])
    try:
        with ExitStack() as stack:
            teams = [stack.enter_context(Team(side, job)) for side in row.sides]
            runs = _rounds(teams, outcome.sides, repeats, tick)
    except ChildProcessError as error:
        outcome.refused = str(error)
        return outcome
    first = outcome.sides[0]
    for run, mine in zip(runs, outcome.sides, strict=True):
        mine.difference = _difference(runs[0].result, run.result)
        mine.ratio = first.memory / mine.memory if row.memory else first.median / mine.median
    apart = [mine for mine in outcome.sides if not mine.difference <= mine.side.tolerance]
    if apart:
        outcome.refused = "; ".join(
            f"the result of {m.side.name} is {m.difference:.2g} away from ours, "
            f"more than {m.side.tolerance:g}"
            for m in apart
        )
    return outcome


def _rounds(
    teams: list[Team], sides: list[Measured], repeats: int, tick: Callable[[], None]
) -> list[Run]:
    """Run all sides in turns until there is enough; the last run of each."""
    start, last = time.perf_counter(), [team.run() for team in teams]
    for run, mine in zip(last, sides, strict=True):
        mine.add(run, timed=(run.seconds or 0.0) > LONG)
    done = 0
    while _wanted(done, repeats, time.perf_counter() - start):
        for i, team in enumerate(teams):
            if len(sides[i].seconds) == done:
                last[i] = team.run()
                sides[i].add(last[i])
            tick()
        done += 1
    return last


def _wanted(done: int, repeats: int, elapsed: float) -> bool:
    if done < repeats:
        return elapsed < BUDGET * repeats or done < (repeats + 1) // 2
    return elapsed < SHORT * repeats and done < 4 * repeats


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over our largest magnitude; infinite for other shapes, or NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    apart, size = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    return apart if apart == 0 else apart / size if size else float("inf")
