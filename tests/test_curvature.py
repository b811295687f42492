"""Predictions from the curvature against runs of torch's own SGD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gd.curvature import Curvature, largest_eigenvalue, losses_along
from lightning_gd.moments import Moments


def table(n=60, size=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=g).double() * torch.logspace(-0.5, 0.5, size).double() + 0.5
    return x, x.sum(1) + torch.randn(n, generator=g).double()


def sgd(x, y, theta0, lr, momentum, steps):
    """Losses and parameters of ``steps`` updates of torch.optim.SGD, gradients by autograd."""
    theta = theta0.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=momentum)
    losses, path = [], []
    for _ in range(steps + 1):
        loss = (x @ theta[:-1] + theta[-1] - y).square().mean()
        losses.append(loss.detach())
        path.append(theta.detach().clone())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(losses), torch.stack(path)


def ready(x, y, seed=1):
    m = Moments.of(x, y)
    theta0 = torch.randn(x.shape[1] + 1, generator=torch.Generator().manual_seed(seed)).double()
    return m, Curvature(m.hessian()), m.optimum(), theta0


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 1.02])
def test_predicted_curve_is_the_measured_one(momentum, share):
    x, y = table()
    m, curvature, opt, theta0 = ready(x, y)
    lr = share * curvature.max_lr(momentum)
    losses, path = sgd(x, y, theta0, lr, momentum, 100)
    predicted = curvature.predict(theta0, opt.theta, opt.loss, lr, momentum, 100)
    # 1e-9 of the loss at the start, or of the loss reached where the run diverges.
    assert (predicted - losses).abs().max() <= 1e-9 * losses.max().clamp(min=losses[0])
    walked = curvature.trajectory(theta0, opt.theta, lr, momentum, 100)
    assert (walked - path).abs().max() <= 1e-9 * path.abs().max()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_prediction_where_the_data_leave_weights_undetermined(momentum):
    x, y = table(n=6, size=10)
    x[:, 2] = 1
    m, curvature, opt, theta0 = ready(x, y)
    lr = 0.5 * curvature.max_lr(momentum)
    losses, path = sgd(x, y, theta0, lr, momentum, 100)
    predicted = curvature.predict(theta0, opt.theta, opt.loss, lr, momentum, 100)
    assert curvature.rank == 6
    # As above; the undetermined part of the weights keeps its value of the start.
    assert (predicted - losses).abs().max() <= 1e-9 * losses[0]
    walked = curvature.trajectory(theta0, opt.theta, lr, momentum, 100)
    assert (walked - path).abs().max() <= 1e-9 * path.abs().max()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_prediction_with_a_pixel_lit_in_one_picture(momentum):
    """Its curvature is small, its optimal weight large: it counts even where λmin leaves it out."""
    x, y = table(n=60, size=20)
    x[:, 3] = 0
    x[7, 3] = 1e-3
    m, _, opt, theta0 = ready(x, y)
    curvature = Curvature(m.hessian(), rtol=1e-6)
    assert curvature.rank == 20 and opt.weight[3].abs() > 100
    lr = 0.5 * curvature.max_lr(momentum)
    losses, _ = sgd(x, y, theta0, lr, momentum, 100)
    predicted = curvature.predict(theta0, opt.theta, opt.loss, lr, momentum, 100)
    # 1e-9 of the loss at the start, as above.
    assert (predicted - losses).abs().max() <= 1e-9 * losses[0]


def test_predicted_test_curve():
    x, y = table()
    _, curvature, opt, theta0 = ready(x, y)
    other_x, other_y = table(n=30, seed=5)
    _, path = sgd(x, y, theta0, 0.1, 0.9, 50)
    measured = torch.stack([(other_x @ t[:-1] + t[-1] - other_y).square().mean() for t in path])
    walked = curvature.trajectory(theta0, opt.theta, 0.1, 0.9, 50)
    predicted = losses_along(Moments.of(other_x, other_y), walked)
    # 1e-9 of the loss at the start, as for the training curve.
    assert (predicted - measured).abs().max() <= 1e-9 * measured.max()
    no_bias = losses_along(Moments.of(other_x, other_y), path[:, :-1])
    direct = (other_x @ path[3, :-1] - other_y).square().mean()
    torch.testing.assert_close(no_bias[3], direct)


def test_notebook_000():
    """One weight, one point x = 5: λ = 2x² = 50."""
    m = Moments.of(torch.tensor([[5.0]]), torch.tensor([10.0]))
    curvature = Curvature(m.hessian(bias=False))
    # 1e-12: decimal fractions such as 0.1 are not exact in binary.
    assert curvature.largest == pytest.approx(50, rel=1e-12)
    assert curvature.top_factor(0.1) == pytest.approx(-4, rel=1e-12)
    assert curvature.factor(0.1) == pytest.approx(4, rel=1e-12)
    assert curvature.loss_factor(0.1) == pytest.approx(16, rel=1e-12)
    assert curvature.max_lr() == pytest.approx(0.04, rel=1e-12)
    assert curvature.best_lr() == pytest.approx(0.02, rel=1e-12)
    assert curvature.auto_lr == pytest.approx(0.02, rel=1e-12)
    assert m.optimum(bias=False).weight.item() == pytest.approx(2, rel=1e-12)
    text = "\n".join(curvature.report(0.1).lines())
    assert "WARNING: lr 0.1 diverges" in text
    assert "multiplies the error by −4 and the loss by 16; the largest stable rate is 0.04" in text
    losses = curvature.predict(torch.zeros(1), torch.tensor([2.0]), 0.0, 0.1, steps=3)
    torch.testing.assert_close(losses, torch.tensor([100.0, 1600, 25600, 409600]).double())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_max_lr_is_where_runs_stop_converging(momentum):
    x, y = table()
    _, curvature, opt, theta0 = ready(x, y)
    for share, converges in [(0.98, True), (1.02, False)]:
        lr = share * curvature.max_lr(momentum)
        losses, _ = sgd(x, y, theta0, lr, momentum, 2000)
        assert bool(losses[-1] < losses[0]) == converges
        assert (curvature.factor(lr, momentum) < 1) == converges


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.sampled_from([0.0, 0.3, 0.9, 0.99])
)
def test_best_lr_has_the_smallest_factor(values, momentum):
    curvature = Curvature(torch.diag(torch.tensor(values)))
    best = curvature.factor(curvature.best_lr(momentum), momentum)
    for share in torch.linspace(0.02, 1, 50).tolist():
        # 1e-7: at a double root z, where the factor is flat, rounding enters as √1e-16 = 1e-8.
        assert best <= curvature.factor(share * curvature.max_lr(momentum), momentum) + 1e-7


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.9])
def test_factor_is_the_spectral_radius_and_the_measured_rate(momentum):
    x, y = table()
    _, curvature, opt, theta0 = ready(x, y)
    lr = 0.9 * curvature.auto_lr
    radius = 0.0
    for value in curvature.eigenvalues:
        step = torch.tensor([[1 + momentum - lr * value, -momentum], [1, 0]])
        radius = max(radius, torch.linalg.eigvals(step).abs().max().item())
    # float32 entries of ``step``: 7 digits.
    assert curvature.factor(lr, momentum) == pytest.approx(radius, rel=1e-5)
    errors = curvature.trajectory(theta0, opt.theta, lr, momentum, 300) - opt.theta
    measured = (errors[300].norm() / errors[200].norm()).item() ** (1 / 100)
    # Oscillating components make single norms swing; over 100 updates by some per cent in all.
    assert measured == pytest.approx(radius, rel=2e-2)
    assert curvature.loss_factor(lr, momentum) == curvature.factor(lr, momentum) ** 2


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("fraction", [0.5, 0.01, 1e-6])
def test_updates_to_is_the_first_on_the_curve(momentum, fraction):
    x, y = table()
    _, curvature, opt, theta0 = ready(x, y)
    lr = 0.3 * curvature.max_lr(momentum)
    curve = curvature.predict(theta0, opt.theta, 0.0, lr, momentum, 3000)
    first = int((curve <= fraction * curve[0]).nonzero()[0])
    assert curvature.updates_to(theta0, opt.theta, lr, momentum, fraction) == first
    assert curvature.updates_to(theta0, opt.theta, lr, momentum, fraction, limit=first) == first
    assert curvature.updates_to(theta0, opt.theta, lr, momentum, fraction, limit=first - 1) is None


def test_updates_to_without_an_end_and_without_a_way():
    _, curvature, opt, theta0 = ready(*table())
    assert curvature.updates_to(theta0, opt.theta, 1.01 * curvature.max_lr()) is None
    assert curvature.updates_to(theta0, opt.theta, 0.0) is None
    assert curvature.updates_to(opt.theta, opt.theta, 0.01) == 0
    slow = Curvature(torch.diag(torch.tensor([1.0, 1e-6])))
    # (1 − 1e-6)^2k = 0.01 ⇔ k = ln 10 / 1e-6; float32 1e-6 is exact to 1e-8.
    updates = slow.updates_to(torch.tensor([0.0, 1]), torch.zeros(2), lr=1.0)
    assert updates == pytest.approx(2302584, rel=1e-6)


def test_noise_is_cut_from_the_spectrum():
    x, y = table(size=3)
    x = torch.cat([x, x[:, :1] * 3, torch.zeros(60, 2)], dim=1)
    curvature = Curvature(Moments.of(x, y).hessian())
    assert curvature.rank == 4
    assert curvature.smallest == curvature.eigenvalues[3] > 1e-6 > curvature.eigenvalues[2]
    h = Curvature(torch.diag(torch.tensor([1e-3, 1.0, 4.0])), rtol=1e-2)
    assert (h.smallest, h.largest, h.condition_number, h.rank) == (1, 4, 4, 2)


def test_report_of_a_rate_that_converges():
    _, curvature, opt, theta0 = ready(*table())
    report = curvature.report(curvature.auto_lr, theta0=theta0, optimum_theta=opt.theta)
    assert not report.diverges and report.top_factor == pytest.approx(0, abs=1e-12)
    text = "\n".join(report.lines())
    assert "converges" in text and "WARNING" not in text
    assert f"left after {report.updates} updates" in text
    momentum = curvature.report(0.01, 0.9)
    assert momentum.top_factor is None and momentum.updates is None
    assert "with momentum 0.9" in "\n".join(momentum.lines())
    assert "diverges" in "\n".join(curvature.report(99.0, 0.9).lines())


@pytest.mark.parametrize("size", [1, 2, 50, 300])
def test_lanczos_finds_the_largest_eigenvalue(size):
    g = torch.Generator().manual_seed(size)
    a = torch.randn(size, size, generator=g).double()
    h = a + a.T  # negative eigenvalues too: the largest is not the largest in size
    value = largest_eigenvalue(lambda v: h @ v, size)
    # The error of the value is at most the residual, 1e-6 of it.
    assert value == pytest.approx(torch.linalg.eigvalsh(h)[-1].item(), rel=1e-6)
    assert value == largest_eigenvalue(lambda v: h @ v, size)


def test_lanczos_on_low_rank_zero_and_bad_products():
    u = torch.ones(20)
    assert largest_eigenvalue(lambda v: u * (u @ v), 20, dtype=torch.float32) == pytest.approx(20)
    assert largest_eigenvalue(lambda v: 0 * v, 20) == 0
    with pytest.raises(ValueError, match="not finite"):
        largest_eigenvalue(lambda v: v * float("nan"), 3)
    with pytest.raises(ValueError, match="max_iterations=2"):
        largest_eigenvalue(lambda v: torch.arange(50).double() * v, 50, max_iterations=2)


@pytest.mark.parametrize(
    ("hessian", "words"),
    [
        (torch.ones(2, 3), r"\[2, 3\]"),
        (torch.tensor([[1.0, 2], [0, 1]]), "symmetric"),
        (torch.tensor([[1.0, 0], [0, -1]]), "none below 0"),
        (torch.zeros(2, 2), "at least one above"),
        (torch.tensor([[float("nan")]]), "finite"),
    ],
)
def test_bad_hessians_are_refused(hessian, words):
    with pytest.raises(ValueError, match=words):
        Curvature(hessian)


def test_bad_settings_are_refused():
    curvature = Curvature(torch.eye(2))
    zero = torch.zeros(2)
    for call, words in [
        (lambda: curvature.factor(-0.1), "lr=-0.1"),
        (lambda: curvature.factor(float("nan")), "lr=nan"),
        (lambda: curvature.max_lr(1.0), "momentum=1.0"),
        (lambda: curvature.updates_to(zero, zero, 0.1, fraction=2), "fraction=2"),
        (lambda: curvature.predict(torch.zeros(3), zero, 0.0, 0.1), r"theta0 \[3\]"),
        (lambda: losses_along(Moments.zero(2), zero), r"\[K, 2\] or \[K, 3\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
