"""GradientCheck on modules whose copy is hard to make, or hard to compute with in float64."""

import gc
import weakref
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from any_modules import Batches, Doubled
from lightning.pytorch import seed_everything
from test_odd_modules import WARNS, Base, fit, rows, same_with_and_without
from torch import nn
from torch.nn import functional as F

from lightning_gd import GradientCheck, GradientError, check_gradients
from lightning_gd.gradcheck.graph import precision_seen
from lightning_gd.gradcheck.stepping import LENGTHS, step_length


class Helper:
    def __init__(self, function):
        self.function = function


class OverSelf(Base):
    """A function that its attributes hold refers to it: `deepcopy` copies no function."""

    hold: Any = staticmethod(lambda function: [function])

    def __init__(self, broken=False):
        super().__init__(broken)
        self.norm = nn.BatchNorm1d(8)

        def normed(x, scale=self.norm):
            return scale(torch.tanh(x))

        self.held = type(self).hold(lambda x: self.norm(normed(x)))

    def find(self):
        return self.held[0]

    def forward(self, x):
        return self.b(self.spoil(self.find()(self.a(x))))


class InADict(OverSelf):
    hold = staticmethod(lambda function: {"x": {"y": function}})

    def find(self):
        return self.held["x"]["y"]


class InAHelper(OverSelf):
    hold = staticmethod(lambda function: Helper(partial(function)))

    def find(self):
        return self.held.function


class Wrapped(Base):
    """The usual way to change what a layer does."""

    def __init__(self, broken=False):
        super().__init__(broken)
        old = self.a.forward
        self.a.forward = lambda input: old(input) * 2
        before = self.b.forward
        self.b.forward = MethodType(lambda layer, x: before(x) + layer.bias, self.b)


class HandCast(Base):
    """A product in bfloat16 by hand: its rounding hides the step of a difference."""

    kind = torch.bfloat16

    def forward(self, x):
        h = F.linear(x.to(self.kind), self.a.weight.to(self.kind), self.a.bias.to(self.kind))
        return self.b(self.spoil(torch.tanh(h).float()))


class HandCastHalf(HandCast):
    kind = torch.float16


class TwoDtypes(Base):
    """One layer lives in bfloat16."""

    def __init__(self, broken=False):
        super().__init__(broken)
        self.a = self.a.bfloat16()

    def forward(self, x):
        return self.b(self.spoil(torch.tanh(self.a(x.bfloat16())).float()))


class Float32Inside(Base):
    """As layers of language models do."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        h = (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + 1e-6)).to(h.dtype)
        return self.b(self.spoil(F.softmax(h, -1, dtype=torch.float32).to(h.dtype)))


class Compressed(Base):
    def __init__(self, broken=False):
        super().__init__(broken)
        self.links = torch.eye(5).to_sparse_csr()
        self.register_buffer("more_links", torch.eye(5).to_sparse())

    def forward(self, x):
        return super().forward((self.more_links @ (self.links @ x.T)).T)


class Lazy(Base):
    def __init__(self, broken=False):
        super().__init__(broken)
        self.a = nn.LazyLinear(8)


class Recorder:
    """What a hook has seen, with a method of its own among its attributes."""

    def __init__(self):
        self.seen: Any = None
        self.keep = self.save

    def save(self, module, inputs, output):
        self.seen = output


class Records(Base):
    """The loss reads what a hook of a helper has kept."""

    def __init__(self, broken=False):
        super().__init__(broken)
        self.recorder = Recorder()
        self.a.register_forward_hook(self.recorder.keep)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * self.recorder.seen.square().mean()


class TwoPartials(Base):
    def __init__(self, broken=False):
        super().__init__(broken)
        self.one = partial(lambda x, k: x * self.a.bias.sum() * k, k=0.1)
        self.two = partial(lambda x, k: x * self.b.bias.sum() * k, k=0.3)

    def forward(self, x):
        y = super().forward(x)
        return y + self.one(y) + self.two(y)


MODULES = [
    Records, TwoPartials,
    OverSelf, InADict, InAHelper, Wrapped, HandCast, HandCastHalf, TwoDtypes, Float32Inside,
    Compressed, Lazy,
]  # fmt: skip
IGNORED = (WARNS, "ignore:Sparse CSR", "ignore:Lazy modules", "ignore:A layer with Uninit")


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_a_right_module_passes_and_its_run_is_the_same(make_trainer, kind):
    assert all(same_with_and_without(make_trainer, kind).tested.values())


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_a_broken_one_is_found_at_once(make_trainer, kind):
    seed_everything(1, verbose=False)
    with pytest.raises(GradientError, match="update 0:(?s:.*)passes through Doubled"):
        fit(make_trainer, kind(broken=True), None, GradientCheck(2))


LEAF = torch.ones(5, requires_grad=True)
SHARED = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))


class OverAGlobal(Base):
    """No copy can know of it: neither its parameters nor its buffers may change."""

    def forward(self, x):
        return super().forward(SHARED(x) * LEAF)


@pytest.mark.filterwarnings(WARNS)
def test_the_gradients_of_what_is_not_copied_stay_as_they_are(make_trainer):
    leaves = [*SHARED.parameters(), LEAF]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    check_gradients(OverAGlobal(), (rows()[0][0], rows()[0][1]))
    assert not any(leaf.grad.any() for leaf in leaves if leaf.grad is not None)


class Shorter(torch.autograd.Function):
    """Its backward is 2.5 % too large."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2.05 * g


