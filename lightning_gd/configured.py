"""Optimizer, scheduler, clipping and checkpoints of a model, from its settings."""

from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_gd.checkpoints import (
    OURS,
    SafeCheckpointIO,
    check_class,
    check_shapes,
    read,
    settings_of,
)
from lightning_gd.evaluation import EvaluatedModule, watched
from lightning_gd.hooks import RunHooks
from lightning_gd.settings import build_optimizer, build_scheduler, check_trainer
from lightning_gd.updates import STEPPED_HERE, gradient_norm

# Hooks of Lightning that manual optimization does not call.
UNUSED = ("optimizer_step", "lr_scheduler_step", "configure_gradient_clipping")


class ConfiguredModule(EvaluatedModule):
    """A LightningModule whose optimizer, clipping and checkpoints follow from `hparams`."""

    def configure_callbacks(self) -> list[Callback]:
        """Refuse what the Trainer cannot run, and attach `RunHooks`; extend it by `super()`."""
        trainer: Any = self.trainer
        check_trainer(trainer, self.hparams)
        for name in () if self.automatic_optimization else UNUSED:
            if getattr(type(self), name) is not getattr(ConfiguredModule, name):
                raise ValueError(
                    f"{type(self).__name__} overrides {name}, which explicit mode does not call: "
                    "remove it, or set --model.gradient autograd"
                )
        if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, SafeCheckpointIO):
            trainer.strategy.checkpoint_io = SafeCheckpointIO(self)
        present = any(isinstance(callback, RunHooks) for callback in trainer.callbacks)
        return [] if present else [RunHooks()]

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the scheduler that the settings name."""
        if self.hparams["lr"] == "auto":
            raise ValueError(
                f"lr='auto' is 1/λmax of a full-batch least-squares loss, which "
                f"{type(self).__name__} does not have: set lr to a number"
            )
        optimizer, scheduler = self._build()
        if scheduler is None:
            return optimizer
        by_update = self.hparams["scheduler_interval"] == "update"
        config: dict[str, Any] = {
            "scheduler": scheduler,
            "interval": "step" if by_update else "epoch",
        }
        if self.automatic_optimization and isinstance(scheduler, ReduceLROnPlateau):
            config.update(monitor=watched(self.trainer), frequency=STEPPED_HERE)
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _build(self) -> tuple[Optimizer, LRScheduler | None]:
        h, trained = self.hparams, [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(
            h["optimizer"], trained, h["lr"], h["momentum"], h["optimizer_args"] or {}
        )
        if h["scheduler"] is None:
            return optimizer, None
        return optimizer, build_scheduler(h["scheduler"], optimizer, h["scheduler_args"] or {})

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip in autograd mode as in explicit mode, by the settings of the model or Trainer."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            self.clip([p for p in self.parameters() if p.grad is not None])

    @classmethod
    def load_from_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, checkpoint_path: Any, map_location: Any = "cpu", **settings: Any
    ):
        """Return the model of a local checkpoint of this class, without running code in it.

        Args:
            checkpoint_path: A file.
            map_location: The device of the model.
            **settings: Arguments that replace those of the checkpoint.
        """
        checkpoint = read(checkpoint_path)
        check_class(checkpoint, cls)
        lost = [name for name in checkpoint[OURS].get("left_out", ()) if name not in settings]
        if lost:
            raise ValueError(
                f"checkpoint {checkpoint_path} does not hold {', '.join(lost)} of {cls.__name__}, "
                f"which had no plain value: give it, as in load(path, {lost[0]}=...)"
            )
        model = cls(**{**settings_of(checkpoint), **settings})
        check_shapes(checkpoint, model)
        weights = checkpoint["state_dict"]
        dtypes = [value.dtype for value in weights.values() if value.is_floating_point()]
        model.to(dtype=dtypes[0] if dtypes else None, device=map_location)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(weights)
        return model

    def clip(self, parameters: list[Parameter]) -> Tensor:
        """Clip the gradients as the settings say; return their norm before, shape []."""
        norm, limit = gradient_norm(parameters), self.hparams["gradient_clip_val"]
        if limit is not None and self.hparams["gradient_clip_algorithm"] == "norm":
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch does, in fewer calls
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        elif limit is not None:
            torch.nn.utils.clip_grad_value_(parameters, limit)
        return norm
