"""The coefficients of a fit on a table, in the units of the table, beside the exact solution."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_gd.callbacks.run_folder import write_csv
from lightning_gd.data.table import TableData
from lightning_gd.data.tensors import tensor_data
from lightning_gd.models.linear import LinearRegression

MOST_SHOWN = 50  # coefficients printed; the file holds all

Rows = list[tuple[str, float, float]]  # term, coefficient, exact coefficient


def least_squares(x: Tensor, y: Tensor, bias: bool) -> tuple[Tensor, float]:
    """Minimise 1/N Σ r², r = x w + b − y, by the singular values of x.

    Moments would square the condition number: for columns that differ in their sixth digit they
    leave 4 correct digits of w*, and this leaves 10. Where w* is not unique, it is the shortest.

    Args:
        x: Standardised features, shape [N, D], float64.
        y: Targets, shape [N], float64.
        bias: Whether b is fitted; else it is 0.

    Returns:
        (w*, b*), shape [D+1], and the condition number of the Hessian.
    """
    columns = torch.cat([x, torch.full_like(x[:, :1], bias)], dim=1)
    found = torch.linalg.lstsq(columns, y[:, None], driver="gelsd")
    singular = found.singular_values[: max(1, int(found.rank))]  # that are not rounding
    return found.solution[:, 0], float(singular[0] / singular[-1]) ** 2


class Coefficients(Callback):
    """After a fit on `TableData`: prints the coefficients and writes `coefficients.csv`.

    Each is in target units per unit of its column, at full precision, beside the exact
    least-squares one: of several solutions, the one with the smallest weights. A line says how far
    the two are apart. The model needs a `weight` for each feature and a `bias`.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, model = tensor_data(trainer), dict(pl_module.named_parameters())
        if not (trainer.is_global_zero and isinstance(data, TableData)):
            return
        if {"weight", "bias"} - set(model) or model["weight"].shape != (data.num_features,):
            return
        weight, bias, train = model["weight"], model["bias"], data.tables["train"]
        best, condition = least_squares(train.x.double(), train.y.double(), bias.requires_grad)
        exact = data.coefficients(best[:-1], best[-1]).tolist()
        found = data.coefficients(weight, bias).tolist()
        rows = list(zip([*data.features, "intercept"], found, exact, strict=True))
        _print(data.target, rows)
        if getattr(type(pl_module), "loss", None) is LinearRegression.loss:
            apart = _distance(torch.cat([weight, bias[None]]).detach().cpu(), best)
            made = f"after {trainer.global_step:,} updates: the condition number is {condition:.3g}"
            print(f"{apart:.2g} of the largest coefficient away from the exact solution {made}")
        header = ("term", "coefficient", "least_squares", "difference")
        lines = [header, *((term, a, b, a - b) for term, a, b in rows)]
        if path := write_csv(trainer, "coefficients.csv", lines):
            print(f"every digit: {path}")


def _distance(theta: Tensor, best: Tensor) -> float:
    # The weights for a target that hardly varies are rounding errors, and no scale.
    size = max(float(best[:-1].abs().max()), 1e-9 * abs(float(best[-1]))) or 1.0
    return float((theta - best).abs().max()) / size


def _print(target: str, rows: Rows) -> None:
    shown = rows if len(rows) <= MOST_SHOWN else [*rows[: MOST_SHOWN - 1], rows[-1]]
    width = max(len(term) for term, _, _ in shown)
    print(f"Coefficients for {target}")
    print(f"  {'term':{width}} {'coefficient':>24} {'exact least squares':>24} {'difference':>10}")
    for term, a, b in shown:
        print(f"  {term:{width}} {a!r:>24} {b!r:>24} {a - b:>10.1e}")
