"""Compare four roads to the gradient: `python scripts/compare.py --help`."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

DESCRIPTION = """\
Gradient descent on one road after the other, from the same start on the same data:
a NumPy loop, the explicit formula (Trainer.fit), autograd (Trainer.fit), and
nn.Linear with torch.optim.SGD. Prints losses, weights and how far the roads are apart,
in ulps: units in the last place of the largest number compared.

Writes DIR/compare.png and one TensorBoard run a road, which share one chart
(tensorboard --logdir DIR, tab CUSTOM SCALARS)."""


def main(argv: list[str] | None = None) -> int:
    """Compare; 0 on success, 2 where an argument is wrong."""
    arguments = _parse(argv)
    with warnings.catch_warnings():
        # Raised inside Lightning by a newer torch; nothing that a user could change.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        try:
            _compare(arguments)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
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
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _compare(arguments: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from lightning_gd import comparison, figures

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    problem = comparison.load_problem(
        arguments.config, arguments.lr, getattr(torch, arguments.dtype)
    )
    roads = comparison.all_roads(problem, arguments.steps, arguments.reduction)
    predicted = comparison.predicted_losses(problem, arguments.steps)
    console = Console()
    console.print(_losses(roads, predicted["train"], arguments.steps))
    if len(problem.weight) <= 8:
        console.print(_weights(roads))
    console.print(
        _differences(comparison.differences(comparison.coinciding(roads)), arguments.dtype)
    )
    if arguments.reduction == "sum":
        for sentence in comparison.sum_lesson(problem, roads):
            console.print(sentence, highlight=False)
    updates = range(arguments.steps)
    curves = {road: {p: (updates, v) for p, v in r.losses.items()} for road, r in roads.items()}
    figure = figures.compared_curves(curves, {p: (updates, v) for p, v in predicted.items()})
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "compare.png")
    losses = {road: r.losses for road, r in roads.items()}
    comparison.write_tensorboard({**losses, "predicted": predicted}, arguments.out)
    print(f"picture: {arguments.out / 'compare.png'}")
    print(f"look at it: tensorboard --logdir {arguments.out}")


def _table(title: str, *columns: str):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _losses(roads, predicted, steps: int):
    table = _table("Train loss before update k", "k", *roads, "predicted")
    curves = [*(run.losses["train"] for run in roads.values()), predicted]
    for k in sorted({k for k in (0, 1, 2, 5, 10, 20, 50, steps // 2, steps - 1) if k < steps}):
        table.add_row(f"{k:,}", *(f"{curve[k]:.5g}" for curve in curves))
    return table


def _weights(roads):
    size = len(next(iter(roads.values())).weight)
    names = [f"w{i}" if size > 1 else "w" for i in range(size)]
    table = _table("After the last update", "road", *names, "b")
    for road, run in roads.items():
        table.add_row(road, *(repr(float(value)) for value in run.theta))
    return table


def _differences(pairs, dtype: str):
    table = _table(f"Largest differences in ulps of {dtype}", "roads", "train", "test", "weights")
    for (a, b), values in pairs.items():
        table.add_row(f"{a} − {b}", *(f"{value:.3g}" for value in values))
    return table


if __name__ == "__main__":
    sys.exit(main())
