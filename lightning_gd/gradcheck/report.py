"""What a gradient check found, as numbers, as text and as an exception."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_SHOWN = 20  # lines of parameters that are right


class GradientError(ValueError):
    """An explicit gradient is not the gradient of the loss."""


@dataclass(frozen=True)
class ParameterReport:
    """The check of one parameter."""

    name: str
    error: float = math.nan  # largest entry of |actual − expected|; nan: nothing was compared
    size: float = 0.0  # largest entry of the expected gradient
    bound: float = math.nan  # largest error that rounding explains
    diagnosis: str | None = None  # what is wrong
    slopes: Mapping[str, float] = field(default_factory=dict)  # of the loss along a direction

    @property
    def tested(self) -> bool:
        """Whether a factor 2 or ½ would have been noticed: any multiple of zero looks right."""
        return self.size > 2 * self.bound

    @property
    def relative_error(self) -> float:
        """`error` over `size`."""
        return self.error / self.size if self.size else self.error

    @property
    def verdict(self) -> str:
        """`ok`, `WRONG`, or that nothing could be seen."""
        right = "ok" if self.tested else "not tested, it vanishes"
        return "WRONG" if self.diagnosis else right

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}, error {self.error:.2g} (bound {self.bound:.2g})"


@dataclass(frozen=True)
class GradientReport:
    """The check of all parameters."""

    parameters: tuple[ParameterReport, ...]
    note: str = ""  # on how it was checked
    functions: frozenset[str] = frozenset()  # custom autograd Functions that it passes through

    @property
    def ok(self) -> bool:
        """Whether no mistake was found."""
        return all(p.diagnosis is None for p in self.parameters)

    def lines(self) -> list[str]:
        """Return one line per parameter, and each diagnosis once with the names it holds for.

        Of more than 20 parameters only those that are wrong or not tested have their line.
        """
        shown = [p for p in self.parameters if p.diagnosis or not p.tested]
        if len(self.parameters) <= MOST_SHOWN:
            shown = list(self.parameters)
        lines = [*filter(None, [self.note]), *map(str, shown)]
        if len(shown) < len(self.parameters):
            lines.append(f"{len(self.parameters) - len(shown)} other parameters: ok")
        for words in dict.fromkeys(p.diagnosis for p in self.parameters if p.diagnosis):
            names = ", ".join(p.name for p in self.parameters if p.diagnosis == words)
            lines.append(f"{names}: {words}")
        return lines

    def raise_if_wrong(self) -> None:
        """Raise `GradientError` with the report if a gradient is wrong."""
        if not self.ok:
            raise GradientError("\n  ".join(["the gradient is not that of loss", *self.lines()]))
