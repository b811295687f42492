"""Properties on thousands of random cases, each shown to fail on a planted mutant.

The cases are the same in every run; their number stands at the end of the run.
"""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import FIGURES, Rows, find_models, normal
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_batches import batches, loader, steps
from test_models import is_class, own_choices, rebuild, trained
from test_modes import train
from test_moments import noisy

from lightning_gd import LinearRegression, Moments, ParityConv, ParityMLP
from lightning_gd.data.loader import GlobalBatches
from lightning_gd.distributed import RowMean

PROPERTIES = {}  # name: the check of all its cases, and how many there are
RAN = Counter()  # by name: cases that held
MODELS = [model for model in find_models() if model is not ParityConv]  # of any number of features
TOOLS = {}  # fixtures for the checks


def prop(cases, **drawn):
    """Enter a property of so many random cases."""
    # A case that fails is reported as it was drawn: nothing here is large.
    fixed = {"phases": (Phase.generate,), "report_multiple_bugs": False}
    fixed |= {"derandomize": True, "deadline": None, "database": None}

    def enter(check):
        def counting(**values):
            check(**values)
            RAN[check.__name__] += 1  # not where a draw is thrown away

        hold = settings(max_examples=cases, **fixed)(given(**drawn)(counting))
        PROPERTIES[check.__name__] = hold, cases
        return check

    return enter


SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([1, 7]) | st.integers(1, 40)


@st.composite
def problems(draw, model_class):
    """A model in float64 with any of its settings, at its start or elsewhere, and a batch."""
    model, x, y = model_class.example_batch()
    changes = {name: draw(st.sampled_from(v)) for name, v in own_choices(model_class).items()}
    shape = [draw(SIZES), *x.shape[1:]]
    if "num_features" in model.hparams:
        shape[1] = changes["num_features"] = draw(SIZES)
    seed, moved = draw(SEEDS), rebuild(model, **changes)
    if draw(st.booleans()):
        for i, parameter in enumerate(trained(moved).values()):
            parameter.data += normal(*parameter.shape, seed=seed + i)
    inputs, targets = normal(*shape, seed=seed + 10), normal(shape[0], seed=seed + 11)
    return moved, inputs, targets.sign() if is_class(y) else targets


def gradients_of(model, x, y):
    return torch.autograd.grad(model.loss(x, y), list(trained(model).values()))


def sizes_of_terms(model, x, y):
    """What the terms of each gradient add up to where none cancels another, in float64."""
    relu = {"activation": "relu"} if isinstance(model, ParityMLP) else {}  # |tanh z| ≤ |z|
    other = type(model)(**{**model.hparams, **relu}).double()
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.copy_(mine.abs())
    found = gradients_of(other, x.double().abs(), -y.double().abs())
    return [float(gradient.abs().max()) for gradient in found]


# Powers of ten of x and y whose squares the dtype can hold, with sums over rows and features.
POWERS = {torch.float32: 15, torch.float64: 140}


@prop(
    1000,
    problem=st.sampled_from(MODELS).flatmap(problems),
    dtype=st.sampled_from(list(POWERS)),
    power=st.floats(-1, 1),
)
def explicit_is_autograd(problem, dtype, power):
    model, x, y = problem
    scale = 10.0 ** (power * POWERS[dtype])
    model, x = model.to(dtype), (x * scale).to(dtype)
    y = (y if is_class(y) else y * scale).to(dtype)
    with torch.no_grad():
        explicit = model.gradients(x, y)
        loss, both = model.loss_and_gradients(x, y)
    assert loss.isfinite()  # a mean of terms that are not negative: it has all its digits
    assert loss.item() == pytest.approx(model.loss(x, y).item(), rel=100 * torch.finfo(dtype).eps)
    expected, sizes = gradients_of(model, x, y), sizes_of_terms(model, x, y)
    for name, wanted, size in zip(trained(model), expected, sizes, strict=True):
        for found in (explicit[name], both[name]):
            assert found.dtype == wanted.dtype == dtype and found.shape == wanted.shape
            # Sums over 40 rows of sums over 40 features: some eps of what the terms add up to.
            assert (found - wanted).abs().max() <= 100 * torch.finfo(dtype).eps * size


TABLES = {
    "n": st.integers(1, 40),
    "size": st.integers(1, 6),
    "seed": st.integers(0, 10_000),
    "offset": st.sampled_from([0.0, 1.0, -1e3, 1e6]),
}


