"""Every model in `lightning_gd/models`: its formula, start values, names, roads and metrics."""

import math
import typing

import numpy as np
import pytest
import torch
from conftest import find_models
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_gd import (
    GradientDescentModule,
    LinearRegression,
    ParityMLP,
    ParityRegressor,
    RidgeRegression,
    models,
)
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.gradcheck import check_gradients

CASES = settings(max_examples=50, deadline=None)
SIZES = st.sampled_from([1, 7]) | st.integers(1, 40)


def own_choices(model_class):
    """The words and flags among a model's own settings, each with all its values."""
    choices = {}
    for cls in model_class.__mro__[: model_class.__mro__.index(GradientDescentModule)]:
        for name, kind in typing.get_type_hints(cls.__init__).items():
            if typing.get_origin(kind) is typing.Literal:
                choices.setdefault(name, typing.get_args(kind))
            elif kind is bool:
                choices.setdefault(name, (True, False))
    return choices


def rebuild(model, **changes):
    return type(model)(**{**model.hparams, **changes}).double()


@st.composite
def problems(draw, model_class, rows=SIZES):
    """A model in float64 with any of its settings, at its start or elsewhere, and a batch."""
    model, x, y = model_class.example_batch()
    changes = {name: draw(st.sampled_from(v)) for name, v in own_choices(model_class).items()}
    shape = [draw(rows), *x.shape[1:]]
    if "num_features" in model.hparams:
        shape[1] = changes["num_features"] = draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    moved = rebuild(model, **changes)
    if draw(st.booleans()):
        for parameter in trained(moved).values():
            parameter.data += torch.randn(parameter.shape, generator=generator)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return moved, inputs, targets.sign() if is_class(y) else targets


def is_class(y):
    return bool((y.abs() == 1).all())


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def by_autograd(model, x, y):
    wanted = trained(model)
    found = torch.autograd.grad(model.loss(x, y), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def assert_same(found, expected):
    # Sums of at most 40 terms of size 1 to 100 are exact to 1e-13 of their largest term, which
    # may cancel: hence a bound on each entry beside the largest one of all.
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12 * (1 + largest))


@CASES
@given(st.data())
def test_gradients_pass_the_check(model_class, data):
    check_gradients(*data.draw(problems(model_class))).raise_if_wrong()


@CASES
@given(st.data())
def test_gradients_are_those_of_autograd(model_class, data):
    model, x, y = data.draw(problems(model_class))
    with torch.no_grad():
        explicit = model.gradients(x, y)
    assert trained(model).keys() <= explicit.keys() <= dict(model.named_parameters()).keys()
    assert_same(explicit, by_autograd(model, x, y))


@CASES
@given(st.data())
def test_gradients_are_the_slope_of_the_loss(model_class, data):
    model, x, y = data.draw(problems(model_class))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    ways = {n: torch.randn(p.shape, generator=generator).double() for n, p in start.items()}
    length = torch.stack([way.square().sum() for way in ways.values()]).sum().sqrt()

    @torch.no_grad()
    def loss_at(t):
        for name, parameter in trained(model).items():
            parameter.copy_(start[name] + t * ways[name] / length)
        return model.loss(x, y).item()

    h = 1e-6
    before, after, here = loss_at(-h), loss_at(h), loss_at(0)
    gradients = model.gradients(x, y)
    slope = (sum((gradients[n] * ways[n]).sum() for n in ways) / length).item()
    # What a kink of relu adds to the second difference it adds, over 2h, to the error; such
    # places, and no smooth ones, are left out where that is too much. Rounding of the loss, 1e-16
    # of it, is divided by h.
    bend = abs(before - 2 * here + after) / (2 * h)
    assume(bend < 1e-3 * (1 + here))
    assert slope == pytest.approx((after - before) / (2 * h), abs=1e-8 * (1 + here) + bend)


@CASES
@given(st.data())
def test_one_pass_gives_the_loss_and_the_gradients(model_class, data):
    model, x, y = data.draw(problems(model_class))
    loss, gradients = model.loss_and_gradients(x, y)
    assert loss.item() == pytest.approx(model.loss(x, y).item(), rel=1e-13, abs=1e-14)
    assert_same(gradients, model.gradients(x, y))


@CASES
@given(st.data())
def test_loss_and_gradients_are_means_over_rows(model_class, data):
    model, x, y = data.draw(problems(model_class, rows=st.integers(2, 40)))
    cut = data.draw(st.integers(1, len(y) - 1))
    parts = [(x[:cut], y[:cut], cut / len(y)), (x[cut:], y[cut:], 1 - cut / len(y))]
    loss = sum(model.loss(x, y).item() * weight for x, y, weight in parts)
    assert model.loss(x, y).item() == pytest.approx(loss, rel=1e-12)
    shares = [(model.gradients(x, y), weight) for x, y, weight in parts]
    means = {name: sum(g[name] * weight for g, weight in shares) for name in trained(model)}
    assert_same(model.gradients(x, y), means)


