"""The command line: what it resolves, runs, writes, prints and refuses."""

import inspect
import os
import re
from importlib import metadata
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SCRIPT, curves_in, events_in, process, run, trainer_words
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.utils.data import DataLoader, IterableDataset

import lightning_gd
from lightning_gd import GradientCheck, LinearRegression, arguments, resume
from lightning_gd.arguments import CALLBACKS
from lightning_gd.checkpoints import read
from lightning_gd.cli import EXPERIMENTS, experiments, main, resolve

NAMES = experiments()


def path_of(name):
    return str(EXPERIMENTS / f"{name}.yaml")


@pytest.fixture
def three_updates(tmp_path, monkeypatch):
    """Arguments of a run of three updates of the line y = 2x, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["--config", "linear", *trainer_words(max_steps=3, default_root_dir=tmp_path)]


@pytest.fixture
def built(monkeypatch):
    """The Trainer, model and data that `fit` would have run."""
    found = {}

    def fit(trainer, model, datamodule, **_):
        found.update(trainer=trainer, model=model, data=datamodule)
        found["callbacks"] = [type(callback).__name__ for callback in trainer.callbacks]

    monkeypatch.setattr(Trainer, "fit", fit)
    return found


# What the user typed, completed: the names of experiments stand for their files.
RESOLVED = {
    "": "fit --experiment parity --config parity --test_after_fit true",
    "--model.lr 1 --config linear": (
        "fit --experiment linear --config linear --test_after_fit true --model.lr 1"
    ),
    "fit": "fit --experiment parity --config parity --test_after_fit false",
    "fit --config=linear": "fit --experiment linear --config linear --test_after_fit false",
    "test -c linear --data.seed=3": "test --experiment linear --config linear --data.seed=3",
    "test --config linear -c=parity": "test --experiment parity --config linear --config parity",
    "test --config mine.yaml": "test --experiment mine --config mine.yaml",
    "predict --traceback": "predict --experiment parity --config parity",
    "validate --help": "validate --help",
    # Without --config: whose defaults apply, and the folder of the logs.
    "test --model mine.Model": "test --experiment Model --config parity ...",
    "test --model=mine.Model --data mine.Data": "test --experiment Model --config plain ...",
    "test --data mine.Data": "test --experiment parity --config parity ...",
    "test --model lightning_gd.ParityRegressor": "test --experiment parity --config parity ...",
    "test --model mine.ParityRegressor": ("test --experiment ParityRegressor --config parity ..."),
    "test --model LinearRegression --data=TableData": "test --experiment table --config table ...",
    "test --model RidgeRegression --data TableData": (
        "test --experiment RidgeRegression --config table ..."
    ),
    "test --model mine.Model --data TableData": "test --experiment Model --config plain ...",
}


@pytest.mark.parametrize("typed", RESOLVED)
def test_resolve(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("trainer: {}")
    expected, after_config = [], False
    for word in RESOLVED[typed].split():
        expected.append(path_of(word) if after_config and word in NAMES else word)
        after_config = word == "--config"
    if expected[-1] == "...":
        expected[-1:] = typed.split()[1:]
    assert resolve(typed.split()) == expected


# Experiments


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_every_experiment_builds(built, tmp_path, name):
    status, _, err = run("fit", "--config", name, "--trainer.default_root_dir", tmp_path)
    assert (status, err) == (0, "")
    text = Path(path_of(name)).read_text(encoding="utf-8")
    assert text.startswith("# ") and "\n    lr: " in text
    written = yaml.safe_load(text)
    for part in ("model", "data"):
        assert type(built[part]).__name__ == written[part]["class_path"].split(".")[-1]
        for key, value in written[part]["init_args"].items():
            assert built[part].hparams[key] == value
    for key, value in written["trainer"].items():
        if key.startswith("max"):
            assert getattr(built["trainer"], key) == value
    assert ("autograd" in name) == built["model"].automatic_optimization
    few = 0 < built["trainer"].max_steps <= 10  # each is drawn
    assert built["data"].updates_per_step > 1 or few  # shipped fast


@pytest.mark.parametrize("name", ["linear", "parity"])
def test_the_modes_differ_by_one_word(name):
    one, other = (yaml.safe_load(Path(path_of(n)).read_text()) for n in (name, f"{name}_autograd"))
    assert one["model"]["init_args"].pop("gradient") == "explicit"
    assert other["model"]["init_args"].pop("gradient") == "autograd"
    assert one == other


# Callbacks


def test_every_callback_is_on_and_can_be_switched_off(built, three_updates):
    assert run("fit", "--config", "linear")[0] == 0
    on = set(built["callbacks"])
    assert on >= set(CALLBACKS.values()) and len(CALLBACKS) == 11
    Path("off.yaml").write_text("".join(f"{key}: null\n" for key in CALLBACKS))
    for words in (
        [word for key in CALLBACKS for word in (f"--{key}", "null")],
        ["--config", "off.yaml"],
    ):
        status, _, err = run("fit", "--config", "linear", *words)
        assert (status, err) == (0, "")
        assert on - set(built["callbacks"]) == set(CALLBACKS.values())
        assert not built["trainer"].checkpoint_callbacks  # nor Lightning's own in its place
        assert built["trainer"].progress_bar_callback is None


def test_arguments_of_a_callback(built, three_updates):
    Path("set.yaml").write_text("checkpoint: {every_n_updates: 20}\npictures: null\n")
    words = ["--gradient_check.on_error", "warn", "--config", "set.yaml"]
    status, _, err = run("fit", *three_updates, *words)
    assert (status, err) == (0, "") and "Pictures" not in built["callbacks"]
    assert built["trainer"].checkpoint_callback.every_n_updates == 20
    (check,) = (c for c in built["trainer"].callbacks if isinstance(c, GradientCheck))
    assert check.on_error == "warn"


def test_help_shows_all_options():
    status, out, _ = run("fit", "--help")
    text, options = " ".join(out.split()), "--trainer.max_steps --model --data --ckpt_path"
    assert status == 0 and all(f"{option} " in text for option in options.split())
    assert all(f"--{key}.NAME sets an argument" in text for key in CALLBACKS)
    assert "Save the last after every so many updates" in text  # from a docstring


# Runs

WEIGHT = 2 * (1 - 0.85**3)  # the error of w shrinks by 1 − lr · 2/N Σx² = 1 − 0.01 · 15
LOSS = 7.5 * (2 - WEIGHT) ** 2


def weight_in(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]["weight"].item()


def test_a_run_without_a_verb_as_a_process(forge, three_updates, tmp_path):
    statuses, output = forge.run(three_updates)
    lines = output.splitlines()
    assert statuses == [0] and len(lines) < 25 and lines[-1].strip("─ ") == ""  # only a table
    assert "arning:" not in output and "http" not in output
    for words in ("LinearRegression", "explicit", "linear/version_0", "tensorboard --logdir"):
        assert words in output
    folder = tmp_path / "linear" / "version_0"
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["best.ckpt", "last.ckpt"]
    for checkpoint in checkpoints:  # float32
        assert weight_in(checkpoint) == pytest.approx(WEIGHT, rel=1e-6)
        assert checkpoint.name in output
    assert [line.split()[1] for line in lines if "/loss" in line] == [f"{LOSS:.6g}"] * 2
    hparams = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert (hparams["lr"], hparams["gradient"], hparams["bias"]) == (0.01, "explicit", False)
    steps, losses = zip(*curves_in(folder)["train/loss"], strict=True)
    assert steps == (0, 1, 2, 3)  # the last of them after the last update
    assert losses == pytest.approx([30 * 0.85 ** (2 * k) for k in range(4)], rel=1e-6)


def test_the_resolved_config_runs_again(three_updates, tmp_path):
    assert run("fit", *three_updates, "--model.momentum", "0.5", "--pictures", "null")[0] == 0
    first, second = (tmp_path / "linear" / f"version_{k}" for k in (0, 1))
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert config["model"]["init_args"]["momentum"] == 0.5 and config["experiment"] == "linear"
    assert config["pictures"] is None
    status, _, err = run("fit", "--config", first / "config.yaml")
    assert (status, err) == (0, "")
    assert yaml.safe_load((second / "config.yaml").read_text()) == config
    ends = [weight_in(folder / "checkpoints" / "last.ckpt") for folder in (first, second)]
    assert ends[0] == ends[1]


def test_the_verbs(three_updates, tmp_path):
    status, out, err = run("fit", *three_updates)
    assert (status, err) == (0, "") and "train/loss" in out and "test/loss" not in out
    checkpoint = tmp_path / "linear" / "version_0" / "checkpoints" / "last.ckpt"
    status, out, err = run("test", *three_updates, "--ckpt_path", checkpoint)
    assert (status, err) == (0, "") and f"{LOSS:.3f}" in out
    status, out, err = run("predict", *three_updates, "--ckpt_path", checkpoint)
    (written,) = tmp_path.rglob("predictions.csv")
    predicted = [float(line.split(",")[2]) for line in written.read_text().splitlines()[1:]]
    assert (status, err) == (0, "") and predicted == pytest.approx(
        [WEIGHT * x for x in range(1, 5)]
    )
    status, out, err = run("validate", *three_updates, "--data.num_val", "2")
    assert (status, err) == (0, "") and "50.0" in out  # w = 0 on the last two: (6² + 8²) / 2


WRONG = """
from lightning_gd import LinearRegression

