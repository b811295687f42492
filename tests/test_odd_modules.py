"""GradientCheck on modules that people write and few tests have: no false alarm, no miss."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from any_modules import Batches, Doubled
from lightning.pytorch import LightningModule, seed_everything
from torch import distributions, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_gd import GradientCheck, GradientError, check_gradients
from lightning_gd.gradcheck.bench import Bench
from lightning_gd.gradcheck.check import loss_of_step
from lightning_gd.gradcheck.graph import precision_seen
from lightning_gd.gradcheck.precision import eager
from lightning_gd.gradcheck.randomness import RandomState
from lightning_gd.gradcheck.twin import converted, twin

WARNS = "ignore:GradientCheck"


class Base(LightningModule):
    """Two layers, whose loss a subclass changes; `broken` doubles a gradient in between."""

    def __init__(self, broken=False):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.spoil: Any = Doubled.apply if broken else (lambda x: x)

    def forward(self, x):
        return self.b(self.spoil(torch.tanh(self.a(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class GradientPenalty(Base):
    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        y = self(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return F.mse_loss(y, batch[1]) + (slope.norm(dim=1) - 1).square().mean()


class Anneals(Base):
    """Its own hook comes after that of a callback."""

    beta, noise = 0.0, None

    def on_train_batch_start(self, batch, batch_idx):
        self.beta, self.noise = (self.global_step + 1) / 4, torch.randn(8, 3)
        batch[0].mul_(0.5)

    def training_step(self, batch, batch_idx):
        y = self(batch[0])
        return F.mse_loss(y + self.noise, batch[1]) + self.beta * y.square().mean()


class Scale(Base):
    """A step of the weights may leave the domain of the loss."""

    def __init__(self, broken=False):
        super().__init__(broken)
        self.sigma = nn.Parameter(torch.ones(3) / 2)

    def training_step(self, batch, batch_idx):
        return -distributions.Normal(self(batch[0]), self.sigma).log_prob(batch[1]).mean()


class Inverse(Base):
    def __init__(self, broken=False):
        super().__init__(broken)
        self.mix = nn.Parameter(torch.eye(5) + 0.1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0] @ torch.linalg.inv(self.mix)), batch[1])


class Binary(Base):
    """A change of the targets in their last digit leaves the domain of the loss."""

    def training_step(self, batch, batch_idx):
        target = (batch[1] > 0).to(batch[1])
        return -distributions.Bernoulli(logits=self(batch[0])).log_prob(target).mean()


class LabelsInTheTable(Base):
    def training_step(self, batch, batch_idx):
        table = batch[2]
        return F.cross_entropy(self(table[:, :5]), table[:, 5].long())


class Bytes(Base):
    """It asks for float32, so that a copy in float64 does not run as it is."""

    def __init__(self, broken=False):
        super().__init__(broken)
        self.a, self.b = nn.Linear(3072, 32), nn.Linear(32, 10)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[3].float() / 255), batch[4])


class Float32AtTheEnd(Base):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).float()


class FrozenFunction(torch.autograd.Function):
    """x (w + d), with a factor for the gradient of d that holds where w is frozen."""

    factor = 1.0

    @staticmethod
    def forward(ctx, x, w, d):
        ctx.save_for_backward(x, w, d)
        return x @ (w + d).T

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, d = ctx.saved_tensors
        frozen = not ctx.needs_input_grad[1]
        return g @ (w + d), None if frozen else g.T @ x, g.T @ x * FrozenFunction.factor**frozen


class FrozenBase(Base):
    def __init__(self, broken=False):
        super().__init__()
        FrozenFunction.factor = 2.0 if broken else 1.0
        self.base = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.u, self.v = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 5))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(FrozenFunction.apply(batch[0], self.base, self.u @ self.v), batch[1])


class Reentrant(Base):
    """`autograd.grad` does not work through it."""

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        return F.mse_loss(checkpoint(self, x, use_reentrant=True), batch[1])


class Closure(Base):
    """A function that holds the module itself, and a hook that does."""

    seen: torch.Tensor

    def __init__(self, broken=False):
        super().__init__(broken)
        self.scale = nn.Parameter(torch.ones(()))
        self.act: Any = lambda x: torch.tanh(x) * self.scale
        self.register_buffer("seen", torch.zeros(()))

        def hook(module, args, output):
            self.seen.mul_(0.9).add_(output.detach().mean())

        self.a.register_forward_hook(hook)

    def forward(self, x):
        return self.b(self.spoil(self.act(self.a(x))))


class OwnGenerator(Base):
    def __init__(self, broken=False):
        super().__init__(broken)
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return F.mse_loss(self(x + noise), batch[1])


class OwnAutocast(Base):
    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", torch.bfloat16):
            y = self(batch[0])
        return F.mse_loss(y.float(), batch[1])


class Embedded(Base):
    """The row of the padding gets no gradient by design; another gradient is sparse."""

    def __init__(self, broken=False):
        super().__init__(broken)
        self.padded, self.sparse = (
            nn.Embedding(10, 5, padding_idx=0),
            nn.Embedding(10, 5, sparse=True),
        )

    def training_step(self, batch, batch_idx):
        tokens = batch[4][:, None] + torch.tensor([0, -1, -2])
        tokens = tokens.clamp(min=0)
        return F.mse_loss(self((self.padded(tokens) + self.sparse(tokens)).mean(1)), batch[1])


class FillsABuffer(Base):
    def __init__(self, broken=False):
        super().__init__(broken)
        self.register_buffer("state", None)

    def training_step(self, batch, batch_idx):
        y = self(batch[0]) + (0.0 if self.state is None else self.state)
        self.state = y.detach().mean(0)
        return F.mse_loss(y, batch[1])


class HoldsData(Base):
    """Its data are not copied at each of many calls."""

    def __init__(self, broken=False):
        super().__init__(broken)
        self.data, self.rows = TensorDataset(torch.randn(9, 2)), [[float(k)] for k in range(20_000)]


class ChangesTheRun(Base):
    """What a copy does to the Trainer is undone."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.trainer.should_stop = bool(loss > 100)
        self.optimizers().param_groups[0]["lr"] = 0.05 / (1 + loss.item())  # pyright: ignore
        return loss


