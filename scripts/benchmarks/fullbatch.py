"""Full-batch updates by the formula and by moments, on one process and on two."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from benchmarks.exact import flat, random_bytes
from benchmarks.fitting import MNIST, SMALL, Prepared, digits, fit, warm, weights
from benchmarks.harness import Row
from benchmarks.team import Job, Run, Side
from lightning_gd import GradientCheck, ParityRegressor, TestCurve
from lightning_gd.data.mnist import SCALINGS
from lightning_gd.data.tables import Table
from lightning_gd.data.tensors import TensorDataModule
from lightning_gd.distributed import reduce_sum, world_size

LR, UPDATES, MANY = 0.002, 500, 2000
PER_STEP = 250  # updates per step, as in the shipped experiments


def rows(quick: bool) -> list[Row]:
    """The rows of full batches."""
    work = f"{{:,}} digits, full batch, {UPDATES} updates, both losses at each"
    n = 6_000 if quick else MNIST
    formula = partial(full_batch, rows=SMALL, moments=False)
    notebooks = partial(notebook, rows=SMALL)
    large = (
        Side("fit by moments", partial(full_batch, rows=n, moments=True)),
        Side("notebook's loop", partial(notebook, rows=n), faster=100),
    )
    by_formula = (
        Side("fit by the formula", formula),
        Side("notebook's loop", notebooks, at_most=0.8),
    )
    by_moments = (
        Side("fit by moments", partial(full_batch, rows=SMALL, moments=True)),
        Side("notebook's loop", notebooks, at_most=0.3),
    )
    epochs = 1 if quick else 10  # checks at 0, 1, 10, 100, and every 1,000th update
    checked = (
        Side("with GradientCheck", partial(formula, check=True, epochs=epochs)),
        Side("without", partial(formula, epochs=epochs), at_most=1.05, tolerance=0.0),
    )
    return [
        Row("moments", work.format(n), large, "ms/update", digits=True),
        Row("formula-2000", work.format(SMALL), by_formula, "ms/update"),
        Row("moments-2000", work.format(SMALL), by_moments, "ms/update"),
        Row(
            "check-full",
            f"{SMALL:,} digits, {UPDATES * epochs:,} updates, GradientCheck",
            checked,
            "ms/update",
        ),
        _flat(10**5 if quick else 10**6),
        *_processes(20 if quick else 100),
    ]


def _flat(largest: int) -> Row:
    sizes = [10**k for k in range(3, 7) if 10**k < largest]
    prepare = {n: partial(moments_updates, rows=n) for n in (largest, *sizes)}
    others = [Side(f"{n:,} rows", prepare[n], at_most=1.5) for n in sizes]
    return Row(
        "flat",
        "an update from the moments of more and more rows of 784",
        (Side(f"{largest:,} rows", prepare[largest]), *others),
        "ms/update",
    )


def _processes(count: int) -> list[Row]:
    updates = partial(divided_updates, updates=count)
    formula = (
        Side("2 processes × 1 thread", updates, processes=2, threads=1),
        Side("1 × 1", updates, faster=1.5, threads=1),
    )
    moments = (
        Side("2 processes × 1 thread", divided_moments, processes=2, threads=1),
        Side("1 × 1", divided_moments, faster=1.8, tolerance=1e-12, threads=1),
    )
    work = f"{MNIST:,} digits, full batch, {count} updates by the formula"
    return [
        Row("processes", work, formula, "ms/update", digits=True),
        Row("processes-moments", f"{MNIST:,} digits, their moments", moments, digits=True),
    ]


def full_batch(
    job: Job, rows: int, moments: bool, check: bool = False, epochs: int = 1
) -> Prepared:
    """Ours: train and test loss at each update; by moments the pass over the bytes is timed."""
    settings = {"passes_per_epoch": UPDATES, "updates_per_step": PER_STEP}
    data = digits(job, rows, moments=moments, **settings)
    callbacks = [TestCurve(), GradientCheck()] if check else [TestCurve()]
    if not moments:
        warm(data)

    def run() -> Run:
        if moments:
            data.tables = {part: unread(table) for part, table in data.tables.items()}
        model = fit(ParityRegressor(lr=LR), data, job, *callbacks, max_epochs=epochs)
        return Run(weights(model.weight, model.bias), UPDATES * epochs)

    return run


def notebook(job: Job, rows: int) -> Prepared:
    """All rows in every update; train and test loss from forward passes of their own."""
    data = digits(job, rows)
    (x, y), (x_test, y_test) = ((data.tables[p].x, data.tables[p].y) for p in ("train", "test"))

    @torch.no_grad()
    def run() -> Run:
        w, b = torch.zeros(x.shape[1]), torch.zeros(())
        losses: dict[str, list[float]] = {"train": [], "test": []}
        for _ in range(UPDATES):
            losses["train"].append((x @ w + b - y).square().mean().item())
            losses["test"].append((x_test @ w + b - y_test).square().mean().item())
            r = x @ w + b - y
            w -= LR * (2 / len(y) * (r @ x))
            b -= LR * (2 * r.mean())
        return Run(weights(w, b), UPDATES)

    return run


class Clock(Callback):
    """The time of the updates alone, until every loss is on its way to TensorBoard."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start."""
        self.seconds = -time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop."""
        self.seconds += time.perf_counter()


def unread(table: Table) -> Table:
    """The same table without the moments and normalised rows that it keeps."""
    return table.part(slice(None))


def moments_updates(job: Job, rows: int) -> Prepared:
    """Updates from moments; the same thousand rows over and over, so that all sizes agree."""
    x, y = random_bytes(1000)
    times = rows // len(y)
    data = TensorDataModule(passes_per_epoch=MANY, updates_per_step=PER_STEP, moments=True)
    data.tables = {"train": Table(x.repeat(times, 1), y.repeat(times), *SCALINGS["standard"])}
    data.moments_of("train")  # kept by the table for all runs

    def run() -> Run:
        clock, model = Clock(), ParityRegressor(lr=1e-4)
        fit(model, data, job, clock, max_epochs=1)
        return Run(weights(model.weight, model.bias), MANY, clock.seconds)

    return run


def divided_updates(job: Job, updates: int) -> Prepared:
    """Updates by the formula, their rows divided between the processes that there are."""
    data = digits(job, MNIST, passes_per_epoch=updates, updates_per_step=PER_STEP)
    warm(data)

    def run() -> Run:
        model = fit(ParityRegressor(lr=LR), data, job, max_epochs=1)
        return Run(weights(model.weight, model.bias), updates)

    return run


def divided_moments(job: Job) -> Prepared:
    """The moments of all rows, divided between the processes that there are."""
    table = digits(job, MNIST).tables["train"]
    rank = torch.distributed.get_rank() if world_size() > 1 else 0

    def run() -> Run:
        return Run(flat(unread(table).moments(rank, world_size()).reduce(reduce_sum)))

    return run
