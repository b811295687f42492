"""Trains every case in one world of processes; `test_distributed.py` compares the worlds.

Run by `torchrun --nproc-per-node K tests/worlds.py FOLDER`: each process writes what it ended
with to `FOLDER/K-RANK.pt`. `WORLDS_ACCELERATOR=gpu` gives each process a GPU.
"""

import logging
import os
import sys
import warnings

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_gd import ParityMLP, ParityRegressor, distributed, leastsquares
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.data.streams import StreamedTable
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.gradcheck import GradientError

UPDATES = 40
MODES = ("explicit", "autograd")


class OddRows(TensorDataModule):
    """41 rows of 6 features, with targets ±1, which no world but one divides; 11 to test."""

    def __init__(self, num_train=41, window_rows=None, **settings):
        super().__init__(**settings)
        self.num_train = num_train
        self.window_rows = window_rows  # as if they were on disk

    def load(self):
        x = torch.randn(52, 6, generator=torch.Generator().manual_seed(5)).double()
        table = Table(x, (x[:, 0] + 0.3 * x[:, 1].square() - 0.2).sign())
        parts = {"train": table.part(slice(self.num_train)), "test": table.part(slice(41, None))}
        if self.window_rows is None:
            return parts
        return {k: StreamedTable(Blocks(t), self.window_rows) for k, t in parts.items()}


class Blocks:
    """Rows in memory as a source of blocks of 1, 3 and 4 rows in turn."""

    name = "memory"

    def __init__(self, table):
        self.table, self.x, self.y = table, table.raw.to("meta"), table.y.to("meta")
        bounds = (first + k for first in range(0, len(table), 8) for k in (0, 1, 4))
        self.bounds = [*(bound for bound in bounds if bound < len(table)), len(table)]

    def read(self, start, stop):
        return self.table.raw[start:stop], self.table.y[start:stop]


class Weighted(ParityRegressor):
    """The mean that divides by Σ q instead of N, with a weight q = |x₁| of each row."""

    def rows(self, batch):
        return batch[0][:, 0].abs().sum().item()

    def loss(self, x, y):
        q = x[:, 0].abs()
        return (q * (self(x) - y).square()).sum() / q.sum()

    def gradients(self, x, y):
        q = x[:, 0].abs()
        d = 2 * q * (self(x) - y) / q.sum()
        return {"weight": d @ x, "bias": d.sum()}


class Scaled(ParityRegressor):
    """With buffers: scales of the features, and a mean of the rows that this process has seen."""

    def __init__(self, running=False, **settings):
        super().__init__(**settings)
        self.running = running
        self.register_buffer("scales", torch.linspace(0.5, 2, 6).double())
        self.register_buffer("running_mean", torch.zeros(6).double())

    def forward(self, x):
        if self.training and self.running:
            self.running_mean += 0.1 * (x.mean(0) - self.running_mean)
        return super().forward(x * self.scales)

    def gradients(self, x, y):
        r = self(x) - y
        return {"weight": 2 / len(y) * r @ (x * self.scales), "bias": 2 * r.mean()}


class SummedFormula(ParityRegressor):
    """A usual mistake: the sum over the rows instead of their mean."""

    def gradients(self, x, y):
        return {name: len(y) * g for name, g in super().gradients(x, y).items()}


FULL = {"passes_per_epoch": 20}
MOMENTS = {**FULL, "moments": True}
MINI = {"batch_size": 8, "seed": 4}
SEVERAL = {**MINI, "updates_per_step": 4}  # 6 batches per epoch: steps of 4 and of 2
TINY = {"batch_size": 3, "num_val": 2}  # 39 rows
LAST = {"batch_size": 10}  # the last batch has one row: most processes have none of it
SCHEDULE = {"scheduler": "StepLR", "scheduler_args": {"step_size": 2}, "momentum": 0.5}
HIDDEN = {"cls": ParityMLP, "hidden": 5, "activation": "tanh", "momentum": 0.9}

CASES = {
    "full": (FULL, {"momentum": 0.9}),
    "mini": (MINI, {"momentum": 0.9}),
    "tiny": (TINY, {"momentum": 0.5, "gradient_clip_val": 1.0}),
    "last": (LAST, {"momentum": 0.9}),
    "hidden layer": (MINI, HIDDEN),
    "weighted": (LAST, {"cls": Weighted}),
}
for name, (data, model) in list(CASES.items()):
    CASES[f"{name}, autograd"] = data, {**model, "gradient": "autograd"}
