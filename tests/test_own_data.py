"""A DataModule of one's own at the command line, and runs whose files lie beside others."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, trainer_words
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gd import GradientDescentModule
from lightning_gd.checkpoints import read


class Poisson(GradientDescentModule):
    """L = 1/N Σ exp(f) − y f."""

    wrong: Any = None

    def __init__(self, num_features: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.weight = nn.Parameter(torch.zeros(num_features))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x @ self.weight + self.bias

    def loss(self, x, y):
        return (self(x).exp() - y * self(x)).mean()

    def gradients(self, x, y):
        slope = (self(x).exp() - y) / len(y)
        found = {"weight": slope @ x, "bias": slope.sum()}
        return found if self.wrong is None else self.wrong(found)


class NoDict(Poisson):
    wrong = staticmethod(lambda found: tuple(found.values()))


class Counts(LightningDataModule):
    def __init__(self, shuffle: bool = True):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        x = torch.randn(96, 3, generator=random)
        self.rows = TensorDataset(x, torch.poisson(x[:, 0].exp(), generator=random))
        self.shuffle = shuffle

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=32, shuffle=self.shuffle)

    def test_dataloader(self):
        return DataLoader(self.rows, batch_size=32)

    predict_dataloader = test_dataloader


pytestmark = [  # Lightning's advice on the loaders of these data
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*num_workers"),
]
OWN = ["--model", f"{__name__}.Poisson", "--data", f"{__name__}.Counts", *trainer_words()]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


def test_a_data_module_of_ones_own_is_fitted_resumed_and_predicted():
    words = [*OWN, "--trainer.max_epochs", "2"]
    status, out, err = run("fit", *words, "--data.shuffle", "false")
    assert (status, err) == (0, "")
    # Updates 0, 1 and the last one, which the epochs decide.
    assert "gradient check    3 checks, all parameters tested" in out
    last = ["--ckpt_path", "last"]
    with pytest.warns(UserWarning, match="the resumed run sees the rows in another order"):
        status, out, err = run("fit", *OWN, *last, "--trainer.max_epochs", "3")
    assert (status, err) == (0, "") and "gradient check    1 check, all" in out
    status, out, _ = run("fit", *OWN, *last, "--trainer.max_epochs", "3")
    assert (
        status == 0
        and "no update was made: the run already has 9 (max_steps=-1, max_epochs=3)" in out
    )
    status, _, err = run("fit", *OWN[:2], *OWN[4:], *last)
    assert status == 2 and f"the checkpoint is of --data {__name__}.Counts" in err
    status, out, err = run("predict", *OWN, *last)
    assert (status, err) == (0, "") and "predictions: " in out
    (file,) = Path().rglob("predictions.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["row"] for row in rows] == [str(k) for k in range(96)]
    assert [float(row["target"]) for row in rows] == Counts().rows.tensors[1].tolist()


def test_gradients_that_are_no_dict_are_answered():
    words = ["--model", f"{__name__}.NoDict", *OWN[2:]]
    status, _, err = run("fit", *words)
    assert status == 2 and "the gradients of NoDict are of type tuple: they must be a dict" in err
    status, _, err = run("check", *words)
    assert status == 2 and "it returned tuple, not a dict of tensors by name\n" in err


def test_without_a_logger_no_file_of_another_run_is_written_over():
    words = ["--config", "linear", "--trainer.max_steps", "3", "--data.updates_per_step", "1"]
    Path("config.yaml").write_text("# mine\ntrainer:\n  logger: false\n")
    for number in range(2):
        assert run("fit", *words, "--config", "config.yaml", *trainer_words())[0] == 0
        kept = Path("checkpoints/last.ckpt").read_bytes()
        assert Path(f"checkpoints{'_1' * number}/last.ckpt").is_file()
    assert Path("config.yaml").read_text().startswith("# mine")
    assert Path("checkpoints/last.ckpt").read_bytes() == kept
    assert not Path("checkpoints_2").exists()
    # A run that continues from the last checkpoint of such a folder stays in it.
    more = ["--trainer.max_steps", "6", "--ckpt_path", "checkpoints/last.ckpt"]
    assert run("fit", *words, "--config", "config.yaml", *trainer_words(), *more)[0] == 0
    assert read("checkpoints/last.ckpt")["global_step"] == 6
    assert read("checkpoints_1/last.ckpt")["global_step"] == 3


def test_one_batch_is_tried_without_a_logger():
    status, _, err = run("fit", "--config", "linear", "--trainer.fast_dev_run", "true")
    assert (status, err) == (0, "")
