"""Draw the picture of the README from a real run: `python scripts/readme_pictures.py --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "pictures"
COLOURS = 256  # of a palette: no shade moves by more than 4 of 255, at under half the bytes


def main(argv: list[str] | None = None) -> int:
    """Train and draw; return 0 on success."""
    parser = argparse.ArgumentParser(
        description="Runs the experiment `parity` and keeps the picture of its losses."
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (scripts/pictures)")
    out = parser.parse_args(argv).out
    with tempfile.TemporaryDirectory() as folder:
        picture = _train(Path(folder))
        out.mkdir(parents=True, exist_ok=True)
        _shrink(picture, out / picture.name)
    return 0


def _train(folder: Path) -> Path:
    """Run the default experiment and return the file of the picture."""
    from lightning_gd.cli import main as train

    quiet = ["--progress_bar", "null", "--checkpoint", "null"]
    where = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)]
    if train(["--config", "parity", *where, *quiet]) != 0:
        raise RuntimeError("the experiment parity failed: see its message above")
    return folder / "parity" / "version_0" / "pictures" / "loss.png"


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
