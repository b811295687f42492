"""Curves with one point per update, buffered on the device and written many at a time."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_gd.distributed import reduce_sum

BUFFERED = 512  # points kept before they are written
DENSE = 17  # bits: below 2¹⁷ updates every point is written, then every 2nd, 4th, …
KEPT = 4_000  # points of a curve kept in `history`
EXACT: Any = {"dtype": torch.float64, "device": "cpu"}

Value = Tensor | float
Points = list[tuple[int, dict[str, float]]]


class Curves:
    """Collects values by update and writes them to every logger of the Trainer.

    The x axis counts the updates that the weights have seen: the point at k of `train/loss` is
    the loss before update k, counted from 0, and `test/loss` at k belongs to the same weights.

    Attributes:
        history: Updates and values of each curve written so far, thinned to 4,000 points.
    """

    def __init__(self) -> None:
        self.history: dict[str, tuple[list[int], list[float]]] = {}
        self._buffer: dict[tuple[str, bool], list[tuple[Sequence[int], Tensor]]] = {}

    def record(self, step: int, values: Mapping[str, Value], *, local: bool = False) -> None:
        """Keep one point per curve after `step` updates; tensors stay on their device.

        Of `local` values the sums over all processes are written; every process must then record
        the same points.
        """
        columns = {
            tag: v.reshape(1) if isinstance(v, Tensor) else torch.tensor([v], **EXACT)
            for tag, v in values.items()
        }
        self.record_all([step], columns, local=local)

    def record_all(
        self, steps: Sequence[int], columns: Mapping[str, Tensor], *, local: bool = False
    ) -> None:
        """Keep the points of several updates: one value per step in each column, shape [k]."""
        kept = [i for i, step in enumerate(steps) if _is_kept(step)]
        for tag, column in columns.items() if kept else ():
            points = [steps[i] for i in kept], column[kept] if len(kept) < len(steps) else column
            self._buffer.setdefault((tag, local), []).append(points)

    def full(self) -> bool:
        """Tell whether enough is buffered to be worth writing."""
        return any(sum(len(c) for _, c in kept) >= BUFFERED for kept in self._buffer.values())

    def write(self, trainer: Trainer) -> None:
        """Write what is buffered, with one transfer from the device per curve."""
        buffer, self._buffer = self._buffer, {}
        points: dict[int, dict[str, float]] = {}
        for (tag, local), kept in buffer.items():
            values = torch.cat([column for _, column in kept])
            numbers = (reduce_sum(values) if local else values).tolist()
            for step, value in zip(chain(*(steps for steps, _ in kept)), numbers, strict=True):
                points.setdefault(step, {})[tag] = value
        self.add_points(trainer, sorted(points.items()))

    def add_points(self, trainer: Trainer, points: Points) -> None:
        """Write points `(update, {tag: value})` at once, to `history` and to the loggers."""
        for step, values in points:
            for tag, value in values.items():
                self._keep(tag, step, value)
        for tag, (_, column) in self.history.items():
            trainer.logged_metrics[tag] = torch.tensor(column[-1], dtype=torch.float64)
        for logger in trainer.loggers if trainer.is_global_zero and points else ():
            if hasattr(logger, "log_points"):
                logger.log_points(points)  # pyright: ignore[reportAttributeAccessIssue]
                continue
            for step, values in points:
                logger.log_metrics(values, step)

    def restore(self, points: Points) -> None:
        """Begin `history` anew, with points that were written before the run was resumed."""
        self.history.clear()
        for step, values in points:
            for tag, value in values.items():
                self._keep(tag, step, value)

    def _keep(self, tag: str, step: int, value: float) -> None:
        steps, values = self.history.setdefault(tag, ([], []))
        steps.append(step)
        values.append(value)
        if len(steps) > KEPT:
            del steps[1::2], values[1::2]


def _is_kept(step: int) -> bool:
    return step % (1 << max(0, step.bit_length() - DENSE)) == 0
