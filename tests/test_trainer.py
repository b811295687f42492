"""Lightning's ordinary objects around a fit: counters, checkpoints, stopping, hooks, resuming."""

import itertools
from enum import Enum
from types import SimpleNamespace
from typing import Any, cast

import pandas
import pytest
import torch
from conftest import RandomRows, Rows, fit, line, normal, scheduled
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_modes import CLOSE, MODES, SETTINGS

from lightning_gd import LinearRegression, PointsData, TestCurve
from lightning_gd.configured import UNUSED
from lightning_gd.settings import check_trainer

FOUR = {"batch_size": 5, "num_val": 3}  # 4 batches per epoch, and validation


@pytest.mark.parametrize("gradient", MODES)
def test_callbacks_and_curves_have_the_rows_loss_and_norm_of_each_update(make_trainer, gradient):
    """The loss and the norm of the gradient at step k are those before update k."""
    seen, losses, norms = [], [], []

    class Around(Callback):
        def on_train_batch_start(self, trainer, pl_module: Any, batch, batch_idx):
            x, y = batch
            assert x.shape == (len(y), 3) and len(y) == (8, 8, 7)[batch_idx]
            found = [g.detach().reshape(-1) for g in pl_module.gradients(x, y).values()]
            norms.append(torch.cat(found).norm().item())
            losses.append(pl_module.loss(x, y).item())

        def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch, batch_idx):
            seen.append(outputs["loss"].item())

    model = fit(make_trainer(max_steps=7, callbacks=[Around()]), gradient=gradient)
    assert seen == pytest.approx(losses, rel=1e-13)  # by another sum
    assert model.curves.history["train/loss"] == (list(range(7)), seen)
    steps, found = model.curves.history["update/gradient_norm"]
    assert steps == list(range(7)) and found == pytest.approx(norms, rel=1e-12)


def test_lightnings_intervals_count_steps(make_trainer):
    for limit, updates, expected in ((4, 1, 8), (0.5, 1, 10), (2, 3, 12)):
        trainer = make_trainer(max_epochs=2, limit_train_batches=limit)
        fit(trainer, {"passes_per_epoch": 10, "updates_per_step": updates})
        assert trainer.global_step == expected


def test_overfit_batches_repeats_the_first_rows(make_trainer):
    model = fit(make_trainer(max_epochs=200, overfit_batches=1), {"batch_size": 3})
    table = RandomRows().load()["train"]
    assert model.loss(table.x[:3], table.y[:3]) < 1e-2 < model.loss(table.x, table.y)


@pytest.mark.parametrize("updates", [1, 2])
def test_checkpoint_by_step_and_by_metric(make_trainer, tmp_path, updates):
    by_step = ModelCheckpoint(tmp_path / "step", every_n_train_steps=4, save_top_k=-1)
    by_metric = ModelCheckpoint(tmp_path / "metric", monitor="val/loss", filename="{step}")
    trainer = make_trainer(max_steps=20, callbacks=[by_step, by_metric], enable_checkpointing=True)
    model = fit(trainer, {**FOUR, "updates_per_step": updates})
    names = sorted(path.stem.split("step=")[1] for path in (tmp_path / "step").iterdir())
    assert names == ["12", "16", "20", "4", "8"]
    saved = torch.load(by_step.best_model_path, weights_only=True)
    assert saved["global_step"] in (4, 8, 12, 16, 20)
    assert by_metric.best_model_score == min(model.curves.history["val/loss"][1])


@pytest.mark.parametrize("monitor, data", [("val/loss", FOUR), ("train/loss", {"batch_size": 8})])
def test_early_stopping_agrees_in_both_modes(make_trainer, monitor, data):
    ends = []
    for gradient in MODES:
        stop = EarlyStopping(monitor, patience=1, min_delta=0.05)
        trainer = make_trainer(max_epochs=100, callbacks=[stop])
        fit(trainer, data, gradient=gradient)
        assert 0 < trainer.current_epoch < 100
        ends.append((trainer.global_step, trainer.callback_metrics[monitor].item()))
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)


@pytest.mark.filterwarnings("ignore:The .*_dataloader' does not have many workers")
def test_the_loss_of_several_validation_loaders_is_over_all_their_rows(make_trainer):
    sizes = (8, 3, 2)
    parts = [Rows(normal(n, 3, seed=n), normal(n, seed=2 * n)) for n in sizes]
    for part in parts:
        part.setup("test")
    model, trainer = line(), make_trainer(max_steps=3, limit_train_batches=3)
    trainer.fit(model, parts[0].test_dataloader(), [part.test_dataloader() for part in parts])
    x, y = (torch.cat([getattr(part.rows, name) for part in parts]) for name in ("x", "y"))
    expected = pytest.approx(model.loss(x, y).item(), rel=1e-13)
    assert trainer.callback_metrics["val/loss"].item() == expected


