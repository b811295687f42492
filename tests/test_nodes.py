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
from killed import Forge, free_port

from lightning_gd.loading import read

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "scripts" / "train.py"
WITHIN = 15.0  # seconds in which the end of one process has ended all
# 4 points in batches of 3: at the second batch one process has no row at all.
LINEAR = ["--config", "linear", "--data.batch_size", "3", "--data.passes_per_epoch", "1"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.precision", "64-true"]
FAILING = ["--model", "failing.Failing", "--trainer.max_steps", "100000"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DDP = ["--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
HOWS = ("raise", "kill", "stop")


def command(root, devices, *more):
    where = ["--trainer.default_root_dir", str(root), "--trainer.devices", str(devices)]
    return ["fit", *LINEAR, *QUIET, *DDP, *where, *more]


def failing(root, how, rank, timeout):
    names = ["--model.how", how, "--model.rank", str(rank), "--process_timeout", str(timeout)]
    return command(root, 2, *FAILING, *names)


def start(words, log, prefix=(), **env):
    """A real process, with its output in a file."""
    with open(log, "w") as file:
        return subprocess.Popen(
            [*prefix, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=TESTS,  # where `failing` is found
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )


def seconds_since_failure(log):
    return time.time() - float(re.findall(r"fails at ([\d.]+)", log.read_text())[0])


def end(root):
    (file,) = root.glob("linear/version_0/checkpoints/last.ckpt")
    return read(file)


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    with Forge(tmp_path_factory.mktemp("forge")) as forge:
        yield forge


# One process ends: so do the others


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", HOWS)
def test_the_end_of_one_process_ends_the_others(forge, tmp_path, how, rank):
    with counted("dead or hanging processes noticed"):
        check_the_end(forge, tmp_path, how, rank)


def check_the_end(forge, tmp_path, how, rank):
    run = forge.start(failing(tmp_path, how, rank, 4), world=2)
    mine, other = (dict(enumerate(run["pids"])).pop(r) for r in (rank, 1 - rank))
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
        assert 3.5 < waited < WITHIN
    else:
        assert "has ended (" in line and waited < WITHIN


LAUNCHERS = {
    "torchrun": [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(SCRIPT)],
    "lightning": [sys.executable, str(SCRIPT)],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("how", HOWS)
def test_the_end_of_one_process_ends_the_job(tmp_path, launcher, how):
    """As a user starts it; torchrun gives a stopped process 30 s more to obey, then kills it."""
    with counted("dead or hanging processes noticed"):
        check_the_job(tmp_path, launcher, how)


def check_the_job(tmp_path, launcher, how):
    log, timeout = tmp_path / "log", 30
    job = start([*LAUNCHERS[launcher], *failing(tmp_path, how, 1, timeout)], log)
    assert job.wait(timeout=120) != 0
    waited = seconds_since_failure(log)
    print(f"{launcher}, {how}: ended after {waited:.1f} s")
    assert waited < WITHIN + (timeout + 30 if how == "stop" else 0)
    text = log.read_text()
    # Whoever comes to speak: the process that fails, the one that is left, or the launcher.
    said = ("error: broken on purpose", "error: another process of this run", "Signal 9 (SIGKILL)")
    assert any(words in text for words in said)
    children = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert children.stdout == ""


# All goes well: so does the end


def clean_exits(forge, tmp_path, tried):
    for n in range(tried):
        with counted("clean exits of runs with 2 processes"):
            words = command(tmp_path / str(n), 2, "--trainer.max_steps", "30")
            assert forge.run(words, world=2)[0] == [0, 0]


def test_runs_with_2_processes_end_cleanly(forge, tmp_path):
    clean_exits(forge, tmp_path, 2)


@pytest.mark.slow
def test_20_runs_with_2_processes_end_cleanly(forge, tmp_path):
    clean_exits(forge, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_runs_end_cleanly(tmp_path, launcher):
    for n in range(3):
        words = [*LAUNCHERS[launcher], *command(tmp_path / str(n), 2, "--trainer.max_steps", "30")]
        with counted("clean exits of runs with 2 processes"):
            status = start(words, tmp_path / "log").wait(timeout=120)
            assert status == 0, (tmp_path / "log").read_text()


# Two nodes


@pytest.fixture
def nodes():
    """Two network namespaces with a cable between them: `(name, interface, address)` of each."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip is missing, which sets up network namespaces")
    names = [f"lgd{os.getpid()}{side}" for side in "ab"]
    ends = [(name, f"v{name}", f"10.77.0.{i + 1}") for i, name in enumerate(names)]
    try:
        for name in names:
            ip("netns", "add", name)
        (a, va, _), (b, vb, _) = ends
        ip("link", "add", va, "netns", a, "type", "veth", "peer", "name", vb, "netns", b)
        for name, interface, address in ends:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield ends
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this system permits no network namespaces: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def start_nodes(nodes, folder, words):
    """`torchrun` on both nodes; the jobs and their logs."""
    port, jobs = free_port(), []
    for rank, (name, interface, _) in enumerate(nodes):
        torchrun = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"]
        torchrun += [f"--master-addr={nodes[0][2]}", f"--master-port={port}", str(SCRIPT)]
        log = folder / f"node{rank}.log"
        inside = ["ip", "netns", "exec", name]
        jobs.append((start([*torchrun, *words], log, inside, GLOO_SOCKET_IFNAME=interface), log))
    return jobs


def test_two_nodes_end_in_the_weights_of_one_process(forge, nodes, tmp_path):
    two = command(tmp_path / "two", 1, "--trainer.num_nodes", "2", "--trainer.max_steps", "60")
    jobs = start_nodes(nodes, tmp_path, two)
    one = ["fit", *LINEAR, *QUIET, "--trainer.default_root_dir", str(tmp_path / "one")]
    assert forge.run([*one, "--trainer.max_steps", "60"])[0] == [0]
    for job, log in jobs:
        assert job.wait(timeout=120) == 0, log.read_text()
    ends = {name: end(tmp_path / name) for name in ("one", "two")}
    assert ends["two"]["global_step"] == 60
    for name, expected in ends["one"]["state_dict"].items():
        # Sums over 3 rows in another order: a few 1e-16 at each contracting update.
        torch.testing.assert_close(ends["two"]["state_dict"][name], expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_worker_of_one_node_ends_both(nodes, tmp_path, how):
    words = failing(tmp_path / "two", how, 1, 60)
    words += ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
    jobs = start_nodes(nodes, tmp_path, words)
    for job, log in jobs:
        assert job.wait(timeout=120) != 0, log.read_text()
    assert seconds_since_failure(jobs[1][1]) < WITHIN
    assert "another process of this run has ended" in jobs[0][1].read_text()
