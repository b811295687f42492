"""Disks that are full, and folders that vanish: one line, and the last whole checkpoint is left."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys

import pytest
from conftest import counted, run, trainer_words

from lightning_gd.callbacks.pictures import Pictures
from lightning_gd.checkpoints import SafeCheckpointIO, read

LEFT = "full disks and lost folders survived"
WORDS = ["--config", "linear", "--data.updates_per_step", "5", "--data.passes_per_epoch", "1000"]
WORDS += ["--checkpoint.every_n_updates", "10", "--pictures", "null", "--gradient_check", "null"]


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of 2 MB in memory."""
    mounted, place = [], tmp_path / "disk"

    def mount(*options):
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", ",".join(["size=2m", *options]), "tmpfs", place]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this system permits no mount: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:  # lazily: TensorBoard's files are still open
        subprocess.run(["umount", "-l", place], check=True)


def fill(folder, left=0):
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - left)


def run_until(monkeypatch, root, act, at=4, words=()):
    """Train; at the `at`-th writing of a checkpoint something happens. Status and error."""
    save, before = SafeCheckpointIO.save_checkpoint, iter(range(at - 1))

    def saving(self, *args, **named):
        if next(before, None) is None:
            act()
        save(self, *args, **named)

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", saving)
    where = trainer_words(max_steps=200, default_root_dir=root)
    status, _, error = run("fit", *WORDS, *words, *where)
    return status, error


def assert_whole(root, updates):
    """Every checkpoint is whole, the last is of so many updates, and nothing is half written."""
    files = list(root.rglob("*.ckpt"))
    assert max((read(file)["global_step"] for file in files), default=0) == updates
    assert not list(root.rglob(".*partial*"))


def test_a_disk_that_fills_up(disk, monkeypatch):
    root = disk()
    with counted(LEFT):
        status, error = run_until(monkeypatch, root, lambda: fill(root))
        assert status == 1 and error.count("\n") == 1, error
        assert "last.ckpt was not written: [Errno 28] No space left on device; the prev" in error
        assert_whole(root, 30)


def test_a_disk_that_fills_up_while_pictures_are_drawn(disk, monkeypatch):
    root, save = disk(), Pictures._save

    def saving(self, *args, **named):
        fill(root, left=12288)  # a picture is larger
        save(self, *args, **named)

    monkeypatch.setattr(Pictures, "_save", saving)
    with counted(LEFT):
        status, error = run_until(monkeypatch, root, list, words=["--pictures", "{}"])
        assert status == 1 and "No space left on device" in error and error.count("\n") == 1
        assert not list(root.rglob("*.png"))
        assert_whole(root, 200)


def test_a_disk_without_room_for_more_files(disk, monkeypatch):
    root = disk("nr_inodes=8")
    with counted(LEFT):
        status, error = run_until(monkeypatch, root, list)
        assert status == 1 and "No space left on device" in error and error.count("\n") == 1
        assert_whole(root, 0)


@pytest.mark.parametrize("what", [".", "linear", "linear/version_0"])
def test_a_folder_that_is_deleted(tmp_path, monkeypatch, what):
    with counted(LEFT):
        status, error = run_until(
            monkeypatch, tmp_path / "logs", lambda: shutil.rmtree(tmp_path / "logs" / what)
        )
        assert status == 1 and error.count("\n") == 1, error
        assert "version_0 has lost its event file: was the folder deleted?" in error
        assert_whole(tmp_path / "logs", 40)  # which was being written then


def test_a_disk_that_may_only_be_read_from_now_on(tmp_path, monkeypatch):
    """As after a failure of the disk: what is there can be read, and nothing more is written."""
    locked = []

    def opening(event, args):  # before Python opens a file: an audit hook stays for ever
        if event == "open" and locked and {*str(args[1])} & {*"wax+"} and locked[0] in str(args[0]):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    sys.addaudithook(opening)
    with counted(LEFT):
        status, error = run_until(monkeypatch, tmp_path, lambda: locked.append(str(tmp_path)))
        locked.clear()
        assert status == 1 and error.count("\n") == 1, error
        assert "[Errno 30] Read-only file system" in error
        assert_whole(tmp_path, 30)


def test_a_disk_that_may_only_be_read(disk):
    root = disk()
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
    with counted(LEFT):
        where = trainer_words(max_steps=20, default_root_dir=root / "logs")
        status, _, error = run("fit", *WORDS, *where)
        assert status == 1 and "Read-only file system" in error and error.count("\n") == 1
        assert list(root.iterdir()) == []
