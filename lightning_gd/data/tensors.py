"""Tables in memory, the loader of global batches, and the DataModule that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_gd.batch import Batch, Sizes, whole
from lightning_gd.moments import Moments
from lightning_gd.refusals import SEEDS, whole_number

if TYPE_CHECKING:
    from lightning_gd.blocks import BlockSchedule

EVALUATION_ROWS = 8192  # rows gathered at once when a part is evaluated
MOVED_ELEMENTS = 2**22  # numbers sent to another device for one block of mini-batches
READ_ELEMENTS = 2**28  # numbers read in one block: a fraction of a second
MOST_UPDATES = 128  # updates in a block at most, so that a progress bar moves


class Table:
    """Rows in memory: `x = raw · scale + shift`, normalised once, when first asked for.

    Args:
        raw: Inputs, shape [N, D]; uint8 pixels or floats.
        y: Targets, shape [N].
        scale: Factor on every input.
        shift: Added to every scaled input.
        labels: What pictures call the rows, such as digits, shape [N].

    Raises:
        ValueError: If the shapes do not fit, or there is no row.
    """

    def __init__(
        self,
        raw: Tensor,
        y: Tensor,
        scale: float = 1.0,
        shift: float = 0.0,
        labels: Tensor | None = None,
    ) -> None:
        if raw.ndim < 2 or y.shape != raw.shape[:1]:
            raise ValueError(
                f"x must have shape [N, D] and y [N]; got x {list(raw.shape)}, y {list(y.shape)}"
            )
        if len(y) == 0:
            raise ValueError(f"a table needs at least one row; got x {list(raw.shape)}")
        self.raw, self.y, self.scale, self.shift, self.labels = raw, y, scale, shift, labels
        self.dtype = raw.dtype if raw.is_floating_point() else torch.get_default_dtype()
        self._x: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Tensor:
        """The inputs as the model sees them, shape [N, D]."""
        if self._x is None or self._x.dtype != self.dtype:
            plain = (self.scale, self.shift) == (1.0, 0.0)
            x = self.raw.to(self.dtype, copy=not plain)
            self._x = x if plain else x.mul_(self.scale).add_(self.shift)
        return self._x

    def use(self, dtype: torch.dtype) -> Table:
        """Hold inputs and targets in this precision from now on."""
        self.dtype, self.y = dtype, self.y.to(dtype)
        return self

    def moments(self, rank: int = 0, world: int = 1) -> Moments:
        """The moments of one process's rows, exact for bytes: taken of `raw`, then scaled."""
        own = Moments.of(self.raw[rank::world], self.y[rank::world])
        return own.affine(self.scale, self.shift) if own.n else own

    def without_inputs(self) -> Table:
        """The targets alone, for updates that need no rows."""
        return Table(self.raw[:, :0], self.y)

    def part(self, rows: slice | Tensor) -> Table:
        """The table of some rows; a slice shares memory with this one."""
        labels = None if self.labels is None else self.labels[rows]
        return Table(self.raw[rows], self.y[rows], self.scale, self.shift, labels)


@runtime_checkable
class HasBlocks(Protocol):
    """What the loader asks of a model that takes several updates a step."""

    uses_moments: bool

    def block_schedule(self) -> BlockSchedule:
        """Where the blocks of its run end."""
        ...


