"""A table of the user's own: reading, standardising, the coefficients and how exact they are."""

import csv
import math
import re
from pathlib import Path

import mpmath  # comes with torch
import numpy as np
import pytest
import torch
from conftest import fit, run
from lightning.pytorch.loggers import CSVLogger

from lightning_gd import LinearRegression, Moments
from lightning_gd.callbacks.coefficients import Coefficients, standard_errors
from lightning_gd.callbacks.curvature_report import CurvatureReport
from lightning_gd.callbacks.predictions import Predictions
from lightning_gd.data.table import LONGLEY, TableData
from lightning_gd.optimum import Optimum

# NIST, Statistical Reference Datasets, Longley: to 15 digits, the intercept last.
CERTIFIED = [
    15.0618722713733,
    -0.0358191792925910,
    -2.02022980381683,
    -1.03322686717359,
    -0.0511041056535807,
    1829.15146461355,
    -3482258.63459582,
]
DEVIATIONS = [
    84.9149257747669,
    0.0334910077722432,
    0.488399681651699,
    0.214274163161675,
    0.226073200069370,
    455.478499142212,
    890420.383607373,
]
ROWS = "a,b,y\n1,2,3\n4,5,7\n7,9,9\n2,2,1\n3,8,2\n"


def beside(cell, text):
    """`text` with a further first column."""
    return "".join(f"{cell},{line}\n" for line in text.splitlines())


@pytest.fixture
def table(tmp_path):
    """Writes text into a file and reads it as a table."""

    def make(text, target="y", **settings):
        path = tmp_path / "rows.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        data = TableData(str(path), target, **settings)
        data.setup()
        return data

    return make


def near_copy(path, spread, rows=60):
    """Three features of very different size, one a copy of another but for `spread` of it."""
    g = torch.Generator().manual_seed(0)
    noise, size, rate = torch.randn(3, rows, generator=g, dtype=torch.float64)
    size, rate = size * 1e3 + 5e3, rate * 1e-4
    columns = [size, rate, size * (1 + spread * noise)]
    y = 3 * columns[0] - 2e6 * rate + columns[2] / 2 + noise.roll(1)
    lines = [",".join(map(repr, row)) for row in torch.stack([*columns, y], 1).tolist()]
    path.write_text("\n".join(["size,rate,copy,y", *lines]) + "\n")
    return str(path)


def solution(x, y):
    """(w, b) of least squares with an intercept, by elimination with 60 digits."""
    with mpmath.workdps(60):
        rows = mpmath.matrix([[*row, 1] for row in x.tolist()])
        theta = mpmath.lu_solve(rows.T * rows, rows.T * mpmath.matrix(y.tolist()))
        return torch.tensor([float(value) for value in theta], dtype=torch.float64)


def fitted(make_trainer, data, tmp_path, steps, **settings):
    """Fit with the callback `Coefficients`; return the rows of its file."""
    logger = CSVLogger(tmp_path, "run")
    trainer = make_trainer(max_steps=steps, logger=logger, callbacks=[Coefficients()])
    fit(trainer, data, LinearRegression, num_features=data.num_features, **settings)
    with (Path(logger.log_dir) / "coefficients.csv").open() as file:
        return list(csv.DictReader(file))


# Reading

# Beside the tables of `bad_inputs.py`.
PLACED = [
    ("a,b,y\n1,2,3\n", {"features": ["a", "y"]}, "features=['a', 'y'] must name one or more"),
    ("a,b,y\n1,2,3\n", {"features": ["a", "a"]}, "each once and without the target 'y'"),
    ("y\n1\n", {}, "features=[] must name one or more columns of"),
    (",b,y\n0,1,2\n", {}, "has no name (the index of a pandas table?): set --data.features"),
    ("a,b,y\n1,2,3\n\n4,,6\n", {}, "line 4, column 'b': the cell is empty"),
    ("a,b,y\n1,2,3\n4,5\n", {}, "line 3, column 'y': the cell is empty"),
    ("a,b,y\n1,2,3\n4,NA,5\n", {}, "line 3, column 'b': the cell is empty"),
    # pandas 2 says '1e400', pandas 3 'inf'
    ("a,b,y\n1,2,3\n4,1e400,6\n", {}, "' is not a finite number"),
    (ROWS, {"num_val": 4}, "num_val=4 leaves no row to train on: there are 4"),
]


