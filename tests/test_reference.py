"""The NumPy loop against the notebooks' numbers; `test_compare.py` compares it with torch."""

import doctest

import numpy as np
import pytest

import reference
from reference import gradient_descent

X = np.array([1, 2, 3, 4])


@pytest.mark.parametrize("reduction, factor", [("sum", 0.4), ("mean", 0.85)])
def test_the_closed_form(reduction, factor):
    """Notebook 001, y = 2x: w = 2(1 − qᵏ), loss 30 q²ᵏ, where q = 1 − λ · 15 (· 4 for the sum)."""
    run = gradient_descent(X, 2 * X, lr=0.01, steps=10, reduction=reduction)
    k = np.arange(11)
    # The last loss, 2e-6, is the square of 1 − w/2, which has cancelled to 1e-4 of w.
    np.testing.assert_allclose(run.weights[:, 0], 2 * (1 - factor**k), rtol=1e-13)
    np.testing.assert_allclose(run.losses, 30 * factor ** (2 * k[:-1]), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keeps_the_dtype(dtype):
    run = gradient_descent(X.astype(dtype), X, lr=0.01, steps=3, bias=0.0, momentum=0.9)
    assert {values.dtype for values in run} == {np.dtype(dtype)}
    assert [v.shape for v in run] == [(4, 1), (4,), (3,), (3, 1)]
    assert gradient_descent(X, X, lr=0.01, steps=0).gradients.shape == (0, 1)
    assert gradient_descent(X, X, lr=0.01, steps=0).weights.dtype == np.float64  # of integers


def test_wrong_calls_are_refused_and_the_example_runs():
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(4, 1\)"):
        gradient_descent(X, X[:, None], lr=0.01, steps=1)
    with pytest.raises(ValueError, match="'total'"):
        gradient_descent(X, X, lr=0.01, steps=1, reduction="total")  # type: ignore[arg-type]
    assert doctest.testmod(reference) == (0, 4)
