"""LightningModules that know nothing of this package: the right ones pass, a mistake is found."""

import random
import re

import numpy as np
import pytest
import torch
from any_modules import (
    GAN,
    MODULES,
    Batches,
    Cubes,
    Plain,
    Single,
    by_plain_operations,
    noise,
    rows,
    spoil,
)
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_gd import GradientCheck, GradientError, check_gradients


def fit(make_trainer, module, batches, check=None, **settings):
    check = check or GradientCheck()
    torch.manual_seed(1)
    settings = {"max_steps": 4, "precision": "32-true", "callbacks": [check], **settings}
    trainer = make_trainer(**settings)
    trainer.fit(module, Batches(batches))
    return trainer, check


def built(name):
    """A module and three batches of its own, the same at every call."""
    make, batch, layer = MODULES[name]
    torch.manual_seed(0)
    return make(), [batch() for _ in range(3)], layer


LARGE = {"resnet18": pytest.mark.slow, "mobilenet": pytest.mark.slow, "squeezenet": ()}
NAMES = [pytest.param(name, marks=LARGE.get(name, ())) for name in MODULES if name != "GAN"]


@pytest.mark.parametrize("name", NAMES)
def test_right_modules_pass(make_trainer, tmp_path, name):
    module, batches, _ = built(name)
    steps = 1 if name == "squeezenet" else 4
    logger = CSVLogger(tmp_path)  # as `metrics` asks for one
    _, check = fit(make_trainer, module, batches, max_steps=steps, logger=logger)
    assert check.checks == min(steps, 3)  # updates 0, 1 and 3
    assert any(check.tested.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_layer_is_found(make_trainer, name):
    module, batches, layer = built(name)
    spoil(module, layer)
    words = f"update 0:(?s:.*){layer}.*; it passes through Doubled"
    with pytest.raises(GradientError, match=words):
        fit(make_trainer, module, batches)


@pytest.mark.parametrize("wrong", ["", "maker.0", "judge.2"])  # the maker moves first
def test_several_optimizers_by_hand(make_trainer, wrong):
    module, check = GAN(), GradientCheck(loss=["maker_loss", "judge_loss"])
    if not wrong:
        fit(make_trainer, module, [noise()], check, max_steps=8)
        assert check.checks == 6 and all(check.tested.values())
        return
    spoil(module, wrong)
    with pytest.raises(GradientError, match="maker.*passes through Doubled"):
        fit(make_trainer, module, [noise()], check, max_steps=8)


def test_one_optimizer_by_hand(make_trainer):
    check = GradientCheck(loss=lambda module, batch: module.step(batch))
    fit(make_trainer, ManualOptimBoringModel(), [torch.randn(4, 32)], check)
    assert check.checks == 3
    with pytest.raises(ValueError, match="optimizes manually: give GradientCheck"):
        fit(make_trainer, ManualOptimBoringModel(), [torch.randn(4, 32)])


# Nothing of the run changes


def numbers(content):
    """Everything in a nest of dicts and lists, in order, with tensors as lists."""
    if isinstance(content, dict):
        return {key: numbers(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [numbers(value) for value in content]
    return content.tolist() if isinstance(content, (torch.Tensor, np.ndarray)) else content


def end_of(make_trainer, folder, name, check, **settings):
    """All that a run leaves."""
    random.seed(1)
    np.random.seed(1)
    module, batches, _ = built(name)
    logger = CSVLogger(folder, "", "")
    more = {"callbacks": check, "logger": logger, **settings}
    trainer, _ = fit(make_trainer, module, batches, max_epochs=2, max_steps=-1, **more)
    states = [o.state_dict() for o in trainer.optimizers]
    generators = [torch.get_rng_state(), np.random.get_state(), random.getstate()]
    logged = {k: v for k, v in trainer.logged_metrics.items() if "gradcheck" not in k}
    kept = [vars(m).get("seen") for m in module.modules()]
    return numbers([module.state_dict(), states, generators, logged, kept, trainer.global_step])


KEPT = {
    "metrics": {"gradient_clip_val": 0.1},
    "VAE": {"accumulate_grad_batches": 2},
    "tasks": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    "LightningLSTM": {},
    "transformer": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", KEPT)
def test_a_run_with_the_check_is_the_run_without(make_trainer, tmp_path, name):
    check = GradientCheck(2)
    ends = [
        end_of(make_trainer, tmp_path / str(len(checks)), name, checks, **KEPT[name])
        for checks in ([], [check])
    ]
    assert ends[0] == ends[1] and check.checks > 1


def has_bf16_lstm():
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["metrics", "lstm", "tasks", "tied"])
def test_other_precisions_pass(make_trainer, name, precision):
    if name == "lstm" and precision == "bf16-mixed" and not has_bf16_lstm():
        pytest.skip("this processor has no LSTM in bfloat16: torch raises for the module itself")
    module, batches, _ = built(name)
    _, check = fit(make_trainer, module, batches, precision=precision)
    assert check.checks == 3
    module, batches, layer = built(name)
    spoil(module, layer)
    with pytest.raises(GradientError, match="passes through Doubled"):
        fit(make_trainer, module, batches, precision=precision)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("wrong", [False, True])
def test_a_compiled_module(make_trainer, wrong):
    module, batches, layer = built("lstm")
    if wrong:
        spoil(module, layer)
        with pytest.raises(GradientError, match="passes through Doubled"):
            fit(make_trainer, torch.compile(module, backend="aot_eager"), batches)
        return
    _, check = fit(make_trainer, torch.compile(module, backend="aot_eager"), batches)
    assert check.checks == 3


# Only float32, and losses that cannot be asked for


@pytest.mark.filterwarnings("ignore:GradientCheck. checked in torch.float32")
@pytest.mark.parametrize("reference", [None, by_plain_operations])
@pytest.mark.parametrize("factor", [1, 2, 1.1])
def test_a_function_for_float32_alone(make_trainer, monkeypatch, reference, factor):
    monkeypatch.setattr(Single, "factor", factor)
    check, module = GradientCheck(reference=reference), Plain(Cubes())
    if factor != 1:
        with pytest.raises(GradientError) as raised:
            fit(make_trainer, module, [rows()], check)
        named = re.search(r"layer.*: (?:p.grad is )?([.\d]+) times", str(raised.value))
        # Rounding in float32, which differs between processors.
        assert named is not None and float(named[1]) == pytest.approx(factor, rel=1e-3)
        return
    fit(make_trainer, module, [rows()], check)
    assert check.checks == 3 and all(check.tested.values())


STREAM = iter(range(100))


def generated():
    module = Plain(nn.Linear(6, 3))
    setattr(module, "numbers", (k for k in range(9)))  # noqa: B010
    return module


REFUSED = {
    "no tensor": (lambda net, x, y: 0.5, "training_step returned 0.5 and no loss: give loss="),
    "nan": (lambda net, x, y: net(x).sum() * torch.nan, "it is nan on this batch"),
    "not scalar": (lambda net, x, y: net(x), r"it has shape \[8, 3\], and a loss is one number"),
    "another": (
        lambda net, x, y: net(x).square().mean() * (1 + next(STREAM)),
        r"it is .*, and .* when it is asked again .*: give loss=",
    ),
}


class Refused(Plain):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_loss_is_refused(make_trainer, name):
    loss, words = REFUSED[name]
    with pytest.raises(GradientError, match=words):
        check_gradients(Refused(nn.Linear(6, 3), loss), *rows()).raise_if_wrong()
    if name in ("nan", "another"):  # the others are refused by Lightning or torch first
        with pytest.raises(GradientError, match=words):
            fit(make_trainer, Refused(nn.Linear(6, 3), loss), [rows()])


def test_a_module_that_cannot_be_copied_is_refused(make_trainer):
    with pytest.raises(ValueError, match="Plain cannot be copied to check it: .*generator"):
        fit(make_trainer, generated(), [rows()])