class TwoBranches(HandCast):
    """A branch in bfloat16 has nothing to do with the Function in the other."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + Shorter.apply(self.b(batch[0] @ self.a.weight.T)).square().mean()


def test_another_branch_in_bfloat16_hides_no_mistake(make_trainer):
    with pytest.raises(GradientError, match="update 0:(?s:.*)passes through Shorter"):
        fit(make_trainer, TwoBranches(), None, GradientCheck(2))


def test_checks_leave_no_memory_behind():
    """A node of autograd that nothing leads to must not keep what it saved."""
    with precision_seen():
        y = torch.randn(10, requires_grad=True).sigmoid()
        saved = weakref.ref(y)
        del y
    gc.collect()
    assert saved() is None


class Script(Base):
    def __init__(self):
        super().__init__()
        self.a = torch.jit.script(self.a)


class TakesTheIterator(Base):
    def training_step(self, dataloader_iter):  # pyright: ignore
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is", "ignore:.*dataloader_iter")
@pytest.mark.parametrize(
    "kind, words", [(Script, "before they are scripted"), (TakesTheIterator, "dataloader_iter")]
)
def test_what_cannot_be_checked_is_refused(make_trainer, kind, words):
    with pytest.raises(ValueError, match=words):
        fit(make_trainer, kind(), None, GradientCheck(2))


class Remembers(Base):
    """Its hidden state goes from batch to batch."""

    hidden: Any = None

    def __init__(self, broken=False):
        super().__init__(broken)
        self.net = nn.GRUCell(5, 3)

    def training_step(self, batch, batch_idx):
        self.hidden = self.net(batch[0], self.hidden)
        loss = F.mse_loss(self.spoil(self.hidden), batch[1])
        self.hidden = self.hidden.detach()
        return loss


def test_a_module_with_a_state_is_not_called_stale(make_trainer):
    with pytest.raises(GradientError, match="a factor 2 too much; it passes through Doubled"):
        fit(make_trainer, Remembers(broken=True), None, GradientCheck(2))


class Tasks(Base):
    """Only every second batch passes a wrong backward."""

    def training_step(self, batch, batch_idx):
        h = torch.tanh(self.a(batch[0]))
        return F.mse_loss(self.b(Doubled.apply(h) if batch_idx % 2 else h), batch[1])


def test_each_check_looks_at_another_accumulated_batch(make_trainer):
    with pytest.raises(GradientError, match="update 1:(?s:.*)a factor 2 too much"):
        trainer = make_trainer(max_steps=3, precision="32-true", callbacks=[GradientCheck(1)],
                               accumulate_grad_batches=2)  # fmt: skip
        trainer.fit(Tasks(), Batches(rows()))


class Options(Base):
    options: Any = {}

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 5, **self.options)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(self.embedding(batch[4])), batch[1])


@pytest.mark.filterwarnings(WARNS)
@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_options_of_embeddings_that_change_the_gradient_are_named(make_trainer, options):
    (name, value), module = *options.items(), type("Embeds", (Options,), {"options": options})()
    with pytest.raises(GradientError, match=f"embedding.weight: {name}={value} gives another"):
        fit(make_trainer, module, None, GradientCheck(2))


class Contrastive(nn.Module):
    """A bounded loss: far from its weights exp(t) is infinite, and clamp makes 0·inf of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.t = nn.Parameter(torch.tensor(2.6593))

    def forward(self, x):
        return F.normalize(self.b(torch.tanh(self.a(x))), dim=1)

    def loss(self, one, two):
        scores = self(one) @ self(two).T * self.t.exp().clamp(max=100)
        return F.cross_entropy(scores, torch.arange(len(one)))


@pytest.mark.parametrize("seed", [21, 27, 47, 55, 77])  # wrong if it goes to the largest length
def test_a_bounded_loss_is_not_moved_far(seed):
    torch.manual_seed(seed)
    model, x = Contrastive(), torch.randn(8, 5)
    assert check_gradients(model, x, x + 0.1 * torch.randn(8, 5), seed=seed).ok


CHANGES = {  # of a loss by a length, and the length that is found for a change of 1
    "linear": (lambda length: length / 4, 4.0),
    "quadratic": (lambda length: length**2, 1.0),
    "bounded": (lambda length: 0.8 * min(length / 8, 1.0), 4.0),  # half of what there is
    "constant": (lambda length: 0.0, LENGTHS[-1]),
    "leaps": (lambda length: 0.5 if length < 4 else 1e9, 2.0),
    "ends": (lambda length: 0.5 if length < 4 else float("nan"), 2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_is_as_long_as_it_must_be(name):
    change, expected = CHANGES[name]
    assert step_length(change, 1.0) == expected
