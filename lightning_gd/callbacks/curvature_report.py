"""What the curvature says about the learning rate, before the first update."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.func import functional_call, grad, vjp

from lightning_gd.batch import Batch
from lightning_gd.curvature import largest_eigenvalue, losses_along
from lightning_gd.leastsquares import LeastSquares
from lightning_gd.module import GradientDescentModule

MOST_FEATURES = 4096  # an eigendecomposition of more takes longer than most runs
MOST_PREDICTED = 5000  # updates of the predicted curve
LOCAL_ROWS = 2048  # rows for the curvature of a loss that is not least squares


class CurvatureReport(Callback):
    """Prints the largest stable and the best learning rate, and warns of one that diverges.

    Least squares: exact, from the moments of the training data; the predicted curves stand beside
    the measured ones as `predicted/train/loss` and `predicted/test/loss`, the loss of the exact
    solution as `optimum/train/loss`, and the loss above it as `train/excess_loss` after each
    block of updates. Another loss: the largest eigenvalue of its Hessian at the start.
    """

    every_n_updates = 0  # the end of a block is as good a moment as any other

    def __init__(self) -> None:
        self._squares: LeastSquares | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, predict and warn."""
        if not isinstance(pl_module, GradientDescentModule):
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._squares = _affordable(pl_module.squares)
        if self._squares is not None:
            lines = self._exact(trainer, pl_module, self._squares)
        elif hasattr(data, "share"):
            lines = _local(pl_module, data.share("train"))
        else:
            return
        if trainer.is_global_zero:
            console = Console(highlight=False, soft_wrap=True)
            for line in lines:
                console.print(line, style="bold yellow" if line.startswith("WARNING") else "dim")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The loss above the optimum."""
        if self._squares is not None and isinstance(pl_module, GradientDescentModule):
            excess = self._squares.excess_loss()
            pl_module.curves.record(trainer.global_step, {"train/excess_loss": excess})

    def _exact(
        self, trainer: Trainer, module: GradientDescentModule, squares: LeastSquares
    ) -> list[str]:
        rates, start = module.hparams, squares.theta()
        plain = rates["optimizer"] == "SGD" and not rates["optimizer_args"]
        report = squares.curvature.report(
            rates["lr"], rates["momentum"] if plain else 0.0, start, squares.optimum.theta
        )
        steady = rates["scheduler"] is None and rates["gradient_clip_val"] is None
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not plain:
            return report.lines()[:1]
        if steady and data.batch_size is None and trainer.global_step == 0:
            self._predict(trainer, rates, squares)
        return report.lines()

    def _predict(self, trainer: Trainer, rates: Any, squares: LeastSquares) -> None:
        steps = int(min(trainer.estimated_stepping_batches, MOST_PREDICTED))
        best = squares.optimum
        path = squares.curvature.trajectory(
            squares.theta(), best.theta, rates["lr"], rates["momentum"], steps
        )
        curves = {"predicted/train/loss": losses_along(squares.moments(), path)}
        if "test" in squares.data.tables:
            curves["predicted/test/loss"] = losses_along(squares.moments("test"), path)
        columns = {name: curve.tolist() for name, curve in curves.items()}
        points: list[tuple[int, dict[str, float]]] = [(0, {"optimum/train/loss": best.loss.item()})]
        for step in range(steps + 1):
            values = {name: column[step] for name, column in columns.items()}
            points.append((step, {n: v for n, v in values.items() if math.isfinite(v)}))
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if hasattr(logger, "log_points"):
                logger.log_points(points)  # pyright: ignore[reportAttributeAccessIssue]


def _affordable(squares: LeastSquares | None) -> LeastSquares | None:
    if squares is None or len(squares.theta()) > MOST_FEATURES:
        return None
    return squares


def _local(module: GradientDescentModule, batch: Batch) -> list[str]:
    """λmax of the Hessian at the present weights, on up to `LOCAL_ROWS` of this process's rows."""
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    like = next(iter(parameters.values()))
    x, y = (t[:LOCAL_ROWS].to(like) for t in (batch.x, batch.y))
    if len(y) == 0:
        return []
    sizes = [p.numel() for p in parameters.values()]

    def loss(theta: Tensor) -> Tensor:
        parts = [t.view_as(p) for t, p in zip(theta.split(sizes), parameters.values(), strict=True)]
        named = dict(zip(parameters, parts, strict=True))
        return functional_call(_Loss(module), {f"m.{n}": p for n, p in named.items()}, (x, y))

    theta = torch.cat([p.reshape(-1) for p in parameters.values()])
    try:
        # Backwards twice: H is symmetric, and forward derivatives are missing for some losses.
        product = vjp(grad(loss), theta)[1]
        largest = largest_eigenvalue(
            lambda v: product(v)[0], len(theta), rtol=1e-3, dtype=like.dtype, device=like.device
        )
    except (RuntimeError, ValueError) as error:  # a report is no reason to end a run
        return [f"curvature at the start: not known ({str(error).splitlines()[0]})"]
    if largest <= 0:
        return [f"curvature at the start: the largest eigenvalue of the Hessian is {largest:.4g}"]
    lr, momentum = module.hparams["lr"], module.hparams["momentum"]
    stable = 2 * (1 + momentum) / largest
    lines = [
        f"curvature at the start (local, {len(y)} rows): the largest eigenvalue of the Hessian is "
        f"{largest:.4g}; SGD is stable there below lr {stable:.4g}"
    ]
    if module.hparams["optimizer"] == "SGD" and lr > stable:
        lines.append(f"WARNING: lr {lr:.4g} is above that; the first updates may climb")
    return lines


class _Loss(torch.nn.Module):
    """Makes `loss` what a call computes, as `functional_call` wants it."""

    def __init__(self, module: GradientDescentModule) -> None:
        super().__init__()
        self.m = module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.m.loss(x, y)
