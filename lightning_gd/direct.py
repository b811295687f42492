"""A step of several updates in explicit mode, without what Python wraps around each of them."""

from typing import Any

import torch
import torch.optim.optimizer as torchs
from lightning.pytorch import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim.sgd import sgd

from lightning_gd.batch import DataBatch, Updates, as_batch, is_of_tensors, tensors
from lightning_gd.configured import ConfiguredModule
from lightning_gd.distributed import world_size
from lightning_gd.hooks import RunHooks
from lightning_gd.replay import Replay
from lightning_gd.updates import in_order

OPTIONS = ("weight_decay", "momentum", "dampening", "nesterov", "maximize")
KEPT = 2**20  # numbers of gradients kept until their norms are computed together
RECORDED = ("cuda",)  # devices with graphs
LONGEST = 4096  # updates of a step whose losses a graph keeps, or more where a step has more


def obstacle(module: ConfiguredModule, optimizer: Any) -> str:
    """Return why the updates of a step must each be made by `optimizer.step()`; empty if not.

    The private names are those of the hooks of torch.optim, which has no public way to ask for
    them; they were checked with torch 2.14.
    """
    wrapped = optimizer.optimizer
    trainer: Any = module.trainer
    hooks = (
        wrapped._optimizer_step_pre_hooks,
        wrapped._optimizer_step_post_hooks,
        torchs._global_optimizer_pre_hooks,  # pyright: ignore[reportAttributeAccessIssue]
        torchs._global_optimizer_post_hooks,  # pyright: ignore[reportAttributeAccessIssue]
    )
    if type(wrapped) is not SGD or len(wrapped.param_groups) > 1:
        groups = "" if len(wrapped.param_groups) == 1 else " with several groups"
        return f"{type(wrapped).__name__}{groups}"
    for name in ("fused", "foreach", "differentiable"):
        if wrapped.param_groups[0][name]:
            return f"SGD({name}=True)"
    if any(hooks):
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


