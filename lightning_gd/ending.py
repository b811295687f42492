"""How the processes of a run end: together, and each failure with its reason."""

import re
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

from lightning_gd.distributed import world_size


def reason(error: BaseException, checkpoint: str | None) -> Exception | None:
    """Return a clearer error if another process or a checkpoint caused it; None otherwise."""
    if type(error).__name__.startswith("Dist") or re.search("gloo|pair closure", str(error)):
        return RuntimeError(_lost(str(error)))
    frames = traceback.extract_tb(error.__traceback__)
    places = {(Path(frame.filename).stem, "restore" in frame.name) for frame in frames}
    restoring = ("checkpoint_connector", True) in places  # a file of Lightning
    if restoring and isinstance(error, (LookupError, TypeError, AttributeError)):
        return ValueError(f"checkpoint {checkpoint} cannot be restored: {error!r}")
    return None


def _lost(text: str) -> str:
    """Return the message shown when a collective fails because another process has died."""
    late = re.search("timed out|timeout", text, re.IGNORECASE)
    did = "did not answer within --process_timeout" if late else "has ended"
    detail = text.rpartition("] ")[2].partition(". This is")[0]  # without gloo's own file names
    return f"another process of this run {did} ({detail})"


def interrupted(number: int, updates: int) -> str:
    """Return what is said of a run that a signal ended."""
    return (
        f"{signal.Signals(number).name} ended the run after {updates:,} updates: the same command "
        "with --ckpt_path last continues it"
    )


def leave_together() -> None:
    """Leave the group of processes; otherwise one may abort while another still uses it."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def end_processes(trainer: Trainer) -> None:
    """End what Lightning started for a run, even a stopped process."""
    if world_size() > 1 and dist.get_backend() == "gloo":
        dist.destroy_process_group()  # the others notice now, not seconds later
        # The others print what happened to them. If one of them ended before the first process,
        # Lightning would kill the first before it ends with its own status.
        time.sleep(2 if trainer.is_global_zero else 5)
    launcher: Any = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)
