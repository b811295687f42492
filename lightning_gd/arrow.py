"""Arrow batches and Parquet files as tensors; pyarrow is imported only when one is read."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gd.columns import LARGEST, choose

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
    chosen = choose("the Arrow stream", reader.schema.names, target, features)
    yield block(reader.schema.empty_table(), target, chosen, "the Arrow stream", 0)
    first = 0
    for batch in reader:
        yield block(batch, target, chosen, "the Arrow stream", first)
        first += len(batch)


def block(table: Any, target: str | None, features: Sequence[str], where: str, first: int) -> Block:
    """Return the rows of a table or batch, those of `where` from row `first` on, as tensors.

    Raises:
        ValueError: For a null or a column that is no real number, with its place.
    """
    x = np.column_stack([_column(table, name, where, first) for name in features])
    y = _column(table, target, where, first) if target else np.full(len(x), np.nan)
    return torch.from_numpy(x), torch.from_numpy(y)


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
    values = np.array(column.to_numpy(zero_copy_only=False))
    if values.dtype.kind == "f" and (bad := ~(np.abs(values, dtype="f8") < LARGEST)).any():
        row = bad.argmax()
        raise ValueError(
            f"{where}, row {row + first}, column {name!r}: '{values[row]}' is not a finite number "
            f"below {LARGEST:g}"
        )
    return values
