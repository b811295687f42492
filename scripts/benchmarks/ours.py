"""What this package does in each row: `Trainer.fit` with our models, data and logger."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from benchmarks.harness import Job, Run
from lightning_gd import GradientDescentModule, MNISTParityData, ParityRegressor
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.data.mnist import SCALINGS
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.derivatives import per_sample_jacobian
from lightning_gd.distributed import reduce_sum, world_size
from lightning_gd.logger import RunLogger
from lightning_gd.moments import Moments

Prepared = Callable[[], Run]
BATCH, LR = 64, 5e-4
FULL_LR, UPDATES = 0.002, 500
HUBER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "gradient_clip_val": 0.5}
SPARE = 2**27  # bytes that a pass over a file may allocate
TRAIN = str(Path(__file__).parents[1] / "train.py")


class Huber(GradientDescentModule):
    """The README's model: L = 1/N Σ h(r): r²/2 for |r| ≤ 1, |r| − ½ beyond."""

    def __init__(self, num_features: int = 784, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = torch.nn.Parameter(torch.zeros(num_features))
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """ŷ = x w + b."""
        return x @ self.weight + self.bias

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """L = 1/N Σ h(r)."""
        return torch.nn.functional.huber_loss(self(x), y)

    def gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """∂L/∂w = 1/N xᵀ h'(r) and ∂L/∂b = 1/N Σ h'(r)."""
        slope = (self(x) - y).clamp(-1, 1)
        return {"weight": slope @ x / len(y), "bias": slope.mean()}


class Clock(Callback):
    """The time of the updates alone, until every loss is on its way to TensorBoard."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start."""
        self.seconds = -time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop."""
        self.seconds += time.perf_counter()


class Held(TensorDataModule):
    """One table, whose moments are taken once for all runs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._held: Moments | None = None

    def moments(self, part: str) -> Moments:
        """The moments of the only table."""
        if self._held is None:
            self._held = super().moments(part)
        return self._held


def digits(job: Job, rows: int, **settings: Any) -> MNISTParityData:
    """Digits in memory: the first so many of MNIST, or the 2,000 that need no download."""
    source = {} if rows == 2000 else {"source": "torchvision", "root": job.root, "num_train": rows}
    data = MNISTParityData(**source, **settings)
    data.setup("fit")
    return data


def warm(data: TensorDataModule) -> None:
    """Normalise before the clock starts, as for the peers."""
    for table in data.tables.values():
        _ = table.x


def weights(weight: Tensor, bias: Tensor) -> np.ndarray:
    """All weights in float64, shape [D + 1]."""
    return torch.cat([weight.detach().reshape(-1), bias.detach().reshape(-1)]).double().numpy()


def fit(model: Any, data: TensorDataModule, job: Job, *callbacks: Callback, **length: Any) -> Any:
    """`Trainer.fit` with every loss in TensorBoard; the trained model."""
    processes = world_size()
    Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=RunLogger(tempfile.mkdtemp(dir=job.folder)),
        callbacks=list(callbacks),
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **length,
    ).fit(model, datamodule=data)
    return model


def mini_batches(job: Job, rows: int, epochs: int, check: bool = False) -> Prepared:
    """Epochs of mini-batches through `fit`."""
    data = digits(job, rows, batch_size=BATCH, test_every=0)
    warm(data)

    def run() -> Run:
        callbacks = [GradientCheck()] if check else []
        model = fit(ParityRegressor(lr=LR), data, job, *callbacks, max_epochs=epochs)
        return Run(weights(model.weight, model.bias), epochs)

    return run


def huber(job: Job, rows: int, epochs: int) -> Prepared:
    """The same with a user's formula, momentum and clipping."""
    data = digits(job, rows, batch_size=BATCH, test_every=0)
    warm(data)

    def run() -> Run:
        model = fit(Huber(**HUBER), data, job, max_epochs=epochs)
        return Run(weights(model.weight, model.bias), epochs)

    return run


def mini_batch_accuracy(job: Job, rows: int, epochs: int) -> Prepared:
    """Epochs of mini-batches; what must agree is the test accuracy."""
    data = digits(job, rows, batch_size=BATCH, test_every=0)
    warm(data)

    def run() -> Run:
        start = time.perf_counter()
        model = fit(ParityRegressor(lr=LR), data, job, max_epochs=epochs)
        seconds = time.perf_counter() - start
        result = accuracy(data, model.weight.detach(), model.bias.detach())
        return Run(result, epochs, seconds)

    return run


def full_batch(job: Job, rows: int, moments: bool, check: bool = False) -> Prepared:
    """Updates with all rows, with the train and the test loss at each."""
    data = digits(job, rows, passes_per_epoch=UPDATES)
    if not moments:
        warm(data)

    def run() -> Run:
        callbacks = [GradientCheck()] if check else []
        model = ParityRegressor(lr=FULL_LR, moments=moments)
        fit(model, data, job, *callbacks, max_epochs=1)
        return Run(weights(model.weight, model.bias), UPDATES)

    return run


def distributed_full_batch(job: Job, rows: int, updates: int) -> Prepared:
    """Updates by the formula over all rows, shared by the processes that there are."""
    data = digits(job, rows, passes_per_epoch=updates, test_every=0)
    warm(data)

    def run() -> Run:
        model = fit(ParityRegressor(lr=FULL_LR), data, job, max_epochs=1)
        return Run(weights(model.weight, model.bias), updates)

    return run


