"""Mini-batches in plain Lightning, and the order of the rows that all sides share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision import transforms
from torchvision.datasets import MNIST as Pictures

from benchmarks.fitting import Prepared, digits, weights
from benchmarks.team import Job, Run
from lightning_gd import GradientCheck

BATCH, LR = 64, 5e-4


def order(rows: int, epoch: int) -> Tensor:
    """The order of an epoch, the same for all sides: or they would not end in the same weights."""
    source = np.random.SeedSequence(0, spawn_key=(epoch,))
    return torch.from_numpy(np.random.default_rng(source).permutation(rows))


def training_rows(job: Job, rows: int) -> tuple[Tensor, Tensor]:
    """Training digits, normalised, and their targets."""
    table = digits(job, rows).tables["train"]
    return table.x, table.y


def plain_linear(features: int) -> nn.Linear:
    """A linear layer that starts from zeros."""
    model = nn.Linear(features, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


class PlainLightning(LightningModule):
    """The same regression in plain Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = plain_linear(784)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss, logged."""
        x, y = batch
        loss = nn.functional.mse_loss(self.linear(x.flatten(1)).squeeze(1), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=LR)


class Order(Sampler[int]):
    """The order of the other sides, in place of `shuffle=True`."""

    def __init__(self, rows: int) -> None:
        self.rows, self.epoch = rows, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(order(self.rows, self.epoch - 1).tolist())


def lightning_tensors(
    job: Job, rows: int, epochs: int, every: int = 1, check: bool = False
) -> Prepared:
    """Plain Lightning on a TensorDataset, with each `every`-th loss in TensorBoard.

    With `check`, `GradientCheck` looks at each update.
    """
    table = TensorDataset(*training_rows(job, rows))
    return _plain_fit(table, job, rows, epochs, every, [GradientCheck(1)] if check else [])


def lightning_torchvision(job: Job, rows: int, epochs: int) -> Prepared:
    """Plain Lightning on torchvision's dataset with transforms."""
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    pictures = Pictures(job.root, transform=transforms.Compose(steps), target_transform=_parity)
    return _plain_fit(pictures, job, rows, epochs, every=1, callbacks=[])


def _parity(digit: int) -> Tensor:
    return torch.tensor(2.0 * (digit % 2) - 1)


def _plain_fit(
    dataset: Any, job: Job, rows: int, epochs: int, every: int, callbacks: list[Callback]
) -> Prepared:
    def run() -> Run:
        model, loader = PlainLightning(), DataLoader(dataset, BATCH, sampler=Order(rows))
        Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            logger=TensorBoardLogger(tempfile.mkdtemp(dir=job.folder)),
            log_every_n_steps=every,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, loader)
        return Run(weights(model.linear.weight, model.linear.bias), epochs)

    return run
