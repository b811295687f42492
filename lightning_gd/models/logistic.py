"""Odd or even by logistic regression: the same scores, another loss."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torchmetrics import MeanSquaredError, Metric

from lightning_gd.models.parity import ParityRegressor, decision_metrics
from lightning_gd.module import Gradients


class LogisticParity(ParityRegressor):
    """784 pixels to a score ŷ = x w + b, with σ(ŷ) the probability that the digit is odd.

    With y = +1 for odd and −1 for even over N rows, and σ(t) = 1/(1 + exp(−t)):

        L = 1/N Σ log(1 + exp(−y ŷ))        d = ∂L/∂ŷ = −y/N σ(−y ŷ)
        ∂L/∂w = xᵀ d                        ∂L/∂b = Σ d

    A digit is called odd where ŷ > 0, as by `ParityRegressor`, whose settings these are too.
    """

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return -logsigmoid(y * self(x)).mean()  # no score overflows

    def gradients(self, x: Tensor, y: Tensor) -> Gradients:
        d = -y * torch.sigmoid(-y * self(x)) / len(y)
        return {"weight": d @ x, "bias": d.sum()}

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Gradients]:
        margin = y * self(x)
        d = y * torch.sigmoid(-margin) / -len(y)
        return -logsigmoid(margin).mean(), {"weight": d @ x, "bias": d.sum()}

    def metrics(self) -> dict[str, Metric]:
        return {"mse": MeanSquaredError(), **decision_metrics()}
