"""Draw the pictures of the README from real runs: `python scripts/readme_pictures.py --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "pictures"
RUNS = (
    ("--config parity", "loss.png"),
    ("--config linear --model.bias true --model.lr 0.11", "surface.png"),
)
COLOURS = 256  # of a palette: no shade moves by more than 4 of 255, at under half the bytes


def main(argv: list[str] | None = None) -> int:
    """Train and draw; return 0 on success."""
    parser = argparse.ArgumentParser(
        description="Runs two experiments and keeps the losses of one and the surface of the other."
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (scripts/pictures)")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for words, name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            _shrink(_train(Path(folder), words.split()) / name, out / name)
    return 0


def _train(folder: Path, words: list[str]) -> Path:
    """Run an experiment and return the folder of its pictures."""
    from lightning_gd.cli import main as train

    quiet = ["--progress_bar", "null", "--checkpoint", "null"]
    where = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)]
    if train([*words, *where, *quiet]) != 0:
        raise RuntimeError(f"the run {' '.join(words)} failed: see its message above")
    return next(folder.glob("*/version_0/pictures"))


def _shrink(source: Path, target: Path) -> None:
    """Save a picture with a palette, and without the name and version of what drew it."""
    with Image.open(source) as picture:
        few = picture.convert("RGB").quantize(
            COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    few.save(target, optimize=True)
    print(f"{target}: {few.width} x {few.height} pixels, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
