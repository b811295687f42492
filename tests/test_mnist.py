"""The full MNIST: figures that anybody can look up again, on all roads."""

import os
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_gd import MNISTParityData, ParityRegressor
from lightning_gd.callbacks.curvature_report import CurvatureReport
from lightning_gd.callbacks.pictures import CurveMemory

ROOT = os.environ.get("MNIST_ROOT")
pytestmark = pytest.mark.skipif(
    ROOT is None, reason="MNIST_ROOT is not set: the folder that holds MNIST/raw"
)


@pytest.fixture(scope="module")
def digits():
    """All 60,000 and 10,000 digits, read once."""
    data = MNISTParityData(source="torchvision", root=ROOT or "", passes_per_epoch=100)
    data.setup()
    return data


def train(
    digits, updates=1000, memory=None, callbacks=(), precision: Any = "32-true", **settings: Any
):
    data = MNISTParityData(source="torchvision", root=ROOT or "", passes_per_epoch=100)
    data.tables = digits.tables
    trainer = Trainer(
        max_steps=updates,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        precision=precision,
        logger=memory or False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    with trainer.init_module():
        model = ParityRegressor(lr=0.002, **settings)
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    return model, metrics


ROADS = {
    "moments": {"moments": True},
    "explicit": {"gradient": "explicit"},
    "autograd": {"gradient": "autograd"},
}


@pytest.mark.parametrize(
    "road",
    [road if road == "moments" else pytest.param(road, marks=pytest.mark.slow) for road in ROADS],
)
def test_a_thousand_full_batch_updates(digits, road):
    _, metrics = train(digits, **ROADS[road])
    # the bands allow for float32 on another machine
    assert metrics["test/loss"] == pytest.approx(0.3930, abs=0.001)
    assert metrics["test/accuracy"] == pytest.approx(0.8916, abs=0.002)
    assert metrics["test/majority_accuracy"] == pytest.approx(0.5074, abs=1e-4)


def test_the_exact_optimum(digits):
    optimum = digits.moments("train").optimum()
    assert optimum.loss.item() == pytest.approx(0.38079, abs=2e-5)
    table = digits.tables["test"]
    scores = table.x.double() @ optimum.weight + optimum.bias
    accuracy = ((scores > 0) == (table.y > 0)).double().mean().item()
    assert accuracy == pytest.approx(0.894, abs=0.001)


def test_the_predicted_curve_on_digits(digits):
    """On the first 2,000 digits in float64, with momentum, by the formula."""
    few = MNISTParityData(source="torchvision", root=ROOT or "", num_train=2000, num_test=1000)
    few.setup()
    memory = CurveMemory()
    train(
        few,
        100,
        memory,
        [CurvatureReport()],
        precision="64-true",
        momentum=0.5,
    )
    for part in ("train", "test"):
        predicted = torch.tensor(memory[f"predicted/{part}/loss"][1], dtype=torch.float64)
        measured = torch.tensor(memory[f"{part}/loss"][1], dtype=torch.float64)
        torch.testing.assert_close(predicted[:100], measured[:100], rtol=1e-9, atol=0)
