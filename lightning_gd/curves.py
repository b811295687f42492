"""Curves with one point an update, buffered on the device and written in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MOST_POINTS = 100_000  # longer runs are thinned to at most so many points a curve
BUFFERED = 512  # points kept before they are written, where no block ends earlier


class Curves:
    """Collects values by update and writes them to every logger of the Trainer.

    The x axis counts the updates that the weights have seen: the point at k of `train/loss` is
    the loss before update k, counted from 0, and that of `test/loss` is at the same weights.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._values: dict[str, list[Tensor | float | None]] = {}
        self._stride = 1

    def start(self, updates: int) -> None:
        """Begin a run of so many updates."""
        self._stride = max(1, -(-updates // MOST_POINTS))

    def record(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Keep one point of each curve, unless it is thinned out."""
        if step % self._stride:
            return
        for name, column in self._values.items():
            column.append(values.get(name))
        for name in values.keys() - self._values.keys():
            self._values[name] = [None] * len(self._steps) + [values[name]]
        self._steps.append(step)

    def full(self) -> bool:
        """Whether enough is buffered to be worth writing."""
        return len(self._steps) >= BUFFERED

    def write(self, trainer: Trainer) -> None:
        """Write what is buffered, with one transfer from the device a curve."""
        steps, columns = self._steps, {n: _numbers(v) for n, v in self._values.items()}
        self._steps, self._values = [], {}
        if not trainer.is_global_zero:
            return
        points = [
            (step, {n: value for n, c in columns.items() if (value := c[i]) is not None})
            for i, step in enumerate(steps)
        ]
        for logger in trainer.loggers:
            log_points = getattr(logger, "log_points", None)
            if log_points is not None:
                log_points(points)
                continue
            for step, values in points:
                logger.log_metrics(values, step)


def _numbers(column: list[Tensor | float | None]) -> list[float | None]:
    tensors = [value for value in column if isinstance(value, Tensor)]
    if not tensors:
        return column  # pyright: ignore[reportReturnType]
    numbers = iter(torch.stack(tensors).tolist())
    return [next(numbers) if isinstance(value, Tensor) else value for value in column]
