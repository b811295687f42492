"""What a run knows of its data if its loss is least squares, and the learning rate "auto"."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter

from lightning_gd.curvature import Curvature, largest_eigenvalue
from lightning_gd.data.tensors import TensorDataModule, tensor_data
from lightning_gd.distributed import reduce_sum
from lightning_gd.evaluation import form
from lightning_gd.moments import Moments, takes_moments
from lightning_gd.optimum import Optimum

MOST_WORK = 10**10  # multiplications for an optimum from the rows: a few seconds
MOST_PARAMETERS = 4097  # the eigendecomposition for more takes longer than most runs


@dataclass(eq=False)
class LeastSquares:
    """Moments, curvature and optimum of the data of one run, each computed when first asked for.

    Moments are summed over the processes: ask for those of a part on every process, or on none.
    """

    data: TensorDataModule
    trained: list[Parameter]  # w, shape [D], and b, shape [], if it is trained
    device: torch.device
    _moments: dict[str, Moments] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> "LeastSquares | None":
        """Return what is known of the run, or None if it is not least squares of a table.

        The model must take moments, the table hold x [N, D] and real y [N], and the model train
        exactly w, or w and b: parameters that are frozen at other values than 0 move the optimum.
        """
        data, device = tensor_data(trainer), trainer.strategy.root_device
        if data is None or not takes_moments(module):
            return None
        x, y = data.tables["train"].raw, data.tables["train"].y
        trained = [p for p in module.parameters() if p.requires_grad]
        fits = x.ndim == 2 and y.ndim == 1 and y.is_floating_point()
        fits = fits and [p.shape for p in trained] in ([x.shape[1:]], [x.shape[1:], torch.Size()])
        if not fits or any(p.any() for p in module.parameters() if not p.requires_grad):
            return None
        # MPS has no float64.
        return cls(data, trained, torch.device("cpu") if device.type == "mps" else device)

    def moments(self, part: str = "train") -> Moments:
        """Return the moments of a part of the data over all processes, in float64."""
        if part not in self._moments:
            self._moments[part] = self.data.moments_of(part).to(self.device).reduce(reduce_sum)
        return self._moments[part]

    @cached_property
    def curvature(self) -> Curvature:
        """The curvature of the training loss in the trained parameters."""
        return Curvature(self.moments().hessian(bias=len(self.trained) == 2))

    @cached_property
    def optimum(self) -> Optimum:
        """The exact solution for the training data; from the rows if moments do not resolve it."""
        bias, train = len(self.trained) == 2, self.data.tables["train"]
        found, (rows, columns) = self.moments().optimum(bias), train.raw.shape
        if not found.dropped or train.on_disk or rows * columns * min(rows, columns) > MOST_WORK:
            return found
        exact = Optimum.of_rows(*train.part(slice(None)).use(torch.float64).local(), bias)
        return exact.to(self.device)

    @cached_property
    def auto_lr(self) -> float:
        """1/λmax; of many parameters by products Hv = 2/N [x 1]ᵀ([x 1] v) over the rows."""
        size = sum(p.numel() for p in self.trained)
        if size <= MOST_PARAMETERS or self.data.tables["train"].on_disk:
            return self.curvature.auto_lr
        x = self.data.local("train")[0].to(self.device, torch.float64)
        rows = reduce_sum(torch.tensor(float(len(x)), device=self.device))

        def hvp(v: Tensor) -> Tensor:
            product = x @ v[: x.shape[1]] + v[x.shape[1] :].sum()
            columns = torch.cat([product @ x, product.sum()[None]])[:size]
            return reduce_sum(2 / rows * columns)

        return 1 / largest_eigenvalue(hvp, x.new_zeros(size), rtol=1e-3)

    def theta(self, changes: Mapping[Tensor, Tensor] | None = None) -> Tensor:
        """Return the present (w, b), shape [D+1], or w, shape [D], in float64, plus changes."""
        moved = (
            p.detach() + changes[p] if changes and p in changes else p.detach()
            for p in self.trained
        )
        return torch.cat([p.reshape(-1) for p in moved]).to(self.moments().mean)


class AutoLearningRate(Callback):
    """Replaces `lr="auto"` by 1/λmax of the training loss before the optimizer is built."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ValueError if the loss is not least squares, or the run not full-batch SGD."""
        if stage != "fit" or pl_module.hparams["lr"] != "auto":
            return
        squares, optimizer = LeastSquares.of(trainer, pl_module), pl_module.hparams["optimizer"]
        if squares is None or optimizer != "SGD" or not squares.data.full_batch:
            data = tensor_data(trainer)
            batch_size = getattr(data, "batch_size", None)
            y = None if data is None else data.tables["train"].y
            y = "" if y is None or y.ndim == 1 else f" and y {form(y)}, which must be [N]"
            raise ValueError(
                "lr='auto' is 1/λmax of a full-batch least-squares loss with SGD; got "
                f"{type(pl_module).__name__} with optimizer={optimizer} and "
                f"batch_size={batch_size}{y}: set --model.lr to a number"
            )
        lr, most = squares.auto_lr, torch.finfo(next(pl_module.parameters()).dtype).max
        if not lr < most:
            raise ValueError(
                f"lr='auto' is 1/λmax, which is above {most:.3g} where the squares of x are this "
                "small: scale x, or set --model.lr to a number"
            )
        pl_module.save_hyperparameters({"lr": lr})
