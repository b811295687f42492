"""Right backward passes pass in every case, planted mistakes are found and named."""

import random
from functools import partial

import pytest
import torch
from conftest import counted
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from lightning_gd.gradcheck import GradientError, check_function, check_objective
from lightning_gd.gradcheck.bench import converted
from lightning_gd.gradcheck.function import pair_of

torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(Function):
    @staticmethod
    def forward(x, weight, bias):
        return x @ weight.T + bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, weight, _ = ctx.saved_tensors
        return g @ weight, g.T @ x, g.sum(0)


def of_layer_norm(g, x, weight, _):
    scale = (x.var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()
    x, d = (x - x.mean(-1, keepdim=True)) * scale, g * weight
    d = d - d.mean(-1, keepdim=True) - x * (d * x).mean(-1, keepdim=True)
    return d * scale, (g * x).sum(0), g.sum(0)


def of_attention(g, q, k, v):
    p, dp = (q @ k.T / q.shape[1] ** 0.5).softmax(1), g @ v.T
    s = p * (dp - (dp * p).sum(1, keepdim=True)) / q.shape[1] ** 0.5
    return s @ k, s.T @ q, p.T @ g


NORM = lambda x, w, b: functional.layer_norm(x, x.shape[-1:], w, b), of_layer_norm
ENTROPY = (
    functional.cross_entropy,
    lambda g, z, y: g * (z.softmax(1) - functional.one_hot(y, z.shape[1])) / len(z),
)
HUBER = (
    lambda x, y: functional.huber_loss(x, y, reduction="none"),
    lambda g, x, y: (g * (x - y).clamp(-1, 1), -g * (x - y).clamp(-1, 1)),
)
SIN_COS = (
    lambda x, y: (x.sin(), x.cos() * y),
    lambda g, h, x, y: (g * x.cos() - h * x.sin() * y, h * x.cos()),
)
SORT = lambda x: x.sort(1).values, lambda g, x: (0 * g).scatter(1, x.sort(1).indices, g)
MOST = lambda x: tuple(x.max(0)), lambda g, _, x: (0 * x).scatter(0, x.max(0)[1][None], g[None])
ROWS = lambda x, i: x[i], lambda g, x, i: torch.zeros_like(x).index_add(0, i, g)
CALLABLE = lambda x, w, b: Linear.apply(x.tanh(), w, b).square().mean()  # noqa: E731
ATTENTION = functional.scaled_dot_product_attention, of_attention

# name: (the function and its backward pass, inputs of N rows and D columns)
RIGHT = {
    "linear": (Linear, lambda n, d, r: (r(n, d), r(3, d), r(3))),
    "cross entropy": (ENTROPY, lambda n, d, r: (r(n, d), torch.arange(n) % d)),
    "layer norm": (NORM, lambda n, d, r: (r(n, d), r(d), r(d))),
    "relu": ((torch.relu, lambda g, x: g * (x > 0)), lambda n, d, r: (r(n, d),)),
    "huber": (HUBER, lambda n, d, r: (r(n, d), r(n, d))),
    "attention": (ATTENTION, lambda n, d, r: (r(n, d), r(4, d), r(4, d))),
    "sort": (SORT, lambda n, d, r: (r(n, d),)),
    "max": (MOST, lambda n, d, r: (r(n, d),)),
    "tuple": (SIN_COS, lambda n, d, r: (r(n, d), r(n, d))),
    "rows": (ROWS, lambda n, d, r: (r(n, d), torch.arange(n + 2) % n)),
    "a callable": (CALLABLE, lambda n, d, r: (r(n, d), r(3, d), r(3))),
}


def plain(form):
    """The forward pass by torch operations, which autograd differentiates."""
    return torch.square if form[0] is changes_input else form[0]


@pytest.mark.parametrize("seed", range(40))
def test_right_functions_pass(seed):
    draw = random.Random(seed)
    (form, inputs_of), whole = RIGHT[draw.choice(sorted(RIGHT))], draw.random() < 0.5
    generator, size = torch.Generator().manual_seed(seed), draw.choice([1e-2, 1.0, 3.0])

    def values(*shape):  # whole numbers tie and lie on kinks
        found = size * torch.randn(shape, generator=generator)
        return found.round() if whole else found

    inputs = inputs_of(draw.randint(1, 9), draw.randint(1, 6), values)
    reference = plain(form) if isinstance(form, tuple) and draw.random() < 0.5 else None
    report = check_function(form, *inputs, reference=reference, seed=seed)
    for case in report.cases.values():
        with counted("cases of right backward passes without a false alarm"):
            assert case.ok, report.lines()


@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_are_seen_to_be_right(name):
    form, inputs_of = RIGHT[name]
    torch.manual_seed(0)
    report = check_function(form, *inputs_of(6, 4, lambda *shape: torch.randn(shape)))
    report.raise_if_wrong()
    assert all(p.tested for n in ("as given", "float32") for p in report.cases[n].parameters)
    assert any(p.tested for p in report.cases["bfloat16"].parameters), report.lines()


def linear(spoil):
    """x Wᵀ + b with a spoilt backward pass: `spoil(right gradients, g, x, weight)`."""
    right = lambda g, x, w, b: (g @ w, g.T @ x, g.sum(0))  # noqa: E731
    return functional.linear, lambda g, x, w, b: spoil(right(g, x, w, b), g, x, w)


def changes_input(x):
    y = x.square()
    x.mul_(0.5)
    return y


def as_if_contiguous(values):
    return torch.as_strided(values, values.shape, torch.empty(values.shape).stride())


NOISY = linear(lambda r, *_: [g * (1 + 1e-4 * torch.randn_like(g)) for g in r])
LAST_ROW = linear(lambda r, g, x, _: (r[0], g[:-1].T @ x[:-1], r[2]))
ERROR = functional.pad(torch.full((1, 1), 0.01), (1, 2, 2, 2))
ENTRY = linear(lambda r, *_: (r[0], (r[1] + ERROR).to(r[1]), r[2]))
SUM_FOR_MEAN = lambda x: x.square().mean(0), lambda g, x: 2 * g * x
ONE_USE = lambda x: x * x.sigmoid(), lambda g, x: g * x.sigmoid()
ONE_SIDE = HUBER[0], lambda g, x, y: (g * (x - y), -g * (x - y).clamp(-1, 1))
IGNORES = torch.relu, lambda g, x: (x > 0).to(x)
INPUT_CHANGED = changes_input, lambda g, x: 4 * g * x
EVERY_TIE = lambda x: x.max(0).values, lambda g, x: g * (x == x.max(0).values)
LONG_ONLY = torch.square, lambda g, x: 2 * g * x * (g.dtype != torch.bfloat16)
IN_PLACE = torch.square, lambda g, x: g.mul_(2 * x)
CONTIGUOUS_G = torch.square, lambda g, x: 2 * as_if_contiguous(g) * x
CONTIGUOUS_X = torch.square, lambda g, x: 2 * g * as_if_contiguous(x)
PADDED = lambda x, m: (x * m).sum() / m.sum(), lambda g, x, m: g * m / len(x)
CANCELS = functional.softplus, lambda g, x: g * (1 - 1 / (1 + x.exp()))
SQUARE = normal(6, 4), normal(4, 4, seed=1), normal(4, seed=2)
MASKED = normal(8), (torch.arange(8) < 6).to(torch.int64)
X = normal(6, 4), normal(5, 4, seed=1), normal(5, seed=2)
ONE = X[:1]
ELSE = "no usual mistake fits"

# name: (form, inputs, what an input's diagnosis says, which other checks find it: g is gradcheck,
# b a comparison in bfloat16, d one direction)
MISTAKES = {
    "factor 2": (linear(lambda r, *_: (r[0], 2 * r[1], r[2])), X, "1: .*a factor 2 too", "gbd"),
    "factor ½": ((torch.square, torch.mul), ONE, "0: .*a factor 2 is missing", "gbd"),
    "sign": (linear(lambda r, *_: (-r[0], *r[1:])), X, "0: .*the sign is wrong", "gbd"),
    "zero": (linear(lambda r, *_: (r[0], 0 * r[1], r[2])), X, "1: it is zero", "gbd"),
    "sum for mean": (SUM_FOR_MEAN, ONE, "0: .*the sum over the rows instead of the mean", "gbd"),
    "one of two uses": (ONE_USE, ONE, f"0: {ELSE}", "gbd"),
    "wrong for |x| > 1": (ONE_SIDE, (X[0], 0 * X[0]), f"0: {ELSE}", "gbd"),
    "cotangent ignored": (IGNORES, ONE, "0: the cotangent is ignored", "gbd"),
    "input changed": (INPUT_CHANGED, ONE, "0: .* changes input 0 in place", "gd"),
    "cotangent changed": (IN_PLACE, ONE, "0: the cotangent is changed in place", "d"),
    "cotangent contiguous": (CONTIGUOUS_G, ONE, f"0, .* non-contiguous cotangent.*: {ELSE}", ""),
    "input contiguous": (CONTIGUOUS_X, ONE, f"0, only in: non-contiguous inputs: {ELSE}", ""),
    "None": (linear(lambda r, *_: (r[0], None, r[2])), X, "1: it is zero", "gbd"),
    "zeros in bfloat16": (LONG_ONLY, ONE, "0, only in: bfloat16: it is zero", "b"),
    "padded mean": (PADDED, MASKED, "0: .*a factor 0.75", "gd"),
    "transposed": (linear(lambda r, *_: (r[0], r[1].T, r[2])), SQUARE, "1: transposed", "gbd"),
    "last row left out": (LAST_ROW, X, f"1: {ELSE}", "gb"),
    "one entry": (ENTRY, X, f"1: {ELSE}", "g"),
    "noise 1e-4": (NOISY, X, "0: a second backward pass returns something else", "g"),
    "cancellation": (CANCELS, (X[0] - 12,), "0, only in: float32.*: the error is larger", ""),
    "bias not summed": (linear(lambda r, g, *_: (*r[:2], g)), X, r"2: shape \[6, 5\] .*\[5\]", ""),
    "dtype": (linear(lambda r, *_: (r[0].float(), *r[1:])), X, "0: .* of torch.float32 where", ""),
    "ties": (EVERY_TIE, ONE, "0, only in: repeated rows: .*a factor 2 too much", ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    form, inputs, words, _ = MISTAKES[name]
    with pytest.raises(GradientError, match=f"input {words}"):
        check_function(form, *inputs).raise_if_wrong()


def gradients(function, inputs, dtype):
    """The copies of the inputs that require gradients, a random cotangent, the gradients."""
    leaves = converted(inputs, dtype)
    floating = [v.requires_grad_() for v in leaves if v.is_floating_point()]
    output = function(*leaves)
    cotangent = normal(*output.shape, seed=9).to(output)
    found = torch.autograd.grad(output, floating, cotangent, materialize_grads=True)
    return leaves, cotangent, found


def gradcheck_passes(function, plain, inputs):
    return torch.autograd.gradcheck(function, gradients(function, inputs, torch.float64)[0])


def bfloat16_passes(function, plain, inputs):
    """Compare with autograd through plain operations to rtol and atol 5e-2."""
    *_, found = gradients(function, inputs, torch.bfloat16)
    *_, right = gradients(plain, inputs, torch.bfloat16)
    return all(torch.allclose(f, r, 5e-2, 5e-2) for f, r in zip(found, right, strict=True))


def direction_passes(function, plain, inputs):
    """Compare with one central difference of step 1e-4 in float32, to rtol 5e-2."""
    leaves, cotangent, found = gradients(function, inputs, torch.float32)
    ways = [normal(*v.shape, seed=20 + k).to(v) * v.requires_grad for k, v in enumerate(leaves)]
    pairs = list(zip(converted(leaves, None), ways, strict=True))
    right, left = (function(*((v + h * w).to(v) for v, w in pairs)) for h in (1e-4, -1e-4))
    slope = float(((right - left) * cotangent).sum()) / 2e-4
    mine = sum(float((g * w).sum()) for g, w in zip(found, ways[: len(found)], strict=True))
    return abs(mine - slope) <= 5e-2 * abs(slope)


@pytest.mark.parametrize("name", MISTAKES)
def test_what_other_checks_find(name):
    form, inputs, _, letters = MISTAKES[name]
    function, found = pair_of(*form).apply, ""
    for check in (gradcheck_passes, bfloat16_passes, direction_passes):
        torch.manual_seed(0)
        try:
            passes = check(function, plain(form), inputs)
        except (RuntimeError, TypeError):
            passes = False
        found += "" if passes else check.__name__[0]
    assert found == letters


@pytest.mark.parametrize("refuses", [True, False])
def test_without_float64_differences_are_taken_in_float32(refuses):
    def forward(x):
        if refuses and x.dtype == torch.float64:
            raise TypeError("float32 only")
        return x.float().sin()

    def check(factor):
        backward = lambda g, x: factor * (g * x.cos()).to(x.dtype)  # noqa: E731
        return check_function((forward, backward), normal(6, 4))

    check(1).raise_if_wrong()
    assert check(1).lines()[-1] == "checked in torch.float32"
    assert "a factor 2 too much" in "\n".join(check(2).lines())


def test_what_a_forward_pass_refuses_is_no_mistake():
    def forward(x):
        if len(x) == 1:
            raise ValueError("two rows at least\nand more")
        return x.square()

    report = check_function((forward, lambda g, x: 2 * g * x), normal(6, 4))
    report.raise_if_wrong()
    assert report.cases["1 row"].note == "not supported: ValueError: two rows at least"
    everything = check_function((lambda x: x.no_such_method(), lambda g, x: g), normal(6, 4))
    assert "not supported: AttributeError" in everything.lines()[1] and not everything.ok
    with pytest.raises(ValueError, match="no input is a tensor of floating-point"):
        check_function(Linear, 3)


def test_what_cannot_be_seen_is_not_ok():
    assert not check_function((lambda x: 0 * x, lambda g, x: 0 * g), X[0]).ok
    assert not check_function(lambda x: x.square().detach(), X[0]).ok
    assert not check_function(lambda x: Linear.apply(x, *X[1:]) + x.detach().sum(), X[0]).ok


def test_a_complex_output_is_checked_by_its_parts():
    right = torch.fft.fft, lambda g, x: torch.fft.ifft(g).real * x.shape[-1]
    wrong = torch.fft.fft, lambda g, x: torch.fft.ifft(g).real
    assert check_function(right, normal(4, 6)).ok
    report = check_function(wrong, normal(4, 6))
    assert "0.166667 times the gradient" in "".join(report.lines())


def test_an_empty_input_is_left_alone():
    twice = (lambda x, _: 2 * x), (lambda g, x, _: (2 * g, torch.zeros(0)))
    assert check_function(twice, normal(4, 6), torch.zeros(0)).ok


class NeedsBoth(Function):
    """Its backward takes no output that is not used."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, g, h):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return g * x.cos() - h * x.sin()


def test_each_output_alone_is_a_case():
    lines = check_function(NeedsBoth, normal(5, 3)).lines()
    assert any("only in: output 0 alone, output 1 alone: raised TypeError" in s for s in lines)
    assert {"output 0 alone", "output 1 alone"} < check_function(
        SIN_COS, *2 * [normal(5, 3)]
    ).cases.keys()


def test_inputs_that_require_gradients_are_differentiated():
    report = check_function(Linear, X[0], X[1].clone().requires_grad_(), X[2])
    assert {p.name for case in report.cases.values() for p in case.parameters} == {"input 1"}


def test_state_is_left_as_it_was():
    masked = lambda x: Linear.apply(functional.dropout(x, 0.5), *X[1:])  # noqa: E731
    kept = [values.clone() for values in X]
    with torch.inference_mode():
        state = torch.get_rng_state()
        assert check_function(masked, X[0]).cases["as given"].ok
        assert torch.equal(torch.get_rng_state(), state) and not torch.is_grad_enabled()
    assert all(map(torch.equal, kept, X)) and not X[0].requires_grad


def test_the_table_is_aligned_and_says_each_mistake_once():
    *table, last = check_function(MISTAKES["factor 2"][0], *X).lines()
    place = table[0].index("verdict")
    assert {line[place:] for line in table[1:]} == {"ok", "WRONG"}
    assert last.startswith("input 1: 2 times the gradient of loss, a factor 2 too much")


class Product(Function):
    """x³ w, and where x > 0, with random signs that differ from call to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        sign = torch.rand_like(x).sub(0.5).sign()
        return sign * x**3 * w, x > 0, sign

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[2])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, g, *_):
        x, w, sign = ctx.saved_tensors
        return 3 * sign * g * x**2 * w, sign * g * x**3


def ruled(spoil=lambda found: found, move=Tensor.movedim):
    """The same by a rule of its own."""

    def vmap(info, dims, *inputs):
        first = [
            v.expand(info.batch_size, *v.shape) if d is None else move(v, d, 0)
            for v, d in zip(inputs, dims, strict=True)
        ]
        found = Plain.apply(*first)
        return (spoil(found[0]), *found[1:]), (0, 0, 0)

    rule = {"generate_vmap_rule": False}
    Plain = type("Plain", (Product,), rule)
    forward = staticmethod(lambda x, w: (x**3 * w, x > 0, torch.ones_like(x)))
    Plain.forward = forward
    return type("Ruled", (Product,), {**rule, "vmap": staticmethod(vmap), "forward": forward})


RULES = {
    "detached": (ruled(Tensor.detach), "gradient under vmap: it is zero"),
    "value": (ruled(lambda found: 2 * found), "value under vmap is another"),
    "where the rows are": (ruled(move=lambda v, d, _: v), "value under vmap is another"),
    "halved": (ruled(lambda f: f.detach() + f / 2), "value under vmap is another"),
    "slope": (ruled(lambda f: f.detach() / 2 + f / 2), "gradient under vmap: 0.5 times"),
    "raises": (ruled(lambda f: f.no_such()), "under vmap raised AttributeError"),
}


def test_a_function_that_claims_vmap_is_checked_under_it():
    for function in (Product, ruled()):
        report = check_function(function, SQUARE[0], SQUARE[0] + 1)
        report.raise_if_wrong()
        assert [p.name for p in report.cases["vmap"].parameters] == ["input 0", "input 1"]
        assert all(p.tested for p in report.cases["vmap"].parameters)
        drawn = (
            report.cases["float32"].note == "not compared: random numbers differ in torch.float64"
        )
        assert drawn == (function is Product)
    assert "vmap" not in check_function(Linear, *X).cases


@pytest.mark.parametrize("name", RULES)
def test_a_wrong_rule_of_vmap_is_named(name):
    function, words = RULES[name]
    report = check_function(function, SQUARE[0], SQUARE[0] + 1)
    with pytest.raises(GradientError, match=f"input 0, only in: vmap: .*{words}"):
        report.raise_if_wrong()


def logistic(p, y, gradient=1.0, hessian=1.0):
    q = p.sigmoid()
    return gradient * (q - y), hessian * q * (1 - q)


def softmax(p, y):
    q = p.softmax(1)
    return q - functional.one_hot(y, p.shape[1]), q * (1 - q)


SCORES, LABELS = normal(6), (normal(6, seed=1) > 0).double()
LOSS = partial(functional.binary_cross_entropy_with_logits, reduction="sum")


def test_right_objectives_pass():
    check_objective(logistic, SCORES, LABELS, LOSS).raise_if_wrong()
    loss, labels = partial(functional.cross_entropy, reduction="sum"), torch.arange(9) % 3
    check_objective(softmax, normal(9, 3).float(), labels, loss).raise_if_wrong()


@pytest.mark.parametrize(
    "part, factor, words",
    [
        ("hessian", -1, "the sign is wrong"),
        ("gradient", 0.5, "a factor 2 is missing"),
        ("hessian", torch.ones(2, 1), r"shape \[2, 6\] .* where shape \[6\]"),
    ],
)
def test_mistakes_of_objectives_are_named(part, factor, words):
    report = check_objective(partial(logistic, **{part: factor}), SCORES, LABELS, LOSS)
    with pytest.raises(GradientError, match=f"{part}: .*{words}"):
        report.raise_if_wrong()
