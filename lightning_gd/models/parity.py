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

    The formulas are those of `LinearRegression`. A digit is called odd where ŷ > 0.

    Args:
        num_features: Number of pixels.
        **kwargs: Those of `LinearRegression` and `GradientDescentModule`.
    """

    def __init__(self, num_features: int = 784, **kwargs) -> None:
        super().__init__(num_features=num_features, **kwargs)

    def metrics(self) -> dict[str, Metric]:
        """Those of the regression, and of the decision ŷ > 0 with odd as the positive class."""
        return {**super().metrics(), **decision_metrics()}

    @classmethod
    def example_batch(cls) -> tuple["LinearRegression", Tensor, Tensor]:
        model, x, y = super().example_batch()
        return model, x, y.sign()
