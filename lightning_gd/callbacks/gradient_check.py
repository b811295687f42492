"""Checks, during the fit, the formula and the gradient that the optimizer gets."""

import math
import warnings
from types import SimpleNamespace
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
SAFETY = 16  # times the rounding eps of a sum
PARTS, PART = 4, 32  # whose gradients tell how large the summed terms are, and rows of each


class GradientCheck(Callback):
    """Checks the formula, and the gradient that the optimizer gets, at single updates.

    These are the updates 0, 1, 10, 100, every `every_n_updates`, and the last one of `max_steps`.
    In explicit mode `check_gradients` compares the formula with autograd on a few random rows.
    In both modes `p.grad` is compared with autograd on the rows of all processes, which shows a
    missing reduction. The largest relative error is logged as `gradcheck/<parameter>`. Nothing
    in the run changes. Where nothing can be checked, a warning says so: for a module that is not
    a GradientDescentModule, and with the Trainer's `accumulate_grad_batches`. `checks` counts the
    checks of this fit, `tested` those that found the gradient of each parameter above rounding.

    Args:
        every_n_updates: Updates from one check to the next.
        rows: Local rows on which the formula is checked.
        on_error: `stop` raises and ends the run, `warn` goes on.

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
        self._first = -1  # the update that the first of the batches belongs to
        self._steps: list[Updates] = []
        self._due: float = math.inf  # the next update to check
        self._skipped = ""  # why nothing is checked

    def summary(self) -> str:
        """Return one line on the whole fit: how many checks, and what they could not test."""
        if not self.checks:
            return "nothing was checked"
        missed = ", ".join(name for name, times in self.tested.items() if not times)
        checks = "1 check" if self.checks == 1 else f"{self.checks} checks"
        return f"{checks}, {f'not tested: {missed}' if missed else 'all parameters tested'}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
            self._look_ahead(trainer, trainer.global_step)
        self._steps.append(batches_of(batch))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradient of this update before the weights change."""
        step = trainer.global_step
        if step == self._due:
            with isolate_rng():
                self._check(trainer, pl_module)
        if step + 1 >= self._due:
            self._look_ahead(trainer, step + 1)

    def _look_ahead(self, trainer: Trainer, step: int) -> None:
        """Find the next update to check, and keep the random state if it is this one."""
        n, last = self.every_n_updates, trainer.max_steps - 1
        due = [k for k in (*EARLY, -(-step // n) * n, last) if k >= step and not self._skipped]
        self._due = min(due, default=math.inf)
        if step == self._due:
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def _check(self, trainer: Trainer, module: Any) -> None:
        step, every = trainer.global_step, module.batches_per_update
        kept = [(updates, k) for updates in self._steps for k in range(len(updates))]
        # Only these are gathered from the table.
        batches = [updates[k] for updates, k in kept[(step - self._first) * every :][:every]]
        contents = [_content(trainer, module, batch) for batch in batches]
        moments = any(isinstance(batch, MomentsBatch) for batch in batches)
        squares = LeastSquares.of(trainer, module) if moments else None
        reports = [self._formula(module, contents, step)]
        if not self._is_wrong(trainer, module, reports[0]):
            least = squares.term_size() if squares else 0.0
            reports.append(self._reduced(trainer, module, contents, least))
            self._is_wrong(trainer, module, reports[1])
        self.checks += 1
        errors: dict[str, float] = {}
        for p in (parameter for report in reports for parameter in report.parameters):
            errors[p.name] = max(p.relative_error, errors.get(p.name, 0.0))
            self.tested[p.name] = self.tested.get(p.name, 0) + p.tested
        module.curves.record(step, {f"gradcheck/{name}": e for name, e in errors.items()})

    def _formula(self, module: Any, contents: list[Any], step: int) -> GradientReport:
        """Check the formula on random rows; nothing on a process without rows."""
        content = next((content for content in contents if _count(content)), None)
        if content is None or module.automatic_optimization:
            return GradientReport(())
        return check_gradients(module, draw(content, self.rows, seed=step), seed=step)

    def _reduced(
        self, trainer: Trainer, module: Any, contents: list[Any], least: float
    ) -> GradientReport:
        """Check p.grad against autograd on all rows, up to 16 eps √(N + D) · largest term."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        torch.set_rng_state(self._random[0])
        torch.cuda.set_rng_state_all(self._random[1])
        # Not by the reduction that is checked.
        sums = reduce_sum(_local_sums(module, list(trained.values()), contents))
        sizes = [*(p.numel() for p in trained.values()), len(trained), 1, 1]
        *pieces, scales, total, rows = sums.split(sizes)
        means = [(s / total).view_as(p) for s, p in zip(pieces, trained.values(), strict=True)]
        if not module.automatic_optimization:  # p.grad is already clipped
            module.clip([SimpleNamespace(grad=mean) for mean in means])
        mixed = trainer.precision == "bf16-mixed" and module.automatic_optimization
        eps = torch.finfo(torch.bfloat16 if mixed else sums.dtype).eps
        # N rows and D numbers: rounding errors of independent sign add up like a random walk.
        walks = (rows + scales.new_tensor(sizes[:-3])).sqrt()
        bounds = SAFETY * eps * walks * (scales / total).clamp(min=least)
        return check_reduced(
            dict(zip(trained, means, strict=True)),
            {name: p.grad for name, p in trained.items() if p.grad is not None},
            dict(zip(trained, bounds.tolist(), strict=True)),
            trainer.world_size,
        )

    def _is_wrong(self, trainer: Trainer, module: Any, report: GradientReport) -> bool:
        # All processes stop together, or one would wait for the others for ever.
        if not reduce_sum(torch.tensor(float(not report.ok), device=module.device)):
            return False
        text = "found on another process" if report.ok else "\n".join(report.lines())
        message = f"gradient check at update {trainer.global_step}:\n{text}"
        if self.on_error == "stop":
            raise GradientError(message)
        warnings.warn(message, stacklevel=2)
        return True


def _reason_to_skip(trainer: Trainer, module: LightningModule) -> str:
    if not isinstance(module, GradientDescentModule):
        return f"{type(module).__name__} is not a GradientDescentModule"
    batches = trainer.accumulate_grad_batches
    words = f"accumulate_grad_batches={batches} of the Trainer averages batches, not rows"
    return words if batches > 1 else ""


def _content(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Return the content of a batch; for moments the local rows that they stand for."""
    if isinstance(batch, MomentsBatch):
        data: Any = tensor_data(trainer)
        return move_data_to_device(data.local("train"), module.device)
    return batch.content if isinstance(batch, DataBatch) else batch


def draw(content: Any, rows: int, seed: int) -> Any:
    """Return at most so many rows of a batch of any structure, drawn at random."""
    order = torch.randperm(_count(content), generator=torch.Generator().manual_seed(seed))
    return _pick(content, order[:rows])


def _count(content: Any) -> int:
    return len(next(tensors(content)))


def _pick(content: Any, rows: Tensor | slice) -> Any:
    """Return some rows of every tensor that has as many as the first."""
    count = _count(content)
    return apply_to_collection(content, Tensor, lambda t: t[rows] if t.shape[:1] == (count,) else t)


def _local_sums(module: Any, trained: list[Parameter], contents: list[Any]) -> Tensor:
    """Return Σ n·(gradient, size of its terms, 1) over the local batches, and Σ rows, flat."""
    sums = trained[0].new_zeros(sum(p.numel() for p in trained) + len(trained) + 2)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    for content in contents:
        n, count = module.rows(content), _count(content)
        if not n:
            continue
        terms = [gradients := _autograd(module, trained, content)]
        parts = max(1, min(PARTS, count // 2))
        with isolate_rng():
            for k in range(parts):
                part = _pick(content, slice(k, PART * parts, parts))
                terms.append(_autograd(module, trained, part))
        scales = [max(map(largest, column)) for column in zip(*terms, strict=True)]
        means = torch.cat([*map(torch.flatten, gradients), sums.new_tensor([*scales, 1.0])])
        sums += torch.cat([n * means, sums.new_tensor([count])])
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return sums


def _autograd(module: Any, trained: list[Parameter], content: Any) -> tuple[Tensor, ...]:
    # Unless one forward pass serves both, `gradients` draws random numbers after those of `loss`.
    fused = module.automatic_optimization or is_current(type(module), "loss_and_gradients")
    with torch.enable_grad(), torch.autocast(module.device.type, enabled=False):
        loss = call(module.loss, content)
        loss = loss if fused else call(module.loss, content)
        return torch.autograd.grad(loss, trained, materialize_grads=True)
