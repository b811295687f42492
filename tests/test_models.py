"""Every model in `lightning_gd/models`: its formulas, start values, names and metrics."""

import math
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Rows, find_models, normal, run

import lightning_gd
from lightning_gd import (
    GradientDescentModule,
    LinearRegression,
    LogisticParity,
    ParityMLP,
    ParityRegressor,
    RidgeRegression,
    check_gradients,
    models,
)


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


def each_choice(model_class):
    """Settings that differ from the defaults in one choice."""
    return [{}, *({n: v} for n, values in own_choices(model_class).items() for v in values)]


def rebuild(model, **changes):
    return type(model)(**{**model.hparams, **changes}).double()


def is_class(y):
    return bool((y.abs() == 1).all())


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_the_loss_is_a_mean(model_class):
    """`test_testing.py` asks for its gradient, `test_fuzz.py` for random sizes and settings."""
    example, x, y = model_class.example_batch()
    assert type(example) is model_class, f"{model_class.__name__} needs its own example_batch"
    assert model_class.__name__ in dir(lightning_gd)  # exported because it is there
    x, y = x.double(), y.double()
    for choices in each_choice(model_class):
        model = rebuild(example, **choices)
        loss, twice = model.loss(x, y), model.loss(torch.cat([x, x]), torch.cat([y, y]))
        assert twice.item() == pytest.approx(loss.item(), rel=1e-14)


# Metrics


def test_metrics_are_those_of_numpy(model_class, make_trainer, monkeypatch):
    monkeypatch.setattr("lightning_gd.data.tensors.EVALUATION_ROWS", 7)  # several, uneven batches
    example, x, y = model_class.example_batch()
    model, x, targets = rebuild(example), normal(40, *x.shape[1:]), normal(40, seed=1) + 0.3
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
    assert found.pop("step") == 0  # the x axis of the logger
    for tag, value in found.items():
        name = tag.removeprefix("test/")
        counted = name not in ("loss", "mse")  # torchmetrics divides counts in float32
        assert value == pytest.approx(expected[name], rel=1e-6 if counted else 1e-12)


def test_the_mean_squared_error_has_its_own_name_where_it_is_not_the_loss():
    other = [RidgeRegression(), LogisticParity(), ParityMLP(4, 2, loss="logistic")]
    for model in [*other, LinearRegression(), ParityMLP(4, 2)]:
        name = "mse" if model in other else "loss"
        assert [n for n in ("mse", "loss") if n in model.metrics()] == [name]


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
    for start in ("zeros", "uniform", "linear"):
        model = cls(num_features=3, bias=False, start=start)
        assert model.bias.item() == 0 and list(trained(model)) == ["weight"]
        assert list(model.state_dict()) == ["weight", "bias"]


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
    if start == "linear":  # nn.Linear's, for the bias too
        drawn = [LinearRegression(start="linear", start_seed=s).bias.item() for s in range(50)]
        assert 0.8 < max(map(abs, drawn)) <= 1


@pytest.mark.parametrize("activation, gain", [("relu", math.sqrt(2)), ("tanh", 5 / 3)])
def test_the_network_starts_as_it_says(activation, gain):
    model = ParityMLP(num_features=300, hidden=100, activation=activation)
    bound = gain * math.sqrt(3 / 300)  # U(−b, b) has the deviation b/√3 = gain/√D
    assert 0.99 * bound < model.hidden_weight.abs().max() <= bound
    assert 0.9 / math.sqrt(100) < model.weight.abs().max() <= 1 / math.sqrt(100)
    assert not model.hidden_bias.any() and not model.bias.any()
    torch.manual_seed(1)  # of no consequence
    again, other = (ParityMLP(300, 100, activation=activation, start_seed=s) for s in (0, 1))
    for name, value in model.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
        assert "bias" in name or not torch.equal(value, other.get_parameter(name))


def test_names_and_shapes():
    shapes = {"weight": (784,), "bias": ()}
    assert {n: tuple(p.shape) for n, p in ParityRegressor().named_parameters()} == shapes
    hidden = {"hidden_weight": (256, 784), "hidden_bias": (256,), "weight": (256,), "bias": ()}
    assert {n: tuple(p.shape) for n, p in ParityMLP().named_parameters()} == hidden


# What only some models promise

LOSSES = {  # of scores s and targets y
    "squared": lambda s, y: (s - y).square().mean(),
    "logistic": lambda s, y: (-y * s).exp().log1p().mean(),
}


