"""Every logger of Lightning gets every curve, and the run is found again."""

import csv
from pathlib import Path

import pytest
import yaml
from conftest import curves_in, run, trainer_words

from lightning_gd import loggers
from lightning_gd.checkpoints import read
from lightning_gd.loggers import with_names, without

OFF = ["--pictures", "null", "--histograms", "null", "--curvature_report", "null"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(updates, *words):
    """What a run prints, of the line y = 2x with a test after it."""
    limits = trainer_words(max_steps=updates, accelerator="cpu")
    status, out, error = run("--config", "linear", *limits, *OFF, *words)
    assert status == 0, error
    return out


def curves_of(file):
    """The points of each curve in a CSV file."""
    found = {}
    with open(file, newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            for tag, value in row.items():
                if value and tag not in ("step", "epoch"):
                    found.setdefault(tag, []).append((int(row["step"]), float(value)))
    return {tag: sorted(points) for tag, points in found.items()}


def test_several_loggers_have_the_same_curves():
    out = train(30, "--trainer.logger", "[CSVLogger, RunLogger]")
    file = Path("lightning_logs/csv/linear/version_0/metrics.csv")
    written, events = curves_of(file), curves_in(Path("lightning_logs/linear/version_0"))
    assert [step for step, _ in written["train/loss"]] == list(range(31))
    assert {tag: len(points) for tag, points in events.items() if tag != "hp_metric"}.items() <= {
        tag: len(points) for tag, points in written.items()
    }.items()
    for tag, points in written.items():
        assert [s for s, _ in points] == [s for s, _ in events[tag]]
        values = [value for _, value in points]
        assert values == pytest.approx([v for _, v in events[tag]], rel=2**-23)  # float32
    assert f"CSV               {file}\n" in out
    assert "TensorBoard       tensorboard --logdir lightning_logs\n" in out


def test_a_logger_alone_and_its_run_continued():
    out = train(20, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "mine")
    assert "look at it        mine/linear/version_0/metrics.csv\n" in out
    assert "logs              lightning_logs/linear/version_0\n" in out
    assert "from " in train(30, "--trainer.logger=CSVLogger", "--ckpt_path", "last")
    run_folder = Path("lightning_logs/linear/version_0")
    assert {file.name for file in run_folder.iterdir() if file.is_file()} == {
        "config.yaml",
        "hparams.yaml",
        ".lock",
    }
    assert [path.name for path in run_folder.parent.iterdir()] == ["version_0"]
    first, second = (
        curves_of(f"{root}/linear/version_0/metrics.csv")["train/loss"]
        for root in ("mine", "lightning_logs/csv")
    )
    resumed = read(run_folder / "checkpoints" / "last.ckpt")
    train(30, "--experiment", "straight")
    straight = curves_in(Path("lightning_logs/straight/version_0"))["train/loss"]
    assert [*first[:20], *second] == straight  # both had 20, the end of one and start of the other
    other = read("lightning_logs/straight/version_0/checkpoints/last.ckpt")
    assert resumed["global_step"] == 30
    assert {name: w.tolist() for name, w in resumed["state_dict"].items()} == {
        name: w.tolist() for name, w in other["state_dict"].items()
    }


def named(text, *words, **environment):
    """What the value of --trainer.logger becomes."""
    value = with_names(["--trainer.logger", text, *words], "logs", "line")[1]
    return yaml.safe_load(value)


def test_the_folder_and_the_name_are_given_unless_typed(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: name)
    monkeypatch.delenv(loggers.MLFLOW, raising=False)
    wandb = {"class_path": "WandbLogger", "init_args": {"save_dir": "logs", "project": "line"}}
    assert named("WandbLogger") == wandb
    assert named("true") is True and named("null") is None
    assert named("mine.Logger") == {"class_path": "mine.Logger", "init_args": {}}
    typed = "{class_path: WandbLogger, init_args: {project: p}}"
    assert named(f"[{typed}, CSVLogger]")[0]["init_args"] == {"save_dir": "logs", "project": "p"}
    assert named("MLFlowLogger")["init_args"]["tracking_uri"] == "sqlite:///logs/mlflow.db"
    assert (
        "tracking_uri" not in named("MLFlowLogger", "--trainer.logger.save_dir", "x")["init_args"]
    )
    monkeypatch.setenv(loggers.MLFLOW, "http://host")
    assert named("MLFlowLogger")["init_args"]["tracking_uri"] == "http://host"
    words = ["--trainer.logger=CSVLogger", "--a", "1", "--trainer.logger.name", "n", "--b=2"]
    assert without(words) == ["--a", "1", "--b=2"]


@pytest.mark.parametrize("kind, package", [("MLFlowLogger", "mlflow"), ("WandbLogger", "wandb")])
def test_a_missing_package_is_named(monkeypatch, kind, package):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{kind} needs: pip install {package}"):
        named(kind)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_mlflow():
    mlflow = pytest.importorskip("mlflow")
    out = train(20, "--trainer.logger", "MLFlowLogger")
    place = "sqlite:///lightning_logs/mlflow.db"
    assert f"mlflow ui --backend-store-uri {place}\n" in out
    client = mlflow.MlflowClient(place)
    experiment = client.get_experiment_by_name("linear")
    (found,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(21))
    assert "update 20" in train(21, "--trainer.logger=MLFlowLogger", "--ckpt_path", "last")


@pytest.mark.filterwarnings("ignore")  # theirs
def test_weights_and_biases(monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = train(20, "--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true")
    assert wandb.run is not None and wandb.run.project == "linear"
    assert wandb.run.summary["train/loss"] == pytest.approx(0.0450689, rel=1e-5)
    assert wandb.run.summary["trainer/global_step"] == 20
    assert f"wandb sync lightning_logs/wandb/{Path(wandb.run.dir).parent.name}\n" in out
    wandb.finish()
    assert "update 20" in train(21, "--ckpt_path", "last")
