"""The exported file gives the model's predictions for rows that nothing has scaled."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import RandomRows, run, trainer_words
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gd import (
    ArrayData,
    GradientDescentModule,
    LinearRegression,
    MNISTParityData,
    ParityConv,
    ParityMLP,
    ParityRegressor,
)
from lightning_gd import export as export_file
from lightning_gd.data.table import LONGLEY
from lightning_gd.export import check_target, export

ort = pytest.importorskip("onnxruntime")
CLOSE: Any = {"rtol": 1e-6, "atol": 1e-6}


def predict(path, raw):
    """What another program gets: the file alone, and raw rows."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(raw).detach()
    (found,) = ort.InferenceSession(path).run(["prediction"], {"raw": raw.numpy()})
    return torch.from_numpy(found)


@pytest.fixture(scope="module")
def digits():
    data = MNISTParityData(scaling="symmetric", num_train=50, num_test=200)
    data.setup()
    return data


MODELS = {
    "parity.onnx": lambda: ParityRegressor(start="linear"),
    "mlp.onnx": ParityMLP,
    "conv.onnx": ParityConv,
    "conv.pt2": ParityConv,
}


@pytest.mark.parametrize("name", MODELS)
def test_bytes_go_in(tmp_path, digits, name):
    model, path = MODELS[name](), tmp_path / name
    line = export(model, digits, path)
    assert line.startswith(f"{path}: uint8 [N, 784] to float32 [N], ")
    x, _ = digits.local("test")
    expected = model(x.float()).detach()
    for rows in (1, 200):
        found = predict(path, digits.tables["test"].raw[:rows])
        torch.testing.assert_close(found, expected[:rows], **CLOSE)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_columns_of_a_table_go_in(tmp_path, monkeypatch):
    """The file of the last checkpoint, beside what `predict` writes for it."""
    monkeypatch.chdir(tmp_path)
    quiet = ["--config", "table", *trainer_words(max_steps=40, accelerator="cpu")]
    off = ["--pictures", "null", "--histograms", "null"]
    assert run("fit", *quiet, *off)[0] == 0
    assert run("predict", *quiet, "--ckpt_path", "last")[0] == 0
    made = sorted(Path("lightning_logs/table").iterdir())
    words = ["export", "--config", "table", "--ckpt_path", "last", "--to"]
    status, out, error = run(*words, "model.onnx")
    assert status == 0, error
    frame = pandas.read_csv(LONGLEY)
    columns = [name for name in frame if name != "employed"]
    assert f"model.onnx: float64 [N, 6] ({', '.join(columns)}) to float32 [N], " in out
    assert sorted(Path("lightning_logs/table").iterdir()) == made  # an export is no run
    written = pandas.read_csv("lightning_logs/table/version_1/predictions.csv")
    raw = frame.loc[written["row"] - 2, columns].to_numpy(np.float64)  # line 1 is the header
    found = predict(Path("model.onnx"), torch.from_numpy(raw))
    np.testing.assert_allclose(found, written["prediction"], rtol=1e-6)
    # What is there is kept, unless it is to be replaced.
    before = Path("model.onnx").read_bytes()
    status, _, error = run(*words, "model.onnx")
    assert status == 1 and "model.onnx exists already: choose another, or --overwrite" in error
    assert Path("model.onnx").read_bytes() == before


class Words(GradientDescentModule):
    """Class numbers in, three numbers out, through layers that differ in training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layers = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.BatchNorm1d(20))
        self.last = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 3))

    def forward(self, x):
        return self.last(self.layers(x).view(len(x), -1))


class Sentences(LightningDataModule):
    def train_dataloader(self):
        words = torch.randint(9, (40, 5), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(words, torch.ones(40)), batch_size=40)


def test_a_model_of_ones_own(tmp_path):
    data, path = Sentences(), tmp_path / "own.pt2"  # torch 2.6 writes no BatchNorm as ONNX
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Words().double()
        assert ": int64 [N, 5] to float32 [N, 3], " in export(model, data, path)
    (x, _), *_ = data.train_dataloader()
    same = model.float().eval()(x[:7]).detach()
    torch.testing.assert_close(predict(path, x[:7]), same, **CLOSE)


@pytest.mark.parametrize("buffer_rows", [10, 100])
def test_arrays_also_on_disk(tmp_path, buffer_rows):
    rng, files = np.random.default_rng(0), {k: str(tmp_path / f"{k}.npy") for k in "xy"}
    for name, shape in (("x", (40, 3)), ("y", 40)):
        np.save(files[name], rng.integers(-9, 9, shape).astype(np.int16))
    data, path = ArrayData(**files, buffer_rows=buffer_rows, batch_size=5), tmp_path / "a.pt2"
    data.setup()
    model = LinearRegression(num_features=3, start="linear")
    assert ": int16 [N, 3] to float32 [N], " in export(model, data, path)
    raw = torch.from_numpy(np.load(files["x"]))
    torch.testing.assert_close(predict(path, raw), model(raw.float()).detach(), **CLOSE)


class Line(GradientDescentModule):
    def __init__(self, what, **kwargs):
        super().__init__(**kwargs)
        self.weight, self.what = nn.Parameter(torch.ones(3)), what

    def forward(self, x):
        return self.what(x @ self.weight)


WRONG = {
    "mapping": (lambda y: {"y": y}, ValueError, "Line.forward must return a tensor; got dict"),
    "branch": (
        lambda y: y if y.sum() > 0 else -y,
        ValueError,
        "cannot be exported: .*(branch|flow)",
    ),
    "random": (lambda y: y * torch.rand(()), ArithmeticError, "graph is .* away from predictions"),
    "not a number": (lambda y: y / 0 * 0, ArithmeticError, "nan away"),
}


@pytest.mark.parametrize("what, kind, message", WRONG.values(), ids=WRONG)
def test_what_cannot_be_exported(tmp_path, what, kind, message):
    data = RandomRows()
    data.setup()
    with pytest.raises(kind, match=message):
        export(Line(what), data, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(export_file, "find_spec", lambda name: None if "x" in name else name)
    with pytest.raises(ValueError, match="needs: pip install onnx onnxscript onnxruntime .*pt2"):
        check_target("model.onnx", False)
    check_target("model.pt2", False)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, digits):
    path = tmp_path / "model.pt2"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        export(ParityRegressor(), digits, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
