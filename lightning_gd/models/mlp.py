"""Odd or even with a hidden layer: a backward pass written out as formulas."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanSquaredError, Metric

from lightning_gd.models.parity import decision_metrics
from lightning_gd.module import GradientDescentModule, Gradients
from lightning_gd.settings import SEEDS, one_of, whole_number


class ParityMLP(GradientDescentModule):
    """One hidden layer, ŷ = φ(x Aᵀ + a) w + b, for odd (+1) and even (−1) digits.

    N rows, D inputs and H hidden units; A [H, D] is `hidden_weight`, a [H] `hidden_bias`,
    w [H] `weight` and b [] `bias`. The forward pass, and the chain rule back through it:

        h = φ(x Aᵀ + a)  [N, H]          ∂L/∂A = δᵀ x        ∂L/∂a = Σ δ
        ŷ = h w + b      [N]             ∂L/∂w = dᵀ h        ∂L/∂b = Σ d
        L = 1/N Σ ℓ(ŷ, y)                d = ∂L/∂ŷ  [N]      δ = d wᵀ ⊙ φ′  [N, H]

    squared:  ℓ = (ŷ − y)²            d = 2/N (ŷ − y)             relu:  φ′ = 1 where h > 0
    logistic: ℓ = log(1 + exp(−y ŷ))  d = −y/N σ(−y ŷ)            tanh:  φ′ = 1 − h²

    A digit is called odd where ŷ > 0. A and w are drawn: from zeros b alone would ever move, and
    hidden units that start alike have the same gradient and stay copies of one.

    Args:
        num_features: Number D of pixels.
        hidden: Number H of hidden units.
        activation: φ, `relu` or `tanh`.
        loss: ℓ, `squared` or `logistic`.
        start_seed: Seed of the start: A by He's rule for φ, w as in `nn.Linear`, a and b zero.
        **kwargs: Those of `GradientDescentModule`.
    """

    def __init__(
        self,
        num_features: int = 784,
        hidden: int = 256,
        activation: Literal["relu", "tanh"] = "relu",
        loss: Literal["squared", "logistic"] = "squared",
        start_seed: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        whole_number("num_features", num_features, 1)
        whole_number("hidden", hidden, 1)
        one_of("activation", activation, ("relu", "tanh"))
        one_of("loss", loss, ("squared", "logistic"))
        whole_number("start_seed", start_seed, 0, below=SEEDS)
        self._relu, self._squared = activation == "relu", loss == "squared"
        drawn = torch.Generator().manual_seed(start_seed)
        first, bound = torch.empty(hidden, num_features, device="cpu"), 1 / math.sqrt(hidden)
        nn.init.kaiming_uniform_(first, nonlinearity=activation, generator=drawn)
        self.hidden_weight = nn.Parameter(first)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.weight = nn.Parameter(
            torch.empty(hidden, device="cpu").uniform_(-bound, bound, generator=drawn)
        )
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self._layers(x)[1]

    def _layers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of each layer: h, shape [N, H], and ŷ, shape [N]."""
        z = functional.linear(x, self.hidden_weight, self.hidden_bias)
        h = z.relu() if self._relu else z.tanh()
        return h, torch.addmv(self.bias, h, self.weight)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self._cost(self(x), y)

    def _cost(self, prediction: Tensor, y: Tensor) -> Tensor:
        if self._squared:
            return (prediction - y).square().mean()
        return -functional.logsigmoid(y * prediction).mean()  # log(1 + exp(·)) cannot overflow

    def gradients(
        self, x: Tensor, y: Tensor, layers: tuple[Tensor, Tensor] | None = None
    ) -> Gradients:
        """The backward pass; `layers` are the outputs of a forward pass already made."""
        h, prediction = layers or self._layers(x)
        if self._squared:
            d = (prediction - y) * (2 / len(y))
        else:
            d = -y * torch.sigmoid(-y * prediction) / len(y)
        slope = h.sign() if self._relu else 1 - h.square()  # φ′: relu's h is never negative
        delta = slope.mul_(self.weight).mul_(d[:, None])  # d wᵀ ⊙ φ′ without a second [N, H]
        return {
            "hidden_weight": delta.T @ x,
            "hidden_bias": delta.sum(0),
            "weight": d @ h,
            "bias": d.sum(),
        }

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Gradients]:
        layers = self._layers(x)
        return self._cost(layers[1], y), self.gradients(x, y, layers)

    def metrics(self) -> dict[str, Metric]:
        return {"loss" if self._squared else "mse": MeanSquaredError(), **decision_metrics()}

    @staticmethod
    def example_batch(**settings) -> tuple["ParityMLP", Tensor, Tensor]:
        """Return a small instance and a batch (x, y), with no hidden unit near the kink of relu."""
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(6, 5, generator=generator)
        y = torch.tensor([1.0, -1, 1, 1, -1, -1])
        return ParityMLP(num_features=5, hidden=4, **settings), x, y
