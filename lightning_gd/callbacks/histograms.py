"""Histograms of the weights."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_gd.callbacks.run_folder import boards

LARGEST = 1e20  # the last bin of TensorBoard


class WeightHistograms(Callback):
    """Writes a histogram of every parameter to TensorBoard.

    At the start, after 1, 2, 4, 8, … epochs and at the end of the fit. Parameters of one number,
    or with numbers beyond 10²⁰, which TensorBoard cannot count, have none.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.global_step:  # a resumed run has its own already
            self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1).bit_count() == 1:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch.bit_count() != 1:  # else they are written
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for board in boards(trainer):
            for name, parameter in pl_module.named_parameters():
                values = parameter.detach().float()
                if values.numel() > 1 and values.abs().max() < LARGEST:  # also none that is nan
                    board.add_histogram(f"weights/{name}", values, trainer.global_step)
