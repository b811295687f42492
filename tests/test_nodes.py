"""More than one process and more than one node: the same weights, clean ends, no long waits."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import counted
from killed import free_port

from lightning_gd.checkpoints import read

TESTS = Path(__file__).parent
SCRIPT = str(TESTS.parent / "scripts" / "train.py")
WITHIN = 15.0  # seconds in which the end of one process has ended all
# 4 points in batches of 3: at the second batch one process has no row at all.
LINEAR = ["fit", "--config", "linear", "--data.batch_size", "3", "--data.passes_per_epoch", "1"]
LINEAR += ["--trainer.enable_progress_bar", "false", "--trainer.precision", "64-true"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "--standalone", "--nproc-per-node=2", SCRIPT],
    "lightning": [sys.executable, SCRIPT],
}
HOWS = ("raise", "kill", "stop")
NOTICED, CLEAN = "dead or hanging processes noticed", "clean exits of runs with 2 processes"


def command(root, steps, devices=2, **trainer):
    """A run of some updates on the CPU."""
    settings = {"max_steps": steps, "devices": devices, "default_root_dir": root, **trainer}
    if devices > 1 or trainer:
        settings |= {"strategy": "ddp", "accelerator": "cpu"}
    typed = (word for name, value in settings.items() for word in (f"--trainer.{name}", value))
    return [*LINEAR, *map(str, typed)]


def failing(root, how, rank, timeout, **trainer):
    names = ["--model.how", how, "--model.rank", str(rank), "--process_timeout", str(timeout)]
    names += ["--gradient_check", "null"]  # whose copy of the model has no Trainer to ask
    return [*command(root, 100_000, **trainer), "--model", "failing.Failing", *names]


def start(words, log, **env):
    """A real process, with its output in a file, in the folder where `failing` is found."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    with open(log, "w") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, cwd=TESTS, env=env)


def seconds_since_failure(log):
    return time.time() - float(re.findall(r"fails at ([\d.]+)", log.read_text())[0])


# One process ends: so do the others


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", HOWS)
def test_the_end_of_one_process_ends_the_others(forge, tmp_path, how, rank):
    with counted(NOTICED):
        run = forge.start(failing(tmp_path, how, rank, 4), world=2)
        mine, other = run["pids"][rank], run["pids"][1 - rank]
        (status,) = forge.wait({"pids": [other]})
        waited = seconds_since_failure(run["log"])
        if how != "raise":  # which ends by itself
            forge.kill({"pids": [mine]})
        assert forge.wait({"pids": [mine]}) == [2 if how == "raise" else -9]
        lines = run["log"].read_text().splitlines()
        (line,) = (line for line in lines if "another process" in line)
        assert status == 1 and line.startswith("error: another process of this run ")
        if how == "stop":
            assert "did not answer within --process_timeout (Timed out waiting 4000ms" in line
            assert 3.5 < waited < WITHIN + 4
        else:
            assert "has ended (" in line and waited < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("how", HOWS)
def test_the_end_of_one_process_ends_the_job(tmp_path, launcher, how):
    """As a user starts it; torchrun gives a stopped process 30 s more to obey, then kills it."""
    log, timeout = tmp_path / "log", 30
    with counted(NOTICED):
        job = start([*LAUNCHERS[launcher], *failing(tmp_path, how, 1, timeout)], log)
        assert job.wait(timeout=120) != 0
        assert seconds_since_failure(log) < WITHIN + (timeout + 30 if how == "stop" else 0)
        # The first to print: the process that fails, the one that is left, or the launcher.
        by_us = "error: (broken on purpose|another process of this run)"
        assert re.search(by_us + r"|Signal 9 \(SIGKILL\)", log.read_text())
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
        assert left.stdout == ""


# All goes well: so does the end


