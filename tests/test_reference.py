"""The NumPy loop against the notebooks' numbers and against torch's SGD."""

import numpy as np
import pytest
import torch

from lightning_gd.reference import gradient_descent

X = np.array([1, 2, 3, 4])


def test_sum_gradient_follows_the_closed_form():
    """Notebook 001: w = 2(1 − 0.4ᵏ), loss 30·0.16ᵏ⁻¹."""
    run = gradient_descent(X.astype(np.float64), 2 * X, lr=0.01, steps=10, reduction="sum")
    k = np.arange(11)
    # The last loss, 2e-6, is the square of 1 − w/2, which has cancelled to 1e-4 of w.
    np.testing.assert_allclose(run.weights[:, 0], 2 * (1 - 0.4**k), rtol=1e-13)
    np.testing.assert_allclose(run.losses, 30 * 0.16 ** k[:-1], rtol=1e-9)


def test_mean_gradient_follows_the_closed_form():
    run = gradient_descent(X, 2 * X, lr=0.01, steps=10)
    k = np.arange(11)
    np.testing.assert_allclose(run.weights[:, 0], 2 * (1 - 0.85**k), rtol=1e-13)
    np.testing.assert_allclose(run.losses, 30 * 0.7225 ** k[:-1], rtol=1e-9)


def test_printed_numbers_of_integer_data():
    """Notebook 003: int64 points, float64 weight, as printed."""
    run = gradient_descent(X, 3 * X, lr=0.01, steps=11, reduction="sum")
    printed = [0, 1.8, 2.52, 2.808, 2.9232, 2.96928, 2.987712, 2.9950848]
    np.testing.assert_allclose(run.weights[:8, 0], printed, rtol=1e-12)
    losses = [f"{loss:.3f}" for loss in run.losses[:7]]
    assert losses == ["67.500", "10.800", "1.728", "0.276", "0.044", "0.007", "0.001"]
    assert run.weights.dtype == np.float64


def test_printed_numbers_in_float32():
    """Notebook 001 printed with another scalar promotion: equal to 2e-5, or 5e-9 of 30."""
    x = X.astype(np.float32)
    run = gradient_descent(x, 2 * x, lr=0.01, steps=10, reduction="sum")
    printed = [30.0, 4.79999924, 0.76800019, 0.12288, 0.01966083, 0.00314574, 0.00050331]
    np.testing.assert_allclose(run.losses[:7], printed, rtol=2e-5, atol=5e-9)


def test_the_sum_is_the_mean_with_n_times_the_learning_rate():
    total = gradient_descent(X, 3 * X, lr=0.01, steps=5, reduction="sum")
    mean = gradient_descent(X, 3 * X, lr=0.04, steps=5)
    np.testing.assert_allclose(total.weights, mean.weights, rtol=1e-14)
    np.testing.assert_allclose(total.gradients, 4 * mean.gradients, rtol=1e-12)
    assert mean.gradients[0, 0] == -45  # as torch printed in notebook 003


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bias", [None, 0.5])
def test_equals_sgd_of_torch(momentum, bias):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=20)
    start = rng.normal(size=3)
    run = gradient_descent(x, y, lr=0.05, steps=50, weight=start, bias=bias, momentum=momentum)
    w = torch.tensor(start, requires_grad=True)
    b = torch.tensor(bias or 0.0, dtype=torch.float64, requires_grad=bias is not None)
    optimizer = torch.optim.SGD([w, b], lr=0.05, momentum=momentum)
    for loss, weight in zip(run.losses, run.weights, strict=False):
        np.testing.assert_allclose(weight, w.detach(), rtol=1e-11)
        optimizer.zero_grad()
        error = (torch.tensor(x) @ w + b - torch.tensor(y)).square().mean()
        error.backward()
        optimizer.step()
        np.testing.assert_allclose(loss, error.item(), rtol=1e-11)
    np.testing.assert_allclose(run.biases[-1], b.item(), rtol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keeps_the_dtype(dtype):
    run = gradient_descent(X.astype(dtype), X, lr=0.01, steps=3, bias=0.0, momentum=0.9)
    assert {values.dtype for values in run} == {np.dtype(dtype)}
    assert [v.shape for v in run] == [(4, 1), (4,), (3,), (3, 1)]
    assert gradient_descent(X, X, lr=0.01, steps=0).gradients.shape == (0, 1)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(4, 1\)"):
        gradient_descent(X, X[:, None], lr=0.01, steps=1)
    with pytest.raises(ValueError, match="'total'"):
        gradient_descent(X, X, lr=0.01, steps=1, reduction="total")  # type: ignore[arg-type]
