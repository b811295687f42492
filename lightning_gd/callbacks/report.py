"""What a run did, as one table at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_gd.module import GradientDescentModule


class EndTable(Callback):
    """Collects what a fit did and prints it as a table."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}
        self.metrics: dict[str, float] = {}
        self.deferred = False  # whether a test follows, and somebody else shows the table then
        self._started, self._first = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started, self._first = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and evaluate the training data after the last update."""
        seconds = time.perf_counter() - self._started
        hparams, updates = pl_module.hparams, trainer.global_step - self._first
        self.rows = {
            "model": type(pl_module).__name__,
            "gradient": _road(pl_module),
            "updates": f"{updates:,}" + (f" (to {trainer.global_step:,})" if self._first else ""),
            "seconds": f"{seconds:.2f}",
            "learning rate": f"{hparams.get('lr', float('nan')):g}",
            "processes": f"{trainer.world_size} × {trainer.strategy.root_device.type}",
        }
        self.add(trainer.callback_metrics)
        if isinstance(pl_module, GradientDescentModule):
            final = pl_module.final_losses()
            self.add(final)
            pl_module.curves.record(trainer.global_step, dict(final))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table, unless a test follows."""
        if not self.deferred:
            self.show(trainer)

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Put metrics such as `test/accuracy` into the table; later values win."""
        self.metrics.update({name: float(value) for name, value in metrics.items()})

    def show(self, trainer: Trainer) -> None:
        """Print the table, on the first process."""
        if not trainer.is_global_zero:
            return
        table = Table(show_header=False, box=HORIZONTALS)
        table.add_column(style="bold")
        table.add_column()
        for name, text in {**self.rows, **_metric_rows(self.metrics), **_places(trainer)}.items():
            table.add_row(name, text)
        console = Console()
        # A path is never broken: the terminal wraps what is too long, and it can still be copied.
        console.width = max(console.width, Console(width=10_000).measure(table).maximum)
        console.print(table)


def _road(module: LightningModule) -> str:
    if not isinstance(module, GradientDescentModule) or module.automatic_optimization:
        return "autograd, one update a step"
    return "explicit, from moments" if module.uses_moments else "explicit, by the formula"


def _metric_rows(metrics: dict[str, float]) -> dict[str, str]:
    shown = {}
    for part in ("train", "val", "test"):
        names = sorted(name for name in metrics if name.startswith(f"{part}/"))
        for name in sorted(names, key=lambda name: not name.endswith("/loss")):
            shown[name] = f"{metrics[name]:.6g}"
        majority = shown.pop(f"{part}/majority_accuracy", None)
        if majority is not None:
            shown[f"{part}/accuracy"] += f"   (always the commoner class: {majority})"
    return shown


def _places(trainer: Trainer) -> dict[str, str]:
    rows = {}
    # The Trainer's own log_dir asks all processes; the logger's is known here.
    logger = trainer.logger
    if logger is not None and logger.log_dir is not None:
        rows["logs"] = _shown(logger.log_dir)
    for kind in ("last", "best"):
        path = getattr(trainer.checkpoint_callback, f"{kind}_model_path", "")
        if path:
            rows[f"{kind} checkpoint"] = _shown(path)
    if logger is not None and logger.save_dir is not None:
        rows["look at it"] = f"tensorboard --logdir {_shown(logger.save_dir)}"
    return rows


def _shown(path: str) -> str:
    full = Path(path).resolve()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)