@prop(700, with_bias=st.booleans(), **TABLES)
def moments_are_the_direct_formula(n, size, seed, offset, with_bias):
    x, y = noisy(n, size, seed)
    x = x + offset
    w = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
    b = torch.tensor(0.7).double() if with_bias else 0.0
    r = x @ w + b - y
    loss, dw, db = Moments.of(x, y).loss_and_gradients(w, b)
    # 1e-9 of the scale of the terms: r² and |x||r| before they cancel.
    size_r = x.abs() @ w.abs() + y.abs() + 1
    assert abs(loss - r.square().mean()) <= 1e-9 * size_r.square().mean()
    assert ((dw - 2 * r @ x / n).abs() <= 1e-9 * (size_r @ x.abs() / n + 1e-30)).all()
    assert abs(db - 2 * r.mean()) <= 1e-9 * size_r.mean()


def in_step(parts):
    """Reduce all parts; each round knows the sum of one more call than the round before."""
    sums, reduced = [], []
    for _ in range(3):
        sent = [[] for _ in parts]
        pairs = zip(parts, sent, strict=True)
        reduced = [part.reduce(partial(known, sums, own)) for part, own in pairs]
        sums = [torch.stack(flats).sum(0) for flats in zip(*sent, strict=True)]
    return reduced


def known(sums, sent, flat):
    assert flat.dim() == 1 and flat.dtype == torch.float64
    sent.append(flat)
    return sums[len(sent) - 1] if len(sent) <= len(sums) else flat


@prop(700, cuts=st.lists(st.integers(0, 40), max_size=5), **TABLES)
def moments_of_parts_add_up(n, size, seed, offset, cuts):
    x, y = noisy(n, size, seed)
    x, edges = x + offset, [0, *sorted(min(cut, n) for cut in cuts), n]
    slices = map(slice, edges, edges[1:])
    total, *others = in_step([Moments.of(x[rows], y[rows]) for rows in slices])
    assert all(torch.equal(other.cov, total.cov) for other in others)
    whole = Moments.of(x, y)
    assert total.n == whole.n == n
    # An offset of 1e6 leaves 1e-10 of rounding in the means, whose differences are squared.
    assert (total.mean - whole.mean).abs().max() <= 1e-9 * (1 + abs(offset))
    assert (total.cov - whole.cov).abs().max() <= 1e-8 * (1 + y.abs().max() ** 2)


# The batches of an epoch, its steps, and the place in the data

LOADERS = {
    "rows": st.integers(1, 40),
    "batch_size": st.none() | st.integers(1, 45),
    "seed": st.none() | st.integers(0, 2**63 - 1),
    "accumulate": st.integers(1, 4),
    "updates_per_step": st.integers(1, 9),
}
PLACES = {"epoch": st.integers(0, 2**40), "done": st.integers(0, 40)}


@prop(700, world=st.integers(1, 5), epoch=PLACES["epoch"], **LOADERS)
def every_row_once_in_the_same_batches(world, epoch, accumulate, updates_per_step, **drawn):
    count = loader(**drawn).batches
    alone = batches(step=epoch * count, **drawn)
    order = [row for batch in alone for row in batch]
    assert sorted(order) == list(range(drawn["rows"]))
    assert order == sorted(order) or drawn["seed"] is not None and count > 1
    assert {len(batch) for batch in alone[:-1]} <= {drawn["batch_size"]}
    drawn.update(accumulate=accumulate, updates_per_step=updates_per_step)
    for rank in range(world):
        first = epoch * loader(**drawn).updates_per_epoch
        found = steps(step=first, process=(rank, world), **drawn)
        assert [batch for step in found for batch in step] == [b[rank::world] for b in alone]
        assert {len(step) for step in found[:-1]} <= {accumulate * updates_per_step}


