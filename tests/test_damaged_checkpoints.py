"""A damaged or odd checkpoint is refused in one line, or is the very same."""

import os
import random
import re
import zipfile

import pytest
import torch
from conftest import counted, plain, run, trainer_words

import lightning_gd
import predict
from lightning_gd.checkpoints import OURS, read

ANSWERED = "damaged and odd checkpoints answered"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The last checkpoint of 3 updates on digits, by mini-batches."""
    root = tmp_path_factory.mktemp("good")
    assert run("fit", *WORDS, *trainer_words(max_steps=3, default_root_dir=root))[0] == 0
    return next(root.glob("parity*/version_0/checkpoints/last.ckpt"))


WORDS = ["--config", "parity_minibatch", "--pictures", "null", "--gradient_check", "null"]


def refused(call, *words):
    """What a call says in refusing; a line."""
    with pytest.raises((ValueError, OSError)) as error:
        call(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


# Bytes


def test_300_flipped_bits(good, tmp_path):
    content, whole, dice = good.read_bytes(), plain(read(good)), random.Random(0)
    same = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (tmp_path / "a.ckpt").write_bytes(damaged)
        with counted(ANSWERED):
            try:
                assert repr(plain(read(tmp_path / "a.ckpt"))) == repr(whole)
                same += 1
            except ValueError as error:
                assert "is damaged, cut off" in str(error)
    assert same < 150  # those in the padding between the parts, and in names and times


def test_cut_off_anywhere(good, tmp_path):
    content = good.read_bytes()
    for size in range(0, len(content), max(64, len(content) // 200)):
        (tmp_path / "a.ckpt").write_bytes(content[:size])
        with counted(ANSWERED):
            assert "is damaged, cut off" in refused(read, tmp_path / "a.ckpt")


def packed(good, file):
    """A zip whose parts are compressed, 1,000 times smaller than they are."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(10**6))


def sparse(good, file):
    file.touch()
    os.truncate(file, 10 * 2**30)


