"""What every model is asked after training: losses and metrics, exact over uneven shares."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lightning_gd.batch import Batch, whole
from lightning_gd.curves import Curves
from lightning_gd.distributed import reduce_sum


class EvaluatedModule(LightningModule):
    """A LightningModule that validates, tests and predicts from `forward`, `loss` and `metrics`."""

    def __init__(self) -> None:
        super().__init__()
        self.curves = Curves()
        self._evaluation: dict[str, Metric] = {}

    def setup(self, stage: str) -> None:
        """Try one row before any work, where the data hold tables."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        like, tables = next(self.parameters(), None), getattr(data, "tables", {})
        if like is not None and tables:
            row = next(iter(tables.values())).part(slice(1))
            if self.trainer.precision != "64-true":  # which converts weights and data later
                check_form(row.x, row.y, like.dtype)
            check_forward(self, row.x.to(like))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss: a mean over the rows, plus terms of the parameters alone.

        Args:
            x: Inputs, shape [N, D] or what `forward` takes.
            y: Targets, shape [N].
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(x, y)")

    def metrics(self) -> dict[str, Metric]:
        """Fresh torchmetrics objects for an evaluation, by name, fed `(prediction, target)`.

        `loss`, the mean of the loss over all rows, is always there; return one of that name
        to compute it from predictions instead.
        """
        return {}

    def on_validation_epoch_start(self) -> None:
        """Begin with fresh metrics."""
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Begin with fresh metrics."""
        self._start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Feed the metrics."""
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Feed the metrics."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics as `val/…`."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics as `test/…`."""
        self._end_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The predictions ŷ for the rows of this batch, shape [N]."""
        return self(self.as_batch(batch).x)

    def _start_evaluation(self) -> None:
        self._evaluation = {"loss": MeanMetric(), **self.metrics()}
        for metric in self._evaluation.values():
            metric.to(self.device)
            if self.device.type != "mps":  # which knows no float64
                metric.set_dtype(torch.float64)

    def _evaluate(self, batch: Any) -> None:
        x, y, _ = next(self.as_batch(batch).shares())
        if len(y) == 0:
            return
        predictions = self(x)
        for name, metric in self._evaluation.items():
            if name == "loss" and isinstance(metric, MeanMetric):
                metric.update(self.loss(x, y), len(y))
            else:
                metric.update(predictions, y)

    def _end_evaluation(self, part: str) -> None:
        values = {f"{part}/{name}": metric.compute() for name, metric in self._evaluation.items()}
        fitting = self.trainer.state.fn == "fit"
        self.log_dict(values, logger=False if fitting else None, sync_dist=True)
        if fitting and not self.trainer.sanity_checking:  # on the axis of the other curves
            self.curves.record(self.trainer.global_step, dict(values))

    def as_batch(self, batch: Any) -> Batch:
        """Accept `(x, y)` of other loaders too; their rows are counted over the processes."""
        if not isinstance(batch, Batch):
            x, y = batch
            total = torch.tensor(float(len(y)), device=y.device)
            batch = whole(x, y, int(reduce_sum(total)))
        check_form(batch.x, batch.y, next(self.parameters()).dtype)
        return batch


@torch.no_grad()
def check_forward(model: torch.nn.Module, x: Tensor) -> None:
    """Refuse rows that `forward` cannot take, and predictions that would broadcast with y [N].

    Args:
        model: Left as it was, and its random numbers too.
        x: One row, shape [1, D], on its device and in its dtype.

    Raises:
        ValueError: Naming the model and the shapes.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng():
            prediction = model.eval()(x)
    except RuntimeError as error:
        what = f"{type(model).__name__} cannot take the data, whose x is {_rows(x)}"
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error
    finally:
        for module, training in modes:
            module.training = training
    if isinstance(prediction, Tensor) and prediction.numel() == 1 and prediction.ndim != 1:
        raise ValueError(
            f"{type(model).__name__}.forward returns {_rows(prediction)} for x {_rows(x)}, which "
            "would broadcast with y [N]: return [N]"
        )


def _rows(tensor: Tensor) -> str:
    return "[]" if tensor.ndim == 0 else f"[{', '.join(['N', *map(str, tensor.shape[1:])])}]"


def check_form(x: Tensor, y: Tensor, dtype: torch.dtype) -> None:
    """Refuse shapes that would broadcast silently, and data of another precision.

    Raises:
        ValueError: Naming both shapes, or both dtypes.
    """
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(
            f"a batch needs x of shape [N, D] and y of shape [N]; got x {list(x.shape)} and "
            f"y {list(y.shape)}"
        )
    for name, values in (("x", x), ("y", y)):
        if values.is_floating_point() and values.dtype != dtype:
            raise ValueError(
                f"{name} is {values.dtype} but the weights are {dtype}: convert the data, or set "
                "--trainer.precision 64-true for float64 and 32-true for float32"
            )
