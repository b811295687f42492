"""The verbs of the command line beside Lightning's: `check` and `export`."""

import inspect
from itertools import pairwise
from pathlib import Path
from pydoc import locate
from typing import Any

from lightning.pytorch import LightningModule
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_gd.batch import draw
from lightning_gd.data.tensors import TensorDataModule
from lightning_gd.export import export
from lightning_gd.gradcheck import GradientReport, check_gradients
from lightning_gd.module import GradientDescentModule

CHECKED = 32  # rows
UNFIT = ("loss raised RuntimeError", "loss raised IndexError")  # of shapes and dtypes, mostly


def refuse_foreign(words: list[str]) -> None:
    """Refuse another LightningModule, whose class the parser would say it cannot find."""
    pairs = pairwise([part for word in words for part in word.split("=", 1)])
    names = [value for option, value in pairs if option == "--model" and "." in value]
    for name in names:
        cls: Any = None if name.endswith((".yaml", ".yml")) else locate(name)
        foreign = inspect.isclass(cls) and issubclass(cls, LightningModule)
        if foreign and not issubclass(cls, GradientDescentModule):
            raise ValueError(
                f"{name} is not a GradientDescentModule: train it with Lightning's Trainer and "
                "GradientCheck(); only the verb check accepts it"
            )


def check(model: Any, data: Any) -> None:
    """Print what the gradient check finds on some training rows; raise for a mistake."""
    data.prepare_data()
    data.setup("fit")
    tables = isinstance(data, TensorDataModule)
    batch = data.sample("train") if tables else next(iter(data.train_dataloader()))
    report = check_gradients(model, draw(batch, CHECKED, seed=0))
    if report.failure:
        hint = f". If {type(data).__name__} is not the data of this model, set --data"
        fits = not report.failure.startswith(UNFIT)
        raise ValueError(f"{report}{'' if fits else hint}")
    print_report(report, f"The gradient of {type(model).__name__}")
    report.raise_if_wrong()


def export_trained(model: Any, data: Any, checkpoint: dict[str, Any], path: Path) -> None:
    """Write the model of a checkpoint to a file, and say what goes in and comes out."""
    data.prepare_data()
    if state := checkpoint.get(type(data).__qualname__):  # the scaling of a table
        data.load_state_dict(state)
    data.setup("fit")
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    print(export(model, data, path))


def print_report(report: GradientReport, title: str) -> None:
    """Print one row per parameter: the slopes along a direction, and the verdict."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    kinds = list(dict.fromkeys(kind for p in report.parameters for kind in p.slopes))
    for name in ("parameter", *kinds, "error", "bound", ""):
        table.add_column(name, justify="left" if name in ("parameter", "") else "right")
    for p in report.parameters:
        slopes = (f"{p.slopes[kind]:.7g}" if kind in p.slopes else "" for kind in kinds)
        table.add_row(escape(p.name), *slopes, f"{p.error:.1e}", f"{p.bound:.1e}", p.verdict)
    console = Console()
    console.print(table)
    if report.note:
        console.print(report.note, highlight=False, markup=False, soft_wrap=True)
