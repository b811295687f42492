"""Right formulas pass, each usual mistake is found and named, and the run does not notice."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from any_modules import Doubled
from hypothesis import given, settings
from hypothesis import strategies as st
from test_modes import RandomRows, Rows, line
from torch import nn
from torch.nn import functional

from lightning_gd import GradientDescentModule, LinearRegression, PointsData
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.gradcheck import GradientError, check_gradients
from lightning_gd.gradcheck.diagnosis import name_reduction


class Linear(GradientDescentModule):
    """Squared or Huber loss with a ridge term; `spoil` plants a mistake in the gradients.

    `spoil(model, right gradients, x, derivative of each row's loss)` returns wrong ones.
    """

    def __init__(self, spoil=None, features=3, ridge=0.0, huber=False, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(features, generator=generator))
        self.bias = nn.Parameter(torch.tensor(0.3))
        self.ridge, self.huber, self.kept = ridge, huber, {}
        self.drop, self.spoil = nn.Dropout(dropout), spoil or (lambda m, right, x, s: right)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.drop(x) @ self.weight + self.bias

    def loss(self, x, y):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.calls += 1
        mean = functional.huber_loss if self.huber else functional.mse_loss
        return mean(self(x), y) + self.ridge * self.weight.square().sum()

    def gradients(self, x, y):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.calls += 1
        x = self.drop(x)
        r = x @ self.weight + self.bias - y
        slope = r.clamp(-1, 1) if self.huber else 2 * r
        weight = slope @ x / len(x) + 2 * self.ridge * self.weight
        return self.spoil(self, {"weight": weight, "bias": slope.mean()}, x, slope)


class Network(nn.Module):
    """Two layers, ŷ = φ(xAᵀ + a)·b, with φ tanh or relu, and a squared or Huber loss."""

    def __init__(self, phi="tanh", huber=False):
        super().__init__()
        torch.manual_seed(2)
        self.inner, self.outer = nn.Linear(3, 4), nn.Parameter(torch.randn(4))
        self.phi, self.huber = getattr(torch, phi), huber

    def loss(self, x, y):
        loss = functional.huber_loss if self.huber else functional.mse_loss
        return loss(self.phi(self.inner(x)) @ self.outer, y)

    def gradients(self, x, y):
        h = self.phi(self.inner(x))
        r = h @ self.outer - y
        d = (r.clamp(-1, 1) if self.huber else 2 * r) / len(r)
        back = d[:, None] * self.outer * (1 - h**2 if self.phi is torch.tanh else (h > 0).to(h))
        return {"inner.weight": back.T @ x, "inner.bias": back.sum(0), "outer": d @ h}


class Softmax(nn.Module):
    """Class numbers in a dict: -log softmax(x W)[y]; `change` spoils the gradient."""

    def __init__(self, change=lambda g: g):
        super().__init__()
        self.table, self.change = nn.Parameter(torch.zeros(3, 3)), change

    def loss(self, *, x, y):
        return functional.cross_entropy(x @ self.table, y)

    def gradients(self, *, x, y):
        p = (x @ self.table).softmax(1) - functional.one_hot(y, 3)
        return {"table": self.change(x.T @ p / len(y))}


class Scalars(nn.Module):
    """A tensor [N, 2] alone, 0-d parameters, one of which is not used, and kinks everywhere."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(()))

    def loss(self, y):
        return (self.scale * y - self.shift).abs().mean()

    def gradients(self, y):
        sign = (self.scale * y - self.shift).sign()
        return {"shift": -sign.mean(), "scale": (sign * y).mean(), "unused": torch.zeros(())}


def batch(rows, features=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=dtype)
    return x, torch.randn(rows, generator=generator, dtype=dtype)


def labels(rows):
    """Labels that alternate: at zeros the gradient of the bias is exactly 0, and |r| 1."""
    return batch(rows)[0], 1 - 2.0 * (torch.arange(rows) % 2)


def classes(rows):
    return ({"x": batch(rows)[0], "y": torch.arange(rows) % 3},)


def at_zero(model):
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


