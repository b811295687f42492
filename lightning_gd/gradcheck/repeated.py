"""Later checks of a formula that differences of the loss found right."""

from typing import Any

import torch
from torch import nn

from lightning_gd.gradcheck.bench import Bench, Loss
from lightning_gd.gradcheck.comparison import Comparison
from lightning_gd.gradcheck.report import GradientReport
from lightning_gd.gradcheck.twin import RandomState, eager


class Repeated:
    """Checks of a formula that was found right, on a copy of the model that is kept.

    A formula that equals autograd through plain operations is right; differences are not needed.
    """

    def __init__(self) -> None:
        self._bench: Bench | None = None

    def report(
        self, model: nn.Module, batch: Any, loss: Loss, state: RandomState
    ) -> GradientReport | None:
        """Compare the formula with autograd alone; None where that does not tell it right."""
        try:
            with eager(torch.float64):
                if self._bench is None:
                    self._bench = Bench(model, batch, loss, state, fresh=False)
                    self._bench.measure(self._bench.start)  # learns whether the loss draws numbers
                self._bench.take(model, batch, state)
                return Comparison(self._bench, explicit=True).brief_report()
        except Exception:  # the check by differences says what it is
            return None
