"""The mistakes: what is wrong, where, at which update it is seen, and by which words."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from planting.functions import ClippedProduct, Plant
from planting.modules import (
    KINDS,
    Detached,
    Line,
    Manual,
    draw,
)

UNNAMED = "no usual mistake fits"
UPDATES = 25
EVERY = 5


@dataclass(frozen=True)
class Mistake:
    """A mistake in a kind of module, and what the check should say of it."""

    name: str
    update: int  # at which the check finds it
    words: str  # of the check
    kind: str
    at: str = ""  # the Function it is in
    change: Callable[[Any], dict[str, Tensor | None]] | None = None
    module: Callable[..., Any] | None = None  # instead of that of the kind
    batches: Callable[[list[Any]], list[Any]] = list  # what is done to those of the kind
    callback: type[Callback] | None = None
    precision: str = "32-true"

    def build(self) -> Any:
        """Return the module with the mistake."""
        module = (self.module or KINDS[self.kind].module)()
        module.plant = self.plant()
        return module

    def plant(self) -> Plant:
        """Return it with an empty memory."""
        return Plant(self.at, self.change)

    @property
    def function(self) -> str:
        """The name of the Function that holds it."""
        return "ClippedProduct" if self.module is Clipped else self.at

    def data(self) -> list[Any]:
        """Return one batch for each update."""
        return self.batches(draw(KINDS[self.kind].draw, UPDATES))


def _times(factor: float, *names: str) -> Callable[[Any], dict[str, Tensor | None]]:
    return lambda d: {name: factor * getattr(d, name) for name in names}


def _at(name: str, index: Any, factor: float) -> Callable[[Any], dict[str, Tensor | None]]:
    """Return a change of one part of a gradient."""

    def change(d: Any) -> dict[str, Tensor | None]:
        value = getattr(d, name).clone()
        value[index] *= factor
        return {name: value}

    return change


def _noise(name: str) -> Callable[[Any], dict[str, Tensor | None]]:
    return lambda d: {name: _noisy(vars(d)[name])}


def _noisy(value: Tensor) -> Tensor:
    return value * (1 + 1e-4 * torch.randn_like(value))


def _previous(d: Any) -> dict[str, Tensor | None]:
    x = d.memory.get("x", d.x).to(d.g)
    d.memory["x"] = d.x.clone()
    return {"dw": d.g.T @ x}


def _first(d: Any) -> dict[str, Tensor | None]:
    return {"dw": d.g.T @ d.memory.setdefault("x", d.x.clone()).to(d.g)}


def _first_of_formula(d: Any) -> dict[str, Tensor | None]:
    return {"weight": d.memory.setdefault("weight", d.weight.clone()).to(d.weight)}


def _far_origin(d: Any) -> dict[str, Tensor | None]:
    return {"dw": d.g.T @ (d.x + 1e5) - 1e5 * d.g.sum(0)[:, None]}


def _in_place(d: Any) -> dict[str, Tensor | None]:
    d.g.mul_(2)
    return {}


def _zero_in_bfloat16(d: Any) -> dict[str, Tensor | None]:
    return {"dx": torch.zeros_like(d.dx) if d.dx.dtype is torch.bfloat16 else d.dx}


def _gelu_by_tanh(d: Any) -> dict[str, Tensor | None]:
    c, x = (2 / torch.pi) ** 0.5, d.x
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return {"dx": d.g * ((1 + t) / 2 + x * (1 - t * t) * c * (1 + 0.134145 * x * x) / 2)}


def _labels_as_found(d: Any) -> dict[str, Tensor | None]:
    number = torch.unique(d.y, return_inverse=True)[1]
    return {"dz": d.g * (d.p - torch.nn.functional.one_hot(number, d.p.shape[1])) / d.n}


def _overflowing(d: Any) -> dict[str, Tensor | None]:
    e = d.z.exp()
    return {"dz": d.g * (e / e.sum(1, keepdim=True) - d.hot) / d.n}


def _tokens(dz: Callable[[Any], Tensor]) -> Callable[[Any], dict[str, Tensor | None]]:
    """Return the gradients of a fused cross-entropy from that of its logits."""
    return lambda d: {"dh": dz(d) @ d.w, "dw": dz(d).T @ d.h}


def _label_0_is_padding(d: Any) -> Tensor:
    return d.dz * (d.y != 0)[:, None]


def _at_update(number: int, change: Callable[[Any], Any], batches: list[Any]) -> list[Any]:
    return [change(batch) if k == number else batch for k, batch in enumerate(batches)]


def _without_class_0(batch: Any) -> Any:
    return batch[0], batch[1].clamp(min=1)


def _with_label_0(batch: Any) -> Any:
    return batch[0], batch[1].index_fill(1, torch.tensor([0]), 0)


def _far(batch: Any) -> Any:
    return 100 * batch[0], batch[1]


class Clipped(Line):
    """A line whose input is cut in place."""

    product = ClippedProduct

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + 0.1
        prediction = self.product.apply(x, self.weight, self.bias, self.plant)
        return torch.nn.functional.mse_loss(prediction, y)


class Summed(Manual):
    """Adds up two halves of a batch without the factor ½."""

    share = 1.0


class Twice(Manual):
    """Calls backward twice for each half."""

    passes = 2


class NeverZeroed(Manual):
    """Keeps `p.grad` from the update before."""

    zeroed = False


class Scales(Callback):
    """Doubles `p.grad` before each update."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for p in pl_module.parameters():
            p.grad *= 2


