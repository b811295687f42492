"""Updates on a GPU: `fit` by CUDA graphs, an eager loop, and a compiled update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.fitting import MNIST, SMALL, Prepared, digits, fit, warm, weights
from benchmarks.harness import Row
from benchmarks.plain import BATCH, LR, order
from benchmarks.team import Job, Run, Side
from lightning_gd import ParityRegressor

UPDATES, PER_STEP = 2000, 500  # of full batches


def rows(quick: bool) -> list[Row]:
    """The rows of a GPU; none without one."""
    if not torch.cuda.is_available():
        return []
    work = "{:,} digits on a GPU, {}, every loss in TensorBoard"
    sizes = {"gpu-minibatch": (MNIST, 1 if quick else 5, BATCH), "gpu-full": (SMALL, UPDATES, None)}
    found = []
    for name, (count, epochs, batch) in sizes.items():
        size = {"rows": count, "epochs": epochs, "batch": batch}
        sides = (
            Side("fit by CUDA graphs", partial(graphs, **size)),
            Side("eager loop", partial(loop, **size), faster=5),
            Side("torch.compile of the update", partial(loop, **size, compiled=True), faster=2),
            Side("fit without graphs", partial(graphs, **size, recorded=False)),
        )
        what = f"batches of {batch}" if batch else "full batch"
        found.append(Row(name, work.format(count, what), sides, "s/epoch", digits=True))
    return found


def graphs(
    job: Job,
    rows: int,
    epochs: int,
    batch: int | None,
    recorded: bool = True,
    device: str = "cuda",
) -> Prepared:
    """Ours; a full batch counts as an epoch."""
    length = {"batch_size": batch, "updates_per_step": PER_STEP}
    if not batch:
        length["passes_per_epoch"] = epochs
    data = digits(job, rows, **length)
    warm(data)

    def run() -> Run:
        model = ParityRegressor(lr=LR, cuda_graph=recorded)
        most = epochs if batch else 1
        fit(model, data, job, accelerator=device, max_epochs=most)
        return Run(weights(model.weight, model.bias), epochs)

    return run


def loop(
    job: Job,
    rows: int,
    epochs: int,
    batch: int | None,
    compiled: bool = False,
    device: str = "cuda",
) -> Prepared:
    """The formula in place on the rows in the memory of the GPU; every loss is kept there."""
    table = digits(job, rows).tables["train"]
    x, y = table.x.to(device), table.y.to(device)
    change: Callable[..., Any] = torch.compile(_update) if compiled else _update
    state = torch.zeros(x.shape[1], device=device), torch.zeros((), device=device)
    for some in list(_batches(x, y, 1, batch))[:: max(1, len(y) // (batch or len(y)))]:
        change(*some, *(values.clone() for values in state))  # of each shape, off the clock

    @torch.no_grad()
    def run() -> Run:
        w, b = (values.clone() for values in state)
        losses = [change(*rows, w, b) for rows in _batches(x, y, epochs, batch)]
        torch.stack(losses).tolist()
        return Run(weights(w, b), epochs)

    return run


def _update(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    r = torch.addmv(b, x, w) - y
    loss, scaled = r.dot(r) / len(r), r * (2 / len(r))
    w.sub_(scaled @ x, alpha=LR)
    b.sub_(scaled.sum(), alpha=LR)
    return loss


def _batches(
    x: Tensor, y: Tensor, epochs: int, batch: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(epochs):
        if batch is None:
            yield x, y
        else:
            for index in order(len(y), epoch).to(x.device).split(batch):
                yield x.index_select(0, index), y.index_select(0, index)
