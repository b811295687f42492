"""What one update of any LightningModule consists of, for its check."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gd.batch import DataBatch, as_batch, call, count_rows, is_current, take_rows
from lightning_gd.data.tensors import tensor_data
from lightning_gd.distributed import reduce_sum, world_size
from lightning_gd.gradcheck.bench import Loss
from lightning_gd.gradcheck.check import loss_of_step
from lightning_gd.gradcheck.delivered import Delivery, Part
from lightning_gd.gradcheck.point import Weights
from lightning_gd.gradcheck.precision import eager
from lightning_gd.gradcheck.randomness import RandomState, torch_states
from lightning_gd.gradcheck.twin import converted, twin
from lightning_gd.module import GradientDescentModule
from lightning_gd.moments import MomentsBatch

NOT_ROUNDING = 1e-4  # of a loss of a few rows in float32, which rounds by about 1e-6
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
SHORT = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Update:
    """How the gradient of one update of a module comes about: from which losses, by which mean.

    A GradientDescentModule takes the mean over the rows of all processes, any other module the
    mean over the batches of every process, and DDP the mean of those.
    """

    def __init__(
        self, trainer: Trainer, module: Any, loss: Any, reference: Any, optimizer: Optimizer
    ) -> None:
        self.trainer, self.module = trainer, module
        self.own = isinstance(module, GradientDescentModule)
        self.explicit = self.own and not module.automatic_optimization
        several = isinstance(loss, list)
        self.given = loss[trainer.optimizers.index(optimizer)] if several else loss
        self.reference = reference
        self.rows, self.note = [0.0], ""

    def part(self, batch: Any, batch_idx: int, state: RandomState | None) -> Part:
        """Return a local batch, and how a copy of the module is asked for its loss."""
        content = batch.content if isinstance(batch, DataBatch) else batch
        if isinstance(batch, MomentsBatch):
            data: Any = tensor_data(self.trainer)
            on_disk = data.tables["train"].on_disk
            content = batch.moments.example() if on_disk else data.local("train")
            content = move_data_to_device(content, self.module.device)
        weight = as_batch(batch).rows(self.module) if self.own else 1.0
        loss, scaled = self._loss(batch_idx), self._scaling(weight)
        return Part(content, loss, weight, state, scaled, pure=self.explicit)

    def _loss(self, batch_idx: int) -> Loss:
        given = self.given
        if isinstance(given, str):
            return lambda model, batch: getattr(model, given)(batch)
        if given is not None:
            return given
        if not self.own:
            return lambda model, batch: loss_of_step(model, batch, batch_idx)
        # Unless one forward pass serves both, `gradients` draws random numbers after `loss`.
        if self.explicit and not is_current(type(self.module), "loss_and_gradients"):
            return lambda model, batch: [own_loss(model, batch), own_loss(model, batch)][1]
        return own_loss

    def _scaling(self, weight: float) -> Callable[[Tensor], Tensor]:
        """Return what happens to the loss of a batch before `backward`, in the order of the run."""
        if self.explicit:
            return lambda loss: loss
        share: Any = 1.0
        if self.own and self.trainer.world_size > 1:
            total = reduce_sum(torch.tensor(float(weight), device=self.module.device))
            share = weight * self.trainer.world_size / total
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        return lambda loss: loss * share / self.trainer.accumulate_grad_batches * scale

    def delivery(self, parts: list[Part], gradients: Weights) -> Delivery:
        """Return what is compared: `p.grad`, and the mean of the gradients of the parts."""
        short = None if self.explicit else SHORT.get(str(self.trainer.precision))
        eps = torch.finfo(short or next(iter(gradients.values())).dtype).eps
        if self.reference is not None:
            parts = [replace(part, loss=self.reference) for part in parts]
        replayed = self.module.automatic_optimization and not (self.given or self.reference)
        batches = len(parts) if self.explicit else self.trainer.accumulate_grad_batches
        known = {"processes": self.trainer.world_size, "accumulated batches": batches}
        context = nullcontext if self.explicit else self.trainer.precision_plugin.forward_context
        self.rows = [float(count_rows(part.batch)) for part in parts]
        sizes = [gradient.numel() for gradient in gradients.values()]

        def mean(sums: Tensor) -> Tensor:
            return self._mean(sums, sizes)

        return Delivery(gradients, parts, mean, known, context, eps, replayed)

    def _mean(self, sums: Tensor, sizes: list[int]) -> Tensor:
        if not self.explicit:
            if not self.own and self.trainer.world_size > 1 and not self.note:
                self._compare_rows(sums)
            sums = reduce_sum(sums)
            means = sums[:, :-1] / sums[:, -1:]
            return means.sum(0) / self.trainer.accumulate_grad_batches
        total = reduce_sum(sums.sum(0))
        flat = total[:-1] / (total[-1] or 1.0)  # p.grad is already clipped; zero without rows
        if self.module.hparams["gradient_clip_val"] is not None:
            self.module.clip([SimpleNamespace(grad=piece) for piece in flat.split(sizes)])
        return flat

    def _compare_rows(self, sums: Tensor) -> None:
        """Note where the mean over processes, as DDP takes it, is not the mean over rows."""
        rows = sums.new_tensor(self.rows)
        weights = torch.stack([torch.ones_like(rows), rows, rows**2]).double()
        total = reduce_sum(weights @ sums.double())
        (n, count, squares), (mean, by_rows) = total[:, -1], total[:2, :-1] / total[:2, -1:]
        if n * squares > count**2 * (1 + 1e-9):
            bias = float((mean - by_rows).norm() / by_rows.norm())
            self.note = (
                f"the batches of the {self.trainer.world_size} processes differ in rows: at update "
                f"{self.trainer.global_step} the mean of their gradients, which DDP takes, differs "
                f"by {bias:.2g} of its size from that of a loss that is a mean over all rows"
            )


def refusal(trainer: Trainer, module: Any, loss: Any) -> str:
    """Return why the updates of a module cannot be checked; empty if they can."""
    own, given = isinstance(module, GradientDescentModule), loss
    given = given if isinstance(given, list) else [given]
    names = [f for f in given if isinstance(f, str) and not callable(getattr(module, f, None))]
    if type(trainer.strategy).__name__ not in STRATEGIES:
        return f"{type(trainer.strategy).__name__} shards its parameters: use ddp"
    if not (own or module.automatic_optimization or loss):
        return "it optimizes manually: give GradientCheck(loss=...), a method or a function"
    if names:
        return f"loss={names[0]!r} is no method of it"
    if world_size() > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        return "SyncBatchNorm communicates in the forward pass: check it on one process"
    return "it has complex parameters" if any(p.is_complex() for p in module.parameters()) else ""


def own_loss(model: Any, batch: Any) -> Tensor:
    """Return the loss that a GradientDescentModule defines."""
    return call(model.loss, batch)


def draw(content: Any, rows: int, seed: int) -> Any:
    """Return at most so many rows of a batch of any structure, drawn at random."""
    order = torch.randperm(count_rows(content), generator=torch.Generator().manual_seed(seed))
    return take_rows(content, order[:rows])


def not_a_mean(model: nn.Module, batch: Any) -> str:
    """Say if the loss of some rows is not the mean of those of its parts, weighted by `rows`.

    Nothing is said of a loss that draws random numbers, which are others for each part, nor of
    parts without weight, whose mean is undefined.
    """
    copied, content = twin(model).eval(), converted(batch, None)
    rows = count_rows(content)
    if rows < 3:
        return ""
    cut = rows - rows // 3
    parts = [content, *(take_rows(content, part) for part in (slice(cut), slice(cut, None)))]
    with eager(torch.get_default_dtype()), torch.no_grad():
        before = torch_states()
        losses = [float(own_loss(copied, part)) for part in parts]
        drawn = not all(map(torch.equal, before, torch_states()))
    _, *weights = (float(copied.rows(part)) for part in parts)
    if drawn or not all(weights) or weights == [1.0, 1.0]:  # the last of a sum
        return ""
    mean = sum(w * loss for w, loss in zip(weights, losses[1:], strict=True)) / sum(weights)
    if abs(mean - losses[0]) <= NOT_ROUNDING * max(map(abs, losses)):
        return ""
    return (
        f"the loss of {rows} rows is {losses[0]:.6g}, and the mean of those of its parts, "
        f"weighted by rows(batch), is {mean:.6g}: on several processes or with accumulated "
        "batches the gradient is another; let rows(batch) return what the loss divides by"
    )


def agree(holds: bool, device: torch.device) -> bool:
    """Tell whether something holds on every process."""
    if world_size() == 1:
        return holds
    return not reduce_sum(torch.tensor(float(not holds), device=device))


@contextmanager
def muted(trainer: Trainer) -> Iterator[None]:
    """Give the module no logger inside a `with` block, and undo what it does to the Trainer."""
    loggers, silent = trainer.loggers, [DummyLogger() for _ in trainer.loggers]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings, stops = [dict(group) for group in groups], trainer.should_stop
    trainer.loggers = silent  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, stops
        for group, kept in zip(groups, settings, strict=True):
            group.update(kept)
