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

from lessons.entries import NOTEBOOKS, entries


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parse(argv)
    # Away from a terminal: a width at which both columns of numbers break alike.
    console = Console(width=None if sys.stdout.isatty() else 151)
    if arguments.list:
        console.print(_listing(arguments.notebooks))
        return 0
    return _reproduce(arguments, console)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train what the notebooks train and compare every number that they print.",
        epilog="exit status: 0 all agree, 1 a number differs, 2 wrong arguments or no data there",
    )
    add = parser.add_argument
    add("notebooks", nargs="*", metavar="000 … 004", help="which; default: all")
    add("--explain", action="store_true", help="add what each notebook teaches")
    add("--list", action="store_true", help="list the experiments and run none")
    add("--require-all", action="store_true", help="fail where the full MNIST is missing too")
    add("--data-root", default=os.environ.get("MNIST_ROOT"), metavar="DIR",
        help="folder that holds MNIST/raw (default: $MNIST_ROOT)")  # fmt: skip
    add("--download", action="store_true", help="fetch MNIST into --data-root")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.notebooks) - NOTEBOOKS.keys())
    if unknown:
        parser.error(f"unknown notebooks {', '.join(unknown)}; known: {', '.join(NOTEBOOKS)}")
    if arguments.download and not arguments.data_root:
        parser.error("--download needs --data-root, the folder to fetch MNIST into")
    return arguments


def _reproduce(arguments: argparse.Namespace, console: Console) -> int:
    """Run the experiments, and print a table per notebook and the closing line."""
    from lessons import digits, reproduction  # take seconds to import
    from quiet import quiet

    quiet()
    chosen = sorted(set(arguments.notebooks)) or list(NOTEBOOKS)
    found, root = None, arguments.data_root
    if root and "002" in chosen:
        try:
            found = digits.notebook_digits(root, arguments.download)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    progress = track(
        reproduction.reproduce(chosen, found),
        description="reproducing",
        total=len(entries(chosen)),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    results = list(progress)
    for notebook in chosen:
        mine = [result for result in results if notebook in result.entry.notebooks]
        reproduction.show(console, notebook, mine)
        if arguments.explain:
            text = Text(reproduction.lesson(notebook, mine).strip())
            console.print(Panel(text, title=f"{notebook} explained"))
    console.print(reproduction.closing_line(results), highlight=False)
    failing = {"differs", "needs data"} if arguments.require_all else {"differs"}
    return int(any(result.verdict in failing for result in results))


def _listing(notebooks: list[str]) -> Table:
    """Return a table of the experiments, without running any."""
    table = Table("notebook", "experiment", "kind", "updates", "dtype", "note")
    for e in entries(notebooks):
        notebook = "+".join(e.notebooks)
        table.add_row(notebook, e.experiment, e.kind, str(e.steps), e.dtype, e.note)
    return table


if __name__ == "__main__":
    sys.exit(main())
