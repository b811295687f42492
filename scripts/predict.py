"""Odd or even? Pictures of digits, judged by a trained model: `predict.py --help`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

DESCRIPTION = """\
Judge pictures of single digits by a checkpoint of a run on digits. Any format and size;
dark on light, light on dark, coloured or transparent; brought to 28×28 as MNIST's are.

score   the output of the model: above 0 it says odd, below 0 even (trained on +1 and -1)
margin  how far the score is from 0, where the answer changes"""


def main(argv: list[str] | None = None) -> int:
    """Answer; 0 if every picture was read, 1 if one (or the checkpoint) was not, 2 wrong usage."""
    arguments = _parse(argv)
    from digits.scoring import pictures, scorer  # takes seconds: not for --help

    try:
        files, score = pictures(arguments.pictures), scorer(arguments.checkpoint)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    answers = _answers(files, score)
    if arguments.json:
        print(json.dumps(answers, indent=2, ensure_ascii=False))
    else:
        _show(answers)
    return int(any("error" in answer for answer in answers))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="of a run on digits")
    add("--json", action="store_true", help="print JSON: file, answer, score, margin (or error)")
    add("pictures", nargs="+", type=Path, metavar="PICTURE", help="files, or folders of them")
    return parser.parse_args(argv)


def _answers(files: list[Path], score: Any) -> list[dict[str, Any]]:
    from digits.images import read_digit

    answers, digits = [], []
    for file in files:
        answers.append({"file": str(file)})
        try:
            digits.append((answers[-1], read_digit(file)))
        except (OSError, ValueError) as error:
            answers[-1]["error"] = str(error)
    scores = score([digit for _, digit in digits]) if digits else []
    for (answer, _), value in zip(digits, scores, strict=True):
        answer |= {"answer": "odd" if value > 0 else "even", "score": value, "margin": abs(value)}
    return answers


def _show(answers: list[dict[str, Any]]) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("picture", overflow="fold")
    for name in ("answer", "score", "margin"):
        table.add_column(name, justify="right")
    for answer in answers:
        if "error" in answer:
            print(f"error: {answer['file']}: {answer['error']}", file=sys.stderr)
        else:
            numbers = (f"{answer['score']:+.4f}", f"{answer['margin']:.4f}")
            table.add_row(escape(answer["file"]), answer["answer"], *numbers)
    if table.row_count:
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
