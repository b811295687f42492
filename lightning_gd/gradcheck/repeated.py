"""Later checks of a formula that differences of the loss found right."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_gd.gradcheck.bench import Bench, Loss
from lightning_gd.gradcheck.comparison import Comparison
from lightning_gd.gradcheck.randomness import RandomState
from lightning_gd.gradcheck.report import GradientReport
from lightning_gd.gradcheck.twin import eager, own_attributes, plain_attributes


class Repeated:
    """Checks of a formula that was found right: where it equals autograd, it still is.

    The copy of the model is kept from one check to the next, unless the model has attributes that
    may change in place, such as tensors and lists: then each check makes another.

    Args:
        records: Names of attributes on which the loss does not depend.
    """

    def __init__(self, records: Collection[str]) -> None:
        self._records, self._bench = set(records), None

    def report(
        self, model: nn.Module, batch: Any, loss: Loss, state: RandomState
    ) -> GradientReport | None:
        """Compare the formula with autograd alone.

        None if they differ, or if autograd passes hand-written Functions: that proves nothing.
        """
        bench, self._bench = self._bench, None
        plain = list(map(plain_attributes, model.modules()))
        try:
            with eager(torch.float64):
                if bench is None or not self._are_all(plain, model):
                    bench = Bench(model, batch, loss, state, fresh=False)
                else:
                    bench.take(model, batch, state, plain)
                found = Comparison(bench, explicit=True).brief_report()
        except Exception:  # the check by differences says what it is
            return None
        self._bench = bench
        return found

    def _are_all(self, plain: list[dict[str, Any]], model: nn.Module) -> bool:
        pairs = zip(model.modules(), plain, strict=True)
        return not set().union(*(own_attributes(m).keys() - p for m, p in pairs)) - self._records
