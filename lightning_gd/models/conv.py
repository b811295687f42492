"""Odd or even by two convolutions: their backward pass written out as formulas."""

import math
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanSquaredError, Metric

from lightning_gd.models.parity import decision_metrics
from lightning_gd.module import GradientDescentModule, Gradients
from lightning_gd.settings import SEEDS, whole_number

KERNEL, STRIDE = 5, 2  # pixels


class ParityConv(GradientDescentModule):
    """Two convolutions with relu and a linear layer, for odd (+1) and even (−1) digits.

    A convolution is a linear layer on patches: P(h), shape [N·M, 25·C], holds the 5 × 5 patches of
    h at M places 2 pixels apart as rows, and Pᵀ adds rows up at their places. A is `first_weight`
    [C, 25], a `first_bias` [C], B `second_weight` [K, 25·C], c `second_bias` [K], w `weight`
    [M₂·K] and b `bias` []. The forward pass, and the chain rule back through it:

        h₁ = relu(P(x) Aᵀ + a)   [N·M₁, C]     ∂L/∂A = δ₁ᵀ P(x)      ∂L/∂a = Σ δ₁
        h₂ = relu(P(h₁) Bᵀ + c)  [N·M₂, K]     ∂L/∂B = δ₂ᵀ P(h₁)     ∂L/∂c = Σ δ₂
        ŷ  = h₂ w + b            [N]           ∂L/∂w = dᵀ h₂         ∂L/∂b = Σ d
        L  = 1/N Σ (ŷ − y)²                    d = 2/N (ŷ − y)

        δ₂ = d wᵀ ⊙ 1[h₂ > 0],  δ₁ = Pᵀ(δ₂ B) ⊙ 1[h₁ > 0]

    A digit is called odd where ŷ > 0.

    Args:
        num_features: Pixels per picture, a square of a whole number of at least 13.
        first: Number C of channels of the first convolution.
        second: Number K of channels of the second convolution.
        start_seed: Seed of the start: A and B by He's rule, w as in `nn.Linear`, biases zero.
        **kwargs: Those of `GradientDescentModule`.
    """

    def __init__(
        self,
        num_features: int = 784,
        first: int = 16,
        second: int = 32,
        start_seed: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        whole_number("num_features", num_features, 1)
        whole_number("first", first, 1)
        whole_number("second", second, 1)
        whole_number("start_seed", start_seed, 0, below=SEEDS)
        self._sizes = [math.isqrt(num_features)]  # of a side: pixels, places of h₁ and of h₂
        if self._sizes[0] ** 2 != num_features or num_features < 13**2:
            raise ValueError(
                f"num_features={num_features} must be the square of a whole number from 13 on"
            )
        for _ in range(2):
            self._sizes.append((self._sizes[-1] - KERNEL) // STRIDE + 1)
        drawn, outputs = torch.Generator().manual_seed(start_seed), second * self._sizes[2] ** 2
        weights = [torch.empty(first, KERNEL**2, device="cpu")]
        weights.append(torch.empty(second, first * KERNEL**2, device="cpu"))
        for weight in weights:
            nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=drawn)
        bound = 1 / math.sqrt(outputs)
        last = torch.empty(outputs, device="cpu").uniform_(-bound, bound, generator=drawn)
        self.first_weight, self.second_weight = map(nn.Parameter, weights)
        self.first_bias = nn.Parameter(torch.zeros(first))
        self.second_bias = nn.Parameter(torch.zeros(second))
        self.weight, self.bias = nn.Parameter(last), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self._layers(x)[-1]

    def _layers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return P(x), h₁, P(h₁), h₂, [N, M₂·K], and ŷ, [N], of inputs x, [N, D]."""
        pixels, places, _ = self._sizes
        patches = _patches(x.reshape(-1, pixels, pixels, 1))
        h1 = functional.linear(patches, self.first_weight, self.first_bias).relu()
        inner = _patches(h1.view(-1, places, places, h1.shape[1]))
        h2 = functional.linear(inner, self.second_weight, self.second_bias).relu()
        h2 = h2.view(len(x), -1)
        return patches, h1, inner, h2, torch.addmv(self.bias, h2, self.weight)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) - y).square().mean()

    def gradients(self, x: Tensor, y: Tensor) -> Gradients:
        return self.loss_and_gradients(x, y)[1]

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Gradients]:
        patches, h1, inner, h2, prediction = self._layers(x)
        r = prediction - y
        d = r * (2 / len(y))
        delta2 = (torch.outer(d, self.weight) * (h2 > 0)).view(len(inner), -1)
        delta1 = self._transposed(delta2 @ self.second_weight) * (h1 > 0)
        return r.square().mean(), {
            "first_weight": delta1.T @ patches,
            "first_bias": delta1.sum(0),
            "second_weight": delta2.T @ inner,
            "second_bias": delta2.sum(0),
            "weight": d @ h2,
            "bias": d.sum(),
        }

    def _transposed(self, rows: Tensor) -> Tensor:
        """Return Pᵀ of rows [N·M₂, 25·C], shape [N·M₁, C]."""
        _, places, inner = self._sizes
        parts = rows.view(-1, inner, inner, KERNEL, KERNEL, rows.shape[1] // KERNEL**2)
        added = rows.new_zeros(len(parts), places, places, parts.shape[-1])
        ends = range(STRIDE * (inner - 1) + 1, places + 1)  # of the places of one pixel of a patch
        for i, j in product(range(KERNEL), repeat=2):
            added[:, i : ends[i] : STRIDE, j : ends[j] : STRIDE] += parts[:, :, :, i, j]
        return added.view(-1, parts.shape[-1])

    def metrics(self) -> dict[str, Metric]:
        return {"loss": MeanSquaredError(), **decision_metrics()}

    @classmethod
    def example_batch(cls) -> tuple["ParityConv", Tensor, Tensor]:
        """Return a small instance and a batch (x, y)."""
        x = torch.randn(5, 13**2, generator=torch.Generator().manual_seed(3))
        return cls(num_features=13**2, first=2, second=3), x, torch.tensor([1.0, -1, 1, -1, -1])


def _patches(h: Tensor) -> Tensor:
    """Return the patches of h, shape [N, S, S, C], as rows, shape [N·M, 25·C]."""
    patches = h.unfold(1, KERNEL, STRIDE).unfold(2, KERNEL, STRIDE)
    return patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, KERNEL**2 * h.shape[3])
