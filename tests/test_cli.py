"""The command line: what it resolves, runs, writes, prints and refuses."""

import functools
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_gd
from lightning_gd import GradientCheck, MNISTParityData, resume
from lightning_gd.cli import EXPERIMENTS, UsageError, experiments, main, resolve
from lightning_gd.lightning_cli import CALLBACKS

NAMES = experiments()
# Lightning calls what jsonargparse 4.49 deprecates.
LIGHTNINGS = r"ignore:\s*.*(was deprecated in v4|only one JsonargparseDeprecation)"
pytestmark = pytest.mark.filterwarnings(LIGHTNINGS)
SCRIPT = Path(lightning_gd.__file__).parents[1] / "scripts" / "train.py"


def path_of(name):
    return str(EXPERIMENTS / f"{name}.yaml")


def run(*argv):
    """Exit status, stdout and stderr of the command line, with this process left as it was."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["train.py"])
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv(resume.FOUND, "")
        status = main([str(word) for word in argv])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def three_updates(tmp_path, monkeypatch):
    """Arguments of a run of three updates of the line y = 2x, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    options = {"max_steps": 3, "default_root_dir": tmp_path, "enable_progress_bar": "false"}
    words = [word for name, value in options.items() for word in (f"--trainer.{name}", value)]
    return ["--config", "linear", *words]


@pytest.fixture
def built(monkeypatch):
    """The Trainer, model and data that `fit` would have run."""
    found = {}

    def fit(trainer, model, datamodule, **_):
        found.update(trainer=trainer, model=model, data=datamodule)
        found["callbacks"] = [type(callback).__name__ for callback in trainer.callbacks]

    monkeypatch.setattr(Trainer, "fit", fit)
    return found


# What the user typed, completed

BARE, END = ["--test_after_fit", "true"], ["--test_after_fit", "false"]
OPTIONS = ["--model.lr", "1"]
RESOLVED = {
    "nothing": ([], "fit", ["parity"], BARE),
    "options": ([*OPTIONS, "--config", "linear"], "fit", ["linear"], [*BARE, *OPTIONS]),
    "a verb": (["fit"], "fit", ["parity"], END),
    "name with =": (["fit", "--config=linear"], "fit", ["linear"], END),
    "short": (["test", "-c", "linear", "--data.seed=3"], "test", ["linear"], ["--data.seed=3"]),
    "two": (["fit", "--config", "linear", "-c=parity"], "fit", ["linear", "parity"], END),
    "traceback": (["predict", "--traceback"], "predict", ["parity"], []),
}
# Where no --config is typed: options, whose defaults apply, and the folder of the logs.
DEFAULTS = {
    "own model": (["--model", "mine.Model"], "parity", "Model"),
    "own model and data": (["--model=mine.Model", "--data", "mine.Data"], "plain", "Model"),
    "own data": (["--data", "mine.Data"], "parity", "parity"),
    "the experiment's model": (["--model", "lightning_gd.ParityRegressor"], "parity", "parity"),
    "a model of that name": (["--model", "mine.ParityRegressor"], "parity", "ParityRegressor"),
    "table": (["--model", "LinearRegression", "--data=TableData"], "table", "table"),
    "ridge, table": (["--model", "RidgeRegression", "--data", "TableData"], "table", None),
    "own model, table": (["--model", "mine.Model", "--data", "TableData"], "plain", "Model"),
}


@pytest.mark.parametrize("words, verb, names, rest", RESOLVED.values(), ids=RESOLVED)
def test_resolve(words, verb, names, rest):
    configs = [word for name in names for word in ("--config", path_of(name))]
    assert resolve(words) == [verb, "--experiment", names[-1], *configs, *rest]


@pytest.mark.parametrize("words, experiment, folder", DEFAULTS.values(), ids=DEFAULTS)
def test_defaults_are_of_the_experiment_that_fits(words, experiment, folder):
    start = ["--experiment", folder or words[1], "--config", path_of(experiment)]
    assert resolve(["test", *words]) == ["test", *start, *words]