THERE_IS_NONE = "there is no such file"
FILES = {  # how each is made, and what is said of it
    "pipe": (lambda good, file: os.mkfifo(file), THERE_IS_NONE),
    "folder": (lambda good, file: file.mkdir(), "is a folder without last.ckpt of a run"),
    "10 GB of nothing": (sparse, "is damaged, cut off"),
    "link to nothing": (lambda good, file: file.symlink_to("nowhere"), THERE_IS_NONE),
    "link to itself": (lambda good, file: file.symlink_to(file.name), ""),
    "link to a device": (lambda good, file: file.symlink_to("/dev/zero"), THERE_IS_NONE),
    "compressed": (packed, "is damaged, cut off"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_ours(good, tmp_path, name):
    make, message = FILES[name]
    make(good, tmp_path / "a.ckpt")
    (tmp_path / "x").mkdir()
    for path in (tmp_path / "a.ckpt", tmp_path / "x" / ".." / "a.ckpt"):
        with counted(ANSWERED):
            assert message in refused(read, path)


def test_links_and_dots_are_followed(good, tmp_path):
    (tmp_path / "a.ckpt").symlink_to(good)
    (tmp_path / "x").mkdir()
    for path in (tmp_path / "a.ckpt", tmp_path / "x" / ".." / "a.ckpt"):
        with counted(ANSWERED):
            assert repr(plain(read(path))) == repr(plain(read(good)))


# Parts


def with_part(path, value):
    """The checkpoint with another value at a path of keys; `...` takes it out."""

    def change(checkpoint):
        *folders, last = path.split("/")
        inner = checkpoint
        for folder in folders:
            inner[folder] = dict(inner[folder])
            inner = inner[folder]
        inner[last] = value
        if value is ...:
            del inner[last]
        return checkpoint

    return change


READ = [  # part, its value, and what is said of it wherever it is read
    ("global_step", ..., "its global_step is NoneType, not int"),
    ("global_step", "x", "its global_step is str, not int"),
    ("pytorch-lightning_version", 5, "its pytorch-lightning_version is int, not str"),
    ("state_dict", ..., "its state_dict is NoneType, not dict"),
    ("state_dict", [1], "its state_dict is list, not dict"),
    ("state_dict/weight", None, "its parameter 'weight' is no tensor"),
    ("state_dict/bias", ..., "parameter 'bias' is absent in the checkpoint"),
    ("loops", 5, "its loops is int, not dict"),
    ("callbacks", [1], "its callbacks is list, not dict"),
    ("optimizer_states", {}, "its optimizer_states is dict, not list"),
    ("lr_schedulers", None, "its lr_schedulers is NoneType, not list"),
    ("hyper_parameters", "x", "its hyper_parameters is str, not dict"),
    ("hyper_parameters/wrong", 1, "wrong"),
    ("hyper_parameters/lr", "x", "lr"),
    ("hyper_parameters/num_features", None, "num_features=None"),
    ("datamodule_hyper_parameters", None, "its datamodule_hyper_parameters is NoneType, not dict"),
    ("curve_files", {}, "its curve_files is dict, not list"),
    (f"{OURS}/format", 99, "it has format 99"),
    (f"{OURS}/format", ..., "it has format None"),
    (OURS, 5, "it was not written by lightning_gd"),
]
RESTORED = [  # what only the continuation of a run asks for
    ("loops", {}, r"cannot be restored: KeyError\('fit_loop'\)"),
    ("optimizer_states", [1], "cannot be restored: TypeError"),
    ("optimizer_states", ..., r"cannot be restored: KeyError\('optimizer_states'\)"),
    ("hyper_parameters/lr", ..., r"cannot be restored: KeyError\('lr'\)"),
    ("updates_in_epoch", ..., r"cannot be restored: KeyError\('updates_in_epoch'\)"),
    ("callbacks/RunHooks", {"a": 1}, r"cannot be restored: KeyError\('epoch_loss'\)"),
]


@pytest.mark.parametrize("part, value, message", READ)
def test_odd_parts(good, tmp_path, capsys, part, value, message):
    torch.save(with_part(part, value)(dict(read(good))), tmp_path / "a.ckpt")
    with counted(ANSWERED):
        assert message in refused(lightning_gd.load, tmp_path / "a.ckpt")
    (tmp_path / "a.png").touch()
    with counted(ANSWERED):
        words = ["--checkpoint", str(tmp_path / "a.ckpt"), str(tmp_path / "a.png")]
        assert predict.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("part, value, message", RESTORED)
def test_odd_parts_of_a_run(good, tmp_path, part, value, message):
    torch.save(with_part(part, value)(dict(read(good))), tmp_path / "a.ckpt")
    where = trainer_words(max_steps=5, default_root_dir=tmp_path)
    with counted(ANSWERED):
        status, _, said = run("fit", *WORDS, *where, "--ckpt_path", tmp_path / "a.ckpt")
        assert status == 2 and re.fullmatch(f"error: checkpoint .* {message}.*\n", said), said


def test_weights_that_are_not_numbers_end_the_run(good, tmp_path):
    nothing = torch.full((784,), torch.nan)
    torch.save(with_part("state_dict/weight", nothing)(dict(read(good))), tmp_path / "a.ckpt")
    where = trainer_words(max_steps=5, default_root_dir=tmp_path)
    with counted(ANSWERED):
        status, _, said = run("fit", *WORDS, *where, "--ckpt_path", tmp_path / "a.ckpt")
        assert status == 3 and said.startswith("error: ") and "nan" in said.lower(), said


def test_a_checkpoint_that_a_slurm_job_left_is_named(good, tmp_path, monkeypatch):
    (tmp_path / "hpc_ckpt_2.ckpt").write_bytes(good.read_bytes())
    for name, value in {"NTASKS": 1, "JOB_ID": 7, "JOB_NAME": "train", "PROCID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    where = trainer_words(max_steps=5, default_root_dir=tmp_path)
    status, output, said = run("fit", *WORDS, *where)
    assert status == 0, said
    assert f"from {tmp_path / 'hpc_ckpt_2.ckpt'}, which a SLURM job left" in output
