"""Fit a loaded checkpoint to the settings of the run that continues from it."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch.nn import Parameter

from lightning_gd.settings import build_optimizer

KEPT = ("optimizer", "scheduler", "scheduler_args", "scheduler_interval")  # with their state


def adapt(checkpoint: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Let the settings of this run win over those of a checkpoint that is being loaded."""
    old = checkpoint["hyper_parameters"]
    for name in KEPT:
        if name in old and old[name] != new[name]:  # a function is in no checkpoint
            raise ValueError(
                f"model.{name} {new[name]!r} instead of {old[name]!r} of the checkpoint: its state "
                "would be lost; leave it out, or train anew without the checkpoint"
            )
    _retune(checkpoint, old, {**new, "lr": old["lr"] if new["lr"] == "auto" else new["lr"]})
    _count_updates(checkpoint["loops"]["fit_loop"], checkpoint["global_step"])


def move_to_place(checkpoint: dict[str, Any], updates_per_batch: Fraction) -> None:
    """Let the loops of Lightning continue where the data continue.

    Lightning would end a finished epoch a second time, begin the next one after an epoch that
    `max_steps` cut short, and count the batches of another `updates_per_step`.
    """
    loop, updates = checkpoint["loops"]["fit_loop"], checkpoint["updates_in_epoch"]
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    now, last = batches["current"], batches["is_last_batch"] and not updates
    ended = epochs["current"]["processed"] == epochs["current"]["ready"]
    open_batches = now["processed"] - now["completed"]  # 1 if it was saved in on_train_batch_end
    if not updates and ended or updates == 0 and last and open_batches:
        _count_epochs(epochs, left=0)
        batches["total"]["completed"] = batches["total"]["processed"]
        now.update(dict.fromkeys(now, 0))
        batches["is_last_batch"] = False
    elif updates is not None:
        if ended:
            _count_epochs(epochs, left=1)
        done = int(updates / updates_per_batch)
        now.update(ready=done, started=done, processed=done, completed=done - open_batches)
        batches["is_last_batch"] = last


def _count_epochs(epochs: dict[str, Any], left: int) -> None:
    for progress in epochs.values():
        progress.update(processed=progress["ready"] - left, completed=progress["ready"] - left)


def _retune(checkpoint: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Write the optimizer settings that changed into the saved state; a schedule keeps its form."""
    was, now = _group(old), _group(new)
    changed = {k: v for k, v in now.items() if k != "lr" and v != was[k]}

    def scaled(lr: Any) -> Any:
        return now["lr"] if lr == was["lr"] else lr * (now["lr"] / was["lr"])

    for group in (g for state in checkpoint["optimizer_states"] for g in state["param_groups"]):
        group.update(changed)
        group.update({name: scaled(group[name]) for name in {"lr", "initial_lr"} & group.keys()})
    for state in checkpoint["lr_schedulers"]:
        for name in {"base_lrs", "_last_lr"} & state.keys():
            state[name] = [scaled(lr) for lr in state[name]]


def _group(h: Mapping[str, Any]) -> dict[str, Any]:
    parameters, args = [Parameter(torch.zeros(1))], h["optimizer_args"] or {}
    optimizer = build_optimizer(h["optimizer"], parameters, h["lr"], h["momentum"], args)
    return {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}


def _count_updates(loop: dict[str, Any], updates: int) -> None:
    """Let both modes continue from the same number of updates; Lightning counts them apart."""
    automatic = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for progress in (automatic, loop["epoch_loop.manual_optimization.optim_step_progress"]):
        progress["total"].update(ready=updates, completed=updates)
