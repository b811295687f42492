"""The five notebooks, reproduced: `python scripts/reproduce.py --help`."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

from lightning_gd.notebooks.golden import NOTEBOOKS, entries


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train what the notebooks train and compare every number that they print.",
        epilog="exit status: 0 all agree, 1 a number differs, 2 wrong arguments or no data there",
    )
    parser.add_argument("notebooks", nargs="*", metavar="000 … 004", help="which; default: all")
    parser.add_argument("--explain", action="store_true", help="add what each notebook teaches")
    parser.add_argument("--list", action="store_true", help="list the experiments and run none")
    parser.add_argument(
        "--require-all", action="store_true", help="fail where the full MNIST is missing too"
    )
    parser.add_argument(
        "--data-root",
        default=os.environ.get("MNIST_ROOT"),
        help="folder that holds MNIST/raw (default: $MNIST_ROOT)",
    )
    parser.add_argument("--download", action="store_true", help="fetch MNIST into --data-root")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = parser().parse_args(argv)
    unknown = sorted(set(arguments.notebooks) - NOTEBOOKS.keys())
    if unknown:
        parser().error(f"unknown notebooks {', '.join(unknown)}; known: {', '.join(NOTEBOOKS)}")
    if arguments.download and not arguments.data_root:
        parser().error("--download needs --data-root, the folder to fetch MNIST into")
    # Away from a terminal: a width at which both columns of numbers break alike.
    console = Console(width=None if sys.stdout.isatty() else 151)
    if arguments.list:
        console.print(listing(arguments.notebooks))
        return 0
    return run(arguments, console)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Reproduce, print a table a notebook and the closing line."""
    from lightning_gd.notebooks import reproduction as r  # takes seconds to import

    chosen = sorted(set(arguments.notebooks)) or list(NOTEBOOKS)
    try:
        root = arguments.data_root
        digits = r.notebook_digits(root, arguments.download) if root and "002" in chosen else None
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    progress = track(
        r.reproduce(chosen, digits),
        description="reproducing",
        total=len(entries(chosen)),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    results = list(progress)
    for notebook in chosen:
        mine = [result for result in results if notebook in result.entry.notebooks]
        r.show(console, notebook, mine)
        if arguments.explain:
            console.print(
                Panel(Text(r.lesson(notebook, mine).strip()), title=f"{notebook} explained")
            )
    console.print(r.closing_line(results), highlight=False)
    verdicts = {result.verdict for result in results}
    failing = {"differs", "needs data"} if arguments.require_all else {"differs"}
    return int(bool(verdicts & failing))


def listing(notebooks: list[str]) -> Table:
    """The experiments, without running any."""
    table = Table("notebook", "experiment", "kind", "updates", "dtype", "note")
    for entry in entries(notebooks):
        table.add_row(
            "+".join(entry.notebooks),
            entry.experiment,
            entry.kind,
            str(entry.steps),
            entry.dtype,
            entry.note,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
