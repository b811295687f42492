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

from lightning_gd.loading import read

EVERY = "--checkpoint.every_n_updates"
FULL = ["--data.batch_size", "null", "--data.passes_per_epoch", "50", "--trainer.max_steps", "900"]
AUTOGRAD = ["--model.gradient", "autograd"]
MOMENTUM = ["--model.momentum", "0.9"]
MOMENTS = [*FULL, "--model.moments", "true"]
STEPS = ["--model.scheduler", "StepLR", "--model.scheduler_args", '{"step_size": 3, "gamma": 0.9}']
PLATEAU = [
    "--model.scheduler",
    "ReduceLROnPlateau",
    "--model.scheduler_args",
    '{"patience": 1, "factor": 0.7}',
]
BLOCKS = ["--data.num_val", "0", "--data.batch_size", "1", "--trainer.max_epochs", "90"]
LIMIT = ["--trainer.limit_train_batches", "5", "--trainer.max_epochs", "70"]
WITHIN = ["--trainer.val_check_interval", "4"]
LONGER = ["--trainer.max_epochs", "80"]

# The command line after `--config rows.yaml`, and the number of processes. 41 rows, 5 of them for
# validation, in batches of 4: 9 updates an epoch, 40 epochs.
CASES = {
    "explicit, mini-batches, validation": ([*STEPS, *MOMENTUM, EVERY, "7"], 1),
    "autograd, mini-batches, plateau": ([*AUTOGRAD, *PLATEAU, *MOMENTUM, EVERY, "7"], 1),
    "explicit, full batch": ([*FULL, *MOMENTUM, EVERY, "10"], 1),
    "autograd, full batch": (
        [*FULL, *AUTOGRAD, *MOMENTUM, EVERY, "10", "--trainer.max_steps", "400"],
        1,
    ),
    "explicit, blocks of many updates": ([*BLOCKS, *MOMENTUM, EVERY, "50"], 1),
    "explicit, moments": ([*MOMENTS, *MOMENTUM, EVERY, "10"], 1),
    "explicit, limit_train_batches": ([*LIMIT, *STEPS, EVERY, "4"], 1),
    "explicit, validation within the epoch": ([*WITHIN, *PLATEAU, EVERY, "5"], 1),
    "explicit, a checkpoint each epoch": (LONGER, 1),
    "explicit, 2 processes": ([*STEPS, *MOMENTUM, EVERY, "7"], 2),
    "autograd, 2 processes": ([*AUTOGRAD, *STEPS, EVERY, "7"], 2),
    "explicit, moments, 2 processes": ([*MOMENTS, *MOMENTUM, EVERY, "20"], 2),
}
SHORT = "a short run"
CASES[SHORT] = ([*STEPS, *MOMENTUM, EVERY, "7", "--trainer.max_epochs", "6"], 1)
QUICK = ("explicit, mini-batches, validation",)
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "epoch_loss", "global_step", "epoch")


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
        f"  init_args: {{x: {x}, y: {y}, batch_size: 4, num_val: 5, test_every: 1}}\n"
        "trainer: {max_epochs: 40}\n"
    )
    return file


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    with Forge(tmp_path_factory.mktemp("forge")) as forge:
        yield forge


class Case:
    """One command line, run undisturbed once."""

    def __init__(self, forge, name, folder):
        self.forge, self.folder, (arguments, self.world) = forge, folder, CASES[name]
        folder.mkdir(exist_ok=True)
        self.arguments = ["--config", str(rows(folder)), *arguments]
        run = forge.start(self.command("undisturbed"), self.world)
        first_checkpoint(folder / "undisturbed")
        first = time.monotonic()
        assert forge.wait(run) == [0] * self.world, run["log"].read_text()[-2000:]
        self.seconds = time.monotonic() - first  # in which a kill counts
        self.end = end_of(folder / "undisturbed")

    def command(self, name, *more):
        many = ["--trainer.devices", str(self.world), "--trainer.accelerator", "cpu"]
        many += ["--trainer.strategy", "ddp"] if self.world > 1 else []
        quiet = ["--trainer.enable_progress_bar", "false"]
        root = ["--trainer.default_root_dir", str(self.folder / name)]
        return ["fit", *self.arguments, *many, *quiet, *root, *more]

    def killed(self, name, dice):
        """Start, wait for the first checkpoint and a little more, kill; the phase that was hit."""
        share = dice.random()
        for attempt in range(4):  # the run may have ended: wait less
            run = self.forge.start(self.command(f"{name}-{attempt}"), self.world)
            first_checkpoint(self.folder / f"{name}-{attempt}")
            time.sleep(share * self.seconds * 0.8 / 2**attempt)
            self.forge.kill(run)
            if self.forge.wait(run)[0] == -9 and self.updates(f"{name}-{attempt}"):
                return f"{name}-{attempt}", self.forge.phase(run)
        raise AssertionError(f"{name}: every run had ended before it was killed")

    def updates(self, name):
        """Whether updates are left to do after the last checkpoint."""
        return read(last(self.folder / name))["global_step"] < self.end[0]["global_step"]

    def resumed(self, name):
        """What the run ended with, resumed by its own command and `--ckpt_path last`."""
        statuses, output = self.forge.run(self.command(name, "--ckpt_path", "last"), self.world)
        assert statuses == [0] * self.world, output[-2000:]
        return end_of(self.folder / name)


