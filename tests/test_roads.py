"""Both roads make the same updates: the formula by manual optimization, and autograd."""

import pytest
import torch

from lightning_gd import LinearRegression, ParityRegressor, PointsData
from lightning_gd.data.tensors import Table, TensorDataModule

# Updates of size lr·gradient in float64 differ between the roads by the rounding of a sum over
# at most 50 rows; 60 updates that contract keep that below 1e-12 of weights of order 1.
CLOSE = {"rtol": 0, "atol": 1e-12}


class RandomRows(TensorDataModule):
    """23 rows with 3 features and noise."""

    dtype = torch.float64

    def load(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(23, 3, generator=generator, dtype=torch.float64)
        y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3
        y += 0.1 * torch.randn(23, generator=generator, dtype=torch.float64)
        x, y = x.to(self.dtype), y.to(self.dtype)
        return {"train": Table(x, y), "test": Table(x[:7], y[:7])}


def train(trainer, gradient, data, steps=60, **settings):
    with trainer.init_module():
        model = LinearRegression(
            num_features=3, start="uniform", gradient=gradient, lr=0.02, **settings
        )
    trainer.fit(model, datamodule=RandomRows(**data))
    assert trainer.global_step == steps
    return torch.cat([model.weight.data, model.bias.data.view(1)])


SETTINGS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "clip norm": {"momentum": 0.5, "gradient_clip_val": 0.5},
    "clip value": {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"},
    "adam": {"optimizer": "Adam"},
    "nesterov": {"momentum": 0.9, "optimizer_args": {"nesterov": True}},
    "schedule by update": {
        "scheduler": "StepLR",
        "scheduler_args": {"step_size": 7, "gamma": 0.7},
        "scheduler_interval": "update",
    },
    "schedule by epoch": {
        "scheduler": "ExponentialLR",
        "scheduler_args": {"gamma": 0.8},
        "momentum": 0.3,
    },
    "plateau": {
        "scheduler": "ReduceLROnPlateau",
        "scheduler_args": {"patience": 0, "threshold": 0.5, "factor": 0.5},
    },
}
DATA = {
    "full batch": {"passes_per_epoch": 20},
    "mini-batches": {"batch_size": 8},
    "validation": {"batch_size": 5, "num_val": 4},
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_roads_agree(make_trainer, settings, data):
    explicit = train(make_trainer(max_steps=60), "explicit", data, **settings)
    autograd = train(make_trainer(max_steps=60), "autograd", data, **settings)
    single = train(make_trainer(max_steps=60), "explicit", data, updates_per_step=1, **settings)
    torch.testing.assert_close(explicit, autograd, **CLOSE)
    torch.testing.assert_close(explicit, single, rtol=0, atol=0)


def test_settings_change_the_run(make_trainer):
    ends = [
        train(make_trainer(max_steps=60), "explicit", {"batch_size": 8}, **s)
        for s in SETTINGS.values()
    ]
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert (one - other).abs().max() > 1e-6


def test_accumulation_of_equal_batches_is_the_larger_batch(make_trainer):
    # 23 − 3 validation rows: 4 batches of 5 rows, two of them an update
    data = {"batch_size": 5, "num_val": 3}
    explicit = train(
        make_trainer(max_steps=20), "explicit", data, 20, accumulate_grad_batches=2, momentum=0.9
    )
    autograd = train(
        make_trainer(max_steps=20, accumulate_grad_batches=2), "autograd", data, 20, momentum=0.9
    )
    larger = train(
        make_trainer(max_steps=20), "explicit", {"batch_size": 10, "num_val": 3}, 20, momentum=0.9
    )
    torch.testing.assert_close(explicit, autograd, **CLOSE)
    torch.testing.assert_close(explicit, larger, **CLOSE)


def test_accumulation_of_unequal_batches_divides_once(make_trainer):
    # 8, 8 and 7 rows in one update: the full batch, exactly
    accumulated = train(
        make_trainer(max_steps=20), "explicit", {"batch_size": 8}, 20, accumulate_grad_batches=3
    )
    full = train(make_trainer(max_steps=20), "explicit", {}, 20)
    torch.testing.assert_close(accumulated, full, **CLOSE)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_precisions(make_trainer, precision, gradient):
    trainer = make_trainer(max_steps=200, precision=precision)
    with trainer.init_module():
        model = LinearRegression(gradient=gradient, lr=0.05, momentum=0.5)
    trainer.fit(model, datamodule=PointsData(passes_per_epoch=200))
    assert model.weight.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    # bfloat16 predictions carry 8 bits: 2 % on the autograd road; the formula keeps float32.
    tolerance = 0.02 if (precision, gradient) == ("bf16-mixed", "autograd") else 1e-3
    assert abs(model.weight.item() - 2) < 2 * tolerance
    assert abs(model.bias.item()) < 6 * tolerance


def test_a_frozen_bias_stays(make_trainer):
    for gradient in ("explicit", "autograd"):
        trainer = make_trainer(max_steps=100)
        with trainer.init_module():
            model = LinearRegression(bias=False, gradient=gradient, lr=0.01)
        trainer.fit(model, datamodule=PointsData(y=[3, 5, 7, 9]))
        assert model.bias.item() == 0 and model.bias.grad is None
        # w* without bias is Σxy / Σx²; the error shrinks by 1 − 0.01·15 an update
        w = (3 + 10 + 21 + 36) / 30
        assert model.weight.item() == pytest.approx(w * (1 - 0.85**100), rel=1e-12)


def test_checkpoints_serve_either_road(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=5)
    with trainer.init_module():
        model = ParityRegressor(num_features=3, gradient="explicit")
    trainer.fit(model, datamodule=RandomRows())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = ParityRegressor.load_from_checkpoint(tmp_path / "model.ckpt", gradient="autograd")
    assert other.hparams["gradient"] == "autograd"
    torch.testing.assert_close(other.weight.double(), model.weight, rtol=1e-6, atol=0)
