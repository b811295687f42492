"""Trains every case in one world of processes; `test_distributed.py` compares the worlds.

Run by `torchrun --nproc-per-node K tests/worlds.py FOLDER`: each process writes what it ended
with to `FOLDER/K-RANK.pt`. One process group serves all cases. `WORLDS_ACCELERATOR=gpu` gives each
process a GPU.
"""

import logging
import os
import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_gd import ParityMLP, ParityRegressor, distributed
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.gradcheck import GradientError

UPDATES = 60
ROWS = 41  # odd: no world but one divides it


class OddRows(TensorDataModule):
    """41 rows of 6 features, with targets ±1; 11 to test."""

    def load(self):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(ROWS + 11, 6, generator=generator, dtype=torch.float64)
        y = torch.where(x[:, 0] + 0.3 * x[:, 1].square() > 0.2, 1.0, -1.0).double()
        return {"train": Table(x[:ROWS], y[:ROWS]), "test": Table(x[ROWS:], y[ROWS:])}


FULL = {"passes_per_epoch": 20}
MINI = {"batch_size": 8, "seed": 4}
TINY = {"batch_size": 3, "num_val": 2}  # 39 rows
LAST = {"batch_size": 10}  # the last batch has one row: most shares are empty

HIDDEN = {"model_class": ParityMLP, "hidden": 5, "activation": "tanh", "momentum": 0.9}

CASES = {
    "explicit full": (FULL, {"momentum": 0.9}),
    "autograd full": (FULL, {"momentum": 0.9, "gradient": "autograd"}),
    "explicit mini": (MINI, {"momentum": 0.9}),
    "autograd mini": (MINI, {"momentum": 0.9, "gradient": "autograd"}),
    "explicit single": (MINI, {"momentum": 0.9, "updates_per_step": 1}),
    "explicit tiny": (TINY, {"momentum": 0.5, "gradient_clip_val": 1.0}),
    "autograd tiny": (
        TINY,
        {"momentum": 0.5, "gradient_clip_val": 1.0, "gradient": "autograd"},
    ),
    "explicit last": (LAST, {"momentum": 0.9}),
    "autograd last": (LAST, {"momentum": 0.9, "gradient": "autograd"}),
    "explicit schedule": (
        MINI,
        {"scheduler": "StepLR", "scheduler_args": {"step_size": 2}, "momentum": 0.5},
    ),
    "moments": (FULL, {"moments": True, "momentum": 0.9}),
    "moments auto": (FULL, {"moments": True, "lr": "auto"}),
    "hidden layer": (MINI, HIDDEN),
    "hidden layer, autograd": (MINI, {**HIDDEN, "gradient": "autograd"}),
    "explicit accumulate": (MINI, {"accumulate_grad_batches": 2, "momentum": 0.5}),
}


def make_trainer(**settings):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return Trainer(
        accelerator=os.environ.get("WORLDS_ACCELERATOR", "cpu"),
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        precision="64-true",
        max_epochs=-1,
        max_steps=UPDATES,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def run(data, settings):
    """Train one case and evaluate it: weights, metrics and the last training loss."""
    trainer = make_trainer()
    settings = {"model_class": ParityRegressor, "num_features": 6, "lr": 0.03, **settings}
    model_class = settings.pop("model_class")
    if model_class is ParityRegressor:
        settings["start"] = "uniform"
    with trainer.init_module():
        model = model_class(**settings)
    rows = OddRows(**data)
    trainer.fit(model, datamodule=rows)
    assert trainer.global_step == UPDATES
    train_loss = trainer.callback_metrics["train/loss"]
    # Read before the test, for which DDP is set up anew and copies the first process's weights.
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu()
    (metrics,) = trainer.test(model, datamodule=rows, verbose=False)
    return {
        "weights": weights,
        "metrics": torch.tensor([*metrics.values(), float(train_loss)], dtype=torch.float64),
    }


def run_without_reduction():
    """The case "explicit full" with the sum over processes taken out."""
    reduce_sum, distributed.reduce_sum = distributed.reduce_sum, lambda tensor: tensor
    try:
        return run(*CASES["explicit full"])
    finally:
        distributed.reduce_sum = reduce_sum


class SummedFormula(ParityRegressor):
    """A usual mistake: the sum over the rows instead of their mean."""

    def gradients(self, x, y):
        return {name: len(y) * g for name, g in super().gradients(x, y).items()}


def message_of(model_class=ParityRegressor, reduction=None, **settings):
    """What `GradientCheck` says of a planted mistake; empty if it finds nothing."""
    trainer = make_trainer(callbacks=[GradientCheck(every_n_updates=10)])
    with trainer.init_module():
        model = model_class(num_features=6, start="uniform", lr=0.001, **settings)
    reduce_sum = distributed.reduce_sum
    distributed.reduce_sum = reduction or reduce_sum
    try:
        trainer.fit(model, datamodule=OddRows(**MINI))
    except GradientError as error:
        return str(error)
    finally:
        distributed.reduce_sum = reduce_sum
    return ""


def found_mistakes():
    """The messages of `GradientCheck`, with nothing wrong and with each mistake planted."""
    reduce_sum, world = distributed.reduce_sum, distributed.world_size()
    return {
        "nothing": message_of(),
        "nothing, by autograd": message_of(gradient="autograd", gradient_clip_val=0.1),
        "sum for mean": message_of(SummedFormula),
        "no reduction": message_of(reduction=lambda tensor: tensor),
        "times the processes": message_of(reduction=lambda tensor: reduce_sum(tensor).mul_(world)),
    }


def run_all():
    """Every case by its name."""
    ends: dict[str, Any] = {name: run(*case) for name, case in CASES.items()}
    ends["found mistakes"] = found_mistakes()
    ends["broken: no reduction"] = run_without_reduction()
    return ends


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ends = run_all()
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    torch.save(ends, f"{sys.argv[1]}/{world}-{rank}.pt")
    if torch.distributed.is_initialized():  # not by a process that trains alone
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
