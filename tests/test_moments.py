"""Moments against exact integers, the direct formula, numpy's lstsq and autograd, in float64."""

import sys
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

from lightning_gd import LinearRegression, RidgeRegression
from lightning_gd.moments import Moments, takes_moments

# Sums of a few hundred float64 terms agree to some 1e-14 of the scale of their terms.
CLOSE = 1e-12


def noisy(n, size, seed=0, noise=1.0):
    g = torch.Generator().manual_seed(seed)
    x, r = torch.randn(n, size, generator=g).double(), torch.randn(n, generator=g).double()
    return x, x @ torch.arange(1.0, size + 1).double() + 3 + noise * r


def digits(n, size=300):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, size), generator=g, dtype=torch.uint8)
    x[:, :5] = torch.tensor([0, 255, 7, 128, 1])  # constant columns
    return x, torch.randint(0, 2, (n,), generator=g) * 2.0 - 1


def exact(x, y):
    """Mean and covariance of integers: every sum is exact in int64."""
    z, n = torch.cat([x.long(), y.long()[:, None]], dim=1), len(x)
    total = z.sum(0)
    products = n * (z.T.double() @ z.double())  # below 2⁵³
    return total.double() / n, (products - torch.outer(total, total).double()) / n**2


def assert_same(a, b, rtol=CLOSE):
    assert a.n == b.n
    scale = b.cov.diagonal().sqrt()
    torch.testing.assert_close(a.mean, b.mean, rtol=rtol, atol=rtol)
    # The terms of a covariance have the scale of the product of the deviations.
    assert ((a.cov - b.cov).abs() <= rtol * (torch.outer(scale, scale) + 1e-30)).all()


@pytest.mark.parametrize("high", [128.0, 129.0, 1e4])
@pytest.mark.parametrize("n", [1, 1024, 1025, 4096])
def test_bytes_are_bit_for_bit_exact_also_under_autocast(n, high):
    """255 and 0 reach the bound 128²·1024 = 2²⁴ of exact float32 sums; targets may be larger."""
    x, y = digits(n)
    x[1::3, 20:150] = 255
    y[::5] = high
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = Moments.of(x, y)
    mean, cov = exact(x, y)
    assert m.n == n and torch.equal(m.mean, mean) and torch.equal(m.cov, cov)
    assert m.cov[:5].abs().max() == 0
    a = torch.randn(64, 64)
    # float32 products again have 7 digits, not the 2 of bfloat16.
    torch.testing.assert_close(a @ a, (a.double() @ a.double()).float(), rtol=1e-4, atol=1e-4)


DTYPES = "float64 float32 float16 bfloat16 uint8 int32 uint16".split()


@pytest.mark.parametrize("size, dtype", [(530, "float64"), *((4, dtype) for dtype in DTYPES)])
def test_every_dtype_is_summed_in_float64(size, dtype):
    x, y = noisy(1500, size)
    x = (x * 10 + 60).to(getattr(torch, dtype))
    z, m = torch.cat([x.double(), y[:, None]], dim=1), Moments.of(x, y)
    assert torch.equal(m.cov, m.cov.T)
    assert_same(m, Moments(1500, z.mean(0), torch.cov(z.T, correction=0)))


