"""Moments against the direct formula, numpy's lstsq and autograd, all in float64."""

import numpy as np
import pytest
import torch

from lightning_gd.moments import Moments

# Sums of a few hundred float64 terms agree to some 1e-14 of the scale of their terms.
CLOSE = 1e-12


def table(n, size, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=g, dtype=torch.float64)
    return x.to(dtype), (x @ torch.arange(1.0, size + 1).double() + 3).to(dtype)


def noisy(n, size, seed=0):
    x, y = table(n, size, seed)
    return x, y + torch.randn(n, generator=torch.Generator().manual_seed(seed + 1)).double()


def digits(n=5000, size=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, size), generator=g, dtype=torch.uint8)
    x[:, :5] = torch.tensor([0, 255, 7, 128, 1])  # constant columns
    return x, torch.randint(0, 2, (n,), generator=g) * 2.0 - 1


def exact(x, y):
    """Two-pass moments from integers: every sum is exact in int64."""
    x, y, n = x.long(), y.long(), len(x)
    xx = n * (x.T.double() @ x.double()) - torch.outer(x.sum(0), x.sum(0)).double()
    xy = n * (x.T.double() @ y.double()) - (x.sum(0) * y.sum()).double()
    return x.sum(0).double() / n, xx / n**2, xy / n**2


def assert_same(a, b, rtol=CLOSE):
    assert a.n == b.n
    scale = b.cov_xx.diagonal().sqrt()
    torch.testing.assert_close(a.mean_x, b.mean_x, rtol=rtol, atol=rtol)
    torch.testing.assert_close(a.mean_y, b.mean_y, rtol=rtol, atol=rtol)
    # The terms of a covariance have the scale of the product of the deviations.
    assert ((a.cov_xx - b.cov_xx).abs() <= rtol * (torch.outer(scale, scale) + 1e-30)).all()
    assert ((a.cov_xy - b.cov_xy).abs() <= rtol * (scale * b.var_y.sqrt() + 1e-30)).all()
    torch.testing.assert_close(a.var_y, b.var_y, rtol=rtol, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 256, 1024, 4096])
def test_bytes_are_bit_for_bit_the_float64_result(rows):
    x, y = digits(n=2500 if rows > 1 else 300)
    m = Moments.of(x, y, block_rows=rows)
    mean, xx, xy = exact(x, y)
    assert torch.equal(m.mean_x, mean)
    assert torch.equal(m.cov_xx, xx)
    assert torch.equal(m.cov_xy, xy)
    assert m.cov_xx[:5].abs().max() == 0


def test_the_largest_bytes_are_exact():
    """255 and 0 reach the bound 128²·1024 = 2²⁴ of exact float32 sums."""
    x = torch.zeros(4096, 300, dtype=torch.uint8)
    x[1::3, :150] = 255
    y = torch.full((4096,), -128.0)
    y[::5] = 128
    mean, xx, xy = exact(x, y)
    m = Moments.of(x, y)
    assert torch.equal(m.cov_xx, xx) and torch.equal(m.cov_xy, xy) and torch.equal(m.mean_x, mean)


