"""Arrow batches and Parquet files as tensors; pyarrow is imported only when one is read."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Block = tuple[Tensor, Tensor]  # x [n, D] and y [n]


def imported(what: str) -> Any:
    """Return the module pyarrow; raise ImportError with the way to install it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"{what} is read with pyarrow: python -m pip install 'lightning_gd[arrow]' ({error})"
        ) from error
    return pyarrow


def blocks(source: Any, target: str, features: Sequence[str] | None = None) -> Iterator[Block]:
    """Yield the batches of anything with `__arrow_c_stream__` as x [n, D] and y [n]."""
    if not hasattr(source, "__arrow_c_stream__"):
        raise ValueError(
            f"a {type(source).__name__} hands out no Arrow batches: it needs __arrow_c_stream__, "
            "as a DuckDB relation, a Polars or pandas DataFrame and a RecordBatchReader have"
        )
    reader = imported("an Arrow stream").RecordBatchReader.from_stream(source)
    chosen = choose("the Arrow stream", reader.schema, target, features)
    yield block(reader.schema.empty_table(), target, chosen, "the Arrow stream", 0)
    first = 0
    for batch in reader:
        yield block(batch, target, chosen, "the Arrow stream", first)
        first += len(batch)


def choose(where: str, schema: Any, target: str, features: Sequence[str] | None) -> list[str]:
    """Return the names of the features; raise ValueError for columns that are not there."""
    names = schema.names
    chosen = [name for name in names if name != target] if features is None else list(features)
    for name in (target, *chosen):
        if names.count(name) != 1:
            what = "has no column" if name not in names else f"has {names.count(name)} columns"
            raise ValueError(f"{where} {what} {name!r}: its columns: {', '.join(names)}")
    if not chosen or target in chosen or len({*chosen}) < len(chosen):
        raise ValueError(
            f"features={chosen} must name one or more columns of {where}, each once and without "
            f"the target {target!r}"
        )
    return chosen


def block(table: Any, target: str, features: Sequence[str], where: str, first: int) -> Block:
    """Return some rows of a table or batch, which is row `first` of `where` and those after it.

    Raises:
        ValueError: For a null or a column that is no real number, with its place.
    """
    x = [_column(table, name, where, first) for name in features]
    return torch.from_numpy(np.column_stack(x)), torch.from_numpy(
        _column(table, target, where, first)
    )


def _column(table: Any, name: str, where: str, first: int) -> np.ndarray:
    types, column = imported(where).types, table.column(name)
    if types.is_decimal(column.type):
        column = column.cast("float64")
    numeric = (types.is_integer, types.is_floating, types.is_boolean)
    if not any(test(column.type) for test in numeric):
        raise ValueError(f"{where}, column {name!r}: {column.type} is no type of real numbers")
    if column.null_count:
        row = column.is_null().to_numpy(zero_copy_only=False).argmax() + first
        raise ValueError(f"{where}, row {row}, column {name!r}: the cell is empty")
    return np.array(column.to_numpy(zero_copy_only=False))