def last(folder):
    (file,) = Path(folder).glob("*/version_0/checkpoints/last.ckpt")
    return file


def end_of(folder):
    """The last checkpoint, the best weights and the curves of the only run in a folder."""
    assert [run.name for run in Path(folder).glob("*/*")] == ["version_0"]
    files = last(folder).parent
    assert sorted(file.name for file in files.iterdir()) == ["best.ckpt", "last.ckpt"]
    return read(files / "last.ckpt"), read(files / "best.ckpt"), curves(files.parent)


def curves(folder):
    """`{tag: {step: value}}`; a step that occurs twice is an error."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag, values in points.items():
        doubled = [step for step, n in Counter(v.step for v in values).items() if n > 1]
        assert not doubled, f"{tag} has steps twice: {doubled}"
    return {tag: {v.step: v.value for v in values} for tag, values in points.items()}


def assert_same(end, expected):
    (last_one, best, drawn), (last_expected, best_expected, drawn_expected) = end, expected
    for name in COMPARED:
        assert_equal(last_one[name], last_expected[name], name)
    for name in ("state_dict", "global_step"):
        assert_equal(best[name], best_expected[name], f"best {name}")
    assert_equal(drawn, drawn_expected, "curves")


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


def survive(forge, names, kills, folder, seed):
    """Kill each case so many times, at moments that the seed draws; all must end alike."""
    dice, failed = random.Random(seed), []
    for name in names:
        case = Case(forge, name, folder / name.replace(" ", "_"))
        for kill in range(kills):
            run, phase = case.killed(f"kill{kill}", dice)
            try:
                with counted("kills survived"), counted(f"  killed while {phase}"):
                    assert_same(case.resumed(run), case.end)
            except AssertionError as error:
                failed.append(f"{name}, killed while {phase}: {str(error)[:500]}")
    assert not failed, "\n".join(failed)


def test_killed_at_a_random_moment(forge, tmp_path):
    survive(forge, QUICK, 2, tmp_path, seed=1)


@pytest.mark.slow
def test_killed_at_many_random_moments(forge, tmp_path):
    survive(forge, [name for name in CASES if name != SHORT], 2, tmp_path, seed=2)


WRITINGS = [
    "half written",
    pytest.param("before the sync", marks=pytest.mark.slow),
    pytest.param("before the rename", marks=pytest.mark.slow),
    "after the rename",
]


@pytest.mark.parametrize("how", WRITINGS)
def test_killed_in_the_midst_of_writing(forge, case, how):
    """The fifth checkpoint is best or last; either way one that was complete is gone on from."""
    name = how.replace(" ", "_")
    statuses, _ = forge.run(case.command(name), die={"save": 5, "how": how})
    assert statuses == [-9]
    files = {file.name for file in last(case.folder / name).parent.iterdir()}
    partial = {file for file in files if file.endswith(".partial")}
    assert files - partial == {"best.ckpt", "last.ckpt"}
    assert len(partial) == (how != "after the rename")
    with counted("kills survived"), counted("  killed while writing a checkpoint"):
        for file in ("best.ckpt", "last.ckpt"):
            read(last(case.folder / name).with_name(file))
        assert_same(case.resumed(name), case.end)


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(forge, case):
    statuses, output = forge.run(case.command("full"), die={"save": 5, "how": "full disk"})
    assert statuses == [1]
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint ") and "File too large" in line
    assert line.endswith("the one before it is untouched")
    assert {f.name for f in last(case.folder / "full").parent.iterdir()} == {
        "best.ckpt",
        "last.ckpt",
    }
    assert_same(case.resumed("full"), case.end)


@pytest.fixture(scope="module")
def case(forge, tmp_path_factory):
    return Case(forge, SHORT, tmp_path_factory.mktemp("writing"))
