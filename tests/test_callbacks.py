"""Reports and checks during a fit, against values found another way."""

from typing import Any

import pytest
import torch
from test_roads import RandomRows

from lightning_gd import LinearRegression, PointsData
from lightning_gd.callbacks.curvature_report import CurvatureReport
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.callbacks.pictures import CurveMemory
from lightning_gd.gradcheck import GradientError
from lightning_gd.models.mlp import ParityMLP
from lightning_gd.module import GradientDescentModule


def fit(trainer, data: Any = None, model_class: Any = LinearRegression, **settings: Any) -> Any:
    with trainer.init_module():
        model = model_class(**{"num_features": 3, "start": "uniform", "lr": 0.02, **settings})
    trainer.fit(model, datamodule=data or RandomRows(passes_per_epoch=50))
    return model


class Planted(LinearRegression):
    """A correct formula times `factor`, on the road that training takes."""

    factor = 1.0

    def gradients(self, x, y):
        return {n: self.factor * g for n, g in super().gradients(x, y).items()}


MISTAKES = {"factor 2": 2.0, "factor ½": 0.5, "sign": -1.0}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_stops_the_fit_and_is_named(make_trainer, monkeypatch, mistake):
    monkeypatch.setattr(Planted, "factor", MISTAKES[mistake])
    trainer = make_trainer(max_steps=50, callbacks=[GradientCheck()])
    with pytest.raises(GradientError, match="at update 0") as error:
        fit(trainer, model_class=Planted)
    words = {"factor 2": "2 times", "factor ½": "0.5 times", "sign": "sign"}[mistake]
    assert words in str(error.value) and "weight" in str(error.value)
    assert trainer.global_step == 0


def test_warn_goes_on(make_trainer, monkeypatch):
    monkeypatch.setattr(Planted, "factor", 2.0)
    trainer = make_trainer(max_steps=50, callbacks=[GradientCheck(20, on_error="warn")])
    with pytest.warns(UserWarning, match="gradient check at update") as caught:
        fit(trainer, model_class=Planted)
    assert trainer.global_step == 50
    said = {str(w.message).split(":")[0] for w in caught if "gradient check" in str(w.message)}
    assert said == {f"gradient check at update {k}" for k in (0, 20, 40)}


CHECKED: dict[str, dict[str, Any]] = {
    "explicit": {},
    "autograd": {"gradient": "autograd"},
    "clipped": {"gradient_clip_val": 0.1},
    "by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "clipped by autograd": {"gradient": "autograd", "gradient_clip_val": 0.1},
    "moments": {"moments": True},
    "frozen bias": {"bias": False},
}


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed"])
@pytest.mark.parametrize("settings", CHECKED.values(), ids=CHECKED)
def test_right_gradients_pass_and_are_logged(make_trainer, settings, precision):
    memory = CurveMemory()
    trainer = make_trainer(
        max_steps=400, callbacks=[GradientCheck(25)], logger=memory, precision=precision
    )
    data = RandomRows(passes_per_epoch=100)
    data.dtype = torch.float64 if precision == "64-true" else torch.float32
    fit(trainer, data, **settings)
    steps, errors = memory["gradcheck/weight"]
    assert steps == list(range(0, 400, 25))
    # relative to the gradient, which is far smaller than its terms close to the optimum
    limit = {"64-true": 1e-6, "32-true": 1.0, "bf16-mixed": 10.0}[precision]
    assert max(errors) < limit


def test_mini_batches_and_accumulation_pass(make_trainer):
    cases: list[Any] = [{}, {"accumulate_grad_batches": 2}, {"updates_per_step": 2}]
    for settings in cases:
        trainer = make_trainer(max_steps=40, callbacks=[GradientCheck(5)])
        fit(trainer, RandomRows(batch_size=4), **settings)
        assert trainer.global_step == 40


def test_moments_of_a_far_target_pass(make_trainer):
    data = PointsData(x=[1, 2, 3, 4], y=[1e6 + 1, 1e6 + 3, 1e6 + 4, 1e6 + 8], passes_per_epoch=500)
    trainer = make_trainer(max_steps=3000, callbacks=[GradientCheck(50)])
    fit(trainer, data, num_features=1, lr=0.05, momentum=0.9, moments=True)
    assert trainer.global_step == 3000


