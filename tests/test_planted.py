"""Planted mistakes are caught and named; the same modules without them pass."""

import json
import random
import warnings
from typing import Any

import pytest
import torch
from conftest import counted
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import planted
from lightning_gd import check_gradients
from lightning_gd.callbacks.gradient_check import GradientCheck
from planting import mistakes
from planting.finding import find, loss_of_batch, make_trainer
from planting.functions import Drop, Product
from planting.mistakes import MISTAKES, Mistake
from planting.modules import KINDS, Batches, Line, Manual, draw

PRECISIONS = ["32-true", "64-true", "bf16-mixed"]
WAYS = {  # of the Trainer, or of a GradientDescentModule
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 0.1},
}


def fit(module, kind, precision="32-true", updates=7, every=5, size=4, rows=8, seed=0, **settings):
    """Train with a check that raises; its number of checks."""
    loss = None if module.automatic_optimization or kind == "formula" else loss_of_batch
    check = GradientCheck(every, loss=loss)
    trainer = make_trainer(precision, callbacks=[check], max_steps=updates, **settings)
    count = updates * settings.get("accumulate_grad_batches", 1)
    if kind == "formula":
        count = updates * module.batches_per_update
    trainer.fit(module, Batches(draw(KINDS[kind].draw, count, rows, size, seed)))
    return check


def build(kind, precision="32-true", **settings):
    module = KINDS[kind].module(**settings)
    return module.double() if precision == "64-true" else module


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.kind}: {m.name}")
def test_a_mistake_is_caught_and_named(mistake):
    found = find(mistake)
    assert found.update == mistake.update, found.message
    assert mistake.words in found.named
    if mistake.function and mistake.kind not in ("formula", "residual"):
        assert mistake.function in found.named or "p.grad" in found.message


def test_names_are_unique():
    names = [(m.kind, m.name) for m in MISTAKES]
    assert len(set(names)) == len(names) >= 28


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mistake_nothing_is_found(kind, precision, way):
    if kind == "manual" and way != "plain":
        return  # Lightning does neither of both
    torch.manual_seed(1)
    settings = WAYS[way] if kind == "formula" else {}
    module = build(kind, precision, **settings)
    with warnings.catch_warnings():  # the convolution network has a dropout of its own
        warnings.filterwarnings("ignore", message=".*in float64: the loss draws random numbers")
        check = fit(module, kind, precision, **({} if kind == "formula" else WAYS[way]))
    assert check.summary() == "4 checks, all parameters tested"


class Thirds(Manual):
    """Three parts of unequal size: their products in bfloat16 round otherwise than the whole."""

    def training_step(self, batch):
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for part in zip(*(t.split([4, 3, 1]) for t in batch), strict=True):
            self.manual_backward(len(part[0]) / 8 * self.loss(*part))
        optimizer.step()


class Noisy(Line):
    """Predicts from random numbers, which are others in float64."""

    def loss(self, x, y):
        x = x + torch.randn(len(x), self.size) + torch.empty_like(x).uniform_()
        return super().loss(x, y)


class Dropped(Line):
    """Drops by a hand-written Function and by PyTorch's."""

    def loss(self, x, y):
        x = Product.apply(F.dropout(x), self.weight, self.bias, self.plant)
        return F.mse_loss(Drop.apply(F.dropout(x), self.plant), y)


class Checkpointed(Dropped):
    """Computes the loss again in backward."""

    def loss(self, x, y):
        return checkpoint(super().loss, x, y, use_reentrant=False)


class CheckpointedRandom(Line):
    """Draws again in backward what a mask in float64 differs from."""

    def loss(self, x, y):
        return checkpoint(self.dropped, x, y, use_reentrant=False)

    def dropped(self, x, y):
        x = Product.apply(x, self.weight, self.bias, self.plant)
        return F.mse_loss(Drop.apply(x, self.plant).tanh(), y)


class Sampled(Line):
    """Draws a sample through which the gradient passes."""

    def loss(self, x, y):
        return F.mse_loss(F.gumbel_softmax(Product.apply(x, self.weight, self.bias, self.plant)), y)


class Float32(Line):
    """Keeps numbers where no copy in float64 finds them."""

    def __init__(self):
        super().__init__()
        self.kept = [torch.ones(4, 4)]

    def loss(self, x, y):
        return super().loss(x @ self.kept[0], y)


RIGHT = [Thirds, Noisy, Dropped, Checkpointed, CheckpointedRandom, Sampled, Float32]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("module", RIGHT)
def test_no_false_alarm(module, precision):
    if precision == "64-true" and module is Float32:
        return
    torch.manual_seed(0)
    right = module().double() if precision == "64-true" else module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GradientCheck: ")
        check = fit(right, "manual" if module is Thirds else "linear", precision)
    assert check.checks == 4


def test_what_cannot_be_compared_in_float64_is_said():
    with pytest.warns(UserWarning, match="not compared in float64: the loss draws random"):
        fit(Sampled(), "linear")


def test_the_command_prints_a_table_and_its_exit_status(monkeypatch, capsys):
    assert planted.main(["--only", "softmax overflow"]) == 0
    assert "1 of 1 caught" in capsys.readouterr().out
    assert planted.main(["--only", "manual", "--markdown"]) == 0
    assert "3 of 3 caught" in capsys.readouterr().out
    right = [Mistake("none", 0, "", "linear"), MISTAKES[0]]
    monkeypatch.setattr(mistakes, "MISTAKES", right)
    assert planted.main(["--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["update"] for row in rows] == [None, 0]
    assert rows[1]["gradcheck"] is rows[1]["bfloat16"] is rows[1]["direction"] is True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_mistakes_are_caught_from_any_start(seed):
    for mistake in MISTAKES:
        with counted("planted mistakes caught at their update"):
            found = find(mistake, seed)
            assert found.update == mistake.update, (mistake.name, found.message)
            assert mistake.words in found.named


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GradientCheck. p.grad was not compared in float64")
@pytest.mark.parametrize("kind", KINDS)
def test_random_right_cases_pass(kind):
    """Sizes, precisions, seeds, scales of the loss, accumulated batches: no false alarm."""
    for seed in range(200):
        source = random.Random(f"{kind} {seed}")
        size, rows = source.randint(3, 7), 2 * source.randint(2, 8)
        precision, every = source.choice(PRECISIONS), source.choice([1, 2, 3])
        torch.manual_seed(seed)
        settings = {"scale": 10 ** source.uniform(-3, 3)} if kind != "manual" else {}
        if kind == "formula":
            settings = {"accumulate_grad_batches": every}
        module = build(kind, precision, size=size, **settings)
        with counted("right cases without a false alarm"):
            if seed % 2 and kind not in ("manual", "formula"):
                (batch,) = draw(KINDS[kind].draw, 1, rows, size, seed)
                report = check_gradients(module.double(), batch, seed=seed)
                assert report.ok, (kind, seed, report.lines())
            else:
                more = {} if kind in ("formula", "manual") else {"accumulate_grad_batches": every}
                fit(module, kind, precision, 2, 5, size, rows, seed, **more)
