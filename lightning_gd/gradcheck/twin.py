"""Copies of modules and batches in another dtype."""

import copy
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_gd.batch import tensors
from lightning_gd.gradcheck.rebinding import PLAIN, Rebinding, is_helper

SILENT = ("log", "log_dict", "print")  # methods of a copy that do nothing
FRAME = vars(LightningModule()).keys() - {"training"}  # attributes of every module
MOST_COPIED = 10_000  # entries of an attribute; what has more is data
COMPRESSED = (torch.sparse_csr, torch.sparse_csc)  # layouts that deepcopy does not copy


class Attributes:
    """What modules keep beside parameters and buffers: counters, hidden states, metrics.

    Those of torch.nn keep nothing that a call changes. A helper object stays the same object, since
    a hook may refer to it.
    """

    def __init__(self, model: nn.Module) -> None:
        ours = "torch.nn.modules."
        modules = [m for m in model.modules() if not type(m).__module__.startswith(ours)]
        helpers = helpers_of(model)
        self._modules: list[Any] = [*modules, *helpers]
        shared = [*model.modules(), *model.parameters(), *model.buffers(), *helpers]
        shared.append(trainer_of(model))
        self._memo: dict[int, Any] = {id(value): value for value in shared} | data_of(model)
        present = list(map(own_attributes, self._modules))
        self._plain = list(map(plain_attributes, self._modules))
        rest = [{n: a[n] for n in a.keys() - p} for a, p in zip(present, self._plain, strict=True)]
        self._kept = copy.deepcopy(rest, dict(self._memo))

    def restore(self) -> None:
        """Give the modules what they had at first."""
        kept = copy.deepcopy(self._kept, dict(self._memo)) if any(self._kept) else self._kept
        for module, plain, values in zip(self._modules, self._plain, kept, strict=True):
            for name in own_attributes(module).keys() - plain.keys() - values.keys():
                delattr(module, name)
            vars(module).update(plain, **values)


def helpers_of(model: nn.Module) -> list[Any]:
    """Return the objects among the attributes of modules that hold values for them."""
    values = (value for module in model.modules() for value in own_attributes(module).values())
    return list({id(value): value for value in values if is_helper(value)}.values())


def own_attributes(module: Any) -> dict[str, Any]:
    """Return the attributes of a module that are no parameters, buffers, modules or hooks."""
    return {name: value for name, value in vars(module).items() if name not in FRAME}


def plain_attributes(module: Any) -> dict[str, Any]:
    """Return those of them that nothing can change in place."""
    return {name: v for name, v in own_attributes(module).items() if type(v) in PLAIN}


def data_of(model: nn.Module) -> dict[int, Any]:
    """Return the data among the attributes, which are not copied, by their id."""
    values = [value for module in model.modules() for value in own_attributes(module).values()]
    kept = [value for value in values if isinstance(value, (Dataset, DataLoader))]
    kept += [v for v in values if isinstance(v, (list, tuple, dict, set)) and len(v) > MOST_COPIED]
    kept += [tensor for value in values for tensor in tensors(value) if tensor.layout in COMPRESSED]
    return {id(value): value for value in kept}


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of a module, in another dtype if one is given; it logs nothing."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError(
            "modules of torch.jit cannot be copied: check them before they are scripted"
        )
    trainer = trainer_of(model)
    memo = {id(trainer): trainer, **data_of(model)}  # which attributes may lead to
    try:
        copied = _copied(model, memo)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied to check it: {error}") from error
    if any(p.device.type == "mps" for p in model.parameters()) and dtype is torch.float64:
        copied = copied.to("cpu")
    copied = copied.to(dtype)
    for module in copied.modules():
        for name, value in own_attributes(module).items():
            if any(not isinstance(t, nn.Parameter) for t in tensors(value)):
                vars(module)[name] = converted(value, dtype)
    for name in SILENT if isinstance(copied, LightningModule) else ():
        setattr(copied, name, lambda *args, **kwargs: None)
    if trainer is not None:
        for name in ("forward", "training_step"):  # compiled ones belong to the model
            vars(copied).pop(name, None)
        copied.trainer = trainer
    return copied


