"""The comparison of printed numbers with ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lessons.entries import Entry


class Close(NamedTuple):
    """Our value with an expectation or a tolerance of its own, instead of the entry's.

    Attributes:
        value: A number or a list of them; for a statement, whether it holds.
        expected: What it should be; None: what the notebook prints under this name.
        rel: Largest difference, relative to what is expected.
        abs: Largest difference, absolute, added to the relative one.
        formula: Ours, where the notebook prints a formula: it must be written as printed, and
            `value`, the measured curve, must follow `expected`, the predicted one.
    """

    value: Any
    expected: Any = None
    rel: float = 0.0
    abs: float = 0.0
    formula: str | None = None


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

    A printed name that ours lacks differs, except in random entries, of which only invariants
    are compared. Plain extra numbers of ours are for the lesson.
    """
    tolerance = entry.tolerance or {}
    rel = tolerance.get("rel", tolerance.get("fallback_rel", 0.0))
    abs_ = tolerance.get("abs", tolerance.get("fallback_abs", 0.0))
    banded = {n: _in_band(ours[n], ends) for n, ends in entry.bands.items() if n in ours}
    found = [
        _quantity(name, entry.printed.get(name), value, rel, abs_)
        for name, value in {**ours, **banded}.items()
        if name in entry.printed or isinstance(value, Close)
    ]
    if entry.kind == "random" and found:
        return found
    missing = {name: value for name, value in entry.printed.items() if name not in ours}
    return found + [Quantity(n, _text(v), "–", math.inf, False) for n, v in missing.items()]


def plain(value: Any) -> Any:
    """Return our value without its expectation."""
    return value.value if isinstance(value, Close) else value


def _in_band(value: float, ends: str) -> Close:
    """Allow one unit of the last digit more, as float32 sums differ between processors."""
    return Close(value, ends, abs=1.5 * 10.0 ** -_decimals(ends.split("–")[0]))


def _quantity(name: str, printed: Any, ours: Any, rel: float, abs_: float) -> Quantity:
    if isinstance(ours, Close) and ours.formula is not None:
        curve = _quantity(name, printed, ours._replace(formula=None), rel, abs_)
        agrees = ours.formula == printed and curve.agrees
        return Quantity(name, str(printed), ours.formula, curve.difference, agrees)
    if isinstance(ours, Close):
        printed = printed if ours.expected is None else ours.expected
        ours, rel, abs_ = ours.value, ours.rel, ours.abs
    expected, found = list(_flat(printed)), list(_flat(ours))
    if len(expected) != len(found):
        return Quantity(name, _text(printed), _text(ours), math.inf, False)
    pairs = list(zip(expected, found, strict=True))
    gaps = [_gap(a, b) for a, b in pairs]
    agrees = all(g <= abs_ + rel * _size(a) for g, a in zip(gaps, expected, strict=True))
    shown = " ".join(_as(a, b) for a, b in pairs)
    return Quantity(name, _text(printed), shown, max(gaps), agrees)


def _flat(value: Any) -> Iterator[Any]:
    """Yield the numbers in lists, dicts, arrays and printed arrays, in order."""
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


def _ends(printed: Any) -> list[float]:
    """Return a printed number, or the ends of a band, as floats; empty for a statement."""
    if isinstance(printed, bool):
        return []
    try:
        return [float(end) for end in printed.split("–")]
    except AttributeError:
        return [float(printed)]
    except ValueError:
        return []


def _gap(printed: Any, ours: Any) -> float:
    """Return |printed − ours|, ours rounded as printed; infinite for a statement that is false."""
    ends = _ends(printed)
    if not ends:
        return 0.0 if ours is True or ours == printed else math.inf
    ours = float(_as(printed, ours)) if isinstance(printed, str) else float(ours)
    return math.inf if math.isnan(ours) else max(ends[0] - ours, ours - ends[-1], 0.0)


def _size(printed: Any) -> float:
    return abs(next(iter(_ends(printed)), 0.0))


def _decimals(digits: str) -> int:
    return len(digits.partition(".")[2])


def _as(printed: Any, ours: Any) -> str:
    """Format our number with the digits of the printed one."""
    if isinstance(ours, bool) or not _ends(printed):
        return "holds" if ours is True or ours == printed else f"does not hold: {ours}"
    if isinstance(printed, int):
        return f"{ours:g}"
    if printed == 0:
        return f"{ours:.3g}"
    mantissa, exponent, _ = str(printed).split("–")[0].partition("e")
    return f"{ours:.{_decimals(mantissa)}{exponent or 'f'}}"


def _text(value: Any) -> str:
    return " ".join(str(number) for number in _flat(value))
