"""Whether updates may be made without what Python wraps around `optimizer.step()`."""

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from torch.optim import SGD

from lightning_gd.configured import ConfiguredModule
from lightning_gd.hooks import RunHooks
from lightning_gd.private import step_hooks


def obstacle(module: ConfiguredModule, optimizer: Any) -> str:
    """Return why the updates of a step must each be made by `optimizer.step()`; empty if not."""
    wrapped = optimizer.optimizer
    trainer: Any = module.trainer
    if type(wrapped) is not SGD or len(wrapped.param_groups) > 1:
        groups = "" if len(wrapped.param_groups) == 1 else " with several groups"
        return f"{type(wrapped).__name__}{groups}"
    for name in ("fused", "foreach", "differentiable"):
        if wrapped.param_groups[0][name]:
            return f"SGD({name}=True)"
    if any(step_hooks(wrapped)):
        return "it has a hook"
    if not isinstance(trainer.profiler, PassThroughProfiler):
        return type(trainer.profiler).__name__
    listeners: list[Any] = [*trainer.callbacks, module]
    for listener in listeners:
        base = Callback if isinstance(listener, Callback) else ConfiguredModule
        own = type(listener).on_before_optimizer_step is not base.on_before_optimizer_step
        if own and not isinstance(listener, RunHooks) and not hasattr(listener, "looks_at"):
            return f"{type(listener).__name__}.on_before_optimizer_step"
    return ""