class Decays(Callback):
    """Adds weight decay to `p.grad`."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        for p in pl_module.parameters():
            p.grad += 0.1 * p.detach()


class Clips(Callback):
    """Clips `p.grad` beside the Trainer."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 0.01)


class Hooks(Callback):
    """Registers a hook that halves the gradient of the weight."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.weight.register_hook(lambda g: g / 2)


_line = partial(Mistake, kind="linear", at="Product")
_softmax = partial(Mistake, kind="softmax", at="CrossEntropy")
_conv = partial(Mistake, kind="conv")
_fused = partial(Mistake, kind="tokens", at="LinearCrossEntropy")
_formula = partial(Mistake, kind="formula", at="formula")

MISTAKES = [
    _line("a factor 2", 0, "a factor 2 too much", change=_times(2, "dw")),
    _line("a factor ½", 0, "a factor 2 is missing (½)", change=_times(0.5, "dw", "db")),
    _line("the sign", 0, "the sign is wrong", change=_times(-1, "dw")),
    _line("zero", 0, "it is zero", change=_times(0, "dw")),
    _line("the bias forgotten (None)", 0, "it is zero", change=lambda d: {"db": None}),
    _line(
        "bias averaged, not summed",
        0,
        "the number of rows twice",
        change=lambda d: {"db": d.g.mean(0)},
    ),
    _line(
        "divided by N twice",
        0,
        "the number of rows twice",
        change=lambda d: {"dw": d.dw / len(d.x)},
    ),
    _line("one entry", 0, UNNAMED, change=_at("dw", (1, 2), 1.5)),
    _line(
        "last row of the batch left out", 0, UNNAMED, change=lambda d: {"dw": d.g[:-1].T @ d.x[:-1]}
    ),
    _line(
        "first column",
        0,
        "wrong only in the first slice of dimension 1",
        change=_at("dw", (slice(None), 0), 3.0),
    ),
    _line("off by one row", 0, UNNAMED, change=lambda d: {"dw": d.g.T @ d.x.roll(1, 0)}),
    _line("transposed square weight", 0, "transposed", change=lambda d: {"dw": d.dw.T}),
    _line("noise of 1e-4", 0, "stale: a second call", change=_noise("dw")),
    _line("the batch before (stale)", 1, "stale: a second call", change=_previous),
    _line("kept from the first batch (stale)", 1, UNNAMED, change=_first),
    _line("cancellation in float32", 0, UNNAMED, change=_far_origin),
    _line("input changed in place", 0, UNNAMED, module=Clipped),
    Mistake(
        "grad_output changed in place", 0, "a factor 2 too much", "residual", "Doubled", _in_place
    ),
    Mistake(
        "one of two uses forgotten", 0, UNNAMED, "autoencoder", "Tied", lambda d: {"dw": d.encoder}
    ),
    Mistake(
        "wrong only for |r| > 1",
        0,
        UNNAMED,
        "huber",
        "Huber",
        lambda d: {"dr": d.g * d.r / d.r.numel()},
    ),
    Mistake("GELU by its tanh formula", 0, UNNAMED, "deep", "Gelu", _gelu_by_tanh),
    Mistake(
        "input gradient zero in bfloat16",
        0,
        "p.grad is 0 times",
        "deep",
        "Product",
        _zero_in_bfloat16,
        precision="bf16-mixed",
    ),
    _softmax("sum for mean", 0, "the sum over the rows", change=lambda d: {"dz": d.dz * d.n}),
    _softmax("the label's term left out", 0, UNNAMED, change=lambda d: {"dz": d.g * d.p / d.n}),
    _softmax(
        "only where a class is absent",
        10,
        UNNAMED,
        change=_labels_as_found,
        batches=partial(_at_update, 10, _without_class_0),
    ),
    _softmax(
        "overflow at large logits",
        10,
        "nan",
        change=_overflowing,
        batches=partial(_at_update, 10, _far),
    ),
    _softmax("part of the loss detached", 0, UNNAMED, module=Detached),
    Mistake("halves added, not averaged", 0, "p.grad is 2 times", "manual", module=Summed),
    Mistake("backward called twice", 0, "p.grad is 2 times", "manual", module=Twice),
    Mistake("p.grad never zeroed", 1, UNNAMED, "manual", module=NeverZeroed),
    _conv(
        "leaky ReLU: negative side",
        0,
        "passes through ChannelBias, Drop, Leaky",
        at="Leaky",
        change=lambda d: {"dx": torch.where(d.dx == d.g, d.g, 0)},
    ),
    _conv(
        "ReLU: positive grad_output only",
        0,
        UNNAMED,
        at="Leaky",
        change=lambda d: {"dx": d.dx.clamp(min=0)},
    ),
    _conv("dropout mask not applied", 0, UNNAMED, at="Drop", change=lambda d: {"dx": d.g / 0.75}),
    _conv(
        "dropout without its scale",
        0,
        "a factor 0.75",
        at="Drop",
        change=lambda d: {"dx": d.g * d.kept},
    ),
    _conv(
        "batch norm statistics constant",
        0,
        UNNAMED,
        at="Standardize",
        change=lambda d: {"dx": d.scale * d.g},
    ),
    _conv(
        "channel bias: mean over the batch",
        0,
        "the number of rows twice",
        at="ChannelBias",
        change=lambda d: {"db": d.db / len(d.g)},
    ),
    _fused(
        "mean over padding too",
        0,
        "a factor 0.75",
        change=lambda d: {"dh": d.dh * d.n / d.size, "dw": d.dw * d.n / d.size},
    ),
    _fused("padding not masked", 0, UNNAMED, change=_tokens(lambda d: d.g * (d.p - d.hot) / d.n)),
    _fused(
        "grad_output taken as 1",
        0,
        "grad_output is taken as 1",
        change=lambda d: {"dh": d.dh / d.g, "dw": d.dw / d.g},
    ),
    _fused(
        "last word of the vocabulary",
        0,
        "wrong only in the last slice of dimension 0",
        change=_at("dw", -1, 0.0),
    ),
    _fused(
        "label 0 taken as padding",
        5,
        UNNAMED,
        change=_tokens(_label_0_is_padding),
        batches=partial(_at_update, 5, _with_label_0),
    ),
    Mistake("p.grad doubled by a callback", 0, "p.grad is 2 times", "linear", callback=Scales),
    Mistake("weight decay added to p.grad", 0, UNNAMED, "linear", callback=Decays),
    Mistake("p.grad clipped after backward", 0, "p.grad is 0.00", "linear", callback=Clips),
    Mistake("p.grad halved by a tensor hook", 0, "p.grad is 0.5 times", "linear", callback=Hooks),
    _formula("a factor 2 in the bias", 0, "a factor 2 too much", change=_times(2, "bias")),
    _formula("penalty left out", 0, UNNAMED, change=lambda d: {"weight": d.weight - d.penalty}),
    _formula(
        "penalty without its 2", 0, UNNAMED, change=lambda d: {"weight": d.weight - d.penalty / 2}
    ),
    _formula(
        "wrong only for |r| > 1", 0, UNNAMED, change=lambda d: {"bias": d.r.sum(0) / d.r.numel()}
    ),
    _formula("transposed", 0, "transposed", change=lambda d: {"weight": d.weight.T}),
    _formula("noise of 1e-4", 0, "stale: a second call", change=_noise("weight")),
    _formula(
        "kept from the first batch (stale)",
        0,
        "stale: the same at other weights",
        change=_first_of_formula,
    ),
]
