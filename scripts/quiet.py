"""What the scripts that train have in common: a Trainer that prints and writes nothing."""

import logging
import warnings

from lightning.pytorch import Callback, Trainer


def quiet() -> None:
    """Leave out Lightning's banner, and two warnings that no user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Raised inside Lightning by a newer torch.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=".*available but not used")


def quiet_trainer(steps: int, double: bool, *callbacks: Callback) -> Trainer:
    """Return a Trainer for so many updates on the CPU, in float64 or float32."""
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        precision="64-true" if double else "32-true",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
