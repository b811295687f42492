"""The columns of a table that a model is fitted on: their names, and what is too large."""

from collections import Counter
from collections.abc import Sequence
from textwrap import shorten

from lightning_gd.arguments import nearest

LARGEST = 1e150  # the squares of larger numbers overflow float64
SHOWN = 300  # characters of the names of the columns that an error shows


def choose(
    where: str,
    names: Sequence[str],
    target: str | None,
    features: Sequence[str] | None,
    setting: str = "features",
) -> list[str]:
    """Return the names of the features: all but the target where none are given.

    Raises:
        ValueError: For a column that is not there, or that is there twice, and for features that
            are no columns of their own beside the target.
    """
    if target is not None:
        check(where, [target], names)
    if "" in names and features is None:
        raise ValueError(
            f"column {list(names).index('') + 1} of {where} has no name (the index of a pandas "
            f"table?): set {setting} to the names of the others, such as '[a, b]'"
        )
    chosen = [name for name in names if name != target] if features is None else list(features)
    check(where, chosen, names)
    if not chosen or {"", target} & {*chosen} or len({*chosen}) < len(chosen):
        raise ValueError(
            f"features={chosen} must name one or more columns of {where}, each once and without "
            f"the target {target!r}: set {setting}"
        )
    return chosen


def check(where: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError for the first of the wanted columns that is not there once."""
    count = Counter(names)
    for name in wanted:
        if count[name] != 1:
            near = nearest(name, names) if name not in count else ""
            hint = f"did you mean {near!r}? " if near else ""
            is_text = not where.endswith((".parquet", ".pq", "stream"))
            hint = "is --data.separator right? " if len(names) == 1 and is_text else hint
            some = shorten(", ".join(names), SHOWN, placeholder=" …")
            what = f"{count[name] or 'no'} column{'s' * (count[name] > 1)} {name!r}"
            raise ValueError(f"{where} has {what}: {hint}its columns: {some}")