class GlobalBatches:
    """A loader whose batches are the same rows whatever the number of processes.

    The rows of batch k are `order[k·B : (k+1)·B]`, of which process r takes every world-th from
    the r-th on; nothing is padded or dropped. The order is a function of (seed, epoch) alone, so
    a resumed run reads on where it stopped.

    Args:
        table: The rows.
        batch_size: Rows of one update over all processes; `None` is all of them.
        shuffle: Draw a new order every epoch.
        seed: Of the order.
        passes: Full-batch updates an epoch.
        rank: Of this process.
        world: Number of processes.
        schedule: Where blocks of updates must end; `None`: every batch is one update.
        moves: Whether batches go to another device, and so should hold their own rows only.
    """

    def __init__(
        self,
        table: Table,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        passes: int = 1,
        rank: int = 0,
        world: int = 1,
        schedule: BlockSchedule | None = None,
        moves: bool = False,
    ) -> None:
        self.table, self.shuffle, self.seed, self.passes = table, shuffle, seed, passes
        self.moves = moves
        self.batch_size = min(batch_size or len(table), len(table))
        self.rank, self.world, self.schedule = rank, world, schedule
        self._mine: Batch | None = None

    def __len__(self) -> int:
        return self.passes * -(-len(self.table) // self.batch_size)

    def state_dict(self) -> dict:
        """Nothing to save: the place in the epoch is the Trainer's count of batches."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore; its presence tells Lightning that the loader resumes exactly."""

    def __iter__(self) -> Iterator[Batch]:
        # A generator: epoch and place are read when the first batch is asked for.
        schedule, count = self.schedule, len(self)
        done = schedule.done if schedule else 0
        order = self._order(schedule.epoch if schedule else 0)
        while done < count:
            size = schedule.take(count - done, self._most()) if schedule else 1
            yield self._full(size) if order is None else self._block(order, done, size)
            done += size

    def _order(self, epoch: int) -> Tensor | None:
        if self.batch_size == len(self.table):
            return None
        if not self.shuffle:
            return torch.arange(len(self.table))
        # A torch generator would keep 32 bits of one number; this takes two, of any size.
        source = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        return torch.from_numpy(np.random.default_rng(source).permutation(len(self.table)))

    def _most(self) -> int:
        sent = self.moves and self.batch_size < len(self.table)
        elements = self.batch_size * self.table.raw[0].numel() // self.world
        budget = MOVED_ELEMENTS if sent else READ_ELEMENTS
        return max(1, min(MOST_UPDATES, budget // max(1, elements)))

    def _full(self, passes: int) -> Batch:
        if self._mine is None:
            self._mine = share(self.table, self.rank, self.world)
        x, y, sizes = self._mine
        return Batch(x, y, Sizes(sizes.local, sizes.total, passes))

    def _block(self, order: Tensor, first: int, size: int) -> Batch:
        batches = order[first * self.batch_size : (first + size) * self.batch_size].split(
            self.batch_size
        )
        total = [len(batch) for batch in batches]
        rows = [batch[self.rank :: self.world] for batch in batches]
        local = [len(share) for share in rows] if self.world > 1 else total
        if not self.moves:
            return Batch(self.table.x, self.table.y, Sizes(local, total, rows=rows))
        mine = torch.cat(rows)  # one transfer a block
        return Batch(self.table.x[mine], self.table.y[mine], Sizes(local, total))


def share(table: Table, rank: int, world: int) -> Batch:
    """All rows of this process as one update."""
    if world == 1:
        return whole(table.x, table.y)
    if rank >= len(table):  # more processes than rows
        return whole(table.x[:0], table.y[:0], total=len(table))
    own = table.part(slice(rank, None, world)).use(table.dtype)  # no other rows are normalised
    return whole(own.x.contiguous(), own.y.contiguous(), total=len(table))


def _check_finite(part: str, table: Table, targets: bool) -> None:
    """Refuse NaN and infinities, once, and for floats by one pass without a copy."""
    for name, values in (("x", table.raw), ("y", table.y))[: 1 + targets]:
        if not torch.stack(values.aminmax()).isfinite().all():
            at = values.isfinite().logical_not().nonzero()[0].tolist()
            raise ValueError(
                f"{name}{at} of the {part} rows is {values[tuple(at)]}: every number must be finite"
            )


class TensorDataModule(LightningDataModule):
    """Feeds tables to any model; subclasses only say where the rows come from.

    Args:
        batch_size: Rows of one update, over all processes together; null is the full batch.
        passes_per_epoch: Full-batch updates that make one epoch of the Trainer.
        num_val: Rows taken from the end of the training part for validation; 0 for none.
        test_every: Updates between two points of the test curve; null: every update of the
            full batch, once an epoch for mini-batches; 0: never.
        seed: Of the order of the mini-batches, which depends on it and the epoch alone.
    """

    num_features: int | None = None  # of a row, where it is known before the rows are read

    def __init__(
        self,
        batch_size: int | None = None,
        passes_per_epoch: int = 1,
        num_val: int = 0,
        test_every: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # a checkpoint brings its data's settings along
        whole_number("batch_size", batch_size, 1, optional=True)
        whole_number("passes_per_epoch", passes_per_epoch, 1)
        whole_number("num_val", num_val, 0)
        whole_number("test_every", test_every, 0, optional=True)
        whole_number("seed", seed, 0, below=SEEDS)
        if batch_size is not None and passes_per_epoch > 1:
            raise ValueError(
                f"passes_per_epoch={passes_per_epoch} is for the full batch; with "
                f"batch_size={batch_size} an epoch is one pass: leave it at 1"
            )
        self.batch_size, self.passes_per_epoch, self.num_val = batch_size, passes_per_epoch, num_val
        self.test_every, self.seed = test_every, seed
        self.tables: dict[str, Table] = {}

    def load(self) -> dict[str, Table]:
        """Return the tables `"train"` and, where there is one, `"test"`."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the tables once, and set the validation rows aside."""
        if self.tables:
            return
        tables = self.load()
        for part, table in tables.items():
            _check_finite(part, table, targets=stage != "predict")
        if self.num_val:
            rows = len(tables["train"])
            if self.num_val >= rows:
                raise ValueError(
                    f"num_val={self.num_val} leaves no row to train on: there are {rows}"
                )
            tables["val"] = tables["train"].part(slice(rows - self.num_val, rows))
            tables["train"] = tables["train"].part(slice(0, rows - self.num_val))
        elif stage == "validate":
            raise ValueError("num_val=0 leaves nothing to validate on: set --data.num_val")
        elif self.trainer is not None:
            self.trainer.limit_val_batches = 0
        self.tables = tables

    def share(self, part: str) -> Batch:
        """This process's rows of `"train"`, `"val"` or `"test"`, as one update."""
        return share(self._part(part), *self._place())

    def moments(self, part: str) -> Moments:
        """The moments of this process's rows of a part, float64."""
        return self.tables[part].moments(*self._place())

    def train_dataloader(self) -> GlobalBatches:
        """Global batches, or blocks of them where the model takes several updates a step."""
        schedule, table = None, self._part("train")
        model = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(model, HasBlocks):
            schedule = model.block_schedule()
            table = table.without_inputs() if model.uses_moments else table
        rank, world = self._place()
        return GlobalBatches(
            table,
            self.batch_size,
            shuffle=getattr(self.trainer, "overfit_batches", 0) == 0,
            seed=self.seed,
            passes=self.passes_per_epoch,
            rank=rank,
            world=world,
            schedule=schedule,
            moves=self.trainer is not None and self.trainer.strategy.root_device.type != "cpu",
        )

    def val_dataloader(self) -> GlobalBatches | list:
        """The validation rows in order; nothing where `num_val` is 0."""
        return self._evaluation("val")

    def test_dataloader(self) -> GlobalBatches | list:
        """The test rows in order."""
        return self._evaluation("test")

    def predict_dataloader(self) -> GlobalBatches | list:
        """The test rows in order."""
        return self._evaluation("test")

    def _evaluation(self, part: str) -> GlobalBatches | list:
        if part not in self.tables:
            return []
        rank, world = self._place()
        return GlobalBatches(self._part(part), EVALUATION_ROWS, rank=rank, world=world)

    def _part(self, part: str) -> Table:
        """A table in the precision of the run, converted once and not at every step."""
        double = self.trainer is not None and self.trainer.precision == "64-true"
        table = self.tables[part]
        return table.use(torch.float64) if double else table

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
