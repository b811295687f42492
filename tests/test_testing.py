"""The tests that people inherit: on the models of this package, and on modules with mistakes."""

import any_modules
import pytest
import test_modes
import torch
from any_modules import Plain
from test_models import each_choice
from torch import nn
from torch.nn import functional as F

from lightning_gd.testing import GradientTests

TESTS = [name for name in vars(GradientTests) if name.startswith("test_")]


class OfModel(GradientTests):
    """One of the models of this package, in explicit mode or by autograd."""

    def __init__(self, cls, **settings):
        self.cls, self.settings = cls, settings

    def module(self):
        model = self.cls.example_batch()[0]
        return self.cls(**{**model.hparams, "momentum": 0.9, "lr": 0.01, **self.settings})

    def batch(self):
        return self.cls.example_batch()[1:]


class OfKind(OfModel):
    """A model with another kind of batch or parameter."""

    def module(self):
        return self.cls(momentum=0.9, lr=0.01, **self.settings)

    def batch(self):
        return test_modes.KINDS[self.cls]


@pytest.mark.parametrize("gradient", test_modes.MODES)
@pytest.mark.parametrize("test", [name for name in TESTS if "two_processes" not in name])
def test_the_models_pass(model_class, test, gradient):
    getattr(OfModel(model_class, gradient=gradient), test)()


def test_every_choice_of_a_model_has_the_right_gradient(model_class):
    for choices in each_choice(model_class):
        OfModel(model_class, **choices).test_the_gradient_is_right()


@pytest.mark.parametrize("test", [name for name in TESTS if "two_processes" not in name])
@pytest.mark.parametrize("kind", test_modes.KINDS, ids=lambda kind: kind.__name__)
def test_other_kinds_of_models_pass(kind, test):
    getattr(OfKind(kind), test)()


def linear_loss(found, y):
    return F.mse_loss(found[:, 0], y)


class TestForeign(GradientTests):
    def module(self):
        return Plain(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), linear_loss)

    def batch(self):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)


class TestByHand(GradientTests):
    loss = ["maker_loss", "judge_loss"]
    test_two_processes_make_the_updates_of_one = None  # pyright: ignore[reportAssignmentType]

    def module(self):
        return any_modules.GAN()

    def batch(self):
        torch.manual_seed(3)
        return any_modules.noise()


class Counts(Plain):
    """Keeps a number that no checkpoint holds."""

    seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return super().training_step(batch, batch_idx) / self.seen


class Sums(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * len(batch[0])


class Broken(TestForeign):
    """Each test on a module with the mistake that it is there for."""

    def __init__(self, cls):
        self.cls = cls

    def module(self):
        return self.cls(nn.Linear(3, 1), linear_loss)


class OfBytes(GradientTests):
    """It asks for float32, where a run in float64 has a layer of float64."""

    precision, tolerance = "32-true", 1e-5  # sums of 8 rows round by 1e-7 in float32

    def module(self):
        return Plain(nn.Sequential(Floats(), nn.Linear(3, 1)), linear_loss)

    def batch(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(0, 256, (8, 3), generator=generator, dtype=torch.uint8)
        return x, torch.randn(8, generator=generator)


class Floats(nn.Module):
    def forward(self, x):
        return x.float() / 255


@pytest.mark.parametrize("test", [name for name in TESTS if "two_processes" not in name])
def test_a_module_that_asks_for_float32_has_a_precision(monkeypatch, test):
    getattr(OfBytes(), test)()
    monkeypatch.setattr(OfBytes, "precision", "64-true")
    with pytest.raises(RuntimeError, match="set precision = '32-true'"):
        getattr(OfBytes(), test)()


def spoilt():
    module = TestForeign().module()
    any_modules.spoil(module, "net.0")
    return module


def test_each_test_can_fail(monkeypatch):
    tests = TestForeign()
    monkeypatch.setattr(tests, "module", spoilt)
    with pytest.raises(ValueError, match="passes through Doubled"):
        tests.test_the_gradient_is_right()
    with pytest.raises(AssertionError, match="resumed run ends in other (?s:.*)net.bias"):
        Broken(Counts).test_a_resumed_run_ends_like_an_uninterrupted_one()
    monkeypatch.setattr("lightning_gd.testing.doubled", lambda module, name: module)
    with pytest.raises(AssertionError, match="not noticed: net.0.weight, net.0.bias, net.2"):
        TestForeign().test_each_mistake_is_noticed()


@pytest.mark.slow
def test_two_processes_can_differ():
    with pytest.raises(AssertionError, match="two processes ends in other (?s:.*)net.bias"):
        Broken(Sums).test_two_processes_make_the_updates_of_one()


class TestUncut(TestForeign):
    """Its batch is not cut, so that the test with two processes skips itself."""

    def module(self):
        return Plain(nn.EmbeddingBag(5, 2))

    def batch(self):
        return torch.tensor([0, 3, 1, 4]), torch.tensor([0, 1]), torch.tensor([1, 0])


@pytest.mark.slow
def test_the_models_on_two_processes(model_class):
    OfModel(model_class).test_two_processes_make_the_updates_of_one()
