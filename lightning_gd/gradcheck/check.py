"""Compares gradients, by a formula and by autograd, with differences of the loss."""

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_gd.batch import call
from lightning_gd.gradcheck.bench import Bench
from lightning_gd.gradcheck.comparison import Comparison
from lightning_gd.gradcheck.point import Loss
from lightning_gd.gradcheck.precision import InFloat64, eager
from lightning_gd.gradcheck.randomness import RandomState, same_randomness
from lightning_gd.gradcheck.report import GradientReport, NoLoss
from lightning_gd.gradcheck.twin import twin

MISSING = "training_step returned None"


def check_gradients(
    model: nn.Module,
    *batch: Any,
    loss: Loss | None = None,
    reference: Loss | None = None,
    seed: int = 0,
) -> GradientReport:
    """Compare a model's gradients with differences of its loss.

    A model with a method `gradients` is asked for its formula, by `loss_and_gradients` where its
    class defines it. The gradient of any other model is that of autograd, through every
    `autograd.Function` with a hand-written `backward`. This happens in float64 on a copy, where
    every call sees the same random numbers and buffers; nothing of the model changes. Where the
    model asks for float32, as `.float()` does, it is given float64, but inside of a hand-written
    `backward`, which may then differ by 1e-4 of the slope (8 eps where it asks for bfloat16 or
    float16). A model that cannot run in float64 at
    all is checked in its own dtype; the bounds in the report say what is seen there.

    Each parameter moves along its gradient and a random direction at once, so that every entry
    counts. Right is a gradient whose slope is that of central differences up to the disagreement
    of differences over several lengths, and 1024 eps (N + D + H) of the loss, where N rows, D
    numbers per row and H the largest dimension of a parameter count the terms of the sums. Where
    the loss has a kink, every slope between the one-sided ones is right. This is asked at the given
    weights and after a random step, since a gradient can vanish at zeros or at an optimum, where
    any multiple of it is right. If the model raises or has no finite loss, `failure` of the report
    says why.

    Args:
        model: With `loss(*batch)`, a mean over rows, and `gradients(*batch)`; or any
            LightningModule, whose `training_step` returns the loss.
        *batch: Inputs and targets; or one tuple, dict or tensor as a DataLoader yields it.
        loss: Function of the model and the batch that returns the loss, instead of its methods.
        reference: The same function made of plain operations, which is differentiated instead.
        seed: Of the random step, and of random numbers that the model draws by torch.
    """
    content = batch[0] if len(batch) == 1 else batch
    explicit = loss is None and has_formula(model)
    state = RandomState.seeded(seed)
    with same_randomness():
        return check_formula(model, content, loss or loss_of(model), state, explicit, reference)


def has_formula(model: Any) -> bool:
    """Tell whether a model has the methods `loss` and `gradients`."""
    return all(callable(getattr(model, name, None)) for name in ("loss", "gradients"))


def loss_of(model: nn.Module) -> Loss:
    """Return the function of a model and a batch that returns its loss."""
    if has_formula(model) or not isinstance(model, LightningModule):
        return own_loss
    return partial(loss_of_step, batch_idx=0)


def own_loss(model: Any, batch: Any) -> Tensor:
    """Return the loss that the method `loss` of a model gives."""
    return call(model.loss, batch)


def loss_of_step(model: Any, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss of a `training_step` of a LightningModule."""
    indexed = _takes_index(getattr(model.training_step, "__func__", model.training_step))
    found = model.training_step(batch, batch_idx) if indexed else model.training_step(batch)
    found = found["loss"] if isinstance(found, dict) else found
    if found is None:
        raise NoLoss(MISSING)
    if not isinstance(found, Tensor):
        raise TypeError(f"training_step returned {found!r} and no loss: give loss=")
    return found


@lru_cache(maxsize=64)
def _takes_index(training_step: Any) -> bool:
    return is_param_in_hook_signature(training_step, "batch_idx", min_args=2)


def check_formula(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    state: RandomState,
    explicit: bool,
    reference: Loss | None = None,
) -> GradientReport:
    """Check the formula of a model, or autograd; see `check_gradients`."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    raised = short = ""
    # Float64 first; then also where the model asks for a shorter dtype; then its own dtype.
    ways = [(torch.float64, False), (torch.float64, True), (own, False)]
    for number, (dtype, is_lifted) in enumerate(dict.fromkeys(ways)):
        lifted = InFloat64(on_cpu) if is_lifted else None
        with eager(dtype), lifted or nullcontext():
            bench = Bench(twin(model, dtype), batch, loss, state, reference, not explicit)
            bench.lifted, bench.is_strict = lifted, number == 0
            try:
                if reference and bench.is_less_precise() and dtype != own:
                    short = f"the loss has less precision than {dtype}"
                    continue
                report = Comparison(bench, explicit).report()
            except NoLoss as error:
                words = f"{bench.called}: {error}"
                return GradientReport((), failure=words, is_skipped=not error.is_mistake)
            except Exception as error:  # whatever a model raises belongs in the report
                raised = raised or f"{bench.called} raised {type(error).__name__}: {error}"
            else:
                why = "" if is_lifted else raised or short
                notes = [f"checked in {dtype}, because {why}"] if why else []
                return replace(report, note="; ".join([*notes, *sorted(bench.changed)]))
    return GradientReport((), failure=raised)
