"""How many updates go into one `training_step`, and Lightning's counters for them.

Lightning counts batches; a block of k updates must count as k batches, so that `max_steps`,
`limit_train_batches`, validation intervals, progress bars and resuming mean what they mean
without blocks. This is the only room that touches those counters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

# Callbacks that look at single batches, but for which the end of a block is as good a moment.
_CONTENT_WITH_BLOCKS = (Checkpoint, EarlyStopping, ModelSummary, ProgressBar, Timer)


class BlockSchedule:
    """Says where a block must end in the run of one Trainer.

    Args:
        trainer: The Trainer whose events bound the blocks.
        limit: The most updates in a block; `None` leaves it to the data.
        accumulate: Batches that make one update.
    """

    def __init__(self, trainer: Trainer, limit: int | None, accumulate: int = 1) -> None:
        self.trainer, self.limit, self.accumulate = trainer, limit, accumulate
        self._leave_ended_epoch()

    def _leave_ended_epoch(self) -> None:
        """Go on behind an epoch that had ended when its checkpoint was saved.

        A run bounded by `max_steps` would end that epoch a second time and skip the next; one
        bounded by `max_epochs` does as here by itself.
        """
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        own: Any = _Loop.restarting  # what the fit loop's own setter would undo
        if loop.restarting and epochs.ready == epochs.started == epochs.processed:
            own.fset(loop, False)

    @property
    def epoch(self) -> int:
        """The epoch whose order of rows is due."""
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        return epochs.processed

    @property
    def done(self) -> int:
        """Batches of this epoch that are done, also after a resume in its midst."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def take(self, remaining: int, most: int) -> int:
        """Decide the size of the next block and count all but its last batch as done.

        Args:
            remaining: Batches left in the data of this epoch.
            most: The most that the data would put into one block.
        """
        limit = most if self.limit is None else self.limit
        size = max(1, min(limit, remaining, *self._distances()))
        self._count(size - 1)
        return size

    def _distances(self) -> list[int]:
        """Batches until the next event, for each kind of event."""
        trainer, step = self.trainer, self.trainer.global_step
        left = int(min(trainer.num_training_batches, 2**62)) - self.done
        if self.accumulate > 1:  # one update a block: its last batch ends it
            return [left, self.accumulate - self.done % self.accumulate]
        distances = [left]
        if trainer.max_steps != -1:
            distances.append(trainer.max_steps - step)
        if trainer.enable_validation and isinstance(trainer.val_check_batch, int):
            counted = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            done = counted if trainer.check_val_every_n_epoch is None else self.done
            distances.append(trainer.val_check_batch - done % trainer.val_check_batch)
        return distances + [self._distance(callback, step) for callback in trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue]

    def _distance(self, callback: Callback, step: int) -> int:
        every = getattr(callback, "every_n_updates", None)
        if every is None and isinstance(callback, ModelCheckpoint):
            every = callback._every_n_train_steps
        if every is not None:
            return every - step % every if every > 0 else 2**62
        if isinstance(callback, _CONTENT_WITH_BLOCKS):
            return 2**62
        hooks = ("on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step")
        watches = any(is_overridden(hook, callback) for hook in hooks)
        return 1 if watches else 2**62

    def _count(self, extra: int) -> None:
        loop = self.trainer.fit_loop
        progress = loop.epoch_loop.batch_progress
        progress.increment_by(extra)  # clears is_last_batch, which is set after the fetch
        loop.epoch_loop._batches_that_stepped += extra
        if loop._data_fetcher is not None:
            loop._data_fetcher.fetched += extra
