"""Where a benchmark ran, and its table."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from benchmarks.harness import Measured, Outcome

PACKAGES = "lightning_gd torch lightning torchvision scikit-learn numpy tensorboard".split()
PREFIXES = {"s": 1.0, "ms": 1e3, "µs": 1e6}


def head(quick: bool, repeats: int) -> dict[str, Any]:
    """The machine, the versions and the settings of this run."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of others, before this run
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "quick": quick,
        "repeats": repeats,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def caption(head: dict[str, Any]) -> str:
    """The head, and what the numbers mean, in a few lines."""
    versions = ", ".join(f"{name} {head[name]}" for name in ("python", *PACKAGES))
    size = ", quick: less data" if head["quick"] else ""
    return (
        f"{head['date']}, {head['processor']}, {head['cores']} cores, {head['threads']} threads, "
        f"load before the run {head['load']}\n{versions}\n"
        f"at least {head['repeats']} rounds A B A B{size}; "
        "data in memory before the clock starts; memory: above what the imports take\n"
        "ratio: our time over the peer's (×), or the peer's over ours (× faster)"
    )


def table(outcomes: list[Outcome]) -> Table:
    """A heading for each row, then one line per side, the ratio and what was wanted of it last."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("work", overflow="fold")
    for name in ("median", "min – max", "unit", "n", "MB", "ratio", "reach"):
        shown.add_column(name, justify="left" if name == "unit" else "right", no_wrap=True)
    for outcome in outcomes:
        shown.add_row(f"[bold]{outcome.row.name}[/]: {outcome.row.work}")
        if outcome.refused:
            shown.add_row(f"  [bold red]refused[/]: {escape(outcome.refused)}")
        elif outcome.skipped:
            shown.add_row(f"  [yellow]skipped[/]: {escape(outcome.skipped)}")
        else:
            for mine in outcome.sides:
                shown.add_row(*_cells(outcome, mine))
        shown.add_section()
    return shown


def _cells(outcome: Outcome, mine: Measured) -> list[str]:
    unit = outcome.row.unit
    scale = PREFIXES[unit.partition("/")[0]]
    low, high = (scale * pick(mine.seconds) for pick in (min, max))
    colour = {True: "green", False: "red", None: "default"}[mine.reached]
    return [
        f"  {mine.side.name}",
        _number(scale * mine.median),
        f"{_number(low)} – {_number(high)}",
        unit,
        str(len(mine.seconds)),
        f"{mine.memory / 1e6:,.0f}",
        "" if mine is outcome.sides[0] else f"[{colour}]{_ratio(mine)}[/]",
        _reach(mine),
    ]


def _ratio(mine: Measured) -> str:
    faster = mine.side.faster is not None or (mine.side.at_most is None and mine.ratio < 1)
    return f"{_number(1 / mine.ratio)}× faster" if faster else f"{_number(mine.ratio)}×"


def _reach(mine: Measured) -> str:
    if mine.side.faster is not None:
        return f"≥ {mine.side.faster:g}×"
    return "" if mine.side.at_most is None else f"≤ {mine.side.at_most:g}×"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plain(outcome: Outcome) -> dict[str, Any]:
    """A row for JSON, with every time measured."""
    row = outcome.row
    return {
        "name": row.name,
        "work": row.work,
        "unit": row.unit,
        "compared": "memory" if row.memory else "time",
        "refused": outcome.refused,
        "skipped": outcome.skipped,
        "sides": [_plain_side(mine) for mine in outcome.sides if mine.seconds],
    }


def _plain_side(mine: Measured) -> dict[str, Any]:
    return {
        "name": mine.side.name,
        "seconds": mine.seconds,
        "median_seconds": mine.median,
        "memory_bytes": mine.memory,
        "difference": mine.difference,
        "tolerance": mine.side.tolerance,
        "ratio": mine.ratio,
        "at_most": mine.side.at_most,
        "faster": mine.side.faster,
        "reached": mine.reached,
    }
