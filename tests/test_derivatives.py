"""Vector-Jacobian products and per-sample Jacobians, with the notebooks' numbers."""

import time

import pytest
import torch
from torch import nn

from lightning_gd.derivatives import per_sample_jacobian, vjp


def cubic(x, y, z):
    return torch.stack([x**3 - y**2, y**2 + z**2, z**3 - x**2], dim=1)


def by_functional(f, x):
    """The full Jacobian [N, O, N, I] and its diagonal."""
    full = torch.autograd.functional.jacobian(f, x)
    return full.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def seconds(f):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def test_jacobian_of_the_notebook():
    t = torch.arange(10.0)
    zero = torch.zeros_like(t)
    rows = [[3 * t**2, -2 * t, zero], [zero, 2 * t, 2 * t], [-2 * t, zero, 3 * t**2]]
    expected = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    jacobian = per_sample_jacobian(cubic, t, t, t)
    assert jacobian.shape == (10, 3, 3)
    assert torch.equal(jacobian, expected)  # whole numbers: equal bit for bit
    table = torch.stack([t, t, t], dim=1)
    assert torch.equal(per_sample_jacobian(lambda x: cubic(*x.unbind(1)), table), expected)


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_jacobian_of_a_network_equals_the_full_one(rows):
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(rows, 5, dtype=torch.float64)
    with torch.no_grad():  # also from inside a training step of the explicit road
        jacobian = per_sample_jacobian(net, x)
    torch.testing.assert_close(jacobian, by_functional(net, x), rtol=1e-13, atol=1e-14)


def test_unused_inputs_have_zero_columns_and_nothing_is_accumulated():
    x = torch.randn(4, 2, requires_grad=True)
    jacobian = per_sample_jacobian(lambda x, z: x, x, torch.randn(4))
    assert torch.equal(jacobian, torch.eye(2, 3).expand(4, 2, 3))
    assert x.grad is None


DEPENDENT = {
    "batch norm": lambda x: (x - x.mean(0)) / x.std(0),
    "mean": lambda x: x + x.mean(0),
    "softmax over rows": lambda x: x.softmax(0),
    "shifted": lambda x: x.roll(1, 0),
    "first row": lambda x: x * x[0],
}


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("rows", [3, 1000])
def test_dependent_rows_are_refused(name, rows):
    with pytest.raises(ValueError, match="acts on other rows"):
        per_sample_jacobian(DEPENDENT[name], torch.randn(rows, 4))


def test_wrong_calls_are_refused_by_name():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"to \[N, O\]; found \[4\]"):
        per_sample_jacobian(lambda x: x.sum(1), x)
    with pytest.raises(ValueError, match=r"one N; found \[\[4, 2\], \[3\]\]"):
        per_sample_jacobian(lambda x, z: x, x, torch.randn(3))
    with pytest.raises(ValueError, match="torch.int64"):
        per_sample_jacobian(lambda x: x, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="does not depend"):
        per_sample_jacobian(lambda x: x.detach(), x)
    with pytest.raises(ValueError, match=r"\[4, 2\]; found \[4\]"):
        vjp(lambda x: x, x, torch.ones(4))


def test_vjp_of_the_notebooks():
    a, b = torch.tensor([2.0, 3.0]), torch.tensor([6.0, 4.0])
    da, db = vjp(lambda a, b: a**3 - 2 * b**2, [a, b], torch.ones(2))
    assert torch.equal(da, 3 * a**2) and torch.equal(db, -4 * b)
    x = torch.tensor([0.8099, 0.9596, 0.7738])
    (gradient,) = vjp(lambda x: (2 * (x + 2) ** 2).mean(), x, torch.tensor(1.0))
    # x is printed to four places: its gradient 4(x + 2)/3 to 1e-4.
    torch.testing.assert_close(gradient, torch.tensor([3.7465, 3.9461, 3.6984]), atol=1e-4, rtol=0)
