"""The loggers of Lightning beside TensorBoard's: what they are given, and what looks at them."""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer, loggers
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)

from lightning_gd.arguments import unknown
from lightning_gd.logger import RunLogger

OPTION = "--trainer.logger"
KNOWN = sorted({"RunLogger", *loggers.__all__} - {"Logger"})
PACKAGES = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}
MLFLOW = "MLFLOW_TRACKING_URI"  # environment: where MLflow's server or files are


def given(kind: str, root: str, experiment: str) -> dict[str, Any]:
    """Return the arguments of a logger where they are not typed."""
    folder = {"save_dir": root, "name": experiment}
    mlflow = {"tracking_uri": os.environ.get(MLFLOW, f"sqlite:///{root}/mlflow.db")}
    return {
        "RunLogger": folder,
        "TensorBoardLogger": folder,
        "CSVLogger": {"save_dir": f"{root}/csv", "name": experiment},
        # In the background: a transaction for each update would take longer than the update.
        "MLFlowLogger": {**mlflow, "experiment_name": experiment, "synchronous": False},
        "WandbLogger": {"save_dir": root, "project": experiment},
    }.get(kind, {})


def without(words: list[str]) -> list[str]:
    """Return the words of a command without those of its loggers."""
    kept, left = [], iter(words)
    for word in left:
        if not word.startswith(OPTION):
            kept.append(word)
        elif "=" not in word:
            next(left, None)
    return kept


def with_names(words: list[str], root: str, experiment: str) -> list[str]:
    """Give each logger that is typed the folder and the experiment's name, unless it has them."""
    found, typed = list(words), {word.partition("=")[0] for word in words}
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == OPTION and (equals or i + 1 < len(words)):
            several = _read(value if equals else words[i + 1])
            names = [_with_names(entry, root, experiment) for entry in _listed(several)]
            for entry in names if f"{OPTION}.save_dir" in typed else ():
                if isinstance(entry, dict):  # MLflow would not use it beside this
                    entry["init_args"].pop("tracking_uri", None)
            new = yaml.safe_dump(names if isinstance(several, list) else names[0])
            found[i if equals else i + 1] = f"{OPTION}={new}" if equals else new
    return found


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{OPTION} {text} is not YAML: {' '.join(str(error).split())}") from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _with_names(entry: Any, root: str, experiment: str) -> Any:
    if entry is None or isinstance(entry, bool):
        return entry
    asked = entry if isinstance(entry, dict) else {"class_path": entry}
    kind, typed = str(asked.get("class_path")), asked.get("init_args") or {}
    name = kind.rpartition(".")[2]
    if name == kind not in KNOWN:
        raise ValueError(unknown("logger", kind, KNOWN))
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        raise ValueError(f"{OPTION} {kind} needs: pip install {PACKAGES[name]}")
    if not isinstance(typed, dict):
        raise ValueError(f"{OPTION}: the init_args {typed} of {kind} must map names to values")
    return {"class_path": kind, "init_args": {**given(name, root, experiment), **typed}}


def for_run(
    typed: Any, continued: tuple[str, str, int] | None, new: tuple[str, str, None]
) -> list[Logger]:
    """Return the user's loggers and, last, the one with the folder of the run.

    Args:
        typed: A logger, several, or what stands for the default one.
        continued: Folder, experiment and number of the run that goes on, if there is one.
        new: Folder and experiment of any other run.
    """
    own = list(typed) if isinstance(typed, Iterable) else [typed] * isinstance(typed, Logger)
    boards = [logger for logger in own if isinstance(logger, RunLogger)]
    if continued is None and boards:
        return own
    others = [logger for logger in own if logger not in boards]
    return [*others, RunLogger(*(continued or new), curves=bool(boards) or not others)]


def run_logger(trainer: Trainer) -> RunLogger | None:
    """Return the logger that has the folder of the run."""
    return next((log for log in trainer.loggers if isinstance(log, RunLogger)), None)


def run_folder(trainer: Trainer) -> Path | None:
    """Return the folder of the run: that of a RunLogger, else of the first logger, if any."""
    if not trainer.loggers:
        return None
    logger: Any = run_logger(trainer) or trainer.loggers[0]
    if getattr(logger, "log_dir", None):
        return Path(logger.log_dir)
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version))


def viewers(trainer: Trainer) -> dict[str, str]:
    """Return by the kind of each logger the command, the file or the address that shows it."""
    found = {name: text for name, text in map(_viewer, trainer.loggers) if text}
    return found if len(found) > 1 else dict(zip(["look at it"], found.values(), strict=False))


def _viewer(logger: Logger) -> tuple[str, str]:
    """Return the kind of a logger and what shows it."""
    if isinstance(logger, TensorBoardLogger):
        shown = getattr(logger, "curves", True)
        return "TensorBoard", f"tensorboard --logdir {logger.save_dir}" if shown else ""
    if isinstance(logger, CSVLogger):
        return "CSV", str(Path(logger.log_dir, "metrics.csv"))
    if isinstance(logger, MLFlowLogger):
        uri = logger.experiment.tracking_uri
        remote = uri.startswith("http")
        return "MLflow", uri if remote else f"mlflow ui --backend-store-uri {uri}"
    if isinstance(logger, WandbLogger):
        run: Any = logger.experiment
        return "Weights & Biases", f"wandb sync {Path(run.dir).parent}" if run.offline else run.url
    return type(logger).__name__, str(logger.save_dir or "")
