"""Settings of a run: ranges, optimizers and schedulers by name, and what is refused before work."""

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gd.arguments import unknown

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "32", "64", "bf16", "None")
SEEDS = 2**63  # torch takes no larger seed


class DivergenceError(ArithmeticError):
    """The loss or a weight became infinite or NaN; exit status 3."""


def number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Raise ValueError unless `value` is a finite number in the given range."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (real and above < value < below and least <= value <= most):
        bounds = {"above": above, "of at least": least, "below": below, "of at most": most}
        form = [f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound)]
        raise ValueError(f"{name}={value!r} must be a finite number {' and '.join(form)}".strip())


def whole_number(
    name: str, value: Any, least: int, *, optional: bool = False, below: float = math.inf
) -> None:
    """Raise ValueError unless `value` is an integer in range, or None where that is allowed."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value < below or value is None and optional):
        most = f" and below {below}" if below < math.inf else ""
        null = " or null" if optional else ""
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}{most}{null}")


def one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the accepted words."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, accepted))}")


def arguments_of(module: LightningModule) -> dict[str, Any]:
    """Return the arguments of a model; the Trainer drops a lambda from `hparams`."""
    return {**module.hparams_initial, **module.hparams}


def check_settings(h: Mapping[str, Any]) -> None:
    """Raise ValueError for the first setting of a GradientDescentModule that is out of range."""
    one_of("gradient", h["gradient"], ("explicit", "autograd"))
    if isinstance(h["lr"], str):
        one_of("lr", h["lr"], ("auto", "a finite number above 0"))
    else:
        number("lr", h["lr"], above=0)
    number("momentum", h["momentum"], least=0, below=1)
    one_of("scheduler_interval", h["scheduler_interval"], ("update", "epoch"))
    if h["gradient_clip_val"] is not None:
        number("gradient_clip_val", h["gradient_clip_val"], above=0)
    one_of("gradient_clip_algorithm", h["gradient_clip_algorithm"], ("norm", "value"))
    whole_number("accumulate_grad_batches", h["accumulate_grad_batches"], 1)
    if not isinstance(h.get("cuda_graph", False), bool):
        raise ValueError(f"cuda_graph={h['cuda_graph']!r} must be True or False")
    for name, owner in (("optimizer_args", "optimizer"), ("scheduler_args", "scheduler")):
        if h[name] is not None and not isinstance(h[name], dict):
            raise ValueError(f"{name}={h[name]!r} must map arguments of the {owner} to values")


def check_precision(precision: object) -> None:
    """Raise ValueError for a precision in which gradients are scaled or rounded."""
    if str(precision) not in PRECISIONS:
        raise ValueError(
            f"--trainer.precision {precision} is not supported: its scaled or rounded "
            "gradients are not those of the formula; use 32-true, 64-true or bf16-mixed"
        )


def check_trainer(trainer: Trainer, h: Mapping[str, Any]) -> None:
    """Raise ValueError where the Trainer cannot run the model, or a setting is given twice."""
    explicit, clip = h["gradient"] == "explicit", trainer.gradient_clip_val
    counts = {"trainer": trainer.accumulate_grad_batches, "model": h["accumulate_grad_batches"]}
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise ValueError(
            f"strategy {strategy} is not supported: it shards or wraps the parameters that the "
            "formula needs whole; use --trainer.strategy ddp, or auto with one device"
        )
    check_precision(trainer.precision)
    if clip is not None and (explicit or h["gradient_clip_val"] is not None):
        raise ValueError(
            f"--trainer.gradient_clip_val {clip} is not applied to this model's gradients: set "
            "--model.gradient_clip_val, which clips in both modes"
        )
    unused, used = ("trainer", "model") if explicit else ("model", "trainer")
    if counts[unused] > 1:
        raise ValueError(
            f"--{unused}.accumulate_grad_batches {counts[unused]} is not for "
            f"gradient={h['gradient']}: set --{used}.accumulate_grad_batches"
        )


def build_optimizer(
    name: str, parameters: Iterable[Parameter], lr: float, momentum: float, args: dict[str, Any]
) -> Optimizer:
    """Build the optimizer `name` of `torch.optim`, or of a dotted path."""
    cls = _find(name, "torch.optim", Optimizer, "optimizer")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer={name!r} evaluates the loss several times per update and needs a closure; "
            "explicit gradients are set once: choose one without, such as 'SGD' or 'Adam'"
        )
    for key in {"lr", "momentum"} & args.keys():
        raise ValueError(f"optimizer_args must not hold {key}={args[key]!r}: set {key} itself")
    settings = {"lr": lr, **({"momentum": momentum} if momentum else {}), **args}
    return _built("optimizer", name, cls, parameters, settings)


def build_scheduler(name: str, optimizer: Optimizer, args: dict[str, Any]) -> LRScheduler:
    """Build the scheduler `name` of `torch.optim.lr_scheduler`, or of a dotted path."""
    cls = _find(name, "torch.optim.lr_scheduler", LRScheduler, "scheduler")
    return _built("scheduler", name, cls, optimizer, args)


def _find(name: str, home: str, base: type, setting: str) -> Any:
    module, _, last = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module or home), last, None)
    except ImportError as error:
        raise ValueError(f"{setting}={name!r} cannot be imported: {error}") from error
    if isinstance(cls, type) and issubclass(cls, base):
        return cls
    public = vars(importlib.import_module(home)).items()
    found = {k: cls for k, cls in public if cls is not base and not k.startswith("_")}
    known = [key for key, cls in found.items() if isinstance(cls, type) and issubclass(cls, base)]
    raise ValueError(unknown(setting, name, known, f" (of {home})"))


def _built(setting: str, name: str, cls: type, first: Any, args: dict[str, Any]) -> Any:
    for key, value in args.items():
        if value != value:  # torch lets NaN through
            raise ValueError(f"{setting}_args must hold no NaN; got {key}={value!r}")
    try:
        return cls(first, **args)
    except (TypeError, ValueError) as error:
        accepted = ", ".join(list(inspect.signature(cls).parameters)[1:])
        raise ValueError(
            f"{setting}={name!r} cannot take {args}: {error}; it accepts {accepted}"
        ) from error