@pytest.mark.parametrize("text, settings, message", PLACED)
def test_what_cannot_be_used_is_named_with_its_place(table, text, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        table(text, **settings)
    assert "\n" not in str(error.value)


FORMS = {
    "plain": (ROWS, {}),
    "mark of byte order, empty lines": ("\ufeff" + ROWS + "\n,,\n", {}),
    "semicolons": (ROWS.replace(",", ";"), {"separator": ";"}),
    "spaces": (ROWS.replace(",", ", "), {}),
    "crlf": (ROWS.replace("\n", "\r\n"), {}),
    "text beside": (beside("text", ROWS), {"features": ["a", "b"]}),
    "unnamed beside": (beside("", ROWS), {"features": ["a", "b"]}),
}


@pytest.mark.parametrize("text, settings", FORMS.values(), ids=FORMS)
def test_the_numbers_are_those_of_the_file(table, text, settings):
    data = table(text, test_fraction=0.0, seed=1, **settings)
    train = data.tables["train"]
    assert (data.features, data.num_features, list(data.tables)) == (["a", "b"], 2, ["train"])
    expected = torch.tensor([[1, 2], [4, 5], [7, 9], [2, 2], [3, 8]], dtype=torch.float64)
    # a few roundings of numbers below 10
    torch.testing.assert_close(train.x * data.scale + data.mean, expected, rtol=0, atol=1e-14)
    assert train.y.tolist() == [3, 7, 9, 1, 2]
    swapped = table(ROWS, features=["b", "a"], test_fraction=0.0)
    assert swapped.mean.tolist() == pytest.approx([5.2, 3.4], rel=1e-15)


# Splitting and standardising


def test_the_test_rows_are_drawn_by_the_seed(table):
    text = "a,y\n" + "".join(f"{i},{i * i}\n" for i in range(50))
    draws = {seed: table(text, seed=seed) for seed in (0, 1)}
    for data in draws.values():
        parts = [data.tables[part].y for part in ("train", "test")]
        assert [len(part) for part in parts] == [40, 10]
        assert torch.cat(parts).sort().values.tolist() == [float(i * i) for i in range(50)]
        squares = [float((line - 2) ** 2) for line in data.test_lines]
        assert data.tables["test"].y.tolist() == squares  # and lines are those of the file
    assert draws[0].test_lines == table(text, seed=0).test_lines != draws[1].test_lines


def test_statistics_are_those_of_the_rows_trained_on(table):
    text = "a,b,c,y\n" + "".join(f"{i * i},{1e6 + i},0.1,{i}\n" for i in range(20))
    data = table(text, num_val=4)
    there = {part: t.y[:, None] for part, t in data.tables.items()}
    there = {p: torch.cat([i * i, 1e6 + i, 0 * i + 0.1], 1) for p, i in there.items()}
    assert [len(rows) for rows in there.values()] == [12, 4, 4]
    torch.testing.assert_close(data.mean, there["train"].mean(0), rtol=1e-14, atol=0)
    # torch's own goes through the rows once and keeps fewer digits of numbers around 1e6.
    deviation = there["train"].std(0, correction=0)[:2]
    torch.testing.assert_close(data.scale[:2], deviation, rtol=1e-10, atol=0)
    assert data.scale[2] == 1 and (data.tables["train"].x[:, 2] == 0).all()  # constant
    for part, rows in there.items():
        assert torch.equal(data.tables[part].x, (rows - data.mean) / data.scale)


def test_a_second_file_is_the_test_part(table, tmp_path):
    second = tmp_path / "second.csv"
    second.write_text("y,b,a\n5,2,1\n")
    data = table(ROWS, test_path=str(second))
    assert [len(data.tables[part]) for part in ("train", "test")] == [5, 1]
    assert data.tables["test"].x[0] * data.scale + data.mean == pytest.approx([1, 2])
    second.write_text("b,a\n2,1\n")
    with pytest.raises(ValueError, match="second.csv has no column 'y'"):
        table(ROWS, test_path=str(second))


# Coefficients


def exact(data):
    """The exact coefficients, and x and y of the file."""
    x, y, _ = data.read(data.path)
    found = Optimum.of_rows((x - data.mean) / data.scale, y).theta
    return data.coefficients(found[:-1], found[-1]), x, y


def test_the_exact_solution_has_the_digits_that_nist_certifies():
    data = TableData(test_fraction=0.0)
    assert Path(data.path) == LONGLEY
    data.setup()
    # Condition 110 of the rows times eps, and 15 digits certified.
    assert exact(data)[0].tolist() == pytest.approx(CERTIFIED, rel=1e-12)


@pytest.mark.parametrize("spread", [1e-1, 1e-4, 1e-6])
def test_the_exact_solution_of_near_copies_has_its_digits(tmp_path, spread):
    data = TableData(near_copy(tmp_path / "t.csv", spread), "y", test_fraction=0.0)
    data.setup()
    found, x, y = exact(data)
    truth = solution(x, y)
    # The condition number of the rows, about 3/spread, times eps and the size of the table.
    error = ((found - truth)[:-1] * data.scale).abs().max()
    assert error < (2e-15 / spread + 1e-13) * (truth[:-1] * data.scale).abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ["plain", "constant", "as many rows as columns"])
