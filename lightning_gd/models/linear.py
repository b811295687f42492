"""Linear regression, its loss and its two gradient formulas."""

import math
from typing import Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric

from lightning_gd.leastsquares import AutoLearningRate
from lightning_gd.module import GradientDescentModule, Gradients
from lightning_gd.moments import Moments
from lightning_gd.settings import SEEDS, number, one_of, whole_number


class LinearRegression(GradientDescentModule):
    """Linear regression ŷ = x w + b with squared loss.

    With residuals r = x w + b − y over N rows (a mean, without ½):

        L = 1/N Σ r²        ∂L/∂w = 2/N xᵀ r        ∂L/∂b = 2/N Σ r

    Args:
        num_features: Number D of features.
        bias: Whether the line has an intercept; without it b stays 0 and is not trained.
        start: `zeros`, `uniform` on [0, 1), or `linear`, the distribution of `nn.Linear`.
        weight: The D weights to start from, instead of `start`.
        intercept: The bias to start from, instead of `start`.
        start_seed: Seed of a random start.
        **kwargs: Those of `GradientDescentModule`.
    """

    def __init__(
        self,
        num_features: int = 1,
        bias: bool = True,
        start: Literal["zeros", "uniform", "linear"] = "zeros",
        weight: list[float] | None = None,
        intercept: float | None = None,
        start_seed: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        whole_number("num_features", num_features, 1)
        whole_number("start_seed", start_seed, 0, below=SEEDS)
        if weight is not None and len(weight) != num_features:
            raise ValueError(
                f"weight={weight!r} must hold num_features={num_features} numbers, one a feature"
            )
        for value in weight or ():
            number("each of weight", value)
        if intercept is not None:
            number("intercept", intercept)
            if not bias:
                raise ValueError(f"intercept={intercept!r} needs bias=True")
        first_weight, first_bias = _start(start, num_features, start_seed)
        self.weight = nn.Parameter(first_weight if weight is None else torch.tensor(weight) * 1.0)
        value = first_bias if intercept is None else torch.tensor(intercept) * 1.0
        self.bias = nn.Parameter(value if bias else value * 0, requires_grad=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Predict ŷ = x w + b, shape [N], for inputs x of shape [N, D]."""
        return torch.addmv(self.bias, x, self.weight)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) - y).square().mean()

    def gradients(self, x: Tensor, y: Tensor) -> Gradients:
        r = self(x) - y
        return {"weight": 2 * (r @ x) / len(r), "bias": 2 * r.mean()}

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Gradients]:
        r = self(x) - y
        n = len(r)
        scaled = r * (2 / n)
        return r.dot(r) / n, {"weight": scaled @ x, "bias": scaled.sum()}

    def loss_from_moments(self, moments: Moments) -> Tensor:
        return moments.loss(self.weight, self.bias)

    def loss_and_gradients_from_moments(self, moments: Moments) -> tuple[Tensor, Gradients]:
        loss, weight, bias = moments.loss_and_gradients(self.weight, self.bias)
        return loss, {"weight": weight, "bias": bias}

    def configure_callbacks(self) -> list[Callback]:
        """Add what resolves `lr="auto"`."""
        own = [AutoLearningRate()] if self.hparams["lr"] == "auto" else []
        return [*super().configure_callbacks(), *own]

    def metrics(self) -> dict[str, Metric]:
        """Compute the loss as the mean squared error of the predictions."""
        return {"loss": MeanSquaredError()}

    @classmethod
    def example_batch(cls) -> tuple["LinearRegression", Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)
        return cls(num_features=3, start="linear"), x, y


def _start(start: str, num_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return weight [D] and bias [] of a start, drawn on the CPU whatever the default device."""
    one_of("start", start, ("zeros", "uniform", "linear"))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(num_features, generator=generator, device="cpu")
    bias = torch.rand((), generator=generator, device="cpu")
    if start == "linear":  # nn.Linear draws both from U(−1/√D, 1/√D)
        bound = 1 / math.sqrt(num_features)
        return (2 * weight - 1) * bound, (2 * bias - 1) * bound
    return weight if start == "uniform" else 0 * weight, 0 * bias
