"""Where a run goes on, and whose settings win when it does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gd.loading import OURS, check_class, check_shapes, class_name
from lightning_gd.optimizers import build_optimizer

if TYPE_CHECKING:
    from lightning_gd.module import GradientDescentModule

KEPT = ("optimizer", "scheduler", "scheduler_args", "scheduler_interval")  # with their state


def find(word: str, runs: Path) -> str:
    """The checkpoint that a user means.

    Args:
        word: `last` or `best`, for that of the newest run in `runs` that has one; the folder of
            a run, for its last; or a file.
        runs: The folder of the runs of one experiment.

    Raises:
        FileNotFoundError: If no run has one.
    """
    if word in ("last", "best"):
        files = list(runs.glob(f"version_*/checkpoints/{word}.ckpt"))
        if not files:
            raise FileNotFoundError(f"--ckpt_path {word}: no run in {runs} has a checkpoint yet")
        return str(max(files, key=lambda file: _version(file.parent.parent)))
    inside = [
        os.path.join(word, *parts) for parts in (("checkpoints", "last.ckpt"), ("last.ckpt",))
    ]
    return next((file for file in inside if os.path.isfile(file)), word)


def _version(run: Path) -> int:
    number = run.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def run_of(file: str) -> tuple[str, str, int] | None:
    """`(save_dir, name, version)` of the run whose last checkpoint a file is; else `None`.

    Another checkpoint of a run, or a copy elsewhere, starts a run of its own: what the old one
    did after it is not cut off.
    """
    path = Path(file).absolute()
    run = path.parent.parent
    if path.name != "last.ckpt" or path.parent.name != "checkpoints" or _version(run) < 0:
        return None
    return str(run.parent.parent), run.parent.name, _version(run)


def settings(checkpoint: Mapping[str, Any], data: type) -> dict[str, dict[str, Any]]:
    """The settings of the model in a checkpoint, and of its data if they are of class `data`."""
    found = {"model": checkpoint.get("hyper_parameters", {})}
    if checkpoint[OURS].get("data") == class_name(data):
        found["data"] = checkpoint.get("datamodule_hyper_parameters", {})
    return {
        part: {k: v for k, v in values.items() if not k.startswith("_") and _plain(v)}
        for part, values in found.items()
    }


def _plain(value: object) -> bool:
    """Whether a value is data only: a `class_path` would have the parser import something."""
    if isinstance(value, Mapping):
        return "class_path" not in value and all(map(_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def differences(
    mine: Mapping[str, Mapping[str, Any]], others: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """`part.name value instead of other`, for the settings that both have."""
    return [
        f"{part}.{name} {mine[part][name]} instead of {value}"
        for part, values in others.items()
        for name, value in values.items()
        if name in mine.get(part, {}) and mine[part][name] != value
    ]


def adopt(checkpoint: dict[str, Any], model: GradientDescentModule) -> None:
    """Make a loaded checkpoint one of this model, before anything is restored from it.

    Settings of the optimizer that the model was given anew win over those in its state, and a
    run may change its road.

    Raises:
        ValueError: If it is of another class or shape, or a setting changes whose state it holds.
    """
    check_class(checkpoint, type(model))
    check_shapes(checkpoint, model)
    if model._trainer is None or model.trainer.state.fn != "fit":
        return
    old, new = checkpoint["hyper_parameters"], dict(model.hparams)
    for name in KEPT:
        if old[name] != new[name]:
            raise ValueError(
                f"model.{name} {new[name]!r} instead of {old[name]!r} of the checkpoint: its state "
                "would be lost; leave it out, or train anew without the checkpoint"
            )
    _retune(checkpoint, old, {**new, "lr": old["lr"] if new["lr"] == "auto" else new["lr"]})
    _count_updates(checkpoint["loops"]["fit_loop"], checkpoint["global_step"])


def _retune(checkpoint: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Write what differs between the optimizers of two settings into the state of one."""
    was, now = _group(old), _group(new)
    changed = {k: v for k, v in now.items() if k != "lr" and v != was[k]}
    for state in checkpoint["optimizer_states"]:
        for group in state["param_groups"]:
            group.update(changed)
            for name in {"lr", "initial_lr"} & group.keys():
                group[name] = _scaled(group[name], was["lr"], now["lr"])
    for state in checkpoint["lr_schedulers"]:
        for name in {"base_lrs", "_last_lr"} & state.keys():
            state[name] = [_scaled(lr, was["lr"], now["lr"]) for lr in state[name]]


def _group(h: Mapping[str, Any]) -> dict[str, Any]:
    optimizer = build_optimizer(
        h["optimizer"],
        [Parameter(torch.zeros(1))],
        h["lr"],
        h["momentum"],
        h["optimizer_args"] or {},
    )
    return {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}


def _scaled(lr: float | Tensor, was: float, now: float) -> float | Tensor:
    return now if lr == was else lr * (now / was)  # a schedule keeps its form


def _count_updates(loop: dict[str, Any], updates: int) -> None:
    """Let both roads count the updates made so far: Lightning keeps a counter for each."""
    automatic = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    manual = loop["epoch_loop.manual_optimization.optim_step_progress"]
    for progress in (automatic, manual):
        progress["total"].update(ready=updates, completed=updates)