def test_the_solution_from_moments_is_that_of_the_rows(case, bias):
    data = TableData(test_fraction=0.0)
    data.setup()
    x, y = data.local("train")
    if case == "constant":
        x[:, 2] = 0
    rows = slice(6 + bias if "as many" in case else None)
    mine = Moments.of(x[rows], y[rows]).optimum(bias)
    theirs = Optimum.of_rows(x[rows], y[rows], bias)
    # Moments square the condition number of the columns, 1e2 to 1e4: 1e-16·1e8.
    torch.testing.assert_close(mine.theta, theirs.theta, rtol=1e-7, atol=1e-7)
    assert mine.condition_number == pytest.approx(theirs.condition_number, rel=1e-6)
    errors = [standard_errors(data, found) for found in (mine, theirs)]
    torch.testing.assert_close(*errors, rtol=1e-6, atol=0, equal_nan=True)


def test_a_fit_reaches_what_nist_certifies(make_trainer, tmp_path, capsys):
    data = TableData(test_fraction=0.0, passes_per_epoch=5000, updates_per_step=500)
    rows = fitted(make_trainer, data, tmp_path, 5000, lr="auto", momentum=0.99)
    assert [row["term"] for row in rows] == [*data.features, "intercept"]
    reached = [float(row["coefficient"]) for row in rows]
    # Momentum 0.99 leaves √0.99 of each error per update: 1e-11 after 5,000.
    assert reached == pytest.approx(CERTIFIED, rel=1e-8)
    assert all(repr(value) == row["coefficient"] for value, row in zip(reached, rows, strict=True))
    printed = capsys.readouterr().out
    assert "e-" in printed.partition(" of the largest coefficient away")[0][-8:]
    assert "coefficients.csv" in printed
    assert all(f"{value:.6g}" in printed for value in reached)
    errors = [float(row["standard_error"]) for row in rows]
    assert errors == pytest.approx(DEVIATIONS, rel=1e-9)  # condition 110² of the squares, times eps
    # R² and the standard deviation of the residuals that NIST certifies, of 16 rows and 7 numbers.
    assert (
        f"train: R² {0.995479004577296:.6g}, RMSE {304.854073561965 * (9 / 16) ** 0.5:.6g}"
        in printed
    )