def test_bytes_stay_exact_under_autocast_and_restore_the_precision():
    x, y = digits(n=1500)
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(matmul, "fp32_precision", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = Moments.of(x, y)
    assert torch.equal(m.cov_xx, exact(x, y)[1])
    assert getattr(matmul, "fp32_precision", None) == before
    float32 = torch.randn(64, 64)
    # float32 products again have 7 digits, not the 2 of bfloat16.
    torch.testing.assert_close(
        float32 @ float32, (float32.double() @ float32.double()).float(), rtol=1e-4, atol=1e-4
    )


def test_bytes_with_real_targets():
    x, y = digits()
    y = torch.sin(torch.arange(len(y)).double()) * 1e3
    # atol: columns without variance have no scale of their own.
    a, b = Moments.of(x, y), Moments.of(x.double(), y)
    torch.testing.assert_close(a.cov_xy, b.cov_xy, rtol=0, atol=CLOSE * 255 * 1e3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_every_dtype_is_summed_in_float64(dtype):
    x, y = table(500, 4)
    x = (x * 10).to(dtype)
    assert_same(Moments.of(x, y), Moments.of(x.double(), y))


def test_wide_tables_use_several_panels():
    x, y = noisy(600, 530)
    m = Moments.of(x, y, block_rows=100)
    torch.testing.assert_close(m.cov_xx, torch.cov(x.T, correction=0), rtol=0, atol=CLOSE)
    assert torch.equal(m.cov_xx, m.cov_xx.T)


def test_a_common_offset_costs_no_digits():
    x, y = noisy(3000, 5)
    x[:, 4] = 2.0**-20  # constant: stays exactly constant under any offset
    a, b = Moments.of(x + 1e6, y - 1e6), Moments.of(x, y)
    # x + 1e6 itself is rounded to 1e6·2⁻⁵³ = 1e-10, in the mean of 3000 rows less.
    torch.testing.assert_close(a.cov_xx, b.cov_xx, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.cov_xy, b.cov_xy, rtol=0, atol=1e-9 * b.var_y.sqrt().item())
    assert a.cov_xx[4].abs().max() == 0


def test_an_offset_leaves_the_optimum_where_it_was():
    x, y = noisy(3000, 4)
    a, b = Moments.of(x + 1e6, y).optimum(), Moments.of(x, y).optimum()
    # Rounding of the shifted inputs, 1e-10 each.
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-9, atol=0)


def test_merge_of_uneven_and_empty_shares():
    x, y = noisy(1000, 6)
    whole = Moments.of(x + 1e3, y)
    parts = [(x[i:j] + 1e3, y[i:j]) for i, j in [(0, 1), (1, 1), (1, 300), (300, 1000)]]
    total = Moments.zero(6)
    for part in parts:
        total = total + Moments.of(*part)
    # The offset 1e3 costs 3 digits of the means, whose differences enter.
    assert_same(total, whole, rtol=1e-10)
    assert (Moments.zero(6) + Moments.zero(6)).n == 0
    assert Moments.of(x[:0], y[:0]).n == 0


def test_reduce_over_uneven_and_empty_shares():
    x, y = noisy(1000, 6)
    shares = [Moments.of(x[i:j] + 1e3, y[i:j]) for i, j in [(0, 1), (1, 1), (1, 300), (300, 1000)]]
    assert_same(in_step(shares)[1], Moments.of(x + 1e3, y), rtol=1e-10)  # 3 digits, as above
    assert len({m.cov_xx.sum().item() for m in in_step(shares)}) == 1
    assert in_step([Moments.zero(6)])[0].n == 0


def in_step(shares):
    """Run ``reduce`` of all shares as processes would: call after call in lock step."""
    sums = []
    while True:
        sent, results = [], []
        for share in shares:
            replies = iter(sums)

            def reduce_sum(flat, replies=replies):
                reply = next(replies, None)
                if reply is None:
                    raise _Wait(flat)
                return reply.clone()

            try:
                results.append(share.reduce(reduce_sum))
            except _Wait as wait:
                sent.append(wait.flat)
        if results:
            return results
        assert all(f.dim() == 1 and f.dtype == torch.float64 for f in sent)
        sums.append(torch.stack(sent).sum(0))


class _Wait(Exception):
    def __init__(self, flat):
        self.flat = flat


def test_memmaps_and_read_only_arrays(tmp_path):
    x, y = digits(n=700, size=20)
    x.numpy().tofile(tmp_path / "x")
    y.numpy().tofile(tmp_path / "y")
    maps = (
        np.memmap(tmp_path / "x", np.uint8, "r", shape=(700, 20)),
        np.memmap(tmp_path / "y", np.float32, "r", shape=(700,)),
    )
    assert torch.equal(Moments.of(*maps).cov_xx, Moments.of(x, y).cov_xx)
    wrapped = torch.from_numpy(np.memmap(tmp_path / "x", np.uint8, "c", shape=(700, 20)))
    assert torch.equal(Moments.of(wrapped, y).cov_xx, Moments.of(x, y).cov_xx)


def test_affine_normalises_pixels():
    x, y = digits(n=2000, size=40)
    mean, std = 0.1307, 0.3081
    pixels = (x.double() / 255 - mean) / std
    m = Moments.of(x, y).affine(1 / (255 * std), -mean / std)
    direct = Moments.of(pixels, y)
    torch.testing.assert_close(m.cov_xx, direct.cov_xx, rtol=0, atol=CLOSE)
    torch.testing.assert_close(m.cov_xy, direct.cov_xy, rtol=0, atol=CLOSE)
    torch.testing.assert_close(m.mean_x, direct.mean_x, rtol=0, atol=CLOSE)
    scale = torch.arange(1.0, 41)
    by_column = Moments.of(x, y).affine(scale, 0.0)
    torch.testing.assert_close(by_column.cov_xy, Moments.of(x * scale.double(), y).cov_xy)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_autograd(with_bias):
    x, y = noisy(200, 5)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True) if with_bias else None
    leaves = [w] if b is None else [w, b]
    direct = torch.autograd.grad((x @ w + (0 if b is None else b) - y).square().mean(), leaves)
    m = Moments.of(x, y)
    through_moments = torch.autograd.grad(m.loss(w, b), leaves)
    for a, d, g in zip(m.gradients(w, b), direct, through_moments, strict=False):
        torch.testing.assert_close(a, d, rtol=CLOSE, atol=CLOSE)
        torch.testing.assert_close(g, d, rtol=CLOSE, atol=CLOSE)


