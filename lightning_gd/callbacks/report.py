"""What a run did, as one table at its end."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table


class EndTable(Callback):
    """Collects what a fit did and prints it as a table: after the fit, or after its test."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}
        self.metrics: dict[str, float] = {}
        self.deferred = False  # whether a test follows, after which the table is shown
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started, self._first = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and evaluate the training data after the last update."""
        seconds = time.perf_counter() - self._started
        updates = trainer.global_step - self._first
        hparams = pl_module.hparams
        self.rows = {
            "model": type(pl_module).__name__,
            "road": _road(hparams.get("gradient", "autograd")),
            "updates": f"{updates:,}" + (f" (to {trainer.global_step:,})" if self._first else ""),
            "seconds": f"{seconds:.2f}",
            "learning rate": f"{hparams.get('lr', float('nan')):g}",
            "processes": f"{trainer.world_size} × {trainer.strategy.root_device.type}",
        }
        self._keep(trainer)
        final = getattr(pl_module, "final_train_loss", None)
        if final is not None:
            self.metrics["train/loss"] = float(final())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table, unless a test follows."""
        if not self.deferred:
            self.show(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table that the fit left open."""
        if self.deferred and self.rows:
            self._keep(trainer)
            self.show(trainer)

    def _keep(self, trainer: Trainer) -> None:
        self.metrics.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    def show(self, trainer: Trainer) -> None:
        """Print the table, on the first process."""
        if not trainer.is_global_zero:
            return
        table = Table(show_header=False, title="Done", title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, text in {**self.rows, **_metric_rows(self.metrics), **_places(trainer)}.items():
            table.add_row(name, text)
        Console().print(table)


def _road(gradient: str) -> str:
    return {"explicit": "explicit (formula)", "autograd": "autograd"}[gradient]


def _metric_rows(metrics: dict[str, float]) -> dict[str, str]:
    rows = {name: f"{metrics[name]:.6g}" for name in sorted(metrics, key=_order) if _shown(name)}
    for part in ("val", "test"):
        majority = metrics.get(f"{part}/majority_accuracy")
        if majority is not None:
            rows[f"{part}/accuracy"] += f"   (majority class alone: {majority:.4g})"
    return rows


def _shown(name: str) -> bool:
    return name.split("/")[0] in ("train", "val", "test") and "majority" not in name


def _order(name: str) -> tuple[int, int, str]:
    part, _, metric = name.partition("/")
    return ["train", "val", "test"].index(part) if part in ("train", "val", "test") else 3, (
        0 if metric == "loss" else 1
    ), metric


def _places(trainer: Trainer) -> dict[str, str]:
    rows = {}
    if trainer.log_dir is not None:
        rows["logs"] = str(_relative(trainer.log_dir))
    checkpoint = trainer.checkpoint_callback
    for name in ("last", "best"):
        path = getattr(checkpoint, f"{name}_model_path", "")
        if path:
            rows[f"{name} checkpoint"] = str(_relative(path))
    if trainer.log_dir is not None:
        root = Path(trainer.loggers[0].save_dir or ".")
        rows["look at it"] = f"tensorboard --logdir {_relative(root)}"
    return rows


def _relative(path: str | Path) -> Path:
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
