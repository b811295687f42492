"""Modules of other people on two processes whose batches differ in rows.

`torchrun --nproc-per-node 2 tests/test_any_module_processes.py FOLDER CASE...` writes what each
process was told to `FOLDER/RANK.pt`.
"""

import logging
import os
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from any_modules import LOSSES, MODULES, Batches, Plain, rows, spoil
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from test_distributed import launch
from torch import nn
from torch.nn import functional as F

from lightning_gd import GradientCheck, GradientError


class Unreduced(Callback):
    """What `no_sync` does, for a whole fit."""

    def on_train_start(self, trainer: Any, pl_module):
        trainer.model.require_backward_grad_sync = False


class Deaf(Callback):
    """Replaces the reduction by a hook that communicates nothing."""

    def on_train_start(self, trainer: Any, pl_module):
        trainer.model.register_comm_hook(None, keep)


def linear():
    return Plain(nn.Linear(6, 1), lambda found, y: F.mse_loss(found[:, 0], y.double()))


def keep(_, bucket):
    """A communication hook that communicates nothing."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def told(make, batch=rows, layer="", counts=(5, 3), loss=None, callbacks=(), unused=False):
    """Train; the error and the warnings on this process, and how many checks were made."""
    torch.manual_seed(0)
    module = make().double()
    if layer:
        spoil(module, layer)
    rank = int(os.environ["RANK"])
    torch.manual_seed(10 + rank)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    check, error = GradientCheck(loss=loss), ""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=unused),
        precision="64-true",
        max_steps=4 if loss is None else 8,
        max_epochs=-1,
        callbacks=[check, *callbacks],
        use_distributed_sampler=False,
        **dict.fromkeys(off, False),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, Batches([double(batch(counts[rank])) for _ in range(3)]))
        except GradientError as found:
            error = str(found)
    said = [str(w.message) for w in caught if "GradientCheck" in str(w.message)]
    return {"error": error, "said": said, "checks": check.checks, "steps": trainer.global_step}


def double(batch):
    from lightning_gd.gradcheck.twin import converted

    return converted(batch, torch.float64)


def foreign(name, wrong):
    make, batch, layer = MODULES[name]
    settings = {"loss": LOSSES.get(name), "unused": name in ("tasks", "GAN")}
    return told(make, batch, layer if wrong else "", (4, 3), **settings)


CASES = {
    "linear": partial(told, linear),
    "even": partial(told, linear, counts=(4, 4)),
    "hook": partial(told, linear, callbacks=[Deaf()]),
    "no_sync": partial(told, MODULES["metrics"][0], callbacks=[Unreduced()]),
}
for name in MODULES:
    CASES |= {name: partial(foreign, name, False), f"wrong {name}": partial(foreign, name, True)}

if __name__ == "__main__":
    import time
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in sys.argv[2:] or CASES:
        t = time.time()
        try:
            out = CASES[name]()
        except Exception as e:
            out = repr(e)[:300]
        if os.environ["RANK"] == "0": print(name, f"{time.time()-t:.1f}", str(out)[:400], flush=True)
    torch.distributed.destroy_process_group()
