"""What one update of any LightningModule consists of, for its check."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gd.batch import DataBatch, as_batch, count_rows, draw, is_current
from lightning_gd.data.tensors import tensor_data
from lightning_gd.distributed import reduce_sum, world_size
from lightning_gd.gradcheck.check import MISSING, check_formula, loss_of_step, own_loss
from lightning_gd.gradcheck.delivered import Delivery, Part
from lightning_gd.gradcheck.graph import dense
from lightning_gd.gradcheck.point import Loss, Weights
from lightning_gd.gradcheck.randomness import RandomState
from lightning_gd.gradcheck.repeated import Repeated
from lightning_gd.gradcheck.report import GradientReport, ParameterReport
from lightning_gd.gradcheck.row_mean import not_a_mean
from lightning_gd.gradcheck.twin import same, twin
from lightning_gd.module import GradientDescentModule
from lightning_gd.moments import MomentsBatch

STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
SHORT = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Update:
    """How the gradient of one update of a module comes about: from which losses, by which mean.

    A GradientDescentModule takes the mean over the rows of all processes, any other module the
    mean over the batches of every process, and DDP the mean of those.

    Attributes:
        found: `p.grad` of the parameters that the optimizer trains, by name.
        notes: What is to be said of the check.
    """

    def __init__(
        self, trainer: Trainer, module: Any, loss: Any, reference: Any, optimizer: Optimizer
    ) -> None:
        self.trainer, self.module = trainer, module
        self.own = isinstance(module, GradientDescentModule)
        self.explicit = self.own and not module.automatic_optimization
        several = isinstance(loss, list)
        self.given = loss[trainer.optimizers.index(optimizer)] if several else loss
        self.reference, self.rows, self.notes = reference, [0.0], list[str]()
        self._is_compared = False  # whether the processes have as many rows
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {n: p for n, p in module.named_parameters() if id(p) in trained and p.requires_grad}
        if count := len(trained - {id(p) for p in module.parameters()}):
            self.notes = [f"{count} tensors of the optimizer are no parameters of it: not checked"]
        self.found: Weights = {
            name: torch.zeros_like(p) if p.grad is None else dense(p.grad)
            for name, p in named.items()
        }

    @property
    def is_skipped(self) -> bool:
        """Whether a scaler leaves the update out."""
        scaled = self.trainer.precision == "16-mixed"
        return scaled and not all(gradient.isfinite().all() for gradient in self.found.values())

    def formula(
        self,
        before: nn.Module,
        parts: list[Part],
        state: RandomState,
        rows: int,
        repeated: Repeated | None,
        turn: int,
    ) -> tuple[GradientReport, bool]:
        """Check the formula, or autograd, and tell whether autograd of the loss can be trusted.

        Args:
            before: The module before the update.
            parts: Its batches, of which one is looked at; without rows nothing is checked.
            state: The random state before the first of them, if the part has none.
            rows: On which a formula is checked.
            repeated: Checks a formula that was found right.
            turn: Number of the check: each one looks at another batch that has a loss.

        Returns:
            The report; and True for a formula, or if the loss is made of plain operations.
        """
        known = repeated if self.explicit and self.reference is None else None
        weighted, report = [part for part in parts if part.weight], GradientReport(())
        several = self.trainer.world_size * len(parts) * self.trainer.accumulate_grad_batches > 1
        for k in range(len(weighted)):
            part = weighted[(turn + k) % len(weighted)]
            step, batch, loss = self.trainer.global_step, part.batch, part.loss
            given = part.state or state
            if self.own:
                batch, given, loss = draw(batch, rows, step), RandomState.seeded(step), own_loss
            if self.own and several and (words := not_a_mean(before, batch)):
                return GradientReport((ParameterReport("loss", diagnosis=words),)), True
            report = known and known.report(before, batch, loss, given)
            asked = before, batch, loss, given, self.explicit, self.reference
            report = report or check_formula(*asked)
            if MISSING not in report.failure:
                break
        return report, self.explicit or not report.functions

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

    def delivery(self, parts: list[Part], repeated: Repeated) -> Delivery:
        """Return what is compared: `p.grad`, and the mean of the gradients of the parts."""
        short = None if self.explicit else SHORT.get(str(self.trainer.precision))
        gradients = self.found
        eps = max(torch.finfo(short or gradient.dtype).eps for gradient in gradients.values())
        if self.reference is not None:
            parts = [replace(part, loss=self.reference) for part in parts]
        replayed = self.module.automatic_optimization and not (self.given or self.reference)
        batches = len(parts) if self.explicit else self.trainer.accumulate_grad_batches
        known = {"processes": self.trainer.world_size, "accumulated batches": batches}
        context = nullcontext if self.explicit else self.trainer.precision_plugin.forward_context
        self.rows = [float(count_rows(part.batch)) for part in parts]
        mean = partial(self._mean, sizes=[gradient.numel() for gradient in gradients.values()])
        copy = repeated.copy if self.explicit else twin
        return Delivery(gradients, parts, mean, known, context, eps, replayed, copy)

    def _mean(self, sums: Tensor, sizes: list[int]) -> Tensor:
        if not self.explicit:
            if not self.own and self.trainer.world_size > 1 and not self._is_compared:
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
        self._is_compared = True
        (n, count, squares), (mean, by_rows) = total[:, -1], total[:2, :-1] / total[:2, -1:]
        if n * squares > count**2 * (1 + 1e-9):
            bias = float((mean - by_rows).norm() / by_rows.norm())
            self.notes.append(
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
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "its training_step takes batches from dataloader_iter, and cannot be called again"
    if world_size() > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        return "SyncBatchNorm communicates in the forward pass: check it on one process"
    return "it has complex parameters" if any(p.is_complex() for p in module.parameters()) else ""


def agree(holds: bool, device: torch.device) -> bool:
    """Tell whether something holds on every process."""
    if world_size() == 1:
        return holds
    return not reduce_sum(torch.tensor(float(not holds), device=device))


@contextmanager
def muted(trainer: Trainer) -> Iterator[None]:
    """Give the module no logger inside a `with` block, and undo what it does to the Trainer.

    Its buffers are undone, too: a function may refer to it by a global name.
    """
    loggers, silent = trainer.loggers, [DummyLogger() for _ in trainer.loggers]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings, stops = [dict(group) for group in groups], trainer.should_stop
    strided = [b for b in trainer.lightning_module.buffers() if b.layout == torch.strided]
    buffers = [(buffer, buffer.detach().clone()) for buffer in strided]
    trainer.loggers = silent  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, stops
        for group, kept in zip(groups, settings, strict=True):
            group.update(kept)
        for buffer, value in buffers:
            if not same(buffer, value):
                buffer.detach().copy_(value)