def test_a_target_that_does_not_vary_is_the_scale_itself(make_trainer, tmp_path, capsys):
    """Its weights are rounding errors, so that the intercept is the largest coefficient."""
    rng = np.random.default_rng(0)
    lines = [f"{a},{b},7" for a, b in rng.normal(size=(20, 2))]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,y", *lines]))
    data = TableData(str(tmp_path / "t.csv"), "y", passes_per_epoch=100)
    rows = fitted(make_trainer, data, tmp_path, 100, lr=0.01)
    found = re.search(r"updates: ([\d.]+) of the largest", capsys.readouterr().out)
    assert found is not None
    # The intercept of standardized columns is the mean: 7 (1 - 0.98^100) after 100 updates.
    assert float(found[1]) == pytest.approx(0.98**100, rel=0.05)  # two digits are printed
    assert float(rows[-1]["least_squares"]) == pytest.approx(7)


def test_a_loss_that_swings_with_momentum_is_no_reason_to_warn(make_trainer, tmp_path, capsys):
    data = TableData(passes_per_epoch=290)
    trainer = make_trainer(max_steps=290, callbacks=[CurvatureReport()])
    trainer.fit(model := LinearRegression(6, lr="auto", momentum=0.99), datamodule=data)
    losses = model.curves.history["train/loss"][1]
    assert losses[-1] > 1.1 * min(losses)  # of which another loss would be warned
    assert "WARNING" not in capsys.readouterr().out


def test_a_fit_says_how_far_it_is(make_trainer, tmp_path, capsys):
    data = TableData(near_copy(tmp_path / "t.csv", 1e-2), "y", passes_per_epoch=300)
    rows = fitted(make_trainer, data, tmp_path, 300, lr=0.2)
    found = re.search(
        r"after 300 updates: ([\d.]+) of the largest coefficient away from the exact one\n"
        r"condition number ([\d.e+]+)",
        capsys.readouterr().out,
    )
    assert found is not None
    off, best = (
        max(abs(float(row[name])) * s for row, s in zip(rows, data.scale.tolist(), strict=False))
        for name in ("difference", "least_squares")
    )
    assert float(found[1]) == pytest.approx(off / best, rel=0.02)  # two digits are printed
    x = data.tables["train"].x
    h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    eigenvalues = torch.linalg.eigvalsh(2 * h.T @ h / len(h))
    assert float(found[2]) == pytest.approx((eigenvalues[-1] / eigenvalues[0]).item(), rel=0.01)


def test_a_copied_and_a_constant_column(make_trainer, table, tmp_path):
    text = "a,twice,c,y\n" + "".join(f"{i},{2 * i},7,{i * i}\n" for i in range(10))
    data = TableData(table(text).path, "y", test_fraction=0.0, passes_per_epoch=400)
    rows = fitted(make_trainer, data, tmp_path, 400, lr=0.2)
    # y = x² on 0 … 9 has the least-squares line 9x − 12; a and twice get half of it each.
    a, twice, c, intercept = (float(row["coefficient"]) for row in rows)
    assert (a, twice, c, intercept) == pytest.approx((4.5, 2.25, 0, -12), abs=1e-9)


def test_what_the_rows_do_not_determine_has_no_standard_error(
    make_trainer, table, tmp_path, capsys
):
    free = "a,twice,c,d,y\n" + "".join(f"{i},{2 * i},7,{i * i % 7},{i**3}\n" for i in range(12))
    alone = "a,d,y\n" + "".join(f"{i},{i * i % 7},{i**3}\n" for i in range(12))
    found = []
    for text in (free, alone):
        data = TableData(table(text).path, "y", test_fraction=0.0, passes_per_epoch=10)
        found.append(fitted(make_trainer, data, tmp_path, 10))
        printed = capsys.readouterr().out
        words = "The rows do not determine the coefficients of a, twice, c (constant or linearly"
        assert (words in printed) == (text == free)
        assert ("along 2 of 4 directions" in printed) == (text == free)
    errors, alone = ({row["term"]: float(row["standard_error"]) for row in rows} for rows in found)
    assert all(math.isnan(errors[name]) for name in ("a", "twice", "c", "intercept"))
    assert errors["d"] == pytest.approx(alone["d"], rel=1e-9)
    # Without the constant column, which is an intercept itself, that one is determined.
    text = "a,twice,d,y\n" + "".join(f"{i},{2 * i},{i * i % 7},{i**3}\n" for i in range(12))
    data = TableData(table(text).path, "y", test_fraction=0.0, passes_per_epoch=10)
    rows = fitted(make_trainer, data, tmp_path, 10)
    assert float(rows[-1]["standard_error"]) == pytest.approx(alone["intercept"], rel=1e-9)


