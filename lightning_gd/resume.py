"""Which checkpoint a run continues from, and whose settings win."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_gd.checkpoints import OURS, class_name, read, settings_of
from lightning_gd.module import GradientDescentModule

FOUND = "LIGHTNING_GD_CKPT_PATH"  # environment: process that looked, and what it found


def load(path: str | os.PathLike[str], **settings: Any) -> GradientDescentModule:
    """Return the model of a checkpoint, with its settings and weights, on the CPU.

    Args:
        path: A local file.
        **settings: Arguments of the model that replace those of the checkpoint.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is refused, see `lightning_gd.checkpoints.read`, or its class is
            neither one of this package nor imported.
    """
    name = str(read(path)[OURS].get("model"))
    module, _, last = name.rpartition(".")
    if module.startswith(f"{OURS}.models."):
        import_module(module)
    # Only what is imported already: a checkpoint must not choose what is imported.
    cls = getattr(sys.modules.get(module), last, None)
    if not (isinstance(cls, type) and issubclass(cls, GradientDescentModule)):
        raise ValueError(f"checkpoint {path} is of {name}: import that class first")
    return cls.load_from_checkpoint(path, **settings)


def find(word: str, runs: Path) -> str:
    """Return the checkpoint file that `--ckpt_path` names.

    The processes that Lightning starts for a run get the answer of the process that started
    them: by then the run may have written a newer checkpoint.

    `last` and `best` are those of the newest run in the folder `runs` that has one; the folder
    of a run stands for its last.
    """
    process, _, file = os.environ.get(FOUND, "").partition(" ")
    if process == str(os.getppid()) and os.environ.get("LOCAL_RANK", "0") != "0":
        return file
    if word in ("last", "best"):
        files = list(runs.glob(f"version_*/checkpoints/{word}.ckpt"))
        if not files:
            raise FileNotFoundError(f"--ckpt_path {word}: no run in {runs} has a checkpoint yet")
        file = str(max(files, key=lambda file: _version(file.parent.parent)))
    else:
        inside = (Path(word, "checkpoints", "last.ckpt"), Path(word, "last.ckpt"))
        file = next((str(path) for path in inside if path.is_file()), word)
    os.environ[FOUND] = f"{os.getpid()} {file}"
    return file


def _version(run: Path) -> int:
    number = run.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def run_of(file: str) -> tuple[str, str, int] | None:
    """Return `(save_dir, name, version)` of the run whose last checkpoint a file is, or None.

    From any other checkpoint a new run starts: nothing that the old one wrote later is removed.
    """
    path = Path(file).absolute()
    run = path.parent.parent
    if path.name != "last.ckpt" or path.parent.name != "checkpoints" or _version(run) < 0:
        return None
    return str(run.parent.parent), run.parent.name, _version(run)


def settings_in(checkpoint: dict[str, Any], data: type) -> dict[str, dict[str, Any]]:
    """Return the settings of the model in a checkpoint, and of its data if of class `data`."""
    found = {"model": settings_of(checkpoint)}
    if checkpoint[OURS].get("data") == class_name(data):
        found["data"] = settings_of(checkpoint, "datamodule_hyper_parameters")
    return found


def start_of(
    checkpoint: dict[str, Any], file: str, theirs: dict[str, Any], config: Any, is_new: bool
) -> str:
    """Return in one line where a run starts, and which typed settings won.

    Args:
        checkpoint: What it starts from.
        file: Its file.
        theirs: The settings of the model, and of the data, that are taken from it.
        config: All settings of the run.
        is_new: The run has a folder of its own.
    """
    parts = [f"from {file}, update {checkpoint['global_step']}"]
    parts += ["in a new run folder"] * is_new
    if "data" not in theirs:
        parts.append("data not those of the checkpoint")
    for part, values in theirs.items():
        mine = config[part].init_args.as_dict()
        parts += [
            f"typed: {part}.{name} {mine[name]} instead of {value} of the checkpoint"
            for name, value in values.items()
            if name in mine and mine[name] != value
        ]
    return "; ".join(parts)
