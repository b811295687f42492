"""Optimizers and schedulers by name, with plain arguments that a checkpoint can hold."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def build_optimizer(
    name: str, parameters: Iterable[Parameter], lr: float, momentum: float, args: dict[str, Any]
) -> Optimizer:
    """Build a torch optimizer.

    Args:
        name: A class of `torch.optim`, such as `SGD` or `Adam`, or a dotted path.
        parameters: What it updates.
        lr: The learning rate, the only place where it is given.
        momentum: Passed on where it is not 0.
        args: Further arguments of the class.

    Raises:
        ValueError: If there is no such class, it needs a closure, or it refuses an argument.
    """
    cls = _find(name, "torch.optim", Optimizer, "optimizer")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer={name!r} evaluates the loss several times a step and needs a closure; "
            "gradients derived by hand are set once: choose one without, such as 'SGD' or 'Adam'"
        )
    for key in ("lr", "momentum"):
        if key in args:
            raise ValueError(f"optimizer_args must not hold {key}={args[key]!r}: set {key} itself")
    settings = {"lr": lr, **({"momentum": momentum} if momentum else {}), **args}
    return _built("optimizer", name, cls, parameters, settings)


def build_scheduler(name: str, optimizer: Optimizer, args: dict[str, Any]) -> LRScheduler:
    """Build a torch learning-rate scheduler.

    Args:
        name: A class of `torch.optim.lr_scheduler`, such as `StepLR`, or a dotted path.
        optimizer: Whose learning rate it changes.
        args: Arguments of the class.

    Raises:
        ValueError: If there is no such class, or it refuses an argument.
    """
    cls = _find(name, "torch.optim.lr_scheduler", LRScheduler, "scheduler")
    return _built("scheduler", name, cls, optimizer, args)


def needs_metric(scheduler: LRScheduler) -> bool:
    """Whether `scheduler.step` wants the watched loss."""
    return isinstance(scheduler, ReduceLROnPlateau)


def _find(name: str, module: str, base: type, setting: str) -> type:
    found = importlib.import_module(module)
    if "." in name:
        module, _, last = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), last)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{setting}={name!r} cannot be imported: {error}") from error
    else:
        cls = getattr(found, name, None)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        classes = [key for key, value in vars(found).items() if _concrete(value, base)]
        near = difflib.get_close_matches(name, classes, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{setting}={name!r} is none of {module}; {hint}known: {', '.join(classes)}"
        )
    return cls


def _concrete(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _built(setting: str, name: str, cls: type, first: Any, args: dict[str, Any]) -> Any:
    for key, value in args.items():
        if value != value:  # torch lets it through
            raise ValueError(f"{setting}_args must hold no NaN; got {key}={value!r}")
    try:
        return cls(first, **args)
    except (TypeError, ValueError) as error:
        accepted = ", ".join(list(inspect.signature(cls).parameters)[1:])
        raise ValueError(
            f"{setting}={name!r} cannot take {args}: {error}; it accepts {accepted}"
        ) from error
