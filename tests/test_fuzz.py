"""Properties on thousands of random cases, each shown to fail on a planted mutant.

The cases are the same in every run; their number stands at the end of the run.
"""

import re

import pytest
import torch
import yaml
from conftest import FIGURES, find_models
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from test_batches import blocks, numbered, updates
from test_cli import LIGHTNINGS
from test_models import is_class, own_choices, trained
from test_moments import noisy

from lightning_gd import GradientDescentModule, LinearRegression, ParityMLP
from lightning_gd.data.tensors import GlobalBatches
from lightning_gd.moments import Moments

pytestmark = pytest.mark.filterwarnings(LIGHTNINGS)
PROPERTIES = {}  # name: the check, what it draws, and how many cases
SEED = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([1, 2, 7]) | st.integers(1, 40)


def prop(cases, **drawn):
    """Enter a property of so many random cases."""

    def enter(check):
        PROPERTIES[check.__name__] = check, drawn, cases
        return check

    return enter


def hold(name):
    """Check a property on all its cases; how many there were."""
    check, drawn, cases = PROPERTIES[name]
    ran = 0

    def counting(**values):
        nonlocal ran
        check(**values)
        ran += 1  # not where a draw is thrown away

    # A case that fails is reported as it was drawn: nothing here is large.
    fixed = settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        report_multiple_bugs=False,
    )
    fixed(given(**drawn)(counting))()
    return ran


# Explicit against autograd


def perturbed(model, generator, dtype, **changes):
    """A model like this one with other settings, and with weights of size 1 that are not 0."""
    other = type(model)(**{**model.hparams, **changes}).to(dtype)
    with torch.no_grad():
        for parameter in trained(other).values():
            parameter += torch.randn(parameter.shape, generator=generator)
    return other


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
    1200,
    cls=st.sampled_from(find_models()),
    choices=st.data(),
    rows=SIZES,
    width=SIZES,
    dtype=st.sampled_from(list(POWERS)),
    power=st.floats(-1, 1),
    seed=SEED,
)
def explicit_is_autograd(cls, choices, rows, width, dtype, power, seed):
    g = torch.Generator().manual_seed(seed)
    example, _, y = cls.example_batch()
    changes = {name: choices.draw(st.sampled_from(v)) for name, v in own_choices(cls).items()}
    model = perturbed(example, g, dtype, num_features=width, **changes)
    scale, targets = 10.0 ** (power * POWERS[dtype]), torch.randn(rows, generator=g)
    x = (torch.randn(rows, width, generator=g).double() * scale).to(dtype)
    y = targets.sign().to(dtype) if is_class(y) else (targets.double() * scale).to(dtype)
    with torch.no_grad():
        explicit = model.gradients(x, y)
        loss, both = model.loss_and_gradients(x, y)
    assert loss.isfinite()
    expected, sizes = gradients_of(model, x, y), sizes_of_terms(model, x, y)
    for name, wanted, size in zip(trained(model), expected, sizes, strict=True):
        for found in (explicit[name], both[name]):
            assert found.dtype == wanted.dtype == dtype and found.shape == wanted.shape
            # Sums over 40 rows of sums over 40 features: some eps of what the terms add up to.
            assert (found - wanted).abs().max() <= 100 * torch.finfo(dtype).eps * size


# Moments against the direct formula

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
    b = torch.tensor(0.7).double() if with_bias else None
    m = Moments.of(x, y)
    r = x @ w + (0 if b is None else b) - y
    loss, dw, db = m.loss_and_gradients(w, b)
    # 1e-9 of the scale of the terms: r² and |x||r| before they cancel.
    size_r = x.abs() @ w.abs() + y.abs() + 1
    assert abs(loss - r.square().mean()) <= 1e-9 * size_r.square().mean()
    assert ((dw - 2 * r @ x / n).abs() <= 1e-9 * (size_r @ x.abs() / n + 1e-30)).all()
    assert torch.equal(loss, m.loss(w, b)) and torch.equal(dw, m.gradients(w, b)[0])
    again = m.gradients(w, b)[1]
    if db is None or again is None:
        assert db is again is b
    else:
        assert abs(db - 2 * r.mean()) <= 1e-9 * size_r.mean() and torch.equal(db, again)


@prop(700, cuts=st.lists(st.integers(0, 40), max_size=5), **TABLES)
def moments_of_parts_add_up(n, size, seed, offset, cuts):
    x, y = noisy(n, size, seed)
    x, edges = x + offset, [0, *sorted(min(cut, n) for cut in cuts), n]
    total = Moments.zero(size)
    for first, last in zip(edges, edges[1:], strict=False):
        total = total + Moments.of(x[first:last], y[first:last])
    whole = Moments.of(x, y)
    assert total.n == whole.n == n
    # An offset of 1e6 leaves 1e-10 of rounding in the means, whose differences are squared.
    for name in ("mean_x", "mean_y", "cov_xx", "cov_xy", "var_y"):
        bound = 1e-9 * (1 + abs(offset)) if "mean" in name else 1e-8 * (1 + y.abs().max() ** 2)
        assert (getattr(total, name) - getattr(whole, name)).abs().max() <= bound


