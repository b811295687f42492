"""The loss on the test rows during training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_gd.batch import Batch
from lightning_gd.data.tables import GlobalBatches
from lightning_gd.data.tensors import tensor_data
from lightning_gd.distributed import reduce_sum
from lightning_gd.module import GradientDescentModule
from lightning_gd.settings import whole_number


class TestCurve(Callback):
    """Records `test/loss`, the loss over all test rows at the weights before an update.

    It needs a GradientDescentModule and a TensorDataModule with test rows.

    Args:
        every_n_updates: Updates from one point to the next; null is every update of the full
            batch, and the first of each epoch of mini-batches.

    Raises:
        ValueError: If `every_n_updates` is below 1.
    """

    __test__ = False  # tells pytest that this is no test

    def __init__(self, every_n_updates: int | None = None) -> None:
        whole_number("every_n_updates", every_n_updates, 1, optional=True)
        self.every_n_updates = every_n_updates
        self._batch: Batch | None = None  # the local test rows, on the device of the model
        self._fraction = 0.0  # of the rows of all processes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, loader, self._batch = tensor_data(trainer), trainer.train_dataloader, None
        if data and "test" in data.tables and isinstance(pl_module, GradientDescentModule):
            self._batch = data.whole("test").to(pl_module.device)
            rows = next(pl_module.parameters()).new_tensor(float(self._batch.rows(pl_module)))
            self._fraction = float(rows / reduce_sum(rows.clone()))
            self._every = self.every_n_updates or 1
            if isinstance(loader, GlobalBatches) and not (self.every_n_updates or data.full_batch):
                self._every = loader.updates_per_epoch

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: GradientDescentModule, optimizer: Optimizer
    ) -> None:
        if self._batch is None or trainer.global_step % self._every:
            return
        part = next(pl_module.parameters()).new_zeros(())  # the loss is the sum of all parts
        if self._fraction:
            with evaluating(pl_module):
                part = self._batch.loss(pl_module) * self._fraction
        pl_module.curves.record(trainer.global_step, {"test/loss": part}, local=True)


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Turn off dropout, batch statistics and autograd inside a `with` block."""
    training = [child for child in module.modules() if child.training]
    with torch.no_grad():
        module.eval()
        yield
    for child in training:
        child.training = True
