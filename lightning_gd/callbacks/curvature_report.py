"""What the curvature says about the learning rate, before the first update."""

import copy
import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from torch import Tensor

from lightning_gd.batch import Batch, as_batch, batches_of
from lightning_gd.curvature import largest_eigenvalue
from lightning_gd.data.tables import GlobalBatches
from lightning_gd.data.tensors import tensor_data
from lightning_gd.leastsquares import LeastSquares
from lightning_gd.module import GradientDescentModule

MOST_PARAMETERS = 4097  # the eigendecomposition for more takes longer than most runs
MOST_PREDICTED = 5000  # updates of the predicted curves
MOST_ROWS = 2048  # local rows for the curvature of a loss that is not least squares


class CurvatureReport(Callback):
    """Prints the largest stable and the best learning rate, and warns of one that diverges.

    Least squares: exact, from the moments of the training rows. For full-batch SGD the loss of the
    exact solution is recorded as `optimum/train/loss`, and the predicted curves as
    `predicted/train/loss` and `predicted/test/loss`. Another loss of a GradientDescentModule: the
    largest eigenvalue of its Hessian at the start, by Hessian-vector products.
    """

    _is_due = False  # a report from the first batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due = isinstance(pl_module, GradientDescentModule)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: GradientDescentModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_due:
            return
        self._is_due = False
        size = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        squares = LeastSquares.of(trainer, pl_module) if size <= MOST_PARAMETERS else None
        if squares is not None:
            lines = _exact(trainer, pl_module, squares)
        else:
            lines = _at_the_start(trainer, pl_module, batch)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        for line in lines if trainer.is_global_zero else ():
            console.print(line, style="bold yellow" if line.startswith("WARNING") else "dim")


def _exact(trainer: Trainer, module: Any, squares: LeastSquares) -> list[str]:
    """Return the report of the exact curvature, and draw the predicted curves."""
    h, curvature, optimum = module.hparams, squares.curvature, squares.optimum.theta
    lr, momentum = h["lr"], h["momentum"]
    run = squares.theta(), optimum, lr, momentum
    report, module.stable_lr = curvature.report(*run), curvature.max_lr(momentum)
    if h["optimizer"] != "SGD" or h["optimizer_args"]:
        return report[:1]
    steady = h["scheduler"] is None and h["gradient_clip_val"] is None and squares.data.full_batch
    loader, epochs = trainer.train_dataloader, trainer.max_epochs or -1
    if steady and isinstance(loader, GlobalBatches) and trainer.global_step == 0:
        limits = (trainer.max_steps, epochs * loader.updates_per_epoch, MOST_PREDICTED)
        steps = min(limit for limit in limits if limit > 0)
        errors = curvature.errors(*run, steps)
        _draw(trainer, module, squares, optimum + errors @ curvature.eigenvectors.T)
    return report


def _draw(trainer: Trainer, module: Any, squares: LeastSquares, path: Tensor) -> None:
    """Write the loss of the exact solution, and the predicted curves as far as they are finite."""
    curves = {"optimum/train/loss": squares.optimum.loss[None]}
    size = squares.moments().size
    for part in ("train", "test") if "test" in squares.data.tables else ("train",):
        losses = squares.moments(part).loss(path[:, :size], path[:, size:].sum(1))
        curves[f"predicted/{part}/loss"] = losses
    for tag, losses in curves.items():
        points = [(k, {tag: v}) for k, v in enumerate(losses.tolist()) if math.isfinite(v)]
        module.curves.add_points(trainer, points)


def _at_the_start(trainer: Trainer, module: GradientDescentModule, batch: Any) -> list[str]:
    """Return the report of λmax of the Hessian at the present weights, over some local rows."""
    h, data, first = module.hparams, tensor_data(trainer), as_batch(next(iter(batches_of(batch))))
    if data is not None:
        rows = tuple(part[:MOST_ROWS] for part in data.local("train"))
        first = as_batch(rows).to(module.device)
    count = first.rows(module)
    try:
        largest = _largest_curvature(module, first) if count else 0.0
    except Exception as error:  # no report is a reason to end a run
        return [f"curvature at the start: not known ({error!r})"]
    line = f"curvature at the start, on {count:g} rows: the largest eigenvalue of the Hessian is "
    if largest <= 0:
        return [f"{line}{largest:.4g}"]
    stable = 2 * (1 + h["momentum"]) / largest
    lines = [f"{line}{largest:.4g}; SGD is stable there below lr {stable:.4g}"]
    if h["optimizer"] == "SGD" and h["lr"] > stable:
        lines.append(f"WARNING: lr {h['lr']:.4g} is above that; the first updates may climb")
    return lines


def _largest_curvature(module: GradientDescentModule, batch: Batch) -> float:
    """Return λmax by differentiating twice; the buffers and the random state are not changed."""
    model = copy.deepcopy(module)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradient(output: Tensor, v: Tensor | None = None, **options: bool) -> Tensor:
        found = torch.autograd.grad(output, trained, v, materialize_grads=True, **options)
        return torch.cat([part.reshape(-1) for part in found])

    with torch.enable_grad(), isolate_rng():
        slope = gradient(batch.loss(model), create_graph=True)
    hvp = partial(gradient, slope, retain_graph=True)
    return largest_eigenvalue(hvp, slope.detach(), rtol=1e-3)