# The sampler

LOADERS = {
    "rows": st.integers(1, 40),
    "batch_size": st.none() | st.integers(1, 45),
    "seed": st.integers(0, 2**63 - 1),
    "epoch": st.integers(0, 2**40),
    "shuffle": st.booleans(),
}
WORLDS = {"world": st.integers(1, 5), "moves": st.booleans(), "sizes": st.lists(st.integers(1, 9))}


def ranks(rows, world, moves, sizes, epoch, **settings):
    """What each process of a world loads in blocks of these sizes."""
    return [
        GlobalBatches(
            numbered(rows),
            rank=rank,
            world=world,
            moves=moves,
            schedule=blocks(epoch, 0, sizes),
            **settings,
        )
        for rank in range(world)
    ]


@prop(600, **WORLDS, **LOADERS)
def every_row_once_in_the_same_batches(world, moves, sizes, epoch, rows, **settings):
    loaders = ranks(rows, world, moves, sizes, epoch, **settings)
    expected = updates(GlobalBatches(numbered(rows), **settings, schedule=blocks(epoch)))
    assert sorted(row for update, _ in expected for row in update) == list(range(rows))
    size = min(settings["batch_size"] or rows, rows)
    if not settings["shuffle"] or size == rows:
        assert [row for update, _ in expected for row in update] == list(range(rows))
    shares = [updates(loader) for loader in loaders]
    for k, (update, total) in enumerate(expected):
        for rank, share in enumerate(shares):
            assert share[k] == (update[rank::world], total)
    assert {len(loader) for loader in (*loaders, *shares)} == {len(expected)}


@prop(600, done=st.integers(0, 50), **LOADERS)
def the_order_is_a_function_of_seed_and_epoch(done, rows, epoch, **settings):
    first = updates(GlobalBatches(numbered(rows), **settings, schedule=blocks(epoch)))
    torch.rand(1)  # whatever else draws
    resumed = updates(GlobalBatches(numbered(rows), **settings, schedule=blocks(epoch, done)))
    assert resumed == first[done:]


@prop(600, **WORLDS, **LOADERS)
def the_sizes_add_up(world, moves, sizes, epoch, rows, **settings):
    loaded = [list(loader) for loader in ranks(rows, world, moves, sizes, epoch, **settings)]
    size = min(settings["batch_size"] or rows, rows)
    totals = [total for block in loaded[0] for total in block.sizes.total]
    assert totals == [min(size, rows - first) for first in range(0, rows, size)]
    for same in zip(*loaded, strict=True):  # the block that the processes load together
        local = [block.sizes.local for block in same]
        assert [sum(shares) for shares in zip(*local, strict=True)] == same[0].sizes.total
        assert all(max(shares) - min(shares) <= 1 for shares in zip(*local, strict=True))
        assert all(block.sizes.updates == len(same[0].sizes.total) for block in same)


@prop(500, rows=st.integers(1, 20), passes=st.integers(1, 30), world=st.integers(1, 5))
def passes_of_the_full_batch(rows, passes, world):
    for rank in range(world):
        place = {"passes": passes, "rank": rank, "world": world}
        loader = GlobalBatches(numbered(rows), schedule=blocks(0, 0, [4, 7]), **place)
        assert updates(loader) == [(list(range(rows))[rank::world], rows)] * passes
        assert len(loader) == passes


# YAML


def no_number(text):
    """Not a text such as 1e3: jsonargparse writes it without quotes, and refuses it as a number."""
    try:
        return "." in text or text.isdigit() or not (float(text) or True)
    except ValueError:
        return True


def is_null(text):
    """Whether the command line takes it for null, as in `--model.scheduler null`."""
    try:
        return yaml.safe_load(text) is None
    except yaml.YAMLError:
        return False


