"""Global batches: the same rows in the same order, whatever the number of processes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gd.data.tensors import GlobalBatches, Table


class Blocks:
    """Ends blocks where a list of sizes says, in the place of a Trainer."""

    def __init__(self, epoch=0, done=0, sizes=()):
        self.epoch, self.done, self.sizes = epoch, done, list(sizes)

    def take(self, remaining, most):
        size = self.sizes.pop(0) if self.sizes else 1
        return min(size, remaining, most)


def blocks(*args) -> Any:
    return Blocks(*args)


def numbered(rows):
    x = torch.arange(rows, dtype=torch.float64)
    return Table(torch.stack([x, x + 0.5], 1), -x)


def updates(loader):
    """For each update the row numbers of this process, and the rows over all of them."""
    found = []
    for batch in loader:
        for x, y, total in batch.shares():
            assert torch.equal(x[:, 0], -y) and torch.equal(x[:, 1], x[:, 0] + 0.5)
            found.append(([int(row) for row in x[:, 0]], total))
    return found


LOADERS = {
    "rows": st.integers(1, 40),
    "batch_size": st.none() | st.integers(1, 45),
    "seed": st.integers(0, 2**70),
    "epoch": st.integers(0, 2**40),
    "shuffle": st.booleans(),
}
CASES = settings(max_examples=100, deadline=None)


@CASES
@given(world=st.integers(1, 5), moves=st.booleans(), sizes=st.lists(st.integers(1, 9)), **LOADERS)
def test_every_row_once_and_the_same_batches_for_every_world(
    world, moves, sizes, rows, batch_size, seed, epoch, shuffle
):
    table, settings = numbered(rows), {"batch_size": batch_size, "shuffle": shuffle, "seed": seed}
    alone = GlobalBatches(table, **settings, schedule=blocks(epoch))
    ranks = [
        GlobalBatches(
            table, rank=r, world=world, moves=moves, schedule=blocks(epoch, 0, sizes), **settings
        )
        for r in range(world)
    ]
    expected = updates(alone)
    assert sorted(row for update, _ in expected for row in update) == list(range(rows))
    size = min(batch_size or rows, rows)
    assert [len(update) for update, _ in expected] == [
        min(size, rows - first) for first in range(0, rows, size)
    ]
    if not shuffle or size == rows:
        assert [row for update, _ in expected for row in update] == list(range(rows))
    shares = [updates(loader) for loader in ranks]
    for k, (update, total) in enumerate(expected):
        assert total == len(update)
        for rank, share in enumerate(shares):
            assert share[k] == (update[rank::world], total)
    assert {len(loader) for loader in (*ranks, *shares)} == {len(expected)}


@CASES
@given(done=st.integers(0, 50), **LOADERS)
def test_the_order_is_a_function_of_seed_and_epoch(done, rows, batch_size, seed, epoch, shuffle):
    table, settings = numbered(rows), {"batch_size": batch_size, "shuffle": shuffle, "seed": seed}
    first = updates(GlobalBatches(table, **settings, schedule=blocks(epoch)))
    torch.rand(1)  # whatever else draws
    resumed = updates(GlobalBatches(table, **settings, schedule=blocks(epoch, done)))
    assert resumed == first[done:]


def test_orders_differ_and_do_not_collide():
    loader = {"batch_size": 1, "shuffle": True}
    orders = {
        str(updates(GlobalBatches(numbered(30), seed=seed, schedule=blocks(epoch), **loader)))
        for seed in (0, 1, 2, 3, 2**32, 2**40)
        for epoch in (0, 1, 2, 2**31)
    }
    assert len(orders) == 24


@given(rows=st.integers(1, 20), passes=st.integers(1, 30), world=st.integers(1, 5))
def test_passes_of_the_full_batch(rows, passes, world):
    for rank in range(world):
        place = {"passes": passes, "rank": rank, "world": world}
        loader = GlobalBatches(numbered(rows), schedule=blocks(0, 0, [4, 7]), **place)
        assert updates(loader) == [(list(range(rows))[rank::world], rows)] * passes
        assert len(loader) == passes


@pytest.mark.parametrize("raw, y", [((4,), (4,)), ((4, 2), (4, 1)), ((4, 2), (3,)), ((0, 2), (0,))])
def test_tables_refuse_shapes_that_do_not_fit(raw, y):
    with pytest.raises(ValueError, match=r"x \["):
        Table(torch.zeros(raw), torch.zeros(y))
