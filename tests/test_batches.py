"""Steps of batches without a Trainer; `test_fuzz.py` has the properties of random ones."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_gd.batch import batches_of
from lightning_gd.data.loader import GlobalBatches
from lightning_gd.data.tables import Table


def trainer_at(step=0, accumulate=1, several=True, callbacks=(), limit=math.inf):
    """What the loader reads of a Trainer whose model has made `step` updates, in epoch 2."""
    model = {"several_updates": several, "batches_per_update": accumulate}
    return SimpleNamespace(
        global_step=step,
        current_epoch=2,
        num_training_batches=limit,
        accumulate_grad_batches=accumulate,
        lightning_module=SimpleNamespace(**model, automatic_optimization=not several),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        callbacks=callbacks,
    )


def loader(rows, batch_size=None, *, passes=1, seed=5, process=(0, 1), updates_per_step=1, **run):
    """Batches of the row numbers and their negatives."""
    table = Table(torch.arange(rows), -torch.arange(rows))
    settings: Any = {"passes": passes, "seed": seed, "process": process}
    settings |= {"updates_per_step": updates_per_step, "trainer": trainer_at(**run)}
    return GlobalBatches(table, batch_size, **settings)


def steps(*args, **settings):
    """For each step the local row numbers of its batches."""
    found = [list(batches_of(step)) for step in loader(*args, **settings)]
    assert all(torch.equal(x, -y) for step in found for x, y in step)
    return [[x.tolist() for x, _ in step] for step in found]


def batches(*args, **settings):
    return [batch for step in steps(*args, **settings) for batch in step]


def test_orders_differ_and_do_not_collide():
    seeds, epochs = (0, 1, 2, 3, 2**32, 2**40), (0, 1, 2, 2**31)
    orders = {str(batches(30, 1, step=30 * epoch, seed=s)) for s in seeds for epoch in epochs}
    assert len(orders) == 24


def test_an_epoch_begins_at_its_first_batch_where_updates_are_not_counted_per_batch():
    expected = batches(30, 10, step=2 * 3)
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    assert batches(30, 10, step=7, several=False, callbacks=[scheduler]) == expected
    by_hand = loader(30, 10, step=7, several=False)
    by_hand.trainer.lightning_module.automatic_optimization = False
    by_hand.__post_init__()
    assert [x.tolist() for x, _ in by_hand] == expected


def test_a_step_of_one_batch_is_what_any_loader_yields():
    several, one = loader(4, passes=3, updates_per_step=2)
    assert [len(batches_of(step)) for step in (several, one)] == [2, 1]
    assert isinstance(one, tuple) and all(batch[0] is one[0] for batch in several)
    several, one = loader(5, 2, updates_per_step=2)
    assert isinstance(one, tuple)
    moved = several.to("meta")  # gathered and sent together
    assert [(x.device.type, *x.shape, *y.shape) for x, y in moved] == [("meta", 2, 2)] * 2
    assert several.to(torch.device("cpu")) is several


def test_where_steps_end():
    """A step ends after every `every` updates only if none of these lies within a step."""
    for passes, k, limit in ((11, 4, math.inf), (12, 4, math.inf), (12, 5, 2), (3, 7, math.inf)):
        run, ends = loader(2, passes=passes, updates_per_step=k, limit=limit), {0}
        for epoch in range(60):
            run.trainer.global_step = epoch * run.updates_per_epoch
            for step in run:
                ends.add(max(ends) + len(batches_of(step)))
        for every in range(1, 25):
            assert run.ends_step_every(every) == (set(range(0, max(ends), every)) <= ends)
