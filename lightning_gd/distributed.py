"""Sums and means over processes: the only room that speaks to a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes that train together; 1 where no group exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def reduce_sum(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its elementwise sum over all processes, in place.

    Every process must call this with the same shape and dtype; one process gets it back as it is.
    """
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class RowMean:
    """Means over the rows of all processes and batches, from means over each one's own rows.

    `add` each share; `reduce` forms Σ nᵢ·meanᵢ / Σ nᵢ with one collective, in which further
    values travel along, and starts anew. Nothing is computed for a single share of one process.
    """

    def __init__(self) -> None:
        self._shares: list[tuple[list[Tensor], int, int]] = []

    def add(self, means: list[Tensor], rows: int, total: int) -> None:
        """Add means over `rows` rows of this process, `total` rows over all processes."""
        self._shares.append((means, rows, total))

    @property
    def rows(self) -> int:
        """Rows added so far, over all processes."""
        return sum(total for _, _, total in self._shares)

    def reduce(self, sums: list[Tensor] | None = None) -> list[Tensor]:
        """The means over all rows added so far, then `sums` (0-d), summed over the processes."""
        total, shares, self._shares, sums = self.rows, self._shares, [], sums or []
        first, rows, _ = shares[0]
        if rows == total and world_size() == 1:
            return [*first, *sums]
        flat = torch.cat([value.reshape(-1) for value in (*first, *sums)])
        head = flat[: len(flat) - len(sums)].mul_(rows / total)
        for means, rows, _ in shares[1:]:
            head.add_(torch.cat([value.reshape(-1) for value in means]), alpha=rows / total)
        pieces = reduce_sum(flat).split([value.numel() for value in (*first, *sums)])
        return [piece.view_as(v) for piece, v in zip(pieces, (*first, *sums), strict=True)]
