"""The progress bar of the command line."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

PER_SECOND = 10  # drawings: one takes longer than a small update


class UpdateProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the losses of the run, drawn ten times per second.

    It counts steps: with `updates_per_step` above 1, each makes so many updates.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=PER_SECOND)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:
            text = f"Epoch {trainer.current_epoch}"  # without "/-2" if only updates bound the run
            self.progress.update(self.train_progress_bar_id, description=text)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        items = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in items.items() if name != "v_num"}
