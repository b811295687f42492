"""What happens around a single update: its gradients, their norm, schedulers, divergence."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gd.batch import Batch, CountsUpdates
from lightning_gd.evaluation import EvaluatedModule
from lightning_gd.settings import DivergenceError

STEPPED_HERE = 2**62  # a frequency at which Lightning never steps a scheduler


def in_order(
    module: EvaluatedModule, batch: Batch, trained: dict[str, Parameter]
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the gradients in the order of the trained parameters.

    Raises:
        ValueError: If they are no dict, or one is missing, or has another shape than its parameter.
    """
    (loss, gradients), model = batch.loss_and_gradients(module), type(module).__name__
    if not isinstance(gradients, dict):
        kind = type(gradients).__name__
        raise ValueError(
            f"the gradients of {model} are of type {kind}: they must be a dict of tensors by the "
            "names of the parameters"
        )
    for name, parameter in trained.items():
        if name not in gradients:
            raise ValueError(
                f"the gradients of {model} lack {name!r}: they name {sorted(gradients)}, and the "
                f"trained parameters are {list(trained)}"
            )
        if gradients[name].shape != parameter.shape:
            raise ValueError(
                f"the gradient {name!r} of {model} has shape {list(gradients[name].shape)}, and "
                f"the parameter {list(parameter.shape)}: they must be equal"
            )
    return loss, [gradients[name] for name in trained]


def gradient_norm(parameters: Iterable[Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients together, shape []."""
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def step_schedulers(module: EvaluatedModule, interval: str) -> None:
    """Step the schedulers but plateaus in explicit mode, where Lightning steps none.

    The interval is `step` (per update) or `epoch`.
    """
    for config in _due(module.trainer, interval):
        if not isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.step()


def step_plateaus(module: EvaluatedModule, interval: str, metric: Tensor | float | None) -> None:
    """Step the plateaus of the settings in both modes: Lightning would after the checkpoint."""
    for config in _due(module.trainer, interval):
        if metric is not None and config.frequency == STEPPED_HERE:
            config.scheduler.step(metric)


def _due(trainer: Trainer, interval: str) -> list[Any]:
    """Return the configurations of the schedulers that step now, by their `frequency`.

    As in Lightning it counts epochs, or updates from the beginning of an epoch.
    """
    configs = [c for c in trainer.lr_scheduler_configs if c.interval == interval]
    if not configs:
        return []
    loader, made = trainer.train_dataloader, trainer.current_epoch + 1
    if interval == "step":
        counts = isinstance(loader, CountsUpdates)
        per_epoch = loader.updates_per_epoch if counts else trainer.num_training_batches
        made = (trainer.global_step - 1) % per_epoch + 1
    return [c for c in configs if c.frequency == STEPPED_HERE or made % c.frequency == 0]


def updates_in_run(trainer: Trainer) -> float:
    """Return the number of updates after which a run ends by its limits; infinite without any."""
    loader, epochs = trainer.train_dataloader, trainer.max_epochs or -1
    if isinstance(loader, CountsUpdates):
        per_epoch: float = loader.updates_per_epoch
    else:
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        per_epoch = math.ceil(batches) if math.isfinite(batches) else batches
    limits = trainer.max_steps, epochs * per_epoch
    return min((limit for limit in limits if limit > 0), default=math.inf)


def updates_in_epoch(trainer: Trainer) -> int | None:
    """Return the number of updates made in this epoch, 0 after the last; None: unknown."""
    loader = trainer.train_dataloader
    return loader.updates_in_epoch() if isinstance(loader, CountsUpdates) else None


def epoch_is_complete(trainer: Trainer) -> bool:
    """Tell whether the last update of an epoch was made; `max_steps` may end it before."""
    return trainer.is_last_batch and not updates_in_epoch(trainer)


def stop_if_diverged(module: EvaluatedModule, first: int, losses: Tensor) -> None:
    """Raise DivergenceError if a weight is not finite, or a loss of the updates from `first` on."""
    finite = [p.isfinite().all() for p in module.parameters() if p.requires_grad]
    if torch.cat([losses.isfinite(), torch.stack(finite)]).all():
        return
    module.curves.write(module.trainer)
    bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
    made = first + (bad[0] if bad else len(losses))
    what = f"the loss is {losses[bad[0]].item()}" if bad else "a weight is not finite"
    lr, stable = module.trainer.optimizers[0].param_groups[0]["lr"], ""
    if module.stable_lr is not None:
        stable = f" (the largest stable rate of full-batch SGD is {module.stable_lr:.4g})"
    last = getattr(module.trainer.checkpoint_callback, "last_model_path", "")
    kept = f"the last finite checkpoint is {last}" if last else "no checkpoint was written"
    raise DivergenceError(f"diverged: {what} after {made} updates at lr {lr:.4g}{stable}; {kept}")
