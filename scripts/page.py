"""The page of `compare.py --html`: paths on one surface, recomputed in the browser."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from comparison import EXPLICIT, SUM, Descent, Problem, by_numpy
from lightning_gd.cli import UsageError
from lightning_gd.data.table import TableData

TEMPLATE = Path(__file__).with_name("compare.html")


def table_problem(
    path: str, target: str | None, features: Sequence[str] | None, lr: float | None, dtype: Any
) -> tuple[Problem, list[str]]:
    """Return the least-squares problem of a CSV file from zeros, and its one or two features.

    Each feature is divided by its root mean square. Of two features, and of the target then, the
    means are subtracted: the best intercept is 0 and is left out.

    Raises:
        UsageError: Without a target, or for another number of features.
    """
    if target is None:
        raise UsageError(f"--csv {path} needs --target, the column to predict")
    data = TableData(path, target, list(features) if features else None)
    if len(data.features) > 2:
        names = ", ".join(data.features)
        raise UsageError(f"--csv {path} has the features {names}: choose one or two by --features")
    x, y, _ = data.read(path)
    if len(data.features) == 2:
        x, y = x - x.mean(0), y - y.mean()
    size = x.square().mean(0).sqrt()
    rows = (x / torch.where(size > 0, size, 1.0)).to(dtype), y.to(dtype)
    start = torch.zeros(len(data.features) + 1, dtype=dtype)
    bias = start[-1] if len(data.features) == 1 else None
    problem = Problem({"train": rows, "test": rows}, start[:-1], bias, 0.0)
    return replace(problem, lr=problem.curvature.auto_lr if lr is None else lr), data.features


def write_page(
    file: Path, problem: Problem, runs: Mapping[str, Descent], table: str, features: Sequence[str]
) -> None:
    """Write one file of HTML that needs no other.

    Args:
        file: Where to write.
        problem: One feature with or without bias, or two without.
        runs: What each implementation did.
        table: Name of the data.
        features: Names of the columns of x.

    Raises:
        UsageError: For another problem.
    """
    size, has_bias = len(problem.weight), problem.bias is not None
    if size + has_bias > 2:
        raise UsageError(
            f"--html draws two numbers, but {table} trains {size + has_bias}: use the experiment "
            "linear, or --csv FILE --target COLUMN --features ONE TWO"
        )
    content = {
        "table": table,
        "names": [*(f"weight of {name}" for name in features), "intercept"][:2],
        "trained": [True, size == 2 or has_bias],
        **_means(problem),
        **_runs(problem, runs),
    }
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    file.parent.mkdir(parents=True, exist_ok=True)
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", text)
    file.write_text(page, encoding="utf-8")


def _means(problem: Problem) -> dict[str, Any]:
    """Return A, c and d of the loss θᵀAθ − 2cᵀθ + d, and the number of rows."""
    x, y = (values.double() for values in problem.tables["train"])
    columns = x if x.shape[1] == 2 else torch.cat([x, torch.ones_like(x)], dim=1)
    square, mixed = columns.T @ columns / len(y), columns.T @ y / len(y)
    means = {"A": square.tolist(), "c": mixed.tolist(), "d": float(y.square().mean())}
    return {**means, "rows": len(y)}


def _runs(problem: Problem, runs: Mapping[str, Descent]) -> dict[str, Any]:
    """Return the paths, also that of the sum, and for each the factor of its learning rate."""
    rows = len(problem.tables["train"][1])
    runs = {SUM: by_numpy(problem, len(runs[EXPLICIT].path) - 1, "sum"), **runs}
    found = [
        {"name": name, "factor": rows if name == SUM else 1, "path": run.path[:, :2].tolist()}
        for name, run in runs.items()
    ]
    return {"lr": problem.lr, "momentum": problem.momentum, "runs": found}
