"""Right formulas pass, and each usual mistake is found and called by its name."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gd.gradcheck import GradientError, check_gradients, check_reduced


class Linear(nn.Module):
    """Mean squared error with a ridge term; `spoil` plants a mistake in the gradients."""

    def __init__(self, features=3, ridge=0.0, spoil=None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(features, generator=generator))
        self.bias = nn.Parameter(torch.tensor(0.3))
        self.ridge, self.spoil, self.kept = ridge, spoil, {}

    def forward(self, x):
        return x @ self.weight + self.bias

    def loss(self, x, y):
        return (self(x) - y).square().mean() + self.ridge * self.weight.square().sum()

    def gradients(self, x, y):
        r = self(x) - y
        weight = 2 * r @ x / len(r) + 2 * self.ridge * self.weight
        right = {"weight": weight, "bias": 2 * r.mean()}
        return self.spoil(self, right, x, r) if self.spoil else right


class Network(nn.Module):
    """Two layers, ŷ = φ(xAᵀ + a)·b, with φ tanh or relu, and a squared or Huber loss."""

    def __init__(self, phi="tanh", huber=False, spoil=None):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.inner = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.shift = nn.Parameter(torch.randn(4, generator=generator))
        self.outer = nn.Parameter(torch.randn(4, generator=generator))
        self.phi, self.huber, self.spoil = phi, huber, spoil

    def hidden(self, x):
        return getattr(torch, self.phi)(x @ self.inner.T + self.shift)

    def forward(self, x):
        return self.hidden(x) @ self.outer

    def loss(self, x, y):
        r = self(x) - y
        return nn.functional.huber_loss(self(x), y) if self.huber else r.square().mean()

    def gradients(self, x, y):
        h, r = self.hidden(x), self(x) - y
        d = (r.clamp(-1, 1) if self.huber else 2 * r) / len(r)
        slope = 1 - h.square() if self.phi == "tanh" else (h > 0).to(h)
        back = d[:, None] * self.outer * slope
        right = {"inner": back.T @ x, "shift": back.sum(0), "outer": d @ h}
        return self.spoil(right) if self.spoil else right


def batch(rows, features=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=dtype)
    return x, torch.randn(rows, generator=generator, dtype=dtype)


def times(law):
    return lambda m, right, x, r: {name: g * law(len(x)) for name, g in right.items()}


def weight(change):
    """A mistake in the weight alone; `change` sees (model, right gradient, x, residual)."""
    return lambda m, right, x, r: right | {"weight": change(m, right["weight"], x, r)}


def stale(m, right, x, r):
    for name, g in right.items():
        m.kept[name] = m.kept.get(name, 0) + g
    return m.kept


RIGHT = {
    "linear": Linear(),
    "ridge": Linear(ridge=0.1),
    "tanh": Network("tanh"),
    "relu": Network("relu"),
    "huber": Network("tanh", huber=True),
    "relu-huber": Network("relu", huber=True),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_right_models_pass(name, rows):
    report = check_gradients(RIGHT[name], *batch(rows))
    report.raise_if_wrong()
    assert len(report.lines()) == len(report.parameters)


# Magnitudes up to 1e3 beside 1e-3, so that sums cancel; the bound has to follow by itself.
@given(
    name=st.sampled_from(sorted(RIGHT)),
    rows=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
@settings(max_examples=60, deadline=None)
def test_right_models_pass_on_any_rows(name, rows, seed, size):
    x, y = batch(rows, seed=seed, dtype=torch.float64)
    check_gradients(RIGHT[name], size * x, y).raise_if_wrong()


def test_passes_at_the_optimum_where_the_gradient_is_only_rounding():
    x, _ = batch(500, dtype=torch.float64)
    model = Linear().double()
    check_gradients(model, x, model(x).detach()).raise_if_wrong()


@pytest.mark.parametrize("phi", ["relu", "tanh"])
def test_passes_at_a_kink(phi):
    model = Network(phi, huber=True)
    for p in model.parameters():
        nn.init.zeros_(p)  # relu at 0 in every row
    check_gradients(model, *batch(5)).raise_if_wrong()


def test_passes_with_many_features():
    check_gradients(Linear(300, ridge=0.1), *batch(20, 300)).raise_if_wrong()


MISTAKES = {
    "sum": (Linear(spoil=times(lambda n: n)), "sum over the rows instead of the mean"),
    "1/N": (Linear(spoil=times(lambda n: 1 / n)), "divided by the number of rows twice"),
    "twice": (Linear(spoil=times(lambda n: 2)), "a factor 2 too much"),
    "half": (Linear(spoil=times(lambda n: 0.5)), "a factor 2 is missing"),
    "sign": (Linear(spoil=times(lambda n: -1)), "the sign is wrong"),
    "minus the sum": (Linear(spoil=times(lambda n: -n)), "instead of the mean.* and the sign"),
    "zero": (Linear(spoil=times(lambda n: 0)), "it is zero"),
    "odd factor": (Linear(spoil=times(lambda n: 3)), "a factor 3"),
    "[1, D]": (Linear(spoil=weight(lambda m, g, x, r: g[None])), r"shape \[1, 3\] .*numbers are"),
    "per row": (
        Linear(spoil=weight(lambda m, g, x, r: 2 * r[:, None] * x)),
        "mean over the rows is missing|numbers are right",  # one row is its own mean
    ),
    "wrong dimension": (
        Linear(5, spoil=weight(lambda m, g, x, r: (r[:, None] * x).mean(1))),
        "reduced along the wrong dimension",
    ),
    "transposed": (Network(spoil=lambda g: g | {"inner": g["inner"].T}), "transposed"),
    "missing": (Linear(spoil=lambda m, g, x, r: {"bias": g["bias"]}), "missing: .*'bias'"),
    "unknown": (Linear(spoil=lambda m, g, x, r: g | {"slope": g["bias"]}), "unknown name"),
    "no ridge": (
        Linear(ridge=0.1, spoil=weight(lambda m, g, x, r: 2 * r @ x / len(r))),
        r"parameters alone .*missing.*-0\.2 \* parameter",
    ),
    "ridge twice": (
        Linear(ridge=0.1, spoil=weight(lambda m, g, x, r: g + 0.2 * m.weight)),
        r"parameters alone .*extra.* 0\.2 \* parameter",
    ),
    "ridge / N": (
        Linear(ridge=0.1, spoil=weight(lambda m, g, x, r: (2 * r @ x + 0.2 * m.weight) / len(r))),
        "parameters alone .*divided by",
    ),
    "sum beside ridge": (
        Linear(ridge=0.1, spoil=weight(lambda m, g, x, r: 2 * r @ x + 0.2 * m.weight)),
        "rows are summed|sum instead of a mean",
    ),
    "twice beside ridge": (
        Linear(ridge=0.1, spoil=weight(lambda m, g, x, r: 4 * r @ x / len(r) + 0.2 * m.weight)),
        "the term of the rows: a factor 2 too much",
    ),
    "stale": (Linear(spoil=stale), "stale sum"),
    "nan": (Linear(spoil=weight(lambda m, g, x, r: g / 0)), "3 entries are not finite"),
    "raises": (Linear(spoil=weight(lambda m, g, x, r: x @ r[:, None, None, None])), "raised Runt"),
    "no dict": (Linear(spoil=lambda m, g, x, r: (1, 2)), "a tuple instead of a dict"),
    "no tensor": (Linear(spoil=weight(lambda m, g, x, r: 0.5)), "a float where a tensor"),
    "float32": (Linear(spoil=weight(lambda m, g, x, r: g.float())), "float32 where"),
    "graph": (Linear(spoil=weight(lambda m, g, x, r: m.weight)), "on the graph: detach"),
    "swapped": (
        Network(spoil=lambda g: g | {"outer": g["shift"], "shift": g["outer"]}),
        "the gradient of 'outer'",
    ),
    "one entry": (
        Linear(spoil=weight(lambda m, g, x, r: g + torch.eye(3)[1].to(g) * r.square().sum())),
        r"worst entry \[1\]",
    ),
}


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, rows):
    model, words = MISTAKES[name]
    report = check_gradients(model, *batch(rows, features=model_features(model)))
    assert not report.ok
    with pytest.raises(GradientError, match=f"(?s){words}"):
        report.raise_if_wrong()


def model_features(model):
    return len(model.weight) if isinstance(model, Linear) else 3


def test_divided_by_n_minus_1():
    report = check_gradients(Linear(spoil=times(lambda n: n / (n - 1))), *batch(7))
    assert "divided by N - 1" in report.lines()[-1]


def test_a_shared_mistake_is_said_once():
    lines = check_gradients(Linear(spoil=times(lambda n: n)), *batch(7)).lines()
    assert len(lines) == 3
    assert lines[-1].startswith("weight, bias: 7 times")


class Cut(Linear):
    def loss(self, x, y):
        return (self(x) - y).square().mean() + self.weight.detach().square().sum()


def test_a_loss_cut_off_the_graph_is_noticed():
    right = weight(lambda m, g, x, r: g + 2 * m.weight)
    assert "explicit is right" in check_gradients(Cut(spoil=right), *batch(7)).lines()[-1]
    assert "leaves out the same" in check_gradients(Cut(), *batch(7)).lines()[-1]


def test_another_formula_is_checked_in_place_of_gradients():
    double = times(lambda n: 2)
    x, y = batch(7)
    wrong = check_gradients(
        Linear(), x, y, gradients=lambda m, x, y: double(m, m.gradients(x, y), x, y)
    )
    assert not wrong.ok
    assert check_gradients(Linear(spoil=double), x, y, tolerance=1e6).parameters[0].error > 0


def test_a_frozen_parameter_may_be_left_out():
    model = Linear(spoil=lambda m, g, x, r: {"bias": g["bias"]})
    model.weight.requires_grad_(False)
    assert [p.name for p in check_gradients(model, *batch(7)).parameters] == ["bias"]


class Dropping(Linear):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training) @ self.weight + self.bias

    def gradients(self, x, y):
        x = nn.functional.dropout(x, 0.5, self.training)
        r = x @ self.weight + self.bias - y
        return {"weight": 2 * r @ x / len(r), "bias": 2 * r.mean()}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_as_it_was(context):
    model = Dropping().eval().train()
    x, y = batch(7)
    model.loss(x, y).backward()
    assert model.weight.grad is not None
    before = copy.deepcopy(model.state_dict()), model.weight.grad.clone(), torch.get_rng_state()
    with context():
        check_gradients(model, x, y).raise_if_wrong()
    assert model.training and model.weight.dtype == torch.float32
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert torch.equal(model.weight.grad, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_float32_models_are_checked_in_float64():
    assert max(p.error for p in check_gradients(Network(), *batch(50)).parameters) < 1e-13


REDUCTIONS = {
    "sum": (lambda g, local: 4 * g, "4 times too large: summed"),
    "divided twice": (lambda g, local: g / 4, "4 times too small"),
    "not reduced": (lambda g, local: local, "the reduction is missing"),
    "mean of means": (lambda g, local: g + local / 3, "no factor fits"),
    "nan": (lambda g, local: g * torch.nan, "no factor fits"),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_named(name):
    spoil, words = REDUCTIONS[name]
    expected, local = {"weight": torch.randn(5)}, {"weight": torch.randn(5)}
    assert check_reduced(expected, expected, 4, torch.float32, 100).ok
    actual = {"weight": spoil(expected["weight"], local["weight"])}
    report = check_reduced(expected, actual, 4, torch.float32, 100, local=local)
    assert not report.ok and words in report.lines()[-1]


def test_a_reduction_in_float32_is_right_up_to_rounding():
    x, y = batch(40_000, 20, dtype=torch.float64)
    model = Linear(20).double()
    expected = model.gradients(x, y)
    actual = Linear(20).gradients(x.float(), y.float())
    assert check_reduced(expected, actual, 4, torch.float32, len(x)).ok
    assert not check_reduced(expected, {"weight": actual["weight"]}, 4, torch.float32, 1).ok
