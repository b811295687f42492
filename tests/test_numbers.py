"""Tables that are hard on floating point: the exact solution, and a rate that converges or none."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Rows, counted, normal
from conftest import fit as train

from lightning_gd import LinearRegression, LogisticParity, Moments, PointsData, Table
from lightning_gd.leastsquares import LeastSquares
from lightning_gd.optimum import Optimum, rank_tolerance

RIGHT = "hard tables solved within their bound"
EPS = torch.finfo(torch.float64).eps


def tables():
    """x, shape [N, D], by name; y = x·(1, 2, …) + 3 with noise of a tenth of its size."""
    x, spread = normal(60, 5), torch.tensor([1e8, 1.0, 1e-8, 1e3, 1e-3]).double()
    grid = torch.arange(30)[:, None] + torch.arange(10) + 1
    t = torch.linspace(0, 1, 60).double()[:, None]
    return {
        "plain": x,
        "scaled by 1e8": x * 1e8,
        "scaled by 1e-8": x * 1e-8,
        "scaled by 1e±8": x * spread,
        "far from 0": x + 1e6,
        "collinear": torch.cat([x, x[:, :2].sum(1, keepdim=True)], 1),
        "nearly collinear": torch.cat([x, x[:, :1] + 1e-5 * normal(60, 1, seed=8)], 1),
        "a copy": torch.cat([x, x], 1),
        "a constant": torch.cat([x, torch.full((60, 1), 7.0).double()], 1),
        "fewer rows than columns": normal(4, 9),
        "as many rows as columns": normal(5, 5),
        "one row": normal(1, 3),
        "one column": normal(60, 1),
        "powers": t ** torch.arange(1, 7),
        "Hilbert, 30 × 10": 1 / grid.double(),
        "Hilbert, 30 × 4": 1 / grid[:, :4].double(),
    }


def targets(x, name):
    if name == "constant":
        return torch.full((len(x),), 2.5).double()
    y = (x / x.abs().mean()) @ torch.arange(1.0, x.shape[1] + 1).double() + 3
    return y + 0.1 * y.abs().mean() * normal(len(x), seed=9)


def by_numpy(x, y, bias):
    """The solution of the scaled columns, the scales, the condition of these, and the least loss.

    Singular values below 1e-13 of the largest are rounding: of none of these tables a true one is.
    """
    centre = x.mean(0) * bias
    scale = (x - centre).square().mean(0).sqrt()
    scale[scale <= 1e-14 * centre.abs()] = np.inf
    columns, goal = ((x - centre) / scale).numpy(), (y - y.mean() * bias).numpy()
    found, _, rank, singular = np.linalg.lstsq(columns, goal, rcond=1e-13)
    condition = float(singular[0] / singular[max(rank, 1) - 1]) if singular[0] else 1.0
    residual: Any = goal - columns @ found
    # The sensitivity of least squares: κ, and κ² for the part of y that no x explains.
    size = np.linalg.norm(found) or 1.0
    angle = np.linalg.norm(residual) / max(singular[0] * size, 1e-300)
    sensitivity = float(condition + condition**2 * angle)
    return torch.tensor(found), scale, condition, sensitivity, residual


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("y", ["noisy", "constant"])
@pytest.mark.parametrize("name", tables())
def test_the_exact_solution(name, y, bias):
    x = tables()[name]
    target = targets(x, y)
    found, scale, condition, sensitivity, residual = by_numpy(x, target, bias)
    size = max(found.abs().max(), 1e-9 * target.abs().max())
    least, around = float((residual**2).mean()), EPS * target.square().mean().item()
    offset = x.abs().amax(0) / scale  # a mean far from 0 costs digits of the centred columns
    far = 1 + offset[scale.isfinite()].amax().item() if scale.isfinite().any() else 1.0
    with counted(RIGHT):
        rows = Optimum.of_rows(x, target, bias)
        scaled = torch.where(scale.isfinite(), rows.weight * scale, 0.0)
        assert (scaled - found).abs().max() <= 100 * far * EPS * sensitivity * size
        # A residual r is a difference of D terms of the size of the weights, computed with an
        # error δ of about D eps of them, once by NumPy and once here: r² changes by 2rδ + δ².
        delta = EPS * size * len(found)
        rounding = 4 * least**0.5 * delta + (100 * far * delta) ** 2 + 100 * around
        assert least - rounding <= rows.loss <= least * (1 + 1e-9) + rounding
    with counted(RIGHT):
        moments = Moments.of(x, target).optimum(bias)
        if not moments.dropped:  # else the table is beyond what moments resolve
            scaled = torch.where(scale.isfinite(), moments.weight * scale, 0.0)
            assert (scaled - found).abs().max() <= 100 * far**2 * EPS * condition**2 * size
            assert moments.condition_number == pytest.approx(condition**2, rel=0.01)
        assert moments.loss >= least - 100 * around * far**2
        beyond = condition**2 * rank_tolerance(x.shape[1]) > 1
        assert not beyond or moments.dropped


def test_a_hilbert_matrix_is_solved_from_its_rows(make_trainer):
    """Moments drop three of its directions, and their loss is a third above the least one."""
    x = tables()["Hilbert, 30 × 10"]
    y = normal(30, seed=9)
    trainer = make_trainer(max_steps=1)
    model = train(trainer, Rows(x, y), LinearRegression, num_features=10)
    squares = LeastSquares.of(trainer, model)
    _, _, _, _, residual = by_numpy(x, y, bias=True)
    with counted(RIGHT):
        assert squares is not None and squares.moments().optimum().dropped >= 3
        assert squares.moments().optimum().loss > 1.1 * (residual**2).mean()
        # κ = 1e8 of the centred rows, and weights of 1e8: 1e-16·1e8 of each residual.
        assert squares.optimum.loss.item() == pytest.approx((residual**2).mean(), rel=1e-6)
        assert squares.optimum.dropped == 0


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", tables())
def test_the_automatic_rate_converges(make_trainer, name, bias):
    x = tables()[name]
    data = Rows(x, targets(x, "noisy"), passes_per_epoch=50, updates_per_step=50)
    with counted(RIGHT):
        trainer = make_trainer(max_steps=50)
        model = train(
            trainer, data, LinearRegression, num_features=x.shape[1], lr="auto", bias=bias
        )
        _, losses = model.curves.history["train/loss"]
        # Along no direction the error grows at 1/λmax: the loss falls but for its rounding.
        assert all(b <= a * (1 + 1e-12) for a, b in zip(losses, losses[1:], strict=False))
        assert losses[-1] < losses[0]


def test_the_automatic_rate_by_products_is_that_of_the_eigenvalues(make_trainer, monkeypatch):
    x = tables()["scaled by 1e±8"]
    for limit in (10**6, 0):
        monkeypatch.setattr("lightning_gd.leastsquares.MOST_PARAMETERS", limit)
        data = Rows(x, targets(x, "noisy"))
        model = train(make_trainer(max_steps=1), data, LinearRegression, num_features=5, lr="auto")
        largest = np.linalg.norm(np.c_[x, np.ones(60)], 2) ** 2 * 2 / 60
        with counted(RIGHT):
            assert model.hparams["lr"] == pytest.approx(1 / largest, rel=1e-3)


@pytest.mark.parametrize("size, ends", [(1e-150, True), (1e-160, False), (1e-170, False)])
def test_features_whose_squares_vanish(make_trainer, size, ends):
    data = PointsData(x=[0.0, 0.0], y=[1.0, 2.0])
    data.points.raw, data.points._targets = size * normal(2, 1), normal(2)
    trainer = make_trainer(max_steps=1)
    with counted(RIGHT):
        if ends:
            assert train(trainer, data, LinearRegression, num_features=1, lr="auto", bias=False)
            return
        with pytest.raises(ValueError, match="lr='auto' is 1/λmax|or its square is in float64"):
            train(trainer, data, LinearRegression, num_features=1, lr="auto", bias=False)


def test_separable_classes_momentum_of_one_and_bytes(make_trainer):
    x = normal(40, 2)
    settings = {"passes_per_epoch": 300, "updates_per_step": 50}
    with counted(RIGHT):  # the weights grow for ever, the loss falls
        data = Rows(x, (x[:, 0] > 0).double() * 2 - 1, **settings)
        model = train(make_trainer(max_steps=300), data, LogisticParity, num_features=2, lr=1.0)
        _, losses = model.curves.history["train/loss"]
        assert losses == sorted(losses, reverse=True) and 0 < losses[-1] < 0.2
    with counted(RIGHT):  # 2,000 updates shrink the errors to a third at most
        data = Rows(x, x.sum(1), passes_per_epoch=2000, updates_per_step=500)
        chosen = {"num_features": 2, "lr": "auto", "momentum": 0.999}
        trainer = make_trainer(max_steps=2000)
        model = train(trainer, data, LinearRegression, **chosen)
        squares = LeastSquares.of(trainer, model)
        assert squares is not None
        curve, best = squares.curvature, squares.optimum.theta
        error = curve.errors(torch.zeros(3), best, curve.auto_lr, 0.999, 2000)[-1]
        # 2,000 updates, each with a rounding of 1e-16 that the momentum keeps for 1,000.
        torch.testing.assert_close(
            squares.theta(), best + curve.eigenvectors @ error, rtol=0, atol=1e-10
        )
    with counted(RIGHT):  # bytes in a run in float64
        pixels = (x.abs() * 80).to(torch.uint8)
        ends = []
        for raw in (pixels, pixels.double()):
            data = Rows(raw, x.sum(1), **settings)
            data.rows = Table(raw, x.sum(1), 1 / 255)
            chosen = {"num_features": 2, "lr": "auto"}
            ends.append(train(make_trainer(max_steps=300), data, LinearRegression, **chosen).weight)
        assert torch.equal(*ends)
