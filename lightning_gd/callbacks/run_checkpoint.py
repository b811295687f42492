"""The best and the last checkpoint of a run."""

import warnings
from itertools import chain, count
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_gd.data.loader import GlobalBatches
from lightning_gd.evaluation import watched
from lightning_gd.loggers import run_folder
from lightning_gd.settings import whole_number
from lightning_gd.updates import epoch_is_complete


class RunCheckpoint(Checkpoint):
    """Keeps the best and the last checkpoint of a run: `best.ckpt`, `last.ckpt`.

    The best is that of the lowest `val/loss` after a validation, or where the run does not
    validate, of the lowest `train/loss` of an epoch. Test data are never looked at.

    Args:
        dirpath: Folder; null for `checkpoints` in the folder of the run, or without a logger in
            that of the Trainer, with a number behind if there are checkpoints already.
        every_n_updates: Save the last after every so many updates; null: at the end of each
            epoch. Checkpoints are written between steps, so `data.updates_per_step` must divide
            it, and the updates of an epoch.
    """

    def __init__(self, dirpath: str | None = None, every_n_updates: int | None = None) -> None:
        whole_number("every_n_updates", every_n_updates, 1, optional=True)
        self.dirpath, self.every_n_updates = dirpath, every_n_updates
        self.best_model_path = self.last_model_path = ""  # empty: there is none
        self.best_model_score = float("inf")
        self._folder: Path | None = None  # None writes nothing
        self._validated, self._saved = -1, 0  # at which update
        self._loaded: dict[str, Any] = {}  # the state of the run that is continued

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run before."""
        self._folder, self._validated, self._saved, self._loaded = None, -1, 0, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder before anything is computed; a continued run has its best one there."""
        if getattr(trainer, "fast_dev_run", False):
            return
        self._folder = Path(self.dirpath) if self.dirpath else _folder(trainer)
        last, best = self._folder / "last.ckpt", self._folder / "best.ckpt"
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            if last.exists() and trainer.ckpt_path is None:
                warnings.warn(f"the checkpoints in {self._folder} will be replaced", stacklevel=2)
        if self._loaded.get("best_model_path") and best.is_file():  # the folder may have moved
            self.best_model_path = str(best)
            self.best_model_score = float(self._loaded["best_model_score"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an interval that would fall inside a step."""
        loader, every = trainer.train_dataloader, self.every_n_updates
        if every and isinstance(loader, GlobalBatches) and not loader.ends_step_every(every):
            raise ValueError(
                f"checkpoint.every_n_updates={every} falls inside a step of several updates: "
                "data.updates_per_step must divide it, and the updates of an epoch"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the last within an epoch; its end and a validation save by themselves."""
        if not epoch_is_complete(trainer) and not _validates_now(trainer, batch_idx):
            self._save_within_epoch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, and the last where it is due; the end of an epoch saves by itself."""
        self._validated = trainer.global_step
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and not epoch_is_complete(trainer):
            self._save_best(trainer)
            self._save_within_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best where its metric has just been measured, and the last of a whole epoch."""
        if watched(trainer) == "train/loss" or self._validated == trainer.global_step:
            self._save_best(trainer)
        due = self.every_n_updates is None or self._is_due(trainer) or trainer.fit_loop.done
        if due and epoch_is_complete(trainer):
            self._save_last(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best_model_path": self.best_model_path, "best_model_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _is_due(self, trainer: Trainer) -> bool:
        return bool(self.every_n_updates) and trainer.global_step % self.every_n_updates == 0

    def _save_within_epoch(self, trainer: Trainer) -> None:
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if ends or self._is_due(trainer):
            self._save_last(trainer)

    def _save_best(self, trainer: Trainer) -> None:
        score = float(trainer.callback_metrics.get(watched(trainer), float("inf")))
        if self._folder and score < self.best_model_score:
            self.best_model_path, self.best_model_score = str(self._folder / "best.ckpt"), score
            trainer.save_checkpoint(self.best_model_path)

    def _save_last(self, trainer: Trainer) -> None:
        if self._folder and self._saved != trainer.global_step:  # else there was no update
            self._saved, path = trainer.global_step, str(self._folder / "last.ckpt")
            trainer.save_checkpoint(path)
            self.last_model_path = path


def _validates_now(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether a validation follows this batch."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if watched(trainer) != "val/loss" or not every:
        return False
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (batch_idx + 1) % every == 0


def _folder(trainer: Trainer) -> Path:
    """Return the folder of the run's checkpoints on every process."""
    folder = run_folder(trainer)
    found = _without_logger(trainer) if folder is None else folder / "checkpoints"
    return Path(trainer.strategy.broadcast(str(found)))


def _without_logger(trainer: Trainer) -> Path:
    """Return the folder from whose last checkpoint the run continues, or one without any."""
    root, start = Path(trainer.default_root_dir), Path(str(trainer.ckpt_path or ""))
    folders = chain([root / "checkpoints"], (root / f"checkpoints_{k}" for k in count(1)))

    def fits(folder: Path) -> bool:
        own = (folder / "last.ckpt").absolute()
        return start.absolute() == own or not any(folder.glob("*.ckpt"))

    return next(filter(fits, folders))
