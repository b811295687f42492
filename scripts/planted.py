"""Plant mistakes in hand-written backward passes and look for them: `python scripts/planted.py`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from planting.mistakes import Mistake

DESCRIPTION = """\
Trains tiny LightningModules with hand-written backward passes, one planted mistake
at a time, for 25 updates with GradientCheck(every_n_updates=5), which checks the
updates 0, 1, 5, 10, 15, 20 and 24. Prints at which update each was found, how it was
named, and whether three usual unit tests of the single Function find it:

  gradcheck      torch.autograd.gradcheck in float64 with its defaults
  bf16 5e-2      gradients in bfloat16 against autograd of plain operations,
                 rtol = atol = 5e-2
  one direction  the slope along one random direction by a step of 1e-4 in float32,
                 rtol = atol = 2e-2, in the manner of JAX's check_grads

"-" where a test cannot be asked. The exit status is 1 if GradientCheck misses one."""
COLUMNS = ("gradcheck", "bfloat16", "direction")


@dataclass(frozen=True)
class Row:
    """What was found of one mistake; None where a test cannot be asked."""

    mistake: str
    module: str
    update: int | None
    named: str
    gradcheck: bool | None
    bfloat16: bool | None
    direction: bool | None


def main(argv: list[str] | None = None) -> int:
    """Look for all mistakes; return 0 if all are caught, 1 if one is missed."""
    arguments = _parse(argv)
    from planting.mistakes import MISTAKES
    from quiet import quiet

    quiet()
    chosen = [m for m in MISTAKES if arguments.only in f"{m.kind} {m.name}"]
    errors = Console(stderr=True)
    rows = [look(m) for m in track(chosen, "planting", console=errors, transient=True)]
    caught = sum(row.update is not None for row in rows)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
    elif arguments.markdown:
        print(*_markdown(rows), sep="\n")
    else:
        Console().print(_table(rows))
    print(f"{caught} of {len(rows)} caught", file=sys.stderr if arguments.json else sys.stdout)
    return 0 if caught == len(rows) else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    only = "only mistakes whose module and name contain TEXT, such as conv"
    parser.add_argument("--only", default="", metavar="TEXT", help=only)
    return parser.parse_args(argv)


def look(mistake: Mistake) -> Row:
    """Train with a mistake, and ask the three tests about its Function."""
    from planting import finding
    from planting.units import unit

    found, alone = finding.find(mistake), unit(mistake)
    tests = (finding.gradcheck_finds, finding.bfloat16_finds, finding.direction_finds)
    answers = [None if alone is None else finds(alone) for finds in tests]
    return Row(mistake.name, mistake.kind, found.update, found.named, *answers)


def _cells(row: Row) -> list[str]:
    update = "missed" if row.update is None else str(row.update)
    answers = [{None: "–", True: "found", False: "missed"}[getattr(row, c)] for c in COLUMNS]
    return [row.mistake, row.module, update, row.named, *answers]


HEAD = ("mistake", "module", "caught at update", "named as",
        "gradcheck", "bf16 5e-2", "one direction")  # fmt: skip


def _table(rows: list[Row]) -> Table:
    table = Table(*HEAD, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _markdown(rows: list[Row]) -> list[str]:
    lines = [HEAD, ["---"] * len(HEAD), *map(_cells, rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
