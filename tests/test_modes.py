"""Both modes make the same updates, for settings, batches and parameters of every kind."""

from typing import Any

import pytest
import torch
from conftest import RandomRows, Rows, line, normal, scheduled
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

from lightning_gd import GradientDescentModule, LinearRegression, PointsData

# Of a DataLoader without validation rows, on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
# Updates of size lr·gradient in float64 differ between the modes by the rounding of a sum over
# at most 50 rows; 60 updates that contract keep that below 1e-12 of weights of order 1.
CLOSE = {"rtol": 0, "atol": 1e-12}
MODES = ("explicit", "autograd")


def train(trainer, model, data, **where):
    """The weights after `max_steps` updates."""
    trainer.fit(model.double(), data, **where)
    assert trainer.max_steps in (-1, trainer.global_step)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


SETTINGS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "clip norm": {"momentum": 0.5, "gradient_clip_val": 0.5},
    "clip value": {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"},
    "adam": {"optimizer": "Adam"},
    "frozen bias": {"bias": False},
    "nesterov": {"momentum": 0.9, "optimizer_args": {"nesterov": True}},
    "schedule by update": scheduled("StepLR", "update", step_size=7, gamma=0.7),
    "schedule by epoch": {"momentum": 0.3, **scheduled("ExponentialLR", gamma=0.8)},
    "plateau": scheduled("ReduceLROnPlateau", patience=0, threshold=0.9, factor=0.5),
    "plateau by update": scheduled(
        "ReduceLROnPlateau", "update", patience=3, threshold=0.9, factor=0.7
    ),
}
DATA = {
    "full batch": {"passes_per_epoch": 20},
    "mini-batches": {"batch_size": 8},
    "validation": {"batch_size": 5, "num_val": 4},
}
SHAPED = {name for name in SETTINGS if "plat" in name or "epoch" in name}  # by where epochs end


@pytest.mark.parametrize(
    "name, data",
    [(name, data) for name in SETTINGS for data in DATA if name in SHAPED or data != "validation"],
)
def test_modes_and_updates_per_step_make_the_same_updates(make_trainer, name, data):
    """59 updates end inside a step and inside an epoch."""
    settings, data = SETTINGS[name], DATA[data]

    def end(mode="explicit", **how):
        model = line(gradient=mode, **settings)
        return train(make_trainer(max_steps=59), model, RandomRows(**data, **how))

    single = end()
    torch.testing.assert_close(single, end("autograd"), **CLOSE)
    for updates in (4, 7, 100):
        assert torch.equal(single, end(updates_per_step=updates))
    plain = train(make_trainer(max_steps=59), line(), RandomRows(**data))
    assert settings == {} or (single - plain).abs().max() > 1e-6
    assert settings.get("bias", True) or single[-1] == 0


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("gradient", MODES)
def test_precisions(make_trainer, precision, gradient):
    trainer = make_trainer(max_steps=200, precision=precision)
    with trainer.init_module():
        model = LinearRegression(gradient=gradient, lr=0.05, momentum=0.5)
    trainer.fit(model, datamodule=PointsData(passes_per_epoch=200))
    assert model.weight.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    # bfloat16 predictions carry 8 bits: 2 % in autograd mode; the formula keeps float32.
    tolerance = 0.02 if (precision, gradient) == ("bf16-mixed", "autograd") else 1e-3
    assert abs(model.weight.item() - 2) < 2 * tolerance
    assert abs(model.bias.item()) < 6 * tolerance


# Models and batches of other kinds


class Softmax(GradientDescentModule):
    """Class numbers y [N] of images x [N, 1, 2, 3]; submodule, frozen parameter and buffer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("shift", torch.arange(6.0))
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)

    def inputs(self, x):
        return self.scale * x.flatten(1) + self.shift

    def forward(self, x):
        return self.layer(self.inputs(x))

    def loss(self, x, y):
        return cross_entropy(self(x), y)

    def gradients(self, x, y):
        d = (self(x).softmax(1) - one_hot(y, 4)) / len(y)
        return {"layer.weight": d.T @ self.inputs(x), "layer.bias": d.sum(0)}


class Columns(GradientDescentModule):
    """K targets per row: y [N, K]."""

    def __init__(self, targets=2, **kwargs):
        super().__init__(**kwargs)
        self.weight = nn.Parameter(torch.zeros(targets, 3))

    def forward(self, x):
        return x @ self.weight.T

    def loss(self, x, y):
        return (self(x) - y).square().sum(1).mean()

    def gradients(self, x, y):
        return {"weight": 2 / len(y) * (self(x) - y).T @ x}


class Centre(GradientDescentModule):
    """A tensor x [N, 3] alone: L = 1/N Σ |x − c|²."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.centre = nn.Parameter(torch.zeros(3))

    def loss(self, x):
        return (x - self.centre).square().sum(1).mean()

    def gradients(self, x):
        return {"centre": 2 * (self.centre - x.mean(0))}


class Tokens(Centre):
    """Σ w (x − c)² / Σ w over padded sequences x [N, 3], whose padding has the weight w = 0."""

    def loss(self, x, w):
        return ((x - self.centre).square() * w).sum() / w.sum()

    def gradients(self, x, w):
        return {"centre": (2 * (self.centre - x) * w).sum(0) / w.sum()}

    def rows(self, batch):
        return float(batch["w"].sum())


class Summed(Centre):
    """A sum over the rows: the mean over batches weighs each as 1."""

    def loss(self, x):
        return super().loss(x) * len(x)

    def gradients(self, x):
        return {"centre": super().gradients(x)["centre"] * len(x)}

    def rows(self, batch):
        return 1


