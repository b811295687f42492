"""Whole commands, from the start of Python to its end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.fitting import Prepared
from benchmarks.harness import Row
from benchmarks.team import RSS_UNIT, Job, Run, Side

TRAIN = str(Path(__file__).parents[1] / "train.py")
# Runs a command and prints its peak: that of a child of a large process would be the parent's.
STARTER = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.stderr if done.returncode else 0)
"""


def rows(quick: bool) -> list[Row]:
    """The row of the default command; its sides have no result in common but to succeed."""
    imported = partial(command, arguments=("-c", "import lightning.pytorch"))
    without_pictures = partial(command, arguments=(TRAIN, "--pictures", "null"))
    sides = (
        Side("train.py, no pictures", without_pictures),
        Side("import lightning.pytorch", imported, at_most=1.6),
        Side("train.py with pictures", partial(command, arguments=(TRAIN,))),
    )
    return [Row("command", "the default command, a whole process", sides)]


def command(job: Job, arguments: tuple[str, ...]) -> Prepared:
    """Run Python in a folder of its own."""

    def run() -> Run:
        words = [sys.executable, "-c", STARTER, sys.executable, *arguments]
        folder = tempfile.mkdtemp(dir=job.folder)
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        seconds, peak = map(float, done.stdout.split())
        return Run(np.zeros(1), 1, seconds, peak * RSS_UNIT)

    return run
