"""Measures rows: each side in a process of its own, in turns, and refused unless they agree."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PRELOADED = ("lightning.pytorch", "torchvision", "sklearn.linear_model", "torchmetrics", "mlxtend")
LONG = 2.0  # seconds: a first run that takes longer needs no warm-up, and counts
SHORT = 0.8  # seconds a round: a row that takes less goes on, up to four times the repeats
BUDGET = 25.0  # seconds: a row that takes more stops after three rounds


@dataclass(frozen=True)
class Job:
    """What every side of every row is told.

    Attributes:
        root: Folder of the full MNIST.
        folder: Where runs may write; it is removed afterwards.
    """

    root: str
    folder: str


@dataclass(frozen=True)
class Run:
    """What one run of a side did.

    Attributes:
        result: What must agree with the other sides, such as all weights.
        units: Epochs, updates or rows that its time is divided by.
        seconds: The time, where the clock should not cover the whole run.
        memory: Peak bytes, where those of the process are not what is meant.
    """

    result: np.ndarray
    units: float = 1.0
    seconds: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Side:
    """One way to do the work of a row; `prepare` gets all ready, and what it returns is timed.

    Attributes:
        name: What the table calls it.
        prepare: A function of a module, called in the process of this side.
        at_most: Of a peer: the reach, as our time divided by its time.
        faster: Of a peer: the reach, as its time divided by our time.
        tolerance: Of a peer: the largest difference from our result, over its largest magnitude.
        processes: How many do the work together; the slowest gives the time.
        threads: Of each process; null leaves torch's choice.
    """

    name: str
    prepare: Callable[[Job], Callable[[], Run]]
    at_most: float | None = None
    faster: float | None = None
    tolerance: float = 1e-4
    processes: int = 1
    threads: int | None = None


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
    """What was measured of one side: seconds a unit, bytes, and its distance from our result."""

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
        job: What its sides are told.
        repeats: Rounds; short rows get up to four times as many, long ones at least three.
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
        return elapsed < BUDGET or done < 3
    return elapsed < SHORT * repeats and done < 4 * repeats


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over our largest magnitude; infinite for other shapes, or NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    apart, size = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    return apart if apart == 0 else apart / size if size else float("inf")


class Team:
    """The processes of one side, ready to run again and again.

    They are forked from a server that has imported the libraries and run nothing, so that none
    pays for imports, none inherits threads, and all start from the same memory.
    """

    def __init__(self, side: Side, job: Job) -> None:
        self.side, self.job = side, job
        self.members: list[tuple[Any, Any]] = []  # process, pipe

    def __enter__(self) -> Team:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        meeting = f"{tempfile.mkdtemp(dir=self.job.folder)}/meeting"
        for rank in range(self.side.processes):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, self.side, self.job, rank, meeting)
            )
            process.start()
            theirs.close()
            self.members.append((process, pipe))
        self._answers()
        return self

    def __exit__(self, *error: object) -> None:
        for process, _ in self.members:
            process.kill()
            process.join()

    def run(self) -> Run:
        """One run of all members; the time and the memory of the one that has most of it."""
        for _, pipe in self.members:
            pipe.send(True)
        runs = self._answers()
        return Run(
            runs[0].result,
            runs[0].units,
            max(run.seconds or 0.0 for run in runs),
            max(run.memory or 0.0 for run in runs),
        )

    def _answers(self) -> list[Run]:
        answers = []
        for process, pipe in self.members:
            try:
                answer = pipe.recv()
            except EOFError:
                process.join()
                answer = f"its process ended with status {process.exitcode}"
            if isinstance(answer, str):
                raise ChildProcessError(f"{self.side.name}: {answer}")
            answers.append(answer)
        return answers


def _serve(pipe: Any, side: Side, job: Job, rank: int, meeting: str) -> None:
    """Prepare, and run whenever asked; ends with the parent."""
    import torch

    base = peak_bytes()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.stdout = open(os.devnull, "w")
    if side.threads:
        torch.set_num_threads(side.threads)
    try:
        if side.processes > 1:
            _join(side.processes, rank, meeting)
        run = side.prepare(job)
        pipe.send(None)
        while pipe.recv():
            if side.processes > 1:
                torch.distributed.barrier()
            start = time.perf_counter()
            done = run()
            seconds = done.seconds or time.perf_counter() - start
            pipe.send(Run(done.result, done.units, seconds, done.memory or peak_bytes() - base))
    except EOFError:
        return
    except Exception:
        pipe.send(traceback.format_exc(limit=-3))


def _join(world: int, rank: int, meeting: str) -> None:
    """Form the process group that Lightning then finds."""
    import torch

    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world), RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
    )


def peak_bytes() -> float:
    """The largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
