"""Runs killed by signal 9 and resumed by the command line end as if nothing had happened."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from killed import Forge, first_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gd.checkpoints import read

DIGITS = ["--config", "parity_minibatch", "--trainer.max_epochs", "12"]
FULL = ["--config", "parity", "--trainer.max_steps", "700", "--data.passes_per_epoch", "60"]
AUTOGRAD = ["--model.gradient", "autograd"]
EVERY = "--checkpoint.every_n_updates"
STEPS = ["--model.scheduler", "StepLR", "--model.scheduler_args", '{"step_size": 3, "gamma": 0.9}']
PLATEAU = [
    "--model.scheduler",
    "ReduceLROnPlateau",
    "--model.scheduler_args",
    '{"patience": 1, "factor": 0.7}',
]
LIMIT = ["--trainer.limit_train_batches", "11", "--trainer.max_epochs", "30"]
MID = ["--trainer.val_check_interval", "10"]

# The command line, and the number of processes.
CASES = {
    "explicit, mini-batches, validation": ([*DIGITS, *STEPS, EVERY, "7"], 1),
    "autograd, mini-batches, validation": ([*DIGITS, *AUTOGRAD, *PLATEAU, EVERY, "7"], 1),
    "explicit, full batch, momentum": ([*FULL, "--model.momentum", "0.5", EVERY, "10"], 1),
    "autograd, full batch, momentum": (
        [*FULL, *AUTOGRAD, "--model.momentum", "0.5", EVERY, "10"],
        1,
    ),
    "explicit, blocks of many updates": ([*DIGITS, "--data.num_val", "0", EVERY, "100"], 1),
    "explicit, moments": (
        [*FULL, "--model.moments", "true", EVERY, "20", "--trainer.max_steps", "2000"],
        1,
    ),
    "explicit, limit_train_batches": ([*DIGITS, *LIMIT, *STEPS, EVERY, "4"], 1),
    "explicit, validation within the epoch": ([*DIGITS, *MID, *PLATEAU, EVERY, "6"], 1),
    "explicit, each epoch": ([*DIGITS, "--trainer.max_epochs", "40"], 1),
    "explicit, mini-batches, 2 processes": ([*DIGITS, *STEPS, EVERY, "7"], 2),
    "autograd, mini-batches, 2 processes": ([*DIGITS, *AUTOGRAD, *STEPS, EVERY, "7"], 2),
    "explicit, moments, 2 processes": ([*FULL, "--model.moments", "true", EVERY, "15"], 2),
}
QUICK = ("explicit, mini-batches, validation", "autograd, full batch, momentum")
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "epoch_loss", "global_step", "epoch")


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    with Forge(tmp_path_factory.mktemp("forge")) as forge:
        yield forge


class Case:
    """One command line, run undisturbed once."""

    def __init__(self, forge, name, folder):
        self.forge, self.folder, (self.arguments, self.world) = forge, folder, CASES[name]
        started = time.monotonic()
        run = forge.start(self.command("undisturbed"), self.world)
        first_checkpoint(folder / "undisturbed")
        first = time.monotonic()
        assert forge.wait(run) == [0] * self.world, run["log"].read_text()[-2000:]
        self.before, self.after = first - started, time.monotonic() - first
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
            time.sleep(share * self.after * 0.8 / 2**attempt)
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
        torch.testing.assert_close(last_one[name], last_expected[name], rtol=0, atol=0)
    for name in ("state_dict", "global_step"):
        torch.testing.assert_close(best[name], best_expected[name], rtol=0, atol=0)
    assert drawn == drawn_expected


def survive(forge, names, kills, folder, seed):
    """Kill each case so many times; print what was hit; all must end alike."""
    dice, phases, failed = random.Random(seed), Counter(), []
    for name in names:
        case = Case(forge, name, folder / name.replace(" ", "_"))
        for kill in range(kills):
            run, phase = case.killed(f"kill{kill}", dice)
            try:
                assert_same(case.resumed(run), case.end)
                phases[phase] += 1
            except AssertionError as error:
                failed.append(f"{name}, killed {phase}: {str(error)[:500]}")
    tried = len(names) * kills
    print(f"\nkills survived: {tried - len(failed)} of {tried}")
    for phase, count in phases.most_common():
        print(f"  {count:3} while {phase}")
    assert not failed, "\n".join(failed)


def test_killed_at_a_random_moment(forge, tmp_path):
    survive(forge, QUICK, 1, tmp_path, seed=1)


@pytest.mark.slow
def test_killed_at_many_random_moments(forge, tmp_path):
    survive(forge, list(CASES), 3, tmp_path, seed=2)


WRITINGS = ("half written", "before the sync", "before the rename", "after the rename")


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
    for file in ("best.ckpt", "last.ckpt"):
        read(last(case.folder / name).with_name(file))
    assert_same(case.resumed(name), case.end)


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(forge, case):
    statuses, output = forge.run(case.command("full"), die={"save": 5, "how": "full disk"})
    assert statuses == [1]
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint ") and "File too large" in line
    assert line.endswith("the one before it is untouched")
    assert {f.name for f in last(case.folder / "full").parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert_same(case.resumed("full"), case.end)


@pytest.fixture(scope="module")
def case(forge, tmp_path_factory):
    return Case(forge, QUICK[0], tmp_path_factory.mktemp("writing"))
