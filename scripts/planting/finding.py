"""Runs a fit with a planted mistake, and asks three other checks about it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.gradcheck import GradientError
from planting.mistakes import EVERY, UNNAMED, UPDATES, Mistake
from planting.modules import Batches
from planting.units import Unit


@dataclass(frozen=True)
class Found:
    """What a fit said about a mistake."""

    update: int | None  # at which it was stopped
    message: str

    @property
    def named(self) -> str:
        """The diagnosis, without the parameters; of several the first that names a mistake."""
        lines = [line for line in self.message.splitlines()[1:] if not _VERDICT.search(line)]
        found = [line.partition(": ")[2] for line in lines]
        words = min(found, key=lambda words: UNNAMED in words, default="")
        return _EXAMPLE.sub("", words)


STEPS = (-5e-5, 5e-5)  # 1e-4 apart
_EXAMPLE = re.compile(r"; (along a random direction|the worst entry).*?(?=; |$)")
_VERDICT = re.compile(r": (WRONG|ok|not tested)")


def find(mistake: Mistake, seed: int = 0) -> Found:
    """Train with the mistake and the check; the message is empty where nothing was found."""
    torch.manual_seed(seed)
    module = mistake.build()
    loss = None if mistake.kind != "manual" else loss_of_batch
    check = GradientCheck(every_n_updates=EVERY, loss=loss)
    callbacks = [mistake.callback()] if mistake.callback else []
    trainer = make_trainer(mistake.precision, callbacks=[*callbacks, check], max_steps=UPDATES)
    try:
        trainer.fit(module, Batches(mistake.data()))
    except GradientError as error:
        return Found(trainer.global_step, str(error))
    return Found(None, "")


def loss_of_batch(module: Any, batch: Any) -> torch.Tensor:
    """Return the loss of a batch."""
    return module.loss(*batch)


def make_trainer(precision: Any, **settings: Any) -> Trainer:
    """Return a Trainer that prints and writes nothing."""
    return Trainer(
        precision=precision,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def gradcheck_finds(unit: Unit) -> bool:
    """Tell whether `torch.autograd.gradcheck` in float64 with its defaults fails."""
    inputs = [t.clone().requires_grad_() for t in unit.inputs]
    return not torch.autograd.gradcheck(unit.wrong, inputs, raise_exception=False)


def bfloat16_finds(unit: Unit) -> bool | None:
    """Tell whether gradients in bfloat16 differ from those of plain operations by 5e-2."""
    if unit.plain is None:
        return None
    wrong, right = (_gradients(f, unit.inputs, torch.bfloat16) for f in (unit.wrong, unit.plain))
    return not all(map(partial(torch.allclose, rtol=5e-2, atol=5e-2), wrong, right))


def direction_finds(unit: Unit) -> bool:
    """Tell whether the slope along one direction, by a step of 1e-4 in float32, differs by 2e-2."""
    source = torch.Generator().manual_seed(1)
    inputs = [t.float() for t in unit.inputs]
    way = [torch.randn(t.shape, generator=source) for t in inputs]
    cotangent = _cotangent(unit.wrong(*map(torch.clone, inputs)))
    ends = [unit.wrong(*(t + s * v for t, v in zip(inputs, way, strict=True))) for s in STEPS]
    slope = ((ends[1] - ends[0]) / (STEPS[1] - STEPS[0]) * cotangent).sum()
    found = _gradients(unit.wrong, inputs, torch.float32)
    mine = torch.stack([(g * v).sum() for g, v in zip(found, way, strict=True)]).sum()
    return not torch.allclose(mine, slope, rtol=2e-2, atol=2e-2)


def _gradients(function: Any, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
    out = function(*leaves)
    return list(torch.autograd.grad(out, leaves, _cotangent(out), materialize_grads=True))


def _cotangent(out: Tensor) -> Tensor:
    source = torch.Generator().manual_seed(2)
    return torch.randn(out.shape, generator=source).to(out) if out.ndim else torch.ones_like(out)
