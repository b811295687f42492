"""The one comparison of printed numbers with ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lightning_gd.notebooks.golden import Entry


class Close(NamedTuple):
    """Ours with an expectation or a tolerance of its own, instead of the entry's.

    Attributes:
        value: Our number, or a list of them; for a statement, whether it holds.
        expected: What it should be; None: what the notebook prints under this name.
        rel: Largest difference, relative to what is expected.
        abs: Largest difference, absolute, added to the relative one.
    """

    value: Any
    expected: Any = None
    rel: float = 0.0
    abs: float = 0.0


class Band(NamedTuple):
    """Ours, which varies with the random start, and where it must lie, such as `4.33–5.25`.

    The ends were rounded, and sums in float32 differ between processors: one unit of the last
    digit more is allowed on either side.
    """

    value: float
    band: str


class Law(NamedTuple):
    """Ours as a formula, written as the notebook's, and the curve that must follow it."""

    formula: str
    measured: Any
    predicted: Any
    rel: float = 0.0
    abs: float = 0.0


@dataclass(frozen=True)
class Quantity:
    """One name of an entry, compared.

    Attributes:
        name: As in the entry.
        printed: What the notebook prints.
        ours: What we found, with as many digits.
        difference: The largest, absolute; 0 where every printed digit is the same.
        agrees: Whether it is within the tolerance.
    """

    name: str
    printed: str
    ours: str
    difference: float
    agrees: bool


def compare(entry: Entry, ours: dict[str, Any]) -> list[Quantity]:
    """Compare all that the entry prints, and what ours expects beyond it.

    A name that only one side has is not overlooked: what the entry prints and ours lacks differs
    (of random entries only invariants are asked); plain extra numbers of ours are for the lesson.
    """
    printed = entry.outputs or {}
    tolerance = entry.tolerance or {}
    rel = tolerance.get("rel", tolerance.get("fallback_rel", 0.0))
    abs_ = tolerance.get("abs", tolerance.get("fallback_abs", 0.0))
    found = [
        _quantity(name, printed.get(name), value, rel, abs_)
        for name, value in ours.items()
        if name in printed or isinstance(value, (Close, Band, Law))
    ]
    if entry.kind == "random" and found:
        return found
    missing = printed.keys() - ours.keys()
    return found + [Quantity(n, _text(printed[n]), "–", math.inf, False) for n in missing]


def plain(value: Any) -> Any:
    """Our number without its expectation."""
    return value.value if isinstance(value, (Close, Band)) else value


def _quantity(name: str, printed: Any, ours: Any, rel: float, abs_: float) -> Quantity:
    if isinstance(ours, Band):
        return _in_band(name, ours)
    if isinstance(ours, Law):
        measured = _quantity(name, list(ours.predicted), list(ours.measured), ours.rel, ours.abs)
        agrees = ours.formula == printed and measured.agrees
        return Quantity(name, str(printed), ours.formula, measured.difference, agrees)
    if isinstance(ours, Close):
        printed = printed if ours.expected is None else ours.expected
        ours, rel, abs_ = ours.value, ours.rel, ours.abs
    expected, found = list(_flat(printed)), list(_flat(ours))
    if len(expected) != len(found):
        return Quantity(name, _text(printed), _text(ours), math.inf, False)
    pairs = list(zip(expected, found, strict=True))
    gaps = [_gap(a, b) for a, b in pairs]
    limits = [abs_ + rel * _size(a) for a in expected]
    agrees = all(gap <= limit for gap, limit in zip(gaps, limits, strict=True))
    shown = " ".join(_as(a, b) for a, b in pairs)
    return Quantity(name, _text(printed), shown, max(gaps), agrees)


def _in_band(name: str, ours: Band) -> Quantity:
    ends = ours.band.split("–")
    unit = 10.0 ** -_decimals(ends[0])
    shown = _as(ends[0], ours.value)
    value, low, high = float(shown), float(ends[0]), float(ends[-1])
    outside = math.inf if math.isnan(value) else max(low - value, value - high, 0.0)
    return Quantity(name, ours.band, shown, outside, outside < 1.5 * unit)


def _flat(value: Any) -> Iterator[Any]:
    """The numbers in lists, dicts and arrays, in order; printed arrays number by number."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str) and value.startswith("["):
        value = value.strip("[]").split()
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _gap(printed: Any, ours: Any) -> float:
    """|printed − ours|, ours rounded as it was printed; a statement that does not hold is inf."""
    if isinstance(printed, bool) or _is_words(printed):
        return 0.0 if ours is True or ours == printed else math.inf
    ours = float(_as(printed, ours)) if isinstance(printed, str) else float(ours)
    gap = abs(float(printed) - ours)
    return math.inf if math.isnan(gap) else gap


def _size(printed: Any) -> float:
    return 0.0 if isinstance(printed, bool) or _is_words(printed) else abs(float(printed))


def _is_words(printed: Any) -> bool:
    """Whether this is a statement, of which ours says whether it holds, and not digits."""
    if not isinstance(printed, str):
        return False
    try:
        float(printed)
    except ValueError:
        return True
    return False


def _decimals(digits: str) -> int:
    return len(digits.partition(".")[2])


def _as(printed: Any, ours: Any) -> str:
    """Our number with the digits of the printed one."""
    if isinstance(ours, bool) or isinstance(printed, bool) or _is_words(printed):
        return "holds" if ours is True or ours == printed else f"does not hold: {ours}"
    if isinstance(printed, int):
        return f"{ours:g}"
    if printed == 0:
        return f"{ours:.3g}"
    mantissa, exponent, _ = str(printed).partition("e")
    return f"{ours:.{_decimals(mantissa)}{exponent or 'f'}}"


def _text(value: Any) -> str:
    return " ".join(str(number) for number in _flat(value))
