"""The processes of one side, which run whenever they are asked."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
PRELOADED = ("lightning.pytorch", "torchvision", "sklearn.linear_model", "torchmetrics", "mlxtend")


@dataclass(frozen=True)
class Job:
    """What every side of every row gets.

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
    tolerance: float = 1e-5
    processes: int = 1
    threads: int | None = None


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
        try:
            self._answers()
        except BaseException:
            self.__exit__()
            raise
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
    except (EOFError, KeyboardInterrupt):
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
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT)