@pytest.mark.parametrize("cls", [*STARTS, LogisticParity])
def test_scores_and_losses_of_the_linear_models(cls):
    example, x, y = cls.example_batch()
    model, x, y = rebuild(example, start="linear"), x.double(), y.double()
    scores = x @ model.weight + model.bias
    expected = LOSSES["logistic" if cls is LogisticParity else "squared"](scores, y)
    if cls is RidgeRegression:
        expected = expected + model.hparams["alpha"] * model.weight.square().sum()
        assert model.hparams["alpha"] > 0
    torch.testing.assert_close(model(x), scores)
    torch.testing.assert_close(model.loss(x, y), expected)


@pytest.mark.parametrize("score", [-1e300, -1e5, -800, -40, -1, 0, 1, 19, 21, 36, 40, 700])
def test_the_logistic_loss_is_exact_at_every_score(score):
    """−log σ(t) = max(−t, 0) + log1p(exp(−|t|)), and its slope −σ(−t), by `math`."""
    model = LogisticParity(num_features=1, weight=[1.0]).double()
    x, y = torch.tensor([[score]], dtype=torch.float64), torch.ones(1).double()
    small = math.exp(-abs(score))
    exact = max(-score, 0) + math.log1p(small)
    slope = -1 / (1 + small) if score < 0 else -small / (1 + small)
    # rtol: a few eps, and the error of exp grows with |t| eps; nothing is rounded to 0 or 1.
    assert model.loss(x, y).item() == pytest.approx(exact, rel=1e-12, abs=0)
    assert model.gradients(x, y)["bias"].item() == pytest.approx(slope, rel=1e-12, abs=0)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_network_and_its_loss(activation, loss):
    model, x, y = ParityMLP.example_batch(activation=activation, loss=loss)
    hidden = getattr(torch, activation)(x @ model.hidden_weight.T + model.hidden_bias)
    scores = hidden @ model.weight + model.bias
    torch.testing.assert_close(model(x), scores)
    torch.testing.assert_close(model.loss(x, y), LOSSES[loss](scores, y))


def test_the_network_stands_extreme_scores_and_does_not_learn_from_zeros():
    model, x, y = ParityMLP.example_batch(loss="logistic")
    with torch.no_grad():
        model.weight.mul_(1e6)
    wrong = (-y * model(x)).clamp(min=0)
    assert wrong.max() > 1e5
    torch.testing.assert_close(model.loss(x, y), wrong.mean())  # log(1 + eᵗ) → max(t, 0)
    assert all(g.isfinite().all() for g in model.gradients(x, y).values())
    model, x, y = ParityMLP.example_batch()
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert {name for name, g in model.gradients(x, y + 1).items() if g.any()} == {"bias"}


# A model is one file

LATER = """
from lightning_gd.models.linear import LinearRegression

class Later(LinearRegression):
    def gradients(self, x, y):
        r = self(x) - y
        return {"weight": 2 * r @ x / len(r), "bias": FACTOR * r.mean()}
"""
LINE = "--data PointsData --trainer.max_steps 3 --trainer.enable_progress_bar false".split()


@pytest.mark.parametrize("factor", [2, 1])
def test_a_model_is_one_file(tmp_path, monkeypatch, factor):
    """One more file in `models` is a name of the package, found, checked and trained."""
    package, folder = Path(lightning_gd.__file__).parent, tmp_path / "lightning_gd"
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(lightning_gd, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(lightning_gd, "names", lightning_gd.names.__wrapped__)  # not cached
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder / "models")])
    name, file = f"Later{factor}", f"later{factor}.py"
    text = LATER.replace("Later", name).replace("FACTOR", str(factor))
    (folder / "models" / file).write_text(text)
    later = getattr(lightning_gd, name)
    assert later in find_models() and name in dir(lightning_gd)
    report = check_gradients(*later.example_batch())
    assert [p.name for p in report.parameters if p.diagnosis] == ([] if factor == 2 else ["bias"])
    (tmp_path / file).write_text(text)  # a file of the user's, in the working directory
    monkeypatch.chdir(tmp_path)
    right, wrong = f"lightning_gd.{name}", f"later{factor}.{name}"
    status, out, err = run("--model", right if factor == 2 else wrong, *LINE)
    assert (status, "test/loss" in out) == ((0, True) if factor == 2 else (2, False)), err
    assert factor == 2 or "bias: WRONG" in err
