"""Checks, during the fit, the formula and the gradient that the optimizer gets."""

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

from lightning_gd.batch import DataBatch, Updates, as_batch, batches_of, is_current, tensors
from lightning_gd.data.tensors import tensor_data
from lightning_gd.distributed import RowMean, reduce_sum
from lightning_gd.gradcheck import GradientError, GradientReport, check_gradients, check_reduced
from lightning_gd.gradcheck.bench import autograd
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
    missing reduction; moments stand for these rows after the first check. The largest relative
    error is logged as `gradcheck/<parameter>`. Nothing in the run changes. Where nothing can be
    checked, a warning says so: for a module that is not a GradientDescentModule, and with the
    Trainer's `accumulate_grad_batches`.

    Args:
        every_n_updates: Updates from one check to the next.
        rows: Local rows on which the formula is checked.
        on_error: `stop` raises and ends the run, `warn` goes on.

    Attributes:
        checks: Number of checks in this fit.
        tested: Whether one of them found the gradient of a parameter above rounding, by name.

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
        self.checks, self.tested = 0, dict[str, bool]()

    def summary(self) -> str:
        """Return one line on the whole fit: how many checks, and what they could not test."""
        missed = [name for name, tested in self.tested.items() if not tested]
        tested = f"not tested: {', '.join(missed)}" if missed else "all parameters tested"
        checks = "1 check" if self.checks == 1 else f"{self.checks} checks"
        return f"{checks}, {tested}" if self.checks else "nothing was checked"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.checks, self.tested = 0, {}
        self._first, self._skipped = -1, ""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        reason = _reason_to_skip(trainer, pl_module)
        if reason and not self._skipped:
            warnings.warn(f"GradientCheck checks nothing: {reason}", stacklevel=2)
        self._skipped = reason
        if trainer.global_step != self._first:  # else they are accumulated over several steps
            self._first, self._steps = trainer.global_step, list[Updates]()
            self._keep_random_state(trainer, trainer.global_step)
        self._steps.append(batches_of(batch))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._is_due(trainer, trainer.global_step):
            with isolate_rng():
                self._check(trainer, pl_module)
        self._keep_random_state(trainer, trainer.global_step + 1)

    def _keep_random_state(self, trainer: Trainer, step: int) -> None:
        if self._is_due(trainer, step):
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        due = step in EARLY or step % self.every_n_updates == 0 or step == trainer.max_steps - 1
        return due and not self._skipped

    def _check(self, trainer: Trainer, module: Any) -> None:
        batches = self._batches(trainer, module)
        contents = [self._content(trainer, module, batch) for batch in batches]
        formula = self._formula(module, contents, trainer.global_step)
        squares = None
        if any(isinstance(batch, MomentsBatch) for batch in batches):
            squares = LeastSquares.of(trainer, module)
        reduced = self._reduced(trainer, module, contents, squares.term_size() if squares else 0.0)
        self._stop_if_wrong(trainer, module, reduced if formula.ok else formula)
        self.checks += 1
        for p in reduced.parameters:
            both = [p, *(other for other in formula.parameters if other.name == p.name)]
            error = max(found.error / (found.size or 1.0) for found in both)
            module.curves.record(trainer.global_step, {f"gradcheck/{p.name}": error})
            tested = any(found.tested for found in both)
            self.tested[p.name] = self.tested.get(p.name, False) or tested

    def _batches(self, trainer: Trainer, module: Any) -> list[Any]:
        """Return the batches of this update."""
        every = module.batches_per_update
        at = (trainer.global_step - self._first) * every
        end = at + every if len(self._steps[-1]) > 1 else None
        return list(islice(chain.from_iterable(self._steps), at, end))

    def _content(self, trainer: Trainer, module: Any, batch: Any) -> Any:
        """Return the content of a batch; the first time, the rows that moments stand for."""
        data = tensor_data(trainer)
        if data is not None and isinstance(batch, MomentsBatch) and not self.checks:
            return move_data_to_device(data.local("train"), module.device)
        return batch.content if isinstance(batch, DataBatch) else batch

    def _formula(self, module: Any, contents: list[Any], step: int) -> GradientReport:
        """Check the formula on random rows; nothing on a process without rows."""
        content = next((content for content in contents if _count(content)), None)
        if content is None or module.automatic_optimization:
            return GradientReport(())
        drawn = torch.randperm(_count(content), generator=torch.Generator().manual_seed(step))
        return check_gradients(module, _pick(content, drawn[: self.rows]), seed=step)

    def _reduced(
        self, trainer: Trainer, module: Any, contents: list[Any], term_size: float
    ) -> GradientReport:
        """Check p.grad against autograd on the rows of all processes."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        torch.set_rng_state(self._random[0])
        torch.cuda.set_rng_state_all(self._random[1])
        local, scale = _local(module, list(trained.values()), contents)
        mean = RowMean()
        for gradients, rows in local:
            mean.add([*gradients, gradients[0].new_tensor(scale)], rows)
        (*means, scales), total = mean.reduce()
        if not module.automatic_optimization:  # p.grad is already clipped
            _clip(module, means)
        mixed = trainer.precision == "bf16-mixed" and module.automatic_optimization
        n = sum(rows for _, rows in local) or 1.0
        own = {
            name: torch.stack([rows / n * gradients[i] for gradients, rows in local]).sum(0)
            for i, name in enumerate(trained)
        }
        return check_reduced(
            dict(zip(trained, means, strict=True)),
            {name: p.grad for name, p in trained.items() if p.grad is not None},
            trainer.world_size,
            torch.bfloat16 if mixed else scales.dtype,
            max(float(total), sum(map(_count, contents))),
            scale=dict(zip(trained, scales.clamp(min=term_size).tolist(), strict=True)),
            local=own,
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


def _count(content: Any) -> int:
    return len(next(tensors(content), ()))


def _pick(content: Any, rows: Tensor | slice) -> Any:
    """Return some rows of every tensor that has as many as the first."""
    count = _count(content)
    return apply_to_collection(content, Tensor, lambda t: t[rows] if t.shape[:1] == (count,) else t)


def _local(
    module: Any, trained: list[Parameter], contents: list[Any]
) -> tuple[list[tuple[list[Tensor], float]], list[float]]:
    """Return gradients by autograd and rows of each batch, and the size of the summed terms."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    local = [_autograd(module, trained, content) for content in contents]
    terms = [gradients for gradients, _ in local]
    for content in contents:
        count = _count(content)
        size = max(2, -(-count // PARTS))
        for at in range(0, count - 1, size):  # a single row at the end is left out
            terms.append(_autograd(module, trained, _pick(content, slice(at, at + size)))[0])
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return local, [max(map(largest, column)) for column in zip(*terms, strict=True)]


def _autograd(module: Any, trained: list[Parameter], content: Any) -> tuple[list[Tensor], float]:
    batch = as_batch(content)
    rows = batch.rows(module)
    if not rows:
        return list(map(torch.zeros_like, trained)), 0
    # Unless one forward pass serves both, `gradients` draws random numbers after those of `loss`.
    fused = module.automatic_optimization or is_current(type(module), "loss_and_gradients")
    with torch.enable_grad(), torch.autocast(module.device.type, enabled=False):
        loss = batch.loss(module)
        return list(autograd(loss if fused else batch.loss(module), trained)), rows


def _clip(module: GradientDescentModule, gradients: list[Tensor]) -> None:
    holders = [Parameter(gradient) for gradient in gradients]
    for holder in holders:
        holder.grad = holder.detach()  # the same memory
    module.clip(holders)
