"""The same run on 1 to 5 real processes ends in the same weights."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worlds

# Sums over 41 rows are formed in another order: a relative 1e-16 each, and 40 contracting
# updates keep it below 1e-12 of weights of order 1.
CLOSE = {"rtol": 0, "atol": 1e-12}
# On two cores each takes its time.
WORLDS = [
    2,
    pytest.param(3, marks=[pytest.mark.slow, pytest.mark.long]),
    pytest.param(4, marks=pytest.mark.slow),
    pytest.param(5, marks=[pytest.mark.slow, pytest.mark.long]),
]


@pytest.fixture(scope="session")
def ends_of(tmp_path_factory):
    """What each process of a world ended with; every world is run once."""
    folder = tmp_path_factory.mktemp("worlds")
    return functools.cache(
        lambda world: [worlds.run_all()] if world == 1 else ends_in_processes(world, folder)
    )


def ends_in_processes(world, folder, **env):
    """What each process of a world of `world` real processes ended with."""
    launch(world, [worlds.__file__, str(folder)], **env)
    return [torch.load(Path(folder, f"{world}-{rank}.pt")) for rank in range(world)]


def launch(world, command, timeout=240, **env):
    """Run a script in real processes of one machine; its output is shown where it fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*torchrun, f"--nproc-per-node={world}", *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [*worlds.CASES, "auto, by products"])
def test_the_same_weights_in_every_world(ends_of, world, case):
    assert_same(ends_of(1), ends_of(world), case)


def assert_same(ends_alone, processes, case):
    """Every process ended as one that trained alone, and all in the very same weights."""
    for process in processes:
        torch.testing.assert_close(process[case], ends_alone[0][case], **CLOSE)
        assert torch.equal(process[case]["weights"], processes[0][case]["weights"])


@pytest.mark.parametrize("world", WORLDS)
def test_without_the_reduction_the_processes_part(ends_of, world):
    assert_parted(ends_of(1), ends_of(world))


def assert_parted(ends_alone, processes):
    """Without the sum over processes each went its own way."""
    alone, *ends = (end["broken"]["weights"] for end in (*ends_alone, *processes))
    assert torch.equal(alone, ends_alone[0]["full"]["weights"])
    assert not torch.equal(ends[0], ends[1])
    assert all((end - alone).abs().max() > 1e-3 for end in ends)


@pytest.mark.parametrize("world", [1, *WORLDS])
@pytest.mark.parametrize("mode", worlds.MODES)
def test_statistics_of_the_rows_of_one_process_are_named(ends_of, world, mode):
    said = [
        "the buffers running_mean are not the same" in p["warned"][mode] for p in ends_of(world)
    ]
    assert said == [world > 1, *[False] * (world - 1)]  # by the first process


@pytest.mark.parametrize("world", [1, *WORLDS])
def test_the_gradient_check_names_mistakes_on_every_process(ends_of, world):
    assert_mistakes_found(ends_of(world), world)


def assert_mistakes_found(processes, world):
    """Each planted mistake was named on every process, and none where there is none."""
    said = [process["found mistakes"]["sum for mean"] for process in processes]
    named = ["the sum over the rows instead of the mean" in text for text in said]
    # Of 8 rows on 5 processes two have a single one, whose sum is its mean: three name it.
    assert sum(named) == (3 if world == 5 else world)
    assert all(n or "found on another process" in text for n, text in zip(named, said, strict=True))
    for found in (process["found mistakes"] for process in processes):
        assert found["nothing"] == found["nothing, by autograd"] == ""
        if world == 1:
            assert found["no reduction"] == found["times the processes"] == ""
            continue
        assert "reduction is missing" in found["no reduction"]
        assert f"{world} times" in found["times the processes"]
