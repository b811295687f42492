"""The DataModule that holds tables in memory and feeds them to any model."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor

from lightning_gd.batch import Batch
from lightning_gd.data.loader import GlobalBatches
from lightning_gd.data.tables import Table
from lightning_gd.distributed import reduce_sum, world_size
from lightning_gd.moments import Moments, MomentsBatch, takes_moments
from lightning_gd.settings import SEEDS, whole_number

EVALUATION_ROWS = 8192  # rows of all processes that are evaluated at once


class TensorDataModule(LightningDataModule):
    """Feeds tables to any model; a subclass only defines `load`.

    Args:
        batch_size: Rows of one update, over all processes together; null is the full batch.
        passes_per_epoch: Full-batch updates that make one epoch of the Trainer; mini-batches make
            one pass per epoch whatever it is.
        num_val: Rows taken from the end of the training part for validation; 0 for none.
        updates_per_step: Updates per `training_step` of a model in explicit mode. More are
            faster, and Lightning's intervals (`limit_train_batches`, `val_check_interval`,
            `on_train_batch_end`) count steps.
        moments: Read the training rows once and compute every full-batch update from their
            moments, at a cost independent of the number of rows; for least squares.
        seed: Seed of the order of mini-batches, which depends on it and the epoch alone.

    Attributes:
        tables: The tables by part: `"train"`, and where they exist `"val"` and `"test"`.
        num_features: Numbers per row of x, if they are known before the rows are read.
    """

    num_features: int | None = None

    def __init__(
        self,
        batch_size: int | None = None,
        passes_per_epoch: int = 1,
        num_val: int = 0,
        updates_per_step: int = 1,
        moments: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # a checkpoint carries the settings of its data
        whole_number("batch_size", batch_size, 1, optional=True)
        whole_number("passes_per_epoch", passes_per_epoch, 1)
        whole_number("num_val", num_val, 0)
        whole_number("updates_per_step", updates_per_step, 1)
        whole_number("seed", seed, 0, below=SEEDS)
        self.batch_size, self.passes_per_epoch, self.num_val = batch_size, passes_per_epoch, num_val
        self.updates_per_step, self.moments, self.seed = updates_per_step, moments, seed
        self.tables: dict[str, Table] = {}
        if batch_size is not None and moments:
            raise ValueError(
                f"moments=True needs the full batch: set --data.batch_size null (got {batch_size})"
            )

    def load(self) -> dict[str, Table]:
        """Return the tables `"train"` and, where there is one, `"test"`."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        first = not self.tables
        self.tables = self.tables or self._with_val(self.load())
        for part, table in self.tables.items():
            table.use(self._dtype)
            if first:
                table.check_finite(part, targets=stage != "predict")
        train = self.tables["train"]
        if train.on_disk and self.full_batch and not self.moments:
            raise ValueError(
                f"batch_size=None would read the {len(train):,} rows at each update: set "
                "--data.batch_size, --data.moments true, or a higher --data.buffer_rows"
            )
        if stage == "fit" and self.trainer is not None:
            _check_finders(self.trainer, self)
        if stage == "validate" and "val" not in self.tables:
            raise ValueError("num_val=0 leaves no rows to validate on: set --data.num_val")
        if stage in ("test", "predict") and "test" not in self.tables:
            raise ValueError("the data have no test rows: set --data.test_fraction")
        own = type(self).val_dataloader is TensorDataModule.val_dataloader
        if own and "val" not in self.tables and self.trainer is not None:
            self.val_dataloader = super().val_dataloader  # not overridden: nothing to validate on

    def teardown(self, stage: str | None = None) -> None:
        self.__dict__.pop("val_dataloader", None)  # so that the next run may validate

    def _with_val(self, tables: dict[str, Table]) -> dict[str, Table]:
        train, rows = tables["train"], len(tables["train"]) - self.num_val
        if rows <= 0:
            raise ValueError(
                f"num_val={self.num_val} leaves no row to train on: there are {len(train)}"
            )
        if self.num_val == 0:
            return tables
        return {**tables, "train": train.part(slice(rows)), "val": train.part(slice(rows, None))}

    def raw_rows(self, part: str, most: int) -> Tensor:
        """Return some inputs of a part before they are scaled, shape [N, ...]."""
        return self.tables[part].first_rows(most)

    @property
    def scaled(self) -> Callable[[Tensor], Tensor]:
        """The function of raw inputs that gives x; an exported graph holds it, too."""
        return self.tables["train"].scaled

    @property
    def full_batch(self) -> bool:
        """Whether every update sees all training rows."""
        return self.batch_size is None

    def local(self, part: str) -> tuple[Tensor, Tensor]:
        """Return x [n, ...] and y [n, ...] of the local rows, in the precision of the run."""
        return self.tables[part].local(*self._process)

    def sample(self, part: str, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Return x and y of at most so many local rows; of rows on disk, of one window."""
        return self.tables[part].sample(most, *self._process)

    def moments_of(self, part: str) -> Moments:
        """Return the moments of the local rows in float64."""
        return self.tables[part].moments(*self._process)

    def summed(self, moments: Moments) -> Moments:
        """Return moments over the rows of all processes; each of them must call this."""
        if world_size() == 1:
            return moments
        trainer: Any = self.trainer
        return moments.to(trainer.strategy.root_device).reduce(reduce_sum).to("cpu")

    def whole(self, part: str) -> Batch:
        """Return the local rows as one batch: their moments where `moments` is set."""
        if self.moments:
            return MomentsBatch(self.moments_of(part).to(dtype=self.tables[part].dtype))
        return self.tables[part].batch(*self._process)

    def train_dataloader(self) -> GlobalBatches:
        trainer: Any = self.trainer
        if trainer is not None and self.moments and not takes_moments(trainer.lightning_module):
            raise ValueError(
                "moments=True needs a least-squares model with loss_and_gradients_from_moments; "
                f"{type(trainer.lightning_module).__name__} is none: set --data.moments false"
            )
        return GlobalBatches(
            self.tables["train"],
            self.batch_size,
            passes=self.passes_per_epoch if self.full_batch else 1,
            seed=None if trainer is not None and trainer.overfit_batches else self.seed,
            process=self._process,
            trainer=trainer,
            updates_per_step=self.updates_per_step,
            whole=self.whole("train") if self.moments else None,
        )

    def val_dataloader(self) -> GlobalBatches | list:
        return self._in_order("val")

    def test_dataloader(self) -> GlobalBatches | list:
        return self._in_order("test")

    predict_dataloader = test_dataloader

    def _in_order(self, part: str) -> GlobalBatches | list:
        if part not in self.tables:
            return []
        return GlobalBatches(self.tables[part], EVALUATION_ROWS, process=self._process)

    @property
    def _dtype(self) -> torch.dtype | None:
        if self.trainer is None:
            return None  # the tables as they came
        return torch.float64 if self.trainer.precision == "64-true" else torch.get_default_dtype()

    @property
    def _process(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def tensor_data(trainer: Trainer) -> TensorDataModule | None:
    """Return the TensorDataModule of a run; None if it has other data."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TensorDataModule) else None


def _check_finders(trainer: Any, data: TensorDataModule) -> None:
    """Refuse a search of Lightning's that would measure something else, or fail within it."""
    several = data.updates_per_step > 1 and not trainer.lightning_module.automatic_optimization
    small = data.full_batch or "val" not in data.tables
    for kind in map(type, trainer.callbacks):
        if issubclass(kind, LearningRateFinder) and several:
            raise ValueError(
                f"{kind.__name__} takes one loss per step: set --data.updates_per_step 1, or "
                "--model.lr auto for least squares"
            )
        if issubclass(kind, BatchSizeFinder) and small:
            raise ValueError(f"{kind.__name__} needs --data.batch_size and --data.num_val")
