"""Runs killed by signal 9 and resumed by the command line end as if nothing had happened."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import counted
from killed import Forge, first_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gd.checkpoints import read

EVERY = "checkpoint.every_n_updates"
MOMENTUM = {"model.momentum": 0.9}
AUTOGRAD = {"model.gradient": "autograd"}
FULL = {"data.batch_size": "null", "data.passes_per_epoch": 50, "trainer.max_steps": 900}
MOMENTS = {**FULL, **MOMENTUM, "data.moments": "true", "data.updates_per_step": 10}
STEPS = {"model.scheduler": "StepLR", "model.scheduler_args": '{"step_size": 3, "gamma": 0.9}'}
BY_UPDATE = {
    "model.scheduler": "ExponentialLR",
    "model.scheduler_args": '{"gamma": 0.998}',
    "model.scheduler_interval": "update",
}
PLATEAU = {
    "model.scheduler": "ReduceLROnPlateau",
    "model.scheduler_args": '{"patience": 1, "factor": 0.7}',
}
SINGLE_ROWS = {"data.batch_size": 1, "trainer.max_epochs": 60, "data.updates_per_step": 6}
LIMIT = {"trainer.limit_train_batches": 3, "data.updates_per_step": 2, "trainer.max_epochs": 70}
ACCUMULATE = {"data.updates_per_step": 2, "model.accumulate_grad_batches": 2}

# Settings beside those of rows.yaml, and the number of processes. 41 rows, 5 of them for
# validation, in batches of 4: 9 updates per epoch, 40 epochs.
CASES = {
    "mini-batches": ({**STEPS, **MOMENTUM, EVERY: 7}, 1),
    "mini-batches, autograd": ({**AUTOGRAD, **PLATEAU, **MOMENTUM, EVERY: 7}, 1),
    "full batch": ({**FULL, **MOMENTUM, EVERY: 10}, 1),
    "full batch, autograd": (
        {**FULL, **AUTOGRAD, **BY_UPDATE, EVERY: 10, "trainer.max_steps": 400},
        1,
    ),
    "several updates per step": ({**SINGLE_ROWS, **MOMENTUM, **BY_UPDATE, EVERY: 12}, 1),
    "moments": ({**MOMENTS, EVERY: 10}, 1),
    "limit_train_batches": ({**LIMIT, **STEPS, EVERY: 2}, 1),
    "validation within the epoch": ({"trainer.val_check_interval": 4, **PLATEAU, EVERY: 5}, 1),
    "a checkpoint each epoch": ({**ACCUMULATE, **MOMENTUM, "trainer.max_epochs": 100}, 1),
    "accumulation, autograd": (
        {**AUTOGRAD, "trainer.accumulate_grad_batches": 2, EVERY: 3, "trainer.max_epochs": 80},
        1,
    ),
    "2 processes": ({**STEPS, **MOMENTUM, EVERY: 7}, 2),
    "2 processes, autograd": ({**AUTOGRAD, **STEPS, EVERY: 7}, 2),
    "2 processes, moments": ({**MOMENTS, EVERY: 20}, 2),
}
SHORT = ({**STEPS, **MOMENTUM, EVERY: 7, "trainer.max_epochs": 6}, 1)
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


def rows(folder):
    """An experiment of 41 points with 3 features."""
    dice = random.Random(3)
    x = [[round(dice.gauss(0, 1), 3) for _ in range(3)] for _ in range(41)]
    y = [round(2 * a - b + dice.gauss(0, 1), 3) for a, b, _ in x]
    file = folder / "rows.yaml"
    file.write_text(
        "model:\n  class_path: lightning_gd.LinearRegression\n"
        "  init_args: {num_features: 3, start: uniform, lr: 0.02}\n"
        "data:\n  class_path: lightning_gd.PointsData\n"
        f"  init_args: {{x: {x}, y: {y}, batch_size: 4, num_val: 5}}\n"
        "trainer: {max_epochs: 40, accelerator: cpu, enable_progress_bar: false}\n"
    )
    return file


class Case:
    """One command line, run undisturbed once."""

    def __init__(self, forge, settings, world, folder):
        self.forge, self.folder, self.world = forge, folder, world
        folder.mkdir(exist_ok=True)
        settings = {**settings, "test_curve.every_n_updates": 1, "trainer.devices": world}
        if world > 1:
            settings["trainer.strategy"] = "ddp"
        typed = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        self.words = ["fit", "--config", str(rows(folder)), *typed]
        run = forge.start(self.command("undisturbed"), world)
        first_checkpoint(folder / "undisturbed")
        first = time.monotonic()
        assert forge.wait(run) == [0] * world, run["log"].read_text()[-2000:]
        self.seconds = time.monotonic() - first  # in which a kill counts
        self.end = end_of(folder / "undisturbed")

    def command(self, name, *more):
        return [*self.words, "--trainer.default_root_dir", str(self.folder / name), *more]

    def killed(self, name, dice):
        """Start, wait for the first checkpoint and a little more, kill; the phase that was hit."""
        part = dice.random()
        for attempt in range(4):  # the run may have ended: wait less
            again = f"{name}-{attempt}"
            run = self.forge.start(self.command(again), self.world)
            first_checkpoint(self.folder / again)
            time.sleep(part * self.seconds * 0.8 / 2**attempt)
            self.forge.kill(run)
            left = read(last(self.folder / again))["global_step"] < self.end[0]["global_step"]
            if self.forge.wait(run)[0] == -9 and left:
                return again, self.forge.phase(run)
        raise AssertionError(f"{name}: every run had ended before it was killed")

    def check_resumed(self, name):
        """Resume by the same command and `--ckpt_path last`; all must be as undisturbed."""
        statuses, output = self.forge.run(self.command(name, "--ckpt_path", "last"), self.world)
        assert statuses == [0] * self.world, output[-2000:]
        (last_one, *others), (expected, *more) = end_of(self.folder / name), self.end
        for name in COMPARED:
            assert_equal(last_one[name], expected[name], name)
        assert_equal(others, more, "best and curves")


def last(folder):
    (file,) = Path(folder).glob("*/version_0/checkpoints/last.ckpt")
    return file


def end_of(folder):
    """The last checkpoint, the best weights and the curves of the only run in a folder."""
    assert [run.name for run in Path(folder).glob("*/*")] == ["version_0"]
    files = last(folder).parent
    assert sorted(file.name for file in files.iterdir()) == ["best.ckpt", "last.ckpt"]
    best = read(files / "best.ckpt")
    return read(files / "last.ckpt"), best["state_dict"], best["global_step"], curves(files.parent)


def curves(folder):
    """`{tag: {step: value}}`; a step that occurs twice is an error."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag, values in points.items():
        doubled = [step for step, n in Counter(v.step for v in values).items() if n > 1]
        assert not doubled, f"{tag} has steps twice: {doubled}"
    return {tag: {v.step: v.value for v in values} for tag, values in points.items()}