def test_resolve_takes_paths_and_leaves_help_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("trainer: {}")
    for path in ("mine.yaml", str(tmp_path / "mine.yaml")):
        expected = ["test", "--experiment", "mine", "--config", path]
        assert resolve(["test", "--config", path]) == expected
    assert resolve(["validate", "--help"]) == ["validate", "--help"]


UNKNOWN = {
    "fitt": "unknown verb 'fitt': did you mean 'fit'? known: fit, validate, test, predict, check",
    "xyz": "unknown verb 'xyz': known: fit, validate, test, predict, check",
    "--config liner": "unknown experiment 'liner': did you mean 'linear'? known: ",
    "fit --config=partiy": "unknown experiment 'partiy': did you mean 'parity'? known: ",
    "--config": "unknown experiment '': known: " + ", ".join(NAMES),
    "--config no/such": "--config no/such: there is no such file",
    "--config no.yaml": "--config no.yaml: there is no such file",
}


@pytest.mark.parametrize("words", UNKNOWN)
def test_unknown_names_offer_the_nearest(words):
    with pytest.raises(UsageError) as error:
        resolve(words.split())
    assert str(error.value).startswith(UNKNOWN[words])


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
    assert built["data"].updates_per_step > 1  # shipped fast


@pytest.mark.parametrize("name", ["linear", "parity"])
def test_the_modes_differ_by_one_word(name):
    one, other = (yaml.safe_load(Path(path_of(n)).read_text()) for n in (name, f"{name}_autograd"))
    assert one["model"]["init_args"].pop("gradient") == "explicit"
    assert other["model"]["init_args"].pop("gradient") == "autograd"
    assert one == other


def test_what_is_typed_wins(built, three_updates):
    typed = ["--model.lr", "0.3", "--data.x=[1, 2]", "--data.y", "[5, 6]", "--trainer.max_steps=7"]
    status, _, err = run("fit", *typed, *three_updates[:2])
    assert (status, err) == (0, "")
    assert built["model"].hparams["lr"] == 0.3 and built["trainer"].max_steps == 7
    built["data"].setup("fit")
    assert built["data"].tables["train"].x.tolist() == [[1], [2]]


# Callbacks


def test_every_callback_is_on_and_can_be_switched_off(built, three_updates):
    assert run("fit", "--config", "linear")[0] == 0
    on = set(built["callbacks"])
    assert on >= set(CALLBACKS.values()) and len(CALLBACKS) == 10
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


