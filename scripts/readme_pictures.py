"""Draw the pictures of the README from real runs: `python scripts/readme_pictures.py --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
FROM_PARITY = ("loss", "weights", "accuracy_by_digit", "wrong_digits")
COLOURS = 256  # of a palette: no shade moves by more than 4 of 255, at under half the bytes


def main(argv: list[str] | None = None) -> int:
    """Train, compare, draw; 0 on success."""
    parser = argparse.ArgumentParser(
        description="Runs the experiment `parity` and scripts/compare.py, and keeps their pictures."
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (scripts/pictures)")
    out = parser.parse_args(argv).out
    with tempfile.TemporaryDirectory() as folder:
        found = _train(Path(folder)) | _compare(Path(folder))
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in found.items():
            _shrink(picture, out / f"{name}.png")
    return 0


def _train(folder: Path) -> dict[str, Path]:
    """The pictures of the default experiment, by name."""
    from lightning_gd.cli import main as train

    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]
    where = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)]
    if train(["--config", "parity", *where, *quiet]) != 0:
        raise RuntimeError("the experiment parity failed: see its message above")
    pictures = folder / "parity" / "version_0" / "pictures"
    return {name: pictures / f"{name}.png" for name in FROM_PARITY}


def _compare(folder: Path) -> dict[str, Path]:
    """The picture of the roads to a gradient that `compare.py` draws."""
    import compare

    if compare.main(["--config", "linear", "--steps", "40", "--out", str(folder)]) != 0:
        raise RuntimeError("scripts/compare.py failed: see its message above")
    return {"roads": folder / "compare.png"}


def _shrink(source: Path, target: Path) -> None:
    """Save a picture with a palette, and without the name and version of what drew it."""
    from PIL import Image

    with Image.open(source) as picture:
        few = picture.convert("RGB").quantize(
            COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    few.save(target, optimize=True)
    print(f"{target}: {few.width} x {few.height} pixels, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
