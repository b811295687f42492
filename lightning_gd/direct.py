"""A step of several updates in explicit mode, without what Python wraps around each of them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.sgd import sgd

from lightning_gd.batch import Updates, as_batch
from lightning_gd.configured import ConfiguredModule
from lightning_gd.distributed import world_size
from lightning_gd.obstacle import obstacle
from lightning_gd.updates import in_order

OPTIONS = ("weight_decay", "momentum", "dampening", "nesterov", "maximize")
KEPT = 2**20  # numbers of gradients kept until their norms are computed together


class UpdatesOfStep:
    """Makes the updates of one `training_step` once `p.grad` is set: clips, steps, records.

    The first is Lightning's `optimizer.step()`. Before each of the others only callbacks whose
    `looks_at(step)` is true are called; then torch's functional `sgd` changes the weights, on the
    state of the optimizer, by the same operations in the same order. Where there is an `obstacle`,
    all are Lightning's.
    """

    def __init__(
        self,
        module: ConfiguredModule,
        optimizer: Any,
        trained: dict[str, Parameter],
        batches: Updates,
    ) -> None:
        self.module, self.optimizer, self.trained = module, optimizer, list(trained.values())
        self.named, self.batches, count = trained, batches, len(batches)
        if count > 1:  # the last step of an epoch may have one, which says nothing of the others
            module.not_direct = obstacle(module, optimizer)
        self._is_direct = count > 1 and not module.not_direct
        self._together = module.hparams["gradient_clip_val"] is None  # else each norm is used
        self._first, self._lrs = -1, []  # `global_step` before the first direct update
        self.is_short = False  # the updates after the first, of one batch on one process
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
            self.add_norm(self.module.clip(self.trained)[None])
        self.call(self.looking())
        self.step()
        self.count_update()

    def makes(self, content: Any) -> bool:
        """Make the update of a single batch the shortest way; False where it is not this short."""
        if not self.is_short or not (rows := (batch := as_batch(content)).rows(self.module)):
            return False
        loss, gradients = in_order(self.module, batch, self.named)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        self.module.step_losses.append((loss, rows))
        self.make()
        return True

    def looking(self) -> list[Any]:
        """Return the callbacks that look at the next update."""
        step = self._first + len(self._lrs)
        return [callback for callback in self._callbacks if callback.looks_at(step)]

    def call(self, callbacks: list[Any]) -> None:
        """Call `on_before_optimizer_step` of some callbacks."""
        for callback in callbacks:
            optimizer = self.optimizer.optimizer
            callback.on_before_optimizer_step(self.module.trainer, self.module, optimizer)

    def add_norm(self, norm: Tensor) -> None:
        """Keep the norm of the gradient of an update, shape [1]."""
        self._compute_norms()  # of those before
        self._norms.append(norm)

    def count_update(self) -> None:
        """Count an update, as Lightning counts those of `optimizer.step()`."""
        self._lrs.append(self.group["lr"])
        self._progress.increment_ready()  # `global_step`, as Lightning counts it
        self._progress.increment_completed()

    def _prepare(self) -> None:
        """Look up what all further updates of this step need."""
        trainer: Any = self.module.trainer
        optimizer = self.optimizer.optimizer
        self._first, self.group = trainer.global_step, optimizer.param_groups[0]
        self._callbacks = [c for c in trainer.callbacks if hasattr(c, "looks_at")]
        self._progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        self._most = max(1, KEPT // sum(p.numel() for p in self.trained))
        stepped = [p for p in self.group["params"] if p.grad is not None]
        self._values = [p.detach() for p in stepped]  # in the same memory
        self.buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in stepped]
        self._options = {name: self.group[name] for name in OPTIONS}
        # As in `optimizer.step()`: on the CPU one by one, elsewhere torch decides.
        self._foreach = False if self.module.device.type == "cpu" else None
        self._plain = self._foreach is False and not any(self._options.values())
        one = world_size() == 1 and self.module.hparams["accumulate_grad_batches"] == 1
        by_update = any(c.interval == "step" for c in trainer.lr_scheduler_configs)
        # `torch.compile(model)` would compile the update anew each time.
        self.is_short = one and not by_update and not torch.compiler.is_compiling()

    def step(self) -> None:
        """Change the weights by their `grad`."""
        lr = self.group["lr"]
        gradients = [p.grad for p in self.group["params"] if p.grad is not None]
        if self._plain:
            for value, gradient in zip(self._values, gradients, strict=True):
                value.add_(gradient, alpha=-lr)
            return
        how = {"lr": lr, "foreach": self._foreach, **self._options}
        sgd(self._values, gradients, self.buffers, **how)

    def _compute_norms(self) -> None:
        kept, self._gradients = self._gradients, []
        if kept:
            columns = (torch.stack(c).reshape(len(kept), -1) for c in zip(*kept, strict=True))
            norms = torch.stack([torch.linalg.vector_norm(column, dim=1) for column in columns])
            total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms, dim=0)
            self._norms.append(total)