@pytest.mark.parametrize("tried", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_runs_with_2_processes_end_cleanly(forge, tmp_path, tried):
    for n in range(tried):
        with counted(CLEAN):
            assert forge.run(command(tmp_path / str(n), 30), world=2)[0] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_runs_end_cleanly(tmp_path, launcher):
    for n in range(2):
        words = [*LAUNCHERS[launcher], *command(tmp_path / str(n), 30)]
        with counted(CLEAN):
            status = start(words, tmp_path / "log").wait(timeout=120)
            assert status == 0, (tmp_path / "log").read_text()


# On other numbers of processes


@pytest.mark.slow
@pytest.mark.parametrize("mode, worlds", [("explicit", (1, 2, 3, 1)), ("autograd", (3, 1))])
def test_resumed_on_other_numbers_of_processes(forge, tmp_path, mode, worlds):
    """A part of the run on each number of processes."""
    more = f"--model.gradient {mode} --model.momentum 0.9 --model.scheduler ExponentialLR"
    more += ' --model.scheduler_args {"gamma":0.99} --model.scheduler_interval update'
    more += " --model.lr 0.02 --pictures null"
    updates = 9 * len(worlds)
    for part, world in enumerate(worlds):
        words = command(tmp_path / "parts", 9 * part + 9, world)
        words += [*more.split(), *(["--ckpt_path", "last"] if part else [])]
        statuses, output = forge.run(words, world)
        assert statuses == [0] * world, output[-2000:]
    assert forge.run([*command(tmp_path / "whole", updates, 1), *more.split()])[0] == [0]
    last = "linear/version_0/checkpoints/last.ckpt"
    parts, whole = (read(tmp_path / name / last) for name in ("parts", "whole"))
    assert parts["global_step"] == whole["global_step"] == updates
    for name, expected in whole["state_dict"].items():
        torch.testing.assert_close(parts["state_dict"][name], expected, rtol=0, atol=1e-12)


# Two nodes


@pytest.fixture
def nodes():
    """Two network namespaces with a cable between them: `(name, interface, address)` of each."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip is missing, which sets up network namespaces")
    names = [f"lgd{os.getpid()}{side}" for side in "ab"]
    (a, va, _), (b, vb, _) = ends = [
        (name, f"v{name}", f"10.77.0.{i + 1}") for i, name in enumerate(names)
    ]
    try:
        for name in names:
            ip("netns add", name)
        ip("link add", va, "netns", a, "type veth peer name", vb, "netns", b)
        for name, interface, address in ends:
            ip("-n", name, "addr add", f"{address}/24", "dev", interface)
            ip("-n", name, "link set", interface, "up")
            ip("-n", name, "link set lo up")
        yield ends
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this system permits no network namespaces: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*words):
    subprocess.run(f"ip {' '.join(words)}".split(), check=True, capture_output=True, text=True)


def start_nodes(nodes, folder, words):
    """`torchrun` on both nodes; the jobs and their logs."""
    port, jobs = free_port(), []
    for rank, (name, interface, _) in enumerate(nodes):
        torchrun = ["ip", "netns", "exec", name, *TORCHRUN, "--nnodes=2", "--nproc-per-node=1"]
        torchrun += [f"--master-addr={nodes[0][2]}", f"--master-port={port}"]
        torchrun += [f"--node-rank={rank}", SCRIPT, *words]
        log = folder / f"node{rank}.log"
        jobs.append((start(torchrun, log, GLOO_SOCKET_IFNAME=interface), log))
    return jobs


@pytest.mark.slow
def test_two_nodes_end_in_the_weights_of_one_process(forge, nodes, tmp_path):
    jobs = start_nodes(nodes, tmp_path, command(tmp_path / "2", 60, 1, num_nodes=2))
    assert forge.run(command(tmp_path / "1", 60, 1))[0] == [0]
    for job, log in jobs:
        assert job.wait(timeout=120) == 0, log.read_text()
    last = "linear/version_0/checkpoints/last.ckpt"
    one, two = (read(tmp_path / name / last) for name in ("1", "2"))
    assert two["global_step"] == 60
    for name, expected in one["state_dict"].items():
        # Sums over 3 rows in another order: a few 1e-16 at each contracting update.
        torch.testing.assert_close(two["state_dict"][name], expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_worker_of_one_node_ends_both(nodes, tmp_path, how):
    words = failing(tmp_path / "two", how, 1, 60, devices=1, num_nodes=2)
    (job, log), (failed, failed_log) = start_nodes(nodes, tmp_path, words)
    assert job.wait(timeout=120) != 0 and failed.wait(timeout=120) != 0
    assert seconds_since_failure(failed_log) < WITHIN
    assert "another process of this run has ended" in log.read_text()
