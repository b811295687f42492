"""Four implementations, one curve: `scripts/compare.py`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import events_in
from test_figures import assert_readable, falling

import compare
import comparison
from compared_curves import compared_curves
from lightning_gd.cli import EXPERIMENTS


@pytest.fixture(scope="module")
def points():
    return comparison.load_problem("linear")


def test_four_implementations_are_equal_to_a_few_ulps_after_100_updates(points):
    runs = comparison.all_four(points, 100, "mean")
    assert list(runs) == ["NumPy", "explicit", "autograd", "nn.Linear + SGD"]
    for run in runs.values():
        # y = 2x from w = 0: H = 2/4 Σx² = 15, so w = 2(1 − 0.85ᵏ) and L = 7.5 (w − 2)² = 30·0.85²ᵏ.
        assert run.theta[0] == pytest.approx(2 * (1 - 0.85**100), rel=1e-14)
        # Rounding of w (4e-16) times the slope of L: 1e-9 of the small losses at the end.
        np.testing.assert_allclose(run.losses["train"], 30 * 0.7225 ** np.arange(100), rtol=1e-8)
    for pair, values in comparison.differences(runs).items():
        assert max(values) <= 4, pair  # a few roundings of sums over 4 rows


def test_four_implementations_on_digits_with_bias_and_momentum():
    given = comparison.load_problem("parity", lr=0.001)
    rows = {part: (x[:200], y[:200]) for part, (x, y) in given.tables.items()}
    start = torch.linspace(-0.01, 0.01, 784, dtype=torch.float64)
    problem = comparison.Problem(rows, start, torch.tensor(0.1).double(), 0.001, 0.5)
    runs = comparison.all_four(problem, 30, "mean")
    for pair, values in comparison.differences(runs).items():
        assert max(values) <= 64, pair  # sums over 784 pixels and 200 rows in another order
    for part, predicted in comparison.predicted_losses(problem, 30).items():
        # Eigenvectors of a 785 × 785 matrix are good to about 1e-13.
        np.testing.assert_allclose(predicted, runs["NumPy"].losses[part], rtol=1e-10)


def test_the_sum_is_the_mean_at_n_times_the_rate(points):
    runs = comparison.all_four(points, 20, "sum")
    fast = comparison.by_numpy(comparison.Problem(points.tables, points.weight, None, 0.04), 20)
    assert comparison.ulps(runs[comparison.SUM].losses["train"], fast.losses["train"]) <= 4
    assert max(max(values) for values in comparison.differences(runs).values()) <= 4
    lesson = " ".join(comparison.sum_lesson(points, runs))
    # ∂L/∂w = 2/4 Σ x(−y) = −30 at w = 0; λmax = 15, so the mean is stable below 2/15.
    assert "120 instead of 30, 4 times" in lesson
    assert "0.1333" in lesson and "0.03333" in lesson


def test_ulps_are_those_of_the_largest_magnitude():
    a, one = np.array([8.0, 1e-20]), np.array([1], np.float32)
    assert comparison.ulps(a, a) == 0
    assert comparison.ulps(a, np.array([np.nextafter(8.0, 9), 1e-20])) == 1
    assert comparison.ulps(a, np.array([8.0, 2e-20])) < 1e-4
    assert comparison.ulps(one, np.nextafter(one, np.float32(2))) == 1


def test_the_script_prints_draws_and_logs(tmp_path, capsys):
    for steps in ("5", "12"):  # the second comparison replaces the first
        assert compare.main(["--steps", steps, "--reduction", "sum", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("Train loss", "nn.Linear", "predicted", "ulps of float64", "learning rates"):
        assert text in printed
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    runs = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert runs == "autograd explicit nn-linear-sgd numpy-sum numpy-sum-lr-n predicted".split()
    for run in runs:
        events = events_in(tmp_path / run)
        assert events.Tags()["scalars"] == ["train/loss", "test/loss"]
        assert len(events.Scalars("train/loss")) == 12
        layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
        assert b"train/loss" in layout and b"test/loss" in layout


def test_the_page_is_one_file_and_holds_what_the_loss_depends_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("<b>,area,price\n1,2,3\n2,2,7\n4,9,5\n")
    words = ["--csv", "t.csv", "--target", "price", "--steps", "6", "--out", "out"]
    assert compare.main([*words, "--html", "sub/page.html"]) == 0
    assert "page: sub/page.html" in capsys.readouterr().out
    assert compare.main([*words, "--html", "sub/page.html"]) == 1  # unless it is to be replaced
    assert "exists already: choose another, or --overwrite" in capsys.readouterr().err
    assert compare.main([*words, "--html", "t.csv"]) == 2
    assert compare.main([*words, "--html", "sub/page.html", "--overwrite"]) == 0
    text = Path("sub/page.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "<b>" not in text.partition("const DATA")[2].partition("\n")[0]
    data = json.loads(re.findall(r"const DATA = (.*);", text)[0])
    assert data["names"] == ["weight of <b>", "weight of area"] and data["rows"] == 3
    x, y = np.array([[1.0, 2], [2, 2], [4, 9]]), np.array([3.0, 7, 5])
    x, y = (x - x.mean(0)) / x.std(0), y - y.mean()
    np.testing.assert_allclose(data["A"], x.T @ x / 3, rtol=1e-14)
    np.testing.assert_allclose(data["c"], x.T @ y / 3, rtol=1e-13)
    assert data["d"] == pytest.approx((y**2).mean(), rel=1e-14)
    assert data["lr"] == pytest.approx(1 / np.linalg.eigvalsh(2 * x.T @ x / 3)[-1], rel=1e-14)
    paths = {run["name"]: np.array(run["path"]) for run in data["runs"]}
    assert list(paths) == ["NumPy, sum", "NumPy", "explicit", "autograd", "nn.Linear + SGD"]
    for name, path in paths.items():
        lr = data["lr"] * (3 if name == comparison.SUM else 1)
        theta = np.zeros(2)
        for point in path:
            np.testing.assert_allclose(point, theta, rtol=1e-9, atol=1e-12)
            theta = theta - lr * 2 * x.T @ (x @ theta - y) / 3


def test_the_picture_is_readable_and_divergence_is_cut():
    steady, exploding = falling(0.9), falling(10.0, 300)
    both = {"train": steady, "test": steady}
    assert_readable(compared_curves({str(i): both for i in range(5)}, both))
    picture = compared_curves(
        {"a": {"train": steady}, "b": {"train": exploding}}, {"train": steady}
    )
    low, high = picture.axes[0].get_ylim()
    # From the last loss to 1,000 times the first, with the usual margins of matplotlib.
    assert 0.08 < low < 30 * 0.9**49 and 30e3 < high < 60e3


def test_wrong_arguments_are_named(tmp_path, capsys):
    text, adam = (EXPERIMENTS / "linear.yaml").read_text(encoding="utf-8"), tmp_path / "adam.yaml"
    adam.write_text(text.replace("start: zeros", "optimizer: Adam"))
    wide = tmp_path / "wide.csv"
    wide.write_text("a,b,c,e\n1,2,3,4\n2,2,3,5\n")
    for words, message in (
        (["--config", "nothing"], "unknown experiment 'nothing'"),
        (["--config", "parity_mlp"], "trains ParityMLP"),
        (["--config", str(adam)], "optimizer='Adam'"),
        (["--lr", "-1"], "lr=-1.0 must be a finite number above 0"),
        (["--config", "parity", "--steps", "1", "--html", "p.html"], "but parity trains 785: use"),
        (["--csv", "t.csv"], "--csv t.csv needs --target, the column to predict"),
        (["--csv", str(wide), "--target", "e"], "features a, b, c: choose one or two by"),
        (["--steps", "4001"], "--steps 4001 must be at most 4000"),
    ):
        assert compare.main([*words, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert compare.main(["--csv", "none.csv", "--target", "a"]) == 1
    assert "none.csv" in capsys.readouterr().err
    assert compare.main(["--lr", "1e9", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("error: diverged: the loss is inf after")
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--steps", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_the_width_and_the_automatic_rate_come_from_the_data():
    problem = comparison.load_problem("table")
    assert len(problem.weight) == 6 and problem.lr == problem.curvature.auto_lr
