"""Every wrong input is answered in a line or a few, and nothing is harmed."""

import hashlib
import re
import shutil
import socket
from pathlib import Path

import bad_inputs
import pytest
from conftest import SCRIPT, counted, process, run
from test_mnist_files import small_files

from lightning_gd.cli import VERBS
from lightning_gd.data import mnist

ANSWERED = "bad inputs answered"
MOST_LINES = 3
QUIET = ["--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false"]
GROUPS = {"WRONG": 2, "READ": 2, "FAILED": 1}  # and the status of each
CASES = [(group, name) for group in GROUPS for name in getattr(bad_inputs, group)]


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
    """The case's words after those of a run that is quick and good."""
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


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's, of a DataLoader
@pytest.mark.parametrize("group, name", CASES, ids=[name for _, name in CASES])
def test_bad_inputs_are_answered(folder, group, name):
    words, message = getattr(bad_inputs, group)[name]
    before = contents(folder)
    with counted(ANSWERED):
        done = run(*command(words))
        assert_answered(done, GROUPS[group], message)
        after = contents(folder)
        if group == "WRONG":
            assert after == before  # no log, no checkpoint: nothing was begun
        assert {file: after[file] for file in before} == before
        assert {Path(file).parts[0] for file in after.keys() - before} <= {"logs"}
        assert not list(folder.rglob("*.ckpt")) and "Epoch" not in done[1]


# As processes

PROCESSES = {
    "option": (["--model.lr", "0"], 2, "lr=0.0 must be a finite number above 0"),
    "YAML": (["--config", "broken.yaml"], 2, "broken.yaml is not YAML"),
    "file": (["--trainer.default_root_dir", "mine.txt"], 1, "mine.txt"),
}


@pytest.mark.parametrize("words, status, message", PROCESSES.values(), ids=PROCESSES)
def test_as_processes(forge, folder, words, status, message):
    before = contents(folder)
    with counted(ANSWERED):
        (code,), output = forge.run(command(words))
        assert_answered((code, "", output), status, message)
        after = contents(folder)
        assert {file: after[file] for file in before} == before


def test_a_port_in_use(folder):
    many = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    with socket.create_server(("127.0.0.1", 0)) as server, counted(ANSWERED):
        port = str(server.getsockname()[1])
        done = process(SCRIPT, *command(many), MASTER_PORT=port)
        found = done.returncode, done.stdout, done.stderr
        assert_answered(found, 1, f"port: {port}.*address already in use")
        assert not list(Path("logs").rglob("*.ckpt"))


def test_a_traceback_on_demand(folder):
    status, _, err = run(*command(["--traceback", "--data.batch_size", "0"]))
    assert status == 2 and err.startswith("Traceback") and "error: batch_size=0" in err
    status, _, err = run(*command(["--traceback", "--seed_everything", "much"]))
    assert status == 2 and err.startswith("Traceback") and "\nerror: Parser key" in err


def test_the_number_of_cases():
    assert len(CASES) + len(PROCESSES) + 1 == 263
