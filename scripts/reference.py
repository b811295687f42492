"""The notebooks' NumPy loop: linear regression by gradient descent, and nothing else.

The yardstick for the rest of the package, so it imports only NumPy and shares no line with it.
"""

from typing import Literal, NamedTuple

import numpy as np


class Descent(NamedTuple):
    """What the loop saw, in the dtype of x (float64 for integers).

    Attributes:
        weights: The weight before each update and after the last, shape [steps + 1, D].
        biases: The bias likewise, shape [steps + 1]; zeros for a model without bias.
        losses: Mean loss before each update, shape [steps].
        gradients: What each update used for w, before momentum, shape [steps, D].
    """

    weights: np.ndarray
    biases: np.ndarray
    losses: np.ndarray
    gradients: np.ndarray


def gradient_descent(
    x: np.ndarray,
    y: np.ndarray,
    *,
    lr: float,
    steps: int,
    weight: np.ndarray | None = None,
    bias: float | None = None,
    momentum: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Descent:
    """Full-batch gradient descent on the mean squared error of ŷ = xw + b.

    With r = ŷ − y, the loss is L = 1/N Σ r² (no ½) and its gradient
    ∂L/∂w = 2/N xᵀr, ∂L/∂b = 2/N Σ r. An update is v ← βv + g, then w ← w − λv.

    `reduction="sum"` drops the 1/N from the gradients and keeps it in the loss. That is what
    `np.dot(2 * x, r).mean()` computes: the dot product has already summed over the samples and
    the mean of one number is that number, N times the gradient of the loss. The same weights
    come from the mean with N times the learning rate.

    Args:
        x: Inputs, shape [N, D], or [N] for one feature.
        y: Targets, shape [N].
        lr: Learning rate λ.
        steps: Number of updates.
        weight: Start of w, shape [D] or a number; zeros if not given.
        bias: Start of b; None is a model without bias.
        momentum: β, in [0, 1).
        reduction: Whether the gradient is the mean or the sum over the samples.

    Returns:
        The weights, biases, losses and gradients of the whole run.

    Raises:
        ValueError: If shapes do not fit together or `reduction` is neither word.

    Example:
        >>> x = np.array([1, 2, 3, 4])
        >>> run = gradient_descent(x, 3 * x, lr=0.01, steps=3, reduction="sum")
        >>> run.weights[:, 0].round(3).tolist()
        [0.0, 1.8, 2.52, 2.808]
        >>> run.losses.round(3).tolist()
        [67.5, 10.8, 1.728]
    """
    x, y = _table(x, y)
    scale = 2 / _divisor(reduction, len(y))
    w = np.broadcast_to(np.asarray(0 if weight is None else weight, x.dtype), x.shape[1:])
    b = x.dtype.type(0 if bias is None else bias)
    velocity_w, velocity_b = np.zeros_like(w), x.dtype.type(0)
    weights, biases, losses, gradients = [w], [b], [], []
    for _ in range(steps):
        r = x @ w + b - y
        gradient = scale * (x.T @ r)
        velocity_w = momentum * velocity_w + gradient
        w = w - lr * velocity_w
        if bias is not None:
            velocity_b = momentum * velocity_b + scale * r.sum()
            b = b - lr * velocity_b
        losses.append((r**2).mean())
        gradients.append(gradient)
        weights.append(w)
        biases.append(b)
    shape = (steps, x.shape[1])  # so that no steps give [0, D]
    return Descent(
        np.array(weights, x.dtype),
        np.array(biases, x.dtype),
        np.array(losses, x.dtype),
        np.array(gradients, x.dtype).reshape(shape),
    )


def _table(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs as [N, D] and targets as [N], in one floating dtype."""
    x = np.asarray(x)
    x = x.reshape(len(x), -1) if x.ndim == 1 else x
    dtype = x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64
    y = np.asarray(y)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
        raise ValueError(f"x must be [N, D] and y [N], N ≥ 1; found {x.shape} and {y.shape}")
    return x.astype(dtype), y.astype(dtype)


def _divisor(reduction: str, rows: int) -> int:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', found {reduction!r}")
    return rows if reduction == "mean" else 1
