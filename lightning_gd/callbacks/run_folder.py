"""What callbacks leave in the folder of a run: TensorBoard's records and CSV files."""

import csv
import inspect
import shlex
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_gd.files import whole
from lightning_gd.loggers import run_folder


def boards(trainer: Trainer) -> list[Any]:
    """Return the SummaryWriters of the TensorBoard loggers, on the first process."""
    loggers = [log for log in trainer.loggers if isinstance(log, TensorBoardLogger)]
    loggers = [log for log in loggers if getattr(log, "curves", True)]
    return [logger.experiment for logger in loggers if trainer.is_global_zero]


def description(module: LightningModule) -> str:
    """Return what was run, as Markdown: the command, the model with its formula, its settings."""
    settings = "\n".join(f"    {name}: {value}" for name, value in module.hparams.items())
    formula = textwrap.indent(inspect.getdoc(type(module)) or "", "    ")
    command = shlex.join(["python", *sys.argv])
    return f"    {command}\n\n### {type(module).__name__}\n\n{formula}\n\n{settings}"


def write_csv(trainer: Trainer, name: str, rows: Iterable[Iterable[Any]]) -> Path | None:
    """Write rows to a file and return its path; None where the run has no folder."""
    folder = run_folder(trainer)
    if folder is None:
        return None
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path