# A model with hooks of its own

HOOKS = (
    "setup on_fit_start on_train_start on_train_epoch_start on_train_batch_start "
    "on_before_optimizer_step on_train_batch_end on_validation_epoch_start "
    "on_validation_epoch_end on_train_epoch_end on_train_end on_save_checkpoint on_load_checkpoint"
).split()


@pytest.mark.parametrize("gradient", MODES)
def test_hooks_of_a_model_need_no_super(make_trainer, tmp_path, gradient):
    plateau = scheduled("ReduceLROnPlateau", patience=0)
    settings: Any = {"num_features": 3, "gradient": gradient, "lr": 0.01, **plateau}
    called, ends = [], []
    hooks = {name: lambda *_, name=name, **__: called.append(name) for name in HOOKS}
    for cls in (LinearRegression, type("Own", (LinearRegression,), hooks)):
        trainer, file = make_trainer(max_steps=6), tmp_path / f"{cls.__name__}.ckpt"
        first = fit(trainer, FOUR, cls, **settings)
        trainer.save_checkpoint(file)
        second = fit(make_trainer(max_steps=13), FOUR, cls, ckpt_path=file, **settings)
        ends.append((first.curves.history, second.curves.history, second.state_dict()))
    assert set(called) == set(HOOKS)
    assert repr(ends[0]) == repr(ends[1]) and len(ends[0][1]["train/loss"][0]) == 7


# Resuming

SCHEDULES = ("schedule by epoch", "schedule by update", "plateau")
STOPS = [(1, 1, 3), (4, 3, 3), (7, 2, 1), (11, 4, 2)]


def same_from(stop, resumed, whole, **close):
    """The weights at the end, and the curves after update `stop`, are those of the whole run."""
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), **close)
    for tag, (steps, values) in whole.curves.history.items():
        left = [i for i, k in enumerate(steps) if k > stop or (k == stop and tag != "val/loss")]
        if left:
            found = resumed.curves.history[tag]
            assert found[0] == [steps[i] for i in left], tag
            expected = torch.tensor([values[i] for i in left])
            torch.testing.assert_close(torch.tensor(found[1]), expected, **close)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES)), ids=" ".join)
def test_a_stopped_run_resumes_to_the_bit(make_trainer, tmp_path, modes, schedule):
    """At any update of any step, with another `updates_per_step`, and in the other mode."""
    bound = {"max_epochs": 4}
    close = {"rtol": 0, "atol": 0} if modes[0] == modes[1] else CLOSE
    settings = {"momentum": 0.9, **SETTINGS[schedule]}
    whole = fit(make_trainer(**bound), FOUR, gradient=modes[1], **settings)
    for stop, before, after in STOPS:
        trainer, file = make_trainer(max_steps=stop), tmp_path / f"{stop}.ckpt"
        fit(trainer, {**FOUR, "updates_per_step": before}, gradient=modes[0], **settings)
        trainer.save_checkpoint(file)
        data = {**FOUR, "updates_per_step": after}
        resumed = fit(make_trainer(**bound), data, ckpt_path=file, gradient=modes[1], **settings)
        same_from(stop, resumed, whole, **close)


# Curves and loggers


class Branching(LinearRegression):
    """A loss that looks at a number, which stacked weights do not allow."""

    def loss(self, x, y):
        return super().loss(x, y) * (1.0 if float(self.weight.detach().sum()) < 1e9 else 2.0)


@pytest.mark.parametrize("kind", [LinearRegression, Branching])
def test_test_losses_of_a_step_are_computed_together(make_trainer, kind):
    """They are those of one update per step, whether the loss takes stacked weights or not."""
    curves = {}
    for updates in (1, 4, 100):
        data = {"passes_per_epoch": 150, "updates_per_step": updates}
        trainer = make_trainer(max_steps=150, callbacks=[TestCurve()])
        model = fit(trainer, data, kind, num_features=3, lr=0.02)
        curves[updates] = model.curves.history["test/loss"]
    steps, losses = curves[1]
    assert steps == list(range(150)) and losses[149] < losses[0]
    for updates in (4, 100):  # a mean over 7 rows in float64, in another order
        assert curves[updates][0] == steps
        assert curves[updates][1] == pytest.approx(losses, rel=1e-13)


def test_learning_rate_monitor_sees_every_update(make_trainer, tmp_path):
    monitor, logger = LearningRateMonitor(logging_interval="step"), CSVLogger(tmp_path)
    trainer = make_trainer(max_steps=6, logger=logger, callbacks=[monitor])
    model = fit(trainer, **scheduled("StepLR", "update", step_size=1, gamma=0.5))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**6)
    written = pandas.read_csv(f"{logger.log_dir}/metrics.csv").set_index("step")
    rates = [0.02 * 0.5**k for k in range(6)]
    assert list(written["lr-SGD"].dropna()) == pytest.approx(rates)
    steps, losses = model.curves.history["train/loss"]
    assert written["train/loss"].dropna()[steps].tolist() == pytest.approx(losses)


