"""How long a random step must be for a loss to change by a given size."""

import math
from collections.abc import Callable

LENGTHS = [2.0**power for power in range(-21, 10)]  # that are tried
GUESSES = 4  # of them that are guessed from the one before; the rest is bisection
EXPLODED = 1000  # times the change that is wanted: so far no step goes, if a shorter one may


def step_length(change_after: Callable[[float], float], wanted: float) -> float:
    """Return the shortest length after which the loss has changed by as much as is wanted.

    If it never does, return the length that gives half of its largest change. If the loss leaps or
    is not finite at a length, return the one before.

    Args:
        change_after: Function of a length that returns the absolute change of the loss.
        wanted: The change.
    """
    changes: dict[int, float] = {}  # by the lengths that were tried

    def bisect(short: int, long: int, wanted: float) -> int:
        """Return the first length that is long enough; `short` is not, `long` is."""
        guess = long // 2
        while long - short > 1:
            tried = min(max(guess, short + 1), long - 1)
            change = changes[tried] = change_after(LENGTHS[tried])
            short, long = (tried, long) if change < wanted else (short, tried)  # also nan
            guess = (short + long) // 2
            # It mostly grows as length².
            if len(changes) < GUESSES and 0 < change / wanted < math.inf:
                guess = tried - math.floor(math.log2(change / wanted) / 2)
        return long

    found = bisect(-1, len(LENGTHS), wanted)
    if found == len(LENGTHS):  # the loss is bounded, or hardly depends on the weights
        wanted = max(changes.values()) / 2 or wanted
        enough = min((k for k, change in changes.items() if change >= wanted), default=found - 1)
        short = max((tried for tried in changes if tried < enough), default=-1)
        found = bisect(short, enough, wanted)
    is_usable = found not in changes or changes[found] <= EXPLODED * wanted
    return LENGTHS[found if is_usable or not found else found - 1]
