"""Sums and means over processes: the only file that calls a collective."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gd.private import DispatchMode


def world_size() -> int:
    """Return the number of processes that train together; 1 where no group exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def reduce_sum(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its elementwise sum over all processes, in place.

    Every process must call this with the same shape and dtype. On one process nothing happens.
    """
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def differing(named: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors whose values are not the same on all processes."""
    found = []
    for name, tensor in named.items() if world_size() > 1 else ():
        ends = torch.stack([tensor.double(), -tensor.double()]).nan_to_num()
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if (ends[0] != -ends[1]).any():
            found.append(name)
    return found


class NoCollectives(DispatchMode):
    """Refuses collectives inside a `with` block: the other processes may not call them as often."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError(
                "it communicates with other processes, which a check cannot repeat as often on "
                "each: check it on one process, or give loss= without that"
            )
        return func(*args, **(kwargs or {}))


def any_process(holds: bool) -> bool:
    """Tell whether something holds on at least one process; each of them must ask."""
    on_gpu = world_size() > 1 and dist.get_backend() == "nccl"
    return bool(reduce_sum(torch.tensor(float(holds), device="cuda" if on_gpu else "cpu")))


class RowMean:
    """Means over the rows of all processes and batches: Σ nᵢ·meanᵢ / Σ nᵢ.

    `add` the means over the local rows of each batch, then `reduce` with one collective. The
    number of rows travels in the same tensor, so uneven and empty parts need nothing else.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[list[Tensor], float]] = []

    def add(self, means: list[Tensor], rows: float) -> None:
        """Add means over `rows` local rows; with 0 rows their values do not count."""
        self._parts.append((means, rows))

    def reduce(self) -> tuple[list[Tensor], Tensor | float]:
        """Return the means over everything added since the last call, and the number of rows."""
        parts, self._parts = self._parts, []
        means, rows = parts[0]
        if len(parts) == 1 and world_size() == 1:
            return means, rows
        flat = torch.stack([_weighted(*part) for part in parts]).sum(0)
        *sums, total = reduce_sum(flat).split([*(value.numel() for value in means), 1])
        return [s.div_(total).view_as(m) for s, m in zip(sums, means, strict=True)], total[0]


def _weighted(means: list[Tensor], rows: float) -> Tensor:
    flat = torch.cat([*(value.reshape(-1) for value in means), means[0].new_ones(1)])
    return flat.mul_(rows) if rows else torch.zeros_like(flat)