@prop(900, limit=st.integers(1, 9), autograd=st.booleans(), **PLACES, **LOADERS)
def the_place_follows_global_step(epoch, done, autograd, accumulate, **drawn):
    """In autograd mode a step has one batch, and an epoch ends with an update."""
    drawn |= {"accumulate": accumulate, "several": not autograd}
    first = epoch * loader(**drawn).updates_per_epoch
    whole = batches(step=first, **drawn)
    if autograd:
        size = drawn["batch_size"] or drawn["rows"]
        assert len(whole) == min(drawn["limit"], math.ceil(drawn["rows"] / size))
    torch.rand(1)  # whatever else draws
    done %= -(-len(whole) // accumulate)
    assert batches(step=first + done, **drawn) == whole[done * accumulate :]
    assert loader(step=first + done, **drawn).updates_in_epoch() == done


@prop(700, passes=st.integers(1, 30), done=PLACES["done"], rows=LOADERS["rows"])
def passes_of_the_full_batch(rows, passes, done):
    for rank, world in ((0, 1), (0, 3), (2, 3)):
        settings = {"passes": passes, "process": (rank, world), "updates_per_step": 7}
        left = passes - done % passes
        assert batches(rows, step=done, **settings) == [list(range(rows))[rank::world]] * left


@prop(300, autograd=st.booleans(), max_steps=st.integers(1, 12), **LOADERS)
def a_fit_is_a_plain_loop(autograd, max_steps, rows, accumulate, updates_per_step, **drawn):
    accumulate, mode = (1, "autograd") if autograd else (accumulate, "explicit")
    drawn["seed"], (x, y) = drawn["seed"] or 0, noisy(rows, 2)
    settings = {"momentum": 0.9, "gradient": mode, "accumulate_grad_batches": accumulate}
    data = Rows(x, y, updates_per_step=updates_per_step, **drawn)
    found = train(TOOLS["make_trainer"](max_steps=max_steps), LinearRegression(2, **settings), data)
    x, moved, theta = torch.cat([x, x.new_ones(rows, 1)], 1), x.new_zeros(3), x.new_zeros(3)
    for update in range(max_steps):
        left = batches(rows, step=update, accumulate=accumulate, **drawn)
        seen = [row for batch in left[:accumulate] for row in batch]
        moved = 0.9 * moved + 2 / len(seen) * x[seen].T @ (x[seen] @ theta - y[seen])
        theta = theta - 0.01 * moved
    # Sums of at most 40 rows in another order, 12 times: below 1e-13 of weights of order 1.
    torch.testing.assert_close(found, theta, rtol=0, atol=1e-12)


# All of them, and a mistake that somebody could make for each


@pytest.fixture(autouse=True)
def tools(make_trainer):
    TOOLS["make_trainer"] = make_trainer


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    hold, cases = PROPERTIES[name]
    RAN[name] = 0  # a mutant may have been tried before
    hold()
    good, tried = FIGURES.get("fuzz cases run", (0, 0))
    FIGURES["fuzz cases run"] = good + RAN[name], tried + cases
    assert RAN[name] == cases


def half_the_slope_of_the_bias(_, self, x, y):
    r = self(x) - y
    return {"weight": 2 * (r @ x) / len(r), "bias": r.mean()}


def centred(original, self, weight, bias):
    return original(Moments(self.n, self.mean * 0, self.cov), weight, bias)


def without_the_means_between(_, self, reduce_sum):
    sums = reduce_sum(torch.cat([self.mean, torch.ones(1)]) * self.n)
    cov = reduce_sum((self.cov * self.n).flatten()).view_as(self.cov)
    return Moments(round(sums[-1].item()), sums[:-1] / sums[-1], cov / sums[-1])


def with_replacement(order, self, epoch):
    found, dice = order(self, epoch), torch.Generator().manual_seed(epoch)
    if found is not None:
        found.rows = torch.randint(len(found.rows), [len(found.rows)], generator=dice)
    return found


MUTANTS = {  # class, method, and what takes its place and gets it as the first argument
    "explicit_is_autograd": (LinearRegression, "gradients", half_the_slope_of_the_bias),
    "moments_are_the_direct_formula": (Moments, "loss_and_gradients", centred),
    "moments_of_parts_add_up": (Moments, "reduce", without_the_means_between),
    "every_row_once_in_the_same_batches": (GlobalBatches, "_order", with_replacement),
    "the_place_follows_global_step": (GlobalBatches, "_place", lambda at, self: (at(self)[0], 0)),
    "passes_of_the_full_batch": (GlobalBatches, "_full", lambda full, self, count: full(self, 1)),
    "a_fit_is_a_plain_loop": (RowMean, "add", lambda add, self, means, _: add(self, means, 1)),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_property_fails_on_a_mutant(name, monkeypatch):
    owner, method, mutant = MUTANTS[name]
    original = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *args, **named: mutant(original, *args, **named))
    with pytest.raises(AssertionError):
        PROPERTIES[name][0]()
