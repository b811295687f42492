"""Checkpoint files: written whole or not at all, and loaded without running code in them."""

import contextlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_gd.files import whole

FORMAT = 2  # of what this version adds to a checkpoint; another number is refused
OURS = "lightning_gd"  # the key of it
PARTS = {  # of a checkpoint, and of what type each is
    "global_step": int,
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    "curve_files": list,
}
NEEDED = ("global_step", "pytorch-lightning_version", "state_dict")  # also to test or to load


def local(path: str | os.PathLike[str]) -> str:
    """Return the path; raise ValueError if it is a URL."""
    if "://" in str(path):
        raise ValueError(f"checkpoint {path} is a URL: only local files are written and loaded")
    return str(path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint of this package, tensors and plain values only, to the CPU.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is a URL, holds code, is damaged, or was not written by this version.
    """
    file = Path(local(path))
    if file.is_dir():
        raise FileNotFoundError(f"checkpoint {path} is a folder without last.ckpt of a run")
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {path}: there is no such file")
    checkpoint = _loaded(file)
    ours = checkpoint.get(OURS) if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict):
        raise ValueError(f"checkpoint {path} is refused: it was not written by {OURS}")
    if ours.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} is refused: it has format {ours.get('format')} of {OURS} "
            f"{ours.get('version')}, and this is {OURS} {version(OURS)}, which reads {FORMAT}"
        )
    for name, kind in PARTS.items():
        found = checkpoint.get(name, None if name in NEEDED else kind())
        if not isinstance(found, kind):
            what = f"{name} is {type(found).__name__}, not {kind.__name__}"
            raise ValueError(f"checkpoint {path} is refused: its {what}")
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(value, Tensor):
            raise ValueError(f"checkpoint {path} is refused: its parameter {name!r} is no tensor")
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        settings_of(checkpoint, key)
    return checkpoint


def _loaded(file: Path) -> Any:
    reason = "it is damaged, cut off, or no checkpoint at all"
    with file.open("rb") as opened:  # a path would choose the format by its ending
        try:
            parts = zipfile.ZipFile(opened)
            packed = any(part.compress_type for part in parts.infolist())  # it may fill the memory
            if packed or parts.testzip():  # torch does not verify the checksums
                raise zipfile.BadZipFile
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes raise errors of many types
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            if code and isinstance(error, pickle.UnpicklingError):
                reason = f"to load it would run {code[1]}; only tensors and plain values are loaded"
            # An OSError as the cause would read as a failure of the disk.
            cause = None if isinstance(error, OSError) else error
            raise ValueError(f"checkpoint {file} is refused: {reason}") from cause


def class_name(cls: type) -> str:
    """Return the dotted path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_class(checkpoint: dict[str, Any], cls: type) -> None:
    """Raise ValueError if a checkpoint is of another model."""
    theirs, mine = str(checkpoint[OURS].get("model")), class_name(cls)
    if theirs.replace("__main__.", f"{cls.__module__}.") != mine:  # a script has no other name
        raise ValueError(f"the checkpoint is of {theirs}, the model is {mine}: they must be one")


def check_shapes(checkpoint: dict[str, Any], model: nn.Module, hint: str = "") -> None:
    """Raise ValueError, naming the first difference, for other parameter names or shapes."""
    theirs, mine = checkpoint.get("state_dict", {}), model.state_dict()
    for name in [*mine, *theirs]:
        there, here = (list(d[name].shape) if name in d else "absent" for d in (theirs, mine))
        if there != here:
            what = f"parameter {name!r} is {there} in the checkpoint, {here} in the model"
            raise ValueError(f"{what}{hint}")


def settings_of(checkpoint: dict[str, Any], key: str = "hyper_parameters") -> dict[str, Any]:
    """Return the arguments of the model or the data in a checkpoint."""
    found = {k: v for k, v in checkpoint.get(key, {}).items() if not str(k).startswith("_")}
    if "class_path" in repr(found):  # which would choose what is imported
        raise ValueError("the checkpoint is refused: its settings hold a class_path")
    return found


class SafeCheckpointIO(CheckpointIO):
    """Writes a checkpoint of `model` beside its target, syncs and renames it; loads by `read`."""

    def __init__(self, model: LightningModule) -> None:
        self.model = model

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the file, or leave the existing one untouched and raise OSError."""
        target, buffer = Path(local(path)), io.BytesIO()
        torch.save(self._stamped(checkpoint), buffer)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole(target) as partial:
                partial.write_bytes(buffer.getbuffer())
        except OSError as error:
            kept = "the previous one is untouched" if target.exists() else "there is none yet"
            raise OSError(f"checkpoint {target} was not written: {error}; {kept}") from error

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Load to the CPU, tensors and plain values only; check class and shapes."""
        checkpoint = read(path)
        check_class(checkpoint, type(self.model))
        check_shapes(checkpoint, self.model)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file, if it exists."""
        Path(path).unlink(missing_ok=True)

    def _stamped(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Add the format, the version and the classes, and keep the settings plain."""
        data = getattr(self.model.trainer, "datamodule", None)
        ours = {"format": FORMAT, "version": version(OURS)}
        ours |= {"model": class_name(type(self.model)), "data": class_name(type(data))}
        checkpoint = {**checkpoint, OURS: ours}
        for part in {"hyper_parameters", "datamodule_hyper_parameters"} & checkpoint.keys():
            settings, checkpoint[part] = checkpoint[part], {}
            for name, value in settings.items():
                with contextlib.suppress(TypeError):
                    checkpoint[part][name] = _plain(value)
        kept = checkpoint.get("hyper_parameters", self.model.hparams_initial)  # or weights alone
        ours["left_out"] = sorted(self.model.hparams_initial.keys() - kept.keys())
        return checkpoint


def _plain(value: Any) -> Any:
    """Return a value that `read` loads again; raise TypeError if it has no plain form."""
    if value is None or type(value) in (bool, int, float, str, Tensor):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, list):
        return list(map(_plain, value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError
