"""Least squares without descent: moments in memory and of a file, and scikit-learn."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LinearRegression, RidgeClassifier
from torch import Tensor

from benchmarks.fitting import MNIST, Prepared, digits, training_loss
from benchmarks.harness import Row
from benchmarks.team import Job, Run, Side, peak_bytes
from lightning_gd.moments import Moments

SPARE = 2**27  # bytes that a pass over a file may allocate


def rows(quick: bool) -> list[Row]:
    """The rows of exact solutions and their moments."""
    n, mebibytes = (12_000, 256) if quick else (MNIST, 1024)
    peer = partial(solved, rows=n)
    ridge = {t: partial(peer, make=RidgeClassifier, dtype=t) for t in (np.float32, np.float64)}
    exact = partial(peer, make=LinearRegression, dtype=np.float64)
    sides = (
        Side("moments of the bytes", partial(optimum, rows=n)),
        # Its default penalty moves the loss in the third digit.
        Side("RidgeClassifier, float32", ridge[np.float32], at_most=1.0, tolerance=5e-3),
        Side("RidgeClassifier, float64", ridge[np.float64], tolerance=5e-3),
        Side("LinearRegression, float64", exact, tolerance=1e-9),
    )
    quarter = partial(mapped_file, mebibytes=mebibytes // 4)
    files = (
        Side(f"{mebibytes} MiB", partial(mapped_file, mebibytes=mebibytes)),
        Side(f"{mebibytes // 4} MiB", quarter, at_most=1.1, tolerance=1e-12),
    )
    file = f"moments of a mapped file, with {SPARE >> 20} MiB to allocate"
    return [
        Row("optimum", f"{n:,} digits, exact least squares", sides, digits=True),
        Row("file", file, files, memory=True),
    ]


def optimum(job: Job, rows: int) -> Prepared:
    """Ours, from the bytes of the pictures."""
    data = digits(job, rows)
    train = data.tables["train"]

    def run() -> Run:
        start = time.perf_counter()
        best = Moments.of(train.raw, train.y).affine(train.scale, train.shift).optimum()
        seconds = time.perf_counter() - start
        assert best.bias is not None
        return Run(training_loss(data, best.weight, best.bias), seconds=seconds)

    return run


def solved(job: Job, rows: int, make: Callable[[], Any], dtype: type) -> Prepared:
    """An estimator of scikit-learn, from normalised pixels."""
    data = digits(job, rows)
    train = data.tables["train"]
    x, y = train.x.numpy().astype(dtype), train.y.numpy().astype(dtype)

    def run() -> Run:
        start = time.perf_counter()
        model = make().fit(x, y)
        seconds = time.perf_counter() - start
        weight, bias = torch.from_numpy(model.coef_).reshape(-1), np.ravel(model.intercept_)[0]
        return Run(training_loss(data, weight, torch.tensor(float(bias))), seconds=seconds)

    return run


def mapped_file(job: Job, mebibytes: int) -> Prepared:
    """The moments of a file that is read through a memory map; the same rows over and over."""
    x, y = random_bytes(8192)
    times = mebibytes * 2**20 // x.numel()
    path = Path(job.folder) / f"{mebibytes}.bytes"
    with path.open("wb") as file:
        for _ in range(times):
            file.write(x.numpy().data)
    table = np.memmap(path, np.uint8, "r", shape=(times * len(x), x.shape[1]))
    target = np.tile(y.numpy().astype(np.int8), times)

    def run() -> Run:
        with Allocated() as allocated:
            result = flat(Moments.of(table, target))
        return Run(result, memory=allocated.peak)

    return run


class Allocated:
    """The peak of allocated memory above the start; more than `SPARE` is refused.

    Pages of a mapped file count as resident while memory is free, and cost nothing: Linux reports
    them apart, and there they are left out.
    """

    def __enter__(self) -> Allocated:
        self.peak, self._stop, self._base = 0.0, threading.Event(), _status("RssAnon")
        self._before = resource.getrlimit(resource.RLIMIT_DATA)
        if sys.platform == "linux":
            limit = int(_status("VmData")) + SPARE
            resource.setrlimit(resource.RLIMIT_DATA, (limit, self._before[1]))
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        resource.setrlimit(resource.RLIMIT_DATA, self._before)

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _status("RssAnon") - self._base)


def _status(name: str) -> float:
    """Bytes of this process, as Linux names them; elsewhere the largest resident memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_bytes()
    line = next(text for text in status.read_text().splitlines() if text.startswith(f"{name}:"))
    return float(line.split()[1]) * 1024


def random_bytes(rows: int) -> tuple[Tensor, Tensor]:
    """Rows of 784 bytes, and targets ±1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (rows, 784), dtype=torch.uint8, generator=generator)
    return x, torch.where(x[:, 0] > x[:, 1], 1.0, -1.0)


def flat(moments: Moments) -> np.ndarray:
    """All numbers of some moments, in one array."""
    return torch.cat([moments.mean, moments.cov.flatten()]).numpy()
