"""Copies of modules and batches in another dtype, and the state that a call of them depends on."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_gd.batch import tensors

SILENT = ("log", "log_dict", "print")  # methods of a copy that do nothing
FRAME = vars(LightningModule()).keys() - {"training"}  # attributes of every module
PLAIN = (bool, int, float, str, type(None))


class RandomState(NamedTuple):
    """The state of every generator that a training step may draw from."""

    torch: list[Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> "RandomState":
        """Return the present state."""
        return cls(torch_states(), random.getstate(), np.random.get_state())

    @classmethod
    def seeded(cls, seed: int) -> "RandomState":
        """Return torch's state after a seed; Python's and NumPy's are the same for every seed."""
        gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        torch_ones = (torch.Generator(device).manual_seed(seed) for device in ("cpu", *gpus))
        return cls([generator.get_state() for generator in torch_ones], *_FIRST)

    def restore(self) -> None:
        """Continue from this state."""
        torch.set_rng_state(self.torch[0])
        torch.cuda.set_rng_state_all(self.torch[1:])
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def is_present(self) -> bool:
        """Tell whether no number was drawn since."""
        now = RandomState.now()
        same = all(map(torch.equal, now.torch, self.torch)) and now.python == self.python
        return same and all(map(np.array_equal, now.numpy, self.numpy))


_FIRST = random.Random(0).getstate(), np.random.RandomState(0).get_state()


class Attributes:
    """What modules keep beside parameters and buffers: counters, hidden states, metrics."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        shared = [*self._modules, *model.parameters(), *model.buffers(), trainer_of(model)]
        self._memo: dict[int, Any] = {id(value): value for value in shared}
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


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are no parameters, buffers, modules or hooks."""
    return {name: value for name, value in vars(module).items() if name not in FRAME}


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return those of them that nothing can change in place."""
    return {name: v for name, v in own_attributes(module).items() if type(v) in PLAIN}


def torch_states() -> list[Tensor]:
    """Return the states of torch's generators, of the CPU and of GPUs in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus]


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of a module in another dtype; what it logs is not logged."""
    trainer = trainer_of(model)
    memo: dict[int, Any] = {id(trainer): trainer}  # which an attribute may lead to
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


def _copied(model: nn.Module, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(model, dict(memo))
    except RuntimeError:  # results that a module keeps cannot be copied with their graph
        kept = (t for module in model.modules() for t in tensors(own_attributes(module)))
        cut = {id(t): t.detach().clone() for t in kept if not t.is_leaf}
        return copy.deepcopy(model, memo | cut)


def trainer_of(model: nn.Module) -> Any:
    """Return the Trainer of a LightningModule; None without one."""
    try:
        return model.trainer if isinstance(model, LightningModule) else None
    except RuntimeError:
        return None


def converted(batch: Any, dtype: torch.dtype | None) -> Any:
    """Return a copy of a batch with its floating tensors in a dtype; labels keep theirs."""

    def copied(values: Tensor) -> Tensor:
        values = values.detach().clone()
        if dtype is torch.float64 and values.device.type == "mps":
            values = values.cpu()
        return values.to(dtype) if values.is_floating_point() else values

    return apply_to_collection(batch, Tensor, copied)


def shaken(content: Any, eps: float, source: torch.Generator) -> Any:
    """Change every floating number by a relative random error, and all of a tensor by another."""

    def shake(values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values
        # In float32, which torch draws several times faster.
        draw = partial(torch.randn, generator=source, dtype=torch.float32)
        return values * (1 + eps * (draw(values.shape) + draw(())).to(values))

    return apply_to_collection(content, Tensor, shake)


def same(now: Tensor, before: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers; nan is the same as nan."""
    if torch.equal(now, before):
        return True
    nan = (now != now) & (before != before)
    return bool(((now == before) | nan).all())


@contextmanager
def same_randomness() -> Iterator[None]:
    """Leave the random state after a `with` block as it was before."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def eager(dtype: torch.dtype) -> Iterator[None]:
    """Let autograd work inside a `with` block, without autocast and compilation.

    New tensors are of that dtype, as Lightning has it in each precision.
    """
    usual = torch.get_default_dtype()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)
