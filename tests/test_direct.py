"""Updates without the wrappers around `optimizer.step()` end as those with them, bit for bit."""

from typing import Any

import pytest
import torch
import torch.optim.optimizer as torchs
from conftest import RandomRows, fit, line, plain, scheduled
from lightning.pytorch import Callback
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_gd import LinearRegression, ParityMLP, TestCurve, Updates, by_autograd
from lightning_gd.callbacks.gradient_check import GradientCheck

FULL = {"passes_per_epoch": 21, "updates_per_step": 7}
MINI = {"batch_size": 4, "updates_per_step": 5}  # 6 updates per epoch: steps of 5 and of 1
CASES = {
    "plain": ({}, MINI),
    "momentum": ({"momentum": 0.9}, MINI),
    "nesterov and weight decay": (
        {"momentum": 0.5, "optimizer_args": {"nesterov": True, "weight_decay": 0.1}},
        MINI,
    ),
    "dampening": ({"momentum": 0.5, "optimizer_args": {"dampening": 0.2}}, FULL),
    "gradient clipped by norm": ({"gradient_clip_val": 0.5}, MINI),
    "gradient clipped by value": (
        {"gradient_clip_val": 0.2, "gradient_clip_algorithm": "value", "momentum": 0.9},
        FULL,
    ),
    "schedule by update": (scheduled("ExponentialLR", "update", gamma=0.97), MINI),
    "plateau by update": (scheduled("ReduceLROnPlateau", "update", patience=1), FULL),
    "schedule by epoch": (scheduled("StepLR", step_size=1) | {"momentum": 0.9}, MINI),
    "accumulation": ({"accumulate_grad_batches": 2}, MINI),
    "moments": ({"momentum": 0.9}, {**FULL, "moments": True}),
    "without bias": ({"bias": False}, FULL),
}


class Listens(Callback):
    """Registers a hook on the optimizer, so that each update is made by `optimizer.step()`."""

    def __init__(self):
        self.steps = 0

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.count)

    def count(self, *_):
        self.steps += 1


def trained(make_trainer, settings, data, *callbacks, kind=line, **trainer):
    """Everything that a run leaves: weights, state of the optimizer, curves."""
    trainer = make_trainer(max_steps=40, callbacks=[TestCurve(1), *callbacks], **trainer)
    model = fit(trainer, data, kind, **settings)
    state = trainer.optimizers[0].state_dict()
    left = {"weights": plain(model.state_dict()), "optimizer": plain(state)}
    return {**left, "curves": model.curves.history, "updates": trainer.global_step}, model


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("name", CASES)
def test_a_direct_update_is_that_of_the_optimizer_to_the_bit(make_trainer, name, precision):
    settings, data = CASES[name]
    listens = Listens()
    direct, model = trained(make_trainer, settings, data, precision=precision)
    usual, other = trained(make_trainer, settings, data, listens, precision=precision)
    assert (model.not_direct, other.not_direct) == ("", "it has a hook")
    assert listens.steps == 40
    # Norms that are computed together may be added up in another order: 4 numbers, so 4 roundings.
    norms = [run["curves"].pop("update/gradient_norm") for run in (direct, usual)]
    eps = torch.finfo(torch.float64 if precision == "64-true" else torch.float32).eps
    assert norms[0][0] == norms[1][0]
    assert norms[0][1] == pytest.approx(norms[1][1], rel=4 * eps, abs=0)
    assert direct == usual


def test_the_check_sees_the_same_gradients(make_trainer):
    """It is called at every update, and checks 0, 1, 10 and the last one."""
    settings, data = CASES["gradient clipped by norm"]
    check = GradientCheck()
    direct, model = trained(make_trainer, settings, data, check)
    assert model.not_direct == "" and check.checks == 4
    errors = {name: direct["curves"].pop(f"verify/{name}") for name in ("weight", "bias")}
    assert [steps for steps, _ in errors.values()] == [[0, 1, 10, 39]] * 2
    assert direct == trained(make_trainer, settings, data)[0]


def test_several_layers_of_any_shape(make_trainer):
    ends = []
    for callbacks in ((), (Listens(),)):
        torch.manual_seed(0)
        trainer = make_trainer(max_steps=30, precision="32-true", callbacks=list(callbacks))
        settings = {"num_features": 3, "hidden": 5, "momentum": 0.9}
        data = RandomRows(**MINI)
        model = fit(trainer, data, ParityMLP, **settings)
        assert bool(model.not_direct) == bool(callbacks)
        ends.append(plain(model.state_dict()))
    assert ends[0] == ends[1]


class Sees(Callback):
    """Whether updates were replayed."""

    def on_train_end(self, trainer, pl_module: Any):
        self.replays = 0 if pl_module.replays is None else len(pl_module.replays)


@pytest.fixture
def replayed(monkeypatch):
    """Updates that a GPU would replay, made by the CPU: the same calls on the same memory."""
    monkeypatch.setattr("lightning_gd.replay.DEVICES", ("cpu",))
    monkeypatch.setattr("lightning_gd.replay.recorded", lambda update, warm: update)


