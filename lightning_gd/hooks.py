"""What a run of a GradientDescentModule does around its steps, beside the hooks of the model."""

import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gd.adaptation import adapt, move_to_place
from lightning_gd.batch import DataBatch, GivesUpdates, as_batch, batches_of
from lightning_gd.curves import Value
from lightning_gd.distributed import differing
from lightning_gd.evaluation import EvaluatedModule, check_batch, watched
from lightning_gd.loaders import effects
from lightning_gd.settings import arguments_of
from lightning_gd.updates import (
    STEPPED_HERE,
    epoch_is_complete,
    gradient_norm,
    step_plateaus,
    stop_if_diverged,
    updates_in_epoch,
)


class RunHooks(Callback):
    """Records updates, steps schedulers, evaluates, and stops a run that diverges.

    Every GradientDescentModule adds it by `configure_callbacks`, so that a model may override
    its own hooks without losing any of this.
    """

    def __init__(self) -> None:
        self.epoch_loss: list[Any] = [0.0, 0.0]  # Σ loss · rows of this epoch so far, Σ rows
        self.validation_loss: float | None = None  # the last one
        self._unchecked: set[str] = set()
        self._loaded_step = 0  # the updates of a checkpoint that is tested

    def setup(self, trainer: Trainer, pl_module: EvaluatedModule, stage: str) -> None:
        self.epoch_loss, self.validation_loss = [0.0, 0.0], None
        self._unchecked, self._loaded_step = {"train", "evaluation", "buffers"}, 0
        pl_module.step_losses, pl_module.not_direct = [], "one update per step"
        pl_module.replays = None
        if trainer.precision == "64-true":  # Lightning would load a checkpoint into float32 first
            pl_module.double()
        if stage == "fit":
            kept = (getattr(logger, "kept", None) for logger in trainer.loggers)
            lists = (points for points in kept if isinstance(points, list))  # of a RunLogger
            pl_module.curves.restore(max(lists, key=len, default=[]))

    def teardown(self, trainer: Trainer, pl_module: EvaluatedModule, stage: str) -> None:
        pl_module.replays = None  # their memory on the GPU

    def on_fit_start(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        path = str(trainer.ckpt_path or "")
        if Path(path).name.startswith("hpc_ckpt_") and trainer.is_global_zero:
            print(f"from {path}, which a SLURM job left: without this file the run starts anew")
        self._check_schedulers(trainer, pl_module)

    def _check_schedulers(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        """Refuse a plateau of the model's own whose `monitor` Lightning has dropped."""
        for config in () if pl_module.automatic_optimization else trainer.lr_scheduler_configs:
            own = config.frequency != STEPPED_HERE
            if own and isinstance(config.scheduler, ReduceLROnPlateau):
                raise ValueError(
                    f"{type(pl_module).__name__} configures ReduceLROnPlateau, whose `monitor` "
                    "Lightning drops in explicit mode: set --model.scheduler ReduceLROnPlateau"
                )

    def on_train_start(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        """Warn of what a DataLoader of one's own does to the run."""
        for words in effects(trainer) if trainer.is_global_zero else ():
            warnings.warn(words, stacklevel=2)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        self.epoch_loss = [0.0, 0.0]
        pl_module.batch_losses = []  # a learning rate finder may have left some

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: EvaluatedModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the shapes of the first batch before anything is computed from it."""
        self._check("train", pl_module, batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: EvaluatedModule, optimizer: Optimizer
    ) -> None:
        """Record the loss before the update that is about to be made, and the norm."""
        if pl_module.automatic_optimization:
            losses, pl_module.batch_losses = pl_module.batch_losses, []
            rows = torch.stack([count for _, count in losses])
            loss = (torch.stack([value for value, _ in losses]) * rows).sum() / rows.sum()
            pl_module.step_losses.append((loss, rows.sum()))
            pl_module.gradient_norm = gradient_norm(pl_module.parameters())
        values: dict[str, Value] = {"train/loss": pl_module.step_losses[-1][0]}
        values["update/gradient_norm"] = pl_module.gradient_norm
        if trainer.global_step == 0 or trainer.lr_scheduler_configs:
            values["update/lr"] = optimizer.param_groups[0]["lr"]
        pl_module.curves.record(trainer.global_step, values)

    def on_train_batch_end(self, trainer: Trainer, pl_module: EvaluatedModule, *_: Any) -> None:
        """Look at the losses of the step at once, and write the curves when enough is buffered."""
        self._check_buffers(trainer, pl_module)
        steps, pl_module.step_losses = pl_module.step_losses, []
        if not steps:
            return
        losses = torch.stack([loss for loss, _ in steps])
        stop_if_diverged(pl_module, trainer.global_step - len(steps), losses)
        rows = torch.tensor([float(count) for _, count in steps]).to(losses)
        self.epoch_loss[0] += (losses * rows).sum()
        self.epoch_loss[1] += rows.sum()
        if pl_module.automatic_optimization:
            for loss in losses:
                step_plateaus(pl_module, "step", loss)
        if pl_module.curves.full():
            pl_module.curves.write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        """Log the mean loss of an epoch of mini-batches, and step the plateaus by epoch."""
        total, rows = self.epoch_loss
        data = getattr(trainer, "datamodule", None)
        whole = isinstance(data, GivesUpdates) and data.full_batch
        if rows and not whole:
            pl_module.log("train/loss", total / rows, logger=False)
        if epoch_is_complete(trainer):
            # A run resumed after the last validation of an epoch has only what was saved of it.
            loss = trainer.callback_metrics.get(watched(trainer), self.validation_loss)
            step_plateaus(pl_module, "epoch", loss)

    def on_train_end(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        pl_module.curves.write(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: EvaluatedModule, batch: Any, *_: Any
    ) -> None:
        self._check("evaluation", pl_module, batch)

    def on_test_batch_start(self, *args: Any) -> None:
        self.on_validation_batch_start(*args)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        pl_module.start_evaluation()

    def on_test_epoch_start(self, *args: Any) -> None:
        self.on_validation_epoch_start(*args)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        """Log the metrics as `val/…`, on the x axis of the other curves."""
        self._end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        self._end(trainer, pl_module, "test")

    def _end(self, trainer: Trainer, module: EvaluatedModule, part: str) -> None:
        values = {f"{part}/{name}": value for name, value in module.end_evaluation().items()}
        if trainer.state.fn != "fit":  # Lightning takes `step` as the x axis of the logger
            step = float(max(trainer.global_step, self._loaded_step))
            module.log_dict({**values, "step": step}, sync_dist=True)
            return
        module.log_dict(values, logger=False, sync_dist=True)
        if not trainer.sanity_checking:
            module.curves.record(trainer.global_step, dict(values))
            loss = values.get("val/loss")
            self.validation_loss = None if loss is None else float(loss)

    def _check(self, kind: str, module: EvaluatedModule, content: Any) -> None:
        if kind in self._unchecked:
            self._unchecked.remove(kind)
            first = as_batch(next(iter(batches_of(content))))
            if isinstance(first, DataBatch):
                check_batch(module, first.content)

    def _check_buffers(self, trainer: Trainer, module: EvaluatedModule) -> None:
        """Warn after the first step of statistics that each process takes of its own rows."""
        first, self._unchecked = "buffers" in self._unchecked, self._unchecked - {"buffers"}
        names = differing(dict(module.named_buffers())) if first else []
        if names and trainer.is_global_zero:
            warnings.warn(
                f"the buffers {', '.join(names)} are not the same on all {trainer.world_size} "
                "processes: each takes them of its own rows, so the run is not that of one process,"
                " and the checkpoint has those of the first; use a layer without statistics of the "
                "batch (LayerNorm, GroupNorm), or --trainer.sync_batchnorm true on GPUs",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        epoch_loss = [float(value) for value in self.epoch_loss]
        return {"epoch_loss": epoch_loss, "validation_loss": self.validation_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch_loss = list(state_dict["epoch_loss"])
        self.validation_loss = state_dict.get("validation_loss")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: EvaluatedModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the curves up to here, and keep the length of their files and the place."""
        checkpoint["updates_in_epoch"] = updates_in_epoch(trainer)
        pl_module.curves.write(trainer)
        files = [getattr(logger, "events", dict) for logger in trainer.loggers]
        checkpoint["curve_files"] = [size() for size in files] if trainer.is_global_zero else []

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: EvaluatedModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the settings that were given anew win over those in the state of the optimizer."""
        self._loaded_step = checkpoint["global_step"]
        if trainer.state.fn == "fit":
            adapt(checkpoint, arguments_of(pl_module))
            move_to_place(checkpoint, _updates_per_batch(trainer, pl_module))


def _updates_per_batch(trainer: Trainer, module: EvaluatedModule) -> Fraction:
    """Return the number of updates per batch of Lightning: a fraction if it accumulates."""
    data = getattr(trainer, "datamodule", None)
    if module.automatic_optimization or not isinstance(data, GivesUpdates):
        return Fraction(1, trainer.accumulate_grad_batches)
    return Fraction(data.updates_per_step)
