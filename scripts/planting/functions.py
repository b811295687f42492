"""Hand-written backward passes, each right unless a mistake is planted in it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.nn import functional as F

IGNORED = -100  # the label of padding

forward = custom_fwd(device_type="cpu")
backward = custom_bwd(device_type="cpu")


class Plant:
    """A mistake in the backward pass of one Function; without arguments none.

    Args:
        at: Name of the Function.
        change: Gets what the backward pass knows and its right gradients (`dx`), returns those
            that it replaces. `memory` is a dict that lasts from call to call.
    """

    def __init__(
        self, at: str = "", change: Callable[[Any], dict[str, Tensor | None]] | None = None
    ) -> None:
        self.at, self.change, self.memory = at, change, {}

    def gradients(self, at: str, right: dict[str, Tensor], **known: Any) -> dict[str, Any]:
        """Return the gradients of a Function, wrong if the mistake is planted in it."""
        if self.change is None or at != self.at:
            return right
        return {**right, **self.change(SimpleNamespace(memory=self.memory, **right, **known))}


def _result(ctx: Any, at: str, right: dict[str, Tensor], **known: Any) -> tuple[Any, ...]:
    return (*ctx.plant.gradients(at, right, **known).values(), None)


class Product(Function):
    """x wᵀ + b."""

    @staticmethod
    @forward
    def forward(ctx, x, w, b, plant):
        ctx.save_for_backward(x, w)
        ctx.plant = plant
        return x @ w.T + b

    @staticmethod
    @backward
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        right = {"dx": g @ w, "dw": g.T @ x, "db": g.sum(0)}
        return _result(ctx, "Product", right, g=g, x=x, w=w)


class ClippedProduct(Function):
    """x wᵀ + b, whose input is cut to [−1, 1] in place after it was used."""

    @staticmethod
    @forward
    def forward(ctx, x, w, b, plant):
        ctx.x, ctx.w = x, w
        out = x @ w.T + b
        x.clamp_(-1, 1)
        return out

    @staticmethod
    @backward
    def backward(ctx, g):
        return g @ ctx.w, g.T @ ctx.x, g.sum(0), None


class Doubled(Function):
    """2 x wᵀ."""

    @staticmethod
    @forward
    def forward(ctx, x, w, plant):
        ctx.save_for_backward(x, w)
        ctx.plant = plant
        return 2 * (x @ w.T)

    @staticmethod
    @backward
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return _result(ctx, "Doubled", {"dx": 2 * (g @ w), "dw": 2 * (g.T @ x)}, g=g, x=x, w=w)


class Tied(Function):
    """x wᵀ w, an autoencoder that uses its weight twice."""

    @staticmethod
    @forward
    def forward(ctx, x, w, plant):
        ctx.save_for_backward(x, w)
        ctx.plant = plant
        return x @ w.T @ w

    @staticmethod
    @backward
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        encoder, decoder = (g @ w.T).T @ x, (x @ w.T).T @ g
        right = {"dx": g @ w.T @ w, "dw": encoder + decoder}
        return _result(ctx, "Tied", right, encoder=encoder, decoder=decoder)


class Huber(Function):
    """Mean of r²/2 for |r| ≤ 1, |r| − ½ beyond."""

    @staticmethod
    @forward
    def forward(ctx, r, plant):
        ctx.save_for_backward(r)
        ctx.plant = plant
        return F.huber_loss(r, torch.zeros_like(r))

    @staticmethod
    @backward
    def backward(ctx, g):
        (r,) = ctx.saved_tensors
        return _result(ctx, "Huber", {"dr": g * r.clamp(-1, 1) / r.numel()}, g=g, r=r)


class Gelu(Function):
    """x Φ(x)."""

    @staticmethod
    @forward
    def forward(ctx, x, plant):
        ctx.save_for_backward(x)
        ctx.plant = plant
        return F.gelu(x)

    @staticmethod
    @backward
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        slope = torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
        return _result(ctx, "Gelu", {"dx": g * slope}, g=g, x=x)


class CrossEntropy(Function):
    """Mean of −log softmax(z)ᵧ."""

    @staticmethod
    @forward
    def forward(ctx, z, y, plant):
        ctx.save_for_backward(z, y)
        ctx.plant = plant
        return F.cross_entropy(z, y)

    @staticmethod
    @backward
    def backward(ctx, g):
        z, y = ctx.saved_tensors
        p, hot, n = z.softmax(1), F.one_hot(y, z.shape[1]), len(y)
        right = {"dz": g * (p - hot) / n, "dy": None}
        return _result(ctx, "CrossEntropy", right, g=g, z=z, y=y, p=p, hot=hot, n=n)


class LinearCrossEntropy(Function):
    """Mean of −log softmax(h wᵀ)ᵧ over the rows that are no padding."""

    @staticmethod
    @forward
    def forward(ctx, h, w, y, plant):
        ctx.save_for_backward(h, w, y)
        ctx.plant = plant
        return F.cross_entropy(h @ w.T, y, ignore_index=IGNORED)

    @staticmethod
    @backward
    def backward(ctx, g):
        h, w, y = ctx.saved_tensors
        valid = (y != IGNORED)[:, None]
        n, size = valid.sum(), len(y)
        p, hot = (h @ w.T).softmax(1), F.one_hot(y.clamp(min=0), len(w))
        dz = g * (p - hot) * valid / n
        right = {"dh": dz @ w, "dw": dz.T @ h, "dy": None}
        known = {"g": g, "h": h, "w": w, "y": y, "p": p, "hot": hot, "dz": dz, "n": n}
        return _result(ctx, "LinearCrossEntropy", right, valid=valid, size=size, **known)


class ChannelBias(Function):
    """x + b by channel, of pictures."""

    @staticmethod
    @forward
    def forward(ctx, x, b, plant):
        ctx.plant = plant
        return x + b[:, None, None]

    @staticmethod
    @backward
    def backward(ctx, g):
        return _result(ctx, "ChannelBias", {"dx": g, "db": g.sum((0, 2, 3))}, g=g)


class Leaky(Function):
    """x for x > 0, x/10 elsewhere."""

    @staticmethod
    @forward
    def forward(ctx, x, plant):
        ctx.save_for_backward(x)
        ctx.plant = plant
        return torch.where(x > 0, x, 0.1 * x)

    @staticmethod
    @backward
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return _result(ctx, "Leaky", {"dx": torch.where(x > 0, g, 0.1 * g)}, g=g, x=x)


class Drop(Function):
    """A quarter of x set to zero at random, the rest scaled by 4/3."""

    @staticmethod
    @forward
    def forward(ctx, x, plant):
        kept = torch.rand_like(x) > 0.25
        ctx.save_for_backward(kept)
        ctx.plant = plant
        return x * kept / 0.75

    @staticmethod
    @backward
    def backward(ctx, g):
        (kept,) = ctx.saved_tensors
        return _result(ctx, "Drop", {"dx": g * kept / 0.75}, g=g, kept=kept)


class Standardize(Function):
    """(x − mean) / deviation of each column over the batch."""

    @staticmethod
    @forward
    def forward(ctx, x, plant):
        scale = (x.var(0, correction=0) + 1e-5).rsqrt()
        out = (x - x.mean(0)) * scale
        ctx.save_for_backward(out, scale)
        ctx.plant = plant
        return out

    @staticmethod
    @backward
    def backward(ctx, g):
        out, scale = ctx.saved_tensors
        dx = scale * (g - g.mean(0) - out * (g * out).mean(0))
        return _result(ctx, "Standardize", {"dx": dx}, g=g, scale=scale, out=out)
