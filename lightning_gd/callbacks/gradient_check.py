"""Checks, during the fit, the formula and the gradient that the optimizer gets."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_gd.batch import batches_of
from lightning_gd.checked_update import Update, agree, muted, refusal
from lightning_gd.distributed import world_size
from lightning_gd.gradcheck.delivered import check_delivered
from lightning_gd.gradcheck.randomness import RandomState, same_randomness
from lightning_gd.gradcheck.repeated import Repeated
from lightning_gd.gradcheck.report import GradientError, GradientReport
from lightning_gd.gradcheck.tally import Tally
from lightning_gd.kept_update import KeptUpdate
from lightning_gd.module import GradientDescentModule
from lightning_gd.settings import one_of, whole_number
from lightning_gd.updates import updates_in_run

EARLY = (0, 1, 10, 100)  # updates that are always checked
RECORDS = vars(GradientDescentModule()).keys()  # attributes of a run, beside those of the formula


class GradientCheck(Tally, Callback):
    """Checks the formula, and the gradient that the optimizer gets, at single updates.

    These are the updates 0, 1, 10, 100, every `every_n_updates`, and the last one of the run (where
    several optimizers step by hand, that of `max_steps`).
    The gradient is that of the formula in explicit mode, on a few random rows. Of any other
    LightningModule it is that of autograd through its `training_step`, with every hand-written
    `backward` in it. It is compared with differences of the loss; a formula that they found right
    is later compared with autograd alone, where that has plain operations and agrees (and of two
    formulas, `gradients` and `loss_and_gradients`, that which the run uses). Then
    `p.grad`, before it is clipped, is compared with the gradient on the batches of the update on
    all processes, which shows a missing reduction. See `check_gradients` and `check_delivered` for
    the bounds. A callback that changes `p.grad` must come before this one; what the module's own
    `on_before_optimizer_step` changes is not seen. With accumulated batches each check uses the
    next one for the differences, skipping those without a loss. If its loss is not finite, the
    update is not checked. What is not the gradient of the loss by design fails the check: a
    straight-through estimator or a teacher updated inside the loss (`detach`; pass `loss=` with
    fixed targets), `spectral_norm`, `rsample` of Gamma and Dirichlet, hooks that change gradients,
    embeddings with `scale_grad_by_freq`, `max_norm`, or `padding_idx` of `F.embedding`.

    The largest relative error is logged as `verify/<parameter>`; nothing else in the run
    changes. `summary` says in a line what was checked and found; `Tally` has the counts.

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
        self._kept = KeptUpdate()
        self._due: float = math.inf  # the number of the next update to check
        self._said: set[str] = set()
        self._share = 1  # of the optimizers that make an update by hand, one step each

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
        self._kept.unwrap(pl_module)
        self._repeated, self._kept = Repeated(RECORDS), KeptUpdate()  # without copies

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batches of an update that is about to be checked, and the state before it."""
        kept = self._kept
        kept.unwrap(pl_module)
        if trainer.global_step != kept.first:  # else they are accumulated over several steps
            kept.begin(trainer.global_step)
            automatic = pl_module.automatic_optimization
            self._share = 1 if automatic else max(1, len(trainer.optimizers))
            self._look_ahead(trainer, trainer.global_step)
        last = trainer.global_step + len(batches_of(batch)) - 1
        if last // self._share >= self._due:
            kept.when_it_starts(pl_module, partial(self._keep, pl_module, batch, batch_idx))

    def _keep(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        with self._spared(self._kept.first):
            self._kept.add(module, batch, batch_idx)

    @contextmanager
    def _spared(self, step: int) -> Iterator[None]:
        """End no run that only warns because something cannot be checked."""
        try:
            yield
        except Exception as error:
            if self.on_error == "stop" or world_size() > 1 or isinstance(error, GradientError):
                raise
            self._kept.steps = []
            self._say(f"an update could not be checked: {step}: {type(error).__name__}: {error}")

    def looks_at(self, step: int) -> bool:
        """Tell whether `on_before_optimizer_step` does something before this update."""
        return (step + 1) // self._share >= self._due

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradient of this update before the weights change."""
        step = trainer.global_step
        if step // self._share == self._due and self._kept.steps:
            with self._spared(step):
                self._check(trainer, pl_module, optimizer)
        if (step + 1) // self._share >= self._due:
            self._look_ahead(trainer, step + 1)

    def _look_ahead(self, trainer: Trainer, step: int) -> None:
        """Find the next update to check, and keep the random state if it is this one."""
        steps = trainer.max_steps if self._share > 1 else updates_in_run(trainer)
        now, last = step // self._share, (steps - 1) // self._share
        n = self.every_n_updates
        due = [k for k in (*EARLY, -(-now // n) * n, last) if k >= now]
        self._due = min(due, default=math.inf)
        if now == self._due:
            self._state = RandomState.now()

    def _turn(self, trainer: Trainer) -> int:
        """Return how many updates before this one are due, also of a run that was resumed."""
        update, n = trainer.global_step // self._share, self.every_n_updates
        return -(-update // n) + sum(early < update and early % n > 0 for early in EARLY)

    def _check(self, trainer: Trainer, module: Any, optimizer: Optimizer) -> None:
        update = Update(trainer, module, self.loss, self.reference, optimizer)
        if not update.found or update.is_skipped:
            self._due += update.is_skipped
            self._say(*update.notes)
            return
        agreed, repeated = partial(agree, device=module.device), self._repeated
        with muted(trainer), same_randomness():
            before, parts = self._kept.as_it_was(module), self._kept.parts(update, self._state)
            known = repeated if self._sound else None
            asked = before, parts, self._state, self.rows, known, self._turn(trainer)
            report, trusted = update.formula(*asked)
            is_skipped = not agreed(not report.is_skipped)
            if is_skipped and agreed(report.ok or report.is_skipped):
                self.skipped += 1
                self._say("an update was not checked: there was no loss, or none that is finite")
                return
            kept = tuple(p for p in report.parameters if p.name in update.found or update.own)
            reports = [replace(report, parameters=kept)]
            wrong = self._is_wrong(trainer, reports[0])
            self._sound = bool(kept) and not wrong
            if not wrong:
                delivery = update.delivery(parts, repeated)
                reports.append(check_delivered(before, delivery, agreed, agreed(trusted)))
                wrong = self._is_wrong(trainer, reports[1])
        self._say(*(report.note for report in reports), *update.notes)
        self._record(trainer, module, reports, wrong)

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

    def _say(self, *texts: str) -> None:
        for text in texts:
            if text and text.partition(":")[0] not in self._said:
                self._said.add(text.partition(":")[0])
                warnings.warn(f"GradientCheck: {text}", stacklevel=2)
