"""Checks, during the fit, the formula and the gradient that the optimizer gets."""

from __future__ import annotations

import warnings
from itertools import chain, islice
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities import apply_to_collection
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gd.batch import DataBatch, Updates, batches_of, call, is_current, tensors
from lightning_gd.data.tensors import tensor_data
from lightning_gd.distributed import reduce_sum
from lightning_gd.gradcheck import GradientError, GradientReport, check_gradients, check_reduced
from lightning_gd.gradcheck.diagnosis import largest
from lightning_gd.leastsquares import LeastSquares
from lightning_gd.module import GradientDescentModule
from lightning_gd.moments import MomentsBatch
from lightning_gd.settings import one_of, whole_number

EARLY = (0, 1, 10, 100)  # updates that are always checked
PARTS = 8  # of the local rows: their gradients tell how large the summed terms are


class GradientCheck(Callback):
    """Checks the formula, and the gradient that the optimizer gets, at single updates.

    These are the updates 0, 1, 10, 100, every `every_n_updates`, and the last one of `max_steps`.
    In explicit mode `check_gradients` compares the formula with autograd on a few random rows.
    In both modes `p.grad` is compared with autograd on the rows of all processes, which shows a
    missing reduction. The largest relative error is logged as `gradcheck/<parameter>`. Nothing
    in the run changes. Where nothing can be checked, a warning says so: for a module that is not
    a GradientDescentModule, and with the Trainer's `accumulate_grad_batches`.

    Args:
        every_n_updates: Updates from one check to the next.
        rows: Local rows on which the formula is checked.
        on_error: `stop` raises and ends the run, `warn` goes on.

    Attributes:
        checks: Number of checks in this fit.
        tested: How many of them found the gradient of each parameter above rounding.

    Raises:
        ValueError: If an argument is out of range.
        GradientError: During a fit, on all processes, with the parameter and its mistake.
    """

    def __init__(
        self,
        every_n_updates: int = 1000,
        rows: int = 8,
        on_error: Literal["stop", "warn"] = "stop",
    ) -> None:
        whole_number("every_n_updates", every_n_updates, 1)
        whole_number("rows", rows, 1)
        one_of("on_error", on_error, ("stop", "warn"))
        self.every_n_updates, self.rows, self.on_error = every_n_updates, rows, on_error
        self._begin()

    def _begin(self) -> None:
        self.checks = 0
        self.tested: dict[str, int] = {}
        self._first = -1  # the update that the first batch of the steps belongs to
        self._steps: list[Updates] = []
        self._skipped = ""  # why nothing is checked

    def summary(self) -> str:
        """Return one line on the whole fit: how many checks, and what they could not test."""
        missed = [name for name, times in self.tested.items() if not times]
        tested = f"not tested: {', '.join(missed)}" if missed else "all parameters tested"
        checks = "1 check" if self.checks == 1 else f"{self.checks} checks"
        return f"{checks}, {tested}" if self.checks else "nothing was checked"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from 0 in each fit."""
        self._begin()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batches of the next updates, and the random state before the first."""
        reason = _reason_to_skip(trainer, pl_module)
        if reason and not self._skipped:
            warnings.warn(f"GradientCheck checks nothing: {reason}", stacklevel=2)
        self._skipped = reason
        if trainer.global_step != self._first:  # else they are accumulated over several steps
            self._first, self._steps = trainer.global_step, []
            if self._is_due(trainer, trainer.global_step):
                self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        self._steps.append(batches_of(batch))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradient of this update before the weights change."""
        if self._is_due(trainer, trainer.global_step):
            with isolate_rng():
                self._check(trainer, pl_module)
        if self._is_due(trainer, trainer.global_step + 1):
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        due = step in EARLY or step % self.every_n_updates == 0 or step == trainer.max_steps - 1
        return due and not self._skipped

    def _check(self, trainer: Trainer, module: Any) -> None:
        step, every = trainer.global_step, module.batches_per_update
        at = (step - self._first) * every
        end = at + every if len(self._steps[-1]) > 1 else None
        batches = list(islice(chain.from_iterable(self._steps), at, end))
        contents = [_content(trainer, module, batch) for batch in batches]
        moments = any(isinstance(batch, MomentsBatch) for batch in batches)
        formula = self._formula(module, contents, step)
        self._stop_if_wrong(trainer, module, formula)
        reduced = self._reduced(trainer, module, contents, moments)
        self._stop_if_wrong(trainer, module, reduced)
        self.checks += 1
        for p in reduced.parameters:
            both = [p, *(other for other in formula.parameters if other.name == p.name)]
            error = max(found.relative_error for found in both)
            module.curves.record(step, {f"gradcheck/{p.name}": error})
            tested = any(found.tested for found in both)
            self.tested[p.name] = self.tested.get(p.name, 0) + tested

    def _formula(self, module: Any, contents: list[Any], step: int) -> GradientReport:
        """Check the formula on random rows; nothing on a process without rows."""
        content = next((content for content in contents if _count(content)), None)
        if content is None or module.automatic_optimization:
            return GradientReport(())
        drawn = torch.randperm(_count(content), generator=torch.Generator().manual_seed(step))
        return check_gradients(module, _pick(content, drawn[: self.rows]), seed=step)

    def _reduced(
        self, trainer: Trainer, module: Any, contents: list[Any], moments: bool
    ) -> GradientReport:
        """Check p.grad against autograd on the rows of all processes."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        torch.set_rng_state(self._random[0])
        torch.cuda.set_rng_state_all(self._random[1])
        sums, rows, scale = _local_sums(module, list(trained.values()), contents)
        flat = torch.cat([*map(torch.flatten, sums), sums[0].new_tensor([*scale, rows, rows > 0])])
        sizes = [*(s.numel() for s in sums), len(scale), 1, 1]
        *pieces, scales, total, processes = reduce_sum(flat).split(sizes)
        means = [(piece / total).view_as(s) for piece, s in zip(pieces, sums, strict=True)]
        squares = LeastSquares.of(trainer, module) if moments else None
        scales = (scales / processes).clamp(min=squares.term_size() if squares else 0.0)
        if not module.automatic_optimization:  # p.grad is already clipped
            _clip(module, means)
        mixed = trainer.precision == "bf16-mixed" and module.automatic_optimization
        return check_reduced(
            dict(zip(trained, means, strict=True)),
            {name: p.grad for name, p in trained.items() if p.grad is not None},
            trainer.world_size,
            torch.bfloat16 if mixed else flat.dtype,
            max(float(total), sum(map(_count, contents))),
            scale=dict(zip(trained, scales.tolist(), strict=True)),
            local={n: s / rows for n, s in zip(trained, sums, strict=True)} if rows else None,
        )

    def _stop_if_wrong(self, trainer: Trainer, module: Any, report: GradientReport) -> None:
        # All processes stop together, or one would wait for the others for ever.
        if not reduce_sum(torch.tensor(float(not report.ok), device=module.device)):
            return
        text = "found on another process" if report.ok else "\n".join(report.lines())
        message = f"gradient check at update {trainer.global_step}:\n{text}"
        if self.on_error == "stop":
            raise GradientError(message)
        warnings.warn(message, stacklevel=2)


