"""The one batch type: rows of this process, and which updates they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Sizes:
    """How the rows of a batch divide into updates.

    A plain object, not a tuple: Lightning walks through tuples when it moves a batch.

    Args:
        local: Rows of this process, one number an update; 0 is an empty share.
        total: Rows of all processes together, one number an update.
        passes: How often the same updates are made (full batch: one update, `passes` times).
        rows: Where each update's rows lie in the batch; `None`: they follow one another.
    """

    __slots__ = ("local", "passes", "rows", "total")

    def __init__(
        self,
        local: list[int],
        total: list[int],
        passes: int = 1,
        rows: Sequence[Tensor] | None = None,
    ) -> None:
        self.local, self.total, self.passes, self.rows = local, total, passes, rows

    @property
    def updates(self) -> int:
        """The number of updates in the block."""
        return len(self.local) * self.passes


class Batch(NamedTuple):
    """The rows of one block of updates.

    Attributes:
        x: Inputs of this process, shape [n, ...].
        y: Targets of this process, shape [n].
        sizes: How the rows divide into updates.
    """

    x: Tensor
    y: Tensor
    sizes: Sizes

    def shares(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield `(x, y, rows over all processes)` for each update, in order."""
        x, y, sizes = self.x, self.y, self.sizes
        if sizes.rows is not None:  # gathered one by one: each update's rows stay in the cache
            for rows, total in zip(sizes.rows, sizes.total, strict=True):
                yield x.index_select(0, rows), y.index_select(0, rows), total
            return
        parts = [(x, y, sizes.total[0])]
        if len(sizes.local) > 1:
            split = x.split(sizes.local), y.split(sizes.local), sizes.total
            parts = list(zip(*split, strict=True))
        for _ in range(sizes.passes):
            yield from parts


def whole(x: Tensor, y: Tensor, total: int | None = None) -> Batch:
    """One update over all rows given; `total` counts those of the other processes too."""
    return Batch(x, y, Sizes([len(y)], [len(y) if total is None else total]))