class Doubled(LinearRegression):
    def gradients(self, x, y):
        r = self(x) - y
        return {"weight": 2 * r @ x / len(r), "bias": 4 * r.mean()}
"""


def test_the_verb_check_trains_nothing(tmp_path, monkeypatch):
    status, out, err = run("check", "--config", "parity")
    assert (status, err) == (0, "")
    assert "The gradient of ParityRegressor" in out
    rows = [line.split() for line in out.splitlines() if line.rstrip().endswith("ok")]
    assert [row[0] for row in rows] == ["weight", "bias"]
    assert all(float(row[2]) == pytest.approx(float(row[3]), rel=1e-4) for row in rows)
    (tmp_path / "doubled.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    status, out, err = run("check", "--model", "doubled.Doubled", "--data", "PointsData")
    assert status == 2 and "bias: 2 times the gradient of loss" in err
    assert [line.split()[-1] for line in out.splitlines() if "e-" in line] == ["ok", "WRONG"]
    assert not list(tmp_path.rglob("version_*"))


class Own(LinearRegression):
    """A model of the user's, by its dotted path; so are the data."""


class Stream(IterableDataset):
    def __init__(self, rows=20):
        self.rows = rows

    def __iter__(self):
        return ((torch.tensor([k / 10]), torch.tensor(k / 5)) for k in range(self.rows))


