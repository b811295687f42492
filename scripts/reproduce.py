"""Run the lessons, and compare every number: `python scripts/reproduce.py --help`."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

LESSONS = Path(__file__).parent / "lessons"
sys.path.append(str(LESSONS))  # where the lessons find what they share
NAMES = [path.stem[-3:] for path in sorted(LESSONS.glob("lesson_*.py"))]
FETCH = "python scripts/reproduce.py 002 --data-root data --download"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parse(argv)
    chosen = sorted(set(arguments.lessons)) or NAMES
    if arguments.data_root and "002" in chosen:
        try:
            _find_digits(arguments.data_root, arguments.download)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        os.environ["MNIST_ROOT"] = arguments.data_root
    return _run(chosen, arguments.require_all)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run the lessons, and compare every number that the notebooks print with ours.",
        epilog="exit status: 0 all agree, 1 a number differs, 2 wrong arguments or no data there",
    )
    add = parser.add_argument
    add("lessons", nargs="*", metavar="000 … 004", help="which; default: all")
    add("--require-all", action="store_true", help="fail where the full MNIST is missing too")
    add("--data-root", default=os.environ.get("MNIST_ROOT"), metavar="DIR",
        help="folder that holds MNIST/raw (default: $MNIST_ROOT)")  # fmt: skip
    add("--download", action="store_true", help="fetch MNIST into --data-root")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.lessons) - set(NAMES))
    if unknown:
        parser.error(f"unknown lessons {', '.join(unknown)}; known: {', '.join(NAMES)}")
    if arguments.download and not arguments.data_root:
        parser.error("--download needs --data-root, the folder to fetch MNIST into")
    return arguments


def _find_digits(root: str, download: bool) -> None:
    """Fetch the full MNIST if asked to, and refuse a folder without it."""
    from lightning_gd import MNISTParityData
    from lightning_gd.data.mnist import RAW, RAW_FILES

    if download:
        MNISTParityData(source="torchvision", root=root).prepare_data()
    elif not all((Path(root) / RAW / name).is_file() for name in RAW_FILES):
        raise FileNotFoundError(
            f"{Path(root) / RAW} does not hold the four files of MNIST; to fetch: {FETCH}"
        )


def _run(lessons: list[str], require_all: bool) -> int:
    import matplotlib

    import teaching  # takes seconds to import

    matplotlib.use("template")  # draws nothing
    teaching.CHECKS.clear()
    for name in lessons:
        print(f"\nLesson {name}")
        try:
            runpy.run_path(str(LESSONS / f"lesson_{name}.py"))
        except teaching.Differs as error:
            print(error)
    table = Table("experiment", "numbers", "same in every digit", "verdict", box=SIMPLE_HEAD)
    verdicts: dict[str, list[str]] = {"agrees": [], "needs data": [], "DIFFERS": []}
    for experiment in dict.fromkeys(check.experiment for check in teaching.CHECKS):
        mine = [check for check in teaching.CHECKS if check.experiment == experiment]
        worst = [v for v in verdicts if v in {check.verdict for check in mine}][-1]
        verdicts[worst].append(experiment)
        counts = sum(check.numbers for check in mine), sum(check.same for check in mine)
        table.add_row(experiment, *map(str, counts), worst)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(_closing_line(*verdicts.values()))
    return int(bool(verdicts["DIFFERS"] or (require_all and verdicts["needs data"])))


def _closing_line(agree: list[str], need: list[str], differ: list[str]) -> str:
    """Return how many agree of how many, and what is open."""
    line = f"{len(agree)} of {len(agree + differ)} experiments agree with the notebooks"
    if differ:
        line += f"; {len(differ)} differ: {', '.join(differ)}"
    return line + (f"; {len(need)} more need the full MNIST: {FETCH}" if need else "")


if __name__ == "__main__":
    sys.exit(main())
