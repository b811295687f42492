"""CSV files as numbers: the names of the columns, and every cell that is no number by its place."""

import csv
import math
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gd.columns import LARGEST

LONGEST = 2**26  # characters of the header that are read


def header(path: str, separator: str) -> list[str]:
    """Return the names of the columns, of which those with a name differ."""
    if Path(path).exists() and not Path(path).is_file():  # which might never end
        raise OSError(f"{path} is a folder, a pipe or a device: a table is read from a file")
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = iter(partial(file.readline, LONGEST), "")
        try:
            names = next(csv.reader(lines, delimiter=separator, skipinitialspace=True), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    if not names:
        raise ValueError(f"{path} has no header: its first line must name the columns")
    for name, times in Counter(names).items():
        if name and times > 1:
            raise ValueError(f"{path}, line 1: {times} columns are named {name!r}")
    return names


def frame_of(path: str, separator: str) -> Any:
    """Read all columns with pandas, without empty lines; the index counts lines from 2."""
    import pandas  # takes a while to import: only when a table is read

    with open(path, "rb") as file:  # pandas 2 would read what stands before it
        if any(b"\0" in part for part in iter(partial(file.read, 2**20), b"")):
            raise ValueError(f"{path} holds a byte 0: it is not a text file")
    with warnings.catch_warnings():
        # Otherwise pandas drops the surplus cells of rows that are longer than the header.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        form = {"sep": separator, "encoding": "utf-8-sig", "skipinitialspace": True}
        form |= {"index_col": False, "skip_blank_lines": False, "low_memory": False}
        try:
            frame = pandas.read_csv(path, **form)
        except (MemoryError, ValueError, pandas.errors.ParserWarning) as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error):
                what = f"{path} ({Path(path).stat().st_size:,} bytes) does not fit into memory"
                raise ValueError(f"{what}: write it as Parquet, which is read in parts") from error
            raise ValueError(f"{path} cannot be read as a table: {str(error).strip()}") from error
    frame = frame.dropna(how="all")
    if frame.empty:
        raise ValueError(f"{path} has a header and no rows")
    return frame


def values_of(path: str, names: list[str], frame: Any) -> Tensor:
    """Return the columns `names` of a frame as float64, shape [N, columns]."""
    if all(dtype.kind in "iuf" for dtype in frame.dtypes):  # one by one, 10⁵ columns take a minute
        values = torch.tensor(frame.to_numpy(dtype="float64"))
        if (values.abs() < LARGEST).all():
            return values
    columns = (numbers(path, name, frame.iloc[:, i]) for i, name in enumerate(names))
    return torch.stack(list(columns), dim=1)


def numbers(path: str, name: str, column: Any) -> Tensor:
    """Return the numbers of a column in float64; raise ValueError for a cell that holds none."""
    import pandas

    found: Any = pandas.to_numeric(column, errors="coerce")
    values = torch.tensor(found.to_numpy(dtype="float64", na_value=math.nan))
    bad = (values.abs() < LARGEST).logical_not().nonzero().flatten().tolist()
    if bad:
        cell, line = column.iloc[bad[0]], column.index[bad[0]] + 2
        empty = "the cell is empty, or a word such as NA"
        what = empty if pandas.isna(cell) else f"'{cell}' is not a finite number below {LARGEST:g}"
        raise ValueError(
            f"{path}, line {line}, column {name!r}: {what}; correct it, or choose other columns "
            "with --data.features"
        )
    return values