CASES |= {
    "several updates per step": (SEVERAL, {"momentum": 0.9}),
    "schedule": (SEVERAL, SCHEDULE),
    "accumulate": (SEVERAL, {"accumulate_grad_batches": 2, "momentum": 0.5}),
    "moments": ({**MOMENTS, "updates_per_step": 7}, {"momentum": 0.9}),
    "on disk": ({**SEVERAL, "window_rows": 12, "num_val": 5}, {"momentum": 0.9}),
    "on disk, moments": ({**MOMENTS, "window_rows": 12}, {"momentum": 0.9}),
    "moments auto": (MOMENTS, {"lr": "auto"}),
}
UPDATED = {"scheduler": "ExponentialLR", "scheduler_args": {"gamma": 0.99}}
UPDATED |= {"scheduler_interval": "update", "gradient_clip_val": 0.5, "momentum": 0.9}
PLATEAU = {"scheduler": "ReduceLROnPlateau", "scheduler_args": {"patience": 1, "factor": 0.7}}
for size in range(1, 6):  # 7 rows: most processes have none of the last batch
    CASES[f"7 rows by {size}"] = {"num_train": 7, "batch_size": size}, {"momentum": 0.5}
CASES |= {
    "7 rows by 2, autograd": ({"num_train": 7, "batch_size": 2}, {"gradient": "autograd"}),
    "clipped, by update": (SEVERAL, {**UPDATED, "accumulate_grad_batches": 3}),
    "Adam, hidden": (TINY, {**HIDDEN, "optimizer": "Adam", "momentum": 0, "lr": 0.01}),
    "plateau on val/loss": (TINY, {**PLATEAU, "momentum": 0.9}),
    "plateau, autograd": (TINY, {**PLATEAU, "gradient": "autograd"}),
    "buffers": (MINI, {"cls": Scaled, "lr": 0.01}),
    "buffers, autograd": (MINI, {"cls": Scaled, "lr": 0.01, "gradient": "autograd"}),
}


def fit(data, cls=ParityRegressor, callbacks=(), **settings):
    """Train a model with these settings from a random start; the Trainer and the model."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        accelerator=os.environ.get("WORLDS_ACCELERATOR", "cpu"),
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        precision="64-true",
        max_epochs=-1,
        max_steps=UPDATES,
        callbacks=list(callbacks),
        **dict.fromkeys(off, False),
    )
    start = {"start": "uniform"} if issubclass(cls, ParityRegressor) else {}
    with trainer.init_module():
        model = cls(**{"num_features": 6, "lr": 0.03, **start, **settings})
    trainer.fit(model, datamodule=OddRows(**data))
    return trainer, model


def run(data, settings):
    """Train one case and evaluate it: weights, metrics and the last training loss."""
    trainer, model = fit(data, **settings)
    assert trainer.global_step == UPDATES
    train_loss = float(trainer.callback_metrics["train/loss"])
    # Read before the test, for which DDP is set up anew and copies the first process's weights.
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu()
    (metrics,) = trainer.test(model, datamodule=OddRows(**data), verbose=False)
    numbers = torch.tensor([*metrics.values(), train_loss], dtype=torch.float64)
    return {"weights": weights, "metrics": numbers}


def message_of(**settings):
    """What `GradientCheck` says in a fit; empty if it finds nothing."""
    try:
        fit(MINI, callbacks=[GradientCheck(every_n_updates=10)], **{"lr": 0.001, **settings})
    except GradientError as error:
        return str(error)
    return ""


def warnings_of(**settings):
    """What a fit warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(MINI, **settings)
    return "\n".join(str(warning.message) for warning in caught)


def run_all():
    """Every case by its name, one without reduction, and the mistakes found in planted ones."""
    reduce_sum, ends = distributed.reduce_sum, {name: run(*case) for name, case in CASES.items()}
    found = {
        "nothing": message_of(),
        "nothing, by autograd": message_of(gradient="autograd", gradient_clip_val=0.1),
        "sum for mean": message_of(cls=SummedFormula),
    }

    def too_large(tensor):
        reduce_sum(tensor)[:-1].mul_(distributed.world_size())  # the last is the number of rows
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "reduce_sum", too_large)
        found["times the processes"] = message_of()
        patch.setattr(distributed, "reduce_sum", lambda tensor: tensor)
        found["no reduction"] = message_of()
        broken = run(*CASES["full"])
        patch.setattr(distributed, "reduce_sum", reduce_sum)
        patch.setattr(leastsquares, "MOST_PARAMETERS", 0)
        ends["auto, by products"] = run(*CASES["moments auto"])
    warned = {mode: warnings_of(cls=Scaled, running=True, gradient=mode) for mode in MODES}
    return {**ends, "found mistakes": found, "broken": broken, "warned": warned}


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1 + int(os.environ["RANK"]) % 2)  # not as many on each
    ends = run_all()
    torch.save(ends, f"{sys.argv[1]}/{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():  # not by a process that trains alone
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
