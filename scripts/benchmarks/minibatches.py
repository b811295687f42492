"""Epochs of mini-batches: `fit`, bare loops, plain Lightning and scikit-learn."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import SGDRegressor
from torch import Tensor, nn

from benchmarks.fitting import MNIST, Prepared, accuracy, digits, fit, warm, weights
from benchmarks.harness import Row
from benchmarks.plain import (
    BATCH,
    LR,
    lightning_tensors,
    lightning_torchvision,
    order,
    plain_linear,
    training_rows,
)
from benchmarks.team import Job, Run, Side
from lightning_gd import GradientCheck, GradientDescentModule, ParityRegressor

LIMIT, MOMENTUM, HUBER_LR = 0.5, 0.9, 0.01
PER_STEP = 469  # updates per step: an epoch of 938 has 2 steps


def rows(quick: bool) -> list[Row]:
    """The rows of mini-batches."""
    work = "{:,} digits, batches of 64, every loss in TensorBoard"
    size = {"rows": MNIST, "epochs": 1 if quick else 3}
    epochs = 3 if quick else 20  # of 938 updates: checks at 0, 1, 10, 100, and every 1,000th
    few = {**size, "rows": 6_000 if quick else MNIST}
    ours, lightning = partial(mini_batches, **size), partial(lightning_tensors, **few)
    sides = {
        "minibatch": (
            Side("fit", ours),
            Side("bare explicit loop", partial(explicit_loop, **size), at_most=1.5),
            Side("bare autograd loop", partial(autograd_loop, **size)),
        ),
        "lightning": (
            Side("fit", partial(mini_batches, **few)),
            Side("Lightning + TensorDataset", lightning, faster=15),
            Side("the same, each 50th loss", partial(lightning, every=50)),
            Side("Lightning + torchvision", partial(lightning_torchvision, **few), faster=60),
        ),
        "huber": (
            Side("fit", partial(mini_batches, **size, make=make_huber)),
            Side("bare explicit loop", partial(huber_loop, **size), at_most=1.6),
        ),
        "sgdregressor": (
            Side("fit, batches of 64", partial(ours, quality=accuracy)),
            # The accuracy of 0.88 moves by 0.01 from one order of the rows to another.
            Side("SGDRegressor, row by row", partial(sgd_regressor, **size), tolerance=0.02),
        ),
        "check-minibatch": (
            Side("with GradientCheck", partial(ours, epochs=epochs, check=True)),
            Side("without", partial(ours, epochs=epochs), at_most=1.05, tolerance=0.0),
        ),
    }
    each = partial(lightning_tensors, rows=6_400, epochs=1)
    sides["check-each"] = (
        Side("GradientCheck at each update", partial(each, check=True)),
        Side("without", each, at_most=26, tolerance=0.0),  # a check takes 25 updates
    )
    works = {
        "check-each": "plain Lightning, 6,400 digits, batches of 64",
        "minibatch": work.format(MNIST),
        "lightning": work.format(few["rows"]),
        "huber": "the same with a user's formula (Huber), momentum, clipping",
        "sgdregressor": f"{MNIST:,} digits, epochs of SGD, to the same accuracy",
        "check-minibatch": f"{MNIST:,} digits, batches of 64, {epochs} epochs, GradientCheck",
    }
    return [Row(name, works[name], s, "s/epoch", digits=True) for name, s in sides.items()]


class Huber(GradientDescentModule):
    """The README's model: L = 1/N Σ h(r): r²/2 for |r| ≤ 1, |r| − ½ beyond."""

    def __init__(self, num_features: int = 784, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = nn.Parameter(torch.zeros(num_features))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """ŷ = x w + b."""
        return x @ self.weight + self.bias

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """L = 1/N Σ h(r)."""
        return nn.functional.huber_loss(self(x), y)

    def gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """∂L/∂w = 1/N xᵀ h'(r) and ∂L/∂b = 1/N Σ h'(r)."""
        slope = (self(x) - y).clamp(-1, 1)
        return {"weight": slope @ x / len(y), "bias": slope.mean()}


def make_huber() -> Huber:
    """With momentum and clipping."""
    return Huber(lr=HUBER_LR, momentum=MOMENTUM, gradient_clip_val=LIMIT)


def make_parity() -> ParityRegressor:
    """Plain SGD."""
    return ParityRegressor(lr=LR)


def mini_batches(
    job: Job,
    rows: int,
    epochs: int,
    make: Callable[[], Any] = make_parity,
    check: bool = False,
    quality: Callable[..., np.ndarray] | None = None,
) -> Prepared:
    """Ours: `fit` without test curve; the weights must agree, or `quality`, off the clock."""
    data = digits(job, rows, batch_size=BATCH, updates_per_step=PER_STEP)
    warm(data)

    def run() -> Run:
        start, callbacks = time.perf_counter(), [GradientCheck()] if check else []
        model = fit(make(), data, job, *callbacks, max_epochs=epochs)
        seconds, found = time.perf_counter() - start, (model.weight, model.bias)
        return Run(quality(data, *found) if quality else weights(*found), epochs, seconds)

    return run


def explicit_loop(job: Job, rows: int, epochs: int) -> Prepared:
    """The formula, updated in place; every loss is kept."""
    x, y = training_rows(job, rows)

    @torch.no_grad()
    def run() -> Run:
        w, b, losses = torch.zeros(x.shape[1]), torch.zeros(()), []
        for epoch in range(epochs):
            for index in order(rows, epoch).split(BATCH):
                batch = x.index_select(0, index)
                r = torch.addmv(b, batch, w) - y.index_select(0, index)
                losses.append(r.dot(r) / len(r))
                scaled = r * (2 / len(r))
                w.sub_(scaled @ batch, alpha=LR)
                b.sub_(scaled.sum(), alpha=LR)
        torch.stack(losses).tolist()
        return Run(weights(w, b), epochs)

    return run


def huber_loop(job: Job, rows: int, epochs: int) -> Prepared:
    """The Huber loss by its formula, with momentum and clipping; every loss is kept."""
    x, y = training_rows(job, rows)

    @torch.no_grad()
    def run() -> Run:
        w, b, losses = torch.zeros(x.shape[1]), torch.zeros(()), []
        velocity_w, velocity_b = torch.zeros_like(w), torch.zeros_like(b)
        for epoch in range(epochs):
            for index in order(rows, epoch).split(BATCH):
                batch, target = x.index_select(0, index), y.index_select(0, index)
                prediction = torch.addmv(b, batch, w)
                losses.append(nn.functional.huber_loss(prediction, target))
                slope = (prediction - target).clamp_(-1, 1).div_(len(index))
                gradient_w, gradient_b = slope @ batch, slope.sum()
                norm = (gradient_w.dot(gradient_w) + gradient_b.square()).sqrt()
                factor = (LIMIT / (norm + 1e-6)).clamp_(max=1.0)
                velocity_w.mul_(MOMENTUM).addcmul_(gradient_w, factor)
                velocity_b.mul_(MOMENTUM).addcmul_(gradient_b, factor)
                w.sub_(velocity_w, alpha=HUBER_LR)
                b.sub_(velocity_b, alpha=HUBER_LR)
        torch.stack(losses).tolist()
        return Run(weights(w, b), epochs)

    return run


def autograd_loop(job: Job, rows: int, epochs: int) -> Prepared:
    """`backward()` and `torch.optim.SGD`; every loss is kept, no graph is."""
    x, y = training_rows(job, rows)

    def run() -> Run:
        model, losses = plain_linear(x.shape[1]), []
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for epoch in range(epochs):
            for index in order(rows, epoch).split(BATCH):
                prediction = model(x.index_select(0, index)).squeeze(1)
                loss = nn.functional.mse_loss(prediction, y.index_select(0, index))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        torch.stack(losses).tolist()
        return Run(weights(model.weight, model.bias), epochs)

    return run


def sgd_regressor(job: Job, rows: int, epochs: int) -> Prepared:
    """scikit-learn's SGD, one row per update."""
    data = digits(job, rows)
    x, y = data.tables["train"].x.numpy(), data.tables["train"].y.numpy()
    settings: dict[str, Any] = {"penalty": None, "tol": None, "random_state": 0}
    settings |= {"learning_rate": "constant", "eta0": 2e-5, "max_iter": epochs}

    def run() -> Run:
        start = time.perf_counter()
        model = SGDRegressor(**settings).fit(x, y)
        seconds = time.perf_counter() - start
        found = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)[0]
        return Run(accuracy(data, *found), epochs, seconds)

    return run
