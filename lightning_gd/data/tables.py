"""Tables in memory, and the order of their rows in an epoch."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_gd.batch import Batch, as_batch
from lightning_gd.moments import Moments


@dataclass(eq=False)
class Table:
    """Rows in memory: `x = raw · scale + shift`, computed once, when first asked for.

    Floating tensors are converted to the precision of the run. Integers stay as they are (class
    numbers, tokens), but for inputs with a scale or shift, which become floats (pixels).

    Raises:
        ValueError: If inputs and targets differ in their number of rows, or there is no row.
    """

    on_disk: ClassVar[bool] = False
    raw: Tensor  # inputs, shape [N, ...]
    y: Tensor  # targets, shape [N, ...]
    scale: float = 1.0
    shift: float = 0.0
    labels: Tensor | None = None  # what pictures call the rows, such as digits, shape [N]
    floats: bool = False  # whether integers become floats, too

    def __post_init__(self) -> None:
        shapes = f"got x {list(self.raw.shape)}, y {list(self.y.shape)}"
        if self.raw.shape[:1] != self.y.shape[:1] or self.raw.ndim == 0:
            raise ValueError(f"x and y must have the same number of rows; {shapes}")
        if self.raw.numel() == 0:
            raise ValueError(f"x must have at least one row and one number per row; {shapes}")
        self._targets = self.y  # in the precision in which they came
        self._dtype: torch.dtype | None = None
        self._x: Tensor | None = None
        self._moments: dict[tuple[int, int], Moments] = {}
        self.y = self._cast(self.y)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Tensor:
        if self._x is None:
            self._x = self.scaled(self.raw)
        return self._x

    def scaled(self, raw: Tensor) -> Tensor:
        """Return the inputs x of raw ones."""
        if (self.scale, self.shift) == (1.0, 0.0):
            return self._cast(raw)
        return raw.to(self.dtype) * self.scale + self.shift  # torch 2.6 exports none in place

    def first_rows(self, most: int) -> Tensor:
        """Return some inputs before they are scaled."""
        return self.raw[:most]

    def _cast(self, values: Tensor) -> Tensor:
        if self.floats and not values.is_floating_point():
            return values.to(self.dtype)
        return values.to(self._dtype) if self._dtype and values.is_floating_point() else values

    @property
    def dtype(self) -> torch.dtype:  # of inputs as floats
        return self._dtype or torch.result_type(self.raw, 1.0)

    def use(self, dtype: torch.dtype | None) -> "Table":
        """Convert floating inputs and targets to `dtype`; None gives them as they came."""
        if dtype != self._dtype:
            self._dtype, self._x = dtype, None
            self.y = self._cast(self._targets)
        return self

    def part(self, rows: slice) -> "Table":
        """Return the table of some rows, which shares the memory of this one."""
        labels = None if self.labels is None else self.labels[rows]
        form = self.scale, self.shift, labels, self.floats
        return Table(self.raw[rows], self._targets[rows], *form)

    def local(self, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Return x and y of one process: every `world`-th row from row `rank` on."""
        return self.x[rank::world].contiguous(), self.y[rank::world].contiguous()

    def moments(self, rank: int = 0, world: int = 1) -> Moments:
        """Return the moments of the same rows in float64, exact for bytes; x must be [N, D]."""
        if (rank, world) not in self._moments:
            raw = Moments.of(self.raw[rank::world], self._targets[rank::world])
            self._moments[rank, world] = raw.affine(self.scale, self.shift) if raw.n else raw
        return self._moments[rank, world]

    def batch(self, rank: int = 0, world: int = 1) -> Batch:
        """Return the rows of one process as one batch."""
        return as_batch(self.local(rank, world))

    def sample(
        self, most: int | None = None, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return x and y of at most so many rows of one process; of rows on disk, of a window."""
        x, y = self.local(rank, world)
        return x[:most], y[:most]

    def targets(self) -> Tensor:
        """Return y of all rows, shape [N, ...]."""
        return self.y

    def check_finite(self, part: str, targets: bool) -> None:
        """Raise ValueError for the first number that is not finite in the precision of the run."""
        x = self.x if self.raw.is_floating_point() else self.raw
        for name, values in (("x", x), ("y", self.y))[: 1 + targets]:
            check_finite(name, values, f"the {part} rows")

    def order(self, seed: int | None, epoch: int) -> "Order":
        """Return the rows in the order of an epoch; None keeps that of the table."""
        return Order(self, seed, epoch)


class Order:
    """The rows of a table in the order of one epoch, a function of (seed, epoch)."""

    def __init__(self, table: Table, seed: int | None, epoch: int) -> None:
        self.table, count = table, len(table)
        self.rows = torch.arange(count) if seed is None else permutation(count, seed, epoch)

    def __getitem__(self, part: slice) -> Tensor:
        """Return the rows at some places of the order."""
        return self.rows[part]

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and y of these rows."""
        return self.table.x.index_select(0, rows), self.table.y.index_select(0, rows)


def permutation(count: int, seed: int, *key: int) -> Tensor:
    """Return the numbers below `count` in an order that is a function of the other arguments."""
    # A torch generator would keep 32 bits of one number; this takes several, of any size.
    source = np.random.SeedSequence(seed, spawn_key=key)
    return torch.from_numpy(np.random.default_rng(source).permutation(count))


def check_finite(name: str, values: Tensor, where: str, first: int = 0) -> None:
    """Raise ValueError for the first number that is not finite; the rows count from `first`."""
    if not len(values) or not values.is_floating_point():
        return
    if not torch.stack(values.aminmax()).isfinite().all():
        at = values.isfinite().logical_not().nonzero()[0].tolist()
        place = [at[0] + first, *at[1:]]
        raise ValueError(
            f"{name}{place} of {where} is {values[tuple(at)]}: every number must be finite"
        )
