"""All rows of the table."""

from __future__ import annotations

from benchmarks import commands, exact, fullbatch, gpu, jacobians, minibatches
from benchmarks.harness import Row


def rows(quick: bool) -> list[Row]:
    """All rows; the slow ones are smaller where it must be quick."""
    topics = (minibatches, fullbatch, exact, jacobians, commands, gpu)
    return [row for topic in topics for row in topic.rows(quick)]
