"""Compare four implementations of one descent: `python scripts/compare.py --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import numpy as np

    from comparison import Descent

DESCRIPTION = """\
Gradient descent by four implementations, from the same start on the same data:
a NumPy loop, the explicit formula (Trainer.fit), autograd (Trainer.fit), and
nn.Linear with torch.optim.SGD. Prints losses, weights and how far they are apart,
in ulps: units in the last place of the largest number compared.

Writes DIR/compare.png and one TensorBoard run per implementation, which share one
chart (tensorboard --logdir DIR, tab CUSTOM SCALARS). With --html also a page for a
browser, of one file: the paths on one surface, with sliders for learning rate and
momentum; for the experiment linear, or a CSV file with one or two features."""


def main(argv: list[str] | None = None) -> int:
    """Compare; return 0 on success, 1 for a file, 2 for a wrong argument, 3 for a divergence."""
    arguments = _parse(argv)
    from quiet import quiet

    quiet()
    try:
        _compare(arguments)
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 3 if isinstance(error, ArithmeticError) else 2
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="linear", help="experiment: linear (default), parity, or a YAML file")
    add("--lr", type=float, help="learning rate (default: the experiment's)")
    add("--steps", type=_positive, default=100, help="updates (default: 100), always full batch")
    add("--reduction", choices=("mean", "sum"), default="mean",
        help="of NumPy's gradient; sum explains why gradients by hand seemed faster")  # fmt: skip
    add("--dtype", choices=("float64", "float32"), default="float64", help="default: float64")
    add("--out", type=Path, default=Path("lightning_logs/compare"), metavar="DIR",
        help="folder of picture and runs (default: lightning_logs/compare)")  # fmt: skip
    add("--html", type=Path, metavar="FILE", help="write the page to this new file, NAME.html")
    add("--overwrite", action="store_true", help="replace the file of --html")
    add("--csv", metavar="FILE", help="your own table, instead of an experiment; from zeros")
    add("--target", metavar="COLUMN", help="what to predict in it")
    add("--features", nargs="+", metavar="COLUMN", help="one or two columns (default: all others)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _compare(arguments: argparse.Namespace) -> None:
    import torch

    import comparison  # takes seconds to import
    import page
    from compared_curves import compared_curves

    page_file = arguments.html
    if page_file and page_file.suffix != ".html":
        raise ValueError(f"--html {page_file} must be a file that ends in .html")
    if page_file and page_file.exists() and not arguments.overwrite:
        raise FileExistsError(f"--html {page_file} exists already: choose another, or --overwrite")
    dtype, out, lr = getattr(torch, arguments.dtype), arguments.out, arguments.lr
    if arguments.csv:
        table = arguments.csv, arguments.target, arguments.features
        problem, features = page.table_problem(*table, lr, dtype)
    else:
        problem, features = comparison.load_problem(arguments.config, lr, dtype), ["x"]
    try:
        runs = comparison.all_four(problem, arguments.steps, arguments.reduction)
    except ArithmeticError as error:
        stable = problem.curvature.max_lr(problem.momentum)
        hint = f"; lr below {stable:.4g} converges, and fewer --steps show how it begins"
        raise ArithmeticError(f"{error}{hint if problem.lr >= stable else ''}") from error
    predicted = comparison.predicted_losses(problem, arguments.steps)
    losses = {**{name: run.losses for name, run in runs.items()}, "predicted": predicted}
    console = Console()
    console.print(_losses(losses, arguments.steps))
    if len(problem.weight) <= 8:
        console.print(_weights(runs))
    console.print(_differences(comparison.differences(runs), arguments.dtype))
    if arguments.reduction == "sum":
        for sentence in comparison.sum_lesson(problem, runs):
            console.print(sentence, highlight=False)
    updates = range(arguments.steps)
    curves = {n: {p: (updates, v) for p, v in mine.items()} for n, mine in losses.items()}
    theory = curves.pop("predicted")
    out.mkdir(parents=True, exist_ok=True)
    compared_curves(curves, theory).savefig(out / "compare.png")
    comparison.write_tensorboard(losses, out)
    print(f"picture: {out / 'compare.png'}")
    if arguments.html:
        name = arguments.csv or arguments.config
        page.write_page(arguments.html, problem, runs, name, features)
        print(f"page: {arguments.html}")
    print(f"look at it: tensorboard --logdir {out}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _losses(losses: dict[str, dict[str, np.ndarray]], steps: int) -> Table:
    table = _table("Train loss before update k", "k", *losses)
    for k in sorted({k for k in (0, 1, 2, 5, 10, 20, 50, steps // 2, steps - 1) if k < steps}):
        table.add_row(f"{k:,}", *(f"{mine['train'][k]:.5g}" for mine in losses.values()))
    return table


def _weights(runs: dict[str, Descent]) -> Table:
    size = len(next(iter(runs.values())).theta) - 1
    names = [f"w{i}" if size > 1 else "w" for i in range(size)]
    table = _table("After the last update", "implementation", *names, "b")
    for name, run in runs.items():
        table.add_row(name, *(repr(float(value)) for value in run.theta))
    return table


def _differences(pairs: dict[tuple[str, str], list[float]], dtype: str) -> Table:
    table = _table(f"Largest differences in ulps of {dtype}", "pair", "train", "test", "weights")
    for (a, b), values in pairs.items():
        table.add_row(f"{a} − {b}", *(f"{value:.3g}" for value in values))
    return table


if __name__ == "__main__":
    sys.exit(main())