class NoTest(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Stream(), batch_size=6)


class EmptyVal(NoTest):
    def val_dataloader(self):
        return []


class Uneven(EmptyVal):
    def train_dataloader(self):
        return DataLoader(Stream(20 if self.trainer.global_rank else 10))  # pyright: ignore


def on_stream(gradient, data, **trainer):
    words = ["--model", "test_cli.Own", "--data", f"test_cli.{data.__name__}"]
    words += ["--model.gradient", gradient, "--model.lr", "0.05", "--gradient_check", "null"]
    return [*words, *trainer_words(accelerator="cpu", max_epochs=-1, **trainer)]


@pytest.mark.filterwarnings("ignore:.*(no `val_dataloader`|does not have many workers)")
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("gradient, data", [("explicit", NoTest), ("autograd", EmptyVal)])
def test_a_stream_and_limits_from_the_command_line(tmp_path, gradient, data):
    """Without a verb, and without a test_dataloader: only the fit."""
    for version, limit in enumerate(({"max_steps": 7}, {"max_time": "00:00:00:01"})):
        status, out, err = run(*on_stream(gradient, data, default_root_dir=tmp_path, **limit))
        assert (status, err) == (0, "") and "train/loss" in out
        kept = tmp_path / f"Own/version_{version}/checkpoints"
        assert (kept / "best.ckpt").is_file()
        (updates,) = re.findall(r"updates +([\d,]+)", out)
        assert read(kept / "last.ckpt")["global_step"] == int(updates.replace(",", ""))


@pytest.mark.slow  # waits for timeouts
@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_unequal_numbers_of_batches_end_at_the_timeout(forge, tmp_path, monkeypatch, gradient):
    monkeypatch.chdir(Path(__file__).parent)
    two = {"devices": 2, "strategy": "ddp", "default_root_dir": tmp_path}
    words = [*on_stream(gradient, Uneven, **two), "--process_timeout", "3"]
    statuses, log = forge.run(words, world=2)
    assert statuses == [1, 1] and "did not answer within --process_timeout" in log
    assert len(re.findall("^error: another process of this run", log, re.M)) == 2


def test_started_processes_see_the_same_run(tmp_path, monkeypatch):
    """`last` is what it was when the first process looked."""
    monkeypatch.setenv(resume.FOUND, "")
    for version in (0, 1):
        file = tmp_path / f"version_{version}" / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
    assert resume.find("last", tmp_path) == str(file)
    (tmp_path / "version_1").rename(tmp_path / "version_9")  # the run that is under way
    monkeypatch.setattr(os, "getppid", os.getpid)  # as in a process that this one started
    for rank, version in ((1, 1), (0, 9)):  # of this run, and of another one
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        expected = str(tmp_path / f"version_{version}/checkpoints/last.ckpt")
        assert resume.find("last", tmp_path) == expected


