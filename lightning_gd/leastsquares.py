"""What a run knows of its data when the loss is a plain mean of squares."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_gd.curvature import Curvature
from lightning_gd.distributed import reduce_sum
from lightning_gd.moments import Moments, Optimum


class LeastSquares:
    """Moments, curvature and optimum of the data of one run, each computed when first asked for.

    The first question to a part must come from all processes alike: its moments are summed over
    them.

    Args:
        module: A model that defines `gradients_from_moments` for its own loss.
        data: The DataModule that holds the tables.
    """

    def __init__(self, module: LightningModule, data: Any) -> None:
        self.module, self.data = module, data
        self._moments: dict[str, Moments] = {}
        self._curvature: Curvature | None = None
        self._optimum: Optimum | None = None

    def moments(self, part: str = "train") -> Moments:
        """The moments of `"train"` or `"test"` over all processes, float64."""
        if part not in self._moments:
            device = self.module.device if self.module.device.type != "mps" else "cpu"
            own = self.data.moments(part).to(device=device)
            self._moments[part] = own.reduce(reduce_sum)
        return self._moments[part]

    @property
    def curvature(self) -> Curvature:
        """Of the training loss in the trained parameters."""
        if self._curvature is None:
            hessian = self.moments().hessian(bias=self._bias)
            if not hessian.any():
                raise ValueError(
                    "every x of the training rows is 0 and there is no intercept: the loss does "
                    "not depend on the weights; give other data, or --model.bias true"
                )
            self._curvature = Curvature(hessian)
        return self._curvature

    @property
    def optimum(self) -> Optimum:
        """The exact solution for the training data."""
        if self._optimum is None:
            self._optimum = self.moments().optimum(bias=self._bias)
        return self._optimum

    def term_size(self) -> float:
        """The largest term that the gradient from moments adds up: what its rounding goes by.

        The entries of 2(|C||w| + |c|) + 2|m|e and of 2e, e = |m|ᵀ|w| + |b| + |ȳ|.
        """
        moments, theta = self.moments(), self.theta().abs()
        weight, bias = theta[: len(moments.mean_x)], theta[len(moments.mean_x) :].sum()
        mean = moments.mean_x.abs()
        error = mean @ weight + bias + moments.mean_y.abs()
        terms = moments.cov_xx.abs() @ weight + moments.cov_xy.abs() + mean * error
        return 2 * max(terms.max().item(), error.item())

    def theta(self) -> Tensor:
        """The trained parameters, flattened in the order of the Hessian, float64."""
        trained = [p.detach().reshape(-1) for p in self.module.parameters() if p.requires_grad]
        return torch.cat(trained).to(self.moments().cov_xx)

    def excess_loss(self) -> Tensor:
        """The training loss above that of the exact solution, without cancellation."""
        theta = self.theta()
        weight, bias = theta[: len(self.optimum.weight)], theta[-1] if self._bias else None
        return self.moments().excess_loss(weight, bias, self.optimum)

    @property
    def _bias(self) -> bool:
        return dict(self.module.named_parameters())["bias"].requires_grad
