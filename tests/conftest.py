"""Shared fixtures, and the models that the tests find by themselves."""

import contextlib
import importlib
import logging
import pkgutil
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_gd import GradientDescentModule, models

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))  # as `python scripts/x.py` has it


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


FIGURES = {}  # what: how many were as they should be, of how many tried


@contextlib.contextmanager
def counted(what):
    """Count a case for the line `what: n of m` at the end of the run."""
    good, tried = FIGURES.get(what, (0, 0))
    FIGURES[what] = good, tried + 1
    yield
    FIGURES[what] = good + 1, tried + 1


def pytest_terminal_summary(terminalreporter):
    for what, (good, tried) in FIGURES.items():
        terminalreporter.write_line(f"{what}: {good:,} of {tried:,}")
