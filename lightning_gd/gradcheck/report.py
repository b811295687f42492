"""What a gradient check found: errors, bounds and diagnoses, for people and for `raise`."""

import math
from dataclasses import dataclass


class GradientError(ValueError):
    """An explicit gradient is not the gradient of the loss."""


@dataclass(frozen=True)
class ParameterReport:
    """The check of one parameter; errors are the largest over its entries.

    Attributes:
        name: As in `named_parameters()`.
        error: |explicit − autograd|, nan where there was nothing to compare.
        relative_error: The same over the largest entry by autograd.
        bound: Largest `error` that rounding explains.
        difference_error: |explicit − finite difference| where it is largest beside its bound.
        difference_relative_error: The same over the size of the finite difference.
        difference_bound: Largest `difference_error` that rounding and truncation explain.
        ok: Whether the gradient is right.
        diagnosis: What is wrong with it, None if nothing is.
    """

    name: str
    error: float = math.nan
    relative_error: float = math.nan
    bound: float = math.nan
    difference_error: float = math.nan
    difference_relative_error: float = math.nan
    difference_bound: float = math.nan
    ok: bool = False
    diagnosis: str | None = None

    def __str__(self) -> str:
        """One line: verdict, errors, bounds."""
        verdict = "ok" if self.ok else "WRONG"
        line = f"{self.name}: {verdict}, error {self.error:.2g} (bound {self.bound:.2g})"
        if math.isnan(self.difference_error):
            return line
        bound = f"(bound {self.difference_bound:.2g})"
        return f"{line}, by finite differences {self.difference_error:.2g} {bound}"


@dataclass(frozen=True)
class GradientReport:
    """The check of all parameters."""

    parameters: tuple[ParameterReport, ...]

    @property
    def ok(self) -> bool:
        """Whether every gradient is right."""
        return all(p.ok for p in self.parameters)

    def lines(self) -> list[str]:
        """A line per parameter, then each diagnosis once with the names that it holds for."""
        shared: dict[str, list[str]] = {}
        for p in self.parameters:
            if p.diagnosis:
                shared.setdefault(p.diagnosis, []).append(p.name)
        causes = [f"{', '.join(names)}: {words}" for words, names in shared.items()]
        return [str(p) for p in self.parameters] + causes

    def raise_if_wrong(self) -> None:
        """Raises `GradientError` with the wrong parameters, their errors, bounds and diagnoses."""
        if not self.ok:
            right = {str(p) for p in self.parameters if p.ok}
            lines = [line for line in self.lines() if line not in right]
            raise GradientError("\n  ".join(["the gradient is not that of loss", *lines]))
