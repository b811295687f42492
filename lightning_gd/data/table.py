"""A table of the user's own, from a CSV file or from Parquet."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gd.columns import check, choose
from lightning_gd.data.csvs import frame_of, header, values_of
from lightning_gd.data.parquet import RowGroups, columns_of, is_parquet
from lightning_gd.data.streams import StreamedTable
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.settings import number, whole_number

LONGLEY = Path(__file__).with_name("longley.csv")

Rows = tuple[Tensor, Tensor, Tensor]  # x [N, D], y [N], and the line of each row in the file [N]


class TableData(TensorDataModule):
    """A CSV file of numbers whose first line names the columns, or Parquet; one is the target.

    Feature j enters the model as zⱼ = (xⱼ − mⱼ)/sⱼ with the mean mⱼ and the standard deviation
    sⱼ (over N, not N − 1) of the training rows; a column that is constant there has sⱼ = 1. The
    target keeps its units. Checkpoints carry m and s, and rows are standardised with those of the
    checkpoint that is loaded.

    Parquet of more than `buffer_rows` rows stays on the disk, of which a window of row groups is
    in memory at a time: in each epoch the row groups come in another order, and the rows of those
    that follow each other, up to `buffer_rows`, are shuffled together; both are functions of
    (seed, epoch). Its test rows are the last ones.

    Args:
        path: The file, or a pattern of Parquet files such as `folder/*.parquet`. `longley` is the
            example inside the package, a small economic table whose columns are strongly
            correlated and whose coefficients NIST certifies.
        target: Name of the column to predict.
        features: Names of the columns to predict from; null for all others.
        test_fraction: Fraction of the rows kept for the test, drawn by `seed`; 0 for none.
        test_path: A second file with the test rows, instead of a fraction of the first. For
            `predict` it does not need the target column.
        separator: The character between columns of a CSV file.
        buffer_rows: Rows of Parquet in memory at a time.
        **kwargs: Those of `TensorDataModule`; `seed` also draws the test rows.

    Attributes:
        mean: m, shape [D], float64.
        scale: s, shape [D], float64.
        test_lines: The line of each test row in its file, whose header is line 1; of Parquet the
            number of the row, from 0.
    """

    def __init__(
        self,
        path: str = "longley",
        target: str = "employed",
        features: list[str] | None = None,
        test_fraction: float = 0.2,
        test_path: str | None = None,
        separator: str = ",",
        buffer_rows: int = 262_144,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        number("test_fraction", test_fraction, least=0, below=1)
        if len(separator) != 1:
            raise ValueError(f"separator={separator!r} must be one character, such as ',' or ';'")
        path = str(LONGLEY) if path == "longley" else path
        self.path, self.target, self.separator = path, target, separator
        whole_number("buffer_rows", buffer_rows, 1)
        self.test_fraction, self.test_path, self.buffer_rows = test_fraction, test_path, buffer_rows
        self.features = choose(path, self._names(path), target, features, "--data.features")
        self.num_features = len(self.features)
        self.mean = torch.zeros(self.num_features, dtype=torch.float64)
        self.scale = torch.ones_like(self.mean)
        self._known = False  # whether mean and scale are those of a table or a checkpoint
        self.test_lines: Sequence[int] = []

    def load(self) -> dict[str, Table]:
        if is_parquet(self.path):
            groups = RowGroups(self.path, self.target, self.features)
            if len(groups.y) > self.buffer_rows:
                return self._on_disk(groups)
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

    def raw_rows(self, part: str, most: int) -> Tensor:
        return super().raw_rows(part, most) * self.scale + self.mean

    @property
    def scaled(self) -> "Standardised":
        return Standardised(self.mean, self.scale)

    def _on_disk(self, groups: RowGroups) -> dict[str, Table]:
        rows = len(groups.y)
        held = 0 if self.test_path else math.ceil(rows * self.test_fraction)
        if held == rows:
            raise ValueError(self._no_row(rows))
        train = StreamedTable(groups, self.buffer_rows, range(rows - held))
        if not self._known:
            seen = train.part(slice(max(1, len(train) - self.num_val)))
            moments = self.summed(seen.moments(*self._process))
            self.mean, scale, self._known = moments.mean[:-1], moments.scale(), True
            self.scale = torch.where(scale > 0, scale, 1.0)
        groups.mean, groups.scale = self.mean, self.scale
        tables: dict[str, Table] = {"train": train}
        if self.test_path:
            x, y, lines = self.read(self.test_path)
            self.test_lines = lines.tolist()
            tables["test"] = Table(self.scaled(x), y)
        elif held:
            self.test_lines = range(rows - held, rows)
            tables["test"] = StreamedTable(groups, self.buffer_rows, self.test_lines)
        return tables

    def _names(self, path: str) -> list[str]:
        return columns_of(path) if is_parquet(path) else header(path, self.separator)

    def read(self, path: str, target_needed: bool = True) -> Rows:
        """Return x, y and lines of a file in float64; y is NaN where it has no target column."""
        names = self._names(path)
        has_target = target_needed or self.target in names
        wanted = self.features + [self.target] * has_target
        check(path, wanted, names)
        if is_parquet(path):
            groups = RowGroups(path, self.target if has_target else None, self.features)
            blocks = zip(groups.bounds, groups.bounds[1:], strict=False)
            x, y = zip(*(groups.read(*block) for block in blocks), strict=True)
            return torch.cat(x), torch.cat(y), torch.arange(groups.bounds[-1])
        places = {name: place for place, name in enumerate(names)}
        frame = frame_of(path, self.separator).iloc[:, [places[name] for name in wanted]]
        values = values_of(path, wanted, frame)
        x, y = values[:, : self.num_features], torch.full((len(frame),), math.nan).double()
        return x, values[:, -1] if has_target else y, torch.tensor(frame.index.to_numpy() + 2)

    def _split(self, x: Tensor, y: Tensor, lines: Tensor) -> dict[str, Rows]:
        if self.test_fraction == 0:
            return {"train": (x, y, lines)}
        count = len(y)
        held = max(1, round(count * self.test_fraction))
        if held == count:
            raise ValueError(self._no_row(count))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        # Training rows stay shuffled: validation rows are taken from their end.
        chosen = {"train": order[held:], "test": order[:held].sort().values}
        return {part: (x[rows], y[rows], lines[rows]) for part, rows in chosen.items()}

    def _no_row(self, count: int) -> str:
        return (
            f"test_fraction={self.test_fraction} leaves no row of {self.path} to train on "
            f"(it has {count}): set --data.test_fraction 0"
        )

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


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column, shape [D]; (value, 1) if constant."""
    constant = (x == x[0]).all(0)
    mean = torch.where(constant, x[0], x.mean(0))
    return mean, torch.where(constant, 1.0, (x - mean).square().mean(0).sqrt())
