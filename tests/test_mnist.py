"""The full MNIST: figures that anybody can look up again, in both modes and from moments."""

import os

import pytest
import torch
import torchvision

from lightning_gd import MNISTParityData, ParityRegressor

ROOT = os.environ.get("MNIST_ROOT")
pytestmark = pytest.mark.skipif(
    ROOT is None, reason="MNIST_ROOT is not set: the folder that holds MNIST/raw"
)


def digits(**settings):
    settings = {"source": "torchvision", "root": ROOT or "", "passes_per_epoch": 100, **settings}
    return MNISTParityData(updates_per_step=50, **settings)


@pytest.fixture(scope="module")
def tables():
    """All 60,000 and 10,000 digits, read once."""
    data = digits()
    data.setup()
    return data.tables


def test_the_digits_are_those_of_torchvision(tables):
    assert [len(tables[part]) for part in ("train", "test")] == [60_000, 10_000]
    reference = torchvision.datasets.MNIST(ROOT or "")
    assert torch.equal(tables["train"].raw, reference.data.flatten(1))
    assert torch.equal(tables["train"].y, reference.targets % 2 * 2.0 - 1)
    # Mean and deviation of the training pixels are the constants of `standard`, to 4 digits.
    x = tables["train"].raw.double() / 255
    assert x.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert x.std().item() == pytest.approx(0.3081, abs=5e-5)


@pytest.mark.parametrize(
    "moments, gradient",
    [
        (True, "explicit"),
        pytest.param(False, "explicit", marks=pytest.mark.slow),
        pytest.param(False, "autograd", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_a_thousand_full_batch_updates(make_trainer, tables, moments, gradient):
    data = digits(moments=moments)
    data.tables = tables
    trainer = make_trainer(max_steps=1000, precision="32-true")
    model = ParityRegressor(lr=0.002, gradient=gradient)
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    # the bands allow for float32 on another machine
    assert metrics["test/loss"] == pytest.approx(0.3930, abs=0.001)
    assert metrics["test/accuracy"] == pytest.approx(0.8916, abs=0.002)
    assert metrics["test/majority_accuracy"] == pytest.approx(0.5074, abs=1e-4)


def test_the_exact_optimum(tables):
    optimum = tables["train"].moments().optimum()
    assert optimum.loss.item() == pytest.approx(0.38079, abs=2e-5)
    scores = tables["test"].x.double() @ optimum.weight + optimum.bias
    accuracy = ((scores > 0) == (tables["test"].y > 0)).double().mean().item()
    assert accuracy == pytest.approx(0.894, abs=0.001)
