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
from lightning.pytorch.plugins import MixedPrecision
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


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", ["metrics", "tasks", "tied", "VAE", "transformer"])
def test_float16_with_its_scaler(make_trainer, name, accumulated):
    """On a CPU Lightning turns 16-mixed into bf16-mixed, unless it is given the plugin."""

    def fit_short(module, batches):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # updates overflow at first
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        settings = {"accumulate_grad_batches": accumulated, "max_steps": 40, "plugins": plugin}
        check = GradientCheck(every_n_updates=2)
        fit(make_trainer, module, batches, check, precision=None, **settings)
        assert scaler.get_scale() < 2.0**24
        return check

    module, batches, layer = built(name)
    check = fit_short(module, batches)
    assert check.checks and any(check.tested.values())
    spoil(module, layer)
    with pytest.raises(GradientError, match=f"{layer}.*; it passes through Doubled"):
        fit_short(module, batches)


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
    if name == "another":  # the others are refused by Lightning or torch first
        with pytest.raises(GradientError, match=words):
            fit(make_trainer, Refused(nn.Linear(6, 3), loss), [rows()])


class Odd(Plain):
    """Each second update has no loss, or none that is finite."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step % 2 == 0:
            return super().training_step(batch, batch_idx)
        return self.odd and super().training_step(batch, batch_idx) * torch.nan


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("odd", [None, True])
def test_an_update_without_a_loss_is_not_checked(make_trainer, odd):
    module, check = Odd(nn.Linear(6, 3)), GradientCheck(2)
    module.odd = odd
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match="an update was not checked: there was no loss, or none"):
        fit(make_trainer, module, [rows()], check, max_steps=5, max_epochs=-1)
    assert check.checks == (1 if odd else 3)  # updates 0, 2 and 4; after a nan all weights are
    assert all(check.tested.values())
    with pytest.raises(GradientError, match="nothing was compared: loss: it is nan on this batch"):
        nan = Refused(nn.Linear(6, 3), lambda net, x, y: net(x).sum() * torch.nan)
        check_gradients(nan, *rows()).raise_if_wrong()


class Half(Plain):
    """The second of two accumulated batches has no loss."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_an_accumulated_batch_without_a_loss_counts_as_zero(make_trainer):
    module, batches = Half(nn.Linear(6, 3)), [rows(), rows()]
    _, check = fit(make_trainer, module, batches, accumulate_grad_batches=2)
    assert check.checks == 3 and all(check.tested.values())


def test_a_loss_that_raises_is_no_clean_run(make_trainer):
    check = GradientCheck(on_error="warn")
    with pytest.warns(UserWarning, match="nothing was compared: loss raised .* asked again"):
        fit(make_trainer, Refused(nn.Linear(6, 3), REFUSED["another"][0]), [rows()], check)
    assert check.summary() == "3 checks, WRONG: nothing was compared (3 of 3)"


def test_a_reference_of_a_loss_that_vanishes(make_trainer):
    """Rounding is all of a loss at its optimum; elsewhere the two are compared."""
    module = Plain(nn.Linear(6, 1), lambda found, y: (found[:, 0] - y).square().mean())
    x = torch.randn(8, 6)
    y = module.net(x)[:, 0].detach()

    def reference(module, batch):
        return torch.nn.functional.mse_loss(module.net(batch[0])[:, 0], batch[1])

    assert check_gradients(module, x, y, reference=reference).ok
    twice = check_gradients(module, x, y, reference=lambda m, b: 2 * reference(m, b))
    assert re.fullmatch(r"nothing was compared: loss: it is \S+, and reference= .*", str(twice))


class Logarithm(Plain):
    def __init__(self):
        super().__init__(nn.Linear(6, 1, bias=False))
        nn.init.constant_(self.net.weight, 2.0)

    def training_step(self, batch, batch_idx):
        return (batch[0] * self.net.weight.log()).square().mean()


class Short(torch.autograd.Function):
    """x³, computed in float32 whatever it is given."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x.float() ** 3).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return (3 * grad_output.float() * x.float().square()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_function_beside_its_reference(dtype):
    """In bfloat16 the two differ by its rounding, which is no other value of the reference."""

    def reference(module, batch):
        return (module.net(batch[0]) ** 3).square().mean()

    for seed in range(10):  # at some the rounding is above a thousandth of the loss
        torch.manual_seed(seed)
        module, (x, y) = Plain(nn.Linear(6, 3), lambda f, y: Short.apply(f).square().mean()), rows()
        report = check_gradients(module.to(dtype), x.to(dtype), y, reference=reference, seed=seed)
        assert report.ok and not report.note, str(report)
        assert all(p.bound < 1e-3 * p.size for p in report.parameters)


@pytest.mark.parametrize("seed", range(20))
def test_the_random_step_ends_where_the_loss_is_finite(seed):
    report = check_gradients(Logarithm(), *rows(), seed=seed)
    assert report.ok and not report.failure and report.parameters[0].tested


class Careless(torch.autograd.Function):
    """The sum of squares, whose backward pass ignores what it is given."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 2 * x


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_takes_grad_output_as_1(make_trainer, accumulate):
    module = Plain(nn.Linear(6, 3), lambda found, y: Careless.apply(found))
    words = "grad_output is taken as 1.*passes through Careless"
    with pytest.raises(GradientError, match=words):
        fit(make_trainer, module, [rows(), rows()], accumulate_grad_batches=accumulate)
    check = GradientCheck(on_error="warn")
    with pytest.warns(UserWarning, match=words):
        fit(make_trainer, module, [rows(), rows()], check, max_steps=2)
    assert check.summary() == "2 checks, WRONG: net.weight (2 of 2), net.bias (2 of 2)"


def test_settings_that_are_no_loss_are_refused(make_trainer):
    with pytest.raises(ValueError, match="loss='lossy' is no method of it"):
        fit(make_trainer, Plain(nn.Linear(6, 3)), [rows()], GradientCheck(loss="lossy"))
    with pytest.raises(ValueError, match="reference='plain' must be a function of the module"):
        GradientCheck(reference="plain")  # pyright: ignore[reportArgumentType]
    twice = GradientCheck(reference=lambda module, batch: 2 * module.training_step(batch, 0))
    with pytest.raises(GradientError, match=r"loss: it is \S+, and reference= returns"):
        fit(make_trainer, Plain(nn.Linear(6, 3)), [rows()], twice)


def test_a_module_that_cannot_be_copied_is_refused(make_trainer):
    with pytest.raises(ValueError, match="Plain cannot be copied to check it: .*generator"):
        fit(make_trainer, generated(), [rows()])
