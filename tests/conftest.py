"""Shared fixtures, and the models that the tests find by themselves."""

import contextlib
import importlib
import io
import logging
import os
import pkgutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import Forge
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_gd import (
    GradientDescentModule,
    LinearRegression,
    Table,
    TensorDataModule,
    cli,
    models,
    resume,
)

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))  # as `python scripts/x.py` has it
SCRIPT = Path(__file__).parent.parent / "scripts" / "train.py"
# Lightning calls what jsonargparse 4.49 deprecates.
LIGHTNINGS = r"ignore:\s*.*(was deprecated in v4|only one JsonargparseDeprecation)"


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", LIGHTNINGS)


def run(*argv):
    """Exit status, stdout and stderr of the command line, with this process left as it was."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["train.py"])
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv(resume.FOUND, "")
        status = cli.main([str(word) for word in argv])
    return status, out.getvalue(), err.getvalue()


def trainer_words(**settings):
    """Settings of the Trainer as they are typed, without a progress bar."""
    typed = {"enable_progress_bar": "false", **settings}
    return [str(word) for name in typed for word in (f"--trainer.{name}", typed[name])]


def process(*words, cwd=None, **env):
    """A real process of Python, and what came of it."""
    words, env = [sys.executable, *map(str, words)], {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=cwd, env=env)


def good_process(*words, **settings):
    """A process that must succeed; its output is shown where it fails."""
    done = process(*words, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def events_in(folder):
    """Everything that TensorBoard reads from the folder of a run."""
    return EventAccumulator(str(folder), {"scalars": 0, "histograms": 0, "images": 0}).Reload()


def curves_in(folder):
    """The points (update, value) of each curve; one that is written twice is there twice."""
    events = events_in(folder)
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: sorted((p.step, p.value) for p in curve) for tag, curve in found.items()}


def plain(value):
    """Tensors as lists of the numbers that they hold, to the bit."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Rows(TensorDataModule):
    """Given rows, to train and to test on."""

    def __init__(self, x, y, **settings):
        super().__init__(**settings)
        self.rows = Table(x, y)

    def load(self):
        return {"train": self.rows, "test": self.rows}


class RandomRows(TensorDataModule):
    """23 rows with 3 features and noise, 7 of them to test; targets, or class numbers."""

    def __init__(self, classes: Any = False, **settings):
        super().__init__(**settings)
        self.classes = classes

    def load(self):
        x = normal(23, 3, seed=3)
        y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.3 + 0.1 * normal(23, seed=4)
        y = (y > 0).long() if self.classes else y
        return {"train": Table(x, y), "test": Table(x[:7], y[:7])}


def find_models():
    """Every `GradientDescentModule` defined in a file of `lightning_gd/models`."""
    names = [found.name for found in pkgutil.iter_modules(models.__path__)]
    modules = [importlib.import_module(f"{models.__name__}.{name}") for name in names]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, GradientDescentModule)
        and value.__module__ == module.__name__
    ]


def pytest_generate_tests(metafunc):
    """A test with the argument `model_class` runs for every model."""
    if "model_class" in metafunc.fixturenames:
        metafunc.parametrize("model_class", find_models(), ids=lambda cls: cls.__name__)


@pytest.fixture
def make_trainer(tmp_path):
    """A quiet Trainer: float64 on one CPU, nothing written, unless asked for."""

    def make(**settings):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "64-true",
            "max_epochs": -1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**defaults, **settings})

    return make


@pytest.fixture(scope="session")
def forge(tmp_path_factory):
    """Command lines in processes of their own, which need not import everything anew."""
    with Forge(tmp_path_factory.mktemp("forge")) as forge:
        yield forge


def line(**settings):
    return LinearRegression(**{"num_features": 3, "start": "uniform", "lr": 0.02, **settings})


def scheduled(name, interval="epoch", **args):
    """Settings of a scheduler."""
    return {"scheduler": name, "scheduler_args": args, "scheduler_interval": interval}


def fit(trainer, data: Any = None, kind: Any = line, ckpt_path=None, **settings) -> Any:
    """The model that the Trainer has trained, on mini-batches of 8 if no data are given."""
    if not isinstance(data, TensorDataModule):
        data = RandomRows(**(data or {"batch_size": 8}))
    model = kind(**settings)  # in float32: the Trainer makes it a model of its precision
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


FIGURES = {}  # what: how many were as they should be, of how many tried


@contextlib.contextmanager
def counted(what):
    """Count a case for the line `what: n of m` at the end of the run."""
    good, tried = FIGURES.get(what, (0, 0))
    FIGURES[what] = good, tried + 1
    yield
    FIGURES[what] = good + 1, tried + 1


OWN = dict(vars(DataLoader))


def pytest_runtest_teardown():
    """Take off what Lightning leaves on DataLoader where a `train_dataloader` raises."""
    for name in ("__init__", "__setattr__", "__delattr__"):
        if name in OWN:
            setattr(DataLoader, name, OWN[name])
        elif name in vars(DataLoader):
            delattr(DataLoader, name)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Add the figures of a worker of pytest-xdist to those of this process."""
    for what, counts in getattr(node, "workeroutput", {}).get("figures", {}).items():
        FIGURES[what] = tuple(a + b for a, b in zip(FIGURES.get(what, (0, 0)), counts, strict=True))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = FIGURES


def pytest_terminal_summary(terminalreporter):
    for what, (good, tried) in FIGURES.items():
        terminalreporter.write_line(f"{what}: {good:,} of {tried:,}")
