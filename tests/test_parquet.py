"""Tables in Parquet: as from CSV in memory, and row group by row group from disk."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import fit, normal, run, trainer_words

from lightning_gd import LinearRegression, Moments, TableData

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SIZES = {"a": 700, "b": 40, "c": 501}  # rows of each file, in row groups of at most 100
ROWS = sum(SIZES.values())


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Three files of one table, the same as one file and as CSV; its columns."""
    monkeypatch.chdir(tmp_path)
    x = normal(ROWS, 3) * torch.tensor([1.0, 100.0, 0.01]).double() + 5
    columns = {
        "size": x[:, 0],
        "rooms": x[:, 1].round(),
        "rate": x[:, 2],
        "same": x[:, 2] * 0 + 0.1,
    }
    columns["price"] = x @ torch.tensor([3.0, 0.1, 40.0]).double() + normal(ROWS, seed=1)
    arrays = {name: values.numpy() for name, values in columns.items()}
    arrays["rooms"] = arrays["rooms"].astype("i4")
    whole, first = pa.table(arrays), 0
    Path("folder").mkdir()
    for name, rows in SIZES.items():
        part = whole.slice(first, rows)
        pq.write_table(part, f"folder/{name}.parquet", row_group_size=100)
        first += rows
    pq.write_table(whole, "whole.parquet")
    whole.to_pandas().to_csv("whole.csv", index=False)
    return {name: values.double() for name, values in columns.items()}


def loaded(path, stage=None, **settings):
    data = TableData(path, "price", **settings)
    data.setup(stage)
    return data


def test_parquet_in_memory_is_the_same_table_as_csv(table):
    texts = loaded("whole.csv", num_val=7)
    for path in ("whole.parquet", "folder/*.parquet"):
        data = loaded(path, num_val=7)
        assert data.features == texts.features == ["size", "rooms", "rate", "same"]
        assert [line + 2 for line in data.test_lines] == texts.test_lines
        # pandas 2 reads a number of a CSV file to some units of its last digit, which count as
        # much more where a column hardly varies.
        near = 1e-15 * float((data.mean.abs() / data.scale).max()) + 1e-14
        for part in ("train", "val", "test"):
            for mine, theirs in zip(data.local(part), texts.local(part), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=near)


DISK = {"buffer_rows": 250, "batch_size": 32, "num_val": 9}


