"""What a run cannot do, refused by name before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
SHORT_PRECISIONS = ("32", "64", "bf16", "None")  # other names of these, and the default
SEEDS = 2**63  # torch takes no larger seed


class DivergenceError(ArithmeticError):
    """The loss or a weight became infinite or NaN; exit status 3."""


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse anything but a finite number in the range given.

    Raises:
        ValueError: Naming the setting, the value and the accepted form.
    """
    form = "a finite number"
    form += f" above {above:g}" if above is not None else ""
    form += f" of at least {least:g}" if least is not None else ""
    form += f" and at most {most:g}" if most is not None else ""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    good = good and (above is None or value > above) and (least is None or value >= least)
    if not good or most is not None and value > most:
        raise ValueError(f"{name}={value!r} must be {form}")


def whole_number(
    name: str, value: object, least: int, *, optional: bool = False, below: int | None = None
) -> None:
    """Refuse anything but an integer of at least `least` (or `None` where that is allowed).

    Raises:
        ValueError: Naming the setting, the value and the accepted form.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        also = " or null" if optional else ""
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}{also}")
    if below is not None and value >= below:
        raise ValueError(f"{name}={value!r} must be an integer below {below}")


def one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Refuse anything but one of the accepted words.

    Raises:
        ValueError: Naming the setting, the value and the accepted words.
    """
    if value not in accepted:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, accepted))}")


def check_settings(h: Mapping[str, Any]) -> None:
    """Check the settings of a `GradientDescentModule`.

    Raises:
        ValueError: Naming the first setting that is out of range.
    """
    one_of("gradient", h["gradient"], ("explicit", "autograd"))
    if isinstance(h["lr"], str):
        one_of("lr", h["lr"], ("auto", "a finite number above 0"))
    else:
        number("lr", h["lr"], above=0)
    number("momentum", h["momentum"], least=0)
    if h["momentum"] >= 1:
        raise ValueError(f"momentum={h['momentum']!r} must be below 1, or no update ever fades")
    one_of("scheduler_interval", h["scheduler_interval"], ("update", "epoch"))
    if h["gradient_clip_val"] is not None:
        number("gradient_clip_val", h["gradient_clip_val"], above=0)
    one_of("gradient_clip_algorithm", h["gradient_clip_algorithm"], ("norm", "value"))
    whole_number("accumulate_grad_batches", h["accumulate_grad_batches"], 1)
    whole_number("updates_per_step", h["updates_per_step"], 1, optional=True)
    if h["moments"] and h["accumulate_grad_batches"] > 1:
        raise ValueError(
            "moments=True takes the full batch at every update: accumulate_grad_batches="
            f"{h['accumulate_grad_batches']!r} must be 1"
        )
    for name, owner in (("optimizer_args", "optimizer"), ("scheduler_args", "scheduler")):
        if h[name] is not None and not isinstance(h[name], dict):
            raise ValueError(f"{name}={h[name]!r} must map arguments of the {owner} to values")


def check_precision(precision: object) -> None:
    """Refuse a precision in which explicit gradients are not those of the formula.

    Raises:
        ValueError: Naming it and those to use.
    """
    if str(precision) not in PRECISIONS + SHORT_PRECISIONS:
        raise ValueError(
            f"--trainer.precision {precision} is not supported: its scaled or rounded "
            f"gradients are not those of the formula; use one of {', '.join(PRECISIONS)}"
        )


def check_width(model: torch.nn.Module, width: int | None) -> None:
    """Refuse a model made for another number of features, where both numbers are known.

    Raises:
        ValueError: Naming both numbers and the setting to use.
    """
    mine = getattr(model, "hparams", {}).get("num_features")
    if None not in (mine, width) and mine != width:
        raise ValueError(
            f"num_features={mine} of {type(model).__name__} does not fit the data, whose x is "
            f"[N, {width}]: give --model.num_features {width}"
        )


def check_trainer(trainer: Trainer, h: Mapping[str, Any]) -> None:
    """Check that the Trainer can run this model, and that no setting is given twice.

    Raises:
        ValueError: Naming what is refused and the setting to use.
    """
    explicit = h["gradient"] == "explicit"
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise ValueError(
            f"strategy {strategy} is not supported: it shards or wraps the parameters that the "
            "formula needs whole; use --trainer.strategy ddp, or auto with one device"
        )
    check_precision(trainer.precision)
    clip, mine = trainer.gradient_clip_val, h["gradient_clip_val"]
    if clip is not None and (explicit or mine is not None):
        raise ValueError(
            f"--trainer.gradient_clip_val {clip} is not applied to this model's gradients: set "
            "--model.gradient_clip_val, which clips on both roads"
        )
    if explicit and trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} is for "
            "gradient=autograd; for explicit gradients set --model.accumulate_grad_batches"
        )
    if not explicit and h["accumulate_grad_batches"] > 1:
        raise ValueError(
            f"--model.accumulate_grad_batches {h['accumulate_grad_batches']} is for "
            "gradient=explicit; for autograd set --trainer.accumulate_grad_batches"
        )
