"""What a run did, as one table at its end."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.text import Text
from torch import Tensor

from lightning_gd.batch import Batch
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.data.loader import GlobalBatches
from lightning_gd.data.tensors import tensor_data
from lightning_gd.distributed import RowMean
from lightning_gd.evaluation import evaluating
from lightning_gd.loggers import run_folder, viewers
from lightning_gd.module import GradientDescentModule

WIDTH = 18  # of the names


class EndTable(Callback):
    """Collects what a fit did and prints it as a table.

    Attributes:
        deferred: Whether the table is printed by a later call of `show`, after a closing test.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._rows: dict[str, str] = {}
        self._metrics: dict[str, float] = {}
        self._started, self._first = 0.0, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._rows = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which of two limits ends the run, where both are set."""
        self._started, self._first = time.perf_counter(), trainer.global_step
        loader, steps, epochs = trainer.train_dataloader, trainer.max_steps, trainer.max_epochs
        if isinstance(loader, GlobalBatches) and steps > 0 and epochs and epochs > 0:
            every = loader.updates_per_epoch
            limits = [f"max_steps={steps}", f"max_epochs={epochs} ({epochs * every:,} updates)"]
            first, other = limits if steps <= epochs * every else reversed(limits)
            if trainer.is_global_zero:
                print(f"{first} ends the run, before {other}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds, step = time.perf_counter() - self._started, trainer.global_step
        resumed, lr = f" (to {step:,})" if self._first else "", pl_module.hparams.get("lr", "")
        self._rows = {
            "model": type(pl_module).__name__,
            "gradient": pl_module.hparams.get("gradient", ""),
            "updates": f"{step - self._first:,}{resumed}",
            "seconds": f"{seconds:.2f}",
            "learning rate": f"{lr:g}" if isinstance(lr, float) else str(lr),
            "processes": f"{trainer.world_size} ({trainer.strategy.root_device.type})",
        }
        if pl_module.hparams.get("gradient") == "explicit" and step > self._first:
            why = getattr(pl_module, "not_direct", "")
            way = "SGD in CUDA graphs" if getattr(pl_module, "replays", None) else "SGD directly"
            self._rows["updated by"] = f"optimizer.step(): {why}" if why else way
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, GradientCheck):
                self._rows["gradient check"] = callback.summary()
        self._metrics = {}
        self.add(trainer.callback_metrics)
        data = tensor_data(trainer)
        if isinstance(pl_module, GradientDescentModule) and data is not None:
            self._add_final_loss(pl_module, data.whole("train").to(pl_module.device))

    def _add_final_loss(self, module: GradientDescentModule, batch: Batch) -> None:
        rows, mean, loss = batch.rows(module), RowMean(), next(module.parameters()).new_zeros(())
        with evaluating(module):
            mean.add([batch.loss(module) if rows else loss], rows)
        values = {"train/loss": mean.reduce()[0][0]}
        self.add(values)
        module.curves.record(module.trainer.global_step, values)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._rows:  # a resumed run had no update left: Lightning skips the training
            limits = f"max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs}"
            if trainer.is_global_zero:
                print(f"no update was made: the run already has {trainer.global_step:,} ({limits})")
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
            if isinstance(pl_module, GradientDescentModule):
                pl_module.curves.write(trainer)
        if not self.deferred:
            self.show(trainer)

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Put metrics such as `test/accuracy` into the table; later values win."""
        self._metrics |= {name: float(value) for name, value in metrics.items()}

    def show(self, trainer: Trainer) -> None:
        """Print the table, on the first process."""
        if not trainer.is_global_zero:
            return
        console = Console(highlight=False)
        console.rule()
        rows = {**self._rows, **_metric_rows(self._metrics), **_paths(trainer)}
        for name, text in rows.items():
            if text:  # what is too long for its line has one of its own
                between = "\n  " if WIDTH + len(text) > console.width else ""
                line = Text(name.ljust(0 if between else WIDTH), "bold")
                console.print(line.append(between + text, "default"), soft_wrap=True)
        console.rule()


def _metric_rows(metrics: dict[str, float]) -> dict[str, str]:
    rows = {}
    for part in ("train", "val", "test"):
        names = sorted(name for name in metrics if name.startswith(f"{part}/"))
        for name in sorted(names, key=lambda name: not name.endswith("/loss")):
            rows[name] = f"{metrics[name]:.6g}"
        majority = rows.pop(f"{part}/majority_accuracy", None)
        if majority is not None:
            accuracy = rows.get(f"{part}/accuracy", "")
            rows[f"{part}/accuracy"] = f"{accuracy} (majority class: {majority})"
    return rows


def _paths(trainer: Trainer) -> dict[str, str]:
    folder, kept = run_folder(trainer), trainer.checkpoint_callback
    return {
        "logs": _relative(folder),
        "last checkpoint": _relative(getattr(kept, "last_model_path", None)),
        "best checkpoint": _relative(getattr(kept, "best_model_path", None)),
        **{name: _relative(text) for name, text in viewers(trainer).items()},
    }


def _relative(path: Path | str | None) -> str:
    """Return a path relative to the working folder where it lies inside; empty for no path."""
    return str(path or "").replace(f"{Path.cwd()}{os.sep}", "")
