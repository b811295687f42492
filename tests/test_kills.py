"""Runs killed by signal 9 and resumed by the command line end as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import counted, curves_in, plain
from killed import first_checkpoint

from lightning_gd.checkpoints import read

EVERY = "--checkpoint.every_n_updates"
AUTOGRAD = "--model.gradient autograd"
MOMENTUM = "--model.momentum 0.9"
FULL = f"--data.batch_size null --data.passes_per_epoch 50 --trainer.max_steps 900 {MOMENTUM}"
MOMENTS = f"{FULL} --data.moments true --data.updates_per_step 10"
STEPS = '--model.scheduler StepLR --model.scheduler_args {"step_size":3,"gamma":0.9}'
DECAY = '--model.scheduler ExponentialLR --model.scheduler_args {"gamma":0.998}'
BY_UPDATE = f"{DECAY} --model.scheduler_interval update"
PLATEAU = '--model.scheduler ReduceLROnPlateau --model.scheduler_args {"patience":1,"factor":0.7}'
SEVERAL = "--data.batch_size 1 --data.updates_per_step 6 --trainer.max_epochs 60"
LIMIT = "--trainer.limit_train_batches 3 --data.updates_per_step 2 --trainer.max_epochs 70"
WITHIN = f"--trainer.val_check_interval 4 {PLATEAU}"
SUMMED = "--model.accumulate_grad_batches 2 --data.updates_per_step 2 --trainer.max_epochs 100"
AVERAGED = f"{AUTOGRAD} --trainer.accumulate_grad_batches 2 --trainer.max_epochs 80"

# What is typed after `--config rows.yaml`, and the number of processes. 41 rows, 5 of them for
# validation, in batches of 4: 9 updates per epoch, 40 epochs.
CASES = {
    "mini-batches": (f"{STEPS} {MOMENTUM} {EVERY} 7", 1),
    "mini-batches, autograd": (f"{AUTOGRAD} {PLATEAU} {MOMENTUM} {EVERY} 7", 1),
    "full batch": (f"{FULL} {EVERY} 10", 1),
    "full batch, autograd": (f"{FULL} {AUTOGRAD} {BY_UPDATE} {EVERY} 10", 1),
    "several updates per step": (f"{SEVERAL} {MOMENTUM} {BY_UPDATE} {EVERY} 12", 1),
    "moments": (f"{MOMENTS} {EVERY} 10", 1),
    "limit_train_batches": (f"{LIMIT} {STEPS} {EVERY} 2", 1),
    "validation within the epoch": (f"{WITHIN} {EVERY} 5", 1),
    "accumulation, a checkpoint each epoch": (f"{SUMMED} {MOMENTUM}", 1),
    "accumulation, autograd": (f"{AVERAGED} {EVERY} 3", 1),
    "2 processes": (f"{STEPS} {MOMENTUM} {EVERY} 7", 2),
    "2 processes, autograd": (f"{AUTOGRAD} {STEPS} {EVERY} 7", 2),
    "2 processes, moments": (f"{MOMENTS} {EVERY} 20", 2),
}
SHORT = (f"{STEPS} {MOMENTUM} {EVERY} 7 --trainer.max_epochs 6", 1)
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
    return str(file)


class Case:
    """One command line, run undisturbed once."""

    def __init__(self, forge, typed, world, folder):
        self.forge, self.folder, self.world = forge, folder, world
        devices = f"--trainer.devices {world} --trainer.strategy {'ddp' if world > 1 else 'auto'}"
        typed = f"{typed} {devices} --test_curve.every_n_updates 1".split()
        self.words = ["fit", "--config", rows(folder), *typed]
        run = forge.start(self.command("undisturbed"), world)
        first_checkpoint(run, folder / "undisturbed")
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
            first_checkpoint(run, self.folder / again)
            time.sleep(part * self.seconds * 0.8 / 2**attempt)
            self.forge.kill(run)
            ended = self.forge.wait(run)[0] != -9
            done = read(last(self.folder / again))["global_step"]
            if not ended and done < self.end["global_step"]:
                return again, self.forge.phase(run)
        raise AssertionError(f"{name}: every run had ended before it was killed")

    def check_resumed(self, name):
        """Resume by the same command and `--ckpt_path last`; all must be as undisturbed."""
        statuses, output = self.forge.run(self.command(name, "--ckpt_path", "last"), self.world)
        assert statuses == [0] * self.world and "replaced" not in output, output[-2000:]
        resumed = end_of(self.folder / name)
        for what, expected in self.end.items():
            assert resumed[what] == expected, what


def last(folder):
    (file,) = Path(folder).glob("*/version_0/checkpoints/last.ckpt")
    return file


def end_of(folder):
    """The last checkpoint, the best weights and every curve of the only run in a folder."""
    assert [run.name for run in Path(folder).glob("*/*")] == ["version_0"]
    files = last(folder).parent
    assert sorted(file.name for file in files.iterdir()) == ["best.ckpt", "last.ckpt"]
    best, final = read(files / "best.ckpt"), read(files / "last.ckpt")
    kept = {"best": plain(best["state_dict"]), "best update": best["global_step"]}
    return {**kept, **{name: plain(final[name]) for name in COMPARED}, **curves_in(files.parent)}


@pytest.fixture(scope="module")
def short(forge, tmp_path_factory):
    return Case(forge, *SHORT, tmp_path_factory.mktemp("writing"))


def survive_kills(case, seed, times=2):
    dice = random.Random(seed)
    for kill in range(times):
        run, phase = case.killed(f"kill{kill}", dice)
        with counted("kills survived"), counted(f"  killed while {phase}"):
            case.check_resumed(run)


def test_killed_at_a_random_moment(forge, tmp_path):
    typed, world = CASES["mini-batches"]
    survive_kills(Case(forge, f"{typed} --trainer.max_epochs 12", world, tmp_path), seed=1)


LONG = ("full batch, autograd", "mini-batches, autograd", "accumulation, autograd")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in CASES]
)
def test_killed_at_more_random_moments(forge, tmp_path, name):
    """`KILLS=8` kills each of the 13 kinds of runs so often; the first kills are the same."""
    times = int(os.environ.get("KILLS", "2"))
    survive_kills(Case(forge, *CASES[name], tmp_path), seed=name, times=times)


@pytest.mark.parametrize(
    "number, world", [(signal.SIGINT, 1), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow)]
)
def test_interrupted_by_a_signal(forge, tmp_path, number, world):
    """The last process gets it: all finish the step, save, and say how to go on."""
    case = Case(forge, f"{STEPS} {MOMENTUM} {EVERY} 7", world, tmp_path)
    run = forge.start(case.command("interrupted"), world)
    first_checkpoint(run, tmp_path / "interrupted")
    began = time.monotonic()
    os.kill(run["pids"][-1], number)
    statuses, output = forge.wait(run), run["log"].read_text()
    assert time.monotonic() - began < 15  # pictures are drawn
    assert statuses[-1] == 128 + number and set(statuses) <= {128 + number, 128 + signal.SIGTERM}
    made = read(last(tmp_path / "interrupted"))["global_step"]
    assert f"ended the run after {made:,} updates: the same command with --ckpt_path last" in output
    assert made < case.end["global_step"] and "last checkpoint" in output  # of the end table
    case.check_resumed("interrupted")


@pytest.mark.slow
def test_a_process_that_stops_for_less_than_the_timeout(forge, tmp_path):
    """The others wait for it, and the run ends as if nothing had happened."""
    case = Case(forge, f"{STEPS} {MOMENTUM} {EVERY} 7", 2, tmp_path)
    run = forge.start(case.command("stopped"), 2)
    first_checkpoint(run, tmp_path / "stopped")
    for pid in run["pids"]:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(pid, signal.SIGCONT)
    assert forge.wait(run) == [0, 0], run["log"].read_text()[-2000:]
    assert end_of(tmp_path / "stopped") == case.end


@pytest.mark.slow
def test_a_second_sigterm_ends_two_processes_at_once(forge, tmp_path):
    typed = f"{STEPS} {MOMENTUM} {EVERY} 7 --trainer.max_epochs 9999 --trainer.devices 2"
    typed += f" --trainer.strategy ddp --trainer.default_root_dir {tmp_path / 'run'}"
    run = forge.start(["fit", "--config", rows(tmp_path), *typed.split()], 2)
    first_checkpoint(run, tmp_path / "run")
    began = time.monotonic()
    for _ in range(2):
        os.kill(run["pids"][0], signal.SIGTERM)
        time.sleep(0.05)  # or the system makes them one
    first, other = forge.wait(run)
    assert first == -signal.SIGTERM and other in (1, 143), run["log"].read_text()[-2000:]
    assert time.monotonic() - began < 15  # the other waits 5 s for the first to speak
    assert read(last(tmp_path / "run"))["global_step"] > 0


@pytest.mark.slow
def test_killed_between_the_last_validation_of_an_epoch_and_its_end(forge, tmp_path):
    """The plateau steps by a validation loss from before the checkpoint: 9 updates per epoch,
    validation at the 4th and 8th, and the 15th checkpoint is that of update 35 = 3 * 9 + 8."""
    typed, world = CASES["validation within the epoch"]
    case = Case(forge, f"{typed} --trainer.max_epochs 8", world, tmp_path)
    statuses, _ = forge.run(case.command("between"), die={"save": 15, "how": "after the rename"})
    assert statuses == [-9] and read(last(tmp_path / "between"))["global_step"] == 35
    case.check_resumed("between")


@pytest.mark.parametrize(
    "how",
    [
        "half written",
        pytest.param("before the sync", marks=pytest.mark.slow),
        pytest.param("before the rename", marks=pytest.mark.slow),
        pytest.param("after the rename", marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_midst_of_writing(forge, short, how):
    """The fifth checkpoint is best or last; either way the run continues from a complete one."""
    statuses, _ = forge.run(short.command(how), die={"save": 5, "how": how})
    assert statuses == [-9]
    folder = last(short.folder / how).parent
    partial = {file.name for file in folder.glob(".*.partial")}
    assert {f.name for f in folder.iterdir()} - partial == {"best.ckpt", "last.ckpt"}
    assert len(partial) == (how != "after the rename")
    with counted("kills survived"), counted("  killed while writing a checkpoint"):
        assert read(folder / "best.ckpt") and read(folder / "last.ckpt")
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
