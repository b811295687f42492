"""What a checkpoint says of itself, and loading one without running what is in it."""

from __future__ import annotations

import os
import pickle
import re
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule

if TYPE_CHECKING:
    from lightning_gd.module import GradientDescentModule

FORMAT = 1  # of what `stamp` adds; another number is refused
OURS = "lightning_gd"  # where it stands in a checkpoint


def local(path: str | os.PathLike[str]) -> str:
    """The path, unless it is a URL.

    Raises:
        ValueError: Naming it.
    """
    if "://" in str(path):
        raise ValueError(f"checkpoint {path} is a URL: only local files are written and loaded")
    return str(path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint of this package, tensors and plain values only, to the CPU.

    Args:
        path: A local file.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is a URL, holds code, is damaged, or was not written by this version.
    """
    file = Path(local(path))
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {path}: there is no such file")
    with file.open("rb") as opened:  # not by name: `.safetensors` would take another road
        try:
            checkpoint = torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:  # what damaged bytes raise has no common type
            # An OSError as its cause would read as a fault of the disk.
            cause = None if isinstance(error, OSError) else error
            raise ValueError(f"checkpoint {path} is refused: {_reason(error)}") from cause
    ours = checkpoint.get(OURS) if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict):
        raise ValueError(f"checkpoint {path} is refused: it was not written by {OURS}")
    if ours.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} is refused: it has format {ours.get('format')} of {OURS} "
            f"{ours.get('version')}, and this is {OURS} {version(OURS)}, which reads {FORMAT}"
        )
    return checkpoint


def _reason(error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and named:
        return f"to load it would run {named[1]}; only tensors and plain values are loaded"
    return "it is damaged, cut off, or no checkpoint at all"


def stamp(checkpoint: dict[str, Any], model: LightningModule) -> None:
    """Say in a checkpoint what it is of and where the curves stood, and keep its settings plain."""
    trainer = model.trainer
    for key in {"hyper_parameters", "datamodule_hyper_parameters"} & checkpoint.keys():
        checkpoint[key] = _plain(checkpoint[key])
    data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    logs: Any = trainer.logger if trainer.is_global_zero else None
    checkpoint[OURS] = {
        "format": FORMAT,
        "version": version(OURS),
        "model": class_name(type(model)),
        "data": class_name(type(data)),
        "events": logs.events() if hasattr(logs, "events") else {},
    }


def _plain(value: Any) -> Any:
    """A value that `read` loads again; what has no plain form is left out."""
    if isinstance(value, dict):
        kept = {str(key): _plain(entry) for key, entry in value.items()}
        return {key: entry for key, entry in kept.items() if entry is not ...}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    plain = value is None or isinstance(value, (bool, int, float, str, torch.Tensor))
    return value if plain else ...


def class_name(cls: type) -> str:
    """The dotted path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_class(checkpoint: dict[str, Any], cls: type) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        ValueError: Naming both classes.
    """
    theirs, mine = str(checkpoint[OURS].get("model")), class_name(cls)
    if theirs.replace("__main__.", f"{cls.__module__}.") != mine:  # a script has no other name
        raise ValueError(f"the checkpoint is of {theirs}, the model is {mine}: they must be one")


def check_shapes(checkpoint: dict[str, Any], model: torch.nn.Module) -> None:
    """Refuse parameters of other names or shapes.

    Raises:
        ValueError: Naming the first that differs, on both sides.
    """
    theirs, mine = checkpoint.get("state_dict", {}), model.state_dict()
    for name in [*mine, *theirs]:
        there, here = (list(d[name].shape) if name in d else "absent" for d in (theirs, mine))
        if there != here:
            raise ValueError(
                f"parameter {name!r} is {there} in the checkpoint, {here} in the model"
            )


def load(path: str | os.PathLike[str], **settings: Any) -> GradientDescentModule:
    """The model of a checkpoint, with its settings and weights.

    Args:
        path: A local file.
        **settings: Arguments of the model that replace those of the checkpoint.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is refused, see `read`, or its class is neither one of this package
            nor imported.
    """
    from lightning_gd.module import GradientDescentModule

    name = str(read(path)[OURS].get("model"))
    module, _, last = name.rpartition(".")
    if module.startswith(f"{OURS}.models."):
        import_module(module)
    # Only what has been imported: a checkpoint must not choose what is.
    cls = getattr(sys.modules.get(module), last, None)
    if not (isinstance(cls, type) and issubclass(cls, GradientDescentModule)):
        raise ValueError(f"checkpoint {path} is of {name}: import that class first")
    return cls.load_from_checkpoint(path, **settings)
