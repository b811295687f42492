"""The coefficients of a fit on a table, in the units of the table, beside the exact solution."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import pad

from lightning_gd.callbacks.run_folder import write_csv
from lightning_gd.data.table import TableData
from lightning_gd.data.tables import Table
from lightning_gd.data.tensors import tensor_data
from lightning_gd.models.linear import LinearRegression
from lightning_gd.moments import Moments
from lightning_gd.optimum import Optimum

MOST_SHOWN, MOST_NAMED = 50, 8  # coefficients printed; undetermined ones named
HEADER = ("term", "coefficient", "least_squares", "difference", "standard_error")

Rows = list[tuple[str, float, float, float, float]]


def standard_errors(data: TableData, best: Optimum) -> Tensor:
    """Return the standard error of each exact coefficient in the units of the table, [D+1].

    The square roots of the diagonal of A W Wᵀ Aᵀ σ², where A maps (w, b) to coefficients. It is
    NaN where the rows do not determine the coefficient.
    """
    slopes = best.spread[:-1] / data.scale[:, None]
    lines = torch.cat([slopes, best.spread[-1:] - data.mean @ slopes])
    known = [*best.is_unique.tolist(), best.determines(best.mean + data.mean / data.scale)]
    return torch.where(torch.tensor(known), lines.norm(dim=1) * best.deviation, math.nan)


class Coefficients(Callback):
    """After a fit on `TableData`: prints the coefficients and writes `coefficients.csv`.

    Each is in target units per unit of its column, beside the exact least-squares one and the
    standard error of that: 6 digits on the screen, all in the file. A line says how far the two
    are apart, and others R² = 1 − Σ r²/Σ (y − ȳ)² and the root mean squared error of the run on
    the training and test rows. The model needs a `weight` for each feature and a `bias`.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, model = tensor_data(trainer), dict(pl_module.named_parameters())
        if not isinstance(data, TableData) or {"weight", "bias"} - set(model):
            return
        if model["weight"].shape != (data.num_features,):
            return
        parts, moments = {"train", "test"} & data.tables.keys(), {}
        if data.tables["train"].on_disk:  # every process sums, also those that print nothing
            moments = {part: data.summed(data.moments_of(part)) for part in sorted(parts)}
        if not trainer.is_global_zero:
            return
        best = _best(data, moments, model["bias"].requires_grad)
        rows = _rows(data, model["weight"], model["bias"], best)
        _print(data.target, rows)
        _print_free(data, best)
        theta = torch.cat([model["weight"], model["bias"][None]]).detach().double().cpu()
        for part in sorted(parts, reverse=True):
            print(f"{part}: {_quality(data.tables[part], moments.get(part), theta)}")
        if getattr(type(pl_module), "loss", None) is LinearRegression.loss:
            made = f"standardized, after {trainer.global_step:,} updates"
            far = _distance(theta, _all_of(best))
            print(f"{made}: {far:.2g} of the largest coefficient away from the exact one")
            kept, size = len(best.lengths), len(data.features)
            along = f" along {kept} of {size} directions" if kept < size else ""
            print(f"condition number {best.condition_number:.3g}{along}")
        if path := write_csv(trainer, "coefficients.csv", [HEADER, *rows]):
            print(f"every digit: {path}")


def _best(data: TableData, moments: Mapping[str, Moments], bias: bool) -> Optimum:
    if moments:
        return moments["train"].optimum(bias)
    return Optimum.of_rows(data.tables["train"].x, data.tables["train"].y, bias)


def _all_of(best: Optimum) -> Tensor:
    """Return (w*, b*), shape [D + 1], where b* is 0 without bias."""
    return pad(best.theta, (0, int(best.bias is None)))


def _rows(data: TableData, weight: Tensor, bias: Tensor, best: Optimum) -> Rows:
    """Return what the table shows of each coefficient."""
    theta = _all_of(best)
    exact = data.coefficients(theta[:-1], theta[-1]).tolist()
    found, errors = data.coefficients(weight, bias).tolist(), standard_errors(data, best).tolist()
    apart = [a - b for a, b in zip(found, exact, strict=True)]
    return list(zip([*data.features, "intercept"], found, exact, apart, errors, strict=True))


def _print_free(data: TableData, best: Optimum) -> None:
    """Name the coefficients that the rows do not determine."""
    pairs = zip(data.features, best.is_unique.tolist(), strict=True)
    if free := [name for name, is_unique in pairs if not is_unique]:
        some = ", ".join(free[:MOST_NAMED]) + ", …" * (len(free) > MOST_NAMED)
        print(f"The rows do not determine the coefficients of {some} (constant or linearly")
        print("dependent columns): the smallest solution is shown")


def _quality(table: Table, moments: Moments | None, theta: Tensor) -> str:
    if moments is not None:
        loss, variance = moments.loss(theta[:-1], theta[-1]).clamp(min=0), moments.cov[-1, -1]
    else:
        y = table.y.double().cpu()
        loss = (table.x.double().cpu() @ theta[:-1] + theta[-1] - y).square().mean()
        variance = (y - y.mean()).square().mean()
    share = f"R² {1 - loss / variance:.6g}, " if variance else ""
    return f"{share}RMSE {loss.sqrt():.6g} on {len(table):,} rows"


def _distance(theta: Tensor, best: Tensor) -> float:
    size, offset = float(best[:-1].abs().max()), abs(float(best[-1]))
    if size <= 1e-9 * offset:  # of a target that hardly varies: rounding errors, and no scale
        size = offset or 1.0
    return float((theta - best).abs().max()) / size


def _print(target: str, rows: Rows) -> None:
    shown = rows if len(rows) <= MOST_SHOWN else [*rows[: MOST_SHOWN - 1], rows[-1]]
    width = min(40, max(len(row[0]) for row in shown))
    print(f"Coefficients for {target}")
    print(f"  {'term':{width}} {'coefficient':>13} {'least squares':>13} {'std. error':>13}")
    for term, a, b, _, error in shown:
        print(f"  {term:{width}} {a:>13.6g} {b:>13.6g} {error:>13.6g}")