class Copier:
    """Copies a module as `twin` does, and keeps the copy for the next time.

    It is kept if all attributes are plain but those of a run; it is in one dtype at a time.

    Args:
        records: Names of attributes on which the loss does not depend.
    """

    def __init__(self, records: Collection[str]) -> None:
        self._records, self._kept = set(records), None

    def __call__(self, model: nn.Module, dtype: torch.dtype | None) -> Any:
        """Return a copy of the module as it is now."""
        plain = list(map(plain_attributes, model.modules()))
        pairs = zip(model.modules(), plain, strict=True)
        others = set().union(*(own_attributes(m).keys() - p for m, p in pairs)) - self._records
        on_mps = any(p.device.type == "mps" for p in model.parameters())
        if others or on_mps or self._kept is None:
            self._kept = twin(model, dtype)
            return self._kept
        copied, self._kept = self._kept.to(dtype), None
        theirs = [*model.parameters(), *model.buffers()]
        for own, other in zip([*copied.parameters(), *copied.buffers()], theirs, strict=True):
            own.data = other.detach().to(own if dtype else other, copy=True)
            own.requires_grad_(other.requires_grad)
        for own, attributes in zip(copied.modules(), plain, strict=True):
            vars(own).update(attributes)
        if isinstance(model, LightningModule):
            copied.hparams.update(model.hparams)
        self._kept = copied
        return copied


def _copied(model: nn.Module, memo: dict[int, Any]) -> Any:
    made = dict(memo)
    try:
        copied = copy.deepcopy(model, made)
    except RuntimeError:  # results that a module keeps cannot be copied with their graph
        holders = [*model.modules(), *helpers_of(model)]
        kept = (t for holder in holders for t in tensors(own_attributes(holder)))
        made = memo | {id(t): t.detach().clone() for t in kept if not t.is_leaf}
        copied = copy.deepcopy(model, made)
    rebinding = Rebinding(made)
    for module in copied.modules():
        rebinding.rebind(module)
    return copied


def trainer_of(model: nn.Module) -> Any:
    """Return the Trainer of a LightningModule; None without one."""
    try:
        return model.trainer if isinstance(model, LightningModule) else None
    except RuntimeError:
        return None


def converted(batch: Any, dtype: torch.dtype | None) -> Any:
    """Return a copy of a batch with its floating tensors in a dtype; labels keep theirs.

    Of an object of another class its attributes are copied.
    """

    def copied(values: Tensor) -> Tensor:
        values = values.detach().clone()
        if dtype is None:
            return values
        if dtype is torch.float64 and values.device.type == "mps":
            values = values.cpu()
        return values.to(dtype) if values.is_floating_point() else values

    known = isinstance(batch, (Tensor, tuple, list, Mapping))
    if hasattr(batch, "to") and hasattr(batch, "__dict__") and not known:
        other = copy.copy(batch)
        vars(other).update({name: converted(value, dtype) for name, value in vars(batch).items()})
        return other
    return apply_to_collection(batch, Tensor, copied, allow_frozen=True)


def shaken(content: Any, eps: float, source: torch.Generator) -> Any:
    """Change every floating number by a relative random error, and all of a tensor by another."""

    def shake(values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values
        # In float32, which torch draws several times faster.
        draw = partial(torch.randn, generator=source, dtype=torch.float32)
        return values * (1 + eps * (draw(values.shape) + draw(())).to(values))

    return apply_to_collection(content, Tensor, shake, allow_frozen=True)


def shaken_batch(batch: Any, eps: float, source: torch.Generator) -> Any:
    """Shake a batch but its whole numbers: they have no rounding, and may be labels or counts."""

    def shake(values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values
        return torch.where(values == values.round(), values, shaken(values, eps, source))

    return apply_to_collection(batch, Tensor, shake, allow_frozen=True)


def same(now: Tensor, before: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers; nan is the same as nan."""
    if torch.equal(now, before):
        return True
    nan = (now != now) & (before != before)
    return bool(((now == before) | nan).all())
