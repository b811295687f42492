"""Ridge regression: least squares with a price on large weights."""

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
    """

    def __init__(self, alpha: float = 0.1, **kwargs) -> None:
        super().__init__(**kwargs)
        number("alpha", alpha, least=0)
        self.alpha = alpha

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) + self.alpha * self.weight.square().sum()

    def gradients(self, x: Tensor, y: Tensor) -> Gradients:
        found = super().gradients(x, y)
        return {**found, "weight": found["weight"] + 2 * self.alpha * self.weight}

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Gradients]:
        loss, found = super().loss_and_gradients(x, y)
        weight = found["weight"] + 2 * self.alpha * self.weight
        return loss + self.alpha * self.weight.square().sum(), {**found, "weight": weight}

    def metrics(self) -> dict[str, Metric]:
        """The mean squared error, which leaves the penalty out."""
        return {"mse": MeanSquaredError()}
