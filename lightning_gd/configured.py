"""Optimizer, scheduler, clipping and checkpoints of a model, from its settings."""

from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gd import checkpoints
from lightning_gd.checkpoints import SafeCheckpointIO
from lightning_gd.evaluation import EvaluatedModule, watched
from lightning_gd.hooks import RunHooks
from lightning_gd.settings import arguments_of, build_optimizer, build_scheduler, check_trainer
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
        h, trained = arguments_of(self), [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(
            h["optimizer"], trained, h["lr"], h["momentum"], h["optimizer_args"] or {}
        )
        if h["scheduler"] is None:
            return optimizer
        scheduler = build_scheduler(h["scheduler"], optimizer, h["scheduler_args"] or {})
        interval = "step" if h["scheduler_interval"] == "update" else "epoch"
        config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["frequency"] = STEPPED_HERE
            if self.automatic_optimization:  # else Lightning takes none
                config["monitor"] = watched(self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": config}

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
        """Return the model of a checkpoint file, on `map_location`, without running code in it.

        The arguments `settings` replace those of the checkpoint.
        """
        checkpoint = checkpoints.read(checkpoint_path)
        checkpoints.check_class(checkpoint, cls)
        for name in checkpoint[checkpoints.OURS].get("left_out", []):
            if name not in settings:
                raise ValueError(
                    f"checkpoint {checkpoint_path} does not hold {name} of {cls.__name__}, which "
                    f"had no plain value: give it, as in load(path, {name}=...)"
                )
        try:
            model = cls(**{**checkpoints.settings_of(checkpoint), **settings})
        except (TypeError, AttributeError, KeyError) as error:
            what = f"its settings do not fit {cls.__name__}: {error}"
            raise ValueError(f"checkpoint {checkpoint_path} is refused: {what}") from error
        checkpoints.check_shapes(checkpoint, model)
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
