"""A loss that becomes infinite or NaN ends the run: where, why, and with what left."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fit, run, trainer_words

from lightning_gd import CurvatureReport, LinearRegression, PointsData, RunCheckpoint
from lightning_gd.settings import DivergenceError
from reference import gradient_descent

X, Y = [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]
MOST = 1500  # updates
STEEP = 15  # 2/N Σx²: the curvature of these points
WAYS = {  # settings of the model and of the data
    "steps of 50 updates": ({}, {"updates_per_step": 50}),
    "single updates": ({}, {}),
    "moments": ({}, {"moments": True, "updates_per_step": 50}),
    "autograd": ({"gradient": "autograd"}, {}),
}


def first_bad(lr, momentum, dtype: Any = np.float64, summed=True):
    """The number of updates after which the notebooks' loop has a loss beyond this dtype.

    A mean is summed up before it is divided, so that it overflows at max/N; moments have no sum.
    """
    with np.errstate(all="ignore"):
        x, y = np.array(X, np.longdouble), np.array(Y, np.longdouble)
        losses = gradient_descent(x, y, lr=lr, steps=MOST, momentum=momentum).losses
    largest = np.longdouble(np.finfo(dtype).max) / (len(X) if summed else 1)
    return int((losses > largest).argmax())


def diverge(trainer, data, model=LinearRegression, **settings):
    with pytest.raises(DivergenceError) as error:
        fit(trainer, PointsData(x=X, y=Y, **data), model, bias=False, **settings)
    return str(error.value)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("lr, momentum", [(0.16, 0.0), (1.0, 0.9)])
@pytest.mark.parametrize("way", WAYS)
def test_the_update_is_that_of_the_loop(make_trainer, capsys, way, lr, momentum, precision):
    settings, data = WAYS[way]
    trainer = make_trainer(max_steps=MOST, precision=precision, callbacks=[CurvatureReport()])
    data = {"passes_per_epoch": MOST, **data}
    message = diverge(trainer, data, lr=lr, momentum=momentum, **settings)
    dtype = np.float64 if precision == "64-true" else np.float32
    updates = first_bad(lr, momentum, dtype, summed=way != "moments")
    assert 5 < updates < MOST
    loss, said = re.findall(r"diverged: the loss is (\w+) after (\d+) updates", message)[0]
    assert loss in ("inf", "nan") and int(said) == updates
    stable = 2 * (1 + momentum) / STEEP
    assert f"at lr {lr:g} (the largest stable rate of full-batch SGD is {stable:.4g})" in message
    assert message.endswith("; no checkpoint was written")
    # Noticed before the next update, or at the end of its step.
    assert updates <= trainer.global_step <= updates + data.get("updates_per_step", 1)


@pytest.mark.parametrize("data", [{"passes_per_epoch": MOST}, {"batch_size": 3}], ids=str)
@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_the_last_finite_checkpoint_is_named_and_none_comes_after(
    make_trainer, tmp_path, gradient, data
):
    keep = RunCheckpoint(str(tmp_path / "kept"), every_n_updates=5)
    trainer = make_trainer(max_steps=MOST, callbacks=[keep], enable_checkpointing=True)
    message = diverge(trainer, data, lr=0.7, gradient=gradient)
    (said,) = re.findall(r"after (\d+) updates", message)
    last = tmp_path / "kept" / "last.ckpt"
    assert message.endswith(f"at lr 0.7; the last finite checkpoint is {last}")
    assert torch.load(last, weights_only=True)["global_step"] == int(said) // 5 * 5
    for file in last.parent.iterdir():
        weights = torch.load(file, weights_only=True)["state_dict"].values()
        assert all(weight.isfinite().all() for weight in weights)


def test_a_weight_that_overflows_before_the_loss(make_trainer):
    """At a loss of 1e308 a weight may be the first to go, by a rate that no loss has yet seen."""
    message = diverge(make_trainer(max_steps=2), {"passes_per_epoch": 2}, lr=1e308)
    assert "diverged: a weight is not finite after 1 updates at lr 1e+308" in message


class Quartic(LinearRegression):
    def loss(self, x, y):
        return (self(x) - y).pow(4).mean()

    def gradients(self, x, y):
        return {"weight": 4 * ((self(x) - y) ** 3 @ x) / len(y)}


@pytest.mark.parametrize(
    "model, lr, words", [(LinearRegression, 9.0, "stable"), (Quartic, 1.0, "1; no")]
)
def test_only_least_squares_has_a_largest_stable_rate(make_trainer, capsys, model, lr, words):
    trainer = make_trainer(max_steps=MOST, callbacks=[CurvatureReport()])
    args = {"maximize": model is LinearRegression}  # known whatever the optimizer does
    message = diverge(trainer, {"passes_per_epoch": MOST}, model, lr=lr, optimizer_args=args)
    assert f"updates at lr {lr:g}" in message and words in message


LINE = ["--config", "linear", "--model.lr", "0.5"]


@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_the_exit_status_is_3(tmp_path, gradient):
    where = trainer_words(default_root_dir=tmp_path)
    status, out, err = run(*LINE, "--model.gradient", gradient, *where)
    updates = first_bad(0.5, 0.0, np.float32)
    assert status == 3 and err.startswith(f"error: diverged: the loss is inf after {updates} upda")
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    assert "WARNING: lr 0.5 diverges" in out and not list(tmp_path.rglob("*.ckpt"))


def test_every_process_stops_alike(forge, tmp_path):
    """Three rows on two processes, a checkpoint every 5 updates: both end, and name the same."""
    many = trainer_words(accelerator="cpu", strategy="ddp", devices=2, default_root_dir=tmp_path)
    rows = ["--data.x", "[1, 2, 3]", "--data.y", "[2, 4, 6]", "--data.updates_per_step", "5"]
    rest = ["--checkpoint.every_n_updates", "5"]
    statuses, output = forge.run([*LINE, *many, *rows, *rest], world=2)
    first, second = re.findall("^error: .*", output, re.M)
    assert statuses == [3, 3] and first == second
    assert first.startswith("error: diverged: the loss is inf after ")
    (last,) = tmp_path.rglob("last.ckpt")
    assert first.endswith(f"; the last finite checkpoint is {last}")
    assert torch.load(last, weights_only=True)["state_dict"]["weight"].isfinite().all()