def _reason_to_skip(trainer: Trainer, module: LightningModule) -> str:
    if not isinstance(module, GradientDescentModule):
        return f"{type(module).__name__} is not a GradientDescentModule"
    batches = trainer.accumulate_grad_batches
    if batches > 1:
        return f"accumulate_grad_batches={batches} of the Trainer averages batches, not rows"
    return ""


def _content(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Return the content of a batch; for moments the local rows that they stand for."""
    data = tensor_data(trainer)
    if data is not None and isinstance(batch, MomentsBatch):
        return move_data_to_device(data.local("train"), module.device)
    return batch.content if isinstance(batch, DataBatch) else batch


def _count(content: Any) -> int:
    return len(next(tensors(content)))


def _pick(content: Any, rows: Tensor | slice) -> Any:
    """Return some rows of every tensor that has as many as the first."""
    count = _count(content)
    return apply_to_collection(content, Tensor, lambda t: t[rows] if t.shape[:1] == (count,) else t)


def _local_sums(
    module: Any, trained: list[Parameter], contents: list[Any]
) -> tuple[list[Tensor], float, list[float]]:
    """Return Σ n·gradient by autograd over the local rows, Σ n, and the size of the terms."""
    sums, total = [torch.zeros_like(p) for p in trained], 0.0
    terms: list[tuple[Tensor, ...]] = [tuple(sums)]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    filled = [content for content in contents if module.rows(content)]
    for content in filled:
        terms.append(_autograd(module, trained, content))
        total += module.rows(content)
        sums = [s + module.rows(content) * g for s, g in zip(sums, terms[-1], strict=True)]
    for content in filled:
        count = _count(content)
        size = max(2, -(-count // PARTS))
        for at in range(0, max(1, count - 1), size):  # a single row at the end is left out
            part = _pick(content, slice(at, at + size))
            terms.append(_autograd(module, trained, part))
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return sums, total, [max(map(largest, column)) for column in zip(*terms, strict=True)]


def _autograd(module: Any, trained: list[Parameter], content: Any) -> tuple[Tensor, ...]:
    # Unless one forward pass serves both, `gradients` draws random numbers after those of `loss`.
    fused = module.automatic_optimization or is_current(type(module), "loss_and_gradients")
    with torch.enable_grad(), torch.autocast(module.device.type, enabled=False):
        loss = call(module.loss, content)
        loss = loss if fused else call(module.loss, content)
        if not loss.requires_grad:  # cut off the graph
            return tuple(map(torch.zeros_like, trained))
        return torch.autograd.grad(loss, trained, materialize_grads=True)


def _clip(module: GradientDescentModule, gradients: list[Tensor]) -> None:
    holders = [Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for holder, gradient in zip(holders, gradients, strict=True):
        holder.grad = gradient
    module.clip(holders)
