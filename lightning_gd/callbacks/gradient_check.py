"""Checks, during the fit, the formula and the gradient that the optimizer gets."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_gd.batch import Updates, batches_of
from lightning_gd.checked_update import (
    Update,
    agree,
    draw,
    muted,
    not_a_mean,
    own_loss,
    refusal,
)
from lightning_gd.distributed import world_size
from lightning_gd.gradcheck.check import check_formula
from lightning_gd.gradcheck.delivered import Part, check_delivered
from lightning_gd.gradcheck.graph import dense
from lightning_gd.gradcheck.randomness import RandomState, same_randomness
from lightning_gd.gradcheck.repeated import Repeated
from lightning_gd.gradcheck.report import GradientError, GradientReport, ParameterReport
from lightning_gd.gradcheck.tally import Tally
from lightning_gd.gradcheck.twin import converted, twin
from lightning_gd.module import GradientDescentModule
from lightning_gd.settings import one_of, whole_number

EARLY = (0, 1, 10, 100)  # updates that are always checked
RECORDS = vars(GradientDescentModule()).keys()  # attributes of a run, beside those of the formula


class GradientCheck(Tally, Callback):
    """Checks the formula, and the gradient that the optimizer gets, at single updates.

    These are the updates 0, 1, 10, 100, every `every_n_updates`, and the last one of `max_steps`.
    The gradient is that of the formula in explicit mode, on a few random rows. Of any other
    LightningModule it is that of autograd through its `training_step`, with every hand-written
    `backward` in it. It is compared with differences of the loss; a formula that they found right
    is later compared with autograd alone, where that has plain operations and agrees (and of two
    formulas, `gradients` and `loss_and_gradients`, that which the run uses). Then
    `p.grad`, before it is clipped, is compared with the gradient on the batches of the update on
    all processes, which shows a missing reduction. See `check_gradients` and `check_delivered` for
    the bounds. A callback that changes `p.grad` must come before this one; what the module's own
    `on_before_optimizer_step` changes is not seen. An update whose first batch has no finite loss
    is not checked. What is not the gradient of the loss by design fails the check: a
    straight-through estimator or a teacher updated inside the loss (`detach`; pass `loss=` with
    fixed targets), `spectral_norm`, `rsample` of Gamma and Dirichlet, hooks that change gradients.

    The largest relative error is logged as `verify/<parameter>`; nothing else in the run
    changes. `checks` counts the checks of this fit, `tested` those that found the gradient of
    each parameter above rounding, `wrong` those that found a mistake in it, `skipped` the updates
    without a finite loss; `summary` says all in a line.

    Args:
        every_n_updates: Updates from one check to the next.
        rows: Local rows on which the formula of a GradientDescentModule is checked.
        on_error: `stop` raises and ends the run, `warn` goes on.
        loss: For manual optimization: the loss whose gradient is in `p.grad`, as a method of the
            module that takes the batch, or a function of the module and the batch; with several
            optimizers a list of them, where each has a backward pass of its own just before it
            steps.
        reference: The same function made of plain operations, which is differentiated instead.

    Raises:
        ValueError: If an argument is out of range, or the module cannot be checked.
        GradientError: During a fit, on all processes, with the parameter and its mistake.
    """

    def __init__(
        self,
        every_n_updates: int = 1000,
        rows: int = 8,
        on_error: Literal["stop", "warn"] = "stop",
        loss: str | Callable[..., Any] | list[str | Callable[..., Any]] | None = None,
        reference: Callable[..., Any] | None = None,
    ) -> None:
        whole_number("every_n_updates", every_n_updates, 1)
        whole_number("rows", rows, 1)
        one_of("on_error", on_error, ("stop", "warn"))
        self.every_n_updates, self.rows, self.on_error = every_n_updates, rows, on_error
        if reference is not None and not callable(reference):
            raise ValueError(
                f"reference={reference!r} must be a function of the module and a batch"
            )
        self.loss, self.reference = loss, reference
        self._sound = False  # differences found the formula right
        super().__init__()

    def begin(self) -> None:
        super().begin()
        self._repeated = Repeated(RECORDS)
        self._first = -1  # `global_step` before the first of the batches kept
        self._steps: list[tuple[Updates, int, RandomState]] = []  # their index, the state before
        self._due: float = math.inf  # the number of the next update to check
        self._before: nn.Module | None = None  # the module before the update
        self._said: set[str] = set()
        self._share = 1  # of the optimizers that make an update by hand, one step each
        self._wrapped: dict[str, Any] | None = None  # the attribute in place of a wrapped step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._sound = False

    def state_dict(self) -> dict[str, Any]:
        return {"sound": self._sound}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sound = state_dict["sound"]  # so that a resumed run checks as one that was not

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that cannot be checked."""
        self.begin()
        if reason := refusal(trainer, pl_module, self.loss):
            name = type(pl_module).__name__
            raise ValueError(f"GradientCheck cannot check {name}: {reason}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._repeated, self._before, self._steps = Repeated(RECORDS), None, []  # copies
        self._unwrap(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batches of an update that is about to be checked, and the state before it."""
        self._unwrap(pl_module)
        own = isinstance(pl_module, GradientDescentModule)
        if trainer.global_step != self._first:  # else they are accumulated over several steps
            self._first, self._steps = trainer.global_step, []
            self._before = None
            automatic = pl_module.automatic_optimization
            self._share = 1 if automatic else max(1, len(trainer.optimizers))
            self._look_ahead(trainer, trainer.global_step)
        last = trainer.global_step + len(batches_of(batch)) - 1
        if last // self._share < self._due:
            return
        if own or not is_overridden("on_train_batch_start", pl_module):
            self._keep(pl_module, batch, batch_idx)
            return
        # The module's own hook comes after this one: keep what there is before `training_step`.
        step, own_attributes = pl_module.training_step, vars(pl_module)
        self._wrapped = {n: v for n, v in own_attributes.items() if n == "training_step"}

        @wraps(step)
        def kept(*args: Any, **kwargs: Any) -> Any:
            self._unwrap(pl_module)
            self._keep(pl_module, batch, batch_idx)
            return step(*args, **kwargs)

        own_attributes["training_step"] = kept

    def _unwrap(self, module: LightningModule) -> None:
        """Give `training_step` back; a step that the module's own hook left out has not done it."""
        if self._wrapped is not None:
            vars(module).pop("training_step")
            vars(module).update(self._wrapped)
        self._wrapped = None

    def _keep(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        own = isinstance(module, GradientDescentModule)
        with self._spared(self._first):
            if self._before is None and not own:
                self._before = twin(module)
            kept = batches_of(batch if own else converted(batch, None))
            self._steps.append((kept, batch_idx, RandomState.now()))

    @contextmanager
    def _spared(self, step: int) -> Iterator[None]:
        """End no run that only warns because something cannot be checked."""
        try:
            yield
        except Exception as error:
            if self.on_error == "stop" or world_size() > 1 or isinstance(error, GradientError):
                raise
            self._steps = []
            self._say(f"an update could not be checked: {step}: {type(error).__name__}: {error}")

    def looks_at(self, step: int) -> bool:
        """Tell whether `on_before_optimizer_step` does something before this update."""
        return (step + 1) // self._share >= self._due

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradient of this update before the weights change."""
        step = trainer.global_step
        if step // self._share == self._due and self._steps:
            with self._spared(step):
                self._check(trainer, pl_module, optimizer)
        if (step + 1) // self._share >= self._due:
            self._look_ahead(trainer, step + 1)

    def _look_ahead(self, trainer: Trainer, step: int) -> None:
        """Find the next update to check, and keep the random state if it is this one."""
        now, last = step // self._share, (trainer.max_steps - 1) // self._share
        n = self.every_n_updates
        due = [k for k in (*EARLY, -(-now // n) * n, last) if k >= now]
        self._due = min(due, default=math.inf)
        if now == self._due:
            self._state = RandomState.now()

    def _check(self, trainer: Trainer, module: Any, optimizer: Optimizer) -> None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {n: p for n, p in module.named_parameters() if id(p) in trained and p.requires_grad}
        if count := len(trained - {id(p) for p in module.parameters()}):
            self._say(f"{count} tensors of the optimizer are no parameters of it: not checked")
        if not named:
            return
        found = {n: p.grad for n, p in named.items()}
        found = {n: torch.zeros_like(named[n]) if g is None else dense(g) for n, g in found.items()}
        if trainer.precision == "16-mixed" and not all(g.isfinite().all() for g in found.values()):
            self._due += 1  # the scaler skips this update
            return
        update = Update(trainer, module, self.loss, self.reference, optimizer)
        agreed = partial(agree, device=module.device)
        with muted(trainer), same_randomness():
            before, parts = self._as_it_was(module), self._parts(update)
            report, trusted = self._formula(update, before, parts)
            is_skipped = not agreed(not report.is_skipped)
            if is_skipped and agreed(report.ok or report.is_skipped):
                self.skipped += 1
                self._say("an update was not checked: there was no loss, or none that is finite")
                return
            kept = tuple(p for p in report.parameters if p.name in named or update.own)
            reports = [replace(report, parameters=kept)]
            wrong = self._is_wrong(trainer, reports[0])
            self._sound = bool(kept) and not wrong
            if not wrong:
                delivery = update.delivery(parts, found)
                if update.explicit:
                    delivery = replace(delivery, copy=self._repeated.copy)
                reports.append(check_delivered(before, delivery, agreed, agreed(trusted)))
                wrong = self._is_wrong(trainer, reports[1])
        for text in (*(report.note for report in reports), update.note):
            self._say(text)
        self._record(trainer, module, reports, wrong)

    def _parts(self, update: Update) -> list[Part]:
        """Return the local batches of this update, and the states that they begin with."""
        kept = [
            (batches, k, index, None if k else state)
            for batches, index, state in self._steps
            for k in range(len(batches))
        ]
        if not update.explicit:
            parts = [update.part(batches[k], index, state) for batches, k, index, state in kept]
            is_first = update.trainer.global_step == self._first  # of the optimizers of a batch
            return parts if is_first else [replace(part, state=self._state) for part in parts]
        every = update.module.batches_per_update  # only these are gathered from the table
        kept = kept[(update.trainer.global_step - self._first) * every :][:every]
        return [
            update.part(batches[k], index, None if i else self._state)
            for i, (batches, k, index, _) in enumerate(kept)
        ]

    def _formula(
        self, update: Update, before: nn.Module, parts: list[Part]
    ) -> tuple[GradientReport, bool]:
        """Check the formula, or a hand-written backward; nothing on a process without rows."""
        part = next((part for part in parts if part.weight), None)
        if part is None:
            return GradientReport(()), True
        step, batch, state, loss = update.trainer.global_step, part.batch, part.state, part.loss
        if update.own:
            batch, state, loss = draw(batch, self.rows, step), RandomState.seeded(step), own_loss
        explicit, trainer = update.explicit, update.trainer
        several = trainer.world_size * len(parts) * trainer.accumulate_grad_batches > 1
        if update.own and several and (words := not_a_mean(before, batch)):
            return GradientReport((ParameterReport("loss", diagnosis=words),)), True
        given, report = (before, batch, loss, state or self._state), None
        if explicit and self._sound and self.reference is None:
            report = self._repeated.report(*given)
        report = report or check_formula(*given, explicit, self.reference)
        return report, explicit or not report.functions

    def _as_it_was(self, module: Any) -> nn.Module:
        """Return the module before the update, with its present weights."""
        if self._before is None:
            return module
        with torch.no_grad():
            for old, new in zip(self._before.parameters(), module.parameters(), strict=True):
                old.copy_(new)
        return self._before

    def _is_wrong(self, trainer: Trainer, report: GradientReport) -> bool:
        # All processes stop together, or one would wait for the others for ever.
        if agree(report.ok, trainer.strategy.root_device):
            return False
        other = report.ok or report.is_skipped
        text = "found on another process" if other else "\n".join(report.lines())
        message = f"gradient check at update {trainer.global_step}:\n{text}"
        if self.on_error == "stop":
            raise GradientError(message)
        warnings.warn(message, stacklevel=2)
        return True

    def _record(
        self, trainer: Trainer, module: Any, reports: list[GradientReport], wrong: bool
    ) -> None:
        errors = self.count(reports, wrong)
        formula = reports[0].parameters
        if formula and not any(p.tested for p in formula):
            self._say("no gradient is above its rounding: a mistake would not have been seen")
        values = {f"verify/{name}": error for name, error in errors.items()}
        if isinstance(module, GradientDescentModule):
            module.curves.record(trainer.global_step, values)
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)

    def _say(self, text: str) -> None:
        if text and text.partition(":")[0] not in self._said:
            self._said.add(text.partition(":")[0])
            warnings.warn(f"GradientCheck: {text}", stacklevel=2)