@pytest.mark.parametrize("strategy", ["ddp", "auto", "ddp_find_unused_parameters_true"])
def test_the_timeout_of_processes(built, tmp_path, strategy):
    words = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--process_timeout", "7"]
    where = ["--trainer.default_root_dir", tmp_path]
    status, _, err = run("fit", *words, *where, "--trainer.strategy", strategy)
    assert (status, err) == (0, "")
    chosen = StrategyRegistry["ddp" if strategy == "auto" else strategy]
    assert chosen["strategy"] is type(built["trainer"].strategy) is DDPStrategy
    assert chosen["init_params"]["timeout"].total_seconds() == 7


def test_parity_shows_what_the_readme_says(tmp_path):
    """The run without any argument, but for the place of its logs."""
    status, out, err = run("--trainer.default_root_dir", tmp_path, "--trainer.accelerator", "cpu")
    assert (status, err) == (0, "")
    readme = (SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8")
    printed = r"(train/loss|test/loss|test/accuracy) +(\d\.\d+)"
    shown, ours = (dict(re.findall(printed, text)) for text in (readme, out))
    for tag, value in shown.items():  # float32 sums of 2,000 and 784 terms, over 500 updates
        assert float(ours[tag]) == pytest.approx(float(value), rel=1e-4)
    assert len(shown) == 3 and "(majority class: 0.5)" in out
    folder = tmp_path / "parity" / "version_0"
    curves, events = curves_in(folder), events_in(folder)
    for tag, first in (("train/loss", 1), ("test/loss", 1), ("update/gradient_norm", None)):
        steps, values = zip(*curves[tag], strict=True)
        assert steps[:500] == tuple(range(500)) and set(steps[500:]) <= {500}
        assert first is None or values[0] == pytest.approx(first)
    assert curves["test/accuracy"][-1][1] == pytest.approx(float(ours["test/accuracy"]), abs=1e-6)
    assert [point.step for point in events.Histograms("weights/weight")] == [0, 500]
    kept = events.PluginTagToContent("hparams")
    assert b"optimizer" in kept["_hparams_/session_start_info"]
    assert b"model\x12\x11\x1a\x0fParityRegressor" in kept["_hparams_/session_start_info"]
    assert b"test/accuracy" in kept["_hparams_/experiment"]


# As processes

LOADED = """
import sys
from lightning_gd.cli import main
status = main(sys.argv[1:])
print(sorted({"torch", "lightning", "numpy", "jsonargparse"} & set(sys.modules)))
sys.exit(status)
"""


def test_quick_answers_do_not_import_lightning():
    done = process("-c", LOADED, "--help")
    assert done.returncode == 0 and done.stdout.endswith("[]\n")
    assert all(words in done.stdout for words in ("usage: -c [verb]", *map("  {} ".format, NAMES)))
    for words, answer in (
        (["fit", "--config", "no.yaml"], "no.yaml: there is no such file"),
        (["--model", "Ridge"], "did you mean 'RidgeRegression'"),
        (["--model.lr", "ten"], "--model.lr=ten must be a number or 'auto'"),
    ):
        done = process("-c", LOADED, *words)
        assert done.returncode == 2 and done.stdout.endswith("[]\n") and answer in done.stderr


@pytest.mark.parametrize("experiment", NAMES)
def test_the_settings_read_from_source_are_those_of_the_classes(experiment):
    arguments.check(resolve(["fit", "--config", experiment])[1:])
    content = yaml.safe_load((EXPERIMENTS / f"{experiment}.yaml").read_text("utf-8"))
    for part in ("model", "data"):
        name = content[part]["class_path"].rpartition(".")[2]
        known = set()
        for cls in getattr(lightning_gd, name).__mro__:
            known |= {*inspect.signature(cls.__init__).parameters} - {"self", "args", "kwargs"}
        assert arguments.settings_of(part, name).keys() == known


@pytest.mark.parametrize("command", [[SCRIPT], ["-m", "lightning_gd"]])
def test_the_commands_pass_on_the_status(command):
    done = process(*command, "fitt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown verb 'fitt': did you mean 'fit'?")


def test_the_console_script():
    (script,) = entry_points(group="console_scripts", name="lightning-gd")
    assert script.load() is main


def test_the_version():
    assert run("--version")[:2] == (0, f"lightning_gd {metadata.version('lightning_gd')}\n")


def test_a_model_that_is_not_trained_is_said_to_be(tmp_path):
    where = trainer_words(default_root_dir=tmp_path, max_steps=1)
    words = ["test", "--config", "parity", *where]
    assert run("fit", *words[1:])[0] == 0
    untrained, trained = (run(*words, *more)[1] for more in ((), ("--ckpt_path", "last")))
    assert "WARNING: the model is not trained; --ckpt_path last" in untrained
    assert "not trained" not in trained
