"""Tiny LightningModules that train through hand-written backward passes, with their batches."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gd import GradientDescentModule
from planting.functions import (
    IGNORED,
    ChannelBias,
    CrossEntropy,
    Doubled,
    Drop,
    Gelu,
    Huber,
    Leaky,
    LinearCrossEntropy,
    Plant,
    Product,
    Standardize,
    Tied,
)


class Planted(LightningModule):
    """A loss of a batch times a scale; `plant` is the mistake in one of its Functions."""

    def __init__(self, scale: float = 1.0, size: int = 4) -> None:
        super().__init__()
        self.plant, self.scale, self.size = Plant(), scale, size
        self.build(size)

    def build(self, size: int) -> None:
        """Make the parameters."""
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.bias = nn.Parameter(torch.randn(size) / 2)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y)

    def training_step(self, batch: Any) -> Tensor:
        return self.scale * self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02 / self.scale)


class Line(Planted):
    """Least squares of several targets, prediction by a Function."""

    product: Any = Product

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.product.apply(x, self.weight, self.bias, self.plant), y)


class HuberLine(Planted):
    """A prediction by plain operations, its loss by a Function."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return Huber.apply(F.linear(x, self.weight, self.bias) - y, self.plant)


class Residual(Line):
    """The prediction of a line and of a second weight, which get the same gradient."""

    def build(self, size: int) -> None:
        super().build(size)
        self.second = nn.Parameter(torch.randn(size, size) / size)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        first = Product.apply(x, self.weight, self.bias, self.plant)
        return F.mse_loss(first + Doubled.apply(x, self.second, self.plant), y)


class Autoencoder(Planted):
    """A tied autoencoder of x."""

    def build(self, size: int) -> None:
        self.weight = nn.Parameter(torch.randn(size - 1, size) / size**0.5)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(Tied.apply(x, self.weight, self.plant), x)


class Deep(Planted):
    """Two products with a GELU between them."""

    def build(self, size: int) -> None:
        super().build(size)
        self.head = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.offset = nn.Parameter(torch.zeros(size))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        h = Gelu.apply(Product.apply(x, self.weight, self.bias, Plant()), self.plant)
        return F.mse_loss(Product.apply(h, self.head, self.offset, self.plant), y)


class Softmax(Planted):
    """A softmax classifier, its loss by a Function."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return CrossEntropy.apply(F.linear(x, self.weight, self.bias), y, self.plant)


class Detached(Softmax):
    """A softmax classifier whose penalty is cut off the graph."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) + 0.1 * self.weight.detach().square().sum()


class Net(Planted):
    """A convolution with batch norm and dropout, and a second, hand-written batch norm."""

    def build(self, size: int) -> None:
        self.conv = nn.Conv2d(1, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.shift = nn.Parameter(torch.randn(2) / 2)
        self.middle = nn.Linear(2 * (size - 2) ** 2, size, bias=False)
        self.head = nn.Linear(size, 3)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        h = ChannelBias.apply(self.norm(self.conv(x)), self.shift, self.plant)
        h = Drop.apply(Leaky.apply(h, self.plant), self.plant).flatten(1)
        return F.cross_entropy(self.head(Standardize.apply(self.middle(h), self.plant)), y)


class Tokens(Planted):
    """The next token after each, with padding, by a fused product and cross-entropy."""

    def build(self, size: int) -> None:
        self.embedding = nn.Embedding(size + 2, size)
        self.weight = nn.Parameter(torch.randn(size + 2, size))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.embedding(x)).flatten(0, 1)
        return LinearCrossEntropy.apply(h, self.weight, y.flatten(), self.plant)


class Manual(Softmax):
    """A softmax classifier that accumulates two halves of a batch by hand."""

    share, passes, zeroed = 0.5, 1, True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        optimizer: Any = self.optimizers()
        if self.zeroed:
            optimizer.zero_grad()
        for half in zip(*(t.chunk(2) for t in batch), strict=True):
            for _ in range(self.passes):
                self.manual_backward(self.share * self.loss(*half))
        optimizer.step()


class Formula(GradientDescentModule):
    """A Huber loss with a penalty, in explicit mode."""

    def __init__(self, size: int = 4, **settings: Any) -> None:
        super().__init__(**{"lr": 0.02, **settings})
        self.plant = Plant()
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.bias = nn.Parameter(torch.randn(size) / 2)

    def residuals(self, x: Tensor, y: Tensor) -> Tensor:
        """Return prediction − y."""
        return F.linear(x, self.weight, self.bias) - y

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        r = self.residuals(x, y)
        return F.huber_loss(r, torch.zeros_like(r)) + 0.1 * self.weight.square().sum()

    validation_step = LightningModule.validation_step  # there are no validation rows

    def gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        r, penalty = self.residuals(x, y), 0.2 * self.weight
        slope = r.clamp(-1, 1) / r.numel()
        right = {"weight": slope.T @ x + penalty, "bias": slope.sum(0)}
        return self.plant.gradients("formula", right, x=x, y=y, r=r, slope=slope, penalty=penalty)


class Batches:
    """So many batches, in order."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


Draw = Callable[[torch.Generator, int, int], tuple[Tensor, Tensor]]  # of rows and size


def targets(source: torch.Generator, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Return inputs, some beyond 1, and targets that leave residuals beyond 1."""
    draw = torch.randn(2, rows, size, generator=source)
    return draw[0], 2 * draw[1]


def classes(source: torch.Generator, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels, each class in turn."""
    return torch.randn(rows, size, generator=source), torch.arange(rows) % size


def pictures(source: torch.Generator, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Return pictures and one of three labels."""
    return torch.randn(rows, 1, size, size, generator=source), torch.arange(rows) % 3


def sentences(source: torch.Generator, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Return tokens and those that follow; the end of every second sentence is padding."""
    tokens = torch.randint(1, size + 2, (rows, 6), generator=source)
    following = tokens.roll(-1, 1)
    following[1::2, 3:] = IGNORED
    return tokens, following


def draw(kind: Draw, count: int, rows: int = 8, size: int = 4, seed: int = 0) -> list[Any]:
    """Return so many batches."""
    source = torch.Generator().manual_seed(seed)
    return [kind(source, rows, size) for _ in range(count)]


class Kind(NamedTuple):
    """A kind of module, and what it is trained on."""

    module: Callable[..., Any]
    draw: Draw


KINDS = {
    "linear": Kind(Line, targets),
    "huber": Kind(HuberLine, targets),
    "residual": Kind(Residual, targets),
    "autoencoder": Kind(Autoencoder, targets),
    "deep": Kind(Deep, targets),
    "softmax": Kind(Softmax, classes),
    "manual": Kind(Manual, classes),
    "conv": Kind(Net, pictures),
    "tokens": Kind(Tokens, sentences),
    "formula": Kind(Formula, targets),
}
