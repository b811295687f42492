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
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_gd.batch import Batch, as_batch, batches_of
from lightning_gd.curvature import largest_eigenvalue
from lightning_gd.data.loader import GlobalBatches
from lightning_gd.data.tensors import tensor_data
from lightning_gd.leastsquares import MOST_PARAMETERS, LeastSquares
from lightning_gd.module import GradientDescentModule

MOST_PREDICTED = 5000  # updates of the predicted curves
MOST_ROWS = 2048  # local rows for the curvature of a loss that is not least squares
RISEN, SEEN = 1.1, 1e-3  # times its lowest, and by this part of the first: a loss to warn of


class CurvatureReport(Callback):
    """Prints which learning rates converge, and warns of one that does not.

    Least squares: exact, from the moments of the training rows. For full-batch SGD the loss of the
    exact solution is recorded as `optimum/train/loss`, and the predicted curves as
    `predicted/train/loss` and `predicted/test/loss`. Another loss of a GradientDescentModule: from
    the largest eigenvalue of its Hessian at the start, by Hessian-vector products. A full-batch
    run that ends above its lowest loss is warned of.

    Args:
        verbose: Also print eigenvalues, condition number and factors per update.
    """

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self._is_due = False  # a report from the first batch
        self._is_told = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due, self._is_told = isinstance(pl_module, GradientDescentModule), False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: GradientDescentModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_due:
            return
        self._is_due = False
        size = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        squares = LeastSquares.of(trainer, pl_module) if size <= MOST_PARAMETERS else None
        if squares is not None:
            lines = _exact(trainer, pl_module, squares, self.verbose)
        else:
            lines = _at_the_start(trainer, pl_module, batch)
        is_exact = squares is not None and pl_module.hparams["optimizer"] == "SGD"
        # The exact report tells of a rate that converges, though the loss swings with momentum.
        self._is_told = is_exact or any(line.startswith("WARNING") for line in lines)
        _say(trainer, lines)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a loss that rose again: the rate is too large near the optimum."""
        data = tensor_data(trainer)
        if self._is_told or data is None or not data.full_batch:
            return
        if not isinstance(pl_module, GradientDescentModule):
            return
        steps, losses = pl_module.curves.history.get("train/loss", ([], []))
        lowest = min(losses, default=math.nan)
        # Near the optimum of an exact fit the loss swings with momentum, or is rounding errors.
        if losses and losses[-1] > RISEN * lowest and losses[-1] - lowest > SEEN * losses[0]:
            lr, best, last = pl_module.hparams["lr"], steps[losses.index(lowest)], steps[-1]
            rose = f"{lowest:.4g} at update {best:,} and is {losses[-1]:.4g} at update {last:,}"
            _say(trainer, [f"WARNING: train/loss was {rose}: lr {lr:.4g} is too large for it"])


def _say(trainer: Trainer, lines: list[str]) -> None:
    console = Console(highlight=False, markup=False)
    for line in lines if trainer.is_global_zero else ():
        console.print(line, style="bold yellow" if line.startswith("WARNING") else "dim")


def _exact(trainer: Trainer, module: Any, squares: LeastSquares, verbose: bool) -> list[str]:
    """Return the report of the exact curvature, and draw the predicted curves."""
    h, curvature, optimum = module.hparams, squares.curvature, squares.optimum.theta
    lr, momentum, made = h["lr"], h["momentum"], trainer.global_step
    module.stable_lr = curvature.max_lr(momentum)
    if h["optimizer"] != "SGD" or h["optimizer_args"]:
        return [f"for full-batch SGD {curvature.rates(0.0)}"]
    run = squares.theta(), optimum, lr, momentum
    updates = curvature.updates_needed(*run, squares.theta(_last_change(trainer)))
    lines = [curvature.rates(momentum), curvature.verdict(lr, momentum)]
    if updates and squares.data.full_batch:
        left = "less than 1 % of the loss above the optimum is left"
        lines.append(f"from update {made + updates:,} on, {left}")
    if dropped := squares.optimum.dropped:
        lines.append(
            f"{dropped} directions are too flat for moments in float64: the exact solution is that "
            "without them, and its loss may be above the least one"
        )
    if verbose:
        lines += curvature.details(lr, momentum)
    steady = h["scheduler"] is None and h["gradient_clip_val"] is None and squares.data.full_batch
    loader, epochs = trainer.train_dataloader, trainer.max_epochs or -1
    if steady and isinstance(loader, GlobalBatches) and made == 0:
        limits = (trainer.max_steps, epochs * loader.updates_per_epoch, MOST_PREDICTED)
        steps = min(limit for limit in limits if limit > 0)
        errors = curvature.errors(*run, steps)
        _draw(trainer, module, squares, optimum + errors @ curvature.eigenvectors.T)
    return lines


def _last_change(trainer: Trainer) -> dict[Tensor, Tensor]:
    """Return lr times the momentum buffer of each parameter, which its last update subtracted."""
    (optimizer,) = trainer.optimizers
    return {
        p: group["lr"] * buffer
        for group in optimizer.param_groups
        for p in group["params"]
        if (buffer := optimizer.state[p].get("momentum_buffer")) is not None
    }


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
        first = as_batch(data.sample("train", MOST_ROWS)).to(module.device)
    count = first.rows(module)
    where = f"at the start, on {count:g} rows"
    try:
        largest = _largest_curvature(module, first) if count else 0.0
        if largest <= 0 and count:  # such as that of a Huber loss of far residuals
            where = f"one update from the start, on {count:g} rows"
            largest = _largest_curvature(module, first, h["lr"])
    except Exception as error:  # no report is a reason to end a run
        return [f"curvature at the start: not known ({error!r})"]
    if largest <= 0:
        return [f"{where}, the largest eigenvalue of the Hessian is {largest:.4g}: no rate follows"]
    stable = 2 * (1 + h["momentum"]) / largest
    lines = [f"{where}, a learning rate below {stable:.4g} is stable"]
    if h["optimizer"] == "SGD" and h["lr"] > stable:
        lines.append(f"WARNING: lr {h['lr']:.4g} is above that; the loss may climb")
    return lines


def _largest_curvature(module: GradientDescentModule, batch: Batch, lr: float = 0.0) -> float:
    """Return λmax by differentiating twice, after an update with `lr` that leaves no trace."""
    model = copy.deepcopy(module)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradient(output: Tensor, v: Tensor | None = None, **options: bool) -> Tensor:
        found = torch.autograd.grad(output, trained, v, materialize_grads=True, **options)
        return torch.cat([part.reshape(-1) for part in found])

    with torch.enable_grad(), isolate_rng():
        if lr:
            change = gradient(batch.loss(model))
            with torch.no_grad():
                vector_to_parameters(parameters_to_vector(trained) - lr * change, trained)
        slope = gradient(batch.loss(model), create_graph=True)
    hvp = partial(gradient, slope, retain_graph=True)
    return largest_eigenvalue(hvp, slope.detach(), rtol=1e-3)
