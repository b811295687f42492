"""Odd or even: the linear regressor of the notebooks as a classifier of digits."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision, BinaryRecall
from torchmetrics.wrappers import LambdaInputTransformer

from lightning_gd.models.linear import LinearRegression


class MajorityAccuracy(Metric):
    """Accuracy of always predicting the majority class, which a classifier must beat."""

    odd: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("odd", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count the classes of `target`, +1 or −1; the prediction does not matter."""
        self.odd += (target > 0).sum()
        self.total += len(target)

    def compute(self) -> Tensor:
        """max(odd, even) / all."""
        return torch.maximum(self.odd, self.total - self.odd) / self.total


def decision_metrics() -> dict[str, Metric]:
    """Metrics of the decision "odd where ŷ > 0", with odd (+1) as the positive class."""
    metrics = {
        "accuracy": BinaryAccuracy(),
        "precision": BinaryPrecision(),
        "recall": BinaryRecall(),
    }
    decided = {name: LambdaInputTransformer(m, _odd, _odd) for name, m in metrics.items()}
    return {**decided, "majority_accuracy": MajorityAccuracy()}


def _odd(score: Tensor) -> Tensor:
    return (score > 0).long()


class ParityRegressor(LinearRegression):
    """784 pixels to one number, regressed on +1 for odd digits and −1 for even ones.

    The formulas are those of `LinearRegression`: L = 1/N Σ r², ∂L/∂w = 2/N xᵀ r and
    ∂L/∂b = 2/N Σ r with r = x w + b − y. A digit is called odd where ŷ > 0.

    Args:
        num_features: Number of pixels.
        **kwargs: Those of `LinearRegression` and `GradientDescentModule`.
    """

    def __init__(self, num_features: int = 784, **kwargs) -> None:
        super().__init__(num_features=num_features, **kwargs)

    def metrics(self) -> dict[str, Metric]:
        """Those of the regression, and of the decision ŷ > 0 with odd as the positive class."""
        return {**super().metrics(), **decision_metrics()}

    @staticmethod
    def example_batch() -> tuple["ParityRegressor", Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        x, y = torch.rand(6, 16, generator=generator), torch.tensor([1.0, -1, 1, 1, -1, -1])
        return ParityRegressor(num_features=16, start="uniform"), x, y
