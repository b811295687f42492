"""What the lessons share: a number of a notebook beside ours, and a training that is recorded."""

from __future__ import annotations

import logging
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no banner
warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # inside Lightning
warnings.filterwarnings("ignore", message=".*available but not used")  # a GPU
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")  # no screen


class Check(NamedTuple):
    """The verdict of one call of `check`; `same` of its `numbers` have every printed digit."""

    experiment: str
    numbers: int
    same: int
    verdict: str  # agrees, DIFFERS or needs data


class Differs(AssertionError):
    """A lesson in which a number is not that of the notebook."""


CHECKS: list[Check] = []


def check(name: str, ours: Any, printed: Any, rounding: Any = 0.0, *, needs: str = "") -> None:
    """Compare our numbers with those that the notebook printed: show both, and record the verdict.

    They agree where |ours − printed| ≤ ½ unit of the last printed digit + rounding. A ✓ stands
    for numbers that are the same in every printed digit.

    Args:
        name: The experiment, a space, and the quantity.
        ours: A number, array or tensor.
        printed: The same numbers: text where the notebook rounds them (`"1.200 1.680"`; a band
            is `"4.33–5.25"`), numbers or True where it prints them in full (½ unit is then 0).
        rounding: Bound on the rounding errors of float32 in these numbers, derived at the call.
        needs: What is missing here for a verdict, such as the full MNIST.
    """
    values = np.ravel(ours.tolist() if isinstance(ours, Tensor) else ours).tolist()
    words: list[Any] = printed.split() if isinstance(printed, str) else np.ravel(printed).tolist()
    pairs = list(zip(words, values, strict=False))
    shown, gaps = [_as(*pair) for pair in pairs], [_gap(*pair) for pair in pairs]
    bounds = np.broadcast_to(rounding, len(gaps)) + [_half_unit(word) for word, _ in pairs]
    agrees = len(words) == len(values) and bool(np.all(np.array(gaps) <= bounds))
    verdict = "needs data" if needs else "agrees" if agrees else "DIFFERS"
    same = sum(w in (text, v) for (w, v), text in zip(pairs, shown, strict=True))
    CHECKS.append(Check(name.split()[0], len(words), same, verdict))
    if same == len(values) and verdict == "agrees":
        print(f"{name}: {_line(words)}  ✓")
    else:
        print(f"{name}: {_line(shown)}\n    expected: {_line(words)}")
        print(f"    {verdict}: {needs or f'{np.max(gaps):.1g} apart'}")


def loss_rounding(losses: Any, error: float = 2.0**-21) -> np.ndarray:
    """Return the bound 2 √L δ on what an error δ of each residual does to a mean of squares L.

    By default δ = 2⁻²¹: so far apart are the float32 numbers from 4 to 8.
    """
    return 2 * np.sqrt(losses) * error


def conclude(lesson: str) -> None:
    """End a lesson: raise `Differs` if a number of it is not that of the notebook."""
    wrong = [c.experiment for c in CHECKS if c.verdict == "DIFFERS"]
    if wrong:
        raise Differs(f"lesson {lesson} differs in {', '.join(dict.fromkeys(wrong))}")
    print(f"lesson {lesson}: no number differs from the notebook's")


def _line(words: list[Any]) -> str:
    """Return the first ten of them."""
    return " ".join([*map(str, words[:10]), *["…"] * (len(words) > 10)])


def _gap(word: Any, value: float) -> float:
    """Return |ours − printed|, or the distance from a band."""
    low, _, high = str(word).partition("–") if isinstance(word, str) else (word, "", "")
    return max(float(low) - value, value - float(high or low), 0.0)


def _half_unit(word: Any) -> float:
    return 0.5 * 10.0 ** -_decimals(word) if isinstance(word, str) else 0.0


def _decimals(word: str) -> int:
    return len(word.partition("–")[0].partition(".")[2])


def _as(word: Any, value: Any) -> str:
    """Write our number with the digits of the printed one."""
    return f"{value:.{_decimals(word)}f}" if isinstance(word, str) else f"{value:.9g}"


class Run(NamedTuple):
    """A training: what held before each update; of the weights also after the last."""

    losses: np.ndarray  # shape [updates]
    weights: np.ndarray  # shape [updates + 1], or [updates + 1, D]
    gradients: np.ndarray  # shape [updates], or [updates, D]


class _Trace(Callback):
    def __init__(self) -> None:
        self.weights: list[Any] = []
        self.gradients: list[Any] = []

    def on_before_optimizer_step(self, trainer: Trainer, model: Any, optimizer: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.weights.append(model.weight.tolist())
        self.gradients.append(model.weight.grad.tolist())

    def on_train_end(self, trainer: Trainer, model: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.weights.append(model.weight.tolist())


def train(model: Any, data: Any, updates: int, *callbacks: Callback) -> Run:
    """Train by Lightning's Trainer on the CPU, in the precision of the model, and record it."""
    trace, data.passes_per_epoch = _Trace(), updates
    trainer = Trainer(
        max_steps=updates,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        precision="64-true" if model.weight.dtype == torch.float64 else "32-true",
        callbacks=[trace, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    losses = np.array(model.curves.history["train/loss"][1])
    return Run(losses, np.squeeze(trace.weights), np.squeeze(trace.gradients))


def train_layer(layer: nn.Linear, rows: Tensor, targets: Tensor, lr: float, updates: int) -> Run:
    """Train by the loop that torch programs write: predict, loss, `backward`, step."""
    losses, weights, gradients = [], [layer.weight.tolist()], []
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for _ in range(updates):
        loss = nn.functional.mse_loss(layer(rows), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append(layer.weight.tolist())
        gradients.append(layer.weight.grad.tolist())  # pyright: ignore[reportOptionalMemberAccess]
    return Run(np.array(losses), np.squeeze(weights), np.squeeze(gradients))
