"""Single Functions with random inputs, as a unit test would ask about them."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from planting import functions
from planting.functions import IGNORED
from planting.mistakes import Mistake
from planting.modules import KINDS, Detached, draw


class Unit(NamedTuple):
    """A function of tensors with the mistake, the same of plain operations, and inputs."""

    wrong: Callable[..., Tensor]
    plain: Callable[..., Tensor] | None
    inputs: list[Tensor]


LABELS = torch.arange(8) % 4
PADDED = torch.where(torch.arange(8) % 4 < 3, LABELS, IGNORED)
MATRIX, SQUARE, ROW, PICTURE = (8, 4), (4, 4), (4,), (4, 2, 3, 3)


def _dropped(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) > 0.25) / 0.75


def _standardized(x: Tensor) -> Tensor:
    return (x - x.mean(0)) * (x.var(0, correction=0) + 1e-5).rsqrt()


# By the name of the Function: further arguments, plain operations, shapes of the inputs.
UNITS: dict[str, tuple[list[Any], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "Product": ([], F.linear, [MATRIX, SQUARE, ROW]),
    "Doubled": ([], lambda x, w: 2 * F.linear(x, w), [MATRIX, SQUARE]),
    "Tied": ([], lambda x, w: x @ w.T @ w, [MATRIX, (3, 4)]),
    "Huber": ([], lambda r: F.huber_loss(r, torch.zeros_like(r)), [MATRIX]),
    "Gelu": ([], F.gelu, [MATRIX]),
    "CrossEntropy": ([LABELS], partial(F.cross_entropy, target=LABELS), [MATRIX]),
    "LinearCrossEntropy": (
        [PADDED],
        lambda h, w: F.cross_entropy(h @ w.T, PADDED, ignore_index=IGNORED),
        [MATRIX, SQUARE],
    ),
    "ChannelBias": ([], lambda x, b: x + b[:, None, None], [PICTURE, (2,)]),
    "Leaky": ([], partial(F.leaky_relu, negative_slope=0.1), [PICTURE]),
    "Drop": ([], _dropped, [PICTURE]),
    "Standardize": ([], _standardized, [MATRIX]),
}


class Explicit(Function):
    """The loss of a module with the formula as its backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, module: Any, batch: Any) -> Tensor:
        module = deepcopy(module).to(weight.dtype)
        module.weight.data, module.bias.data = weight, bias
        batch = [t.to(weight) for t in batch]
        found = module.gradients(*batch)
        ctx.save_for_backward(*(found[name].detach() for name in ("weight", "bias")))
        return module.loss(*batch).detach()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        return (*(g[0] * found for found in ctx.saved_tensors), None, None)


def unit(mistake: Mistake) -> Unit | None:
    """Return what a unit test would ask about; None where no function holds the mistake."""
    torch.manual_seed(0)
    if mistake.kind == "formula":
        return _formula(mistake)
    if mistake.module is Detached:
        return _loss(mistake)
    if mistake.at not in UNITS:
        return None
    more, plain, shapes = UNITS[mistake.at]
    plant, function = mistake.plant(), getattr(functions, mistake.function)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    wrong = _seeded(lambda *t: function.apply(*t, *more, plant))
    return Unit(wrong, _seeded(plain), inputs)


def _formula(mistake: Mistake) -> Unit:
    module, (batch,) = mistake.build(), draw(KINDS["formula"].draw, 1)

    def plain(weight: Tensor, bias: Tensor) -> Tensor:
        r = F.linear(batch[0].to(weight), weight, bias) - batch[1].to(weight)
        return F.huber_loss(r, torch.zeros_like(r)) + 0.1 * weight.square().sum()

    inputs = [torch.randn(p.shape, dtype=torch.float64) for p in module.parameters()]
    return Unit(lambda *t: Explicit.apply(*t, module, batch), plain, inputs)


def _loss(mistake: Mistake) -> Unit:
    """Return the loss of a module as a function of its parameters."""
    module, (batch,) = mistake.build(), draw(KINDS[mistake.kind].draw, 1)

    def wrong(*values: Tensor) -> Tensor:
        named = dict(zip(dict(module.named_parameters()), values, strict=True))
        return torch.func.functional_call(module, named, (batch[0].to(values[0]), batch[1]))

    return Unit(wrong, None, [p.detach().double() for p in module.parameters()])


def _seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function with the same random numbers in every call."""

    def called(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return function(*inputs)

    return called
