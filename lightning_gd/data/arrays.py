"""Arrays on disk as NumPy writes them, also larger than the memory."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_gd.data.streams import StreamedTable
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.settings import number, whole_number

BLOCKS = 64  # of a window: rows that lie together in the file


class ArrayData(TensorDataModule):
    """Two files that `np.save` wrote: x, shape [N, ...], and y, shape [N, ...], of any real dtype.

    Arrays of at most `buffer_rows` rows are read into memory. Of longer ones a window of
    `buffer_rows` rows is in memory at a time, made of 64 blocks of rows that lie together in the
    file. In each epoch the blocks come in another order, and the rows of a window are shuffled
    together; both are functions of (seed, epoch). Rows that are sorted in the file are better
    shuffled there first, or `buffer_rows` set higher. Mini-batches or `moments` are needed there:
    a full batch would read the file at each update.

    Args:
        x: File of the inputs; shape [N] counts as [N, 1].
        y: File of the targets.
        test_x: File of the inputs to test on, instead of a fraction of `x`.
        test_y: File of their targets.
        test_fraction: Fraction of the rows kept for the test: the last ones. Rows for validation
            are the last of the others.
        buffer_rows: Rows in memory at a time, of each part that is longer.
        keep_integers: Leave integers as they are (tokens, class numbers); otherwise they become
            floats.
        **kwargs: Those of `TensorDataModule`.
    """

    def __init__(
        self,
        x: str,
        y: str,
        test_x: str | None = None,
        test_y: str | None = None,
        test_fraction: float = 0.0,
        buffer_rows: int = 262_144,
        keep_integers: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        number("test_fraction", test_fraction, least=0, below=1)
        whole_number("buffer_rows", buffer_rows, 1)
        if (test_x is None) != (test_y is None) or test_x and test_fraction:
            raise ValueError(
                f"test_x={test_x!r}, test_y={test_y!r} and test_fraction={test_fraction}: set both "
                "files, or the fraction alone"
            )
        self.test_fraction, self.buffer_rows = test_fraction, buffer_rows
        self.floats = not keep_integers
        self.arrays = _Arrays(x, y, buffer_rows)
        self.test_arrays = _Arrays(test_x, test_y, buffer_rows) if test_x and test_y else None
        if self.test_arrays and self.test_arrays.x.shape[1:] != self.arrays.x.shape[1:]:
            rows = f"a row of {test_x} has shape {list(self.test_arrays.x.shape[1:])}"
            raise ValueError(f"{rows}, and of {x} {list(self.arrays.x.shape[1:])}")
        self.num_features = math.prod(self.arrays.x.shape[1:])

    def load(self) -> dict[str, Table]:
        rows = len(self.arrays.y)
        held = math.ceil(rows * self.test_fraction)
        if held == rows:
            raise ValueError(
                f"test_fraction={self.test_fraction} leaves no row of {self.arrays.name} to train "
                f"on (it has {rows}): set --data.test_fraction 0"
            )
        parts = {"train": self._table(self.arrays, range(rows - held))}
        if self.test_arrays or held:
            test, first = self.test_arrays or self.arrays, 0 if self.test_arrays else rows - held
            parts["test"] = self._table(test, range(first, len(test.y)))
        return parts

    def _table(self, arrays: "_Arrays", rows: range) -> Table:
        if len(rows) > self.buffer_rows:
            return StreamedTable(arrays, self.buffer_rows, rows, self.floats)
        return Table(*arrays.read(rows.start, rows.stop), floats=self.floats)


class _Arrays:
    """Two files as a source of a streamed table; nothing but their headers is read before."""

    def __init__(self, x: str, y: str, buffer_rows: int) -> None:
        arrays = [_opened(name) for name in (x, y)]
        self.name = f"{x}, {y}"
        if len(arrays[0]) != len(arrays[1]):
            raise ValueError(
                f"x and y must have the same number of rows; got {len(arrays[0])} in {x} and "
                f"{len(arrays[1])} in {y}"
            )
        self.files = [(str(a.filename), a.offset, a.dtype, a.shape[1:]) for a in arrays]
        rows, step = len(arrays[0]), max(1, buffer_rows // BLOCKS)
        self.bounds = [*range(0, rows, step), rows]
        forms = [self._tensors(k, 0, 0) for k in (0, 1)]
        self.x, self.y = (t.new_empty(rows, *t.shape[1:], device="meta") for t in forms)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._tensors(0, start, stop), self._tensors(1, start, stop)

    def _tensors(self, which: int, start: int, stop: int) -> Tensor:
        file, offset, dtype, shape = self.files[which]
        size = math.prod(shape)
        place = offset + start * size * dtype.itemsize
        # Read, not mapped: pages of a mapping would stay in memory as long as there is any.
        found = np.fromfile(file, dtype, (stop - start) * size, offset=place)
        if len(found) < (stop - start) * size:
            raise OSError(f"{file} was cut while it was read: row {stop - 1} is missing")
        # Many operations of torch know no unsigned integers of 16 and 32 bits.
        native = {"u2": np.int32, "u4": np.int64}.get(dtype.str[1:], dtype.newbyteorder("="))
        rows = found.reshape(-1, *shape).astype(native, copy=False)
        return torch.from_numpy(rows[:, None] if which == 0 and not shape else rows)


def _opened(name: str) -> np.memmap:
    """Map a file and return it; raise ValueError if it is no real array of rows."""
    file = Path(name)
    if file.is_dir():
        raise IsADirectoryError(f"{name} is a folder: give a file that np.save wrote")
    if file.exists() and not file.is_file():  # which might never end
        raise OSError(f"{name} is a pipe or a device: give a file that np.save wrote")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        text = " ".join(str(error).split())
        reason = "it holds Python objects, or something else" if "pickle" in text else text
        raise ValueError(f"{name} is no array of numbers that np.save wrote: {reason}") from error
    if not isinstance(array, np.memmap):
        raise ValueError(f"{name} is an archive of arrays: write each by np.save")
    form = f"{name} has shape {list(array.shape)} and dtype {array.dtype}"
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise ValueError(f"{form}: its numbers must be real, of at most 64 bits")
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{form}: it must have at least one row and one number per row")
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{form} in Fortran order, in which a row lies all over the file: write it by "
            "np.save(file, np.ascontiguousarray(x))"
        )
    return array
