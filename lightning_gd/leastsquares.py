"""What a run knows of its data if its loss is least squares, and the learning rate "auto"."""

from __future__ import annotations

from functools import cached_property

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_gd.curvature import Curvature
from lightning_gd.data.tensors import TensorDataModule, tensor_data
from lightning_gd.distributed import reduce_sum
from lightning_gd.moments import Moments, Optimum, takes_moments


class LeastSquares:
    """Moments, curvature and optimum of the data of one run, each computed when first asked for.

    Moments are summed over the processes: ask for those of a part on every process, or on none.

    Args:
        module: A model that trains w, shape [D], and perhaps b, shape [], on L = 1/N Σ r².
        data: The DataModule that holds the tables.
        device: Where the moments are summed; the CPU takes the place of MPS, without float64.
    """

    def __init__(
        self, module: LightningModule, data: TensorDataModule, device: torch.device
    ) -> None:
        self.module, self.data = module, data
        self.device = torch.device("cpu") if device.type == "mps" else device
        self._moments: dict[str, Moments] = {}

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> LeastSquares | None:
        """Return what is known of the run, or None if it is not least squares of a table.

        The model must take moments, the table hold x [N, D] and real y [N], and the model train
        exactly w, or w and b: parameters that are frozen at other values than 0 move the optimum.
        """
        data, parameters = tensor_data(trainer), list(module.parameters())
        if data is None or not takes_moments(module):
            return None
        x, y = data.tables["train"].raw, data.tables["train"].y
        trained = [p.shape for p in parameters if p.requires_grad]
        fits = x.ndim == 2 and y.ndim == 1 and y.is_floating_point()
        fits = fits and trained in ([x.shape[1:]], [x.shape[1:], torch.Size()])
        moved = any(p.any() for p in parameters if not p.requires_grad)
        return cls(module, data, trainer.strategy.root_device) if fits and not moved else None

    def moments(self, part: str = "train") -> Moments:
        """Return the moments of a part of the data over all processes, in float64."""
        if part not in self._moments:
            local = self.data.moments_of(part).to(self.device)
            self._moments[part] = local.reduce(reduce_sum)
        return self._moments[part]

    @cached_property
    def curvature(self) -> Curvature:
        """The curvature of the training loss in the trained parameters."""
        hessian = self.moments().hessian(bias=self._has_bias)
        if not hessian.any():
            raise ValueError(
                "every x of the training rows is 0 and the model has no bias, so the loss does not "
                "depend on the weights: use other data, or set --model.bias true"
            )
        return Curvature(hessian)

    @cached_property
    def optimum(self) -> Optimum:
        """The exact solution for the training data."""
        return self.moments().optimum(bias=self._has_bias)

    def theta(self) -> Tensor:
        """Return the present (w, b), shape [D+1], or w, shape [D], in float64."""
        trained = [p.detach().reshape(-1) for p in self.module.parameters() if p.requires_grad]
        return torch.cat(trained).to(self.moments().mean)

    def excess_loss(self) -> Tensor:
        """Return the training loss above that of the exact solution, without cancellation."""
        return self.moments().excess_loss(self.theta(), self.optimum)

    def term_size(self) -> float:
        """Return the largest summand of the gradient; its rounding error is proportional to it.

        These are the entries of 2(Cov u + e mean) and 2e, with absolute values throughout.
        """
        moments, theta = self.moments(), self.theta().abs()
        u = torch.cat([theta[: len(moments.mean_x)], theta.new_ones(1)])
        error = moments.mean.abs() @ u + theta[len(moments.mean_x) :].sum()
        terms = moments.cov.abs() @ u + moments.mean.abs() * error
        return 2 * max(terms[:-1].max().item(), error.item())

    @property
    def _has_bias(self) -> bool:
        return len(self.theta()) > len(self.moments().mean_x)


class AutoLearningRate(Callback):
    """Replaces `lr="auto"` by 1/λmax of the training loss before the optimizer is built."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the learning rate in the hyper-parameters of the model.

        Raises:
            ValueError: If the loss is not least squares, or the run not full-batch SGD.
        """
        if stage != "fit" or pl_module.hparams["lr"] != "auto":
            return
        data, optimizer = tensor_data(trainer), pl_module.hparams["optimizer"]
        squares, name = LeastSquares.of(trainer, pl_module), type(pl_module).__name__
        if optimizer != "SGD":
            reason = f"set --model.optimizer SGD (got {optimizer})"
        elif data is not None and data.batch_size is not None:
            reason = f"set --data.batch_size null (got batch_size={data.batch_size})"
        elif squares is None:
            reason = f"the loss of {name} on these data is not least squares"
        else:
            pl_module.save_hyperparameters({"lr": squares.curvature.auto_lr})
            return
        raise ValueError(
            f"lr='auto' is 1/λmax of a full-batch least-squares loss with SGD: {reason}, or set "
            "--model.lr to a number"
        )
