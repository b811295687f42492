"""Copies of the functions that a module keeps, which refer to the copied module."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

MOST_SEARCHED, DEEPEST = 1_000, 50  # values looked into per module; how deep
PLAIN = (bool, int, float, str, type(None))
KEPT = (*PLAIN, nn.Module, Tensor, Generator, Dataset, DataLoader, ModuleType, type)
LIBRARIES = ("torch", "lightning", "builtins", "functools")
OWN_COPIES = ("__reduce__", "__reduce_ex__", "__getstate__", "__copy__", "__deepcopy__")


class Rebinding:
    """Lets functions among the attributes of copied modules refer to the copies.

    `copy.deepcopy` copies no function: a lambda over `self` would call the original.

    Args:
        made: What was copied, by the id of the original; the copies of functions are added.
    """

    def __init__(self, made: dict[int, Any]) -> None:
        self._made, self._left = made, MOST_SEARCHED
        self._alive: list[Any] = []  # whose ids are known

    def rebind(self, module: nn.Module) -> None:
        """Replace what the attributes of a copied module still refer to."""
        self._left = MOST_SEARCHED
        for name, value in list(vars(module).items()):
            vars(module)[name] = self._found(value, True, 0)

    def _found(self, value: Any, is_copied: bool, depth: int) -> Any:
        """Return a value in which what was copied is replaced; itself if nothing is."""
        if id(value) in self._made or isinstance(value, KEPT):
            return self._made.get(id(value), value)
        self._left -= 1
        if self._left < 0 or depth > DEEPEST:
            return value
        inner = partial(self._found, is_copied=is_copied, depth=depth + 1)
        if isinstance(value, FunctionType):
            return self._function(value, depth + 1)
        if isinstance(value, MethodType):
            parts = value.__func__, value.__self__
            new = [inner(part) for part in parts]
            return value if all(map(is_, parts, new)) else MethodType(*new)
        if isinstance(value, partial):
            parts = value.func, value.args, value.keywords
            new = [inner(part) for part in parts]
            return value if all(map(is_, parts, new)) else partial(new[0], *new[1], **new[2])
        if isinstance(value, tuple):
            new = [inner(part) for part in value]
            made = type(value)(*new) if hasattr(value, "_fields") else tuple(new)
            return value if all(map(is_, value, new)) else made
        if isinstance(value, (list, dict)) or is_helper(value):
            return self._holder(value, is_copied, depth + 1)
        return value

    def _function(self, function: FunctionType, depth: int) -> FunctionType:
        old = function.__closure__ or ()
        cells = [CellType() for _ in old]  # filled below, since a function may refer to itself
        form = function.__code__, function.__globals__, function.__name__, None, tuple(cells)
        other = self._known(function, FunctionType(*form))
        for cell, new in zip(old, cells, strict=True):
            with suppress(ValueError):  # empty so far
                new.cell_contents = self._found(cell.cell_contents, False, depth)
        other.__defaults__ = self._found(function.__defaults__, False, depth)
        other.__kwdefaults__ = self._found(function.__kwdefaults__, False, depth)
        vars(other).update(vars(function))
        if all(map(is_, _parts_of(function), _parts_of(other))):
            return self._known(function, function)
        return other

    def _holder(self, value: Any, is_copied: bool, depth: int) -> Any:
        """Change a list, a dict or the attributes of an object, in place if that is a copy."""
        self._known(value, value)  # while it is looked into: it may lead to itself
        if isinstance(value, list):
            entries: Any = dict(enumerate(value))
        else:
            entries = value if isinstance(value, dict) else vars(value)
        if len(entries) > self._left:
            return value
        found = {key: self._found(entry, is_copied, depth) for key, entry in entries.items()}
        changed = {key: new for key, new in found.items() if new is not entries[key]}
        if not changed:
            return value
        try:
            other = value if is_copied else copy.copy(value)
        except Exception:  # it is then shared with the original
            return value
        target: Any = other if isinstance(value, (list, dict)) else vars(other)
        for key, entry in changed.items() if is_copied or other is not value else ():
            target[key] = entry
        return self._known(value, other)

    def _known(self, value: Any, other: Any) -> Any:
        self._alive.append(value)
        self._made[id(value)] = other
        return other


def is_helper(value: Any) -> bool:
    """Tell whether a value is an object whose attributes are all that it consists of."""
    kind = type(value)
    usual = all(getattr(kind, name, None) is getattr(object, name, None) for name in OWN_COPIES)
    known = isinstance(value, (*KEPT, FunctionType, MethodType, list, dict, tuple))
    own = kind.__module__.partition(".")[0] not in LIBRARIES
    return hasattr(value, "__dict__") and usual and own and not known


def _parts_of(function: FunctionType) -> Iterator[Any]:
    """Yield what a function refers to; an empty cell stands for itself."""
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents
