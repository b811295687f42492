"""A table of the user's own, from a CSV file."""

from __future__ import annotations

import csv
import difflib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.refusals import number

LONGLEY = Path(__file__).with_name("longley.csv")
LARGEST = 1e150  # the squares of larger numbers overflow float64


class Rows(NamedTuple):
    """Numbers read from a file, in float64.

    Attributes:
        x: Features, shape [N, D].
        y: Targets, shape [N]; NaN where the file has no target column.
        lines: Where each row stands in the file, shape [N]; the header is line 1.
    """

    x: Tensor
    y: Tensor
    lines: Tensor

    def part(self, rows: Tensor) -> Rows:
        """The rows of these numbers."""
        return Rows(self.x[rows], self.y[rows], self.lines[rows])


class TableData(TensorDataModule):
    """A CSV file of numbers whose first line names the columns; one of them is the target.

    Feature j enters the model as zⱼ = (xⱼ − mⱼ)/sⱼ with the mean mⱼ and the standard deviation
    sⱼ (over N, not N − 1) of the training rows; a column that is constant there has sⱼ = 1. The
    target keeps its units. Checkpoints carry m and s, and rows are standardised with those of the
    checkpoint that is loaded. A run in `64-true` reads the table in float64, others in float32.

    Args:
        path: The file; `longley` is the example inside the package, a small economic table
            whose columns resemble each other and whose coefficients NIST certifies.
        target: Name of the column to predict.
        features: Names of the columns to predict from; null for all others.
        test_fraction: Share of the rows kept for the test, drawn by `seed`; 0 for none.
        test_path: A second file with the test rows, instead of a share of the first. To predict
            it, it need not have the target column.
        separator: The character between columns.
        **kwargs: Those of `TensorDataModule`; `seed` also draws the test rows.

    Raises:
        ValueError: If a column is missing or named twice, or a cell in a column that is used holds
            no finite number; with file, line and column.
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
        number("test_fraction", test_fraction, least=0)
        if test_fraction >= 1:
            raise ValueError(f"test_fraction={test_fraction!r} must be below 1: rows must be left")
        if len(separator) != 1:
            raise ValueError(f"separator={separator!r} must be one character, such as ',' or ';'")
        path = str(LONGLEY) if path == "longley" else path
        self.path, self.target, self.separator = path, target, separator
        self.test_fraction, self.test_path = test_fraction, test_path
        self.features = _features(path, self._header(path), target, features)
        self.num_features = len(self.features)
        self.mean = torch.zeros(self.num_features, dtype=torch.float64)  # m
        self.scale = torch.ones_like(self.mean)  # s
        self._known = False  # whether m and s are those of a table, be it a checkpoint's
        self.test_lines: list[int] = []  # where each test row stands in its file

    def load(self) -> dict[str, Table]:
        """Read, split and standardise."""
        rows = self._read(self.path)
        parts = self._split(rows) if self.test_path is None else {"train": rows}
        if self.test_path is not None:
            predicts = self.trainer is not None and self.trainer.state.fn == "predict"
            parts["test"] = self._read(self.test_path, target_needed=not predicts)
        if "test" in parts:
            self.test_lines = parts["test"].lines.tolist()
        if not self._known:  # from the rows to train on; those for validation come last
            train = parts["train"].x
            self.mean, self.scale = _statistics(train[: max(1, len(train) - self.num_val)])
            self._known = True
        return {part: self._table(rows.x, rows.y) for part, rows in parts.items()}

    def _split(self, rows: Rows) -> dict[str, Rows]:
        count = len(rows.y)
        held = max(1, round(count * self.test_fraction)) if self.test_fraction else 0
        if held == 0:
            return {"train": rows}
        if held == count:
            raise ValueError(
                f"test_fraction={self.test_fraction} leaves no row of {self.path} to train on "
                f"(it has {count}): give --data.test_fraction 0"
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        # Training rows stay mixed: validation rows are taken from their end.
        return {"train": rows.part(order[held:]), "test": rows.part(order[:held].sort().values)}

    def _table(self, x: Tensor, y: Tensor) -> Table:
        # Lightning's default dtype is float32 here even in a run that converts to float64.
        double = self.trainer is not None and self.trainer.precision == "64-true"
        dtype = torch.float64 if double else torch.get_default_dtype()
        return Table(((x - self.mean) / self.scale).to(dtype), y.to(dtype))

    def coefficients(self, weight: Tensor, bias: Tensor) -> Tensor:
        """One coefficient a feature in target units per feature unit, then the intercept.

        ŷ = z w + b = Σ (wⱼ/sⱼ) xⱼ + (b − Σ (wⱼ/sⱼ) mⱼ)

        Args:
            weight: w for standardised features, shape [D].
            bias: b, shape [].

        Returns:
            In float64, shape [D + 1].
        """
        slopes = weight.detach().double().cpu() / self.scale
        intercept = bias.detach().double().cpu() - slopes @ self.mean
        return torch.cat([slopes, intercept[None]])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must know to read further rows as these were read."""
        return {"features": self.features, "mean": self.mean, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Standardise with the statistics of the checkpoint.

        Raises:
            ValueError: If it was trained on other features.
        """
        if state["features"] != self.features:
            raise ValueError(
                f"the checkpoint was trained on the features {', '.join(state['features'])}, in "
                f"this order; here they are {', '.join(self.features)}: choose them with "
                "--data.features"
            )
        mean, scale, self._known = self.mean, self.scale, True
        self.mean, self.scale = state["mean"], state["scale"]
        if torch.equal(mean, self.mean) and torch.equal(scale, self.scale):
            return
        for part, table in self.tables.items():
            self.tables[part] = self._table(table.x.double() * scale + mean, table.y)

    def _header(self, path: str) -> list[str]:
        with open(path, newline="", encoding="utf-8-sig") as file:
            try:
                names = next(csv.reader(file, delimiter=self.separator, skipinitialspace=True), [])
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
        if not names:
            raise ValueError(f"{path} has no header: its first line must name the columns")
        for position, name in enumerate(names):
            if name and name in names[:position]:
                raise ValueError(
                    f"{path}, line 1: columns {names.index(name) + 1} and {position + 1} are both "
                    f"named {name!r}; names must differ"
                )
        return names

    def _read(self, path: str, target_needed: bool = True) -> Rows:
        names = self._header(path)
        wanted = self.features + [self.target] * (target_needed or self.target in names)
        for name in wanted:
            _check_name(path, name, names)
        frame = _frame(path, self.separator)
        columns = [_numbers(path, name, frame.iloc[:, names.index(name)]) for name in wanted]
        if not target_needed and self.target not in names:
            columns.append(torch.full((len(frame),), float("nan"), dtype=torch.float64))
        lines = torch.tensor(frame.index.to_numpy() + 2)
        return Rows(torch.stack(columns[:-1], dim=1), columns[-1], lines)


def _features(path: str, names: list[str], target: str, chosen: list[str] | None) -> list[str]:
    """The feature columns by name, checked against the header."""
    _check_name(path, target, names)
    features = [name for name in names if name != target] if chosen is None else chosen
    for name in features if chosen is not None else []:
        _check_name(path, name, names)
        if name == target or features.count(name) > 1:
            raise ValueError(f"features={features}: {name!r} is there twice, or is the target")
    if "" in features:
        raise ValueError(
            f"{path}, line 1: column {names.index('') + 1} has no name; name it, or choose the "
            "columns with --data.features"
        )
    if not features:
        raise ValueError(f"{path} has no column beside the target {target!r}")
    return list(features)


def _check_name(path: str, name: str, names: list[str]) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if len(names) == 1:
        hint = "is --data.separator right? "
    raise ValueError(f"{path} has no column {name!r}: {hint}its columns: {', '.join(names)}")


def _frame(path: str, separator: str) -> Any:
    """All columns as pandas reads them, without empty lines; the index counts lines from 2."""
    import pandas  # takes a while to import: only when a table is read

    with warnings.catch_warnings():
        # Else pandas drops the surplus of rows that are longer than the header.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        try:
            frame = pandas.read_csv(
                path,
                sep=separator,
                index_col=False,
                skip_blank_lines=False,
                skipinitialspace=True,
                encoding="utf-8-sig",
                low_memory=False,
            )
        except (ValueError, pandas.errors.ParserWarning) as error:
            raise ValueError(f"{path} cannot be read as a table: {str(error).strip()}") from error
    frame = frame.dropna(how="all")
    if frame.empty:
        raise ValueError(f"{path} has a header and no rows")
    return frame


def _numbers(path: str, name: str, column: Any) -> Tensor:
    """A column in float64, or an error at its first cell that holds no finite number."""
    import pandas

    numbers: Any = pandas.to_numeric(column, errors="coerce")
    values = numbers.to_numpy(dtype="float64", na_value=float("nan"))
    bad = ~(abs(values) < LARGEST)
    if bad.any():
        at = int(bad.argmax())
        cell = column.iloc[at]
        what = "the cell is empty" if pandas.isna(cell) else f"'{cell}' is not a finite number"
        more = f" (and {bad.sum() - 1:,} more in this column)" if bad.sum() > 1 else ""
        raise ValueError(
            f"{path}, line {column.index[at] + 2}, column {name!r}: {what}{more}; "
            "mend it, or choose other columns with --data.features"
        )
    return torch.tensor(values)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, shape [D]; exactly (value, 1) if constant."""
    constant = (x == x[0]).all(0)
    mean = torch.where(constant, x[0], x.mean(0))
    return mean, torch.where(constant, 1.0, (x - mean).square().mean(0).sqrt())
