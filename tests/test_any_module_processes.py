"""Modules of other people on two processes whose batches differ in rows.

`torchrun --nproc-per-node 2 tests/test_any_module_processes.py FOLDER CASE...` writes what each
process was told to `FOLDER/RANK.pt`.
"""

import logging
import os
import sys
import warnings
from functools import cache, partial
from typing import Any

import pytest
import torch
from any_modules import LOSSES, MODULES, Batches, Plain, rows, spoil
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from test_any_model import quiet
from test_distributed import launch
from torch import nn
from torch.nn import functional as F

from lightning_gd import GradientCheck, GradientError
from lightning_gd.gradcheck.twin import converted


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


class Gathers(Plain):
    """Its loss takes the targets of all processes, which a check cannot ask for as often."""

    def training_step(self, batch, batch_idx):
        total: Any = self.all_gather(batch[1].sum())
        return super().training_step(batch, batch_idx) * total.sum().abs()


class Waits(Plain):
    def training_step(self, batch, batch_idx):
        torch.distributed.barrier()
        return super().training_step(batch, batch_idx)


def communicating(kind):
    return kind(linear().net, linear().loss)


def keep(_, bucket):
    """A communication hook that communicates nothing."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def told(make, batch=rows, layer="", counts=(5, 3), callbacks=(), **settings):
    """Train; the error and the warnings on this process, and how many checks were made."""
    torch.manual_seed(0)
    module, check, error = make(), GradientCheck(loss=settings.pop("loss", None)), ""
    if layer:
        spoil(module, layer)
    rank = int(os.environ["RANK"])
    torch.manual_seed(10 + rank)
    batches = [converted(batch(counts[rank]), torch.float64) for _ in range(3)]
    unused = settings.pop("find_unused_parameters", False)
    trainer = quiet(
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=unused),
        callbacks=[check, *callbacks],
        use_distributed_sampler=False,
        **{"max_steps": 4, **settings},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, Batches(batches))
        except GradientError as found:
            error = str(found)
    said = [str(w.message) for w in caught if "GradientCheck" in str(w.message)]
    return {"error": error, "said": said, "checks": check.checks, "steps": trainer.global_step}


SETTINGS = {  # an update of the GAN has two steps, each of which leaves a network out
    "GAN": {"loss": LOSSES["GAN"], "find_unused_parameters": True, "max_steps": 8},
    "tasks": {"find_unused_parameters": True},
    "resnet18": {"max_steps": 1},
    "mobilenet": {"max_steps": 1},
}
LARGE = ("resnet18", "mobilenet", "transformer", "LightningTransformer")
FOREIGN = [name for name in MODULES if name != "squeezenet"]
CASES = {
    "linear": partial(told, linear),
    "even": partial(told, linear, counts=(4, 4)),
    "gathers": partial(told, partial(communicating, Gathers)),
    "waits": partial(told, partial(communicating, Waits)),
    "hook": partial(told, linear, callbacks=[Deaf()]),
    "no_sync": partial(told, MODULES["metrics"][0], callbacks=[Unreduced()]),
}
for name in FOREIGN:
    make, batch, layer = MODULES[name]
    case = partial(told, make, batch, counts=(4, 3), **SETTINGS.get(name, {}))
    CASES |= {name: case, f"wrong {name}": partial(case, layer=layer)}

foreign = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow, pytest.mark.long]) if n in LARGE else n
        for n in FOREIGN
    ],
)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What a case told each process; one pair of processes runs all quick ones, one the others."""

    @cache
    def run(large):
        folder = tmp_path_factory.mktemp("any")
        names = [name for name in CASES if (name.split()[-1] in LARGE) == large]
        launch(2, [__file__, str(folder), *names], timeout=600)
        return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]

    return lambda name: [end[name] for end in run(name.split()[-1] in LARGE)]


@foreign
def test_right_modules_pass(ends, name):
    one, other = ends(name)
    steps = SETTINGS.get(name, {}).get("max_steps", 4)
    checks = {1: 1, 4: 3, 8: 6}[steps]  # at the first, the second and the last update
    for end in (one, other):
        assert (end["error"], end["checks"], end["steps"]) == ("", checks, steps)
    assert one["said"] == other["said"]  # the batches differ in rows
    assert "the 2 processes differ in rows: at update 0" in "".join(one["said"])


@foreign
def test_a_wrong_layer_stops_both_processes(ends, name):
    for end in ends(f"wrong {name}"):
        assert "it passes through Doubled" in end["error"] and end["steps"] == 0


def test_even_rows_have_no_bias(ends):
    assert [(end["error"], end["said"], end["checks"]) for end in ends("even")] == [("", [], 3)] * 2


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_bias_is_that_of_the_definition(ends):
    torch.manual_seed(0)
    module, gradients = linear().double(), []
    for rank, count in enumerate((5, 3)):
        torch.manual_seed(10 + rank)
        loss = module.training_step(converted(rows(count), torch.float64), 0)
        found = torch.autograd.grad(loss, list(module.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    by_rows = (5 * gradients[0] + 3 * gradients[1]) / 8
    bias = (by_rows - (gradients[0] + gradients[1]) / 2).norm() / by_rows.norm()
    (one,), (other,) = (end["said"] for end in ends("linear"))
    assert one == other and f"differs by {bias:.2g} of its size" in one
    assert 0.001 < bias < 1


@pytest.mark.parametrize("name", ["gathers", "waits"])
def test_a_loss_that_communicates_is_refused_and_not_waited_for(ends, name):
    for end in ends(name):
        assert "it communicates with other processes" in end["error"] and end["steps"] == 0


@pytest.mark.parametrize("name", ["hook", "no_sync"])
def test_a_missing_reduction_is_found(ends, name):
    for end in ends(name):
        assert "the reduction is missing" in end["error"] and end["steps"] == 0


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {name: CASES[name]() for name in sys.argv[2:]}
    torch.save(found, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