TYPED = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp"))
# What a reader of YAML could take for something else.
TEXT = st.sampled_from(
    [
        "",
        " x",
        "1",
        "-1.5",
        ".nan",
        "null",
        "~",
        "true",
        "no",
        "[a]",
        "{a: 1}",
        "a: b",
        "# c",
        "é\t",
    ]
) | st.text(TYPED, max_size=8).filter(no_number)
OPTIONAL = st.none() | TEXT.filter(lambda text: not is_null(text))
WHOLE = st.integers(1, 2**40)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
ARGS = st.none() | st.dictionaries(
    st.from_regex("[a-z_]{1,8}", fullmatch=True), FLOAT | st.booleans() | st.none() | TEXT
)
MODEL = {
    "gradient": st.sampled_from(["explicit", "autograd"]),
    "lr": FLOAT | st.just("auto"),
    "momentum": FLOAT,
    "optimizer": TEXT,
    "optimizer_args": ARGS,
    "scheduler": OPTIONAL,
    "scheduler_args": ARGS,
    "gradient_clip_val": st.none() | FLOAT,
    "updates_per_step": st.none() | WHOLE,
    "moments": st.booleans(),
    "start_seed": WHOLE,
}
LINE = {
    **MODEL,
    "weight": st.none() | st.lists(FLOAT),
    "intercept": st.none() | FLOAT,
    "start": st.sampled_from(["zeros", "uniform", "linear"]),
}
DATA = {
    "batch_size": st.none() | WHOLE,
    "passes_per_epoch": WHOLE,
    "num_val": WHOLE,
    "test_every": st.none() | WHOLE,
    "seed": WHOLE,
}
FORMS = {
    ("model", "LinearRegression"): LINE,
    ("model", "RidgeRegression"): {**LINE, "alpha": FLOAT},
    ("model", "ParityRegressor"): LINE,
    ("model", "LogisticParity"): LINE,
    ("model", "ParityMLP"): {**MODEL, "hidden": WHOLE},
    ("data", "PointsData"): {
        **DATA,
        "x": st.none() | st.lists(FLOAT) | st.lists(st.lists(FLOAT, min_size=1), min_size=1),
        "y": st.none() | st.lists(FLOAT),
    },
    ("data", "MNISTParityData"): {**DATA, "root": TEXT, "num_train": st.none() | WHOLE},
    ("data", "TableData"): {
        **DATA,
        "path": TEXT,
        "target": TEXT,
        "features": st.none() | st.lists(TEXT),
        "test_path": OPTIONAL,
        "separator": TEXT,
    },
}
BASES = {"model": GradientDescentModule, "data": LightningDataModule}


@pytest.fixture(scope="module")
def parsers():
    """LightningCLI's, for a model and for data."""
    made = {part: LightningArgumentParser(exit_on_error=False) for part in BASES}
    for part, base in BASES.items():
        made[part].add_lightning_class_args(base, part, subclass_mode=True)
    PARSERS.update(made)


PARSERS = {}


@prop(500, form=st.sampled_from(list(FORMS)), drawn=st.data())
def settings_survive_yaml(form, drawn):
    part, name = form
    chosen = drawn.draw(st.fixed_dictionaries({}, optional=FORMS[form]))
    given = {part: {"class_path": f"lightning_gd.{name}", "init_args": chosen}}
    config = PARSERS[part].parse_object(given)
    kept = config[part].init_args.as_dict()
    assert {key: kept[key] for key in chosen} == chosen
    text = PARSERS[part].dump(config, skip_none=False)  # as a run writes its config.yaml
    assert PARSERS[part].parse_string(text) == config


# All of them


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name, parsers):
    ran = hold(name)
    assert ran >= 500
    good, tried = FIGURES.get("fuzz cases run", (0, 0))
    FIGURES["fuzz cases run"] = good + ran, tried + PROPERTIES[name][2]


def test_5000_cases():
    assert sum(cases for _, _, cases in PROPERTIES.values()) >= 5000


# Mutants: a mistake that somebody could make, for each property


def half_the_slope_of_the_bias(self, x, y):
    r = self(x) - y
    return {"weight": 2 * (r @ x) / len(r), "bias": r.mean()}


def centred_gradients(self, half, error, bias):
    return half + half, None if bias is None else error + error


def without_the_means_between(self, other):
    n, parts = self.n + other.n, ("mean_x", "mean_y", "cov_xx", "cov_xy", "var_y")
    pairs = [(getattr(self, name), getattr(other, name)) for name in parts]
    return Moments(n, *(a * (self.n / max(n, 1)) + b * (other.n / max(n, 1)) for a, b in pairs))


def with_replacement(self, epoch):
    rows = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
    return torch.randint(len(self.table), (len(self.table),), generator=rows)


def global_random_numbers(self, epoch):
    return torch.randperm(len(self.table))


def equal_shares(self, order, first, size, block=GlobalBatches._block):
    found = block(self, order, first, size)
    found.sizes.local = [total // self.world for total in found.sizes.total]
    return found


def a_single_pass(self, passes, full=GlobalBatches._full):
    return full(self, 1)


def six_digits(self, *args, dump=LightningArgumentParser.dump, **kwargs):
    text = dump(self, *args, **kwargs)
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.6f}", text)


MUTANTS = {
    "explicit_is_autograd": (LinearRegression, "gradients", half_the_slope_of_the_bias),
    "moments_are_the_direct_formula": (Moments, "_gradients", centred_gradients),
    "moments_of_parts_add_up": (Moments, "__add__", without_the_means_between),
    "every_row_once_in_the_same_batches": (GlobalBatches, "_order", with_replacement),
    "the_order_is_a_function_of_seed_and_epoch": (GlobalBatches, "_order", global_random_numbers),
    "the_sizes_add_up": (GlobalBatches, "_block", equal_shares),
    "passes_of_the_full_batch": (GlobalBatches, "_full", a_single_pass),
    "settings_survive_yaml": (LightningArgumentParser, "dump", six_digits),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_property_fails_on_a_mutant(name, parsers, monkeypatch):
    owner, method, mutant = MUTANTS[name]
    monkeypatch.setattr(owner, method, mutant)
    with pytest.raises(AssertionError):
        hold(name)