REPLAYED = [n for n in CASES if n not in ("accumulation", "moments") and "by update" not in n]


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_update_is_that_of_the_optimizer(make_trainer, replayed, name):
    settings, data = CASES[name]
    check, sees = GradientCheck(), Sees()  # the check is of updates that are not replayed
    found, model = trained(make_trainer, {**settings, "cuda_graph": True}, data, check, sees)
    usual, _ = trained(make_trainer, settings, data, GradientCheck())
    assert bool(sees.replays) == (name in REPLAYED) and not model.replays
    norms = [run["curves"].pop("update/gradient_norm") for run in (found, usual)]
    assert norms[0][0] == norms[1][0]
    assert norms[0][1] == pytest.approx(norms[1][1], rel=4 * torch.finfo().eps, abs=0)
    assert found == usual


class Tracks(LinearRegression):
    """Its loss depends on a buffer that each call changes in place, and on random numbers."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_buffer("seen", torch.zeros(()))

    def loss_and_gradients(self, x, y):
        self.seen.add_(0.1)
        loss, gradients = super().loss_and_gradients(x, y + 0.01 * torch.randn(()) + self.seen)
        return loss, gradients


class Changes(Callback):
    """Changes the rate and an option of the optimizer in each epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        group = trainer.optimizers[0].param_groups[0]
        group["lr"], group["weight_decay"] = 0.02 / (1 + trainer.current_epoch), 0.1


def test_a_recording_leaves_no_trace_and_follows_what_changes(make_trainer, replayed):
    """Six updates per epoch, in steps of five and of one; the last batch of an epoch is smaller."""
    ends = []
    for settings in ({}, {"cuda_graph": True}):
        torch.manual_seed(0)
        sees, data = Sees(), RandomRows(batch_size=3, updates_per_step=4)
        trainer = make_trainer(max_steps=40, callbacks=[Changes(), sees])
        model = fit(trainer, data, Tracks, num_features=3, momentum=0.5, **settings)
        model.curves.history.pop("update/gradient_norm")
        ends.append([plain(model.state_dict()), model.curves.history])
    assert ends[0] == ends[1] and sees.replays


@pytest.mark.filterwarnings("ignore:You defined a .validation_step")
def test_a_batch_with_a_number_is_not_replayed(make_trainer, replayed):
    class Weighted(LinearRegression):
        def rows(self, batch):
            return len(batch["x"])

        def loss(self, x, y, factor):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().loss(x, factor * y)

        gradients = by_autograd

    rows = [{"x": torch.randn(4, 3), "y": torch.randn(4), "factor": float(k)} for k in range(6)]

    class Steps:
        def __iter__(self):
            return iter([Updates(rows[:3]), Updates(rows[3:])])

        def __len__(self):
            return 2

    ends = []
    for settings in ({}, {"cuda_graph": True}):
        trainer = make_trainer(max_steps=12, precision="32-true")
        model = Weighted(num_features=3, lr=0.02, **settings)
        trainer.fit(model, Steps())
        ends.append(plain(model.state_dict()))
    assert ends[0] == ends[1]


class Fails(Callback):
    def looks_at(self, step):
        return True

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 7:
            raise LookupError


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.5}])
def test_the_curves_end_at_the_last_update_that_was_made(make_trainer, settings):
    """The 8th update raises within the second step, of the updates 5 to 9."""
    trainer, model = make_trainer(max_steps=40, callbacks=[Fails()]), line(**settings)
    with pytest.raises(LookupError):
        trainer.fit(model, datamodule=RandomRows(**{**MINI, "batch_size": 2}))
    model.curves.write(trainer)
    whole = line(**settings)
    make_trainer(max_steps=7).fit(whole, datamodule=RandomRows(**{**MINI, "batch_size": 2}))
    for tag in ("train/loss", "update/gradient_norm"):
        assert model.curves.history[tag][0] == list(range(7))
        assert model.curves.history[tag][1] == pytest.approx(whole.curves.history[tag][1][:7])


class Watches(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(trainer.global_step)


def test_a_callback_that_watches_the_optimizer_sees_every_update(make_trainer):
    watches = Watches()
    _, model = trained(make_trainer, {}, MINI, watches)
    assert watches.seen == list(range(40))
    assert model.not_direct == "Watches.on_before_optimizer_step"


def test_a_hook_of_every_optimizer_is_called_at_each_update(make_trainer):
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        _, model = trained(make_trainer, {}, MINI)
    finally:
        handle.remove()
    assert len(steps) == 40 and model.not_direct == "it has a hook"


@pytest.mark.parametrize(
    ("settings", "data", "trainer", "reason"),
    [
        ({"optimizer": "Adam"}, MINI, {}, "Adam"),
        ({"optimizer_args": {"foreach": True}}, MINI, {}, "SGD(foreach=True)"),
        ({}, MINI, {"profiler": "simple"}, "SimpleProfiler"),
        ({}, {"batch_size": 4}, {}, "one update per step"),
    ],
)
def test_the_reason_is_named(make_trainer, settings, data, trainer, reason):
    _, model = trained(make_trainer, settings, data, **trainer)
    assert model.not_direct == reason


@pytest.mark.parametrize("name", ["_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"])
def test_torch_still_has_the_private_name(name):
    assert isinstance(getattr(torchs, name), dict)


@pytest.mark.parametrize("name", ["_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"])
def test_an_optimizer_still_has_the_private_name(name):
    assert isinstance(getattr(torch.optim.SGD([torch.zeros(1)]), name), dict)
