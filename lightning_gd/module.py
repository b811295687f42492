"""The base of every model: a loss, its gradient, and two modes that fill `p.grad`."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gd.batch import Batch, as_batch, batches_of
from lightning_gd.configured import ConfiguredModule
from lightning_gd.direct import UpdatesOfStep
from lightning_gd.distributed import RowMean, reduce_sum, world_size
from lightning_gd.replay import ReplayedUpdates
from lightning_gd.settings import check_settings
from lightning_gd.updates import epoch_is_complete, in_order, step_plateaus, step_schedulers

Gradients = dict[str, Tensor]


class GradientDescentModule(ConfiguredModule):
    """A loss and, beneath it, its gradient; the setting `gradient` says which fills `p.grad`.

    A subclass defines `forward`, `loss` and `gradients`; its `__init__` takes `**kwargs` and
    passes them on. Every method gets the batch as the DataLoader yields it: `loss(*batch)` for
    a tuple or list, `loss(**batch)` for a dict, `loss(batch)` for a tensor.

    Args:
        gradient: `explicit` trains with the formula `gradients` by manual optimization,
            `autograd` with the derivative of `loss` by automatic optimization.
        lr: Learning rate λ of the update w ← w − λ ∂L/∂w; `auto` is 1/λmax of the Hessian, for
            the full batch of a least-squares loss with SGD.
        momentum: Momentum of the optimizer; 0 for none.
        optimizer: A class of `torch.optim` that needs no closure, or a dotted path to one.
        optimizer_args: Further arguments of that class, such as `{"nesterov": true}`.
        scheduler: A class of `torch.optim.lr_scheduler`, or a dotted path; null for none.
        scheduler_args: Its arguments, such as `{"step_size": 10}`.
        scheduler_interval: Whether the scheduler steps after each `update` or each `epoch`.
        gradient_clip_val: Largest norm (or entry) of the gradient; null for no clipping.
        gradient_clip_algorithm: `norm` scales the whole gradient, `value` cuts each entry.
        accumulate_grad_batches: Batches per update in explicit mode: their gradients are summed
            and divided once by all their rows. In autograd mode set the Trainer's.
        cuda_graph: Replay the updates of a step as CUDA graphs: for explicit mode with SGD on one
            GPU and `updates_per_step` above 1, without effect elsewhere. The loss and its gradients
            may depend on tensors of the batch, parameters, and buffers that are changed in place;
            a Python number, such as an attribute, keeps its value of the recording.
            `GradientCheck` looks at updates that are made without a graph.

    Raises:
        ValueError: If a setting is out of range, naming it, its value and the accepted form.
    """

    def __init__(
        self,
        gradient: Literal["explicit", "autograd"] = "explicit",
        lr: float | Literal["auto"] = 0.01,
        momentum: float = 0.0,
        optimizer: str = "SGD",
        optimizer_args: dict[str, Any] | None = None,
        scheduler: str | None = None,
        scheduler_args: dict[str, Any] | None = None,
        scheduler_interval: Literal["update", "epoch"] = "epoch",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_settings(self.hparams)
        self.automatic_optimization = gradient == "autograd"
        self._mean = RowMean()

    # 1. What a subclass defines

    def loss(self, *batch: Any, **named: Any) -> Tensor:
        """Return the mean over the rows given, plus terms of the parameters alone, shape []."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def gradients(self, *batch: Any, **named: Any) -> Gradients:
        """Return the gradient of exactly that loss, by the names of `named_parameters()`."""
        raise NotImplementedError(
            f"{type(self).__name__} must define gradients (`gradients = by_autograd` is a start); "
            "gradient='autograd' does without"
        )

    def loss_and_gradients(self, *batch: Any, **named: Any) -> tuple[Tensor, Gradients]:
        """Return both; override it to share one forward pass."""
        return self.loss(*batch, **named), self.gradients(*batch, **named)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.gradients is by_autograd and "loss_and_gradients" not in vars(cls):
            cls.loss_and_gradients = loss_and_autograd  # one forward pass, one draw of dropout

    # 2. The two modes

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | dict[str, Tensor]:
        """Return the loss for autograd, or make the updates of this step by the formula."""
        if self.automatic_optimization:
            return self._loss_for_autograd(as_batch(batch))
        batches, left = batches_of(batch), self.trainer.max_steps - self.trainer.global_step
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        kind = ReplayedUpdates if self.hparams["cuda_graph"] else UpdatesOfStep
        updates = kind(self, self.optimizers(), trained, batches)
        self.step_losses = []
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), updates:
            for content, due in zip(batches, self._due(len(batches), batch_idx), strict=True):
                if not updates.makes(content):
                    self._add_local_gradients(as_batch(content), trained)
                    if due:
                        self._explicit_update(updates)
                if len(self.step_losses) == left:  # max_steps lies within this step
                    break
        if epoch_is_complete(self.trainer):
            step_schedulers(self, "epoch")
        if not self.step_losses:  # further batches are accumulated before an update
            return {}
        loss = self.step_losses[-1][0].clone()  # a CUDA graph writes there again
        self.log("train/loss", loss, prog_bar=True, logger=False)
        return {"loss": loss}

    def _add_local_gradients(self, batch: Batch, trained: dict[str, Parameter]) -> None:
        """Add the loss and the gradients over the local rows of one batch; zeros for no rows."""
        rows = batch.rows(self)
        if not rows:
            like = next(iter(trained.values()))
            self._mean.add([like.new_zeros(()), *map(torch.zeros_like, trained.values())], 0)
            return
        loss, gradients = in_order(self, batch, trained)
        self._mean.add([loss, *gradients], rows)

    @torch.compiler.disable()  # `torch.compile(model)` would compile it anew at each update
    def _explicit_update(self, updates: UpdatesOfStep) -> None:
        """Take the mean over the rows of all processes, and update the weights by it."""
        (loss, *gradients), rows = self._mean.reduce()
        for parameter, gradient in zip(updates.trained, gradients, strict=True):
            parameter.grad = gradient
        self.step_losses.append((loss, rows))
        updates.make()
        if self.trainer.lr_scheduler_configs:
            step_schedulers(self, "step")
            step_plateaus(self, "step", loss)

    def _due(self, count: int, batch_idx: int) -> list[bool]:
        """Tell for each of the `count` batches of this step whether it ends an update."""
        every = self.batches_per_update
        if count > 1:
            return [(i + 1) % every == 0 or i + 1 == count for i in range(count)]
        number = batch_idx + 1
        return [number % every == 0 or number == self.trainer.num_training_batches]

    def _loss_for_autograd(self, batch: Batch) -> Tensor:
        """Scale the local mean so that DDP's average over processes is the mean over all rows."""
        rows = batch.rows(self)
        if rows:
            loss = batch.loss(self)
        else:  # a process without rows still takes part in DDP's average
            loss = torch.stack([p.sum() * 0 for p in self.parameters() if p.requires_grad]).sum()
        mean, total = loss.detach(), loss.new_tensor(float(rows))
        if world_size() > 1:
            sums = reduce_sum(torch.stack([mean * rows, total]))
            mean, total = sums[0] / sums[1], sums[1]
            loss = loss * (rows * world_size() / total)
        self.batch_losses.append((mean, total))
        self.log("train/loss", mean, prog_bar=True, logger=False)
        return loss

    @property
    def several_updates(self) -> bool:  # of a step: the loader asks
        return not self.automatic_optimization

    @property
    def batches_per_update(self) -> int:
        return self.hparams["accumulate_grad_batches"]


def loss_and_autograd(
    self: GradientDescentModule, *batch: Any, **named: Any
) -> tuple[Tensor, Gradients]:
    """Return the loss, and its gradient by autograd."""
    trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        loss = self.loss(*batch, **named)
        found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    return loss.detach(), dict(zip(trained, found, strict=True))


def by_autograd(self: GradientDescentModule, *batch: Any, **named: Any) -> Gradients:
    """Return the gradient of `loss` by autograd; `gradients = by_autograd` is a start."""
    return loss_and_autograd(self, *batch, **named)[1]
