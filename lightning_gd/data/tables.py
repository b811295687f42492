"""Tables in memory, and the loader that divides their rows into batches and steps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from lightning_gd.batch import TakesUpdates, Updates
from lightning_gd.moments import Moments


@dataclass(eq=False)
class Table:
    """Rows in memory: `x = raw · scale + shift`, computed once, when first asked for.

    Floating tensors are converted to the precision of the run. Integers stay as they are (class
    numbers, tokens), but for inputs with a scale or shift, which become floats (pixels).

    Raises:
        ValueError: If inputs and targets differ in their number of rows, or there is no row.
    """

    raw: Tensor  # inputs, shape [N, ...]
    y: Tensor  # targets, shape [N, ...]
    scale: float = 1.0
    shift: float = 0.0
    labels: Tensor | None = None  # what pictures call the rows, such as digits, shape [N]

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
            return _cast(raw, self._dtype)
        return raw.to(self.dtype) * self.scale + self.shift

    @property
    def dtype(self) -> torch.dtype:  # of inputs as floats
        return self._dtype or torch.result_type(self.raw, 1.0)

    def use(self, dtype: torch.dtype | None) -> "Table":
        """Convert floating inputs and targets to `dtype`; None gives them as they came."""
        if dtype != self._dtype:
            self._dtype, self._x = dtype, None
            self.y = _cast(self._targets, dtype)
        return self

    def part(self, rows: slice) -> "Table":
        """Return the table of some rows, which shares the memory of this one."""
        labels = None if self.labels is None else self.labels[rows]
        return Table(self.raw[rows], self._targets[rows], self.scale, self.shift, labels)

    def local(self, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Return x and y of one process: every `world`-th row from row `rank` on."""
        return self.x[rank::world].contiguous(), self.y[rank::world].contiguous()

    def moments(self, rank: int = 0, world: int = 1) -> Moments:
        """Return the moments of the same rows in float64, exact for bytes; x must be [N, D]."""
        if (rank, world) not in self._moments:
            raw = Moments.of(self.raw[rank::world], self._targets[rank::world])
            self._moments[rank, world] = raw.affine(self.scale, self.shift) if raw.n else raw
        return self._moments[rank, world]


def _cast(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values.to(dtype) if dtype and values.is_floating_point() else values


class GatheredUpdates(Updates):
    """Mini-batches of one step, gathered one by one so that their rows stay in the cache."""

    def __init__(self, table: Table, local_rows: list[Tensor]) -> None:
        super().__init__(local_rows)
        self.table = table

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rows = self.batches[number]
        return self.table.x.index_select(0, rows), self.table.y.index_select(0, rows)

    def to(self, device: torch.device | str) -> Updates:
        if torch.device(device) == self.table.y.device:
            return self
        rows, sizes = torch.cat(list(self.batches)), [len(batch) for batch in self.batches]
        x, y = (t.index_select(0, rows).to(device) for t in (self.table.x, self.table.y))
        return Updates(list(zip(x.split(sizes), y.split(sizes), strict=True)))


@dataclass(eq=False)
class GlobalBatches:
    """Loads the same batches whatever the number of processes, and finds its place by itself.

    Batch j of an epoch has the rows `order[j·B : (j+1)·B]`, of which process r takes every
    world-th from the r-th on; nothing is padded or dropped. The order is a function of (seed,
    epoch). Epoch and batch are functions of `trainer.global_step`, so a resumed run continues
    with the next row. A step of one batch is `(x, y)`, a step of several is an `Updates`.
    """

    table: Table
    batch_size: int | None = None  # B, rows of one batch over all processes; None: all rows
    passes: int = 1  # full batches per epoch
    seed: int | None = None  # of the order; None keeps that of the table
    process: tuple[int, int] = (0, 1)  # number of this process, and how many there are
    trainer: Any = None  # that trains with this loader; None: one pass, batch by batch
    updates_per_step: int = 1  # of a model that takes several
    whole: Any = None  # what is yielded as the full batch; None: `(x, y)` of the local rows

    def __post_init__(self) -> None:
        self.rows = min(self.batch_size or len(self.table), len(self.table))  # per batch
        self.batches = self.passes * -(-len(self.table) // self.rows)  # per epoch
        self.per_update, self.per_step, self.counted = 1, 1, self.trainer is not None  # batches
        model: Any = self.trainer.lightning_module if self.trainer else None
        if isinstance(model, TakesUpdates) and model.several_updates:
            self.per_update = model.batches_per_update
            self.per_step = self.updates_per_step * self.per_update
        elif self.trainer:
            self.per_update = self.trainer.accumulate_grad_batches
            varies = (isinstance(c, GradientAccumulationScheduler) for c in self.trainer.callbacks)
            # Otherwise the number of updates per batch is not fixed, and tells no place.
            self.counted = getattr(model, "automatic_optimization", True) and not any(varies)

    def __len__(self) -> int:
        return -(-self.batches // self.per_step)

    def state_dict(self) -> dict[str, Any]:
        return {}  # the place in the data follows from `trainer.global_step`

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass  # Lightning takes this method as the sign of a resumable loader

    def __iter__(self) -> Iterator[Any]:
        (epoch, first), end = self._place(), self._end  # read when the first batch is asked for
        order = self._order(epoch)
        while first < end:
            last = min((first // self.per_step + 1) * self.per_step, end)
            yield self._full(last - first) if order is None else self._mini(order, first, last)
            first = last

    @property
    def updates_per_epoch(self) -> int:
        """The number of updates per epoch; `limit_train_batches` counts steps."""
        return -(-self._end // self.per_update)

    def updates_in_epoch(self) -> int | None:
        return self.trainer.global_step % self.updates_per_epoch if self.counted else None

    def ends_step_every(self, updates: int) -> bool:
        """Tell whether a step ends after every so many updates of a run, in every epoch."""
        apart = math.gcd(updates, self.updates_per_epoch)
        return apart * self.per_update % self.per_step == 0 or apart == self.updates_per_epoch

    @property
    def _end(self) -> int:  # the number of batches per epoch that the Trainer asks for
        limit = self.trainer.num_training_batches if self.trainer else math.inf
        return int(min(self.batches, limit * self.per_step))

    def _place(self) -> tuple[int, int]:
        if self.counted:
            epoch, update = divmod(self.trainer.global_step, self.updates_per_epoch)
            return epoch, update * self.per_update
        return self.trainer.current_epoch if self.trainer else 0, 0

    def _order(self, epoch: int) -> Tensor | None:
        if self.rows == len(self.table):
            return None
        if self.seed is None:
            return torch.arange(len(self.table))
        # A torch generator would keep 32 bits of one number; this takes two, of any size.
        source = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        return torch.from_numpy(np.random.default_rng(source).permutation(len(self.table)))

    def _full(self, count: int) -> Any:
        if self.whole is None:
            self.whole = self.table.local(*self.process)
        if self.trainer is not None:  # moved once, not at every step
            self.whole = move_data_to_device(self.whole, self.trainer.strategy.root_device)
        return self.whole if count == 1 else Updates([self.whole] * count)

    def _mini(self, order: Tensor, first: int, last: int) -> Any:
        rank, world = self.process
        batches = order[first * self.rows : last * self.rows].split(self.rows)
        updates = GatheredUpdates(self.table, [rows[rank::world] for rows in batches])
        return updates if len(updates) > 1 else next(iter(updates))