def test_a_common_offset_costs_no_digits():
    x, y = noisy(3000, 5)
    x[:, 4] = 2.0**-20  # constant: stays exactly constant under any offset
    a, b = Moments.of(x + 1e6, y - 1e6), Moments.of(x, y)
    # x + 1e6 itself is rounded to 1e6·2⁻⁵³ = 1e-10, in the mean of 3000 rows less.
    torch.testing.assert_close(a.cov, b.cov, rtol=0, atol=1e-9 * b.cov[-1, -1].sqrt().item())
    assert a.cov[4].abs().max() == 0
    best, other = a.optimum(), b.optimum()
    torch.testing.assert_close(best.weight, other.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(best.loss, other.loss, rtol=1e-9, atol=0)


def test_memmaps_and_read_only_arrays(tmp_path):
    x, y = digits(1300, size=20)
    x.numpy().tofile(tmp_path / "x")
    y.numpy().tofile(tmp_path / "y")
    inputs = np.memmap(tmp_path / "x", np.uint8, "r", shape=(1300, 20))
    targets = np.memmap(tmp_path / "y", np.float32, "r", shape=(1300,))
    assert torch.equal(Moments.of(inputs, targets).cov, exact(x, y)[1])


def test_affine_normalises_pixels():
    x, y = digits(2000, size=40)
    mean, std = 0.1307, 0.3081
    m, raw = Moments.of((x.double() / 255 - mean) / std, y), Moments.of(x, y)
    assert_same(raw.affine(1 / (255 * std), -mean / std), m)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_hessian_is_that_of_autograd(with_bias):
    x, y = noisy(200, 5)

    def loss(theta):
        return (x @ theta[:5] + (theta[5] if with_bias else 0) - y).square().mean()

    hessian = torch.autograd.functional.hessian(loss, torch.ones(5 + with_bias).double())
    found = Moments.of(x, y).hessian(with_bias)
    torch.testing.assert_close(found, hessian, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", ["plain", "scales", "few rows", "rank", "offset", "line", "ones"])
def test_optimum_is_that_of_lstsq(case, with_bias):
    x, y = noisy(8 if case == "few rows" else 400, 12, noise=case != "line")
    if case == "scales":
        x = x * torch.logspace(-4, 4, 12).double()
    if case == "rank":
        x[:, 3], x[:, 4], x[:, 5] = 0.1, x[:, 0] - 2 * x[:, 1], 0
    if case in ("offset", "ones"):
        x = torch.ones_like(x) if case == "ones" else x + 100
    opt = Moments.of(x, y).optimum(with_bias)
    # lstsq sees the columns on the scale that "smallest" refers to.
    centre = x.mean(0) if with_bias else torch.zeros(12).double()
    scale = (x - centre).square().mean(0).sqrt()
    scale[scale < 1e-12] = np.inf
    target = (y - y.mean() if with_bias else y).numpy()
    w = np.linalg.lstsq(((x - centre) / scale).numpy(), target, rcond=1e-10)[0]
    # Condition numbers here are at most 1e3, squared by the normal equations: 1e-16·1e6 of w.
    torch.testing.assert_close(opt.weight, torch.tensor(w) / scale, rtol=1e-9, atol=1e-9)
    residual = x @ opt.weight + (0 if opt.bias is None else opt.bias) - y
    assert 0 <= opt.loss and abs(residual.square().mean() - opt.loss) <= 1e-9 * y.square().mean()
    assert case != "rank" or opt.weight[5] == 0 and (opt.weight[3] == 0) == with_bias


def test_a_model_takes_moments_only_for_its_own_loss():
    other = type("Other", (LinearRegression,), {"forward": lambda self, x: 2 * x.sum(1)})
    assert takes_moments(type("Named", (LinearRegression,), {})())
    assert not any(map(takes_moments, (other(), RidgeRegression(), torch.nn.Linear(1, 1))))


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.ones(3), torch.ones(3), r"x \[3\], y \[3\] must be real \[N, D\] and \[N\] tables"),
        (ONES, torch.ones(3, 1), r"y \[3, 1\]"),
        (ONES * 1j, torch.ones(3), "real"),
        (ONES * np.nan, torch.ones(3), "finite"),
        (ONES.byte(), torch.tensor([np.nan, 1, 1]), "finite"),
        (ONES.double() * torch.tensor([[1e200], [1], [1]]).double(), torch.ones(3), "overflow"),
    ],
)
def test_bad_tables_are_refused(x, y, words):
    with pytest.raises(ValueError, match=words):
        Moments.of(x, y)


# Blocks and Arrow


