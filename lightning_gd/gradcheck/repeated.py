"""Later checks of a formula that differences of the loss found right."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_gd.gradcheck.bench import Bench
from lightning_gd.gradcheck.comparison import Comparison
from lightning_gd.gradcheck.point import Loss
from lightning_gd.gradcheck.precision import eager
from lightning_gd.gradcheck.randomness import RandomState
from lightning_gd.gradcheck.report import GradientReport
from lightning_gd.gradcheck.twin import Copier


class Repeated:
    """Checks of a formula that was found right: where it equals autograd, it still is.

    Args:
        records: Names of attributes on which the loss does not depend.

    Attributes:
        copy: Makes the copies of the model.
    """

    def __init__(self, records: Collection[str]) -> None:
        self.copy = Copier(records)
        self._draws: bool | None = None

    def report(
        self, model: nn.Module, batch: Any, loss: Loss, state: RandomState
    ) -> GradientReport | None:
        """Compare the formula with autograd alone.

        None if they differ, or if autograd passes hand-written Functions: that proves nothing.
        """
        try:
            with eager(torch.float64):
                bench = Bench(self.copy(model, torch.float64), batch, loss, state, fresh=False)
                bench.draws = self._draws
                found = Comparison(bench, explicit=True).brief_report()
        except Exception:  # the check by differences says what it is
            return None
        self._draws = bench.draws
        return found
