"""A table of the user's own, from a CSV file."""

import csv
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.settings import number

LONGLEY = Path(__file__).with_name("longley.csv")
LARGEST = 1e150  # the squares of larger numbers overflow float64

Rows = tuple[Tensor, Tensor, Tensor]  # x [N, D], y [N], and the line of each row in the file [N]


class TableData(TensorDataModule):
    """A CSV file of numbers whose first line names the columns; one of them is the target.

    Feature j enters the model as zⱼ = (xⱼ − mⱼ)/sⱼ with the mean mⱼ and the standard deviation
    sⱼ (over N, not N − 1) of the training rows; a column that is constant there has sⱼ = 1. The
    target keeps its units. Checkpoints carry m and s, and rows are standardised with those of the
    checkpoint that is loaded.

    Args:
        path: The file; `longley` is the example inside the package, a small economic table
            whose columns are strongly correlated and whose coefficients NIST certifies.
        target: Name of the column to predict.
        features: Names of the columns to predict from; null for all others.
        test_fraction: Fraction of the rows kept for the test, drawn by `seed`; 0 for none.
        test_path: A second file with the test rows, instead of a fraction of the first. For
            `predict` it does not need the target column.
        separator: The character between columns.
        **kwargs: Those of `TensorDataModule`; `seed` also draws the test rows.

    Attributes:
        mean: m, shape [D], float64.
        scale: s, shape [D], float64.
        test_lines: The line of each test row in its file; the header is line 1.
    """

    def __init__(
        self,
        path: str = "longley",
        target: str = "employed",
        features: list[str] | None = None,
        test_fraction: float = 0.2,
        test_path: str | None = None,
        separator: str = ",",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        number("test_fraction", test_fraction, least=0, below=1)
        if len(separator) != 1:
            raise ValueError(f"separator={separator!r} must be one character, such as ',' or ';'")
        path = str(LONGLEY) if path == "longley" else path
        self.path, self.target, self.separator = path, target, separator
        self.test_fraction, self.test_path = test_fraction, test_path
        self.features = _features(path, _header(path, separator), target, features)
        self.num_features = len(self.features)
        self.mean = torch.zeros(self.num_features, dtype=torch.float64)
        self.scale = torch.ones_like(self.mean)
        self._known = False  # whether mean and scale are those of a table or a checkpoint
        self.test_lines: list[int] = []

    def load(self) -> dict[str, Table]:
        rows = self.read(self.path)
        parts = {"train": rows} if self.test_path else self._split(*rows)
        if self.test_path:
            predicts = self.trainer is not None and self.trainer.state.fn == "predict"
            parts["test"] = self.read(self.test_path, target_needed=not predicts)
        if "test" in parts:
            self.test_lines = parts["test"][2].tolist()
        if not self._known:  # from the rows to train on; those for validation come last
            x = parts["train"][0]
            self.mean, self.scale = _statistics(x[: max(1, len(x) - self.num_val)])
            self._known = True
        return {part: Table(self.scaled(x), y) for part, (x, y, _) in parts.items()}

    def raw_rows(self, part: str) -> Tensor:
        return self.tables[part].raw * self.scale + self.mean

    @property
    def scaled(self) -> "Standardised":
        return Standardised(self.mean, self.scale)

    def read(self, path: str, target_needed: bool = True) -> Rows:
        """Return x, y and lines of a file in float64; y is NaN where it has no target column."""
        names = _header(path, self.separator)
        has_target = target_needed or self.target in names
        wanted = self.features + [self.target] * has_target
        _check_names(path, wanted, names)
        frame = _frame(path, self.separator)
        columns = [_numbers(path, name, frame.iloc[:, names.index(name)]) for name in wanted]
        y = columns.pop() if has_target else torch.full((len(frame),), math.nan).double()
        return torch.stack(columns, dim=1), y, torch.tensor(frame.index.to_numpy() + 2)

    def _split(self, x: Tensor, y: Tensor, lines: Tensor) -> dict[str, Rows]:
        if self.test_fraction == 0:
            return {"train": (x, y, lines)}
        count = len(y)
        held = max(1, round(count * self.test_fraction))
        if held == count:
            raise ValueError(
                f"test_fraction={self.test_fraction} leaves no row of {self.path} to train on "
                f"(it has {count}): set --data.test_fraction 0"
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        # Training rows stay shuffled: validation rows are taken from their end.
        chosen = {"train": order[held:], "test": order[:held].sort().values}
        return {part: (x[rows], y[rows], lines[rows]) for part, rows in chosen.items()}

    def coefficients(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return one coefficient per feature, in target units per feature unit, and the intercept.

        ŷ = z w + b = Σ (wⱼ/sⱼ) xⱼ + (b − Σ (wⱼ/sⱼ) mⱼ), with w of shape [D] and b of shape [];
        the result has shape [D + 1], in float64.
        """
        slopes = weight.detach().double().cpu() / self.scale
        intercept = bias.detach().double().cpu() - slopes @ self.mean
        return torch.cat([slopes, intercept[None]])

    def state_dict(self) -> dict[str, Any]:
        return {"features": self.features, "mean": self.mean, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["features"] != self.features:
            raise ValueError(
                f"the checkpoint was trained on the features {', '.join(state['features'])}, in "
                f"this order; got {', '.join(self.features)}: choose them with --data.features"
            )
        same = torch.equal(state["mean"], self.mean) and torch.equal(state["scale"], self.scale)
        self.mean, self.scale, self._known = state["mean"], state["scale"], True
        if self.tables and not same:
            self.tables = {}
            self.setup(None if self.trainer is None else self.trainer.state.fn)


class Standardised(nn.Module):
    """zⱼ = (xⱼ − mⱼ)/sⱼ of each column; a module, so that an exported graph can hold m and s."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


def _header(path: str, separator: str) -> list[str]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            names = next(csv.reader(file, delimiter=separator, skipinitialspace=True), [])
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    if not names:
        raise ValueError(f"{path} has no header: its first line must name the columns")
    for name, times in Counter(names).items():
        if name and times > 1:
            raise ValueError(f"{path}, line 1: {times} columns are named {name!r}")
    return names


def _features(path: str, names: list[str], target: str, chosen: list[str] | None) -> list[str]:
    _check_names(path, [target, *(chosen or [])], names)
    features = [name for name in names if name != target] if chosen is None else chosen
    if not features or {"", target} & {*features} or len({*features}) < len(features):
        raise ValueError(
            f"features={features} must name one or more columns of {path}, each once and without "
            f"the target {target!r}: set --data.features"
        )
    return list(features)


def _check_names(path: str, wanted: list[str], names: list[str]) -> None:
    for name in wanted:
        if name not in names:
            hint = "is --data.separator right? " if len(names) == 1 else ""
            raise ValueError(
                f"{path} has no column {name!r}: {hint}its columns: {', '.join(names)}"
            )


def _frame(path: str, separator: str) -> Any:
    """Read all columns with pandas, without empty lines; the index counts lines from 2."""
    import pandas  # takes a while to import: only when a table is read

    with warnings.catch_warnings():
        # Otherwise pandas drops the surplus cells of rows that are longer than the header.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        form = {"sep": separator, "encoding": "utf-8-sig", "skipinitialspace": True}
        form |= {"index_col": False, "skip_blank_lines": False, "low_memory": False}
        try:
            frame = pandas.read_csv(path, **form)
        except (ValueError, pandas.errors.ParserWarning) as error:
            raise ValueError(f"{path} cannot be read as a table: {str(error).strip()}") from error
    frame = frame.dropna(how="all")
    if frame.empty:
        raise ValueError(f"{path} has a header and no rows")
    return frame


def _numbers(path: str, name: str, column: Any) -> Tensor:
    import pandas

    numbers: Any = pandas.to_numeric(column, errors="coerce")
    values = torch.tensor(numbers.to_numpy(dtype="float64", na_value=math.nan))
    bad = (values.abs() < LARGEST).logical_not().nonzero().flatten().tolist()
    if bad:
        cell, line = column.iloc[bad[0]], column.index[bad[0]] + 2
        what = "the cell is empty" if pandas.isna(cell) else f"'{cell}' is not a finite number"
        raise ValueError(
            f"{path}, line {line}, column {name!r}: {what}; correct it, or choose other columns "
            "with --data.features"
        )
    return values


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column, shape [D]; (value, 1) if constant."""
    constant = (x == x[0]).all(0)
    mean = torch.where(constant, x[0], x.mean(0))
    return mean, torch.where(constant, 1.0, (x - mean).square().mean(0).sqrt())
