"""Predictions from the curvature against runs of torch's own SGD, and least squares in a run."""

import pytest
import torch
from conftest import Rows, fit

from lightning_gd import LinearRegression, RidgeRegression
from lightning_gd.curvature import Curvature, largest_eigenvalue
from lightning_gd.leastsquares import LeastSquares
from lightning_gd.moments import Moments


def table(n=60, size=4, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=g).double() * torch.logspace(-0.5, 0.5, size).double() + 0.5
    return x, x.sum(1) + torch.randn(n, generator=g).double()


def losses(x, y, path):
    return torch.stack([(x @ theta[:-1] + theta[-1] - y).square().mean() for theta in path])


def sgd(x, y, theta0, lr, momentum, steps):
    """Parameters of `steps` updates of torch.optim.SGD, gradients by autograd."""
    theta = theta0.clone().requires_grad_()
    optimizer, path = torch.optim.SGD([theta], lr=lr, momentum=momentum), []
    for _ in range(steps + 1):
        path.append(theta.detach().clone())
        optimizer.zero_grad()
        losses(x, y, [theta])[0].backward()
        optimizer.step()
    return torch.stack(path)


def ready(x, y):
    m = Moments.of(x, y)
    theta0 = torch.randn(x.shape[1] + 1, generator=torch.Generator().manual_seed(1)).double()
    return m, Curvature(m.hessian()), m.optimum(), theta0


def rare():
    """A pixel that is lit once: its curvature is small and its optimal weight large."""
    x, y = table(size=10)
    x[:, 3] = torch.eye(60)[7] * 1e-3
    return x, y


# Tables of full rank, with weights that the data leave open, and with a rare pixel.
TABLES = {"plain": (table(), 5), "open": (table(n=6, size=10), 6), "rare": (rare(), 11)}
CURVES = [("plain", 0.1), ("plain", 0.99), ("plain", 1.02), ("open", 0.5), ("rare", 0.5)]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("case, part", CURVES)
def test_predicted_curves_are_the_measured_ones(case, part, momentum):
    (x, y), rank = TABLES[case]
    m, curvature, opt, theta0 = ready(x, y)
    rate = part * curvature.max_lr(momentum), momentum, 100
    assert curvature.rank == rank and (curvature.factor(*rate[:2]) < 1) == (part < 1)
    path = sgd(x, y, theta0, *rate)
    errors = curvature.errors(theta0, opt.theta, *rate)
    walked = opt.theta + errors @ curvature.eigenvectors.T
    # 1e-9 of what there is at the start, or where the run diverges at its end.
    assert (walked - path).abs().max() <= 1e-9 * max(path.abs().max(), opt.theta.abs().max())
    others, measured = table(n=30, size=x.shape[1], seed=5), losses(x, y, path)
    for found, wanted in [
        (errors.square() @ curvature.eigenvalues / 2 + opt.loss, measured),
        (m.loss(walked[:, :-1], walked[:, -1]), measured),
        (Moments.of(*others).loss(walked[:, :-1], walked[:, -1]), losses(*others, path)),
    ]:
        assert (found - wanted).abs().max() <= 1e-9 * wanted.max()


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.9])
def test_factor_is_the_spectral_radius_and_smallest_at_best_lr(momentum):
    curvature = ready(*table())[1]
    best = curvature.factor(curvature.best_lr(momentum), momentum)
    for lr in torch.linspace(0.02, 1, 50).double().mul(curvature.max_lr(momentum)).tolist():
        slopes = 1 + momentum - lr * curvature.eigenvalues
        steps = [[[s, -momentum], [1, 0]] for s in slopes.tolist()]
        radius = torch.linalg.eigvals(torch.tensor(steps, dtype=torch.float64)).abs().max().item()
        # At a double root rounding enters as √1e-16 = 1e-8.
        assert curvature.factor(lr, momentum) == pytest.approx(radius, rel=1e-7)
        assert best <= curvature.factor(lr, momentum) + 1e-7


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("part", [0.1, 0.3, 0.99])
def test_updates_needed_is_where_the_curve_stays_below_a_hundredth(part, momentum):
    _, curvature, opt, theta0 = ready(*table())
    run = theta0, opt.theta, part * curvature.max_lr(momentum), momentum
    curve = curvature.errors(*run, 5000).square() @ curvature.eigenvalues
    assert curve[-1] < 0.01 * curve[0]  # the curve is long enough
    assert curvature.updates_needed(*run) == int((curve > 0.01 * curve[0]).nonzero()[-1]) + 1


def test_updates_needed_where_it_never_comes_or_takes_long():
    slow, start = Curvature(torch.diag(torch.tensor([1.0, 1e-6]))), torch.tensor([0.0, 1])
    # (1 − 1e-6)^2k = 0.01 ⇔ k = ln 10 / 1e-6; float32 1e-6 is exact to 1e-8.
    assert slow.updates_needed(start, 0 * start, 1.0, 0.0) == pytest.approx(2302584, rel=1e-6)
    for lr, momentum in [(1e-3, 0.0), (1.0, 0.5), (0.0, 0.0), (2.1, 0.0)]:
        assert slow.updates_needed(start, 0 * start, lr, momentum) is None
    assert slow.updates_needed(start, start, 1.0, 0.0) is None  # nothing is left to do


