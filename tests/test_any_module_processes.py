"""Modules of other people on two processes whose batches differ in rows.

`torchrun --nproc-per-node 2 tests/test_any_module_processes.py FOLDER` writes what each process
was told to `FOLDER/RANK.pt`.
"""

import logging
import os
import sys
import warnings
from typing import Any

import pytest
import torch
from any_modules import Batches, Plain, spoil
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


def classifier():
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)]
    return Plain(nn.Sequential(*layers))


def linear():
    return Plain(nn.Linear(6, 1), lambda found, y: F.mse_loss(found[:, 0], y.double()))


def keep(_, bucket):
    """A communication hook that communicates nothing."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def told(make, wrong="", rows=(5, 3), callbacks=()):
    """Train; the error and the warnings on this process, and how many checks were made."""
    torch.manual_seed(0)
    module = make()
    if wrong:
        spoil(module, wrong)
    rank = int(os.environ["RANK"])
    torch.manual_seed(10 + rank)
    count = rows[rank]
    batches = [(torch.randn(count, 6).double(), torch.randint(3, (count,))) for _ in range(3)]
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    check, error = GradientCheck(), ""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        precision="64-true",
        max_steps=4,
        max_epochs=-1,
        callbacks=[check, *callbacks],
        use_distributed_sampler=False,
        **dict.fromkeys(off, False),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, Batches(batches))
        except GradientError as found:
            error = str(found)
    said = [str(w.message) for w in caught if "GradientCheck" in str(w.message)]
    return {"error": error, "said": said, "checks": check.checks, "steps": trainer.global_step}


CASES = {
    "classifier": lambda: told(classifier),
    "linear": lambda: told(linear),
    "even": lambda: told(linear, rows=(4, 4)),
    "wrong classifier": lambda: told(classifier, "net.1"),
    "wrong linear": lambda: told(linear, "net"),
    "hook": lambda: told(linear, callbacks=[Deaf()]),
    "no_sync": lambda: told(classifier, callbacks=[Unreduced()]),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each case told each process."""
    folder = tmp_path_factory.mktemp("any")
    launch(2, [__file__, str(folder)])
    return {name: [torch.load(folder / f"{rank}.pt")[name] for rank in (0, 1)] for name in CASES}


@pytest.mark.parametrize("name", ["classifier", "linear", "even"])
def test_right_modules_pass(ends, name):
    for end in ends[name]:
        assert (end["error"], end["checks"], end["steps"]) == ("", 3, 4)


@pytest.mark.parametrize("name", ["classifier", "linear"])
def test_uneven_rows_are_told_once_with_the_bias(ends, name):
    (one,), (other,) = (end["said"] for end in ends[name])
    assert one == other and "the 2 processes differ in rows: at update 0" in one
    assert 0.001 < float(one.split("differs by ")[1].split(" ")[0]) < 1
    assert [end["said"] for end in ends["even"]] == [[], []]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_bias_is_that_of_the_definition(ends):
    torch.manual_seed(0)
    module, gradients = linear().double(), []
    for rank, count in enumerate((5, 3)):
        torch.manual_seed(10 + rank)
        batch = torch.randn(count, 6).double(), torch.randint(3, (count,))
        loss = module.training_step(batch, 0)
        found = torch.autograd.grad(loss, list(module.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    rows = (5 * gradients[0] + 3 * gradients[1]) / 8
    bias = (rows - (gradients[0] + gradients[1]) / 2).norm() / rows.norm()
    assert f"differs by {bias:.2g} of its size" in ends["linear"][0]["said"][0]


@pytest.mark.parametrize("name", ["wrong classifier", "wrong linear"])
def test_a_mistake_stops_both_processes(ends, name):
    last = [end["error"].splitlines()[-1] for end in ends[name]]
    assert last[0] == last[1] and "2 times the gradient of loss" in last[0]
    assert [end["steps"] for end in ends[name]] == [0, 0]


@pytest.mark.parametrize("name", ["hook", "no_sync"])
def test_a_missing_reduction_is_found(ends, name):
    for end in ends[name]:
        assert "the reduction is missing" in end["error"] and end["steps"] == 0


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {name: case() for name, case in CASES.items()}
    torch.save(found, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
