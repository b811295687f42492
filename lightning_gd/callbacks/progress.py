"""A progress bar that counts updates."""

from __future__ import annotations

import time

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

SECONDS = 0.1  # between two drawings: drawing takes longer than a small update


class UpdateProgressBar(RichProgressBar):
    """Lightning's rich progress bar, drawn by the clock rather than at each update."""

    _drawn = 0.0

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The losses, without the version number of the run."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"

    def _should_update(self, current: int, total: int | float) -> bool:
        now = time.monotonic()
        if current < total and now - self._drawn < SECONDS:
            return False
        self._drawn = now
        return True