RIGHT = {
    "ridge": (Linear(ridge=0.1), batch),
    "tanh": (Network("tanh"), batch),
    "relu": (Network("relu"), batch),
    "huber": (Network("tanh", huber=True), batch),
    "relu-huber": (Network("relu", huber=True), batch),
    "dropout": (Linear(dropout=0.5), batch),
    "dict": (Softmax(), classes),
    "tensor": (Scalars(), lambda n: (batch(n, 2)[0],)),
    "at the kink of huber": (at_zero(Linear(huber=True)), labels),
    "at the kink of relu": (at_zero(Network("relu", huber=True)), labels),
    "300 features": (Linear(features=300, ridge=0.1), lambda n: batch(n, 300)),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_right_models_pass(name, rows):
    model, rows_of = RIGHT[name]
    report = check_gradients(model, *rows_of(rows))
    report.raise_if_wrong()
    assert len(report.lines()) == len(report.parameters)
    untested = [p.name for p in report.parameters if not p.tested]
    assert rows < 7 or untested == ["unused"] * (name == "tensor")


# Magnitudes up to 1e3 beside 1e-3, so that sums cancel; the bound has to follow by itself.
@given(
    name=st.sampled_from(["ridge", "tanh", "relu", "huber", "relu-huber", "dropout"]),
    rows=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
@settings(max_examples=60, deadline=None)
def test_right_models_pass_on_any_rows(name, rows, seed, size):
    x, y = batch(rows, seed=seed, dtype=torch.float64)
    check_gradients(RIGHT[name][0], size * x, y, seed=seed).raise_if_wrong()


def times(law):
    return lambda m, right, x, s: {name: g * law(len(x)) for name, g in right.items()}


def weight(change):
    return lambda m, right, x, s: right | {"weight": change(m, right["weight"], x, s)}


def bias(change):
    return lambda m, right, x, s: right | {"bias": change(s)}


def stale(m, right, x, slope):
    for name, g in right.items():
        m.kept[name] = m.kept.get(name, 0) + g
    return m.kept


def beyond(m, right, x, slope):
    wrong = torch.where(slope.abs() == 1, 2 * slope, slope)  # where |r| > 1
    return {"weight": wrong @ x / len(x), "bias": wrong.mean()}


MISTAKES = {
    "sum": (times(lambda n: n), r"the sum over the rows instead of the mean \(N = 8\)"),
    "twice": (times(lambda n: 2), "weight, bias: 2 times the gradient of loss, a factor 2 too"),
    "half": (times(lambda n: 0.5), "a factor 2 is missing"),
    "sign": (times(lambda n: -1), "the sign is wrong"),
    "minus twice the sum": (times(lambda n: -2 * n), "instead of the mean.*too much, the sign"),
    "zero": (times(lambda n: 0), "it is zero"),
    "odd factor": (times(lambda n: 3), "a factor 3"),
    "[1, D]": (weight(lambda m, g, x, s: g[None]), r"shape \[1, 3\] where \[3\] is wanted"),
    "per row": (weight(lambda m, g, x, s: s[:, None] * x), r"shape \[8, 3\]"),
    "missing": (lambda m, g, x, s: {"bias": g["bias"]}, "missing: .*'bias'"),
    "unknown": (lambda m, g, x, s: g | {"slope": g["bias"]}, "unknown name: .*'weight', 'bias'"),
    "one entry": (weight(lambda m, g, x, s: g + torch.eye(3)[1].to(g)), r"worst entry \[1\] is"),
    "stale": (stale, "stale: a second call"),
    "constant": (weight(lambda m, g, x, s: x.sum(0)), "stale: the same at other weights"),
    "nan": (weight(lambda m, g, x, s: g / 0), "explicit (inf|-inf|nan), autograd"),
    "raises": (weight(lambda m, g, x, s: x @ s[:, None, None, None]), "gradients raised Runt"),
    "no dict": (lambda m, g, x, s: (1, 2), "gradients raised Type.*tuple, not a dict"),
    "no tensor": (weight(lambda m, g, x, s: 0.5), "gradients raised Attr.*float"),
    "bias doubled": (bias(lambda s: 2 * s.mean()), "bias: 2 times"),
    "bias negated": (bias(lambda s: -s.mean()), "bias: -1 times"),
    "bias zeroed": (bias(lambda s: 0 * s.mean()), "bias: it is zero"),
    "bias summed": (bias(lambda s: s.sum()), r"bias: 8 times .*\(N = 8\)"),
    "last row": (bias(lambda s: s[:-1].sum() / len(s)), "bias: no usual mistake"),
    "a weight's sign": (weight(lambda m, g, x, s: g * (1 - 2 * torch.eye(3)[1])), r"entry \[1\]"),
    "beyond the kink": (beyond, "weight.*: no usual mistake"),
}


@pytest.mark.parametrize("start", ["zeros", "random"])  # at zeros any multiple of 0 is right
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, start):
    spoil, words = MISTAKES[name]
    model = Linear(spoil, huber=True)
    report = check_gradients(at_zero(model) if start == "zeros" else model, *labels(8))
    assert not report.ok
    with pytest.raises(GradientError, match=f"(?s){words}"):
        report.raise_if_wrong()


def test_a_transposed_gradient_is_named():
    assert "table: transposed" in check_gradients(Softmax(lambda g: g.T), *classes(7)).lines()


class Cut(Linear):
    def loss(self, x, y):
        return super().loss(x, y) + self.weight.detach().square().sum()


def test_a_loss_cut_off_the_graph_is_noticed():
    right = weight(lambda m, g, x, s: g + 2 * m.weight)
    assert "explicit is right" in check_gradients(Cut(right), *batch(7)).lines()[-1]
    assert "explicit is wrong too" in check_gradients(Cut(), *batch(7)).lines()[-1]


class Both(Linear):
    def loss_and_gradients(self, x, y):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.loss(x, y), {n: (2 - self.half) * g for n, g in self.gradients(x, y).items()}


@pytest.mark.parametrize("half, words", [(0, "a factor 2 too much"), (1.5, "a factor 2 is miss")])
def test_both_formulas_are_checked(half, words):
    model = Both()
    model.half = half
    assert words in check_gradients(model, *batch(7)).lines()[-1]
    model = Both(times(lambda n: 0.5))  # now only loss_and_gradients is right
    model.half = 0
    assert "gradients and loss_and_gradients" in check_gradients(model, *batch(7)).lines()[-1]


def test_a_frozen_parameter_may_be_left_out():
    model = Linear(MISTAKES["missing"][0])
    model.weight.requires_grad_(False)
    assert [p.name for p in check_gradients(model, *batch(7)).parameters] == ["bias"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_as_it_was(context):
    model, rows = Linear(dropout=0.5), batch(7)
    model.loss(*rows).backward()
    before = copy.deepcopy(state(model)), model.training
    with context():
        report = check_gradients(model, *rows)
    assert max(p.error for p in report.parameters) < 1e-8  # a float32 model, checked in float64
    assert equal(state(model), before[0]) and model.training


def state(model):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.state_dict().values(), *gradients, torch.get_rng_state()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


REDUCTIONS = {
    "sum": (lambda g: 4 * g, "4 times too large: summed over the processes"),
    "divided twice": (lambda g: g / 4, "4 times too small"),
    "batches summed": (lambda g: 3 * g, "3 times too large: summed over the batches"),
    "not reduced": (lambda g: g.flip(0), "no factor fits: the reduction is missing"),
    "mean of means": (lambda g: g + g.flip(0) / 3, "no factor fits"),
    "nan": (lambda g: g * torch.nan, "p.grad is nan"),
    "odd factor": (lambda g: 1.5 * g, "p.grad is 1.5 times the gradient of loss"),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_named(name):
    (spoil, words), right = REDUCTIONS[name], torch.arange(1.0, 6)
    known = {"processes": 4, "batches": 3}
    assert words in name_reduction(right, spoil(right), known, 1e-5)


FITS = {  # settings of the model, settings of the data
    "explicit": ({}, {}),
    "autograd": ({"gradient": "autograd"}, {}),
    "clipped": ({"gradient_clip_val": 0.1}, {}),
    "by value": ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, {}),
    "clipped by autograd": ({"gradient": "autograd", "gradient_clip_val": 0.1}, {}),
    "frozen bias": ({"bias": False}, {}),
    "moments": ({}, {"moments": True, "updates_per_step": 10}),
    "mini-batches": ({}, {"batch_size": 4, "updates_per_step": 7}),
    "accumulated": ({"accumulate_grad_batches": 3}, {"batch_size": 4}),
    "several": ({"accumulate_grad_batches": 2}, {"batch_size": 4, "updates_per_step": 4}),
}


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", FITS)
def test_right_fits_pass_and_are_logged(make_trainer, name, precision):
    (model_settings, data), check = FITS[name], GradientCheck(25)
    trainer = make_trainer(max_steps=130, callbacks=[check], precision=precision)
    with trainer.init_module():
        model = line(**model_settings)
    trainer.fit(model, RandomRows(**data))
    steps, errors = model.curves.history["verify/weight"]
    assert steps == [0, 1, 10, 25, 50, 75, 100, 125, 129]
    # relative to the gradient, which is smaller than its terms close to the optimum
    assert max(errors) < {"64-true": 1e-9, "32-true": 0.01, "bf16-mixed": 10.0}[precision]
    assert check.summary() == "9 checks, all parameters tested"


def test_moments_of_a_far_target_pass(make_trainer):
    y = [1e6 + 1, 1e6 + 3, 1e6 + 4, 1e6 + 8]
    far = PointsData(x=[1, 2, 3, 4], y=y, moments=True, passes_per_epoch=500, updates_per_step=50)
    trainer = make_trainer(max_steps=3000, callbacks=[check := GradientCheck(50)])
    with trainer.init_module():
        model = LinearRegression(lr=0.05, momentum=0.9)
    trainer.fit(model, far)
    assert check.checks == 63


@pytest.mark.parametrize("settings", [{}, {"moments": True}], ids=str)
def test_many_rows_in_float32_pass_down_to_the_optimum(make_trainer, settings):
    rows = Rows(*batch(40_000), passes_per_epoch=150, **settings)
    trainer = make_trainer(max_steps=150, callbacks=[GradientCheck(10)], precision="32-true")
    trainer.fit(line(lr=0.4), rows)


@pytest.mark.parametrize("fused", [False, True])
def test_a_formula_that_becomes_wrong_is_named_at_the_next_check(make_trainer, fused):
    def spoil(m, right, x, slope):
        return {**right, "bias": (1 + (m.trainer.global_step >= 7)) * right["bias"]}

    model: Any = (Both if fused else Linear)().double()
    model.spoil, model.half = spoil, 1
    with pytest.raises(GradientError, match="check at update 10:\n(?s:.*)bias: 2 times"):
        make_trainer(max_steps=50, callbacks=[GradientCheck()]).fit(model, RandomRows())


class Penalized(LinearRegression):
    """From update 4 on there is a penalty, which the formula forgets; at zeros it vanishes."""

    def __init__(self, kind, **settings):
        super().__init__(num_features=3, **settings)
        self.factor: Any = {"number": 0.0, "list": [0.0], "tensor": torch.zeros(1)}.get(
            kind, SimpleNamespace(factor=0.0)
        )

    def on_train_batch_start(self, batch, batch_idx):
        factor = 0.3 * (self.trainer.global_step >= 4)
        if isinstance(self.factor, (list, torch.Tensor)):
            self.factor[0] = factor  # in place
        elif isinstance(self.factor, float):
            self.factor = factor
        else:
            self.factor.factor = factor

    def loss(self, x, y):
        kept = self.factor
        factor = kept[0] if isinstance(kept, (list, torch.Tensor)) else kept
        factor = getattr(factor, "factor", factor)
        return super().loss(x, 0 * y) + factor * self.weight.square().sum()

    def gradients(self, x, y):
        return super().gradients(x, 0 * y)


@pytest.mark.parametrize("kind", ["number", "list", "tensor", "object"])
def test_what_changes_during_a_run_is_seen_by_later_checks(make_trainer, kind):
    """`p.grad` alone shows nothing at zeros; the check after a random step does."""
    trainer = make_trainer(max_steps=20, callbacks=[GradientCheck(2)])
    with pytest.raises(GradientError, match="check at update 4:\n(?s:.*)weight: WRONG"):
        trainer.fit(Penalized(kind).double(), RandomRows())


class Later(LinearRegression):
    """From update 4 on the loss passes a wrong Function, and the formula has its mistake."""

    def factor(self):
        return 2.0 if self.trainer.global_step >= 4 else 1.0

    def loss(self, x, y):
        prediction = self(x) if self.factor() == 1 else Doubled.apply(self(x))
        return (prediction - y).square().mean()

    def gradients(self, x, y):
        return {n: self.factor() * g for n, g in super().gradients(x, y).items()}


def test_a_function_that_the_loss_passes_later_is_not_trusted(make_trainer):
    trainer = make_trainer(max_steps=20, callbacks=[GradientCheck(2)])
    with pytest.raises(GradientError, match="check at update 4:"):
        trainer.fit(Later(num_features=3, start="uniform").double(), RandomRows())


def test_a_reference_beside_a_loss_that_draws_random_numbers():
    model, (x, y) = Linear(dropout=0.5), batch(8)

    def loss(model, content):
        return model.loss(*content)

    assert check_gradients(model, x, y, loss=loss, reference=loss).ok


class WrongMoments(LinearRegression):
    def loss_and_gradients_from_moments(self, moments):
        loss, gradients = super().loss_and_gradients_from_moments(moments)
        return loss, {**gradients, "weight": 2 * gradients["weight"]}


def test_moments_that_are_wrong_are_found(make_trainer):
    trainer = make_trainer(max_steps=5, callbacks=[GradientCheck()])
    with pytest.raises(GradientError, match="weight: p.grad is 2 times"):
        trainer.fit(WrongMoments(num_features=3).double(), RandomRows(moments=True))


def test_a_mistake_stops_the_fit_or_warns(make_trainer):
    wrong = at_zero(Linear()).double()
    wrong.spoil = MISTAKES["bias summed"][0]
    trainer = make_trainer(max_steps=50, callbacks=[GradientCheck()])
    with pytest.raises(GradientError, match="check at update 0:\n(?s:.*)bias: 8 times"):
        trainer.fit(wrong, RandomRows())
    assert trainer.global_step == 0 and not wrong.bias.any()
    trainer = make_trainer(max_steps=50, callbacks=[GradientCheck(20, on_error="warn")])
    with pytest.warns(UserWarning, match="gradient check at update") as caught:
        trainer.fit(wrong, RandomRows())
    assert trainer.global_step == 50
    said = {str(w.message).split(":")[0] for w in caught if "gradient check" in str(w.message)}
    assert said == {f"gradient check at update {k}" for k in (0, 1, 10, 20, 40, 49)}


@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_a_fit_with_the_check_is_the_fit_without(make_trainer, gradient):
    """With dropout, a buffer that counts calls, and random numbers, to the bit."""
    ends = []
    for callbacks in ([], [GradientCheck(2)]):
        torch.manual_seed(0)
        model = Linear(dropout=0.5, gradient=gradient).double()
        trainer = make_trainer(max_steps=9, callbacks=callbacks)
        trainer.fit(model, RandomRows(batch_size=5, updates_per_step=3))
        ends.append(state(model))
    assert equal(*ends) and model.calls > 8
    assert callbacks[0].checks == 6


class Summed(Linear):
    """The sum over the rows, of which `rows` counts each or only one."""

    one = False

    def rows(self, batch):
        return 1.0 if self.one else super().rows(batch)

    def loss(self, x, y):
        return super().loss(x, y) * len(x)

    def gradients(self, x, y):
        return {name: g * len(x) for name, g in super().gradients(x, y).items()}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_sum_that_is_counted_by_rows_is_named_where_it_matters(make_trainer, dropout):
    alone, both = (
        Summed(lr=1e-4, dropout=dropout, accumulate_grad_batches=batches).double()
        for batches in (1, 2)
    )
    make_trainer(max_steps=2, callbacks=[GradientCheck()]).fit(alone, RandomRows(batch_size=8))
    with pytest.raises(GradientError, match="loss: the loss of 8 rows is .* weighted by rows"):
        make_trainer(max_steps=2, callbacks=[GradientCheck()]).fit(both, RandomRows(batch_size=8))
    both.one = True
    make_trainer(max_steps=2, callbacks=[GradientCheck()]).fit(both, RandomRows(batch_size=8))
    right = Linear(lr=1e-4, dropout=dropout, accumulate_grad_batches=2).double()
    make_trainer(max_steps=2, callbacks=[GradientCheck()]).fit(right, RandomRows(batch_size=4))


class Noisy(Linear):
    def loss(self, x, y):
        return super().loss(x, y) + 0.1 * torch.randn(()).to(x)


def test_a_loss_that_draws_random_numbers_is_no_sum(make_trainer):
    """Its parts have other random numbers; and asking them leaves those of the run as they are."""
    ends = []
    for callbacks in ([], [GradientCheck()]):
        torch.manual_seed(0)
        model = Noisy(lr=1e-4, dropout=0.5, gradient="autograd").double()
        trainer = make_trainer(max_steps=3, callbacks=callbacks, accumulate_grad_batches=2)
        trainer.fit(model, RandomRows(batch_size=8))
        ends.append(state(model))
    assert equal(*ends)
