"""Ridge regression against its closed form, and the logistic loss at extreme scores."""

import math

import pytest
import torch

from lightning_gd import LinearRegression, LogisticParity, RidgeRegression, TensorDataModule
from lightning_gd.data.tensors import Table
from lightning_gd.gradcheck import check_gradients


@pytest.mark.parametrize("cls", [RidgeRegression, LogisticParity])
def test_the_formulas_equal_autograd_and_central_differences(cls):
    model, x, y = cls.example_batch()
    check_gradients(model, x, y).raise_if_wrong()
    model, x, y = model.double(), x.double(), y.double()
    truth = torch.autograd.grad(model.loss(x, y), list(model.parameters()))
    for gradient, right in zip(model.gradients(x, y).values(), truth, strict=True):
        # Sums of 7 terms of order 1 in float64 agree to a few eps.
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-14)


class Rows(TensorDataModule):
    """Random rows, and the targets given or their signs."""

    def __init__(self, signs=False, **kwargs):
        super().__init__(**kwargs)
        self.signs = signs

    def load(self):
        x, y = rows()
        return {"train": Table(x, y.sign() if self.signs else y)}


def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(50, generator=generator, dtype=torch.float64)
    return x, x.sum(1) + 3 + noise


def fit(model, trainer, **data):
    """The weights and the bias after `max_steps` updates."""
    trainer.fit(model, datamodule=Rows(**data))
    assert trainer.global_step == trainer.max_steps
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("cls", [RidgeRegression, LogisticParity])
def test_both_roads_make_the_same_updates(cls, make_trainer):
    explicit, autograd = (
        fit(
            cls(num_features=5, lr=0.05, momentum=0.9, gradient=road),
            make_trainer(max_steps=60),
            signs=cls is LogisticParity,
            batch_size=16,
        )
        for road in ("explicit", "autograd")
    )
    assert explicit.abs().min() > 0.01
    # 60 updates of order 0.1, each with rounding errors of order eps
    torch.testing.assert_close(explicit, autograd, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 10.0])
def test_ridge_reaches_the_closed_form_solution(alpha, make_trainer):
    x, y = rows()
    model = RidgeRegression(alpha, num_features=5, lr=0.5 / (1.5 + alpha), momentum=0.5)
    found = fit(model, make_trainer(max_steps=300), passes_per_epoch=300)
    centred = x - x.mean(0)
    hessian = centred.T @ centred / len(x) + alpha * torch.eye(5, dtype=x.dtype)
    weight = torch.linalg.solve(hessian, centred.T @ (y - y.mean()) / len(x))
    bias = y.mean() - x.mean(0) @ weight  # not drawn to 0 by alpha
    # Each update shortens the error by a tenth at least: it ends in rounding.
    torch.testing.assert_close(found, torch.cat([weight, bias[None]]), rtol=0, atol=1e-12)


class Halved(RidgeRegression):
    """Overrides the two formulas alone, not the one-pass form of its parents."""

    def loss(self, x, y):
        return super().loss(x, y) / 2

    def gradients(self, x, y):
        return {name: gradient / 2 for name, gradient in super().gradients(x, y).items()}


def test_training_never_uses_the_one_pass_form_of_another_loss(make_trainer):
    halved, whole = Halved(num_features=5, lr=0.1), RidgeRegression(num_features=5, lr=0.05)
    ends = [fit(model, make_trainer(max_steps=9)) for model in (halved, whole)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-13)  # nine updates of order 1


def test_ridge_without_a_price_is_least_squares():
    model, x, y = RidgeRegression.example_batch()
    model.alpha = 0.0
    plain = LinearRegression(3, start="linear")
    assert torch.equal(model.loss(x, y), plain.loss(x, y))
    torch.testing.assert_close(model.gradients(x, y), plain.gradients(x, y))


@pytest.mark.parametrize("alpha", [-0.1, math.inf, "1"])
def test_ridge_refuses_a_price_that_is_none(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha!r} must be a finite number of at least 0"):
        RidgeRegression(alpha=alpha)


def at_score(score):
    model = LogisticParity(num_features=1, weight=[1.0]).double()
    x = torch.tensor([[score]], dtype=torch.float64)
    return model, x, torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("score", [-1e300, -1e5, -800, -40, -1, 0, 1, 19, 21, 36, 40, 700])
def test_the_logistic_loss_is_exact_at_every_score(score):
    """−log σ(t) = max(−t, 0) + log1p(exp(−|t|)), and its slope −σ(−t), by `math`."""
    model, x, y = at_score(score)
    small = math.exp(-abs(score))
    exact = max(-score, 0) + math.log1p(small)
    slope = -1 / (1 + small) if score < 0 else -small / (1 + small)
    gradients = model.gradients(x, y)
    # rtol: a few eps, and the error of exp grows with |t| eps; nothing is rounded to 0 or 1.
    assert model.loss(x, y).item() == pytest.approx(exact, rel=1e-12, abs=0)
    assert gradients["bias"].item() == pytest.approx(slope, rel=1e-12, abs=0)


def test_the_logistic_formula_equals_autograd_where_scores_are_extreme():
    x = torch.tensor([[-1e4], [-50.0], [25.0], [1e4]]).double()
    for sign in (-1.0, 1.0):
        model, y = at_score(0)[0], torch.full((4,), sign).double()
        (truth,) = torch.autograd.grad(model.loss(x, y), [model.bias])
        assert model.loss(x, y).isfinite()
        # softplus, rounded above 20, would be off by 1e-11 here
        torch.testing.assert_close(model.gradients(x, y)["bias"], truth, rtol=1e-15, atol=0)


def test_the_mean_squared_error_is_not_the_loss():
    for model in (RidgeRegression(), LogisticParity()):
        assert "mse" in model.metrics() and "loss" not in model.metrics()