def test_updates_needed_after_a_resume():
    """From any update of a run with momentum, what is left is what was left from its start."""
    _, curvature, opt, theta0 = ready(*table())
    lr = 0.3 * curvature.max_lr(0.9)
    path = opt.theta + curvature.errors(theta0, opt.theta, lr, 0.9, 60) @ curvature.eigenvectors.T
    first = (curvature.eigenvectors.T @ (path[40] - opt.theta)).square() @ curvature.eigenvalues
    rest = curvature.errors(theta0, opt.theta, lr, 0.9, 5000).square() @ curvature.eigenvalues
    wanted = int((rest > 0.01 * first).nonzero()[-1]) + 1
    found = curvature.updates_needed(path[40], opt.theta, lr, 0.9, before=path[39])
    assert found is not None and 40 + found == wanted


def test_sentences():
    h = Curvature(torch.diag(torch.tensor([0, 1.0, 4.0])))
    assert h.rates(0.0) == 'lr below 0.5 converges; fastest 0.4, "auto" 0.25'
    assert h.rates(0.9) == 'lr below 0.95 converges (momentum 0.9); fastest 0.76, "auto" 0.25'
    ends = "the loss above the optimum in the end halves"
    for lr, momentum, words in [
        (0.25, 0.0, f"lr 0.25 converges: {ends} every 1.2 updates"),  # ln ½ / ln 0.75²
        (0.4, 0.0, f"lr 0.4 converges: {ends} at each update"),
        (1e-5, 0.0, "lr 1e-05 converges slowly: it is far below the fastest rate"),
        (1e-3, 0.0, f"lr 0.001 converges: {ends} every 346 updates"),
        (0.5, 0.0, "WARNING: lr 0.5 does not converge: each update multiplies the loss by 1"),
        (99.0, 0.0, "WARNING: lr 99 diverges: each update multiplies the loss by 156025"),
        (
            0.500001,
            0.0,
            "WARNING: lr 0.500001 diverges: each update multiplies the loss by 1.00001",
        ),
    ]:
        assert h.verdict(lr, momentum) == words
    flat = Curvature(torch.diag(torch.tensor([1e-6, 1.0, 4.0])))
    words = "lr 0.4 converges, more and more slowly: some directions are nearly flat"
    assert flat.verdict(0.4, 0.0) == words
    assert h.details(0.4, 0.0) == [
        "eigenvalues of the Hessian: 4 to 1, condition number 4; 1 of 3 directions do not change "
        "the loss",
        "each update multiplies the error by 0.6 in the long run; along the steepest direction by "
        "−0.6",
    ]


@pytest.mark.parametrize("size", [1, 2, 50, 300])
def test_lanczos_finds_the_largest_eigenvalue(size):
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(size)).double()
    h = a + a.T  # negative eigenvalues too: the largest is not the largest in size
    values = torch.linalg.eigvalsh(h)
    for rtol, matrix in ((1e-6, h), (1e-3, h.float())):
        found = largest_eigenvalue(lambda v, h=matrix: h @ v, matrix[0], rtol)
        assert abs(found - values[-1]) <= rtol * values.abs().max()


def test_lanczos_on_low_rank_zero_and_bad_products(monkeypatch):
    u = torch.ones(20)
    assert largest_eigenvalue(lambda v: u * (u @ v), u) == pytest.approx(20)
    assert largest_eigenvalue(lambda v: 0 * v, u) == 0
    monkeypatch.setattr("lightning_gd.curvature.MOST_PRODUCTS", 2)
    with pytest.raises(ValueError, match="in 2 products"):
        largest_eigenvalue(lambda v: torch.arange(20) * v, u)


def test_a_hessian_without_curvature_is_refused():
    with pytest.raises(ValueError, match="no curvature"):
        Curvature(torch.diag(torch.tensor([0.0, -1])))


def squares(make_trainer, data, model=LinearRegression, **settings):
    trainer = make_trainer(max_steps=1)
    module = fit(trainer, data, model, num_features=4, start="linear", **settings)
    return LeastSquares.of(trainer, module), module


def test_lr_auto_is_one_over_the_largest_eigenvalue(make_trainer):
    x, y = table()
    _, model = squares(make_trainer, Rows(x, y), lr="auto")
    ones = torch.cat([x, torch.ones(60, 1)], dim=1)
    largest = torch.linalg.eigvalsh(2 / 60 * ones.T @ ones)[-1].item()
    for settings in (model.hparams, model.hparams_initial):
        assert settings["lr"] == pytest.approx(1 / largest, rel=1e-12)
    with pytest.raises(ValueError, match="got Ridge.*: set --model.lr to a number"):
        squares(make_trainer, Rows(x, y), RidgeRegression, lr="auto")


def test_what_is_not_least_squares(make_trainer):
    x, y = table()
    assert squares(make_trainer, Rows(x, y), RidgeRegression)[0] is None
    assert squares(make_trainer, Rows(x, y.sign().long()))[0] is None
    found, model = squares(make_trainer, Rows(x, y), bias=False)
    assert found is not None and len(found.theta()) == 4
    model.bias.data.fill_(1)  # frozen, and part of every prediction
    assert LeastSquares.of(model.trainer, model) is None
