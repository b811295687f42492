"""Vector-Jacobian products and per-sample Jacobians, with the notebooks' numbers."""

import doctest

import pytest
import torch
from torch import nn

import derivatives
from derivatives import per_sample_jacobian, vjp


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_jacobian_of_a_network_equals_the_full_one(rows):
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(rows, 5, dtype=torch.float64)
    with torch.no_grad():  # also from inside a training step of explicit mode
        jacobian = per_sample_jacobian(net, x)
    full = torch.autograd.functional.jacobian(net, x)  # [N, O, N, I]
    diagonal = full.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(jacobian, diagonal, rtol=1e-13, atol=1e-14)


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


X = torch.randn(4, 2)
REFUSED = [
    (lambda: per_sample_jacobian(lambda x: x.sum(1), X), r"to \[N, O\]; found \[4\]"),
    (lambda: per_sample_jacobian(lambda x, z: x, X, X[:3, 0]), r"one N; found \[\[4, 2\], \[3\]\]"),
    (lambda: per_sample_jacobian(lambda x: x, X.long()), "torch.int64"),
    (lambda: per_sample_jacobian(lambda x: x.detach(), X), "does not depend"),
    (lambda: vjp(lambda x: x, X, torch.ones(4)), r"\[4, 2\]; found \[4\]"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_wrong_calls_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_of_the_notebooks():
    assert doctest.testmod(derivatives) == (0, 9)