class UpdatesOfStep:
    """Makes the updates of one `training_step` once `p.grad` is set: clips, steps, records.

    The first is Lightning's `optimizer.step()`. Before each of the others only callbacks whose
    `looks_at(step)` is true are called; then torch's functional `sgd` changes the weights, on the
    state of the optimizer, by the same operations in the same order. Where there is an `obstacle`,
    all are Lightning's. An update before which a callback reads gradients (`reads_gradients`, True
    by default) is not replayed.
    """

    def __init__(
        self,
        module: ConfiguredModule,
        optimizer: Any,
        trained: dict[str, Parameter],
        batches: Updates,
    ) -> None:
        self.module, self.optimizer, self.trained = module, optimizer, list(trained.values())
        self._named, self._batches, count = trained, batches, len(batches)
        if count > 1:  # the last step of an epoch may have one, which says nothing of the others
            module.not_direct = obstacle(module, optimizer)
        self._is_direct = count > 1 and not module.not_direct
        self._together = module.hparams["gradient_clip_val"] is None  # else each norm is used
        self._first, self._lrs = -1, []  # `global_step` before the first direct update
        self._is_short = self._is_recorded = False  # the updates after the first; as CUDA graphs
        self._begun: list[Replay] = []  # that were used in this step
        self._gradients: list[list[Tensor]] = []  # whose norms are not known yet
        self._norms: list[Tensor] = []

    def __enter__(self) -> "UpdatesOfStep":
        return self

    def __exit__(self, *_: Any) -> None:
        """Record the direct updates as `RunHooks` records the others."""
        if not self._lrs:
            return
        self._compute_norms()
        made = len(self._lrs)  # an update that raises has a loss and a norm, and was not made
        losses = torch.stack([loss for loss, _ in self.module.step_losses[1 : made + 1]])
        columns = {"train/loss": losses, "update/gradient_norm": torch.cat(self._norms)[:made]}
        if self.module.trainer.lr_scheduler_configs:
            columns["update/lr"] = torch.tensor(self._lrs, dtype=torch.float64)
        self.module.curves.record_all(range(self._first, self._first + made), columns)

    def make(self) -> None:
        """Make one update."""
        if self._first < 0:
            self.module.gradient_norm = self.module.clip(self.trained)
            self.optimizer.step()  # it counts `global_step` and calls `RunHooks`
            if self._is_direct:
                self._prepare()
            return
        if self._together:
            self._gradients.append([p.grad.clone() for p in self.trained if p.grad is not None])
            if len(self._gradients) >= self._most:
                self._compute_norms()
        else:
            self._norms.append(self.module.clip(self.trained)[None])
        self._call(self._looking())
        self._step()
        self._count_update()

    def makes(self, content: Any) -> bool:
        """Make the update of a single batch the shortest way; False where it is not this short."""
        if not self._is_short or not (rows := (batch := as_batch(content)).rows(self.module)):
            return False
        if self._is_recorded and isinstance(batch, DataBatch) and self._replays(batch, rows):
            return True
        loss, gradients = in_order(self.module, batch, self._named)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        self.module.step_losses.append((loss, rows))
        self.make()
        return True

    def _replays(self, batch: DataBatch, rows: float) -> bool:
        """Make an update by replaying a CUDA graph; False where it must be made otherwise."""
        looking = self._looking()
        if any(getattr(c, "reads_gradients", True) for c in looking) or not is_of_tensors(
            batch.content
        ):
            return False
        self._call(looking)
        replay = self._replay(batch.content)
        self._compute_norms()
        replay.make(batch.content)
        k = replay.made - 1
        self.module.step_losses.append((replay.losses[k], rows))
        self._norms.append(replay.norms[k, None])
        self._count_update()
        return True

    def _replay(self, content: Any) -> Replay:
        """Return the recorded update for batches of these shapes."""
        module, kept = self.module, self.module.replays
        momentum = [buffer for buffer in self._buffers if buffer is not None]
        held = [*module.parameters(), *module.buffers(), *momentum]
        # What a graph holds for: the same memory, rate and options.
        holds = [v.data_ptr() for v in held], [self._group[name] for name in ("lr", *OPTIONS)]
        if kept.get("holds") != holds:
            kept.clear()
            kept["holds"] = holds
        key = tuple((values.shape, values.dtype) for values in tensors(content))
        if key not in kept or kept[key].most < len(self._batches):

            def local(content: Any) -> tuple[Tensor, list[Tensor]]:
                return in_order(module, DataBatch(content), self._named)

            # A full batch is the same object at every update, and need not be copied.
            same = self._batches.batches[0] is self._batches.batches[-1]
            most = max(LONGEST, len(self._batches))
            how = local, self.trained, module.clip, self._step, list(module.buffers()), most
            kept[key] = Replay(content, same, *how)
        replay = kept[key]
        if replay not in self._begun:
            self._begun.append(replay)
            replay.begin()
        return replay

    def _looking(self) -> list[Any]:
        step = self._first + len(self._lrs)
        return [callback for callback in self._callbacks if callback.looks_at(step)]

    def _call(self, callbacks: list[Any]) -> None:
        for callback in callbacks:
            optimizer = self.optimizer.optimizer
            callback.on_before_optimizer_step(self.module.trainer, self.module, optimizer)

    def _count_update(self) -> None:
        self._lrs.append(self._group["lr"])
        self._progress.increment_ready()  # `global_step`, as Lightning counts it
        self._progress.increment_completed()

    def _prepare(self) -> None:
        """Look up what all further updates of this step need."""
        trainer: Any = self.module.trainer
        optimizer = self.optimizer.optimizer
        self._first, self._group = trainer.global_step, optimizer.param_groups[0]
        self._callbacks = [c for c in trainer.callbacks if hasattr(c, "looks_at")]
        self._progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        self._most = max(1, KEPT // sum(p.numel() for p in self.trained))
        stepped = [p for p in self._group["params"] if p.grad is not None]
        self._values = [p.detach() for p in stepped]  # in the same memory
        self._buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in stepped]
        self._options = {name: self._group[name] for name in OPTIONS}
        # As in `optimizer.step()`: on the CPU one by one, elsewhere torch decides.
        self._device = self.module.device.type
        self._foreach = False if self._device == "cpu" else None
        self._plain = self._foreach is False and not any(self._options.values())
        one = world_size() == 1 and self.module.hparams["accumulate_grad_batches"] == 1
        by_update = any(c.interval == "step" for c in trainer.lr_scheduler_configs)
        # `torch.compile(model)` would compile the update anew each time.
        self._is_short = one and not by_update and not torch.compiler.is_compiling()
        self._is_recorded = self.module.hparams["cuda_graph"] and self._device in RECORDED

    def _step(self) -> None:
        lr = self._group["lr"]
        gradients = [p.grad for p in self._group["params"] if p.grad is not None]
        if self._plain:
            for value, gradient in zip(self._values, gradients, strict=True):
                value.add_(gradient, alpha=-lr)
            return
        how = {"lr": lr, "foreach": self._foreach, **self._options}
        sgd(self._values, gradients, self._buffers, **how)

    def _compute_norms(self) -> None:
        kept, self._gradients = self._gradients, []
        if kept:
            columns = (torch.stack(c).reshape(len(kept), -1) for c in zip(*kept, strict=True))
            norms = torch.stack([torch.linalg.vector_norm(column, dim=1) for column in columns])
            total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms, dim=0)
            self._norms.append(total)
