"""Checkpoints: written whole, refused if not ours, continued to the bit."""

import io
import math
import os
import pickle
import re
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    RandomRows,
    counted,
    curves_in,
    events_in,
    line,
    plain,
    run,
    scheduled,
    trainer_words,
)
from conftest import fit as train
from PIL import Image

import lightning_gd
from lightning_gd import LinearRegression, PointsData
from lightning_gd.callbacks.run_checkpoint import RunCheckpoint
from lightning_gd.checkpoints import OURS, SafeCheckpointIO, read
from lightning_gd.logger import RunLogger

REFUSED = "foreign checkpoints refused"
VERBS = ("fit", "validate", "test", "predict")


def command(verb, *more, root=None):
    where = {} if root is None else {"default_root_dir": root}
    return [verb, "--config", "linear", *trainer_words(**where), *more]


def last(root, version=0):
    return root / "linear" / f"version_{version}" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The last checkpoint of a run of the command line, after 3 updates."""
    root = tmp_path_factory.mktemp("good")
    status, _, error = run(*command("fit", "--trainer.max_steps", "3", root=root))
    assert status == 0, error
    return last(root)


# Foreign checkpoints


class Code:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def with_code(zipped):
    def write(checkpoint, file):
        content = {**checkpoint, "extra": Code()}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)

    return write


def pickled_code(checkpoint, file):
    file.write_bytes(pickle.dumps(Code(), protocol=2))


def with_class_path(checkpoint, file):
    call = {"class_path": "os.mkdir", "init_args": {"path": "ran"}}
    hyper_parameters = {**checkpoint["hyper_parameters"], "optimizer_args": {"x": call}}
    instantiator = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save({**checkpoint, "hyper_parameters": {**hyper_parameters, **instantiator}}, file)


def cut(fraction, zipped=True):
    def write(checkpoint, file):
        whole = io.BytesIO()
        torch.save(checkpoint, whole, _use_new_zipfile_serialization=zipped)
        file.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * fraction)])

    return write


def flipped(checkpoint, file):
    torch.save(checkpoint, file)
    content, weight = bytearray(file.read_bytes()), checkpoint["state_dict"]["weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    file.write_bytes(content)


def changed(**entries):
    return lambda checkpoint, file: torch.save({**checkpoint, **entries}, file)


def stamped(**entries):
    return lambda c, file: torch.save({**c, OURS: {**c[OURS], **entries}}, file)


DAMAGED, NOT_OURS = "is damaged, cut off, or no checkpoint", "was not written by lightning_gd"
VERSIONS = r"has format {} of lightning_gd {}, and this is lightning_gd [\d.]+, which reads 2"
RIDGE = "lightning_gd.models.ridge.RidgeRegression"

# How each is written, and what its refusal must say.
FOREIGN = {
    "code, zip": (with_code(True), "would run posix.mkdir"),
    "code, legacy": (with_code(False), DAMAGED),
    "code, bare pickle": (pickled_code, DAMAGED),
    "code, by name": (with_class_path, "its settings hold a class_path"),
    "zip cut near its end": (cut(0.99), DAMAGED),
    "zip cut in half": (cut(0.5), DAMAGED),
    "zip cut at its start": (cut(0.001), DAMAGED),
    "a flipped bit": (flipped, DAMAGED),
    "legacy cut in half": (cut(0.5, zipped=False), DAMAGED),
    "empty": (cut(0), DAMAGED),
    "text": (lambda checkpoint, file: file.write_text("model: another\n"), DAMAGED),
    "a tensor": (lambda checkpoint, file: torch.save(torch.zeros(3), file), NOT_OURS),
    "another program's": (changed(**{OURS: None}), NOT_OURS),
    "a newer format": (stamped(format=3, version="9.0"), VERSIONS.format(3, "9.0")),
    "version 0.1.0": (stamped(format=1, version="0.1.0"), VERSIONS.format(1, "0.1.0")),
    "another model": (
        stamped(model=RIDGE),
        f"is of {RIDGE}, the model is lightning_gd.models.linear.LinearRegression",
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
    assert not Path("ran").exists()


def test_the_code_would_run(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_code(True)(read(good), tmp_path / "foreign.ckpt")
    torch.load(tmp_path / "foreign.ckpt", weights_only=False)
    assert Path("ran").exists()


def test_refused(foreign, make_trainer):
    file, message = foreign
    for verb in VERBS if "mkdir" in message or "the model is" in message else ("test",):
        with counted(REFUSED):
            status, _, error = run(*command(verb, "--data.num_val", "1", "--ckpt_path", file))
            assert status == 2 and re.search(message, error), error
            assert error.startswith("error: ") and error.count("\n") == 1
    assert not Path("lightning_logs").exists()
    model, data = LinearRegression(), PointsData(num_val=1)
    attempts = [lambda: LinearRegression.load_from_checkpoint(file)]
    if "RidgeRegression" not in message:  # whose it would then be
        attempts.append(lambda: lightning_gd.load(file))
    for verb in VERBS:
        start = getattr(make_trainer(), verb)
        attempts.append(partial(start, model, datamodule=data, ckpt_path=file))
    for attempt in attempts:
        with counted(REFUSED), pytest.raises(ValueError, match=message):
            attempt()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.ckpt", "s3://a/a.ckpt", "file:///a.ckpt"])
def test_urls_are_refused(url, make_trainer):
    start = partial(make_trainer().fit, LinearRegression(), datamodule=PointsData())
    for attempt in (
        lightning_gd.load,
        LinearRegression.load_from_checkpoint,
        lambda url: start(ckpt_path=url),
    ):
        with pytest.raises(ValueError, match=f"checkpoint {url} is a URL"):
            attempt(url)


def test_a_class_is_not_imported_because_a_checkpoint_says_so(good, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    stamped(model="stranger.Model")(read(good), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is of stranger.Model: import that class first"):
        lightning_gd.load(tmp_path / "a.ckpt")


def test_load_gives_the_model_back(good):
    model = lightning_gd.load(good)
    assert type(model) is LinearRegression and model.hparams["lr"] == 0.01
    # The points y = 2x from w = 0: 1 − w/2 shrinks by 1 − 0.15 at each of 3 updates. In float32.
    assert model.weight.item() == pytest.approx(2 * (1 - 0.85**3), rel=1e-6)
    assert lightning_gd.load(good, lr=0.5).hparams["lr"] == 0.5


# Writing


def test_a_full_disk_leaves_the_last_good_file(tmp_path, make_trainer):
    trainer, file = make_trainer(max_steps=1, **saving(tmp_path)), tmp_path / "last.ckpt"
    trainer.fit(LinearRegression(), datamodule=PointsData())
    assert isinstance(trainer.strategy.checkpoint_io, SafeCheckpointIO)
    before, limit = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="last.ckpt was not written.*File too large.*untouched"):
            trainer.save_checkpoint(file)
        with pytest.raises(OSError, match="new.ckpt was not written.*there is none yet"):
            trainer.save_checkpoint(tmp_path / "new.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert file.read_bytes() == before


# Continuing in the same process, from every checkpoint that a run writes

STEP = scheduled("StepLR", step_size=2, gamma=0.9)
PLATEAU = scheduled("ReduceLROnPlateau", patience=0, factor=0.5)
BY_UPDATE = {**PLATEAU, "scheduler_interval": "update"}
VALIDATED = {"batch_size": 5, "num_val": 3}  # 4 batches an epoch
HALVES = {"batch_size": 2, "num_val": 3}
BY_STEPS = {"max_steps": 20, "check_val_every_n_epoch": None, "val_check_interval": 3}

# Data, model and Trainer.
CASES = {
    "full": ({"passes_per_epoch": 6, "updates_per_step": 2}, {}, {"max_steps": 20}),
    "moments": ({"passes_per_epoch": 6, "moments": True}, {}, {"max_steps": 20}),
    "mini, steps": ({"batch_size": 8}, STEP, {"max_steps": 20}),
    "mini, epochs": ({"batch_size": 8}, STEP, {"max_epochs": 6}),
    "several": ({"batch_size": 2, "updates_per_step": 4}, STEP, {"max_steps": 40}),
    "validation": (VALIDATED, STEP, {"max_epochs": 5}),
    "validation within": (HALVES, STEP, {"max_epochs": 3, "val_check_interval": 3}),
    "validation halfway": (HALVES, STEP, {"max_epochs": 3, "val_check_interval": 0.5}),
    "validation each second": (VALIDATED, STEP, {"max_epochs": 6, "check_val_every_n_epoch": 2}),
    "validation by steps": (VALIDATED, STEP, BY_STEPS),
    "plateau": (VALIDATED, PLATEAU, {"max_epochs": 5}),
    "plateau by updates": ({"batch_size": 5}, BY_UPDATE, {"max_epochs": 4}),
    "limited": ({"batch_size": 3}, STEP, {"max_epochs": 4, "limit_train_batches": 4}),
    "accumulated": ({"batch_size": 3}, {"accumulate_grad_batches": 3}, {"max_epochs": 4}),
}


def saving(folder, **settings):
    """What a Trainer needs for a `RunCheckpoint`."""
    checkpoint = RunCheckpoint(str(folder), **settings)
    return {"callbacks": [checkpoint], "enable_checkpointing": True, "num_sanity_val_steps": 0}


class Keep(SafeCheckpointIO):
    """Keeps a copy of every `last.ckpt`."""

    def __init__(self, model, folder):
        super().__init__(model)
        self.folder, self.files = folder, []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path)
        if Path(path).name == "last.ckpt":
            self.files.append(self.folder / f"{len(self.files)}.ckpt")
            shutil.copy(path, self.files[-1])


def fit(make_trainer, root, case, mode, every, start=None, keep=None):
    """Train, into `root/run/version_0`; the Trainer, and that folder."""
    data, settings, limits = case
    if settings.get("accumulate_grad_batches") and mode == "autograd":
        settings, limits = {}, {**limits, **settings}
    logger = RunLogger(str(root), "run", 0)
    if start is not None:
        logger.cut(*read(start)["curve_files"])
    checkpoints = saving(Path(logger.log_dir, "checkpoints"), every_n_updates=every)
    model = line(momentum=0.9, gradient=mode, **settings)
    plugins = None if keep is None else [Keep(model, keep)]
    trainer = make_trainer(logger=logger, plugins=plugins, **checkpoints, **limits)
    trainer.fit(model, datamodule=RandomRows(**data), ckpt_path=start)
    return trainer, Path(logger.log_dir)


def end_of(folder):
    last_one, best = (read(folder / "checkpoints" / f"{name}.ckpt") for name in ("last", "best"))
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    kept = {name: last_one[name] for name in names}
    unfinished = last_one["callbacks"]["RunHooks"]
    end: Any = plain({**kept, "best": best["state_dict"], "mean": unfinished})
    return {**end, "curves": curves_in(folder)}


@pytest.mark.parametrize(
    ("mode", "every"),
    [
        ("explicit", 2),
        ("explicit", None),
        ("autograd", 2),
        pytest.param("autograd", None, marks=pytest.mark.slow),
        pytest.param("explicit", 1, marks=pytest.mark.slow),
        pytest.param("autograd", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_continuing_from_every_checkpoint(make_trainer, tmp_path, case, mode, every):
    per_step = CASES[case][0].get("updates_per_step", 1)
    if every is not None and mode == "explicit":
        every = max(every, per_step)  # checkpoints are written between steps
    trainer, folder = fit(make_trainer, tmp_path / "all", CASES[case], mode, every, keep=tmp_path)
    files, expected = trainer.strategy.checkpoint_io.files, end_of(folder)
    assert expected["global_step"] == trainer.global_step and len(files) >= 2
    for file in files if every == 1 else files[1:-1:4]:
        root = tmp_path / file.stem
        again = root / "run" / "version_0"
        shutil.copytree(folder, again)  # with the curves past the checkpoint, as a kill leaves them
        start = str(shutil.copy(file, again / "checkpoints" / "last.ckpt"))
        resumed = end_of(fit(make_trainer, root, CASES[case], mode, every, start)[1])
        assert resumed == expected, file.stem


def test_a_finished_run_is_extended_as_if_it_had_been_longer(make_trainer, tmp_path):
    ends = {}
    for steps in (7, 20):
        case = (*CASES["mini, steps"][:2], {"max_steps": steps})  # 3 batches an epoch
        ends[steps] = fit(make_trainer, tmp_path / str(steps), case, "explicit", None)[1]
    start = str(ends[7] / "checkpoints" / "last.ckpt")
    folder = fit(make_trainer, tmp_path / "7", CASES["mini, steps"], "explicit", None, start)[1]
    longer, straight = end_of(folder), end_of(ends[20])
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "curves"):
        assert longer[name] == straight[name], name


def test_last_is_the_last_and_best_the_best(make_trainer, tmp_path):
    """With a rate so large that the validation loss climbs from the first epoch on."""
    trainer = make_trainer(max_epochs=4, **saving(tmp_path))
    model, losses = line(momentum=0.99), []
    model.on_validation_end = lambda: losses.append(trainer.callback_metrics["val/loss"].item())
    trainer.fit(model, datamodule=RandomRows(**VALIDATED))
    best, final = (read(tmp_path / f"{name}.ckpt")["epoch"] for name in ("best", "last"))
    assert final == 3 and best == losses.index(min(losses)) < 3


def test_typed_rates_reach_the_optimizer_and_its_schedule(make_trainer, tmp_path):
    data, settings, limits = CASES["mini, epochs"]
    folder = fit(make_trainer, tmp_path, (data, settings, {"max_epochs": 2}), "explicit", None)[1]
    trainer = make_trainer(**limits, **saving(tmp_path / "again"))
    file = folder / "checkpoints" / "last.ckpt"
    train(trainer, data, ckpt_path=file, lr=0.04, momentum=0.5, **settings)
    (group,) = trainer.optimizers[0].param_groups
    assert group["momentum"] == 0.5
    assert group["lr"] == pytest.approx(0.04 * 0.9**3, rel=1e-12)  # 6 epochs, a step each second


# Whose settings win


def resume(root, *more):
    """Status, the line that names the settings, and the error of a run taken to 6 updates."""
    words = [*more, "--trainer.max_steps", "6", "--ckpt_path", "last"]
    status, output, error = run(*command("fit", *words, root=root))
    return status, output.split("\n")[0], error


@pytest.fixture
def root(good, tmp_path):
    """A copy of the folder of the run of 3 updates."""
    return shutil.copytree(good.parents[3], tmp_path / "root")


def weight(root):
    return lightning_gd.load(last(root)).state_dict()["weight"].item()


def after(*rates):
    """w of y = 2x after updates from 0: 1 − w/2 shrinks by 1 − 15·lr at each. In float32."""
    return pytest.approx(2 * (1 - math.prod(1 - 15 * lr for lr in rates)), rel=1e-6)


def test_the_settings_of_the_checkpoint_win_over_the_experiment(tmp_path):
    status, _, error = resume(tmp_path)
    assert status == 1 and "no run in" in error
    typed = ["--model.lr", "0.02", "--data.seed", "5", "--trainer.max_steps", "3"]
    assert run(*command("fit", *typed, root=tmp_path))[0] == 0
    status, line, _ = resume(tmp_path)
    assert status == 0 and line == f"from {last(tmp_path)}, update 3"
    assert read(last(tmp_path))["datamodule_hyper_parameters"]["seed"] == 5
    assert weight(tmp_path) == after(*6 * [0.02])
    assert sorted(path.name for path in (tmp_path / "linear").iterdir()) == ["version_0"]


TYPED = {
    "model.lr": ("0.02", "0.01", after(*3 * [0.01], *3 * [0.02])),
    "model.gradient": ("autograd", "explicit", after(*6 * [0.01])),
    "data.updates_per_step": ("2", "10", after(*6 * [0.01])),
}


@pytest.mark.parametrize("name", TYPED)
def test_what_is_typed_wins_and_is_named(root, name):
    value, old, end = TYPED[name]
    status, line, _ = resume(root, f"--{name}", value)
    named = f"typed: {name} {value} instead of {old} of the checkpoint"
    assert status == 0 and line == f"from {last(root)}, update 3; {named}"
    assert weight(root) == end and read(last(root))["global_step"] == 6
    steps = [step for step, _ in curves_in(last(root).parents[1])["train/loss"]]
    assert steps == list(range(7))


def test_what_would_change_the_model_is_refused(good, root):
    for typed, message in (
        (["--model", "RidgeRegression"], f"LinearRegression, the model is {RIDGE}"),
        (["--model.optimizer", "Adam"], "model.optimizer 'Adam' .*its state would be lost"),
    ):
        status, _, error = resume(root, *typed)
        assert status == 2 and re.search(message, error), error
        assert last(root).read_bytes() == good.read_bytes()


def pictures_in(folder):
    """The number of pictures by tag in TensorBoard, and each file, pixel by pixel."""
    events, files = events_in(folder), sorted((folder / "pictures").glob("*.png"))
    tags = {tag: len(events.Images(tag)) for tag in events.Tags()["images"]}
    return tags, {file.stem: np.asarray(Image.open(file), float) for file in files}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 6 updates with a copy of the checkpoint of update 3; its curves and pictures."""
    root, save = tmp_path_factory.mktemp("straight"), SafeCheckpointIO.save_checkpoint

    def keep(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path)
        if checkpoint["global_step"] == 3:
            shutil.copy(path, root / "3.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafeCheckpointIO, "save_checkpoint", keep)
        assert run(*command("fit", *THREES, root=root))[0] == 0
    return root, curves_in(last(root).parents[1]), pictures_in(last(root).parents[1])


THREES = ["--data.updates_per_step", "3", "--checkpoint.every_n_updates", "3"]
THREES += ["--data.passes_per_epoch", "12", "--trainer.max_steps", "6"]


@pytest.mark.parametrize("ended", ["whole", "while drawing", "at update 3"])
def test_a_resumed_run_has_every_point_and_every_picture(straight, tmp_path, ended):
    (root, curves, pictures), made = straight, 6
    folder = last(shutil.copytree(root, tmp_path / "a")).parents[1]
    if ended != "whole":
        shutil.rmtree(folder / "pictures")
        cut = read(last(root))["curve_files"]
        RunLogger(str(tmp_path / "a"), "linear", 0).cut(*cut)
        assert curves_in(folder)["train/loss"] == curves["train/loss"][:-1]
    if ended == "at update 3":
        made = 3
        shutil.copy(root / "3.ckpt", last(tmp_path / "a"))
    again = command("fit", *THREES, "--ckpt_path", "last", root=tmp_path / "a")
    status, output, error = run(*again)
    assert status == 0, error
    assert f" {6 - made} (to 6)\n" in output
    assert curves_in(folder) == curves
    tags, files = pictures_in(folder)
    assert tags == pictures[0] and files.keys() == pictures[1].keys() == {
        *"fit loss surface".split()
    }
    for name, pixels in files.items():  # TensorBoard has the curves in float32: a shade of 255
        assert np.abs(pixels - pictures[1][name]).max() <= 2, name


def lost(file):
    file.unlink()


def cut_off(file):
    os.truncate(file, 150)


def altered(file):
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [lost, cut_off, altered])
def test_damaged_event_files_are_named(good, tmp_path, damage):
    folder = Path(shutil.copytree(good.parents[1], tmp_path / "run"))
    (file,) = folder.glob("events*")
    damage(file)
    logger = RunLogger(str(tmp_path), "", "run")
    with pytest.warns(UserWarning, match=f"{file.name} in .* is missing or damaged: the run goes"):
        logger.cut(*read(good)["curve_files"])


def test_a_folder_or_another_checkpoint_of_a_run(root):
    old = last(root).parents[1]
    assert run(*command("test", "--ckpt_path", old, root=root))[0] == 0  # logs to version_1
    more = ["--trainer.max_steps", "6", "--ckpt_path", old / "checkpoints" / "best.ckpt"]
    status, output, _ = run(*command("fit", *more, root=root))
    assert status == 0 and "update 3; in a new run folder" in output
    assert read(last(root))["global_step"] == 3  # the old run stays as it is
    assert f"from {last(root, 2)}, update 6" in resume(root)[1]
