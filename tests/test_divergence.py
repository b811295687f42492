"""A loss that becomes infinite or NaN ends the run: where, why, and with what left."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import LIGHTNINGS, SCRIPT, run
from test_distributed import launch

from lightning_gd import LinearRegression, PointsData
from lightning_gd.checkpoints import RunCheckpoint
from lightning_gd.data.tensors import MOST_UPDATES
from lightning_gd.reference import gradient_descent
from lightning_gd.refusals import DivergenceError

X, Y = [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]
MOST = 1500  # updates
STEEP = 15  # 2/N Σx²: the curvature of these points
ROADS = {
    "blocks": {},
    "single updates": {"updates_per_step": 1},
    "moments": {"moments": True},
    "autograd": {"gradient": "autograd"},
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


def diverge(trainer, passes=MOST, data=None, **settings):
    with trainer.init_module():
        model = LinearRegression(bias=False, **settings)
    with pytest.raises(DivergenceError) as error:
        trainer.fit(
            model, datamodule=PointsData(x=X, y=Y, **(data or {"passes_per_epoch": passes}))
        )
    return str(error.value)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("lr, momentum", [(0.5, 0.0), (0.16, 0.0), (1.0, 0.9)])
@pytest.mark.parametrize("road", ROADS)
def test_the_update_is_that_of_the_loop(make_trainer, road, lr, momentum, precision):
    trainer = make_trainer(max_steps=MOST, precision=precision)
    message = diverge(trainer, lr=lr, momentum=momentum, **ROADS[road])
    double = precision == "64-true"
    dtype = np.float64 if double else np.float32
    updates = first_bad(lr, momentum, dtype, summed=road != "moments")
    assert 5 < updates < MOST
    loss, said = re.findall(r"diverged: the loss is (\w+) after (\d+) updates", message)[0]
    assert loss in ("inf", "nan") and int(said) == updates
    stable = 2 * (1 + momentum) / STEEP
    assert f"at lr {lr:g} (the largest stable rate of full-batch SGD is {stable:.4g})" in message
    assert message.endswith("; no checkpoint was written")
    # Noticed before the next update, or at the end of its block.
    most = 1 if road in ("single updates", "autograd") else MOST_UPDATES
    assert updates <= trainer.global_step <= updates + most


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_just_below_the_largest_stable_rate_nothing_is_stopped(make_trainer, momentum):
    trainer = make_trainer(max_steps=500)
    with trainer.init_module():
        model = LinearRegression(
            bias=False, lr=0.99 * 2 * (1 + momentum) / STEEP, momentum=momentum
        )
    trainer.fit(model, datamodule=PointsData(passes_per_epoch=500))
    assert trainer.global_step == 500 and abs(model.weight.item() - 2) < 1e-2


@pytest.mark.parametrize("data", [{"passes_per_epoch": MOST}, {"batch_size": 3}], ids=str)
@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_the_last_finite_checkpoint_is_named_and_none_comes_after(
    make_trainer, tmp_path, gradient, data
):
    keep = RunCheckpoint(str(tmp_path / "kept"), every_n_updates=5)
    trainer = make_trainer(max_steps=MOST, callbacks=[keep], enable_checkpointing=True)
    message = diverge(trainer, data=data, lr=0.7, gradient=gradient)
    (said,) = re.findall(r"after (\d+) updates", message)
    last = tmp_path / "kept" / "last.ckpt"
    assert message.endswith(f"; the last finite checkpoint is {last}")
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == int(said) // 5 * 5
    for file in last.parent.iterdir():
        weights = torch.load(file, weights_only=True)["state_dict"].values()
        assert all(weight.isfinite().all() for weight in weights)


def test_a_weight_that_overflows_before_the_loss(make_trainer):
    """At a loss of 1e308 a weight may be the first to go, by a rate that no loss has yet seen."""
    message = diverge(make_trainer(max_steps=2), passes=2, lr=1e308, updates_per_step=1)
    assert "diverged: a weight is not finite after 1 updates at lr 1e+308" in message


def test_another_loss_has_no_largest_stable_rate(make_trainer):
    message = diverge(make_trainer(max_steps=MOST), lr=9.0, optimizer_args={"maximize": True})
    assert "stable" in message  # least squares: known whatever the optimizer does

    class Cubic(LinearRegression):
        def loss(self, x, y):
            return (self(x) - y).pow(4).mean()

        def gradients(self, x, y):
            return {"weight": 4 * ((self(x) - y) ** 3 @ x) / len(y), "bias": x.new_zeros(())}

    trainer = make_trainer(max_steps=MOST)
    with trainer.init_module():
        model = Cubic(bias=False, lr=1.0)
    with pytest.raises(DivergenceError, match="updates at lr 1; no checkpoint"):
        trainer.fit(model, datamodule=PointsData(passes_per_epoch=MOST))


LINE = ["--config", "linear", "--model.lr", "0.5", "--trainer.enable_progress_bar", "false"]


@pytest.mark.filterwarnings(LIGHTNINGS)
@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_the_exit_status_is_3(tmp_path, gradient):
    words = [*LINE, "--model.gradient", gradient, "--trainer.default_root_dir", tmp_path]
    status, out, err = run(*words)
    updates = first_bad(0.5, 0.0, np.float32)
    assert status == 3 and err.startswith(f"error: diverged: the loss is inf after {updates} upda")
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    assert "WARNING: lr 0.5 diverges" in out and not list(tmp_path.rglob("*.ckpt"))


RANK = """
import contextlib, io, os, sys, torch
from lightning_gd.cli import main
torch.set_num_threads(1)
folder = sys.argv[1]
with contextlib.redirect_stderr(io.StringIO()) as err:
    status = main(sys.argv[2:])
with open(f"{folder}/rank{os.environ['RANK']}", "w") as file:
    file.write(f"{status} {err.getvalue()}")
"""


def test_every_process_stops_alike(tmp_path):
    """Three rows on two processes, a checkpoint every 5 updates: both end, and name the same."""
    (tmp_path / "rank.py").write_text(RANK)
    many = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    rows = ["--data.x", "[1, 2, 3]", "--data.y", "[2, 4, 6]", "--checkpoint.every_n_updates", "5"]
    root = ["--trainer.default_root_dir", str(tmp_path / "logs")]
    words = [str(tmp_path), *LINE, *many, *rows, *root]
    launch(2, [str(tmp_path / "rank.py"), *words], timeout=120)
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second and first.startswith("3 error: diverged: the loss is inf after ")
    (last,) = tmp_path.rglob("last.ckpt")
    assert first.endswith(f"; the last finite checkpoint is {last}\n")
    assert torch.load(last, weights_only=True)["state_dict"]["weight"].isfinite().all()


def test_the_command_passes_on_the_status(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *LINE, "--trainer.default_root_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(SCRIPT).parents[1],
    )
    assert done.returncode == 3 and done.stderr.startswith("error: diverged: the loss is inf after")
