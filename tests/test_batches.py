"""Global batches, without a Trainer; `test_fuzz.py` has the properties of random ones."""

from typing import Any

import pytest
import torch

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


def test_orders_differ_and_do_not_collide():
    loader = {"batch_size": 1, "shuffle": True}
    orders = {
        str(updates(GlobalBatches(numbered(30), seed=seed, schedule=blocks(epoch), **loader)))
        for seed in (0, 1, 2, 3, 2**32, 2**40)
        for epoch in (0, 1, 2, 2**31)
    }
    assert len(orders) == 24


@pytest.mark.parametrize("raw, y", [((4,), (4,)), ((4, 2), (4, 1)), ((4, 2), (3,)), ((0, 2), (0,))])
def test_tables_refuse_shapes_that_do_not_fit(raw, y):
    with pytest.raises(ValueError, match=r"x \["):
        Table(torch.zeros(raw), torch.zeros(y))