def test_the_formula_only_reads(model_class):
    model, x, y = model_class.example_batch()
    before = [t.detach().clone() for t in (*model.parameters(), x, y)]
    with torch.no_grad():
        first, second = model.gradients(x, y), model.gradients(x, y)
    for one, other in zip(before, (*model.parameters(), x, y), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=0)
    for name, parameter in trained(model).items():
        assert parameter.grad is None and first[name].shape == parameter.shape
        assert first[name].dtype == parameter.dtype
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


LATER = """
from lightning_gd import LinearRegression

class Later(LinearRegression):
    def gradients(self, x, y):
        r = self(x) - y
        return {"weight": 2 * r @ x / len(r), "bias": FACTOR * r.mean()}
"""


@pytest.mark.parametrize("factor", [2, 1])
def test_a_new_file_is_found_and_a_wrong_factor_noticed(tmp_path, monkeypatch, factor):
    known = find_models()
    name = f"later_{factor}"
    (tmp_path / f"{name}.py").write_text(LATER.replace("FACTOR", str(factor)))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    (later,) = [model for model in find_models() if model not in known]
    model, x, y = LinearRegression.example_batch()
    report = check_gradients(rebuild_as(later, model), x, y)
    assert report.ok == (factor == 2)
    assert [p.name for p in report.parameters if not p.ok] == ([] if factor == 2 else ["bias"])


def rebuild_as(cls, model):
    other = cls(**model.hparams)
    other.load_state_dict(model.state_dict())
    return other


# Start values

STARTS = [LinearRegression, RidgeRegression, ParityRegressor]


@pytest.mark.parametrize("cls", STARTS)
def test_starts(cls):
    zeros = cls(num_features=900)
    assert not zeros.weight.any() and not zeros.bias.any()
    uniform = cls(num_features=900, start="uniform")
    assert uniform.weight.min() >= 0 and uniform.weight.max() < 1 and uniform.bias == 0
    given = cls(num_features=2, start="uniform", weight=[3, -0.5], intercept=7)
    assert given.weight.tolist() == [3, -0.5] and given.bias.item() == 7
    assert given.weight.dtype == given.bias.dtype == torch.float32
    again, other = (cls(num_features=900, start="uniform", start_seed=s) for s in (0, 1))
    assert torch.equal(uniform.weight, again.weight)
    assert not torch.equal(uniform.weight, other.weight)


@pytest.mark.parametrize("start", ["uniform", "linear"])
def test_random_starts_have_the_named_distribution(start):
    count = 20_000
    weight = LinearRegression(num_features=count, start=start).weight.detach()
    low, high = (0, 1) if start == "uniform" else (-1 / math.sqrt(count), 1 / math.sqrt(count))
    places = ((weight - low) / (high - low)).sort().values.double()
    assert places.min() >= 0 and places.max() <= 1
    # Kolmogorov and Smirnov: the distance from uniform exceeds 1.95/√n once in 1,000 seeds.
    steps = torch.arange(1, count + 1).double() / count
    assert (places - steps).abs().max() < 1.95 / math.sqrt(count)
    if start == "linear":  # the same bound as nn.Linear's, for the bias too
        drawn = [LinearRegression(start="linear", start_seed=s).bias.item() for s in range(50)]
        reference = torch.nn.Linear(count, 1).weight.detach()
        assert reference.abs().max() <= high and 0.8 < max(map(abs, drawn)) <= 1


@pytest.mark.parametrize("activation, gain", [("relu", math.sqrt(2)), ("tanh", 5 / 3)])
def test_the_network_starts_as_it_says(activation, gain):
    model = ParityMLP(num_features=300, hidden=100, activation=activation)
    bound = gain * math.sqrt(3 / 300)  # U(−b, b) has the deviation b/√3 = gain/√D
    assert 0.99 * bound < model.hidden_weight.abs().max() <= bound
    assert 0.9 / math.sqrt(100) < model.weight.abs().max() <= 1 / math.sqrt(100)
    assert not model.hidden_bias.any() and not model.bias.any()