MODULES = [
    GradientPenalty, Anneals, Scale, Inverse, Binary, LabelsInTheTable, Bytes, Float32AtTheEnd,
    FrozenBase, Reentrant, Closure, OwnGenerator, OwnAutocast, Embedded, FillsABuffer, HoldsData,
    ChangesTheRun,
]  # fmt: skip


def rows():
    found = []
    for _ in range(6):
        x, y, label = torch.randn(8, 5), torch.randn(8, 3), torch.randint(0, 3, (8,))
        table = torch.cat([x, label[:, None].float()], 1)
        found.append((x, y, table, torch.randint(0, 256, (8, 3072)).byte(), label))
    return found


def fit(make_trainer, module, batches=None, *callbacks, **settings):
    trainer = make_trainer(max_steps=6, precision="32-true", callbacks=list(callbacks), **settings)
    trainer.fit(module, Batches(batches or rows()))
    return module.state_dict()


def same_with_and_without(make_trainer, kind):
    """Train with and without a check, which must change nothing, to the bit; return the check."""
    ends, check = [], GradientCheck(2)
    for callbacks in ((), (check,)):
        seed_everything(1, verbose=False)
        ends.append(fit(make_trainer, kind(), None, *callbacks))
    one, other = ({name: value.to_dense() for name, value in end.items()} for end in ends)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert check.checks >= 4
    return check


@pytest.mark.filterwarnings(WARNS, "ignore:None of the inputs")
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_a_right_module_passes_and_its_run_is_the_same(make_trainer, kind):
    assert any(same_with_and_without(make_trainer, kind).tested.values())


@pytest.mark.filterwarnings(WARNS, "ignore:None of the inputs")
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_a_broken_one_is_found_at_once(make_trainer, kind):
    seed_everything(1, verbose=False)
    with pytest.raises(GradientError, match="update 0:(?s:.*)WRONG"):
        fit(make_trainer, kind(broken=True), None, GradientCheck(2))


class Patch(Base):
    """What is trained is a tensor that is no parameter."""

    def __init__(self):
        super().__init__()
        self.patch = torch.zeros(8, 5, requires_grad=True)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0] + self.patch), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([self.patch], 0.05)


def test_an_optimizer_without_parameters_of_the_module_is_said(make_trainer):
    check = GradientCheck(2)
    with pytest.warns(UserWarning, match="1 tensors of the optimizer are no parameters of it"):
        fit(make_trainer, Patch(), None, check)
    assert check.summary() == "nothing was checked"


