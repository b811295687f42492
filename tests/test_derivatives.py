"""Per-sample Jacobians against autograd's full one; the notebook's numbers are in lesson 004."""

import doctest

import pytest
import torch
from torch import nn

from lessons import derivatives
from lessons.derivatives import per_sample_jacobian


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


X = torch.randn(4, 2)
DEPENDENT = "acts on other rows"
REFUSED = [
    (lambda x: (x - x.mean(0)) / x.std(0), [X], DEPENDENT),
    (lambda x: x + x.mean(0), [torch.randn(1000, 4)], DEPENDENT),
    (lambda x: x.softmax(0), [X], DEPENDENT),
    (lambda x: x.roll(1, 0), [X], DEPENDENT),
    (lambda x: x * x[0], [torch.randn(1000, 4)], DEPENDENT),
    (lambda x: x.sum(1), [X], r"to \[N, O\]; found \[4\]"),
    (lambda x, z: x, [X, X[:3, 0]], r"one N; found \[\[4, 2\], \[3\]\]"),
    (lambda x: x, [X.long()], "torch.int64"),
    (lambda x: x.detach(), [X], "does not depend"),
]


@pytest.mark.parametrize("f, inputs, message", REFUSED)
def test_what_has_no_jacobian_per_sample_is_refused(f, inputs, message):
    with pytest.raises(ValueError, match=message):
        per_sample_jacobian(f, *inputs)


def test_the_example_runs():
    assert doctest.testmod(derivatives) == (0, 5)
