"""What the checks of a fit found, counted by parameter."""

from collections.abc import Sequence

from lightning_gd.gradcheck.report import GradientReport


class Tally:
    """Counts of the checks of one fit.

    Attributes:
        checks: Checks that were made.
        tested: By parameter, the checks that found its gradient above rounding.
        wrong: By parameter, the checks that found a mistake in it.
        skipped: Updates that were due and had no finite loss.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count from 0."""
        self.checks = self.skipped = 0
        self.tested: dict[str, int] = {}
        self.wrong: dict[str, int] = {}

    def count(self, reports: Sequence[GradientReport], wrong: bool) -> dict[str, float]:
        """Add a check on all processes, and return the largest relative error by parameter."""
        self.checks += 1
        all_of_them = [p for report in reports for p in report.parameters]
        named = [p.name for p in all_of_them if p.diagnosis]
        if wrong and not named:
            failed = any(report.failure for report in reports)
            named = ["nothing was compared" if failed else "on another process"]
        for name in dict.fromkeys(named):
            self.wrong[name] = self.wrong.get(name, 0) + 1
        missed = {p.name for p in all_of_them if not p.tested}
        errors: dict[str, float] = {}
        for p in all_of_them:
            errors[p.name] = max(p.relative_error, errors.get(p.name, 0.0))
        for name in errors:
            self.tested[name] = self.tested.get(name, 0) + (name not in missed)
        return errors

    def summary(self) -> str:
        """Return one line on the whole fit: how many checks, and what they could not test."""
        skipped = f", {self.skipped} without a finite loss" if self.skipped else ""
        if not self.checks:
            return f"nothing was checked{skipped}"
        missed = ", ".join(name for name, times in self.tested.items() if not times)
        names = (f"{name} ({times} of {self.checks})" for name, times in self.wrong.items())
        wrong = ", ".join(names)
        found = [f"WRONG: {wrong}"] * bool(wrong) + [f"not tested: {missed}"] * bool(missed)
        checks = "1 check" if self.checks == 1 else f"{self.checks} checks"
        return f"{checks}{skipped}, {'; '.join(found) or 'all parameters tested'}"
