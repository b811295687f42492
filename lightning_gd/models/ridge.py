"""Ridge regression: least squares with a price on large weights."""

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric

from lightning_gd.models.linear import LinearRegression
from lightning_gd.module import Gradients
from lightning_gd.settings import number


class RidgeRegression(LinearRegression):
    """Linear regression ŷ = x w + b with squared loss and an L2 penalty on w, not on b.

    With residuals r = x w + b − y over N rows (a mean, without ½; the penalty not over N):

        L = 1/N Σ r² + α‖w‖²        ∂L/∂w = 2/N xᵀ r + 2α w        ∂L/∂b = 2/N Σ r

    The optimum solves (xᵀx/N + αI) w = xᵀy/N for centred x and y. Where a library penalises
    the sum of r² instead of its mean, as scikit-learn's `Ridge` does, its alpha is N α.

    Args:
        alpha: The price α of ‖w‖²; 0 is least squares.
        **kwargs: Those of `LinearRegression` and `GradientDescentModule`.

    Raises:
        ValueError: If α is negative or not finite.
    """

    def __init__(self, alpha: float = 0.1, **kwargs) -> None:
        super().__init__(**kwargs)
        number("alpha", alpha, least=0)
        self.alpha = alpha

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """L = 1/N Σ r² + α‖w‖², with r = x w + b − y."""
        return (self(x) - y).square().mean() + self.alpha * self.weight.square().sum()

    def gradients(self, x: Tensor, y: Tensor) -> Gradients:
        """∂L/∂w = 2/N xᵀ r + 2α w, shape [D], and ∂L/∂b = 2/N Σ r, shape []."""
        r = self(x) - y
        return {"weight": 2 * (r @ x) / len(r) + 2 * self.alpha * self.weight, "bias": 2 * r.mean()}

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Gradients]:
        """Both from the same residuals: those of least squares, and the penalty's added."""
        loss, gradients = super().loss_and_gradients(x, y)
        gradients["weight"] += 2 * self.alpha * self.weight
        return loss + self.alpha * self.weight.dot(self.weight), gradients

    def metrics(self) -> dict[str, Metric]:
        """The mean squared error, which leaves the penalty out."""
        return {"mse": MeanSquaredError()}

    @staticmethod
    def example_batch() -> tuple["RidgeRegression", Tensor, Tensor]:
        generator = torch.Generator().manual_seed(4)
        x, y = torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)
        return RidgeRegression(alpha=0.3, num_features=3, start="linear"), x, y
