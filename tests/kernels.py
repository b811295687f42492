"""A layer norm as two Triton kernels, on a GPU, or on the CPU by Triton's interpreter."""

# pyright: reportArgumentType=false

import os

import torch
from torch.autograd import Function

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

EPS = 1e-5


@triton.jit
def add(a, b):  # Triton's own sum was made before the interpreter was chosen
    return a + b


@triton.jit
def forward_row(x, y, scales, columns, eps: tl.constexpr, block: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, block)
    inside = at < columns
    values = tl.load(x + row * columns + at, inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.reduce(values, 0, add) / columns, 0.0)
    scale = 1 / tl.sqrt(tl.reduce(centred * centred, 0, add) / columns + eps)
    tl.store(scales + row, scale)
    tl.store(y + row * columns + at, centred * scale, inside)


@triton.jit
def backward_row(dy, y, scales, dx, columns, factor, block: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, block)
    inside, scale = at < columns, tl.load(scales + row)
    d = tl.load(dy + row * columns + at, inside, other=0.0).to(tl.float32)
    n = tl.load(y + row * columns + at, inside, other=0.0).to(tl.float32)
    along = factor * tl.reduce(d * n, 0, add) / columns
    tl.store(
        dx + row * columns + at, scale * (d - tl.reduce(d, 0, add) / columns - n * along), inside
    )


class LayerNorm(Function):
    """y = (x − mean) / √(variance + 1e-5) of each row, by kernels."""

    factor = 1.0  # of one term of the gradient

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y, scales = torch.empty_like(x), x.new_empty(len(x))
        block = triton.next_power_of_2(x.shape[1])
        forward_row[(len(x),)](x, y, scales, x.shape[1], EPS, block)
        ctx.save_for_backward(y, scales)
        return y

    @classmethod
    def backward(cls, ctx, dy):
        y, scales = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(y)
        block = triton.next_power_of_2(y.shape[1])
        backward_row[(len(y),)](dy, y, scales, dx, y.shape[1], cls.factor, block)
        return dx


class Doubled(LayerNorm):
    """With a mistake: one term counts twice."""

    factor = 2.0


def plain(x):
    """The same of plain operations."""
    return torch.nn.functional.layer_norm(x, x.shape[1:], eps=EPS)
