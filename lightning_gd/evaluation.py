"""Validation, test and prediction: losses and metrics that are exact over uneven processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torchmetrics import MeanMetric, Metric

from lightning_gd.batch import Batch, DataBatch, as_batch, tensors
from lightning_gd.curves import Curves
from lightning_gd.distributed import reduce_sum


class EvaluatedModule(LightningModule):
    """A LightningModule that validates, tests and predicts from `forward`, `loss` and `metrics`.

    Attributes:
        curves: The curves of the run, with one point per update.
    """

    def __init__(self) -> None:
        super().__init__()
        self.curves = Curves()
        # Loss and rows of each batch that the next update of autograd mode sums up, and of each
        # update of the current `training_step`.
        self.batch_losses: list[tuple[Tensor, Tensor]] = []
        self.step_losses: list[tuple[Tensor, Tensor | float]] = []
        self.gradient_norm = torch.zeros(())  # of the update that is about to be made
        self.not_direct = ""  # why the updates of a step are each made by `optimizer.step()`
        self.replays: Any = None  # updates that are recorded as CUDA graphs
        self.stable_lr: float | None = None  # the largest, where a callback has found it
        self._evaluation: dict[str, Metric] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the records of the run out of a copy."""
        empty = {"curves": Curves(), "batch_losses": [], "step_losses": [], "replays": None}
        return {**super().__getstate__(), **empty}

    def rows(self, batch: Any) -> float:
        """Return the number of rows of a batch: the first dimension of its first tensor.

        Override it where `loss` is another mean: return the weight that the mean divides by,
        such as the number of unpadded tokens or Σw, and 1 for a sum. Means over processes and
        accumulated batches are weighted by it.
        """
        plain = isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor)
        first = batch[0] if plain else next(tensors(batch), None)
        if first is None or first.ndim == 0:
            raise ValueError(
                f"{type(self).__name__} cannot count the rows of a {type(batch).__name__}: its "
                "first tensor needs rows along its first dimension; override rows(batch)"
            )
        return len(first)

    def metrics(self) -> dict[str, Metric]:
        """Return fresh torchmetrics objects by name; they are fed `(prediction, target)`.

        `loss`, the mean of the loss over all rows, is always there; return one of that name
        to compute it from predictions instead.
        """
        return {}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics; those of several loaders are taken together."""
        self._evaluate(as_batch(batch))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the predictions for the first element of the batch, or for the tensor it is."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def start_evaluation(self) -> None:
        """Begin with fresh metrics, in float64 where the device has it."""
        self._evaluation = {"loss": MeanMetric(), **self.metrics()}
        for metric in self._evaluation.values():
            metric.to(self.device)
            if self.device.type != "mps":
                metric.set_dtype(torch.float64)

    def end_evaluation(self) -> dict[str, Tensor]:
        """Return the metrics over the rows of all processes; none if no batch was evaluated."""
        found, self._evaluation = self._evaluation, {}
        fed = float(any(metric.update_called for metric in found.values()))
        if not reduce_sum(torch.tensor(fed, device=self.device)):
            return {}
        values = {name: metric.compute() for name, metric in found.items()}
        if self.device.type == "mps":
            return values
        # Lightning takes the mean over processes, which in float32 would round what is equal.
        return {name: torch.as_tensor(value).double() for name, value in values.items()}

    def _evaluate(self, batch: Batch) -> None:
        rows, metrics = batch.rows(self), dict(self._evaluation)
        if not rows:
            return
        if isinstance(metrics.get("loss"), MeanMetric):
            mean: Any = metrics.pop("loss")
            mean.update(batch.loss(self), rows)
        if metrics and isinstance(batch, DataBatch):
            prediction, target = self(batch.content[0]), batch.content[1]
            for metric in metrics.values():
                metric.update(prediction, target)


def watched(trainer: Trainer) -> str:
    """Return the metric for selection, never of test data: `val/loss` or else `train/loss`."""
    counts: Any = trainer.num_val_batches
    counts = counts if isinstance(counts, list) else [counts]
    empty = trainer.val_dataloaders is not None and not sum(counts)
    return "val/loss" if trainer.enable_validation and not empty else "train/loss"


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Turn off dropout, batch statistics and autograd inside a `with` block."""
    training = [child for child in module.modules() if child.training]
    try:
        with torch.no_grad():
            module.eval()
            yield
    finally:
        for child in training:
            child.training = True


class _Loss(nn.Module):
    """The loss of a model on a batch as a module, for `functional_call`."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self) -> Tensor:
        return self.batch.loss(self.model)


def losses_at(module: nn.Module, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
    """Return the losses of a batch at K sets of weights, shape [K].

    `weights` has each parameter K times, shape [K, ...]; the module keeps its own.
    """
    loss, stacked = _Loss(module, batch), {f"model.{name}": w for name, w in weights.items()}
    count = len(next(iter(weights.values())))
    with evaluating(module):
        if count > 1:
            try:
                return vmap(lambda w: functional_call(loss, w))(stacked)
            except RuntimeError:  # not every loss can be computed at stacked weights
                pass
        each = ({name: w[k] for name, w in stacked.items()} for k in range(count))
        return torch.stack([functional_call(loss, w) for w in each])


@torch.no_grad()
def check_batch(model: nn.Module, content: Any) -> None:
    """Refuse a batch `(x, y)` that `forward` cannot take, or whose prediction would broadcast.

    A target [N, 1] against a prediction [N] makes residuals [N, N] without an error. Batches
    of other structures are left alone. The model and the random state stay as they are.

    Raises:
        ValueError: Naming the model and the shapes, or the dtypes.
    """
    like, pair = next(model.parameters(), None), isinstance(content, (tuple, list))
    if like is None or not pair or [type(part) for part in content] != [Tensor, Tensor]:
        return
    if type(model).forward is LightningModule.forward:  # only loss and gradients are defined
        return
    for name, values in zip("xy", content, strict=True):
        if values.is_floating_point() and values.dtype != like.dtype:
            raise ValueError(
                f"{name} is {values.dtype} but the weights are {like.dtype}: convert the data, or "
                "set --trainer.precision 64-true for float64 and 32-true for float32"
            )
    x, y = content
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(
            f"a batch (x, y) needs as many targets as inputs; got x {list(x.shape)} and "
            f"y {list(y.shape)}"
        )
    prediction = _predicted(model, x[:2]) if len(x) else None
    if isinstance(prediction, Tensor) and _broadcasts(prediction, y[:2]):
        raise ValueError(
            f"{type(model).__name__}.forward returns {form(prediction)} for x {form(x)}, which "
            f"would broadcast with y {form(y)}: the two must have one shape"
        )


def _predicted(model: nn.Module, x: Tensor) -> Any:
    with torch.random.fork_rng(), evaluating(model):
        try:
            return model(x)
        except (RuntimeError, IndexError) as error:
            what = f"{type(model).__name__} cannot take the data, whose x is {form(x)}"
            raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error


def _broadcasts(prediction: Tensor, y: Tensor) -> bool:
    """Tell whether a float target and a prediction of another shape would combine unnoticed."""
    if prediction.shape == y.shape or not y.is_floating_point():
        return False
    if prediction.numel() == 1 and prediction.ndim != 1:
        return True
    try:
        return torch.broadcast_shapes(prediction.shape, y.shape) is not None
    except RuntimeError:
        return False


def form(tensor: Tensor) -> str:
    """Return the shape of a tensor in words such as [N, 784]."""
    return "[]" if tensor.ndim == 0 else f"[{', '.join(['N', *map(str, tensor.shape[1:])])}]"
