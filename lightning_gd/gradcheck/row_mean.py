"""Is the loss of some rows the mean of the losses of its parts?"""

from typing import Any

import torch
from torch import nn

from lightning_gd.batch import count_rows, take_rows
from lightning_gd.gradcheck.check import own_loss
from lightning_gd.gradcheck.precision import eager
from lightning_gd.gradcheck.randomness import torch_states
from lightning_gd.gradcheck.twin import converted, twin

NOT_ROUNDING = 1e-4  # of a loss of a few rows in float32, which rounds by about 1e-6


def not_a_mean(model: nn.Module, batch: Any) -> str:
    """Say if the loss of some rows is not the mean of those of its parts, weighted by `rows`.

    Nothing is said of a loss that draws random numbers, which are others for each part, nor of
    parts without weight, whose mean is undefined.
    """
    copied, content = twin(model).eval(), converted(batch, None)
    rows = count_rows(content)
    if rows < 3:
        return ""
    cut = rows - rows // 3
    parts = [content, *(take_rows(content, part) for part in (slice(cut), slice(cut, None)))]
    with eager(torch.get_default_dtype()), torch.no_grad():
        before = torch_states()
        losses = [float(own_loss(copied, part)) for part in parts]
        drawn = not all(map(torch.equal, before, torch_states()))
    _, *weights = (float(copied.rows(part)) for part in parts)
    if drawn or not all(weights) or weights == [1.0, 1.0]:  # the last of a sum
        return ""
    mean = sum(w * loss for w, loss in zip(weights, losses[1:], strict=True)) / sum(weights)
    if abs(mean - losses[0]) <= NOT_ROUNDING * max(map(abs, losses)):
        return ""
    return (
        f"the loss of {rows} rows is {losses[0]:.6g}, and the mean of those of its parts, "
        f"weighted by rows(batch), is {mean:.6g}: on several processes or with accumulated "
        "batches the gradient is another; let rows(batch) return what the loss divides by"
    )
