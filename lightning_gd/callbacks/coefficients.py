"""The coefficients of a fit on a table, in the units of the table, beside the exact solution."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_gd.data.table import TableData
from lightning_gd.data.tensors import tensor_data
from lightning_gd.models.linear import LinearRegression

CLOSE = 1e-6  # a relative distance below which the exact solution counts as reached
MOST_SHOWN = 50  # coefficients printed; the file holds all
COLUMNS = ("term", "coefficient", "exact least squares", "difference")

Rows = list[tuple[str, float, float]]  # term, coefficient, exact coefficient


class Exact(NamedTuple):
    """The least-squares solution for standardised features."""

    weight: Tensor  # w*, shape [D]
    bias: Tensor  # b*, shape []
    flat: int  # directions of weight space that the data do not determine
    largest: float  # λmax of the Hessian 2/N xᵀx
    condition_number: float  # λmax over the smallest eigenvalue that is not rounding


def least_squares(x: Tensor, y: Tensor, bias: bool) -> Exact:
    """Minimise 1/N Σ r², r = x w + b − y, by the singular values of x.

    Moments would square the condition number: for columns that differ in their sixth digit they
    leave 4 correct digits of w*, and this leaves 10. Where w* is not unique, it is the shortest.

    Args:
        x: Standardised features, shape [N, D], float64.
        y: Targets, shape [N], float64.
        bias: Whether b is fitted; else it is 0.
    """
    columns = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if bias else x
    offset = y.mean() if bias else y.new_zeros(())
    cut = 2.0**-52 * max(columns.shape)
    found = torch.linalg.lstsq(columns, (y - offset)[:, None], rcond=cut, driver="gelsd")
    theta, curvature = found.solution[:, 0], found.singular_values.square() * 2 / len(x)
    rank, largest = int(found.rank), curvature[0].clamp(min=1e-300)  # 0 if x is 0
    weight, b = (theta[:-1], theta[-1] + offset) if bias else (theta, offset)
    condition = largest / curvature[rank - 1] if rank else largest / largest
    return Exact(weight, b, len(theta) - rank, largest.item(), condition.item())


class Coefficients(Callback):
    """After a fit on `TableData`: prints the coefficients and writes `coefficients.csv`.

    Each is in target units per unit of its column, at full precision, beside the exact
    least-squares one. Where the two differ, a line says how far and why. The model needs a
    `weight` for each feature and a `bias`.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, model = tensor_data(trainer), dict(pl_module.named_parameters())
        if not (trainer.is_global_zero and isinstance(data, TableData)):
            return
        if {"weight", "bias"} - set(model) or model["weight"].shape != (data.num_features,):
            return
        weight, bias, train = model["weight"], model["bias"], data.tables["train"]
        exact = least_squares(train.x.double(), train.y.double(), bias.requires_grad)
        found = data.coefficients(weight, bias).tolist()
        best = data.coefficients(exact.weight, exact.bias).tolist()
        rows = list(zip([*data.features, "intercept"], found, best, strict=True))
        lines = _undetermined(data, exact)
        if getattr(type(pl_module), "loss", None) is LinearRegression.loss:
            lines.append(_verdict(trainer, exact, weight, bias))
        if trainer.logger is not None and trainer.logger.log_dir is not None:
            lines.append(f"every digit: {_write(rows, Path(trainer.logger.log_dir))}")
        _print(rows, data.target, lines)


def _write(rows: Rows, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coefficients.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["term", "coefficient", "least_squares", "difference"])
        writer.writerows([term, a, b, a - b] for term, a, b in rows)
    return path


def _print(rows: Rows, target: str, lines: list[str]) -> None:
    title, console = f"Coefficients for {escape(target)}", Console()
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "term" else "right", no_wrap=True)
    for term, a, b in rows if len(rows) <= MOST_SHOWN else [*rows[: MOST_SHOWN - 1], rows[-1]]:
        table.add_row(escape(term), repr(a), repr(b), f"{a - b:.1e}")
    # A number is never broken: the terminal wraps a line that is too long for it.
    console.width = max(console.width, Console(width=10_000).measure(table).maximum)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _undetermined(data: TableData, exact: Exact) -> list[str]:
    """Say which coefficients the data leave undetermined."""
    columns = zip(data.features, data.tables["train"].x.T, strict=True)
    constant = [name for name, column in columns if not column.any()]
    what = "is constant in the training rows: its scale is taken as 1, and its coefficient stays"
    lines = [f"{name} {what} where it started" for name in constant]
    if exact.flat > len(constant):
        lines.append(
            f"{exact.flat - len(constant)} of the columns follow from the others, so the data do "
            "not determine all coefficients: the smallest possible ones are shown as exact"
        )
    return lines


def _verdict(trainer: Trainer, exact: Exact, weight: Tensor, bias: Tensor) -> str:
    """Say how near the fit came to the exact solution, and what keeps it away."""
    pairs = ((weight, exact.weight), (bias, exact.bias))
    gaps = [(found.detach().cpu() - best).abs().max() for found, best in pairs]
    # The weights for a target that hardly varies are rounding errors, and no scale.
    size = max(float(exact.weight.abs().max()), 1e-9 * abs(float(exact.bias)))
    distance = float(max(gaps)) / (size or 1.0)
    if distance <= CLOSE:
        return f"the exact solution is reached to {distance:.1e} of its largest coefficient"
    group = trainer.optimizers[0].param_groups[0]
    lr, stable = group["lr"], 2 * (1 + group.get("momentum", 0.0)) / exact.largest
    plain = isinstance(trainer.optimizers[0], torch.optim.SGD)
    if not math.isfinite(distance) or plain and lr > stable:
        return (
            f"the fit diverged: lr {lr:.4g} is too large; the largest stable rate of the full "
            f"batch is {stable:.4g}, and {1 / exact.largest:.4g} is safe"
        )
    digits = "; float32 keeps 7 digits of each number: give --trainer.precision 64-true"
    return (
        f"{distance:.2g} of the largest coefficient away from the exact solution after "
        f"{trainer.global_step:,} updates: the condition number is {exact.condition_number:.3g}"
        + digits
        * (trainer.precision != "64-true")
    )
