"""Streams without a length, of other lengths on each process."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import trainer_words
from lightning.pytorch import LightningDataModule
from test_cli import Stream
from torch.utils.data import DataLoader

from lightning_gd.batch import EvenSteps
from lightning_gd.checkpoints import read
from lightning_gd.hooks import RunHooks

SIZES = 4, 5  # of the batches of each process


class Uneven(LightningDataModule):
    def __init__(self, rows: list[int]):
        super().__init__()
        self.rows = rows  # of each process

    def train_dataloader(self):
        trainer: Any = self.trainer
        rank = trainer.global_rank
        return EvenSteps(DataLoader(Stream(self.rows[rank]), batch_size=SIZES[rank]))


@pytest.mark.parametrize("gradient, rows", [("explicit", [30, 18]), ("autograd", [0, 38])])
def test_uneven_streams_end_together(forge, tmp_path, monkeypatch, gradient, rows):
    """Each update is that of one process with the rows that all have left."""
    monkeypatch.chdir(Path(__file__).parent)
    words = ["--model", "LinearRegression", "--data", "test_even_steps.Uneven"]
    words += ["--model.gradient", gradient, "--model.lr", "0.05", "--model.momentum", "0.5"]
    words += ["--data.rows", str(rows), "--pictures", "null"]
    many = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2}
    words += trainer_words(default_root_dir=tmp_path, limit_val_batches=0, **many)
    statuses, log = forge.run(words, world=2)
    assert statuses == [0, 0], log
    assert "all parameters tested" in log and "Warning" not in log
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], 0.05, momentum=0.5)
    for step in [*range(8), *range(8)]:
        parts = zip(rows, SIZES, strict=True)
        k = torch.cat([torch.arange(n)[size * step :][:size] for n, size in parts])
        optimizer.zero_grad()
        (w[0] * k / 10 + w[1] - k / 5).square().mean().backward()
        optimizer.step()
    found = read(str(next(tmp_path.rglob("last.ckpt"))))
    assert found["global_step"] == 16
    learnt = torch.cat([p.reshape(-1) for p in found["state_dict"].values()])
    # Numbers of size 1 in float32, and 16 contracting updates.
    torch.testing.assert_close(learnt.double(), w.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("world, wrapped, batches", [(1, 0, 9), (2, 1, 9), (2, 0, 9), (2, 0, 0)])
def test_other_streams_are_warned_of(world, wrapped, batches):
    stream = DataLoader(Stream())
    trainer: Any = SimpleNamespace(
        train_dataloader=EvenSteps(stream) if wrapped else stream,
        num_training_batches=batches or math.inf,
        world_size=world,
        global_step=0,
        is_global_zero=True,
    )
    module: Any = None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        RunHooks().on_train_start(trainer, module)
    warned = ["give the Trainer EvenSteps(loader)" in str(w.message) for w in found]
    assert warned == [True] * (not batches and world > 1 and not wrapped)


def test_one_process_has_its_own_batches():
    assert list(EvenSteps([3, None, 5])) == [3, None, 5]
