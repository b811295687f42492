"""Checkpoints of a run: written whole or not at all, the best and the last."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gd.loading import local, read
from lightning_gd.refusals import whole_number


class SafeCheckpointIO(CheckpointIO):
    """Writes a checkpoint beside its target, syncs and renames it; loads by `read`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the file, or leave the one that is there untouched.

        Raises:
            OSError: If the disk is full, or the folder cannot be written.
        """
        target, buffer = Path(local(path)), io.BytesIO()
        # No other process writes this name, and what a killed one left of it is written over.
        partial = target.with_name(f".{target.name}.partial")
        torch.save(checkpoint, buffer)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            _sync_folder(target.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            kept = "the one before it is untouched" if target.exists() else "there is none yet"
            raise OSError(f"checkpoint {target} was not written: {error}; {kept}") from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load to the CPU; `weights_only` is not asked, nothing else is ever loaded."""
        return read(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file, if it is there."""
        Path(path).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last; a system that cannot open folders does it by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best and the last checkpoint of a run: `best.ckpt`, `last.ckpt`.

    The best is that of the lowest `val/loss` where a validation part exists, looked at after
    each validation, else of the lowest `train/loss` of an epoch; test data are never looked at.

    Args:
        dirpath: Folder; null for `checkpoints` in that of the run.
        every_n_updates: Save the last after every so many updates; null: at the end of each
            epoch.
    """

    def __init__(self, dirpath: str | None = None, every_n_updates: int | None = None) -> None:
        whole_number("every_n_updates", every_n_updates, 1, optional=True)
        super().__init__(
            dirpath=dirpath,
            filename="best",
            mode="min",
            save_last=True,
            every_n_epochs=1,
            enable_version_counter=False,  # one name each, which is replaced as a whole
        )
        self.every_n_updates = every_n_updates
        self._validated, self._saved = -1, 0  # at which update

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose what to watch, now that the data are known."""
        self.monitor = "val/loss" if trainer.enable_validation else "train/loss"
        self._validated, self._saved = -1, 0
        super().setup(trainer, pl_module, stage)
        trial: Any = getattr(trainer, "fast_dev_run", False)  # which writes nothing
        if stage == "fit" and self.dirpath and not trial and trainer.is_global_zero:
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)  # now, not after the updates

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save the last in the midst of an epoch; its end, or a validation, comes first."""
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if loop._num_ready_batches_reached() or loop._should_check_val_fx(fetcher):
            return
        if self._due(trainer) or loop._is_training_done:
            self._save(trainer, last=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best in the midst of an epoch."""
        self._validated = trainer.global_step
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._save(trainer, best=True, last=self._due(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, where what it is chosen by has just been measured, and the last."""
        measured = self.monitor == "train/loss" or self._validated == trainer.global_step
        loop, every = trainer.fit_loop, self.every_n_updates
        last = every is None or self._due(trainer) or bool(loop.done)
        # An epoch that max_steps cut short was saved before its end, to go on from there.
        self._save(
            trainer, best=measured, last=last and loop.epoch_loop._num_ready_batches_reached()
        )

    def _due(self, trainer: Trainer) -> bool:
        every = self.every_n_updates
        return every is not None and trainer.global_step % every == 0

    def _save(self, trainer: Trainer, *, best: bool = False, last: bool = False) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not fitting or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        candidates = self._monitor_candidates(trainer)
        if best:
            self._save_topk_checkpoint(trainer, candidates)
        if last and self._saved != trainer.global_step:  # batches without an update add nothing
            self._saved = trainer.global_step
            self._save_last_checkpoint(trainer, candidates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best so far, if it is in this folder; the folder may have moved."""
        best = Path(str(self.dirpath), "best.ckpt")
        if state_dict.get("best_k_models") and best.is_file():
            here, score = str(best), state_dict["best_model_score"]
            paths = {"best_model_path": here, "kth_best_model_path": here}
            state = {**state_dict, **paths, "best_k_models": {here: score}, "last_model_path": ""}
            super().load_state_dict({**state, "dirpath": self.dirpath})
