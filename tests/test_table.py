"""A table of the user's own: reading, standardising, the coefficients and how exact they are."""

import csv
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_cli import LIGHTNINGS, run

from lightning_gd import LinearRegression
from lightning_gd.callbacks.coefficients import Coefficients, least_squares
from lightning_gd.callbacks.predictions import Predictions
from lightning_gd.data.table import LONGLEY, TableData

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
    return path


def rational_solution(x, y):
    """(w, b) of least squares with an intercept, without any rounding."""
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    rows = [[Fraction(v) for v in [*row, 1, target]] for row, target in pairs]
    size = len(rows[0]) - 1
    a = [
        [sum((r[i] * r[j] for r in rows), Fraction()) for j in range(size + 1)] for i in range(size)
    ]
    for i in range(size):
        a[i] = [v / a[i][i] for v in a[i]]
        for k in range(size):
            if k != i:
                a[k] = [v - a[k][i] * u for v, u in zip(a[k], a[i], strict=True)]
    return torch.tensor([float(row[-1]) for row in a], dtype=torch.float64)


def fit(make_trainer, data, tmp_path, steps, **settings):
    trainer = make_trainer(
        max_steps=steps, logger=CSVLogger(tmp_path, "run"), callbacks=[Coefficients()]
    )
    with trainer.init_module():
        model = LinearRegression(num_features=data.num_features, **settings)
    trainer.fit(model, datamodule=data)
    with (Path(trainer.logger.log_dir) / "coefficients.csv").open() as file:
        rows = list(csv.DictReader(file))
    return model, trainer, rows


# Reading


