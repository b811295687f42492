"""Run the tests with the lowest and the highest versions that pyproject.toml allows.

Each row is an environment of its own, made by uv (`pip install uv`) and deleted when its tests
have ended: the lowest versions on the oldest Python, the highest on every Python that is found.
With `UV_TORCH_BACKEND=cpu` uv takes the CPU builds of PyTorch, which are 4 GB smaller.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ROWS = [f"{PYTHONS[0]} lowest", *(f"{python} highest" for python in PYTHONS)]
SHOWN = ("torch", "lightning", "jsonargparse", "torchmetrics", "numpy", "pandas", "matplotlib")
UV = [sys.executable, "-m", "uv", "--no-python-downloads"]
TRAIN = ["scripts/train.py", "--trainer.enable_progress_bar", "false"]
QUICK = "modes models cli table checkpoints figures gradcheck loggers export"  # tests


def main() -> int:
    """Print a row of the table for each environment; return 1 if a test fails in one."""
    known = f"of {', '.join(map(repr, ROWS))}"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only the tests of {QUICK}")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW", help=known)
    parser.add_argument("--folder", help="of the environments, 6 GB each; else a temporary one")
    args = parser.parse_args()
    if find_spec("uv") is None:
        parser.error("versions.py makes its environments by uv: pip install uv")
    print(f"| Python | versions | {' | '.join(SHOWN)} | tests |\n|{'---|' * (len(SHOWN) + 3)}")
    good = [print_row(row, args.quick, args.folder) for row in args.rows]
    return int(not all(good))


def print_row(row: str, quick: bool, folder: str | None) -> bool:
    """Make an environment, run the tests in it, and print what they came to."""
    python, versions = row.split()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made, output = make(Path(place), python, versions)
        found = installed(made) if made else {}
        what, output = tests(made, quick) if made else ("no such environment", output)
    numbers = " | ".join(found.get(name, "") for name in SHOWN)
    print(f"| {python} | {versions} | {numbers} | {what} |", flush=True)
    good = bool(found) and not re.search("failed|error|stopped", what)
    if not good:
        print(output[-4000:], file=sys.stderr)
    return good


def make(place: Path, python: str, versions: str) -> tuple[Path | None, str]:
    """Return the interpreter of a new environment, or None and what uv said."""
    interpreter = place / "bin" / "python"
    resolution = "lowest-direct" if versions == "lowest" else "highest"
    install = ["pip", "install", "--resolution", resolution, "--python", str(interpreter)]
    for words in (["venv", "--python", python, str(place)], [*install, "-e", f"{ROOT}[test]"]):
        status, output = run([*UV, *words])
        if status:
            return None, output
    return interpreter, output


def installed(interpreter: Path) -> dict[str, str]:
    """Return the versions of the packages in an environment."""
    _, output = run([*UV, "pip", "freeze", "--python", str(interpreter)])
    return dict(line.split("==") for line in output.splitlines() if "==" in line)


def tests(interpreter: Path, quick: bool) -> tuple[str, str]:
    """Return the last line of the tests, or what stopped the default command, and the output."""
    with tempfile.TemporaryDirectory() as logs:
        words = [*TRAIN, "--trainer.default_root_dir", logs]
        status, output = run([str(interpreter), *words])
    if status or "Warning" in output:
        return "the default command stopped or warned", output
    files = [f"tests/test_{name}.py" for name in QUICK.split()] if quick else []
    _, output = run([str(interpreter), "-m", "pytest", "-q", *files])
    last = (re.findall(r"^.*\d+ (?:passed|failed|error).*", output, re.M) or ["error"])[-1]
    return re.sub(r" in [\d.]+s.*", "", last).strip("= "), output


def run(words: list[str]) -> tuple[int, str]:
    """Run a command; return its status and all that it printed."""
    done = subprocess.run(
        words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
