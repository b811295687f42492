"""Rows on disk: their order, bounded memory, and the same results as in memory."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fit, normal, run, trainer_words

from lightning_gd import ArrayData, GradientCheck, LinearRegression, Moments
from lightning_gd.data.loader import GlobalBatches
from lightning_gd.data.streams import StreamedTable
from lightning_gd.data.tensors import Table

STREAMED = {"buffer_rows": 130, "test_fraction": 0.2, "num_val": 3}  # blocks of 2 rows


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """Writes x [N, 3] and y [N] to the working folder; without noise y numbers the rows."""
    monkeypatch.chdir(tmp_path)

    def make(rows=1003, x_dtype="f8", y_dtype="f8", noise=False):
        x = normal(rows, 3).numpy() * 20
        y = x @ [0.01, -0.02, 0.05] + normal(rows, seed=1).numpy() if noise else np.arange(rows)
        x, y = np.abs(x) if x_dtype[0] == "u" else x, y % 200 if "1" in y_dtype else y
        x, y = x.astype(x_dtype), y.astype(y_dtype)
        np.save("x.npy", x)
        np.save("y.npy", y)
        return x, y

    return make


def data(**settings):
    return ArrayData("x.npy", "y.npy", **settings)


def loaded(**settings):
    found = data(**settings)
    found.setup("fit")
    return found


def rows_of(loader):
    """The targets of each batch, which number the rows."""
    return [batch[1].long().tolist() for batch in loader]


# The order


def test_every_row_comes_once_per_epoch_in_an_order_by_seed_and_epoch(arrays):
    arrays()
    found = loaded(batch_size=50, seed=4, **STREAMED)
    assert {part: len(t) for part, t in found.tables.items()} == {
        "train": 799,
        "val": 3,
        "test": 201,
    }
    table, orders = found.tables["train"], {}
    for seed, epoch in ((4, 0), (4, 1), (5, 0), (4, 0)):
        order = table.order(seed, epoch)
        rows = order.take(order[0:799])[1].long().tolist()
        assert sorted(rows) == list(range(799)) and orders.get((seed, epoch), rows) == rows
        orders[seed, epoch] = rows
    assert len({str(rows) for rows in orders.values()}) == 3
    assert sum(rows_of(found.train_dataloader()), []) == orders[4, 0]
    assert rows_of(found.val_dataloader()) == [[799, 800, 801]]
    assert sum(rows_of(found.test_dataloader()), []) == list(range(802, 1003))


def test_a_window_is_made_of_blocks_from_all_over_the_file(arrays):
    arrays()
    table = loaded(batch_size=50, **STREAMED).tables["train"]
    order = table.order(0, 0)
    windows = [
        order.take(order[a:b])[1] for a, b in zip(order.starts, order.starts[1:], strict=False)
    ]
    assert [len(rows) for rows in windows] in ([130] * 6 + [19], [*[130] * 5, 129, 20])
    for rows in windows[:-1]:
        blocks = (rows // 2).long()  # of two rows, both in the window; the last has one
        assert len(blocks.unique()) in (65, 66) and blocks.bincount().max() == 2
        # of 65 blocks drawn from 400 the first and the last quarter get some, all but surely
        assert {0, 3} <= {int(4 * block / 400) for block in blocks}
        apart = (rows[1:] - rows[:-1]).abs() > 1  # rows of a block do not stay together
        assert apart.float().mean() > 0.9


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_divide_each_batch(arrays, world):
    arrays(rows=71)
    table = loaded(batch_size=5, buffer_rows=16).tables["train"]
    alone = rows_of(GlobalBatches(table, 5, seed=1))
    shares = [rows_of(GlobalBatches(table, 5, seed=1, process=(r, world))) for r in range(world)]
    for batch, *parts in zip(alone, *shares, strict=True):
        assert [batch[r::world] for r in range(world)] == parts


# The same as in memory

DTYPES = [("f4", "f4"), ("f2", "f8"), (">f4", ">f8"), ("u1", "i8"), (">i2", "u2"), ("?", "i1")]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("x_dtype, y_dtype", DTYPES)
def test_every_dtype(arrays, make_trainer, x_dtype, y_dtype, keep):
    x, y = arrays(100, x_dtype, y_dtype)
    kinds = set()
    for buffer_rows in (16, 100):
        found = loaded(batch_size=7, buffer_rows=buffer_rows, keep_integers=keep)
        table = found.tables["train"].use(torch.float64)
        kinds.add(type(table))
        wanted = [torch.from_numpy(a.astype(a.dtype.newbyteorder("="))) for a in (x, y)]
        for values, raw in zip(table.local(1, 3), wanted, strict=True):
            integers = keep and not raw.is_floating_point()
            assert torch.equal(values.double(), raw.double()[1::3])
            kept = torch.int32 if raw.dtype == torch.uint16 else raw.dtype
            assert values.dtype == (kept if integers else torch.float64)
        moments, exact = table.moments(), Moments.of(*wanted)
        torch.testing.assert_close(moments.cov, exact.cov, rtol=1e-12, atol=1e-9)
    assert kinds == {Table, StreamedTable}


def test_moments_are_those_of_all_rows_and_sum_over_processes(arrays):
    x, y = arrays()
    table, exact = loaded(batch_size=9, buffer_rows=100).tables["train"], Moments.of(x, y)
    sums = [table.moments(rank, 3) for rank in range(3)]
    assert sum(m.n for m in sums) == 1003 and min(m.n for m in sums) > 300
    mean = torch.stack([m.n * m.mean for m in sums]).sum(0) / 1003
    second = torch.stack([m.n * (m.cov + torch.outer(m.mean, m.mean)) for m in sums]).sum(0) / 1003
    torch.testing.assert_close(mean, exact.mean, rtol=1e-12, atol=1e-12)
    # second moments of y go up to 1e6
    torch.testing.assert_close(second - torch.outer(mean, mean), exact.cov, rtol=1e-10, atol=1e-9)
    few = loaded(batch_size=9, buffer_rows=1002).tables["train"]
    assert few.moments(70, 71).n == 0  # more processes than blocks


SETTINGS = {"lr": 0.01, "momentum": 0.5, "num_features": 3, "bias": True}


@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_a_fit_makes_the_updates_of_its_batches(arrays, make_trainer, gradient):
    arrays(noise=True)
    found = data(batch_size=64, seed=2, updates_per_step=5, **STREAMED)
    model = fit(make_trainer(max_steps=30), found, LinearRegression, gradient=gradient, **SETTINGS)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], 0.01, momentum=0.5)
    table = found.tables["train"]
    batches = [b for epoch in (0, 1, 2) for b in in_order(table, 2, epoch)]
    for x, y in batches[:30]:
        optimizer.zero_grad()
        (x @ w[:3] + w[3] - y).square().mean().backward()
        optimizer.step()
    learnt = torch.cat([model.weight, model.bias[None]])
    torch.testing.assert_close(learnt, w, rtol=1e-12, atol=1e-12)  # 30 contracting updates


def in_order(table, seed, epoch):
    """The batches of 64 rows of an epoch."""
    order = table.order(seed, epoch)
    return [order.take(order[k : k + 64]) for k in range(0, len(table), 64)]


@pytest.mark.parametrize("updates_per_step", [1, 4])
def test_a_resumed_run_goes_on_with_the_next_row(arrays, make_trainer, tmp_path, updates_per_step):
    arrays(noise=True)
    settings = {"batch_size": 64, "updates_per_step": updates_per_step, **STREAMED}
    whole = fit(make_trainer(max_steps=31), data(**settings), LinearRegression, **SETTINGS)
    trainer = make_trainer(max_steps=18)  # within the second epoch of 13 updates, and a step
    fit(trainer, data(**settings), LinearRegression, **SETTINGS)
    trainer.save_checkpoint("part.ckpt")
    again = fit(
        make_trainer(max_steps=31), data(**settings), LinearRegression, "part.ckpt", **SETTINGS
    )
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)


def test_evaluation_is_that_of_the_rows_in_memory(arrays, make_trainer):
    arrays(noise=True)
    losses = []
    for buffer_rows in (130, 5000):
        found = data(batch_size=64, **{**STREAMED, "buffer_rows": buffer_rows})
        model, trainer = LinearRegression(**SETTINGS), make_trainer()
        found.setup("test")
        batch = found.whole("test")
        losses.append([batch.loss(model.double()).item(), batch.rows(model)])
        losses[-1] += trainer.test(model, datamodule=found, verbose=False)[0].values()
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and losses[0][1] == 201


# Memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
@pytest.mark.parametrize("moments", [False, True])
def test_the_memory_is_bounded_by_the_setting(tmp_path, monkeypatch, moments):
    monkeypatch.chdir(tmp_path)
    rows, size = 400_000, 50  # 80 MB
    x = np.lib.format.open_memmap("x.npy", "w+", "f4", (rows, size))
    x[:] = 1
    np.save("y.npy", np.zeros(rows, "f4"))
    del x
    table = loaded(batch_size=1000, buffer_rows=20_000).tables["train"]
    before = memory()
    if moments:
        table.moments()
        most = memory()
    else:
        most = max(memory() for _ in GlobalBatches(table, 1000, seed=0))
    # A window has 4 MB, its order and its batches less; the rest is the allocator's.
    assert most - before < 20e6


def memory():
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_ten_million_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, rng = 10_000_000, np.random.default_rng(0)
    x = np.lib.format.open_memmap("x.npy", "w+", "f4", (rows, 10))
    y = np.lib.format.open_memmap("y.npy", "w+", "f4", (rows,))
    for start in range(0, rows, 100_000):
        part = slice(start, start + 100_000)
        x[part] = rng.standard_normal((100_000, 10), np.float32)
        y[part] = x[part] @ np.arange(10, dtype="f4") + 1
    found = loaded(moments=True)
    before = memory()
    best = found.moments_of("train").optimum()
    assert memory() - before < 50e6
    # The targets are rounded in float32: 1e-6 each, and less in the mean of so many.
    assert best.weight.tolist() == pytest.approx(range(10), abs=1e-6)


# Bad numbers, and the command line


def test_a_number_that_is_not_finite_is_named_with_its_row(arrays):
    x, _ = arrays()
    x[777, 2] = np.nan
    np.save("x.npy", x)
    table = loaded(batch_size=9, buffer_rows=100).tables["train"]
    words = re.escape("x[777, 2] of x.npy, y.npy is nan")
    for read in (table.moments, table.local, lambda: rows_of(GlobalBatches(table, 9, seed=0))):
        with pytest.raises(ValueError, match=words):
            read()
    x[777, 2] = 1e300  # not finite in float32
    np.save("x.npy", x)
    with pytest.raises(ValueError, match=re.escape("x[777, 2] of x.npy, y.npy is inf")):
        table.use(torch.float32).local()
    Path("x.npy").write_bytes(Path("x.npy").read_bytes()[:-30])
    with pytest.raises(OSError, match="x.npy was cut while it was read: row 1002 is missing"):
        table.use(None).read(1000, 1003)


def test_bad_arrays_are_named(arrays):
    """Beside those of `bad_inputs.py`."""
    x, y = arrays(rows=4)
    for name, content in {"words": ["a"] * 4, "one": 1.0, "wide": x[:, :2]}.items():
        np.save(f"{name}.npy", np.array(content))
    Path("mine.npy").write_text("mine")
    Path("empty.npy").touch()
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:-1])
    both = {"test_x": "x.npy", "test_y": "y.npy"}
    for settings, message in [
        ({"x": "mine.npy"}, "mine.npy is no array of numbers .*: it holds Python objects, or"),
        ({"x": "empty.npy"}, "empty.npy is no array of numbers that np.save wrote"),
        ({"x": "cut.npy"}, "cut.npy is no array of numbers that np.save wrote"),
        ({"y": "words.npy"}, "words.npy has shape .* dtype <U1: its numbers must be real"),
        ({"y": "one.npy"}, r"one.npy has shape \[\] .* at least one row"),
        ({"buffer_rows": 0}, "buffer_rows=0 must be an integer of at least 1"),
        ({"test_fraction": 1.0}, "test_fraction=1.0 must be a finite number"),
        ({"test_fraction": 0.9}, "test_fraction=0.9 leaves no row of x.npy, y.npy to train on"),
        ({**both, "test_fraction": 0.5}, "test_fraction=0.5: set both files, or the fraction"),
        ({**both, "test_x": "wide.npy"}, r"a row of wide.npy has shape \[2\], and of x.npy \[3\]"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            ArrayData(**{"x": "x.npy", "y": "y.npy", "batch_size": 2, **settings}).setup()
        assert "\n" not in str(error.value)
    with pytest.raises(IsADirectoryError, match=r"\. is a folder: give a file that np.save wrote"):
        ArrayData(".", "y.npy")


def test_updates_from_the_moments_of_rows_on_disk(arrays, make_trainer):
    x, y = arrays(noise=True)
    check, found = GradientCheck(), data(moments=True, buffer_rows=130, passes_per_epoch=300)
    trainer = make_trainer(max_steps=300, precision="32-true", callbacks=[check])
    model = fit(trainer, found, LinearRegression, **{**SETTINGS, "lr": 0.001, "momentum": 0.9})
    assert check.summary() == "5 checks, all parameters tested"
    best = Moments.of(x, y).optimum()
    # Steps of 0.001 on curvatures from 2 (the bias) to 800; what is left is √0.9 to the 300.
    torch.testing.assert_close(model.weight.double(), best.weight, rtol=0, atol=1e-5)
    assert model.bias.item() == pytest.approx(best.bias.item(), abs=1e-2)


def test_the_command_line(arrays):
    arrays(noise=True)
    words = ["--model", "LinearRegression", "--data", "ArrayData", "--data.x", "x.npy"]
    words += ["--data.y", "y.npy", "--data.buffer_rows", "100", "--data.test_fraction", "0.2"]
    words += ["--model.lr", "0.0005", *trainer_words(max_steps=12, accelerator="cpu")]
    words += ["--pictures", "null"]
    status, out, err = run(*words)
    assert (status, err) == (0, "") and "test/loss" in out and "all parameters tested" in out
    status, _, err = run("predict", *words, "--ckpt_path", "last")
    assert (status, err) == (0, "")
    written = Path("lightning_logs/LinearRegression/version_1/predictions.csv").read_text()
    targets = [float(line.split(",")[1]) for line in written.splitlines()[1:]]
    assert targets == pytest.approx(np.load("y.npy")[802:], rel=1e-6)  # in float32
