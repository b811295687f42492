"""The coefficients of a fit on a table, in the units of the table, beside the exact solution."""

from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_gd.callbacks.run_folder import write_csv
from lightning_gd.data.table import TableData
from lightning_gd.data.tensors import tensor_data
from lightning_gd.models.linear import LinearRegression

MOST_SHOWN = 50  # coefficients printed; the file holds all

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
    condition = largest / curvature[max(rank, 1) - 1]
    weight, b = (theta[:-1], theta[-1] + offset) if bias else (theta, offset)
    return Exact(weight, b, len(theta) - rank, largest.item(), condition.item())


class Coefficients(Callback):
    """After a fit on `TableData`: prints the coefficients and writes `coefficients.csv`.

    Each is in target units per unit of its column, at full precision, beside the exact
    least-squares one. A line says how far the two are apart. The model needs a `weight` for each
    feature and a `bias`.
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
        print(f"Coefficients for {data.target}")
        _print(rows)
        if getattr(type(pl_module), "loss", None) is LinearRegression.loss:
            print(_verdict(trainer, exact, weight, bias))
        header = ("term", "coefficient", "least_squares", "difference")
        lines = [header, *((term, a, b, a - b) for term, a, b in rows)]
        if path := write_csv(trainer, "coefficients.csv", lines):
            print(f"every digit: {path}")


def _print(rows: Rows) -> None:
    shown = rows if len(rows) <= MOST_SHOWN else [*rows[: MOST_SHOWN - 1], rows[-1]]
    width = max(len(term) for term, _, _ in shown)
    print(f"  {'term':{width}} {'coefficient':>24} {'exact least squares':>24} {'difference':>10}")
    for term, a, b in shown:
        print(f"  {term:{width}} {a!r:>24} {b!r:>24} {a - b:>10.1e}")


def _verdict(trainer: Trainer, exact: Exact, weight: Tensor, bias: Tensor) -> str:
    """Say how near the fit came to the exact solution, or that its learning rate is too large."""
    optimizer = trainer.optimizers[0]
    lr, momentum = (optimizer.param_groups[0].get(name, 0.0) for name in ("lr", "momentum"))
    stable = 2 * (1 + momentum) / exact.largest
    if isinstance(optimizer, torch.optim.SGD) and lr > stable:
        return (
            f"the fit diverged: lr {lr:.4g} is too large; the largest stable rate of the full "
            f"batch is {stable:.4g}"
        )
    pairs = ((weight, exact.weight), (bias, exact.bias))
    gap = max((found.detach().cpu() - best).abs().max() for found, best in pairs)
    distance = float(gap / exact.weight.abs().max().clamp(min=1e-9))
    free = f"; the data leave {exact.flat} directions of the coefficients open" * bool(exact.flat)
    return (
        f"{distance:.2g} of the largest coefficient away from the exact solution after "
        f"{trainer.global_step:,} updates: the condition number is {exact.condition_number:.3g}"
        + free
    )