def assert_equal(value, expected, where):
    """To the bit, in whatever is nested."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), f"{where}: {value.keys() ^ expected.keys()}"
        for key in expected:
            assert_equal(value[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert_equal(dict(enumerate(value)), dict(enumerate(expected)), where)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected), where
    else:
        assert value == expected, f"{where}: {value} instead of {expected}"


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    with Forge(tmp_path_factory.mktemp("forge")) as forge:
        yield forge


@pytest.fixture(scope="module")
def short(forge, tmp_path_factory):
    return Case(forge, *SHORT, tmp_path_factory.mktemp("writing"))


KILLED = [
    pytest.param(name, seed, marks=pytest.mark.slow if seed > 1 else ())
    for name in CASES
    for seed in ((1, 2) if name == "mini-batches" else (2,))
]


@pytest.mark.parametrize("name, seed", KILLED)
def test_killed_at_a_random_moment(forge, tmp_path, name, seed):
    case, dice = Case(forge, *CASES[name], tmp_path), random.Random(f"{name} {seed}")
    for kill in range(2):
        run, phase = case.killed(f"kill{kill}", dice)
        with counted("kills survived"), counted(f"  killed while {phase}"):
            case.check_resumed(run)


WRITINGS = [
    "half written",
    pytest.param("before the sync", marks=pytest.mark.slow),
    pytest.param("before the rename", marks=pytest.mark.slow),
    "after the rename",
]


@pytest.mark.parametrize("how", WRITINGS)
def test_killed_in_the_midst_of_writing(forge, short, how):
    """The fifth checkpoint is best or last; either way the run continues from a complete one."""
    statuses, _ = forge.run(short.command(how), die={"save": 5, "how": how})
    assert statuses == [-9]
    folder = last(short.folder / how).parent
    files = {file.name for file in folder.iterdir()}
    partial = {file for file in files if file.endswith(".partial")}
    assert files - partial == {"best.ckpt", "last.ckpt"}
    assert len(partial) == (how != "after the rename")
    with counted("kills survived"), counted("  killed while writing a checkpoint"):
        for file in files - partial:
            read(folder / file)
        short.check_resumed(how)


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(forge, short):
    statuses, output = forge.run(short.command("full"), die={"save": 5, "how": "full disk"})
    assert statuses == [1]
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint ") and "File too large" in line
    assert line.endswith("the previous one is untouched")
    files = last(short.folder / "full").parent.iterdir()
    assert {file.name for file in files} == {"best.ckpt", "last.ckpt"}
    short.check_resumed("full")