class Halved(LinearRegression):
    """Overrides the two formulas alone, not the one-pass form of its parent."""

    def __init__(self, **kwargs):
        super().__init__(num_features=3, **kwargs)

    def loss(self, x, y):
        return super().loss(x, y) / 2

    def gradients(self, x, y):
        return {name: gradient / 2 for name, gradient in super().gradients(x, y).items()}


X, Y, T = normal(23, 3), normal(23, 2, seed=1), normal(23, seed=2)
KINDS: dict[type[GradientDescentModule], Any] = {
    Softmax: (normal(23, 1, 2, 3), torch.arange(23) % 4),
    Columns: (X, Y),
    Centre: X,
    Tokens: {"x": X, "w": X.clamp(min=0)},
    Summed: X,
    Halved: (X, T),
}
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def loader(batches: Any):
    return DataLoader(batches, batch_size=None)


def batches_of(content, *sizes):
    """A DataLoader of batches of these sizes."""
    if isinstance(content, tuple):
        return loader(list(zip(*(part.split(sizes) for part in content), strict=True)))
    if isinstance(content, dict):
        rows = zip(*(part.split(sizes) for part in content.values()), strict=True)
        return loader([dict(zip(content, row, strict=True)) for row in rows])
    return loader(content.split(sizes))


@kinds
def test_any_batch_and_any_parameter(make_trainer, kind):
    models = [kind(lr=0.02, momentum=0.5, gradient=mode) for mode in MODES]
    three = batches_of(KINDS[kind], 11, 5, 7)
    explicit, autograd = (train(make_trainer(max_steps=20), model, three) for model in models)
    torch.testing.assert_close(explicit, autograd, **CLOSE)
    assert all(p.abs().max() > 1e-3 for p in models[0].parameters())  # from zeros
    if kind is Softmax:  # neither trained nor lost
        state, first = models[0].state_dict(), kind().state_dict()
        assert list(state) == ["scale", "shift", "layer.weight", "layer.bias"]
        assert all(torch.equal(state[name], first[name]) for name in ("scale", "shift"))
        assert models[0].scale.grad is None


@kinds
def test_accumulation_divides_once_by_all_rows(make_trainer, kind):
    """Batches of 4, 5, 2 and 4, 6, 2 rows, 3 per update, are batches of 11 and 12."""
    small = batches_of(KINDS[kind], 4, 5, 2, 4, 6, 2)
    model = kind(lr=0.02, momentum=0.5, accumulate_grad_batches=3)
    accumulated = train(make_trainer(max_steps=7), model, small)
    if kind is Summed:  # the mean of the sums, as by the Trainer
        other = kind(lr=0.02, momentum=0.5, gradient="autograd")
        expected = train(make_trainer(max_steps=7, accumulate_grad_batches=3), other, small)
    else:
        large = batches_of(KINDS[kind], 11, 12)
        expected = train(make_trainer(max_steps=7), kind(lr=0.02, momentum=0.5), large)
    torch.testing.assert_close(accumulated, expected, **CLOSE)


@pytest.mark.parametrize("kind", [Softmax, Columns], ids=lambda kind: kind.__name__)
def test_tables_of_any_form_and_accumulation(make_trainer, kind):
    def end(mode="explicit", a=1, trainers=1, **data) -> torch.Tensor:
        model = kind(lr=0.02, momentum=0.5, gradient=mode, accumulate_grad_batches=a)
        trainer = make_trainer(max_steps=21, accumulate_grad_batches=trainers)
        return train(trainer, model, Rows(*KINDS[kind], **data))

    single = end(batch_size=5)
    torch.testing.assert_close(single, end("autograd", batch_size=5), **CLOSE)
    assert torch.equal(single, end(batch_size=5, updates_per_step=4))
    # 8, 8 and 7 rows in one update are the full batch; of 5 batches the last 2 are an update.
    full = end()
    for updates in (1, 4):
        found = end(a=3, batch_size=8, updates_per_step=updates)
        torch.testing.assert_close(found, full, **CLOSE)
    assert torch.equal(end(a=3, batch_size=5), end(a=3, batch_size=5, updates_per_step=4))
    # 20 rows are 4 equal batches, for which the Trainer's mean of means is the mean.
    larger = end(batch_size=10, num_val=3)
    ways: list[dict[str, Any]] = [{"mode": "autograd", "trainers": 2}, {"a": 2}]
    for how in ways:
        torch.testing.assert_close(end(batch_size=5, num_val=3, **how), larger, **CLOSE)


REFUSED = {
    "prediction [N], y [N, 1]": (line, {}, X, T[:, None], r"returns \[N\] .* y \[N, 1\]"),
    "prediction [N, 1], y [N]": (Columns, {"targets": 1}, X, T, r"returns \[N, 1\] .* y \[N\]"),
    "another number of rows": (line, {}, X, T[:5], r"x \[23, 3\] and y \[5\]"),
    "float32": (line, {}, X.float(), T, r"x is torch.float32 .* weights are torch.float64"),
}


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("make, settings, x, y, words", REFUSED.values(), ids=REFUSED)
def test_a_batch_that_cannot_be_meant_is_refused(
    make_trainer, gradient, make, settings, x, y, words
):
    model = make(gradient=gradient, **settings)
    with pytest.raises(ValueError, match=words):
        trainer = make_trainer(max_steps=1, precision="32-true")
        train(trainer, model, loader([(x, y)]))
