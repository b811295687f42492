"""What a gradient check found, as numbers, as text and as an exception."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_SHOWN = 20  # lines of parameters that are right


class GradientError(ValueError):
    """A gradient is not that of the loss, or could not be compared with it."""


class NoLoss(ValueError):
    """Raised if a model has no finite loss, or if the reference has another value.

    Attributes:
        is_mistake: True if the reference differs; False for a missing or non-finite loss.
    """

    def __init__(self, text: str, is_mistake: bool = False) -> None:
        super().__init__(text)
        self.is_mistake = is_mistake


@dataclass(frozen=True)
class ParameterReport:
    """The check of one parameter."""

    name: str
    # |actual − expected| and |expected|: of p.grad the largest entry, of a Function's gradient in
    # short numbers the 2-norm, else the slopes along one direction and the 2-norm of the gradient.
    error: float = math.nan  # nan: nothing was compared
    size: float = 0.0
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
        right = "ok" if self.tested else "not tested, below rounding"
        return "WRONG" if self.diagnosis else right

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}, error {self.error:.2g} (bound {self.bound:.2g})"


@dataclass(frozen=True)
class GradientReport:
    """The check of all parameters."""

    parameters: tuple[ParameterReport, ...]
    note: str = ""  # on how it was checked
    functions: frozenset[str] = frozenset()  # custom autograd Functions that it passes through
    failure: str = ""  # why nothing was compared
    is_skipped: bool = False  # the failure is a missing or non-finite loss, not a mistake

    @property
    def ok(self) -> bool:
        """Whether no mistake was found, and all was compared."""
        return not self.failure and all(p.diagnosis is None for p in self.parameters)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return one line per parameter, and each diagnosis once with the names it holds for.

        Of more than 20 parameters only those that are wrong or not tested have their line.
        """
        if self.failure:
            return [f"nothing was compared: {self.failure}"]
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
            words = [] if self.failure else ["the gradient is not that of loss"]
            raise GradientError("\n  ".join([*words, *self.lines()]))


@dataclass(frozen=True)
class FunctionReport:
    """The check of a backward pass in all cases."""

    cases: Mapping[str, GradientReport]  # without parameters where a case is not supported
    note: str = ""  # on how it was checked

    @property
    def ok(self) -> bool:
        """Whether no mistake was found, and in some case a factor 2 would have been."""
        right = all(report.ok for report in self.cases.values())
        return right and any(p.tested for r in self.cases.values() for p in r.parameters)

    def lines(self) -> list[str]:
        """Return a table with a line per case and input, then each diagnosis once."""
        rows = [("case", "input", "error", "bound", "verdict")]
        for case, report in self.cases.items():
            for p in report.parameters:
                rows.append((case, p.name, f"{p.error:.1e}", f"{p.bound:.1e}", p.verdict))
            if not report.parameters:
                rows.append((case, "", "", "", report.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return [*lines, *self._diagnoses(), *filter(None, [self.note])]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _diagnoses(self) -> list[str]:
        """Return the first diagnosis of each input, and where it is right as given, the cases."""
        found: dict[str, dict[str, str]] = {}
        for case, report in self.cases.items():
            for p in report.parameters:
                if p.diagnosis:
                    found.setdefault(p.name, {})[case] = p.diagnosis
        lines = []
        for name, words in found.items():
            only = "" if next(iter(self.cases)) in words else f", only in: {', '.join(words)}"
            lines.append(f"{name}{only}: {next(iter(words.values()))}")
        return lines

    def raise_if_wrong(self) -> None:
        """Raise `GradientError` with the report if a gradient is wrong or nothing was tested."""
        if not self.ok:
            raise GradientError("\n  ".join(["no right backward pass was seen", *self.lines()]))
