"""Checkpoints of a run: the best by the watched loss, and the last."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best and the last checkpoint of a run in `<run>/checkpoints`.

    The best is that of the lowest `val/loss` where a validation part exists, else of the lowest
    `train/loss`; test data are never looked at.

    Args:
        dirpath: Folder; null for that of the run.
        every_n_updates: Save after every so many updates; null: at the end of each epoch.
    """

    def __init__(self, dirpath: str | None = None, every_n_updates: int | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best-{step}",
            mode="min",
            save_last=True,
            every_n_train_steps=every_n_updates,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose what to watch, now that the data are known."""
        self.monitor = "val/loss" if trainer.enable_validation else "train/loss"
        super().setup(trainer, pl_module, stage)