def test_defaults_and_names():
    shapes = {"weight": (784,), "bias": ()}
    assert {n: tuple(p.shape) for n, p in ParityRegressor().named_parameters()} == shapes
    hidden = {"hidden_weight": (256, 784), "hidden_bias": (256,), "weight": (256,), "bias": ()}
    assert {n: tuple(p.shape) for n, p in ParityMLP().named_parameters()} == hidden


@pytest.mark.parametrize("cls", STARTS)
@pytest.mark.parametrize("start", ["zeros", "uniform", "linear"])
def test_without_bias_it_stays_zero_and_is_not_trained(cls, start):
    model = cls(num_features=3, bias=False, start=start)
    assert model.bias.item() == 0 and not model.bias.requires_grad
    assert list(trained(model)) == ["weight"] and list(model.state_dict()) == ["weight", "bias"]


WRONG = {
    "no features": (LinearRegression, {"num_features": 0}, "num_features=0"),
    "a half feature": (ParityRegressor, {"num_features": 1.5}, "num_features=1.5"),
    "too few weights": (LinearRegression, {"num_features": 3, "weight": [1.0]}, "3 numbers"),
    "intercept": (LinearRegression, {"bias": False, "intercept": 1.0}, "needs bias=True"),
    "start": (RidgeRegression, {"start": "ones"}, "'zeros', 'uniform', 'linear'"),
    "seed": (LinearRegression, {"start_seed": -1}, "start_seed=-1"),
    "alpha": (RidgeRegression, {"alpha": -0.1}, "alpha=-0.1"),
    "activation": (ParityMLP, {"activation": "gelu"}, "'relu', 'tanh'"),
    "loss": (ParityMLP, {"loss": "hinge"}, "'squared', 'logistic'"),
    "hidden": (ParityMLP, {"hidden": 0}, "hidden=0"),
    "lr": (LinearRegression, {"lr": math.nan}, "lr=nan"),
    "unknown": (LinearRegression, {"learning_rate": 1}, "learning_rate"),
}


@pytest.mark.parametrize("cls, settings, words", WRONG.values(), ids=WRONG)
def test_wrong_settings_are_named(cls, settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        cls(**settings)


# Roads and metrics


class Rows(TensorDataModule):
    """The batch of a model's example, to train and to test on."""

    def __init__(self, x, y, **settings):
        super().__init__(**settings)
        self.rows = Table(x.double(), y.double())

    def load(self):
        return {"train": self.rows, "test": self.rows}


def test_roads_agree_and_share_their_state(model_class, make_trainer):
    example, x, y = model_class.example_batch()
    ends = []
    for gradient in ("explicit", "autograd"):
        trainer, model = make_trainer(max_steps=9), rebuild(example, gradient=gradient, lr=0.05)
        model.hparams.update(momentum=0.9, gradient_clip_val=0.5)
        trainer.fit(model, datamodule=Rows(x, y, batch_size=4))
        assert trainer.global_step == 9
        ends.append(model)
    states = [model.state_dict() for model in ends]
    assert list(states[0]) == list(states[1])
    assert any(not torch.equal(states[0][n], example.state_dict()[n].double()) for n in states[0])
    for name in states[0]:  # nine updates of size 0.1, each exact to some eps of its terms
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-13)
    ends[1].load_state_dict(states[0])
    torch.testing.assert_close(ends[1](x.double()), ends[0](x.double()), rtol=0, atol=0)


def test_metrics_are_those_of_numpy(model_class, make_trainer, monkeypatch):
    monkeypatch.setattr("lightning_gd.data.tensors.EVALUATION_ROWS", 7)  # several, uneven batches
    example, x, y = model_class.example_batch()
    model = rebuild(example)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, *x.shape[1:], generator=generator, dtype=torch.float64)
    targets = torch.randn(40, generator=generator, dtype=torch.float64) + 0.3
    targets = targets.sign() if is_class(y) else targets
    (found,) = make_trainer().test(model, datamodule=Rows(x, targets), verbose=False)
    scores, y = model(x).detach().numpy(), targets.numpy()
    odd, called = y > 0, scores > 0
    expected = {
        "loss": model.loss(x, targets).item(),
        "mse": np.mean((scores - y) ** 2),
        "accuracy": np.mean(odd == called),
        "precision": np.sum(odd & called) / np.sum(called),
        "recall": np.sum(odd & called) / np.sum(odd),
        "majority_accuracy": max(odd.mean(), 1 - odd.mean()),
    }
    assert "test/loss" in found and ("test/accuracy" in found) == is_class(targets)
    for tag, value in found.items():
        name = tag.removeprefix("test/")
        counted = name not in ("loss", "mse")  # torchmetrics divides counts in float32
        assert value == pytest.approx(expected[name], rel=1e-6 if counted else 1e-12)
