"""Functions that a module keeps, for its copy: what they refer to is that of the copy."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

MOST_SEARCHED = 10_000  # entries of a list or dict; what has more is data
KEPT = (nn.Module, Tensor, Generator, Dataset, DataLoader, ModuleType, type)  # not looked into


def rebind(module: nn.Module, made: dict[int, Any]) -> None:
    """Let the functions among the attributes of a copied module refer to other copies.

    `copy.deepcopy` copies no function: a lambda over `self` would call the original.

    Args:
        module: The copy.
        made: What was copied, by the id of the original; the copies of functions are added.
    """
    found = {name: rebound(value, made) for name, value in vars(module).items()}
    vars(module).update(found)


def rebound(value: Any, made: dict[int, Any]) -> Any:
    """Return a value in which what was copied is replaced by its copy; itself if nothing is."""
    if id(value) in made or isinstance(value, KEPT):
        return made.get(id(value), value)
    if isinstance(value, FunctionType):
        return _function(value, made)
    if isinstance(value, MethodType):
        return MethodType(rebound(value.__func__, made), rebound(value.__self__, made))
    if isinstance(value, partial):
        function, args, named = rebound([value.func, value.args, value.keywords], made)
        return partial(function, *args, **named)
    if isinstance(value, tuple):
        new = [rebound(entry, made) for entry in value]
        if all(map(is_, value, new)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else tuple(new)
    is_library = type(value).__module__.partition(".")[0] in ("torch", "lightning", "builtins")
    if isinstance(value, (list, dict)) or hasattr(value, "__dict__") and not is_library:
        return _holder(value, made)
    return value


def _function(function: FunctionType, made: dict[int, Any]) -> FunctionType:
    old = function.__closure__ or ()
    cells = [CellType() for _ in old]  # filled below, since a function may refer to itself
    form = function.__code__, function.__globals__, function.__name__, None, tuple(cells)
    other = made[id(function)] = FunctionType(*form)
    for cell, new in zip(old, cells, strict=True):
        with suppress(ValueError):  # empty so far
            new.cell_contents = rebound(cell.cell_contents, made)
    other.__defaults__ = rebound(function.__defaults__, made)
    other.__kwdefaults__ = rebound(function.__kwdefaults__, made)
    vars(other).update(vars(function))
    parts = (_parts_of(f) for f in (function, other))
    if all(a is b for a, b in zip(*parts, strict=True)):
        made[id(function)] = function
    return made[id(function)]


def _parts_of(function: FunctionType) -> Iterator[Any]:
    """Yield what a function refers to; an empty cell stands for itself."""
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents


def _holder(value: Any, made: dict[int, Any]) -> Any:
    """Return a list, a dict or an object with attributes, or a copy of it with other entries."""
    made[id(value)] = value  # while it is looked into: it may lead to itself
    if isinstance(value, (list, dict)):
        entries: Any = dict(enumerate(value)) if isinstance(value, list) else value
    else:
        entries = vars(value)
    if len(entries) > MOST_SEARCHED:
        return value
    changed = {key: new for key, old in entries.items() if (new := rebound(old, made)) is not old}
    if changed:
        other = made[id(value)] = copy.copy(value)
        target: Any = other if isinstance(value, (list, dict)) else vars(other)
        for key, entry in changed.items():
            target[key] = entry
    return made[id(value)]
