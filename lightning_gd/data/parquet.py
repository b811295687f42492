"""Parquet files as a source of rows, read row group by row group."""

from bisect import bisect_right
from collections.abc import Sequence
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gd import arrow
from lightning_gd.columns import choose


def is_parquet(path: str) -> bool:
    """Tell by its name whether a path, or a pattern such as `folder/*.parquet`, is of Parquet."""
    return path.endswith((".parquet", ".pq"))


def columns_of(path: str) -> list[str]:
    """Return the names of the columns of the first file."""
    return _opened(_files(path)[0]).schema_arrow.names


class RowGroups:
    """The row groups of one or more files, each a block; x is (x − mean)/scale, in float64.

    Without a target y is NaN.
    """

    def __init__(self, path: str, target: str | None, features: Sequence[str]) -> None:
        self.name, self.target, self.features = path, target, features
        self.mean, self.scale = torch.zeros(2, len(features), dtype=torch.float64)
        self.scale += 1
        self.groups: list[tuple[str, int, int]] = []  # file, number, first row in the file
        sizes: list[int] = []
        for file in _files(path):
            opened, first = _opened(file), 0
            choose(file, opened.schema_arrow.names, target, features)
            arrow.block(opened.schema_arrow.empty_table(), target, features, file, 0)
            for number in range(opened.num_row_groups):
                self.groups.append((file, number, first))
                sizes.append(opened.metadata.row_group(number).num_rows)
                first += sizes[-1]
        self.bounds = [0, *accumulate(sizes)]
        rows, kind = self.bounds[-1], {"dtype": torch.float64, "device": "meta"}
        if not rows:
            raise ValueError(f"{path} has no rows")
        self.x, self.y = torch.empty(rows, len(features), **kind), torch.empty(rows, **kind)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        group = bisect_right(self.bounds, min(start, self.bounds[-1] - 1)) - 1
        file, number, first = self.groups[group]
        wanted = [*self.features, *([self.target] if self.target else [])]
        table = _opened(file).read_row_group(number, columns=wanted)
        table = table.slice(start - self.bounds[group], stop - start)
        first += start - self.bounds[group]
        x, y = arrow.block(table, self.target, self.features, file, first)
        return (x - self.mean) / self.scale, y.double()


def _files(path: str) -> list[str]:
    files = [path] if Path(path).is_file() else sorted(glob(path))
    if not files:
        raise FileNotFoundError(f"{path}: there is no such file")
    return files


def _opened(file: str) -> Any:
    pyarrow = arrow.imported(file)
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is no Parquet file: {' '.join(str(error).split())}") from error
