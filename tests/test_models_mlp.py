"""The hidden layer: its backward pass, update by update, by hand and at extreme scores."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_gd import ParityMLP, TensorDataModule
from lightning_gd.data.tensors import Table
from lightning_gd.gradcheck import check_gradients

KINDS = [(a, loss) for a in ("relu", "tanh") for loss in ("squared", "logistic")]
kinds = pytest.mark.parametrize("activation, loss", KINDS)


def example(activation, loss):
    model, x, y = ParityMLP.example_batch(activation=activation, loss=loss)
    return model.double(), x.double(), y.double()


@kinds
def test_the_formulas_equal_autograd_and_central_differences(activation, loss):
    model, x, y = example(activation, loss)
    check_gradients(model, x, y).raise_if_wrong()
    truth = torch.autograd.grad(model.loss(x, y), list(model.parameters()))
    gradients = model.gradients(x, y)
    assert list(gradients) == [name for name, _ in model.named_parameters()]
    for gradient, right in zip(gradients.values(), truth, strict=True):
        # Sums of 6 terms of order 1 in float64 agree to a few eps.
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-14)


def test_the_example_keeps_away_from_the_kink():
    model, x, _ = ParityMLP.example_batch()
    z = x @ model.hidden_weight.T + model.hidden_bias
    assert z.abs().min() > 0.05
    assert 0.2 < (z > 0).double().mean() < 0.8  # both sides of it occur


def test_the_loss_and_the_score_of_a_network_worked_out_by_hand():
    model = ParityMLP(num_features=1, hidden=2).double()
    with torch.no_grad():
        model.hidden_weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.hidden_bias.copy_(torch.tensor([0.0, 1.0]))
        model.weight.copy_(torch.tensor([2.0, 3.0]))
        model.bias.fill_(-1.0)
    x, y = torch.tensor([[2.0], [-1.0]]).double(), torch.tensor([1.0, -1.0]).double()
    # h = relu([2, -1]), relu([-1, 2]); ŷ = 2·2 − 1 = 3 and 3·2 − 1 = 5; r = 2 and 6
    assert model(x).tolist() == [3, 5]
    assert model.loss(x, y).item() == (2**2 + 6**2) / 2
    gradients = model.gradients(x, y)  # d = r = (2, 6)
    assert gradients["bias"].item() == 8
    assert gradients["weight"].tolist() == [4, 12]
    assert gradients["hidden_bias"].tolist() == [4, 18]
    assert gradients["hidden_weight"].tolist() == [[8], [-18]]


class Rows(TensorDataModule):
    """Random rows with a parity to learn: the sign of a product."""

    def load(self):
        x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
        return {"train": Table(x.double(), (x[:, 0] * x[:, 1]).sign().double())}


def fit(trainer, **settings):
    """The weights after each update, shape [updates, number of weights]."""
    model, weights = ParityMLP(num_features=5, hidden=8, lr=0.05, momentum=0.9, **settings), []

    def keep(*_):
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))

    hook = register_optimizer_step_post_hook(keep)
    try:
        trainer.fit(model, datamodule=Rows(batch_size=16))
    finally:
        hook.remove()
    return torch.stack(weights)


@kinds
def test_both_roads_make_the_same_updates(activation, loss, make_trainer):
    explicit, autograd = (
        fit(make_trainer(max_steps=60), activation=activation, loss=loss, gradient=road)
        for road in ("explicit", "autograd")
    )
    assert len(explicit) == 60
    assert (explicit[-1] - explicit[0]).abs().max() > 0.1
    # 60 updates of order 0.1, each with rounding errors of order eps
    torch.testing.assert_close(explicit, autograd, rtol=0, atol=1e-12)


def test_the_logistic_loss_stands_extreme_scores():
    model, x, y = example("relu", "logistic")
    with torch.no_grad():
        model.weight.mul_(1e6)
    wrong = (-y * model(x)).clamp(min=0)
    assert wrong.max() > 1e5
    torch.testing.assert_close(model.loss(x, y), wrong.mean())  # log(1 + eᵗ) → max(t, 0)
    assert all(g.isfinite().all() for g in model.gradients(x, y).values())


def test_the_start_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = ParityMLP(num_features=9, hidden=3)
    torch.manual_seed(2)
    again, other = ParityMLP(num_features=9, hidden=3), ParityMLP(9, 3, start_seed=1)
    for name, value in first.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
    assert not torch.equal(first.hidden_weight, other.hidden_weight)
    assert not torch.equal(first.weight, other.weight)


def test_zeros_would_not_learn():
    model, x, y = ParityMLP.example_batch()
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    moving = {name for name, g in model.gradients(x, y + 1).items() if g.any()}
    assert moving == {"bias"}


def test_the_mean_squared_error_has_its_own_name_where_it_is_not_the_loss():
    names = {loss: ParityMLP(4, 2, loss=loss).metrics().keys() for loss in ("squared", "logistic")}
    assert "loss" in names["squared"] and "mse" not in names["squared"]
    assert "mse" in names["logistic"] and "loss" not in names["logistic"]