class Scheduled(LinearRegression):
    """Configures its own optimizer: a schedule every third update, or a plateau by epoch."""

    def __init__(self, monitor: str | None, mode: Any = "min", **settings):
        super().__init__(**settings)
        self.monitor, self.mode = monitor, mode

    def on_train_batch_end(self, *_):
        self.log("made", float(self.trainer.global_step))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        if self.monitor:
            plateau: Any = {"mode": self.mode, "patience": 0, "factor": 0.5}
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **plateau)
            config: Any = {"scheduler": scheduler, "monitor": self.monitor}
        else:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            config = {"scheduler": scheduler, "interval": "step", "frequency": 3}
        return {"optimizer": optimizer, "lr_scheduler": config}


OWN = {  # how often the rate is halved in 4 epochs of 4 updates
    "every third update of an epoch": ((None,), 4),
    "a falling loss for max": (("val/loss", "max"), 3),
    "a rising number for min": (("made", "min"), 3),
    "a rising number for max": (("made", "max"), 0),
}


@pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key.*monitor")
@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("args, times", OWN.values(), ids=OWN)
def test_a_schedule_of_the_models_own_is_honoured_or_refused(make_trainer, gradient, args, times):
    trainer, data = make_trainer(max_epochs=4), {**FOUR, "updates_per_step": 2}
    model = Scheduled(*args, num_features=3, gradient=gradient)
    if gradient == "explicit" and args[0]:
        with pytest.raises(ValueError, match="set --model.scheduler ReduceLROnPlateau"):
            trainer.fit(model, datamodule=RandomRows(**data))
        return
    trainer.fit(model, datamodule=RandomRows(**data))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**times)


@pytest.mark.filterwarnings("ignore:attribute 'scheduler_args' removed from hparams because")
@pytest.mark.parametrize("gradient", MODES)
def test_a_schedule_by_a_lambda(make_trainer, tmp_path, gradient):
    """It is in no checkpoint; given again, the run continues with it."""
    settings = {"gradient": gradient, **scheduled("LambdaLR", "update", lr_lambda=lambda k: 0.9**k)}
    first, second, file = make_trainer(max_steps=5), make_trainer(max_steps=12), tmp_path / "a.ckpt"
    fit(first, **settings)
    first.save_checkpoint(file)
    fit(second, ckpt_path=file, **settings)
    assert second.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.9**12, rel=1e-15)
    with pytest.raises(ValueError, match="does not hold scheduler_args"):
        LinearRegression.load_from_checkpoint(file)


class Shade(Enum):
    LIGHT, DARK = 1, 2


class Typed(LinearRegression):
    """Has settings of other types than numbers and text."""

    def __init__(self, shade=Shade.LIGHT, size=(1, 2), **settings):
        super().__init__(**settings)


def test_settings_without_a_plain_form_are_asked_for(make_trainer, tmp_path):
    """They are not replaced by their defaults in silence; a tuple stays a tuple."""
    trainer, path = make_trainer(max_steps=1), tmp_path / "typed.ckpt"
    fit(trainer, PointsData(), Typed, shade=Shade.DARK, size=(3, 4))
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match="does not hold shade of Typed.*shade="):
        Typed.load_from_checkpoint(path)
    loaded = Typed.load_from_checkpoint(path, shade=Shade.DARK)
    assert (loaded.hparams["shade"], loaded.hparams["size"]) == (Shade.DARK, (3, 4))


# Refusals


@pytest.mark.parametrize("hook", UNUSED)
def test_a_hook_that_explicit_mode_does_not_call_is_refused(make_trainer, hook):
    kind = type("Hooked", (LinearRegression,), {hook: lambda *args, **named: None})
    with pytest.raises(ValueError, match=f"Hooked overrides {hook}"):
        fit(make_trainer(max_steps=1), PointsData(), kind)


def test_accumulation_by_the_model_is_for_explicit_mode(make_trainer):
    settings = {"accumulate_grad_batches": 2, "gradient": "autograd"}
    with pytest.raises(ValueError, match="--trainer.accumulate_grad_batches"):
        fit(make_trainer(max_steps=1), **settings)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_of_other_machines_are_refused_by_name(name):
    given: Any = {
        "strategy": type(name, (), {})(),
        "precision": "32-true",
        "gradient_clip_val": None,
    }
    given["accumulate_grad_batches"] = 1
    with pytest.raises(ValueError, match=name):
        check_trainer(cast(Any, SimpleNamespace(**given)), line().hparams)