class Adversaries(LightningModule):
    """Two optimizers, whose losses draw random numbers one after the other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = nn.Linear(4, 5), nn.Linear(5, 1)

    def judge_loss(self, batch):
        made = self.maker(torch.randn(8, 4)).detach()
        return (F.softplus(-self.judge(batch[0])) + F.softplus(self.judge(made))).mean()

    def maker_loss(self, batch):
        return F.softplus(-self.judge(self.maker(torch.randn(8, 4)))).mean()

    def training_step(self, batch, batch_idx):
        losses = (self.judge_loss, self.maker_loss)
        optimizers: Any = self.optimizers()
        for optimizer, loss in zip(optimizers, losses, strict=True):
            value = loss(batch)
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.judge, self.maker)]


def test_two_losses_that_draw_random_numbers(make_trainer):
    check = GradientCheck(2, loss=["judge_loss", "maker_loss"])
    fit(make_trainer, Adversaries(), None, check)
    assert check.checks == 6 and all(check.tested.values())


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor

    def to(self, device):
        return Frozen(self.x.to(device), self.y.to(device))


class Plain:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return self


class OfObjects(Base):
    def training_step(self, batch, batch_idx):
        x = torch.tanh(batch.x)
        if isinstance(batch, Plain):
            batch.x = x  # seen by the next call, unless that has its own
        return F.mse_loss(self(x), batch.y)


@pytest.mark.parametrize("kind", [Frozen, Plain])
def test_batches_of_other_classes(make_trainer, kind):
    check, batches = GradientCheck(2), [kind(x, y) for x, y, *_ in rows()]
    fit(make_trainer, OfObjects(), batches, check)
    assert check.checks >= 4 and all(check.tested.values())
    with pytest.raises(GradientError, match="update 0"):
        fit(make_trainer, OfObjects(broken=True), batches, GradientCheck(2))


class OfSequences(Base):
    def __init__(self, broken=False):
        super().__init__(broken)
        self.net = nn.GRU(5, 3)

    def training_step(self, batch, batch_idx):
        return self.spoil(self.net(batch)[1]).square().mean()


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_packed_sequences_are_checked_in_float64(make_trainer):
    parts = [[torch.randn(n, 5) for n in (4, 3, 1)] for _ in range(6)]
    check, batches = GradientCheck(2), [nn.utils.rnn.pack_sequence(part) for part in parts]
    fit(make_trainer, OfSequences(), batches, check)  # a note on the precision is an error here
    assert check.tested["net.weight_ih_l0"] == check.checks >= 4
    with pytest.raises(GradientError, match="update 0"):
        fit(make_trainer, OfSequences(broken=True), batches, GradientCheck(2))


class LeavesOut(Anneals):
    """Its own hook leaves out the first epoch."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        return -1 if self.current_epoch == 0 else None


def test_a_step_that_is_left_out_leaves_nothing_behind(make_trainer):
    module, check = LeavesOut(), GradientCheck(2)
    fit(make_trainer, module, None, check)
    assert check.checks >= 4 and all(check.tested.values())
    module = LeavesOut()
    trainer = make_trainer(max_epochs=1, precision="32-true", callbacks=[GradientCheck(2)])
    trainer.fit(module, Batches(rows()))
    assert trainer.global_step == 0 and "training_step" not in vars(module)


@pytest.mark.parametrize("kind", [Inverse, GradientPenalty])
def test_graphs_are_kept_only_for_a_loss_that_needs_them(kind):
    """A matrix that is singular at zeros raises the same error type as a loss without a graph."""
    torch.manual_seed(1)
    loss = partial(loss_of_step, batch_idx=0)
    bench = Bench(twin(kind(), torch.float64), rows()[0], loss, RandomState.seeded(0))
    with eager(torch.float64):
        bench.batch = converted(bench.batch, torch.float64)
        bench.moved(bench.loss(bench.start))
    assert bench.with_graph == (kind is GradientPenalty)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_a_shorter_dtype_widens_a_bound(dtype):
    x = torch.randn(4, 5, requires_grad=True)
    with precision_seen() as seen:
        x.to(dtype).square().sum()
    assert max(seen) == torch.finfo(dtype).eps


class Lock(Base):
    """It cannot be copied from the second step on."""

    def training_step(self, batch, batch_idx):
        self.kept = (k for k in range(3))
        return super().training_step(batch, batch_idx)


def test_what_cannot_be_checked_ends_no_run_that_only_warns(make_trainer):
    with pytest.warns(UserWarning, match="could not be checked: 1: .*cannot be copied"):
        fit(make_trainer, Lock(), None, GradientCheck(2, on_error="warn"))
    with pytest.raises(ValueError, match="cannot be copied"):
        fit(make_trainer, Lock(), None, GradientCheck(2))


def test_complex_parameters_are_refused(make_trainer):
    module = Base()
    module.register_parameter("z", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="cannot check Base: it has complex parameters"):
        fit(make_trainer, module, None, GradientCheck(2))


def test_a_helper_named_gradients_is_no_formula():
    class Physics(nn.Linear):
        def gradients(self, u, x):
            raise AssertionError

    found = check_gradients(
        Physics(2, 1), torch.randn(4, 2), loss=lambda m, b: m(b).square().mean()
    )
    assert found.ok
