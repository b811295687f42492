"""The loss on the test rows during training."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_gd.batch import Batch
from lightning_gd.data.loader import GlobalBatches
from lightning_gd.data.tensors import tensor_data
from lightning_gd.distributed import reduce_sum
from lightning_gd.evaluation import losses_at
from lightning_gd.module import GradientDescentModule
from lightning_gd.settings import whole_number

TOGETHER, NUMBERS = 64, 2**19  # updates whose losses are computed together, and their weights


class TestCurve(Callback):
    """Records `test/loss`, the loss over all test rows at the weights before an update.

    In a step of several updates the losses of up to 64 are computed together, which changes their
    last digit at most. It needs a GradientDescentModule and a TensorDataModule with test rows.

    Args:
        every_n_updates: Updates from one point to the next; null is every update of the full
            batch, and the first of each epoch of mini-batches.
    """

    __test__ = False  # tells pytest that this is no test

    reads_gradients = False  # only weights

    def __init__(self, every_n_updates: int | None = None) -> None:
        whole_number("every_n_updates", every_n_updates, 1, optional=True)
        self.every_n_updates = every_n_updates
        self._batch: Batch | None = None  # the local test rows, on the device of the model
        self._fraction = 0.0  # of the rows of all processes
        self._kept: list[tuple[int, dict[str, Tensor]]] = []  # updates made, weights

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, loader = tensor_data(trainer), trainer.train_dataloader
        self._batch, self._kept = None, []
        if data and "test" in data.tables and isinstance(pl_module, GradientDescentModule):
            self._batch = data.whole("test").to(pl_module.device)
            rows = next(pl_module.parameters()).new_tensor(float(self._batch.rows(pl_module)))
            self._fraction = float(rows / reduce_sum(rows.clone()))
            self._parameters = dict(pl_module.named_parameters())
            size = sum(p.numel() for p in self._parameters.values())
            self._every, self._most = self.every_n_updates or 1, min(TOGETHER, NUMBERS // size)
            if isinstance(loader, GlobalBatches) and not (self.every_n_updates or data.full_batch):
                self._every = loader.updates_per_epoch

    def looks_at(self, step: int) -> bool:
        """Tell whether the test loss before this update is wanted."""
        return self._batch is not None and step % self._every == 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: GradientDescentModule, optimizer: Optimizer
    ) -> None:
        if self._batch is None or not self.looks_at(trainer.global_step):
            return
        weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._kept.append((trainer.global_step, weights))
        if len(self._kept) >= self._most:
            self._record(pl_module, self._batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GradientDescentModule, *_: Any
    ) -> None:
        if self._batch is not None and self._kept:
            self._record(pl_module, self._batch)

    def _record(self, module: GradientDescentModule, batch: Batch) -> None:
        kept, self._kept = self._kept, []
        losses = next(module.parameters()).new_zeros(len(kept))  # their sum is that of all parts
        if self._fraction:
            stacked = {name: torch.stack([w[name] for _, w in kept]) for name in kept[0][1]}
            losses = losses_at(module, batch, stacked) * self._fraction
        steps = [step for step, _ in kept]
        module.curves.record_all(steps, {"test/loss": losses}, local=True)
