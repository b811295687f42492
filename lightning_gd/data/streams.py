"""Tables on disk: read block by block, shuffled window by window, in bounded memory."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gd.batch import Batch, DataBatch
from lightning_gd.data.tables import Order, Table, check_finite, permutation
from lightning_gd.moments import Moments

PIECE = 8192  # rows that a model is asked about at once


class Source(Protocol):
    """Rows on disk, in blocks that are read at once."""

    name: str  # of the file or files
    x: Tensor  # of all rows, shape [N, ...], on the device `meta`: shape and dtype, no values
    y: Tensor  # the same, shape [N, ...]
    bounds: list[int]  # where blocks begin, ascending from 0, and N

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return x and y of these rows, all of one block, from the disk."""
        ...


class StreamedTable(Table):
    """A table on disk, of which one window of rows is in memory.

    In an epoch the order of the blocks is a permutation, a function of (seed, epoch). Blocks that
    follow each other in it make a window as long as they have at most `window_rows` rows together
    (or are one block); its rows are permuted by a function of (seed, epoch, window).

    `raw` and `y` have shapes and dtypes, and no values. Every process reads each window, and keeps
    its rows of it; moments and evaluations divide the blocks between the processes.

    Raises:
        ValueError: When a row is read in which a number is not finite, with its place.
    """

    on_disk = True

    def __init__(
        self, source: Source, window_rows: int, rows: range | None = None, floats: bool = False
    ) -> None:
        rows = range(len(source.y)) if rows is None else rows
        part = slice(rows.start, rows.stop)
        super().__init__(source.x[part], source.y[part], floats=floats)
        self.source, self.window_rows, self.span = source, window_rows, rows
        inner = [bound for bound in source.bounds if rows.start < bound < rows.stop]
        bounds = [rows.start, *inner, rows.stop]
        self.blocks = list(zip(bounds, bounds[1:], strict=False))
        self.held: tuple[Any, tuple[Tensor, Tensor, Tensor | None]] | None = None  # window, by key

    def part(self, rows: slice) -> "StreamedTable":
        return StreamedTable(self.source, self.window_rows, self.span[rows], self.floats)

    def read(self, start: int, stop: int, convert: bool = True) -> tuple[Tensor, Tensor]:
        """Return x and y of rows of one block, in the precision of the run or as they are."""
        x, y = self.source.read(start, stop)
        found = (self.scaled(x), self._cast(y)) if convert else (x, y)
        for name, values in zip("xy", found, strict=True):
            check_finite(name, values, self.source.name, start)
        return found

    def first_rows(self, most: int) -> Tensor:
        start, stop = self.blocks[0]
        return self.read(start, min(stop, start + most), convert=False)[0]

    def pieces(self, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield x and y of the blocks of one process, at most 8,192 rows at once."""
        for start, stop in self.blocks[rank::world]:
            x, y = self.read(start, stop)
            yield from zip(x.split(PIECE), y.split(PIECE), strict=True)

    def moments(self, rank: int = 0, world: int = 1) -> Moments:
        if (rank, world) not in self._moments:
            own = self.blocks[rank::world] or [(self.span.start, self.span.start)]
            blocks = (self.read(*block, convert=False) for block in own)
            self._moments[rank, world] = Moments.of_blocks(blocks)
        return self._moments[rank, world]

    def local(self, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Return every `world`-th row in memory, whatever their number."""
        order = Windows(self, None, 0)
        return order.take(torch.arange(rank, len(self), world))

    def batch(self, rank: int = 0, world: int = 1) -> Batch:
        return StreamedBatch(self, (rank, world))

    def sample(
        self, most: int | None = None, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor]:
        order = Windows(self, 0, 0)
        rows = range(rank, order.starts[1], world)[:most]
        return order.take(torch.tensor(rows, dtype=torch.int64))

    def targets(self) -> Tensor:
        return torch.cat([y for _, y in self.pieces()])

    def check_finite(self, part: str, targets: bool) -> None:
        pass  # each block is checked when it is read

    def order(self, seed: int | None, epoch: int) -> "Windows":
        return Windows(self, seed, epoch)


class Windows(Order):
    """The places of a table on disk in the order of one epoch, as `StreamedTable` defines it."""

    def __init__(self, table: StreamedTable, seed: int | None, epoch: int) -> None:
        self.stored, self.seed, self.epoch = table, seed, epoch
        count = len(table.blocks)
        order = range(count) if seed is None else permutation(count, seed, epoch).tolist()
        self.windows: list[list[int]] = []
        sizes: list[int] = []
        for block in order:
            start, stop = table.blocks[block]
            if seed is None or not sizes or sizes[-1] + stop - start > table.window_rows:
                self.windows.append([])
                sizes.append(0)
            self.windows[-1].append(block)
            sizes[-1] += stop - start
        self.starts = list(accumulate(sizes, initial=0))

    def __getitem__(self, part: slice) -> Tensor:
        return torch.arange(*part.indices(len(self.stored)))

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and y at these places, which ascend."""
        cuts = torch.searchsorted(rows.contiguous(), torch.tensor(self.starts)).tolist()
        used = [w for w in range(len(self.windows)) if cuts[w] < cuts[w + 1]]
        parts = [self._window(w, rows[cuts[w] : cuts[w + 1]] - self.starts[w]) for w in used]
        if not parts:  # no row, of the shape and dtype of rows
            first = self.stored.span.start
            return self.stored.read(first, first)
        x, y = (list(values) for values in zip(*parts, strict=True))
        return (x[0], y[0]) if len(parts) == 1 else (torch.cat(x), torch.cat(y))

    def _window(self, number: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and y at these places of a window, which is read unless it was the last one."""
        table, key = self.stored, (self.seed, self.epoch, number)
        if table.held is None or table.held[0] != key:
            table.held = None  # frees the window before
            count = self.starts[number + 1] - self.starts[number]
            order = None if self.seed is None else permutation(count, self.seed, *key[1:])
            table.held = key, (*self._read(count, self.windows[number]), order)
        x, y, order = table.held[1]
        rows = rows if order is None else order[rows]
        return x.index_select(0, rows), y.index_select(0, rows)

    def _read(self, count: int, blocks: list[int]) -> tuple[Tensor, Tensor]:
        table, done = self.stored, 0
        form = table.scaled(table.raw[:0])
        x = torch.empty(count, *form.shape[1:], dtype=form.dtype)
        y = torch.empty(count, *table.y.shape[1:], dtype=table.y.dtype)
        for start, stop in (table.blocks[block] for block in blocks):
            rows = slice(done, done + stop - start)
            x[rows], y[rows] = table.read(start, stop)
            done = rows.stop
        return x, y


class StreamedBatch(Batch):
    """The rows of one process of a table on disk, as one batch that is read piece by piece."""

    def __init__(
        self, table: StreamedTable, process: tuple[int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.table, self.process, self.device = table, process, device

    def _pieces(self) -> Iterator[DataBatch]:
        for piece in self.table.pieces(*self.process):
            yield DataBatch(piece).to(self.device)

    def loss(self, model: Any) -> Tensor:
        total, mean = 0.0, torch.zeros((), device=self.device)
        for piece in self._pieces():
            rows = piece.rows(model)
            total += rows
            mean = mean + (piece.loss(model) - mean) * (rows / total if rows else 0.0)
        return mean

    def rows(self, model: Any) -> float:
        return sum(piece.rows(model) for piece in self._pieces())

    def to(self, device: torch.device | str) -> "StreamedBatch":
        return StreamedBatch(self.table, self.process, device)
