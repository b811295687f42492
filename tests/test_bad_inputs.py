"""Nothing bad gets in: every wrong input is answered in a line or a few, and nothing is harmed."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import bad_inputs
import pytest
from conftest import counted
from test_cli import LIGHTNINGS, SCRIPT, run
from test_mnist_files import small_files

from lightning_gd.cli import VERBS
from lightning_gd.data import mnist

pytestmark = pytest.mark.filterwarnings(LIGHTNINGS)
ANSWERED = "bad inputs answered"
MOST_LINES = 3
QUIET = ["--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The user's files: every case must leave them as they are."""
    folder = tmp_path_factory.mktemp("bad")
    bad_inputs.write(folder)
    return folder


@pytest.fixture
def folder(files, monkeypatch):
    """The working folder, with the user's files, and the place of the logs in it."""
    monkeypatch.chdir(files)
    for name, content in small_files().items():
        monkeypatch.setitem(mnist.RAW_FILES, name, hashlib.sha256(content).hexdigest())
    yield files
    shutil.rmtree(files / "logs", ignore_errors=True)


def command(words):
    """The case's words behind those of a run that is quick and good."""
    verb = words[:1] if words[0] in (*VERBS, "fitt") else []
    base = [*QUIET, "--trainer.default_root_dir", "logs"]
    base += [] if "--config" in words else bad_inputs.LINE
    return [*verb, *base, *words[len(verb) :]]


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def assert_answered(done, status, message):
    code, out, err = done
    assert code == status, err or out
    lines = err.splitlines()
    assert err.startswith("error: ") and len(lines) <= MOST_LINES and len(err) < 1000, err
    assert re.search(message, err), err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("name", bad_inputs.WRONG)
def test_what_the_user_wrote_wrong_is_status_2(folder, name):
    words, message = bad_inputs.WRONG[name]
    before = contents(folder)
    with counted(ANSWERED):
        assert_answered(run(*command(words)), 2, message)
        assert contents(folder) == before  # no log, no checkpoint: nothing was begun


@pytest.mark.parametrize("name", bad_inputs.READ)
def test_what_the_rows_tell_is_status_2_before_an_update(folder, name):
    words, message = bad_inputs.READ[name]
    before = contents(folder)
    with counted(ANSWERED):
        done = run(*command(words))
        assert_answered(done, 2, message)
        after = contents(folder)
        assert {file: after[file] for file in before} == before
        assert {Path(file).parts[0] for file in after.keys() - before} <= {"logs"}
        assert not list(folder.rglob("*.ckpt")) and "Epoch" not in done[1]


@pytest.mark.parametrize("name", bad_inputs.FAILED)
def test_what_the_world_did_is_status_1(folder, name):
    words, message = bad_inputs.FAILED[name]
    before = contents(folder)
    with counted(ANSWERED):
        assert_answered(run(*command(words)), 1, message)
        after = contents(folder)
        assert {file: after[file] for file in before} == before
        assert not list(folder.rglob("*.ckpt"))


# As processes

PROCESSES = {
    "option": (["--model.lr", "0"], 2, "lr=0.0 must be a finite number above 0"),
    "YAML": (["--config", "broken.yaml"], 2, "broken.yaml, line 2, column 1"),
    "file": (["--trainer.default_root_dir", "mine.txt"], 1, "mine.txt"),
}


def process(words, **env):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words, status, message", PROCESSES.values(), ids=PROCESSES)
def test_as_processes(folder, words, status, message):
    before = contents(folder)
    with counted(ANSWERED):
        assert_answered(process(command(words)), status, message)
        after = contents(folder)
        assert {file: after[file] for file in before} == before


def test_a_port_in_use(folder):
    many = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    with socket.create_server(("127.0.0.1", 0)) as server, counted(ANSWERED):
        port = str(server.getsockname()[1])
        done = process(command(many), MASTER_PORT=port)
        assert_answered(done, 1, f"port: {port}.*address already in use")
        assert not list(Path("logs").rglob("*.ckpt"))


def test_a_traceback_where_it_is_asked_for(folder):
    status, _, err = run(*command(["--traceback", "--data.batch_size", "0"]))
    assert status == 2 and err.startswith("Traceback") and "error: batch_size=0" in err
    status, _, err = run(*command(["--traceback", "--model.lr", "much"]))
    assert status == 2 and err.startswith("Traceback") and "\nerror: Parser key" in err


def test_a_table_of_this_size():
    assert len(bad_inputs.WRONG) + len(bad_inputs.FAILED) >= 50
