"""Measure this package and its peers on the same work: `python scripts/benchmark.py --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.harness import Outcome, Row

DESCRIPTION = """\
Measures this package, bare loops, plain Lightning, scikit-learn and torch on the same work:
each side in its own process, in turns, several rounds. A row whose sides do not end in the
same result is refused. Takes about 8 minutes on 2 cores, with --quick about one."""
EPILOG = "exit status: 0 measured or skipped, 1 a row was refused, 2 wrong arguments, 130 stopped"
FETCH = (
    'needs the full MNIST: python -c "from lightning_gd import MNISTParityData; '
    "MNISTParityData('torchvision', root='data').prepare_data()\", then --data-root data"
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parse(argv)
    from rich.console import Console

    from benchmarks import report
    from benchmarks.rows import rows  # takes seconds to import

    known = rows(arguments.quick)
    if arguments.list:
        for row in known:
            print(f"{row.name:18}{row.work}")
        return 0
    try:
        chosen = _chosen(arguments.only, known)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    head = report.head(arguments.quick, arguments.repeats)
    outcomes = _measured(chosen, arguments)
    # Away from a terminal: wide enough that no line breaks.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(report.caption(head), highlight=False, soft_wrap=True)
    console.print(report.table(outcomes))
    if arguments.json:
        plain = {"head": head, "rows": [report.plain(outcome) for outcome in outcomes]}
        arguments.json.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    if len(outcomes) < len(chosen):
        return 130
    return 1 if any(outcome.refused for outcome in outcomes) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="less data and two rounds")
    add("--only", action="append", metavar="NAME", help="rows, with commas or repeated")
    add("--list", action="store_true", help="list the rows and run none")
    add("--repeats", type=_positive, help="rounds of every row (default: 5, with --quick 2)")
    add("--json", type=Path, metavar="FILE", help="write every time measured")
    add("--data-root", default=os.environ.get("MNIST_ROOT", "data"), metavar="DIR",
        help="folder that holds MNIST/raw (default: $MNIST_ROOT, or data)")  # fmt: skip
    arguments = parser.parse_args(argv)
    arguments.repeats = arguments.repeats or (2 if arguments.quick else 5)
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _chosen(only: list[str] | None, known: list[Row]) -> list[Row]:
    names = [name for text in only or [] for name in text.split(",")]
    unknown = set(names) - {row.name for row in known}
    if unknown:
        raise ValueError(
            f"--only {', '.join(sorted(unknown))}: known are {', '.join(r.name for r in known)}"
        )
    return [row for row in known if row.name in names or not names]


def _measured(chosen: list[Row], arguments: argparse.Namespace) -> list[Outcome]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    from benchmarks.harness import Outcome, measure
    from benchmarks.team import Job

    columns = (SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn())
    outcomes, there = [], (Path(arguments.data_root) / "MNIST" / "raw").is_dir()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        job = Job(arguments.data_root, folder)
        task = progress.add_task("", total=len(chosen))
        try:
            for i, row in enumerate(chosen):
                progress.update(task, description=row.name, completed=i)
                if row.digits and not there:
                    outcomes.append(Outcome(row, skipped=FETCH))
                    continue
                step = 1 / (len(row.sides) * arguments.repeats)
                tick = partial(progress.update, task, advance=step)
                outcomes.append(measure(row, job, arguments.repeats, tick))
        except KeyboardInterrupt:
            pass  # what was measured so far is shown
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
