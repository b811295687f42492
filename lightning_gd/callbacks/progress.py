"""A progress bar that counts updates."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class UpdateProgressBar(RichProgressBar):
    """Lightning's rich progress bar, without the version number of the run in its line."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The last losses, as short as they can be read."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
