"""The loader that divides the rows of a table into batches and steps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from lightning_gd.batch import TakesUpdates, Updates
from lightning_gd.data.tables import Order, Table


class GatheredUpdates(Updates):
    """Mini-batches of one step, gathered one by one so that their rows stay in the cache."""

    def __init__(self, order: Order, local_rows: list[Tensor]) -> None:
        super().__init__(local_rows)
        self.order = order

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.order.take(self.batches[number])

    def to(self, device: torch.device | str) -> Updates:
        if torch.device(device) == self.batches[0].device:
            return self
        rows, sizes = torch.cat(list(self.batches)), [len(batch) for batch in self.batches]
        x, y = (values.to(device) for values in self.order.take(rows))
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

    def _order(self, epoch: int) -> Order | None:
        return None if self.rows == len(self.table) else self.table.order(self.seed, epoch)

    def _full(self, count: int) -> Any:
        if self.whole is None:
            self.whole = self.table.local(*self.process)
        if self.trainer is not None:  # moved once, not at every step
            self.whole = move_data_to_device(self.whole, self.trainer.strategy.root_device)
        return self.whole if count == 1 else Updates([self.whole] * count)

    def _mini(self, order: Order, first: int, last: int) -> Any:
        rank, world = self.process
        places = range(first * self.rows, last * self.rows, self.rows)
        local = [order[place : place + self.rows][rank::world] for place in places]
        updates = GatheredUpdates(order, local)
        return updates if len(updates) > 1 else next(iter(updates))
