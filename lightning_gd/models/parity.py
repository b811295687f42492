"""Odd or even: the linear regressor of the notebooks as a classifier of digits."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision, BinaryRecall
from torchmetrics.wrappers import LambdaInputTransformer

from lightning_gd.models.linear import LinearRegression


def decision_metrics() -> dict[str, Metric]:
    """Metrics of the decision "odd where ŷ > 0", with odd (+1) as the positive class.

    `majority_accuracy` is that of always predicting the majority class: max(p, 1 − p), where p is
    the accuracy of always predicting odd.
    """
    metrics = {
        "accuracy": LambdaInputTransformer(BinaryAccuracy(), _odd, _odd),
        "precision": LambdaInputTransformer(BinaryPrecision(), _odd, _odd),
        "recall": LambdaInputTransformer(BinaryRecall(), _odd, _odd),
    }
    always_odd = LambdaInputTransformer(BinaryAccuracy(), torch.ones_like, _odd)
    return {**metrics, "majority_accuracy": abs(always_odd - 0.5) + 0.5}


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
