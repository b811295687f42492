"""Histograms of the weights."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_gd.refusals import whole_number


class WeightHistograms(Callback):
    """Writes a histogram of every parameter before training and after an epoch.

    Args:
        most: Histograms of one parameter in a run; epochs in between are left out evenly.

    Raises:
        ValueError: If `most` is below 1.
    """

    def __init__(self, most: int = 20) -> None:
        whole_number("most", most, 1)
        self.most = most

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The start."""
        self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an epoch, as far as `most` allows; the last one is left to the end."""
        batches = max(1, int(trainer.num_training_batches))
        epochs = max(1, int(trainer.estimated_stepping_batches) // batches)
        every = max(1, -(-epochs // self.most))
        if (trainer.current_epoch + 1) % every == 0:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for name, parameter in pl_module.named_parameters():
                    if parameter.numel() > 1:
                        logger.experiment.add_histogram(
                            f"weights/{name}", parameter.data, trainer.global_step
                        )
