"""Lightning's ordinary objects on the explicit road: counters, checkpoints, stopping, resuming."""

import pandas
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_roads import RandomRows

from lightning_gd import LinearRegression, PointsData
from lightning_gd.checkpoints import RunCheckpoint


def model_for(trainer, **settings):
    with trainer.init_module():
        return LinearRegression(num_features=3, start="uniform", **{"lr": 0.02, **settings})


def fit(trainer, data=None, ckpt_path=None, **settings):
    model = model_for(trainer, **settings)
    trainer.fit(model, datamodule=RandomRows(**(data or {"batch_size": 8})), ckpt_path=ckpt_path)
    return model


class Blocks(Callback):
    """Notes global_step and batch_idx at the end of each block; content with blocks."""

    every_n_updates = 0

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.global_step, batch_idx))


def test_counting(make_trainer):
    blocks = Blocks()
    trainer = make_trainer(max_steps=11, callbacks=[blocks])
    fit(trainer)  # 3 batches an epoch
    assert (trainer.global_step, trainer.current_epoch) == (11, 4)  # the fourth was cut short
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 11
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 11
    assert blocks.seen == [(3, 2), (6, 2), (9, 2), (11, 1)]


def test_a_callback_of_single_batches_sees_each(make_trainer):
    class Plain(Callback):
        seen = 0

        def on_train_batch_end(self, *args):
            self.seen += 1

    plain = Plain()
    fit(make_trainer(max_steps=11, callbacks=[plain]))
    assert plain.seen == 11


def test_updates_per_step_bounds_a_block(make_trainer):
    blocks = Blocks()
    fit(
        make_trainer(max_steps=10, callbacks=[blocks]), {"passes_per_epoch": 10}, updates_per_step=4
    )
    assert [step for step, _ in blocks.seen] == [4, 8, 10]


def test_limit_train_batches_counts_updates(make_trainer):
    for limit, expected in ((4, 8), (0.5, 10)):
        trainer = make_trainer(max_epochs=2, limit_train_batches=limit)
        fit(trainer, {"passes_per_epoch": 10})
        assert trainer.global_step == expected


def test_overfit_batches_repeats_the_first_rows(make_trainer):
    trainer = make_trainer(max_epochs=200, overfit_batches=1)
    model = fit(trainer, {"batch_size": 3})
    data = RandomRows()
    data.setup()
    x, y = data.tables["train"].x[:3], data.tables["train"].y[:3]
    assert (
        model.loss(x, y).item() < 1e-2 < model.loss(data.tables["train"].x, data.tables["train"].y)
    )


def test_checkpoint_by_step_and_by_metric(make_trainer, tmp_path):
    by_step = ModelCheckpoint(tmp_path / "step", every_n_train_steps=4, save_top_k=-1)
    by_metric = ModelCheckpoint(tmp_path / "metric", monitor="val/loss", filename="{step}")
    trainer = make_trainer(max_steps=20, callbacks=[by_step, by_metric], enable_checkpointing=True)
    fit(trainer, {"batch_size": 5, "num_val": 3})
    names = sorted(path.stem.split("step=")[1] for path in (tmp_path / "step").iterdir())
    assert names == ["12", "16", "20", "4", "8"]
    saved = torch.load(by_step.best_model_path, weights_only=True)
    assert saved["global_step"] in (4, 8, 12, 16, 20)
    assert by_metric.best_model_score == pytest.approx(
        min(_val_losses(make_trainer, {"batch_size": 5, "num_val": 3})), rel=1e-12
    )


def _val_losses(make_trainer, data):
    losses = []

    class Keep(Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(trainer.callback_metrics["val/loss"].item())

    fit(make_trainer(max_steps=20, callbacks=[Keep()], num_sanity_val_steps=0), data)
    return losses


@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_early_stopping(make_trainer, gradient):
    stop = EarlyStopping("val/loss", patience=2, min_delta=0.05)
    trainer = make_trainer(max_epochs=100, callbacks=[stop])
    fit(trainer, {"batch_size": 5, "num_val": 3}, gradient=gradient)
    assert 0 < trainer.current_epoch < 100
    assert trainer.global_step == 4 * trainer.current_epoch


def test_early_stopping_agrees_on_both_roads(make_trainer):
    stopped = []
    for gradient in ("explicit", "autograd"):
        stop = EarlyStopping("train/loss", patience=1, min_delta=0.05)
        trainer = make_trainer(max_epochs=100, callbacks=[stop])
        fit(trainer, gradient=gradient)
        stopped.append((trainer.global_step, trainer.callback_metrics["train/loss"].item()))
    assert stopped[0][0] == stopped[1][0]
    assert stopped[0][1] == pytest.approx(stopped[1][1], rel=1e-12)


# The second ModelCheckpoint writes elsewhere: Lightning says that it forgets the first's scores.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
@pytest.mark.parametrize("data", [{"batch_size": 8}, {"passes_per_epoch": 6}], ids=str)
@pytest.mark.parametrize("at", [4, 6, 7])
def test_resume_ends_in_the_same_bits(make_trainer, tmp_path, gradient, data, at):
    settings = {
        "gradient": gradient,
        "momentum": 0.9,
        "scheduler": "StepLR",
        "scheduler_args": {"step_size": 2, "gamma": 0.9},
    }
    whole = fit(make_trainer(max_steps=17), data, **settings)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=at, filename="{step}", save_top_k=-1)
    fit(make_trainer(max_steps=at, callbacks=[save], enable_checkpointing=True), data, **settings)
    again = ModelCheckpoint(tmp_path / "2", every_n_train_steps=at, save_top_k=-1)
    trainer = make_trainer(max_steps=17, callbacks=[again], enable_checkpointing=True)
    resumed = fit(trainer, data, ckpt_path=tmp_path / f"step={at}.ckpt", **settings)
    assert trainer.global_step == 17
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)


