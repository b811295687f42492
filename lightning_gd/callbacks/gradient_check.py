"""Is the gradient right, and does every process see it? Asked during the fit."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeGuard

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gd.distributed import reduce_sum
from lightning_gd.gradcheck import GradientError, GradientReport, check_gradients, check_reduced
from lightning_gd.module import GradientDescentModule
from lightning_gd.refusals import one_of, whole_number

CHUNKS = 8  # of a share: their gradients tell how large the summed terms are

Share = tuple[Tensor, Tensor, int]


class GradientCheck(Callback):
    """Checks the formula, and the gradient that the optimizer gets, every so many updates.

    Two questions. Is `gradients` the derivative of `loss`, by autograd and finite differences in
    float64, on a few rows? And is the reduced `p.grad` what the rows of all processes demand: no
    reduction missing, no factor of the number of processes? The largest relative error is logged
    as `gradcheck/<parameter>`. With the Trainer's own accumulation nothing is checked: it averages
    the means of batches, whatever their sizes.

    Args:
        every_n_updates: Updates from one check to the next; the first is checked too.
        rows: Rows of this process on which the formula is checked.
        on_error: `stop` raises and ends the run, `warn` goes on.

    Raises:
        ValueError: If an argument is out of range.
        GradientError: During a fit, naming the parameter, its error and what is wrong with it.
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
        self._shares: list[Share] = []
        self._errors: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the rows of the update that is checked: blocks begin with it."""
        if trainer.global_step % self.every_n_updates or not _known(pl_module):
            return
        if trainer.accumulate_grad_batches > 1:  # Lightning averages batches, not rows
            return
        batch = pl_module.as_batch(batch)
        if pl_module.uses_moments:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            batch = data.share("train")
            batch = batch._replace(x=batch.x.to(pl_module.device), y=batch.y.to(pl_module.device))
        # With accumulation the block is this one update.
        several = pl_module.hparams["accumulate_grad_batches"] > 1
        shares = list(batch.shares()) if several else [next(batch.shares())]
        self._shares = shares
        self._errors = {}
        if pl_module.hparams["gradient"] == "explicit":  # before it is used
            x, y, _ = shares[0]
            rows = x[: self.rows], y[: self.rows]
            self._judge(trainer, pl_module, check_gradients(pl_module, *rows) if len(y) else None)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradient of all rows, before the weights change."""
        if self._shares and _known(pl_module):
            shares, self._shares = self._shares, []
            self._judge(trainer, pl_module, self._reduced(trainer, pl_module, shares))
            pl_module.curves.record(trainer.global_step, self._errors)

    def _reduced(
        self, trainer: Trainer, module: GradientDescentModule, shares: list[Share]
    ) -> GradientReport:
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        own, scale = _own_gradients(module, shares)
        if module.uses_moments and module.squares is not None:
            scale = [max(size, module.squares.term_size()) for size in scale]
        flat = reduce_sum(torch.cat([gradient.reshape(-1) for gradient in own]))
        pieces = flat.split([gradient.numel() for gradient in own])
        expected = [piece.view_as(gradient) for piece, gradient in zip(pieces, own, strict=True)]
        if not module.automatic_optimization:  # Lightning calls this hook before it clips
            module.clip(_holders(expected))
        mixed = trainer.precision == "bf16-mixed" and module.automatic_optimization
        rows = sum(total for _, _, total in shares)
        share = sum(len(y) for _, y, _ in shares) / rows
        return check_reduced(
            dict(zip(names, expected, strict=True)),
            {n: p.grad for n, p in module.named_parameters() if p.grad is not None},
            trainer.world_size,
            torch.bfloat16 if mixed else own[0].dtype,
            rows,
            scale=dict(zip(names, scale, strict=True)),
            local={n: g / share for n, g in zip(names, own, strict=True)} if share else None,
        )

    def _judge(
        self, trainer: Trainer, module: GradientDescentModule, report: GradientReport | None
    ) -> None:
        """Keep the errors, and stop or warn; `None` is a process without rows."""
        for p in report.parameters if report else ():
            name = f"gradcheck/{p.name}"
            self._errors[name] = max(self._errors.get(name, 0.0), p.relative_error)
        wrong = report is not None and not report.ok
        # All processes stop together, or one would wait for the others for ever.
        anywhere = reduce_sum(torch.tensor(float(wrong), device=module.device))
        if not anywhere:
            return
        text = "\n".join(report.lines()) if report and wrong else "found on another process"
        message = f"gradient check at update {trainer.global_step}:\n{text}"
        if self.on_error == "stop":
            raise GradientError(message)
        warnings.warn(message, stacklevel=2)


def _known(module: LightningModule) -> TypeGuard[GradientDescentModule]:
    return isinstance(module, GradientDescentModule)


def _own_gradients(
    module: GradientDescentModule, shares: list[Share]
) -> tuple[list[Tensor], list[float]]:
    """By autograd: Σ n·g / N over this process's rows, and the size of the terms summed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    sums, scale = [torch.zeros_like(p) for p in parameters], [0.0] * len(parameters)
    rows = sum(total for _, _, total in shares)
    for x, y, _ in shares:
        for part_x, part_y in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True):
            if len(part_y) == 0:
                continue
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                loss = module.loss(part_x, part_y)
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            for i, gradient in enumerate(gradients):
                sums[i] += gradient * (len(part_y) / rows)
                scale[i] = max(scale[i], float(gradient.abs().max()))
    return sums, scale


def _holders(gradients: list[Tensor]) -> list[Parameter]:
    holders = [Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for holder, gradient in zip(holders, gradients, strict=True):
        holder.grad = gradient
    return holders
