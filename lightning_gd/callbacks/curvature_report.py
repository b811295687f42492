"""What the curvature says about the learning rate, before the first update."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from lightning_gd.batch import Batch, as_batch, batches_of
from lightning_gd.curvature import largest_eigenvalue, losses_along
from lightning_gd.data.tables import GlobalBatches
from lightning_gd.data.tensors import tensor_data
from lightning_gd.leastsquares import LeastSquares
from lightning_gd.module import GradientDescentModule

MOST_PARAMETERS = 4097  # the eigendecomposition for more takes longer than most runs
MOST_PREDICTED = 5000  # updates of the predicted curves
MOST_ROWS = 2048  # local rows for the curvature of a loss that is not least squares


class CurvatureReport(Callback):
    """Prints the largest stable and the best learning rate, and warns of one that diverges.

    Least squares: exact, from the moments of the training rows. The loss of the exact solution is
    recorded as `optimum/train/loss`, the loss above it as `train/excess_loss` after each step, and
    for full-batch SGD the predicted curves as `predicted/train/loss` and `predicted/test/loss`.
    Another loss: the largest eigenvalue of its Hessian at the start, by Hessian-vector products.
    It needs a GradientDescentModule.
    """

    def __init__(self) -> None:
        self._squares: LeastSquares | None = None
        self._is_due = False  # a report from the first batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report from the moments, if the loss is least squares."""
        self._squares, self._is_due = None, isinstance(pl_module, GradientDescentModule)
        size = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        if isinstance(pl_module, GradientDescentModule) and size <= MOST_PARAMETERS:
            self._squares = LeastSquares.of(trainer, pl_module)
        if self._squares is not None:
            self._is_due = False
            _print(trainer, self._exact(trainer, pl_module, self._squares))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: GradientDescentModule, batch: Any, batch_idx: int
    ) -> None:
        """Report from the first batch, or from more rows where they can be had."""
        if not self._is_due:
            return
        self._is_due, data = False, tensor_data(trainer)
        try:
            first = as_batch(next(iter(batches_of(batch))))
            if data is not None:
                rows = tuple(part[:MOST_ROWS] for part in data.local("train"))
                first = as_batch(rows).to(pl_module.device)
            lines = _at_the_start(pl_module, first)
        except Exception as error:  # no report is a reason to end a run
            reason = (str(error) or type(error).__name__).splitlines()[0]
            lines = [f"curvature at the start: not known ({reason})"]
        _print(trainer, lines)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GradientDescentModule, *_: Any
    ) -> None:
        """Record the loss above the optimum."""
        if self._squares is not None:
            excess = self._squares.excess_loss()
            pl_module.curves.record(trainer.global_step, {"train/excess_loss": excess})

    def _exact(self, trainer: Trainer, module: Any, squares: LeastSquares) -> list[str]:
        """Return the report of the exact curvature, and draw the predicted curves."""
        h, data, optimum = module.hparams, tensor_data(trainer), squares.optimum.theta
        lr, momentum, curvature = h["lr"], h["momentum"], squares.curvature
        module.stable_lr = curvature.max_lr(momentum)
        report = curvature.report(lr, momentum, squares.theta(), optimum)
        if h["optimizer"] != "SGD" or h["optimizer_args"]:
            return report[:1]
        steady = h["scheduler"] is None and h["gradient_clip_val"] is None
        loader = trainer.train_dataloader
        known = isinstance(loader, GlobalBatches) and data is not None and data.full_batch
        if steady and known and trainer.global_step == 0:
            limits = (trainer.max_steps, (trainer.max_epochs or -1) * loader.updates_per_epoch)
            count = min(limit for limit in (*limits, MOST_PREDICTED) if limit > 0)
            path = curvature.trajectory(squares.theta(), optimum, lr, momentum, count)
            curves = {"optimum/train/loss": squares.optimum.loss[None]}
            for part in ("train", "test") if "test" in data.tables else ("train",):
                curves[f"predicted/{part}/loss"] = losses_along(squares.moments(part), path)
            for tag, losses in curves.items():
                points = [(k, {tag: v}) for k, v in enumerate(losses.tolist()) if math.isfinite(v)]
                module.curves.add_points(trainer, points)
        return report


def _print(trainer: Trainer, lines: list[str]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in lines if trainer.is_global_zero else ():
        console.print(line, style="bold yellow" if line.startswith("WARNING") else "dim")


def _at_the_start(module: GradientDescentModule, batch: Batch) -> list[str]:
    """Return the report of λmax of the Hessian at the present weights, over some local rows."""
    rows, h = batch.rows(module), module.hparams
    if not rows:
        return []
    largest = _largest_curvature(module, batch)
    stable = 2 * (1 + h["momentum"]) / largest if largest > 0 else math.inf
    line = (
        f"curvature at the start, on {rows:g} rows: the largest eigenvalue of the Hessian is "
        f"{largest:.4g}; SGD is stable there below lr {stable:.4g}"
    )
    if h["optimizer"] != "SGD" or h["lr"] < stable:
        return [line]
    return [line, f"WARNING: lr {h['lr']:.4g} is above that; the first updates may climb"]


def _largest_curvature(module: GradientDescentModule, batch: Batch) -> float:
    """Return λmax by differentiating twice; the buffers and the random state are not changed."""
    model = copy.deepcopy(module)
    trained = [p for p in model.parameters() if p.requires_grad]
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        slope = _gradient(batch.loss(model), trained, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return _gradient(slope, trained, v, retain_graph=True)

    return largest_eigenvalue(product, slope.detach(), rtol=1e-3)


def _gradient(output: Tensor, parameters: list, v: Tensor | None = None, **options: bool) -> Tensor:
    found = torch.autograd.grad(output, parameters, v, materialize_grads=True, **options)
    return torch.cat([gradient.reshape(-1) for gradient in found])