def test_float32_copy():
    x, y = noisy(200, 5)
    w, b = torch.ones(5), torch.tensor(0.5)
    m = Moments.of(x, y)
    loss, dw, db = m.to(dtype=torch.float32).loss_and_gradients(w, b)
    assert db is not None and loss.dtype == dw.dtype == db.dtype == torch.float32
    # float32 has 7 digits; sums of 5 terms lose less than one.
    torch.testing.assert_close(
        dw.double(), m.gradients(w.double(), b.double())[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("with_bias", [True, False])
def test_hessian_is_that_of_autograd(with_bias):
    x, y = noisy(50, 3)

    def loss(t):
        return (x @ t[:3] + (t[3] if with_bias else 0) - y).square().mean()

    h = torch.autograd.functional.hessian(loss, torch.zeros(3 + with_bias).double())
    torch.testing.assert_close(Moments.of(x, y).hessian(with_bias), h, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", ["plain", "scales", "few rows", "rank", "offset"])
def test_optimum_is_that_of_lstsq(case, with_bias):
    x, y = noisy(8 if case == "few rows" else 400, 12)
    if case == "scales":
        x = x * torch.logspace(-4, 4, 12).double()
    if case == "rank":
        x[:, 3], x[:, 4], x[:, 5] = 0.1, x[:, 0] - 2 * x[:, 1], 0
    if case == "offset":
        x = x + 100
    opt = Moments.of(x, y).optimum(with_bias)
    # lstsq sees the columns on the scale that "minimum norm" refers to.
    centre = x.mean(0) if with_bias else torch.zeros(12).double()
    scale = (x - centre).square().mean(0).sqrt()
    scale[scale < 1e-12] = np.inf
    design = ((x - centre) / scale).numpy()
    target = (y - y.mean() if with_bias else y).numpy()
    w, _, rank, _ = np.linalg.lstsq(design, target, rcond=1e-10)
    # Condition numbers here are at most 1e3, squared by the normal equations: 1e-16·1e6 of w.
    torch.testing.assert_close(
        opt.weight * scale.nan_to_num(posinf=0), torch.tensor(w), rtol=1e-9, atol=1e-9
    )
    best = np.square(design @ w - target).mean()
    assert opt.rank == rank
    assert abs(opt.loss.item() - best) <= CLOSE * y.square().mean().item()
    assert (opt.bias is None) == (not with_bias)
    residual = x @ opt.weight + (0 if opt.bias is None else opt.bias) - y
    assert abs(residual.square().mean() - opt.loss) <= 1e-9 * y.square().mean()
    if case == "rank" and with_bias:
        assert opt.weight[3] == 0 and opt.weight[5] == 0


def test_optimum_of_an_exact_line_and_of_constant_data():
    x, y = table(50, 3)
    opt = Moments.of(x, y).optimum()
    torch.testing.assert_close(opt.theta, torch.tensor([1.0, 2, 3, 3]).double(), rtol=1e-12, atol=0)
    assert 0 <= opt.loss <= 1e-14 * y.square().mean()
    flat = Moments.of(torch.ones(4, 2), torch.tensor([1.0, 2, 3, 6])).optimum()
    assert flat.rank == 0 and flat.bias == 3 and flat.weight.abs().max() == 0 and flat.loss == 3.5


def test_excess_loss_does_not_cancel():
    x, y = noisy(300, 4)
    m = Moments.of(x, y)
    opt = m.optimum()
    step = torch.tensor([3.0, -1, 2, 5, 1]).double()
    h = m.hessian()
    for size in [1.0, 1e-6, 1e-10]:
        theta = opt.theta + size * step
        delta = theta - opt.theta
        excess = m.excess_loss(theta[:4], theta[4], opt)
        # Relative to the excess itself, 1e-20 of the loss in the last case.
        torch.testing.assert_close(excess, 0.5 * delta @ h @ delta, rtol=1e-12, atol=0)
    # The difference of losses agrees while it has digits.
    theta = opt.theta + step
    torch.testing.assert_close(
        m.excess_loss(theta[:4], theta[4], opt), m.loss(theta[:4], theta[4]) - opt.loss
    )


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.ones(3), torch.ones(3), r"x \[3\] and y \[3\].*\[N, D\] and \[N\]"),
        (torch.ones(3, 2), torch.ones(3, 1), r"y \[3, 1\]"),
        (torch.ones(3, 2), torch.ones(1), r"y \[1\]"),
        (torch.ones(3, 2), torch.ones(2), r"y \[2\]"),
        (torch.ones(3, 2) * 1j, torch.ones(3), "complex"),
        (torch.tensor([[1.0, 2], [3, np.nan]]), torch.ones(2), r"x\[1, 1\] is nan"),
        (torch.tensor([[1.0, 2], [np.inf, 4]]), torch.ones(2), r"x\[1, 0\] is inf"),
        (torch.ones(2, 2, dtype=torch.uint8), torch.tensor([np.nan, 1]), r"y\[0\] is nan"),
        (torch.tensor([[1e200], [-1e200]], dtype=torch.float64), torch.ones(2), "overflow"),
    ],
)
def test_bad_tables_are_refused(x, y, words):
    with pytest.raises(ValueError, match=words):
        Moments.of(x, y)


def test_bad_weights_and_sizes_are_refused():
    m = Moments.of(*noisy(10, 2))
    w, b = torch.ones(2).double(), torch.tensor(0.0).double()
    for weight, bias in [(w[:1], b), (w[:, None], b), (w, b[None])]:
        with pytest.raises(ValueError, match=r"take \[2\] and \[\]"):
            m.loss_and_gradients(weight, bias)
    with pytest.raises(ValueError, match="2 and of 3 columns"):
        _ = m + Moments.zero(3)
    with pytest.raises(ValueError, match="block_rows=0"):
        Moments.of(*noisy(10, 2), block_rows=0)
    with pytest.raises(ValueError, match=r"scale has shape \[3\]"):
        m.affine(torch.ones(3), 0)
    with pytest.raises(ValueError, match="bias is None"):
        m.excess_loss(w, None, m.optimum())