@pytest.mark.parametrize(
    "text, settings, message",
    [
        ("", {}, "has no header: its first line must name the columns"),
        ("a,b,y\n", {}, "has a header and no rows"),
        ("a,b,y\n\n\n", {}, "has a header and no rows"),
        ("a,b,a,y\n1,2,3,4\n", {}, "line 1: columns 1 and 3 are both named 'a'"),
        ("a,price,y\n1,2,3\n", {"target": "pric"}, "has no column 'pric': did you mean 'price'?"),
        ("a,b,y\n1,2,3\n", {"features": ["c"]}, "has no column 'c': its columns: a, b, y"),
        ("a,b,y\n1,2,3\n", {"features": ["a", "y"]}, "'y' is there twice, or is the target"),
        ("a,b,y\n1,2,3\n", {"features": []}, "has no column beside the target 'y'"),
        ("y\n1\n", {}, "has no column beside the target 'y'"),
        (",b,y\n0,1,2\n", {}, "line 1: column 1 has no name"),
        ("a;b;y\n1;2;3\n", {}, "is --data.separator right? its columns: a;b;y"),
        ("a,b,y\n1,2,3\n4,x,6\n7,z,9\n", {}, "line 3, column 'b': 'x' is not a finite number"),
        ("a,b,y\n1,2,3\n4,x,6\n7,z,9\n", {}, "(and 1 more in this column)"),
        ("a,b,y\n1,2,3\n\n4,,6\n", {}, "line 4, column 'b': the cell is empty"),
        ("a,b,y\n1,2,3\n4,5\n", {}, "line 3, column 'y': the cell is empty"),
        ("a,b,y\n1,2,3\n4,NA,5\n", {}, "line 3, column 'b': the cell is empty"),
        ("a,b,y\n1,2,3\n4,5,-inf\n", {}, "line 3, column 'y': '-inf' is not a finite number"),
        ("a,b,y\n1,2,3\n4,1e400,6\n", {}, "line 3, column 'b': 'inf' is not a finite number"),
        ("a,b,y\n1,2,3\n4,5,6,7\n", {}, "cannot be read as a table: "),
        ("a,b,y\n1,2,3,4\n4,5,6,7\n", {}, "cannot be read as a table: "),
        (b"a,b,y\n1,2,\xe4\n", {}, "is not a text file in UTF-8"),
        ("a,b,y\n1,2,3\n", {}, "test_fraction=0.2 leaves no row"),
        (ROWS, {"test_fraction": 1}, "test_fraction=1 must be below 1"),
        (ROWS, {"test_fraction": -0.5}, "test_fraction=-0.5 must be a finite number of at least 0"),
        (ROWS, {"separator": ", "}, "separator=', ' must be one character"),
        (ROWS, {"num_val": 4}, "num_val=4 leaves no row to train on: there are 4"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_place(table, text, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        table(text, **settings)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_the_worlds_fault():
    with pytest.raises(FileNotFoundError, match="no-such.csv"):
        TableData("no-such.csv", "y")


@pytest.mark.parametrize(
    "text, settings",
    [
        (ROWS, {}),
        ("\ufeff" + ROWS + "\n,,\n", {}),  # a mark of byte order, empty lines at the end
        (ROWS.replace(",", ";"), {"separator": ";"}),
        (ROWS.replace(",", ", "), {}),
        (ROWS.replace("\n", "\r\n"), {}),
        (beside("text", ROWS), {"features": ["a", "b"]}),
        (beside("", ROWS), {"features": ["a", "b"]}),  # a column without a name
    ],
    ids=["plain", "mark", "semicolons", "spaces", "crlf", "text beside", "unnamed beside"],
)
def test_the_numbers_are_those_of_the_file(table, text, settings):
    data = table(text, test_fraction=0.0, seed=1, **settings)
    train = data.tables["train"]
    assert (data.features, data.num_features, list(data.tables)) == (["a", "b"], 2, ["train"])
    original = train.x.double() * data.scale + data.mean
    expected = torch.tensor([[1, 2], [4, 5], [7, 9], [2, 2], [3, 8]], dtype=torch.float64)
    # float32 holds 7 digits of standardised numbers.
    torch.testing.assert_close(original, expected, rtol=0, atol=1e-6)
    assert train.y.tolist() == [3, 7, 9, 1, 2]


def test_features_keep_the_order_that_was_asked_for(table):
    data = table(ROWS, features=["b", "a"], test_fraction=0.0)
    assert data.mean.tolist() == pytest.approx([5.2, 3.4], rel=1e-15)


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
    text = "a,b,y\n" + "".join(f"{i * i},{1e6 + i},{i}\n" for i in range(20))
    data = table(text, num_val=4)
    x = torch.tensor([[i * i, 1e6 + i] for i in range(20)], dtype=torch.float64)
    x = x[data.tables["train"].y.long()]
    torch.testing.assert_close(data.mean, x.mean(0), rtol=1e-14, atol=0)
    # torch's own goes through the rows once and keeps fewer digits of numbers around 1e6.
    torch.testing.assert_close(data.scale, x.std(0, correction=0), rtol=1e-10, atol=0)
    for part, rows in (("val", 4), ("test", 4)):
        assert len(data.tables[part]) == rows
        i = data.tables[part].y.double()
        there = torch.stack([i * i, 1e6 + i], 1)
        expected = ((there - data.mean) / data.scale).float()
        torch.testing.assert_close(data.tables[part].x, expected, rtol=0, atol=0)


def test_a_constant_column_is_zero_with_scale_one(table):
    data = table("a,c,y\n1,0.1,3\n4,0.1,7\n7,0.1,9\n", test_fraction=0.0)
    assert data.scale[1] == 1 and (data.tables["train"].x[:, 1] == 0).all()


def test_a_second_file_is_the_test_part(table, tmp_path):
    (tmp_path / "second.csv").write_text("y,b,a\n5,2,1\n")
    data = table(ROWS, test_path=str(tmp_path / "second.csv"))
    assert [len(data.tables[part]) for part in ("train", "test")] == [5, 1]
    assert data.tables["test"].x[0].double() * data.scale + data.mean == pytest.approx([1, 2])
    (tmp_path / "second.csv").write_text("b,a\n2,1\n")
    with pytest.raises(ValueError, match="second.csv has no column 'y'"):
        table(ROWS, test_path=str(tmp_path / "second.csv"))


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_tables_have_the_precision_of_the_run(table, make_trainer, precision):
    data = table(ROWS)
    fresh = TableData(data.path, "y")
    trainer = make_trainer(max_steps=1, precision=precision)
    trainer.fit(LinearRegression(num_features=2), datamodule=fresh)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    for part in fresh.tables.values():
        assert part.x.dtype == part.y.dtype == dtype


def test_a_model_of_another_width_is_refused(table, make_trainer):
    path = table(ROWS).path
    with pytest.raises(ValueError, match=r"num_features=3 of .* x is \[N, 2\]"):
        make_trainer(max_steps=1).fit(
            LinearRegression(num_features=3), datamodule=TableData(path, "y")
        )


# Coefficients


def test_the_exact_solution_has_the_digits_that_nist_certifies():
    data = TableData(test_fraction=0.0)
    assert Path(data.path) == LONGLEY
    rows = data._read(data.path)
    data.setup()
    exact = least_squares((rows.x - data.mean) / data.scale, rows.y, bias=True)
    # Condition 110 of the rows times eps, and 15 digits certified.
    assert data.coefficients(exact.weight, exact.bias).tolist() == pytest.approx(
        CERTIFIED, rel=1e-12
    )


@pytest.mark.parametrize("spread", [1e-1, 1e-4, 1e-6])
def test_the_exact_solution_of_near_copies_equals_that_of_fractions(tmp_path, spread):
    data = TableData(str(near_copy(tmp_path / "t.csv", spread)), "y", test_fraction=0.0)
    data.setup()
    rows = data._read(data.path)
    exact = least_squares((rows.x - data.mean) / data.scale, rows.y, bias=True)
    truth = rational_solution(rows.x, rows.y)
    found = data.coefficients(exact.weight, exact.bias)
    largest = (truth[:-1] * data.scale).abs().max()
    # The condition number of the rows, about 3/spread, times eps and the size of the table.
    error = ((found - truth)[:-1] * data.scale).abs().max() / largest
    assert error < 2e-15 / spread + 1e-13


def test_a_fit_reaches_what_nist_certifies(make_trainer, tmp_path, capsys):
    data = TableData(test_fraction=0.0, passes_per_epoch=5000)
    _, _, rows = fit(make_trainer, data, tmp_path, 5000, lr="auto", momentum=0.99)
    assert [row["term"] for row in rows] == [*data.features, "intercept"]
    reached = [float(row["coefficient"]) for row in rows]
    # Momentum 0.99 leaves √0.99 of each error an update: 1e-11 after 5,000.
    assert reached == pytest.approx(CERTIFIED, rel=1e-8)
    assert all(repr(value) == row["coefficient"] for value, row in zip(reached, rows, strict=True))
    printed = capsys.readouterr().out
    assert "the exact solution is reached to" in printed and "coefficients.csv" in printed
    assert all(repr(value) in printed for value in reached)


def test_a_fit_says_how_far_it_is_and_the_way_it_names_leads_there(make_trainer, tmp_path, capsys):
    path = str(near_copy(tmp_path / "t.csv", 1e-2))
    data = TableData(path, "y", passes_per_epoch=5000)
    _, _, rows = fit(make_trainer, data, tmp_path, 300, lr=0.2)
    printed = capsys.readouterr().out
    found = re.search(
        r"([\d.]+) of the largest coefficient away from the exact solution after 300 updates: "
        r"the condition number is ([\d.e+]+)",
        printed,
    )
    assert found is not None
    off = [abs(float(row["difference"])) for row in rows]
    exact = [abs(float(row["least_squares"])) for row in rows]
    ratio = max(d * s for d, s in zip(off, data.scale.tolist(), strict=False)) / max(
        e * s for e, s in zip(exact, data.scale.tolist(), strict=False)
    )
    assert float(found[1]) == pytest.approx(ratio, rel=0.02)  # two digits are printed
    x = data.tables["train"].x
    h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    eigenvalues = torch.linalg.eigvalsh(2 * h.T @ h / len(h))
    assert float(found[2]) == pytest.approx((eigenvalues[-1] / eigenvalues[0]).item(), rel=0.01)

    way = dict(re.findall(r"--(?:model|trainer)\.(\w+) ([\d.]+)", printed))
    steps, lr, momentum = int(way["max_steps"]), float(way["lr"]), float(way["momentum"])
    assert steps < 5000
    fit(make_trainer, TableData(path, "y", passes_per_epoch=5000), tmp_path, steps, lr=lr,
        momentum=momentum)  # fmt: skip
    distance = re.search(r"the exact solution is reached to (\S+)", capsys.readouterr().out)
    assert distance is not None and float(distance[1]) < 1e-6


def test_a_copied_and_a_constant_column_are_named(make_trainer, table, tmp_path, capsys):
    text = "a,twice,c,y\n" + "".join(f"{i},{2 * i},7,{i * i}\n" for i in range(10))
    data = TableData(table(text).path, "y", test_fraction=0.0, passes_per_epoch=400)
    _, _, rows = fit(make_trainer, data, tmp_path, 400, lr=0.2)
    printed = capsys.readouterr().out
    assert "c is constant in the training rows: its scale is taken as 1" in printed
    assert "1 of the columns follow from the others" in printed
    assert "the exact solution is reached to" in printed
    # y = x² on 0 … 9 has the least-squares line 9x − 12; a and twice share it evenly.
    a, twice, c, intercept = (float(row["coefficient"]) for row in rows)
    assert (a, twice, c, intercept) == pytest.approx((4.5, 2.25, 0, -12), abs=1e-9)


def test_a_rate_that_is_too_large_is_named(make_trainer, tmp_path, capsys):
    data = TableData(test_fraction=0.0, passes_per_epoch=20)
    fit(make_trainer, data, tmp_path, 20, lr=1.0)
    printed = capsys.readouterr().out
    # 2/λmax of Longley's standardised columns, whose λmax is 9.2068.
    assert "the fit diverged: lr 1 is too large; the largest stable rate of" in printed
    assert "batch is 0.2172, and 0.1086 is safe" in printed


def test_float32_is_named_where_digits_are_missing(make_trainer, tmp_path, capsys):
    trainer = make_trainer(max_steps=10, precision="32-true", callbacks=[Coefficients()])
    data = TableData(test_fraction=0.0, passes_per_epoch=10)
    trainer.fit(LinearRegression(num_features=6, lr=0.1), datamodule=data)
    assert "give --trainer.precision 64-true" in capsys.readouterr().out


# Checkpoints and predictions


def test_a_checkpoint_brings_its_statistics_along(table):
    old = table(ROWS, seed=0)
    new = table(ROWS, seed=1)
    before = {part: t.x.double() * new.scale + new.mean for part, t in new.tables.items()}
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.mean, old.mean) and torch.equal(new.scale, old.scale)
    for part, rows in before.items():
        again = new.tables[part].x.double() * old.scale + old.mean
        torch.testing.assert_close(again, rows, rtol=0, atol=2e-6)  # float32 tables
    fresh = TableData(old.path, "y", seed=1)
    fresh.load_state_dict(old.state_dict())
    fresh.setup()
    assert torch.equal(fresh.mean, old.mean)
    with pytest.raises(ValueError, match="trained on the features a, b, in this order; .* b, a"):
        table(ROWS, features=["b", "a"]).load_state_dict(old.state_dict())


def test_predictions_are_written_in_the_units_of_the_table(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=50)
    data = TableData(passes_per_epoch=50)
    with trainer.init_module():
        model = LinearRegression(num_features=6, lr=0.1)
    trainer.fit(model, datamodule=data)
    coefficients = data.coefficients(model.weight, model.bias)
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    (tmp_path / "new.csv").write_text(
        "year,deflator,gnp,unemployed,armed_forces,population\n1963,118,560000,4000,2700,131000\n"
    )
    for test_path, rows in ((None, 3), (str(tmp_path / "new.csv"), 1)):
        trainer = make_trainer(logger=CSVLogger(tmp_path, "run"), callbacks=[Predictions()])
        again = TableData(test_path=test_path)
        with trainer.init_module():
            other = LinearRegression(num_features=6)
        trainer.predict(other, None, again, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
        with (Path(trainer.logger.log_dir) / "predictions.csv").open() as file:
            written = list(csv.DictReader(file))
        assert len(written) == rows == len(again.test_lines)
        lines = Path(test_path or LONGLEY).read_text().splitlines()
        for entry in written:
            row = dict(
                zip(lines[0].split(","), lines[int(entry["row"]) - 1].split(","), strict=True)
            )
            x = torch.tensor([float(row[name]) for name in data.features], dtype=torch.float64)
            expected = x @ coefficients[:-1] + coefficients[-1]
            # Σ of terms up to 1e7 in float64.
            assert float(entry["prediction"]) == pytest.approx(expected.item(), rel=1e-9)
            assert entry["target"] == (repr(float(row["employed"])) if "employed" in row else "")


# The command line


@pytest.mark.filterwarnings(LIGHTNINGS)
def test_one_command_fits_a_table_and_one_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text(LONGLEY.read_text())
    quiet = ["--trainer.enable_progress_bar", "false"]
    status, out, err = run(
        *["--model", "LinearRegression", "--data", "TableData", "--data.path", "mine.csv"],
        *["--data.target", "employed", "--trainer.max_steps", "200", *quiet],
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


@pytest.mark.filterwarnings(LIGHTNINGS)
def test_the_command_line_refuses_a_width_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("--config", "table", "--model.num_features", "3")
    assert status == 2 and "num_features=3" in err and "[N, 6]" in err