def test_moments_that_are_wrong_are_found(make_trainer):
    class Wrong(LinearRegression):
        def loss_and_gradients_from_moments(self, moments):
            loss, gradients = super().loss_and_gradients_from_moments(moments)
            return loss, {**gradients, "weight": 2 * gradients["weight"]}

    with pytest.raises(GradientError, match="weight: a factor 2"):
        fit(make_trainer(max_steps=5, callbacks=[GradientCheck()]), model_class=Wrong, moments=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("moments", [False, True])
def test_the_predicted_curve_is_the_measured_one(make_trainer, momentum, moments):
    memory = CurveMemory()
    trainer = make_trainer(max_steps=100, callbacks=[CurvatureReport()], logger=memory)
    fit(trainer, RandomRows(passes_per_epoch=100), momentum=momentum, moments=moments)
    for part in ("train", "test"):
        predicted = torch.tensor(memory[f"predicted/{part}/loss"][1], dtype=torch.float64)
        measured = torch.tensor(memory[f"{part}/loss"][1], dtype=torch.float64)
        assert len(measured) == 100 and len(predicted) == 101
        # the issue's own bound; seen is 1e-15
        torch.testing.assert_close(
            predicted[:100], measured, rtol=0, atol=1e-9 * measured[0].item()
        )
    optimum = memory["optimum/train/loss"][1][0]
    excess = memory["train/excess_loss"][1][-1]
    assert excess == pytest.approx(memory["predicted/train/loss"][1][-1] - optimum, abs=1e-12)


def test_a_rate_that_diverges_is_named(make_trainer, capsys):
    trainer = make_trainer(max_steps=2, callbacks=[CurvatureReport()])
    data = PointsData(x=[5.0], y=[0.92], passes_per_epoch=2)
    fit(trainer, data, num_features=1, bias=False, weight=[0.15], lr=0.1)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "each update multiplies the error by −4 and the loss by 16" in said
    assert "the largest stable rate is 0.04" in said


def test_lr_auto_is_one_over_the_largest_eigenvalue(make_trainer):
    model = fit(make_trainer(max_steps=3), lr="auto")
    data = RandomRows()
    data.setup()
    x = data.tables["train"].x
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    largest = torch.linalg.eigvalsh(2 / len(x) * ones.T @ ones)[-1].item()
    assert model.hparams["lr"] == pytest.approx(1 / largest, rel=1e-12)
    assert model.hparams_initial["lr"] == model.hparams["lr"]
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == model.hparams["lr"]


REFUSED = {
    "mini-batches": (RandomRows(batch_size=4), {}, "batch_size=4"),
    "Adam": (None, {"optimizer": "Adam"}, "SGD is needed"),
    "another loss": (None, {"model_class": Planted}, "Planted"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_lr_auto_is_refused_with_the_reason(make_trainer, case):
    data, settings, reason = case
    with pytest.raises(ValueError, match=f"lr='auto' is 1/λmax.*{reason}"):
        fit(make_trainer(max_steps=3), data, lr="auto", **settings)


def test_moments_are_refused_with_the_reason(make_trainer):
    with pytest.raises(ValueError, match="moments=True cannot be: batch_size=4"):
        fit(make_trainer(max_steps=3), RandomRows(batch_size=4), moments=True)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 must be 1"):
        LinearRegression(moments=True, accumulate_grad_batches=2)


def test_training_from_moments_ends_in_the_same_weights(make_trainer):
    cases: list[Any] = [{}, {"momentum": 0.9}, {"gradient_clip_val": 0.1}, {"optimizer": "Adam"}]
    for settings in cases:
        direct = fit(make_trainer(max_steps=100), **settings)
        moments = fit(make_trainer(max_steps=100), moments=True, **settings)
        for one, other in zip(direct.parameters(), moments.parameters(), strict=True):
            # the same sums in another order: 1e-16 each, 100 contracting updates
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_local_curvature_of_a_hidden_layer(make_trainer, capsys):
    class Parity(RandomRows):
        def load(self):
            tables = super().load()
            tables["train"].y.sign_()
            return tables

    trainer = make_trainer(max_steps=1, callbacks=[CurvatureReport()])
    with trainer.init_module():
        model = ParityMLP(num_features=3, hidden=5, activation="tanh", lr=0.001)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = Parity()
    trainer.fit(model, datamodule=data)
    said = capsys.readouterr().out.replace("\n", " ")
    x, y = data.tables["train"].x, data.tables["train"].y

    def loss(*values):
        named = dict(zip(start, values, strict=True))
        return torch.func.functional_call(
            Loss(model), {f"m.{n}": v for n, v in named.items()}, (x, y)
        )

    blocks = torch.autograd.functional.hessian(loss, tuple(start.values()))
    rows = [
        torch.cat([b.reshape(p.numel(), -1) for b in row], dim=1)
        for row, p in zip(blocks, start.values(), strict=True)
    ]
    largest = torch.linalg.eigvalsh(torch.cat(rows))[-1].item()
    assert f"eigenvalue of the Hessian is {largest:.2g}"[:-1] in said


class Loss(torch.nn.Module):
    def __init__(self, m: GradientDescentModule):
        super().__init__()
        self.m = m

    def forward(self, x, y):
        return self.m.loss(x, y)