def test_curves_count_updates(make_trainer, tmp_path):
    """The loss at step k is that before update k; the test loss is at the same weights."""
    curves = {}
    for gradient in ("explicit", "autograd"):
        logger = CSVLogger(tmp_path, gradient)
        fit(make_trainer(max_steps=9, logger=logger), {"passes_per_epoch": 9}, gradient=gradient)
        curves[gradient] = pandas.read_csv(f"{logger.log_dir}/metrics.csv").set_index("step")
    data = RandomRows()
    data.setup()
    train, test = data.tables["train"], data.tables["test"]
    model = model_for(make_trainer())
    for step in range(9):
        for table, name in ((train, "train/loss"), (test, "test/loss")):
            expected = model.loss(table.x, table.y).item()
            for gradient in curves:
                assert curves[gradient][name][step] == pytest.approx(expected, rel=1e-12)
        gradients = model.gradients(train.x, train.y)
        norm = torch.cat([g.reshape(-1) for g in gradients.values()]).norm().item()
        assert curves["explicit"]["gradient_norm"][step] == pytest.approx(norm, rel=1e-12)
        assert curves["autograd"]["gradient_norm"][step] == pytest.approx(norm, rel=1e-10)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.02 * gradients[name]


def test_learning_rate_monitor_sees_every_update(make_trainer, tmp_path):
    trainer = make_trainer(
        max_steps=6,
        logger=CSVLogger(tmp_path),
        callbacks=[LearningRateMonitor(logging_interval="step")],
    )
    fit(
        trainer,
        scheduler="StepLR",
        scheduler_args={"step_size": 1, "gamma": 0.5},
        scheduler_interval="update",
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**6)


def test_best_and_last_checkpoint_of_a_run(make_trainer, tmp_path):
    checkpoint = RunCheckpoint(str(tmp_path / "checkpoints"))
    trainer = make_trainer(max_steps=12, callbacks=[checkpoint], enable_checkpointing=True)
    fit(trainer)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
    ]
    assert checkpoint.monitor == "train/loss"


REFUSED = {
    "LBFGS": ({}, {"optimizer": "LBFGS"}, "LBFGS.*closure"),
    "half precision": ({"precision": "16-true"}, {}, "precision 16-true"),
    "Trainer clips": ({"gradient_clip_val": 1.0}, {}, "--model.gradient_clip_val"),
    "Trainer accumulates": (
        {"accumulate_grad_batches": 2},
        {},
        "--model.accumulate_grad_batches",
    ),
    "model accumulates by autograd": (
        {},
        {"accumulate_grad_batches": 2, "gradient": "autograd"},
        "--trainer.accumulate_grad_batches",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_setting(make_trainer, case):
    trainer_settings, settings, message = case
    with pytest.raises(ValueError, match=message):
        fit(make_trainer(max_steps=1, **trainer_settings), **settings)


def test_sharding_strategies_are_refused_by_name(make_trainer):
    from types import SimpleNamespace

    from lightning_gd.refusals import check_trainer

    hparams = LinearRegression().hparams
    for name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        trainer = SimpleNamespace(
            strategy=type(name, (), {})(), precision="32-true", accumulate_grad_batches=1
        )
        with pytest.raises(ValueError, match=name):
            check_trainer(trainer, hparams)  # pyright: ignore[reportArgumentType]


def test_mixed_half_precision_is_refused_by_name():
    from types import SimpleNamespace

    from lightning.pytorch.strategies import SingleDeviceStrategy

    from lightning_gd.refusals import check_trainer

    trainer = SimpleNamespace(strategy=SingleDeviceStrategy("cpu"), precision="16-mixed")
    with pytest.raises(ValueError, match="--trainer.precision 16-mixed"):
        check_trainer(trainer, LinearRegression().hparams)  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")  # none wanted
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_foreign_loaders_feed_the_model(make_trainer):
    from torch.utils.data import DataLoader, TensorDataset

    data = PointsData()
    data.setup()
    x, y = (t.double() for t in (data.tables["train"].x, data.tables["train"].y))
    for gradient in ("explicit", "autograd"):
        trainer = make_trainer(max_steps=50, limit_val_batches=0)
        with trainer.init_module():
            model = LinearRegression(gradient=gradient, bias=False)
        trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=4))
        assert model.weight.item() == pytest.approx(2 * (1 - 0.85**50), rel=1e-12)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")  # none wanted
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_shapes_that_would_broadcast_are_refused(make_trainer):
    from torch.utils.data import DataLoader, TensorDataset

    x, y = torch.ones(4, 3), torch.ones(4, 1)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"x \[4, 3\] and y \[4, 1\]"):
        trainer.fit(model_for(trainer), DataLoader(TensorDataset(x, y), batch_size=4))


def test_points_written_at_once_are_read_back(tmp_path):
    """TensorBoard verifies the checksums of the records that were framed together."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lightning_gd.logger import RunLogger

    logger = RunLogger(str(tmp_path))
    points = [
        (k, {"a": 0.5 * k, **({"long/name": -1.0 / (k + 1)} if k % 3 else {})}) for k in range(300)
    ]
    logger.log_points(points[:200])
    logger.log_metrics({"b": 7.0}, 3)
    logger.log_points(points[200:])
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, {"scalars": 0}).Reload()
    for tag in ("a", "long/name"):
        read = [(point.step, point.value) for point in events.Scalars(tag)]
        kept = [(step, values[tag]) for step, values in points if tag in values]
        assert [step for step, _ in read] == [step for step, _ in kept]
        assert [v for _, v in read] == pytest.approx([v for _, v in kept], rel=1e-7)  # float32
    assert [point.value for point in events.Scalars("b")] == [7.0]