def test_row_groups_are_shuffled_in_windows_of_the_setting(table):
    data = loaded("folder/*.parquet", **DISK)
    train, held = data.tables["train"], 249  # a fifth of 1,241 rows, rounded up
    assert [len(data.tables[p]) for p in ("train", "val", "test")] == [ROWS - held - 9, 9, held]
    assert list(data.test_lines) == list(range(ROWS - held, ROWS))
    seen = table["price"][: ROWS - held - 9]
    place = {value: row for row, value in enumerate(seen.tolist())}
    for epoch in (0, 1):
        order = train.order(0, epoch)
        rows = [place[value] for value in order.take(order[: len(train)])[1].tolist()]
        assert sorted(rows) == list(range(len(seen)))
        for first, last in zip(order.starts, order.starts[1:], strict=False):
            groups = {train.source.bounds.index(a) for a, _ in train.blocks}
            window = set(rows[first:last])
            whole = [set(range(a, b)) for a, b in train.blocks if a in window]
            assert set().union(*whole) == window and len(window) <= 250 and len(groups) == 11
    x = torch.stack([table[name] for name in data.features], 1)[: len(seen)]
    torch.testing.assert_close(data.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(data.scale[:3], x[:, :3].std(0, correction=0), rtol=1e-12, atol=0)
    assert data.scale[3] == 1  # constant
    z, exact = (x - data.mean) / data.scale, train.moments()
    torch.testing.assert_close(exact.cov, Moments.of(z, seen).cov, rtol=1e-11, atol=1e-11)


def test_a_resumed_run_brings_its_statistics_along(table, make_trainer):
    settings = {"lr": 0.05, "num_features": 4, "bias": True}
    whole = fit(make_trainer(max_steps=50), disk(), LinearRegression, **settings)
    trainer = make_trainer(max_steps=37)
    fit(trainer, disk(), LinearRegression, **settings)
    trainer.save_checkpoint("part.ckpt")
    again, data = make_trainer(max_steps=50), disk()
    model = fit(again, data, LinearRegression, "part.ckpt", **settings)
    assert torch.equal(model.weight, whole.weight) and torch.equal(model.bias, whole.bias)


def disk():
    return TableData("folder/*.parquet", "price", **DISK)


def test_a_second_file_is_the_test_part(table):
    for buffer_rows in (250, 5000):
        data = loaded(
            "folder/*.parquet",
            test_path="folder/b.parquet",
            buffer_rows=buffer_rows,
            **{"moments": True},
        )
        x, y = data.local("test")
        assert len(data.tables["train"]) == ROWS and len(y) == 40
        torch.testing.assert_close(y, table["price"][700:740])
        torch.testing.assert_close(x[:, 0] * data.scale[0] + data.mean[0], table["size"][700:740])
    names = pq.read_table("folder/b.parquet").drop(["price"])
    pq.write_table(names, "new.parquet")
    data = TableData("whole.parquet", "price", test_path="new.parquet")
    x, y, _ = data.read("new.parquet", target_needed=False)
    assert y.isnan().all() and torch.equal(x[:, 0], table["size"][700:740])


def test_the_command_line_prints_the_exact_coefficients(table):
    words = ["--config", "table", "--data.path", "folder/*.parquet", "--data.target", "price"]
    words += ["--data.buffer_rows", "250", "--data.moments", "true", "--model.momentum", "0.5"]
    words += ["--pictures", "null", "--test_curve", "null", *trainer_words(max_steps=200)]
    status, out, err = run(*words, "--data.test_fraction", "0")
    assert (status, err) == (0, "") and "Coefficients for price" in out
    with Path("lightning_logs/table/version_0/coefficients.csv").open() as file:
        rows = list(csv.DictReader(file))
    x = torch.stack(
        [*(table[name] for name in ("size", "rooms", "rate")), table["size"] * 0 + 1], 1
    )
    best = torch.linalg.lstsq(x, table["price"][:, None], driver="gelsd").solution[:, 0].tolist()
    for term in ("coefficient", "least_squares"):
        found = {row["term"]: float(row[term]) for row in rows}
        # Three columns that hardly correlate: 200 updates leave 1e-12 of the error.
        wanted = dict(zip(("size", "rooms", "rate", "intercept"), best, strict=True), same=0)
        assert found == pytest.approx(wanted, rel=1e-8, abs=1e-8)


def schema(**types):
    return pa.schema(types).empty_table()


def test_bad_files_are_named(table, monkeypatch):
    good, null = {"a": [1.0, 2.0], "y": [1.0, 2.0]}, {"a": [1.0, None], "y": [1, 2]}
    files = {"words": {"a": ["x"], "y": [1]}, "null": null, "other": {"b": [1.0], "y": [2.0]}}
    files |= {"nan": {"a": [1.0, float("nan")], "y": [1, 2]}, "huge": {"a": [1.0], "y": [1e200]}}
    for name, content in files.items():
        pq.write_table(pa.table(content), f"{name}.parquet")
    pq.write_table(schema(a=pa.float64(), y=pa.float64()), "none.parquet")
    Path("mine.parquet").write_text("mine")
    Path("two").mkdir()
    pq.write_table(pa.table(good), "two/a.parquet")
    pq.write_table(pa.table(files["other"]), "two/b.parquet")
    for path, settings, message in [
        ("mine.parquet", {}, "mine.parquet is no Parquet file: "),
        ("words.parquet", {}, "words.parquet, column 'a': string is no type of real numbers"),
        ("null.parquet", {}, "null.parquet, row 1, column 'a': the cell is empty"),
        ("nan.parquet", {}, "nan.parquet, row 1, column 'a': 'nan' is not a finite number"),
        ("nan.parquet", {"buffer_rows": 1}, "nan.parquet, row 1, column 'a': 'nan' is not"),
        ("huge.parquet", {}, "huge.parquet, row 0, column 'y': '1e[+]200' is not a finite number"),
        ("none.parquet", {}, "none.parquet has no rows"),
        ("two/*.parquet", {}, "two/b.parquet has no column 'a': its columns: b, y"),
        ("two/a.parquet", {"target": "z"}, "two/a.parquet has no column 'z': .* a, y"),
        ("two/a.parquet", {"features": ["z"]}, "two/a.parquet has no column 'z'"),
        ("two/a.parquet", {"buffer_rows": 0}, "buffer_rows=0 must be an integer of at least 1"),
        ("two/a.parquet", {"buffer_rows": 1, "test_fraction": 0.9}, "leaves no row of two/a.parq"),
        ("two/a.parquet", {"buffer_rows": 1, "test_fraction": 0.0}, "batch_size=None would read"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            TableData(path, **{"target": "y", "test_fraction": 0.0, **settings}).setup()
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no/[*].parquet: there is no such file"):
        TableData("no/*.parquet", "y")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match="two/a.parquet is read with pyarrow: .*arrow"):
        TableData("two/a.parquet", "y")
