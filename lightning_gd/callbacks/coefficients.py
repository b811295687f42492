"""What a fit on a table found, in the units of the table, beside the exact solution."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor

from lightning_gd.curvature import Curvature
from lightning_gd.data.table import TableData
from lightning_gd.models.linear import LinearRegression

CLOSE = 1e-6  # so near to the exact solution counts as there
MARGIN = 1.05
MOST_SHOWN = 50  # coefficients printed; the file has them all
DOUBLE = 2.0**-52


class Exact(NamedTuple):
    """The least-squares solution for standardised features.

    Attributes:
        weight: w*, shape [D].
        bias: b*, shape [].
        curvature: Of the loss, as gradient descent sees it.
    """

    weight: Tensor
    bias: Tensor
    curvature: Curvature

    def distance(self, weight: Tensor, bias: Tensor) -> float:
        """The largest difference, as a share of the largest weight.

        Standardised weights and the bias are all in units of the target, so they compare.
        """
        weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
        difference = torch.cat([weight - self.weight, (bias - self.bias)[None]]).abs().max()
        # A target that hardly varies has weights of rounding errors: they are no measure.
        size = max(self.weight.abs().max().item(), 1e-9 * abs(self.bias.item()))
        return difference.item() / size if size else difference.item()


def least_squares(x: Tensor, y: Tensor, bias: bool) -> Exact:
    """Minimise 1/N Σ r², r = x w + b − y, by singular values of x itself.

    Moments would square the condition number: with columns that differ in their sixth digit they
    leave 4 correct digits of w*, and this leaves 10. Undetermined directions get the shortest w*.

    Args:
        x: Standardised features, shape [N, D], float64.
        y: Targets, shape [N], float64.
        bias: Whether b is fitted; else it is 0.
    """
    columns = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if bias else x
    offset = y.mean() if bias else y.new_zeros(())
    cut = DOUBLE * max(columns.shape)
    found = torch.linalg.lstsq(columns, (y - offset)[:, None], rcond=cut, driver="gelsd")
    theta, singular = found.solution[:, 0], found.singular_values
    spectrum = torch.zeros_like(theta)
    spectrum[: len(singular)] = singular.square() * 2 / len(x)  # H = 2/N xᵀx
    curvature = Curvature(torch.diag(spectrum), rtol=cut**2)
    if bias:
        return Exact(theta[:-1], theta[-1] + offset, curvature)
    return Exact(theta, offset, curvature)


class Coefficients(Callback):
    """After a fit on `TableData`: prints the coefficients and writes `coefficients.csv`.

    Each is in target units per unit of its column, at full precision, beside the exact
    least-squares one. Where the two differ, a line says how far and why. Models other than a
    weight for each feature and a bias are left alone.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, on the first process."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        weight, bias = getattr(pl_module, "weight", None), getattr(pl_module, "bias", None)
        if not (trainer.is_global_zero and isinstance(data, TableData)):
            return
        if not (isinstance(weight, Tensor) and weight.shape == (data.num_features,)):
            return
        if not (isinstance(bias, Tensor) and bias.ndim == 0):
            return
        train = data.tables["train"]
        exact = least_squares(train.x.double(), train.y.double(), bias.requires_grad)
        pairs = (
            data.coefficients(weight, bias).tolist(),
            data.coefficients(exact.weight, exact.bias).tolist(),
        )
        rows = list(zip([*data.features, "intercept"], *pairs, strict=True))
        console, lines = Console(), _notes(data, exact)
        console.print(_table(rows, data.target))
        if getattr(type(pl_module), "loss", None) is LinearRegression.loss:
            lines += _verdict(trainer, exact, exact.distance(weight, bias))
        if trainer.logger is not None and trainer.logger.log_dir is not None:
            lines.append(f"every digit: {write(rows, Path(trainer.logger.log_dir))}")
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)


def write(rows: list[tuple[str, float, float]], folder: Path) -> Path:
    """Write (term, coefficient, exact coefficient) to `coefficients.csv`, every digit of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coefficients.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["term", "coefficient", "least_squares", "difference"])
        writer.writerows([term, a, b, a - b] for term, a, b in rows)
    return path


def _table(rows: list[tuple[str, float, float]], target: str) -> RichTable:
    table = RichTable(title=f"Coefficients for {target}", title_justify="left", box=SIMPLE_HEAD)
    for name in ("term", "coefficient", "exact least squares", "difference"):
        table.add_column(name, justify="left" if name == "term" else "right", overflow="fold")
    for term, a, b in rows if len(rows) <= MOST_SHOWN else [*rows[: MOST_SHOWN - 1], rows[-1]]:
        table.add_row(term, repr(a), repr(b), f"{a - b:.1e}")
    return table


def _notes(data: TableData, exact: Exact) -> list[str]:
    x = data.tables["train"].x
    still = [n for n, c in zip(data.features, x.T, strict=True) if bool((c == 0).all())]
    lines = [
        f"{name} is constant in the training rows: its scale is taken as 1, and its coefficient "
        "stays where it started"
        for name in still
    ]
    flat = len(exact.curvature.eigenvalues) - exact.curvature.rank - len(still)
    if flat:
        lines.append(
            f"{flat} of the columns follow from the others, so the data do not determine all "
            "coefficients: of the equally good ones the smallest are shown as exact"
        )
    return lines


def _verdict(trainer: Trainer, exact: Exact, distance: float) -> list[str]:
    """How near the fit came, and what keeps it from the exact solution."""
    if distance <= CLOSE:
        return [f"the exact solution is reached to {distance:.1e} of its largest coefficient"]
    optimizer, curvature = trainer.optimizers[0], exact.curvature
    group, plain = optimizer.param_groups[0], isinstance(optimizer, torch.optim.SGD)
    lr, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
    if not math.isfinite(distance) or plain and lr > curvature.max_lr(momentum):
        return [
            f"the fit diverged: lr {lr:.4g} is too large; the largest stable rate of the full "
            f"batch is {curvature.max_lr(momentum):.4g}, and {curvature.auto_lr:.4g} is safe"
        ]
    lines = [
        f"{distance:.2g} of the largest coefficient away from the exact solution after "
        f"{trainer.global_step:,} updates: the condition number is {curvature.condition_number:.3g}"
    ]
    if plain:
        factor = curvature.factor(lr, momentum)
        lines[0] += f", so an update leaves {factor:.8f} of the slowest part of the error"
    if trainer.precision != "64-true":
        lines.append("float32 keeps 7 digits of each number: give --trainer.precision 64-true")
    return [*lines, _way_there(curvature)]


def _way_there(curvature: Curvature) -> str:
    """The quickest rate and momentum for curvatures between λ and M (Polyak's heavy ball).

    lr = 4/(√M + √λ)² and β = ((√M − √λ)/(√M + √λ))² shrink every error by √β an update.
    """
    # At the ends of the range a rounded lr would diverge: make it wider by MARGIN.
    top = math.sqrt(curvature.largest * MARGIN)
    low = math.sqrt(curvature.smallest / MARGIN)
    root = (top - low) / (top + low)
    updates = math.ceil(math.log(CLOSE / 100) / math.log(root))
    return (
        f"about {updates:,} updates of the full batch would do: --data.batch_size null "
        f"--model.optimizer SGD --model.lr {4 / (top + low) ** 2:.6g} "
        f"--model.momentum {root**2:.10g} --trainer.max_steps {updates}"
    )
