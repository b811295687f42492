"""Reports, curves, tables and files of a run, against values found another way."""

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RandomRows, events_in, fit
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_gd import (
    Coefficients,
    CurvatureReport,
    EndTable,
    GradientCheck,
    GradientDescentModule,
    LinearRegression,
    Pictures,
    PointsData,
    Predictions,
    RunLogger,
    TableData,
    TestCurve,
    UpdateProgressBar,
    WeightHistograms,
    as_batch,
)

FOLDER = "a folder [bold]with brackets[/bold] and a name that is longer than a terminal is wide"


class Softmax(GradientDescentModule):
    """A hidden layer with batch statistics and dropout, in autograd mode."""

    def __init__(self, dropout=0.3, **kwargs):
        super().__init__(gradient="autograd", **kwargs)
        hidden = (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout))
        self.layers = nn.Sequential(*hidden, nn.Linear(4, 2)).double()

    def forward(self, x):
        return self.layers(x)

    def loss(self, x, y=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.functional.cross_entropy(self(x), (x[:, 0] > 0).long() if y is None else y)


class Foreign(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("moments", [False, True])
def test_the_predicted_curves_are_the_measured_ones(make_trainer, momentum, moments):
    trainer = make_trainer(max_steps=100, callbacks=[CurvatureReport(), TestCurve()])
    data = RandomRows(passes_per_epoch=100, moments=moments, updates_per_step=10)
    history = fit(trainer, data, momentum=momentum).curves.history
    for part in ("train", "test"):
        steps, measured = history[f"{part}/loss"]
        predicted = history[f"predicted/{part}/loss"]
        assert steps == list(range(100)) and predicted[0] == list(range(101))
        # Rounding enters as 1e-16 of the first loss per update; seen is 1e-15.
        assert predicted[1][:100] == pytest.approx(measured, rel=0, abs=1e-12 * measured[0])
    (optimum,) = history["optimum/train/loss"][1]
    assert optimum <= min(history["train/loss"][1])


@pytest.mark.filterwarnings("ignore:.*val_dataloader")
@pytest.mark.parametrize("form", ["tuple", "dict", "tensor", "table"])
def test_the_curvature_at_the_start_for_batches_of_any_structure(make_trainer, capsys, form):
    data, ends = RandomRows(classes=True), []
    data.setup()
    x, y = data.local("train")
    batch: Any = {"dict": {"x": x, "y": y}, "tensor": x}.get(form, (x, y))
    batches: Any = [batch]
    given: Any = {"train_dataloaders": DataLoader(batches, batch_size=None)}
    dropout, given = (0.3, {"datamodule": data}) if form == "table" else (0.0, given)
    for callbacks in ([], [CurvatureReport()]):
        torch.manual_seed(0)
        model = Softmax(dropout, lr=100.0)
        expected = largest_eigenvalue(copy.deepcopy(model), batch)
        make_trainer(max_steps=2, callbacks=callbacks).fit(model, **given)
        ends.append(model.state_dict().values())
    # The report changes neither batch statistics nor the random numbers of dropout.
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    said = capsys.readouterr().out.replace("\n", " ")
    found = re.search(r"on 23 rows, a learning rate below ([\d.]+) is stable", said)
    assert found is not None and "WARNING: lr 100 is above that" in said
    if not dropout:  # 4 digits are printed of what is iterated to 1e-3
        assert float(found[1]) == pytest.approx(2 / expected, rel=2e-3)


def largest_eigenvalue(model, batch):
    """λmax of the whole Hessian."""
    options: Any = {"retain_graph": True, "create_graph": True, "materialize_grads": True}

    def gradient(output):
        found = torch.autograd.grad(output, list(model.parameters()), **options)
        return torch.cat([part.reshape(-1) for part in found])

    hessian = torch.stack([gradient(slope) for slope in gradient(as_batch(batch).loss(model))])
    return torch.linalg.eigvalsh(hessian.detach())[-1].item()


class Far(LinearRegression):
    """A Huber loss, whose Hessian is 0 where every |r| > 1."""

    def loss(self, x, y):
        return nn.functional.huber_loss(self(x), y)

    def gradients(self, x, y):
        slope = (self(x) - y).clamp(-1, 1)
        return {"weight": slope @ x / len(y), "bias": slope.mean()}


@pytest.mark.parametrize("lr, rises", [(0.5, True), (0.01, False)])
def test_a_loss_that_swings_beyond_its_lowest_is_warned_of(make_trainer, capsys, lr, rises):
    """At w = 0 only the row x = 1 has |r| < 1, so λmax = ½; the row x = 10 makes the run swing."""
    trainer = make_trainer(max_steps=9, callbacks=[CurvatureReport()])
    model = Far(num_features=1, lr=lr, bias=False)
    trainer.fit(model, datamodule=PointsData(x=[1, 10], y=[0.5, 40], passes_per_epoch=9))
    said, losses = capsys.readouterr().out, model.curves.history["train/loss"][1]
    lowest = min(losses)
    wanted = f"was {lowest:.4g} at update {losses.index(lowest)} and is {losses[-1]:.4g} at update"
    assert (losses[-1] > 1.1 * lowest) == (wanted in " ".join(said.split())) == rises
    assert "at the start, on 2 rows, a learning rate below 4 is stable" in said


def test_a_loss_that_swings_about_nothing_is_not_warned_of(make_trainer, capsys):
    """With momentum β the loss of an exact fit passes by 0 again and again, as it falls by βᵏ."""
    trainer = make_trainer(max_steps=200, callbacks=[CurvatureReport()])
    data = PointsData(x=[1, 2, 3, 4], y=[2, 4, 6, 8], passes_per_epoch=200)
    model = fit(trainer, data, num_features=1, lr=0.01, momentum=0.9, bias=False)
    losses = model.curves.history["train/loss"][1]
    assert losses[-1] > 1.1 * min(losses) and losses[-1] < 1e-6 * losses[0]
    assert "WARNING" not in capsys.readouterr().out


def test_the_curvature_where_the_hessian_at_the_start_is_0(make_trainer, capsys):
    """Both rows have |r| > 1 at w = 0; after the update w = lr·10 only x = 1 has |r| < 1."""
    trainer = make_trainer(max_steps=1, callbacks=[CurvatureReport()])
    model = Far(num_features=1, lr=0.2, bias=False)
    trainer.fit(model, datamodule=PointsData(x=[1, 10], y=[2, 40]))
    said = capsys.readouterr().out
    assert "one update from the start, on 2 rows, a learning rate below 4 is stable" in said


def test_a_report_that_fails_does_not_end_the_run(make_trainer, capsys):
    class Attached(Softmax):
        def loss(self, x, y):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().loss(x, y) / self.trainer.world_size  # a copy has no trainer

    trainer = make_trainer(max_steps=2, callbacks=[CurvatureReport()])
    trainer.fit(Attached(), datamodule=RandomRows(classes=True))
    assert "curvature at the start: not known (" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("settings", "every", "steps"),
    [
        ({"passes_per_epoch": 3, "updates_per_step": 2}, None, range(12)),
        ({"batch_size": 6}, None, [0, 4, 8]),  # 4 updates per epoch
        ({"batch_size": 6, "updates_per_step": 3}, 5, [0, 5, 10]),
    ],
)
def test_the_test_curve_is_the_loss_in_evaluation_mode(make_trainer, settings, every, steps):
    data, seen = RandomRows(classes=True, **settings), {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            frozen: Any = copy.deepcopy(pl_module).eval()
            seen[trainer.global_step] = frozen.loss(*data.local("test")).item()

    model = Softmax()
    trainer = make_trainer(max_steps=12, callbacks=[TestCurve(every), Watch()])
    trainer.fit(model, datamodule=data)
    assert model.curves.history["test/loss"] == (list(steps), [seen[step] for step in steps])


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_the_end_table_fits_its_width(make_trainer, tmp_path, monkeypatch, capsys, width):
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    else:  # a file, or no terminal
        monkeypatch.delenv("COLUMNS", raising=False)
    width = width or 80
    monkeypatch.chdir(tmp_path)
    table, data = EndTable(), RandomRows(passes_per_epoch=50, moments=True)
    callbacks = [GradientCheck(), table]
    trainer = make_trainer(max_steps=50, callbacks=callbacks, logger=CSVLogger(FOLDER, "run"))
    model = fit(trainer, data)
    table.add({"test/accuracy": 0.9, "test/majority_accuracy": 0.5, "test/loss": 1 / 3})
    capsys.readouterr()
    table.show(trainer)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == lines[-1] == "─" * width and "" not in lines
    assert all(len(line) <= width for line in lines if FOLDER not in line)
    rows = dict(re.findall(r"^(\S+(?: \S+)*)  +(\S.*)$", text, re.M))
    final = model.loss(*data.local("train")).item()
    expected = {
        "gradient": "explicit",
        "updates": "50",
        "learning rate": "0.02",
        "processes": "1 (cpu)",
        "train/loss": f"{final:.6g}",
        "test/loss": "0.333333",
        "test/accuracy": "0.9 (majority class: 0.5)",
    }
    assert rows.items() >= expected.items()
    own = "\n  " if width < 120 else "              "  # what is too long has a line of its own
    assert f"\nlogs{own}{FOLDER}/run/version_0\n" in text
    assert f"{FOLDER}/run/version_0/metrics.csv\n" in text
    updates, losses = model.curves.history["train/loss"]
    assert updates[-1] == 50 and losses[-1] == pytest.approx(final, rel=1e-12)


@pytest.mark.parametrize(
    "epochs, said",
    [(4, "max_steps=6 ends the run, before max_epochs=4 (8 updates)"), (-1, "")]
    + [(2, "max_epochs=2 (4 updates) ends the run, before max_steps=6")],
)
def test_of_two_limits_the_first_is_named(make_trainer, capsys, epochs, said):
    trainer = make_trainer(max_steps=6, max_epochs=epochs, callbacks=[EndTable()])
    fit(trainer, RandomRows(passes_per_epoch=2))
    assert trainer.global_step == min(6, 2 * epochs % 100)
    assert capsys.readouterr().out.partition("\n")[0] == said or not said


def test_histograms_and_the_progress_bar(make_trainer, tmp_path, capsys):
    logger, callbacks = TensorBoardLogger(tmp_path), [WeightHistograms(), UpdateProgressBar()]
    settings = {"enable_progress_bar": True, "callbacks": callbacks, "logger": logger}
    fit(make_trainer(max_epochs=10, **settings), RandomRows(passes_per_epoch=2))
    events = events_in(logger.log_dir)
    # At the start, after 1, 2, 4 and 8 epochs, and at the end; the bias is one number.
    assert [e.step for e in events.Histograms("weights/weight")] == [0, 2, 4, 8, 16, 20]
    assert events.Tags()["histograms"] == ["weights/weight"]
    (last,) = [line for line in capsys.readouterr().out.splitlines() if "Epoch" in line]
    assert "Epoch 9 " in last and "2/2" in last
    assert "train/loss:" in last and "v_num" not in last


def test_weights_too_large_for_tensorboard_have_no_histogram(make_trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(max_steps=1, callbacks=[WeightHistograms()], logger=logger)
    fit(trainer, weight=[1e25] * 3)
    assert events_in(logger.log_dir).Tags()["histograms"] == []


def test_no_two_runs_write_into_one_folder(tmp_path, monkeypatch):
    """Each run makes its folder, also where all found the same number free at the same moment.

    One that is being written cannot be continued.
    """
    monkeypatch.setattr(TensorBoardLogger, "version", 0)
    runs = [RunLogger(str(tmp_path), "run") for _ in range(3)]
    assert [run.version for run in runs] == [0, 1, 2]
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "run", *(Path(run.log_dir) for run in runs)]
    runs[1].lock()
    second = RunLogger(str(tmp_path), "run", 1)
    with pytest.raises(OSError, match="version_1 is being written by another run"):
        second.lock()
    runs[1].finalize("success")
    second.lock()
    second.finalize("success")


@pytest.mark.filterwarnings("ignore:.*val_dataloader")
@pytest.mark.parametrize("settings", [{}, {"fast_dev_run": 2}, {"logger": True}])
def test_callbacks_leave_foreign_models_and_data_alone(make_trainer, tmp_path, settings):
    kinds = (CurvatureReport, TestCurve, WeightHistograms, Pictures, Coefficients, Predictions)
    if "logger" in settings:
        settings = {"logger": [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]}
    data = RandomRows(batch_size=8)
    data.setup()
    batches: Any = [data.local("train")] * 2
    loader = DataLoader(batches, batch_size=None)
    ours = LinearRegression(num_features=3).double()
    for model, given in itertools.product(
        (Foreign(), ours), ({"train_dataloaders": loader}, {"datamodule": data})
    ):
        ends = []
        for callbacks in ([], [kind() for kind in (EndTable, *kinds)]):
            trained = copy.deepcopy(model)
            make_trainer(max_steps=4, callbacks=callbacks, **settings).fit(trained, **given)
            ends.append(trained.state_dict().values())
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_names_with_brackets_and_several_predictions_per_row(make_trainer, tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("[red]a,b[/],c\n" + "".join(f"{i},{i * i},{2 * i + 1}\n" for i in range(9)))
    trainer = make_trainer(max_steps=5, callbacks=[Coefficients()])
    fit(trainer, TableData(str(path), "b[/]"), num_features=2)
    said = capsys.readouterr().out
    assert "Coefficients for b[/]" in said and "[red]a" in said
    trainer = make_trainer(callbacks=[Predictions()], logger=CSVLogger(tmp_path))
    data = RandomRows(classes=True)
    (expected,) = trainer.predict(Softmax(), datamodule=data)
    lines = (Path(trainer.logger.log_dir) / "predictions.csv").read_text().splitlines()
    assert lines[0] == "row,target,prediction" and len(lines) == 8
    row, target, prediction = lines[3].split(",")
    assert (row, int(target)) == ("2", data.tables["test"].y[2])
    assert [float(value) for value in prediction.split()] == expected[2].tolist()
