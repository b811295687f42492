"""Backward passes of Triton kernels, which compute in float32 whatever they are given."""

import contextlib
from typing import Any

import pytest
import torch
from any_modules import Batches
from lightning.pytorch import LightningModule

from lightning_gd import GradientCheck, GradientError, check_function

pytest.importorskip("triton")
kernels = pytest.importorskip("kernels")

GPU = torch.cuda.is_available()
DEVICES = [  # Triton interprets its kernels on the CPU, or compiles them for a GPU
    pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="the kernels are compiled")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")],
    ),
]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("reference", [False, True], ids=["alone", "beside plain operations"]),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # Triton's interpreter, of bits
]


def cases(report):
    return {case: [p.verdict for p in r.parameters] for case, r in report.cases.items()}


def test_a_kernel_alone(device, reference):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(device)
    plain = kernels.plain if reference else None
    right = check_function(kernels.LayerNorm, x, reference=plain)
    assert right.ok, "\n".join(right.lines())
    assert right.note == "checked in torch.float32"
    found = cases(right)
    assert found["as given"] == ["ok"] and ("float32" in found) == reference
    wrong = cases(check_function(kernels.Doubled, x, reference=plain))
    assert wrong["as given"] == ["WRONG"]


class Normed(LightningModule):
    """A hidden layer that a kernel normalizes."""

    def __init__(self, norm: Any):
        super().__init__()
        self.norm, self.a, self.b = norm, torch.nn.Linear(6, 5), torch.nn.Linear(5, 1)

    def loss(self, x, y, norm):
        return torch.nn.functional.mse_loss(self.b(norm(self.a(x)))[:, 0], y)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(x, y, self.norm)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def plain_loss(module, batch):
    return module.loss(*batch, kernels.plain)


def test_a_kernel_in_a_run(make_trainer, device, reference):
    torch.manual_seed(0)
    batches = Batches([(torch.randn(6, 6), torch.randn(6))])
    settings = {"precision": "32-true", "accelerator": device, "max_steps": 3}
    plain = plain_loss if reference else None

    def fit(norm):
        check = GradientCheck(reference=plain)
        make_trainer(callbacks=[check], **settings).fit(Normed(norm.apply), batches)
        return check

    said = pytest.warns(
        UserWarning, match="checked in torch.float32, because the loss has less precision"
    )
    with said if reference else contextlib.nullcontext():
        check = fit(kernels.LayerNorm)
    assert check.checks == 3 and all(check.tested.values())
    with pytest.raises(GradientError, match="update 0:(?s:.*)a.weight.*passes through Doubled"):
        fit(kernels.Doubled)