def test_blocks_of_any_size_are_one_table():
    x, y = noisy(5000, 3)
    cuts = [0, 0, 1, 1200, 1203, 5000]
    blocks = [(x[a:b].numpy(), y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert_same(Moments.of_blocks(iter(blocks)), Moments.of(x, y))
    bytes_, odd = digits(3000)
    parts = zip(bytes_.split(700), odd.split(700), strict=True)
    assert torch.equal(Moments.of_blocks(parts).cov, exact(bytes_, odd)[1])
    with pytest.raises(ValueError, match="need at least one block"):
        Moments.of_blocks([])
    with pytest.raises(ValueError, match=r"x \[3, 2\], y \[2\] must be real"):
        Moments.of_blocks([(ONES, ONES[:, 0]), (ONES, ONES[:2, 0])])


def test_a_few_rows_stand_for_many():
    x, y = noisy(400, 6)
    x[:, 4], x[:, 5] = 7, x[:, 0]
    moments = Moments.of(x, 1e4 * y)
    assert_same(replace(Moments.of(*moments.example()), n=400), moments)


def arrow_table():
    pa = pytest.importorskip("pyarrow")
    x, y = noisy(3000, 4)
    columns = [x[:, 0].float().numpy(), (x[:, 1] * 10).int().numpy(), x[:, 2].numpy() > 0]
    named = dict(zip("abc", columns, strict=True), y=y.numpy())
    named["cents"] = pa.array((x[:, 3] * 100).long().numpy()).cast(pa.decimal128(22, 2))
    cents = (x[:, 3] * 100).long().double().numpy()
    return pa, pa.table(named), np.column_stack([*columns, cents]), y


SOURCES = {
    "table": lambda pa, table: table,
    "batches": lambda pa, table: pa.RecordBatchReader.from_batches(
        table.schema, table.to_batches(max_chunksize=700)
    ),
    "pandas": lambda pa, table: table.to_pandas(types_mapper=pandas.ArrowDtype),
    "polars": lambda pa, table: pytest.importorskip("polars").from_arrow(table),
    "duckdb": lambda pa, table: pytest.importorskip("duckdb").from_arrow(table),
}


@pytest.mark.parametrize("source", SOURCES)
def test_arrow_batches(source):
    if source == "pandas" and not hasattr(pandas.DataFrame, "__arrow_c_stream__"):
        pytest.skip("pandas 2.2 is the first that hands out Arrow batches")
    pa, table, x, y = arrow_table()
    moments = Moments.of_arrow(SOURCES[source](pa, table), "y")
    assert_same(moments, Moments.of(x, y))
    two = Moments.of_arrow(SOURCES[source](pa, table), "y", features=["c", "a"])
    assert_same(two, Moments.of(x[:, [2, 0]], y))


def test_an_arrow_stream_without_rows():
    pa = pytest.importorskip("pyarrow")
    empty = pa.schema({"a": pa.float32(), "y": pa.int8()}).empty_table()
    assert (Moments.of_arrow(empty, "y").n, Moments.of_arrow(empty, "y").size) == (0, 1)


def test_bad_arrow_streams_are_refused(monkeypatch):
    pa = pytest.importorskip("pyarrow")
    good = pa.table({"a": [1.0, 2.0], "y": [1, 2]})
    null, words = pa.table({"a": [1, 2, None], "y": [1, 2, 3]}), pa.table({"a": ["x"], "y": [1]})
    late = pa.table({"a": [1.0] * 5 + [float("nan")], "y": range(6)}).to_batches(max_chunksize=4)
    stream = pa.RecordBatchReader.from_batches(late[0].schema, late)
    for source, target, features, message in [
        (good, "z", None, "the Arrow stream has no column 'z': its columns: a, y"),
        (good, "y", ["a", "b"], "the Arrow stream has no column 'b'"),
        (good, "y", ["a", "y"], r"features=\['a', 'y'\] must name .* without the target 'y'"),
        (good, "y", [], r"features=\[\] must name one or more"),
        (null, "y", None, "row 2, column 'a': the cell is empty"),
        (words, "y", None, "column 'a': string is no type of real numbers"),
        (stream, "y", None, "row 5, column 'a': 'nan' is not a finite number"),
        ([1, 2], "y", None, "a list hands out no Arrow batches: it needs __arrow_c_stream__"),
    ]:
        with pytest.raises(ValueError, match=message):
            Moments.of_arrow(source, target, features)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"is read with pyarrow: .* 'lightning_gd\[arrow\]'"):
        Moments.of_arrow(good, "y")