# Checkpoints and predictions


def test_a_checkpoint_brings_its_statistics_along(table):
    old = table(ROWS, seed=0)
    new = table(ROWS, seed=1)
    before = {part: t.x * new.scale + new.mean for part, t in new.tables.items()}
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.mean, old.mean) and torch.equal(new.scale, old.scale)
    for part, rows in before.items():  # the same rows, but for a few roundings
        again = new.tables[part].x * old.scale + old.mean
        torch.testing.assert_close(again, rows, rtol=0, atol=1e-14)
    fresh = TableData(old.path, "y", seed=1)
    fresh.load_state_dict(old.state_dict())
    fresh.setup()
    assert torch.equal(fresh.mean, old.mean)
    with pytest.raises(ValueError, match="trained on the features a, b, in this order; .* b, a"):
        table(ROWS, features=["b", "a"]).load_state_dict(old.state_dict())


def test_predictions_are_written_in_the_units_of_the_table(make_trainer, tmp_path):
    trainer, data = make_trainer(max_steps=50), TableData(passes_per_epoch=50)
    model = fit(trainer, data, LinearRegression, num_features=6, lr=0.1)
    coefficients = data.coefficients(model.weight, model.bias)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    header, *_ = LONGLEY.read_text().splitlines()
    new = tmp_path / "new.csv"
    new.write_text(f"{header.removeprefix('employed,')}\n118,560000,4000,2700,131000,1963\n")
    for path, rows in ((LONGLEY, 3), (new, 1)):
        trainer = make_trainer(logger=CSVLogger(tmp_path, "run"), callbacks=[Predictions()])
        again = TableData(test_path=None if path == LONGLEY else str(path))
        other = LinearRegression(num_features=6)
        trainer.predict(other, None, again, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
        with (Path(trainer.logger.log_dir) / "predictions.csv").open() as file:
            written = list(csv.DictReader(file))
        assert len(written) == rows == len(again.test_lines)
        header, *lines = path.read_text().splitlines()
        for entry in written:
            cells = lines[int(entry["row"]) - 2].split(",")
            row = dict(zip(header.split(","), map(float, cells), strict=True))
            x = torch.tensor([row[name] for name in data.features], dtype=torch.float64)
            expected = x @ coefficients[:-1] + coefficients[-1]
            # Σ of terms up to 1e7 in float64.
            assert float(entry["prediction"]) == pytest.approx(expected.item(), rel=1e-9)
            assert entry["target"] == (repr(row["employed"]) if "employed" in row else "")


# The command line


def test_one_command_fits_a_table_and_one_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text(LONGLEY.read_text())
    quiet = ["--trainer.enable_progress_bar", "false"]
    status, out, err = run(
        *["--config", "table", "--data.path", "mine.csv", "--data.target", "employed"],
        *["--trainer.max_steps", "200", *quiet],
    )
    assert (status, err) == (0, "")
    folder = Path("lightning_logs/table/version_0")
    terms = [line.split(",")[0] for line in (folder / "coefficients.csv").read_text().splitlines()]
    assert terms == ["term", *LONGLEY.read_text().split("\n")[0].split(",")[1:], "intercept"]
    assert "Coefficients for employed" in out and "of the largest coefficient away" in out
    status, out, err = run("predict", "--config", "table", "--ckpt_path", "last", *quiet)
    assert (status, err) == (0, "")
    written = Path("lightning_logs/table/version_1/predictions.csv").read_text().splitlines()
    assert f"predictions: {Path('lightning_logs/table/version_1/predictions.csv')}" in out
    assert written[0] == "row,target,prediction" and len(written) == 4
    for verb in ("test", "predict"):
        status, _, err = run(verb, "--config", "table", "--data.test_fraction", "0", *quiet)
        assert status == 2 and "no test rows: set --data.test_fraction" in err
