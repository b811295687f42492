"""Write the lessons as Jupyter notebooks: `python scripts/lessons/export.py FOLDER`."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARED = ("teaching.py", "derivatives.py")  # what the lessons import from beside them

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def cells(text: str) -> list[tuple[str, str]]:
    """Return the cells of a file in percent format: pairs of kind, code or markdown, and text."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)[1:]
    found = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        kind = "markdown" if "[markdown]" in mark else "code"
        body = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if kind == "markdown" else body
        found.append((kind, body.strip()))
    return found


def export(folder: Path) -> list[Path]:
    """Write a notebook per lesson into a folder, beside copies of what the lessons import."""
    try:
        import nbformat
        from nbformat import v4
    except ImportError as error:
        raise ImportError("notebooks need nbformat: python -m pip install nbformat") from error
    make = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for lesson in sorted(HERE.glob("lesson_*.py")):
        found = [make[kind](body) for kind, body in cells(lesson.read_text("utf-8"))]
        for number, cell in enumerate(found):
            cell["id"] = f"cell-{number}"  # the same at each export
        path = folder / f"{lesson.stem}.ipynb"
        nbformat.write(v4.new_notebook(cells=found, metadata={"kernelspec": KERNEL}), path)
        written.append(path)
    for name in SHARED:
        shutil.copy(HERE / name, folder)
    return written


def main(argv: list[str] | None = None) -> int:
    """Export; return 0 on success, 1 where nbformat or the folder is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write them; created if it is not there")
    try:
        print(*export(parser.parse_args(argv).folder), sep="\n")
    except (ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