def curves_in(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    return events, {
        tag: ([point.step for point in points], np.array([point.value for point in points]))
        for tag in events.Tags()["scalars"]
        for points in [events.Scalars(tag)]
    }


def test_a_run_without_a_verb(three_updates, tmp_path):
    status, out, err = run(*three_updates)
    assert (status, err) == (0, "")
    for words in ("LinearRegression", "explicit", "linear/version_0", "tensorboard --logdir"):
        assert words in out
    folder = tmp_path / "linear" / "version_0"
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["best.ckpt", "last.ckpt"]
    for checkpoint in checkpoints:  # float32
        assert weight_in(checkpoint) == pytest.approx(WEIGHT, rel=1e-6)
        assert checkpoint.name in out
    assert [line.split()[1] for line in out.splitlines() if "/loss" in line] == [f"{LOSS:.6g}"] * 2
    hparams = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert (hparams["lr"], hparams["gradient"], hparams["bias"]) == (0.01, "explicit", False)
    steps, losses = curves_in(folder)[1]["train/loss"]
    assert steps == [0, 1, 2, 3]  # the last of them after the last update
    exact = [30 * 0.85 ** (2 * k) for k in range(4)]
    np.testing.assert_allclose(losses, exact, rtol=1e-6)  # float32


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


def test_the_verbs(three_updates, tmp_path, monkeypatch):
    predicted, predict = [], Trainer.predict

    @functools.wraps(predict)
    def keeping(*args, **settings):
        predicted.extend(predict(*args, **settings) or [])

    monkeypatch.setattr(Trainer, "predict", keeping)
    status, out, err = run("fit", *three_updates)
    assert (status, err) == (0, "") and "train/loss" in out and "test/loss" not in out
    checkpoint = tmp_path / "linear" / "version_0" / "checkpoints" / "last.ckpt"
    status, out, err = run("test", *three_updates, "--ckpt_path", checkpoint)
    assert (status, err) == (0, "") and f"{LOSS:.3f}" in out
    status, out, err = run("predict", *three_updates, "--ckpt_path", checkpoint)
    assert (status, err) == (0, "")
    assert torch.cat(predicted).tolist() == pytest.approx([WEIGHT * x for x in (1, 2, 3, 4)])
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
    first, *lines = out.splitlines()
    assert first == "the gradient of ParityRegressor is that of loss:"
    assert [line.partition(", ")[0] for line in lines] == ["weight: ok", "bias: ok"]
    (tmp_path / "doubled.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    status, out, err = run("check", "--model", "doubled.Doubled", "--data", "PointsData")
    assert (status, out) == (2, "") and "bias: 2 times the gradient of loss" in err
    assert not list(tmp_path.rglob("version_*"))


OWN = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningDataModule
from lightning_gd import LinearRegression

class Ridge(LinearRegression):
    def __init__(self, alpha: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.alpha = alpha

    def loss(self, x, y):
        return super().loss(x, y) + self.alpha * self.weight.square().sum()

    def gradients(self, x, y):
        g = super().gradients(x, y)
        return {**g, "weight": g["weight"] + 2 * self.alpha * self.weight}

class Line(LightningDataModule):
    def __init__(self, rows: int = 200, batch_size: int = 7):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def train_dataloader(self):
        x = torch.linspace(-1, 1, self.rows)
        return DataLoader(TensorDataset(x[:, None], 2 * x), self.batch_size)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


def test_a_model_of_the_users_own(own, three_updates, tmp_path):
    status, out, err = run("--model", "own_models.Ridge", "--model.alpha", 2.5, *three_updates)
    assert (status, err) == (0, "") and "Ridge" in out
    weight = weight_in(tmp_path / "linear" / "version_0" / "checkpoints" / "last.ckpt")
    # L' = 15 (w − 2) + 2 · 2.5 w: the error beside w* = 1.5 shrinks by 1 − 0.01 · 20
    assert weight == pytest.approx(1.5 * (1 - 0.8**3), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*(no `val_dataloader`|does not have many workers)")
def test_own_model_and_data_start_from_plain_defaults(own, three_updates, tmp_path):
    words = ["--model", "own_models.Ridge", "--data", "own_models.Line", "--model.num_features=1"]
    status, out, err = run(*words, *three_updates[4:])  # no test_dataloader: only the fit
    assert (status, err) == (0, "") and "train/loss" in out
    (last,) = tmp_path.glob("Ridge/version_0/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 10 * 4  # epochs, batches of 64


def test_started_processes_see_the_same_run(three_updates, tmp_path, monkeypatch):
    """`last` is what it was when the first process looked."""
    for _ in range(2):
        assert run("fit", *three_updates)[0] == 0
    runs = tmp_path / "linear"
    first = resume.find("last", runs)
    assert first == str(runs / "version_1" / "checkpoints" / "last.ckpt")
    (runs / "version_1").rename(runs / "version_9")  # the run that is under way
    ask = f"from lightning_gd.resume import *; print(find('last', Path({str(runs)!r})))"
    for rank, version in ((1, 1), (0, 9)):  # a process of this run, and another run
        answer = process("-c", ask, LOCAL_RANK=str(rank)).stdout
        assert answer.strip().endswith(f"version_{version}/checkpoints/last.ckpt")


@pytest.mark.parametrize("strategy", ["ddp", "auto", "ddp_find_unused_parameters_true"])
def test_the_timeout_of_processes(built, tmp_path, strategy):
    words = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--process_timeout", "7"]
    where = ["--trainer.default_root_dir", tmp_path]
    status, _, err = run("fit", *words, *where, "--trainer.strategy", strategy)
    assert (status, err) == (0, "")
    chosen = StrategyRegistry["ddp" if strategy == "auto" else strategy]
    assert chosen["strategy"] is type(built["trainer"].strategy) is DDPStrategy
    assert chosen["init_params"]["timeout"].total_seconds() == 7


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    """The run without any argument, but for the place of its logs."""
    folder = tmp_path_factory.mktemp("parity")
    status, out, err = run("--trainer.default_root_dir", folder, "--trainer.accelerator", "cpu")
    assert (status, err) == (0, "")
    return out, *curves_in(folder / "parity" / "version_0")


def test_parity_ends_with_a_table(parity):
    out, _, curves = parity
    (accuracy,) = [line for line in out.splitlines() if "test/accuracy" in line]
    assert float(accuracy.split()[1]) >= 0.88
    assert accuracy.split("majority class:")[1].strip() == "0.5)"
    assert curves["test/accuracy"][1] == pytest.approx(float(accuracy.split()[1]), abs=1e-6)


def test_parity_draws_every_update(parity):
    tables = MNISTParityData()
    tables.setup()
    x, y = (t.double().numpy() for t in (tables.tables["train"].x, tables.tables["train"].y))
    x = np.column_stack([x, np.ones(len(x))])
    second, first, weight, losses, norms = x.T @ x / len(x), x.T @ y / len(x), 0, [], []
    for _ in range(500):
        gradient = 2 * (second @ np.broadcast_to(weight, 785) - first)
        losses.append(1 + np.dot(np.broadcast_to(weight, 785), gradient / 2 - first))
        norms.append(np.linalg.norm(gradient))
        weight = weight - 0.002 * gradient
    _, _, curves = parity
    # float32: sums of 2,000 and 784 terms, over 500 updates
    for tag, expected in (("train/loss", losses), ("gradient_norm", norms)):
        assert curves[tag][0][:500] == list(range(500))
        np.testing.assert_allclose(curves[tag][1][:500], expected, rtol=1e-4)
    assert curves["train/loss"][0][500:] == [500]  # after the last update
    steps, values = curves["test/loss"]
    assert steps[:500] == list(range(500)) and values[0] == pytest.approx(1)
    assert set(steps[500:]) <= {500}  # the test after the last update


def test_parity_keeps_histograms_and_hyperparameters(parity):
    _, events, _ = parity
    assert [point.step for point in events.Histograms("weights/weight")] == [0, 500]
    kept = events.PluginTagToContent("hparams")
    assert b"optimizer" in kept["_hparams_/session_start_info"]
    assert b"test/accuracy" in kept["_hparams_/experiment"]


# As processes

LOADED = """
import sys
from lightning_gd.cli import main
status = main(sys.argv[1:])
print(sorted({"torch", "lightning", "numpy", "jsonargparse"} & set(sys.modules)))
sys.exit(status)
"""
QUICK = {
    "--help": (0, "usage: train.py"),
    "-h": (0, "parity_full"),
    "fitt": (2, "did you mean 'fit'?"),
    "--config liner": (2, "did you mean 'linear'?"),
    "fit --config no.yaml": (2, "no.yaml: there is no such file"),
}


def process(*words, **env):
    """A real process of Python, and what came of it."""
    words, env = [sys.executable, *map(str, words)], {**os.environ, **env}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize("words", QUICK)
def test_quick_answers_do_not_import_lightning(words):
    status, message = QUICK[words]
    done = process("-c", LOADED, *words.split())
    assert done.returncode == status and done.stdout.endswith("[]\n")
    assert message in (done.stdout if status == 0 else done.stderr)
    for name in NAMES if status == 0 else ():
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("command", [[SCRIPT], ["-m", "lightning_gd"]])
def test_the_commands_pass_on_the_status(command):
    done = process(*command, "fitt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {UNKNOWN['fitt']}\n"


def test_the_console_script():
    (script,) = entry_points(group="console_scripts", name="lightning-gd")
    assert script.load() is main


def test_the_script_shows_a_table_and_nothing_else(three_updates, tmp_path):
    done = process(SCRIPT, *three_updates)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) < 25 and lines[-1].strip("─ ") == ""
    assert "arning:" not in done.stdout and "http" not in done.stdout
    assert weight_in(tmp_path / "linear/version_0/checkpoints/last.ckpt") == pytest.approx(WEIGHT)