def distributed_moments(job: Job, rows: int) -> Prepared:
    """The moments of all rows, shared by the processes that there are."""
    table = digits(job, rows).tables["train"]
    rank = torch.distributed.get_rank() if world_size() > 1 else 0

    def run() -> Run:
        return Run(_flat(table.moments(rank, world_size()).reduce(reduce_sum)))

    return run


def moments_updates(job: Job, rows: int) -> Prepared:
    """Updates from the moments of so many rows: the same thousand again and again."""
    x, y = _bytes(1000)
    times = rows // len(y)
    data = Held(passes_per_epoch=2000, test_every=0)
    data.tables = {"train": Table(x.repeat(times, 1), y.repeat(times), *SCALINGS["standard"])}

    def run() -> Run:
        clock, model = Clock(), ParityRegressor(lr=1e-4, moments=True)
        fit(model, data, job, clock, max_epochs=1)
        return Run(weights(model.weight, model.bias), 2000, clock.seconds)

    return run


def optimum(job: Job, rows: int) -> Prepared:
    """The exact least-squares solution from the bytes of the pictures."""
    data = digits(job, rows)
    train = data.tables["train"]

    def run() -> Run:
        start = time.perf_counter()
        moments = Moments.of(train.raw, train.y).affine(train.scale, train.shift)
        best = moments.optimum()
        seconds = time.perf_counter() - start
        assert best.bias is not None
        return Run(training_loss(data, best.weight, best.bias), seconds=seconds)

    return run


def training_loss(data: TensorDataModule, weight: Tensor, bias: Tensor) -> np.ndarray:
    """1/N Σ r² over the training rows, in float64, shape [1]."""
    residuals = _scores(data.tables["train"], weight, bias) - data.tables["train"].y
    return residuals.square().mean().reshape(1).numpy()


def accuracy(data: TensorDataModule, weight: Tensor, bias: Tensor) -> np.ndarray:
    """The share of test digits that are on the right side of 0, shape [1]."""
    right = (_scores(data.tables["test"], weight, bias) > 0) == (data.tables["test"].y > 0)
    return right.double().mean().reshape(1).numpy()


def _scores(table: Table, weight: Tensor, bias: Tensor) -> Tensor:
    """Predictions in float64 and little memory, shape [N]."""
    blocks = (block.double() * table.scale + table.shift for block in table.raw.split(8192))
    return torch.cat([block @ weight.double() + bias.double() for block in blocks])


def samples(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The notebook's columns x = y = z = 0 … 9, over and over."""
    column = torch.arange(rows) % 10.0
    return column, column.clone(), column.clone()


def cubes(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The notebook's B = (x³ − y², y² + z², z³ − x²), shape [N, 3]."""
    return torch.stack([x**3 - y**2, y**2 + z**2, z**3 - x**2], dim=-1)


def jacobian(job: Job, rows: int) -> Prepared:
    """The Jacobian of each sample; what must agree is that of the last thousand."""
    columns = samples(rows)
    return lambda: Run(per_sample_jacobian(cubes, *columns)[-1000:].double().numpy(), rows)


def mapped_file(job: Job, mebibytes: int) -> Prepared:
    """The moments of a file that is read through a memory map."""
    x, y = _bytes(8192)
    times = mebibytes * 2**20 // x.numel()
    path = Path(job.folder) / f"{mebibytes}.bytes"
    with path.open("wb") as file:
        for _ in range(times):
            file.write(x.numpy().data)
    table = np.memmap(path, np.uint8, "r", shape=(times * len(x), x.shape[1]))
    target = np.tile(y.numpy().astype(np.int8), times)

    def run() -> Run:
        with Allocated() as allocated:
            result = _flat(Moments.of(table, target))
        return Run(result, memory=allocated.peak)

    return run


class Allocated:
    """The peak of allocated memory above the start, with all beyond `SPARE` refused.

    Pages of a mapped file count as resident while there is room, and cost nothing: they are left
    out where the system tells them apart.
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
    """Bytes, from what Linux tells of this process; elsewhere the largest resident memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    line = next(text for text in status.read_text().splitlines() if text.startswith(f"{name}:"))
    return float(line.split()[1]) * 1024


def _bytes(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (rows, 784), dtype=torch.uint8, generator=generator)
    return x, torch.where(x[:, 0] > x[:, 1], 1.0, -1.0)


def _flat(moments: Moments) -> np.ndarray:
    fields = (moments.mean_x, moments.mean_y, moments.cov_xx, moments.cov_xy, moments.var_y)
    return torch.cat([field.reshape(-1) for field in fields]).numpy()


# Starts a command and tells its peak: that of a child of a large process would be the parent's.
_STARTER = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.stderr if done.returncode else 0)
"""
WITHOUT_PICTURES = """
import sys
from lightning_gd.callbacks.pictures import Pictures
from lightning_gd.cli import main
Pictures.on_fit_end = lambda *arguments: None
sys.exit(main([]))
"""


def command(job: Job, arguments: tuple[str, ...]) -> Prepared:
    """A whole Python process, in a folder of its own."""

    def run() -> Run:
        words = [sys.executable, "-c", _STARTER, sys.executable, *arguments]
        folder = tempfile.mkdtemp(dir=job.folder)
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        seconds, peak = done.stdout.split()
        unit = 1 if sys.platform == "darwin" else 1024
        return Run(np.zeros(1), 1, float(seconds), float(peak) * unit)

    return run
