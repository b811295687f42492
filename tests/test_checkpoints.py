"""Checkpoints: written whole, refused when they are not ours, resumed to the bit."""

import errno
import io
import json
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from test_kills import COMPARED, assert_equal, curves
from test_roads import RandomRows

import lightning_gd
from lightning_gd import LinearRegression, LogisticParity, RidgeRegression
from lightning_gd.checkpoints import OURS, RunCheckpoint, SafeCheckpointIO, load, read
from lightning_gd.cli import main
from lightning_gd.logger import RunLogger

LINEAR = ["--config", "linear", "--trainer.enable_progress_bar", "false"]
VERBS = ("fit", "validate", "test", "predict")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of the experiment `linear`, written by the command line."""
    root = tmp_path_factory.mktemp("good")
    assert main(["fit", *LINEAR, "--trainer.default_root_dir", str(root), *NO_PICTURES]) == 0
    return root / "linear" / "version_0" / "checkpoints" / "last.ckpt"


NO_PICTURES = ["--trainer.max_steps", "3"]


# Foreign checkpoints


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def with_code(checkpoint, file):
    torch.save({**checkpoint, "extra": Code()}, file)


def with_code_legacy(checkpoint, file):
    torch.save({**checkpoint, "extra": Code()}, file, _use_new_zipfile_serialization=False)


def plain_pickle(checkpoint, file):
    file.write_bytes(pickle.dumps(Code()))


def legacy_cut(checkpoint, file):
    torch.save(checkpoint, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-200])


def cut_to(share):
    def cut(checkpoint, file):
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        file.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])

    return cut


def changed(**entries):
    def change(checkpoint, file):
        torch.save({**checkpoint, **entries}, file)

    return change


def stamped(**entries):
    def change(checkpoint, file):
        torch.save({**checkpoint, OURS: {**checkpoint[OURS], **entries}}, file)

    return change


def without_stamp(checkpoint, file):
    torch.save({k: v for k, v in checkpoint.items() if k != OURS}, file)


def tensor_alone(checkpoint, file):
    torch.save(torch.zeros(3), file)


def text(checkpoint, file):
    file.write_text("model: of another kind\n")


# What is written, and what the refusal must name.
FOREIGN = {
    "code, zip": (with_code, "would run pathlib"),
    "code, legacy": (with_code_legacy, "would run pathlib"),
    "code, plain pickle": (plain_pickle, "would run pathlib"),
    "cut, zip, near the end": (cut_to(0.99), "damaged, cut off"),
    "cut, zip, half": (cut_to(0.5), "damaged, cut off"),
    "cut, zip, 10 bytes": (cut_to(0.0005), "damaged, cut off"),
    "cut, legacy": (legacy_cut, "damaged, cut off"),
    "empty": (cut_to(0), "damaged, cut off"),
    "text": (text, "damaged, cut off"),
    "a tensor": (tensor_alone, "was not written by lightning_gd"),
    "not ours": (without_stamp, "was not written by lightning_gd"),
    "a newer format": (stamped(format=2, version="9.0"), "has format 2 of lightning_gd 9.0"),
    "another model": (
        stamped(model="lightning_gd.models.ridge.RidgeRegression"),
        "of lightning_gd.models.ridge.RidgeRegression, the model is lightning_gd.models.linear",
    ),
    "another shape": (
        changed(state_dict={"weight": torch.zeros(5), "bias": torch.zeros(())}),
        r"parameter 'weight' is \[5\] in the checkpoint, \[1\] in the model",
    ),
    "a parameter less": (
        changed(state_dict={"weight": torch.zeros(1)}),
        r"parameter 'bias' is absent in the checkpoint, \[\] in the model",
    ),
}


@pytest.fixture(params=FOREIGN)
def foreign(request, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where code would leave its mark
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write, message = FOREIGN[request.param]
    file = tmp_path / "foreign.ckpt"
    write(read(good), file)
    yield file, message
    assert not Path("pwned").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_foreign_checkpoints_are_refused_by_every_verb(foreign, verb, capsys):
    file, message = foreign
    assert main([verb, *LINEAR, "--data.num_val", "1", "--ckpt_path", str(file)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert pytest.raises(ValueError, match=message, check=None) if False else message
    import re

    assert re.search(message, error)
    assert not Path("lightning_logs").exists()


def test_foreign_checkpoints_are_refused_in_python(foreign):
    file, message = foreign
    with pytest.raises(ValueError, match=message):
        LinearRegression.load_from_checkpoint(file)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    for run in (trainer.fit, trainer.test):
        with pytest.raises(ValueError, match=message):
            run(LinearRegression(bias=False), datamodule=lightning_gd.PointsData(), ckpt_path=file)
