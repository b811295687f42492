"""What `predict` finds, as a file."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_gd.callbacks.run_folder import write_csv
from lightning_gd.data.tensors import EVALUATION_ROWS, tensor_data
from lightning_gd.distributed import reduce_sum

HEADER = ("row", "target", "prediction")


class Predictions(Callback):
    """Writes `predictions.csv` into the folder of a `predict` run, one line per test row.

    `row` counts the test rows from 0; for a table read from a file it is the line of that file,
    whose header is line 1. `target` is empty where it is not known. Several numbers per row stand
    in one cell, separated by spaces. On several processes it needs a TensorDataModule.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._found: Tensor | None = None  # shape [N, K + 1]: K numbers, and 1 if they are known
        self._batches: list[tuple[Tensor, list[str]]] = []  # those of foreign data, and targets

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        data, first = tensor_data(trainer), batch_idx * EVALUATION_ROWS
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            return
        values = outputs[:, None].flatten(1)
        if data is None:
            self._batches.append((values.cpu(), _targets(batch, len(values))))
            return
        if self._found is None:
            self._found = values.new_zeros(len(data.tables["test"]), values.shape[1] + 1)
        rows = self._found[first : first + EVALUATION_ROWS]
        rows = rows[trainer.global_rank :: trainer.world_size]
        if len(rows) == len(values):
            rows.copy_(torch.cat([values, torch.ones_like(values[:, :1])], dim=1))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, rows = tensor_data(trainer), list[tuple[Any, ...]]()
        if data is None and trainer.world_size == 1:
            for values, targets in self._batches:
                rows += [(len(rows) + k, targets[k], _cell(v)) for k, v in enumerate(values)]
        elif data is not None and self._found is not None:
            found, target = reduce_sum(self._found).cpu(), data.tables["test"].targets()
            numbers = getattr(data, "test_lines", range(len(found)))
            known = found[:, -1].nonzero().flatten().tolist()
            rows = [(numbers[i], _cell(target[i]), _cell(found[i, :-1])) for i in known]
        if not trainer.is_global_zero:
            return
        if not rows:
            several = ", and on several processes the data must be a TensorDataModule"
            print(f"no predictions.csv is written: predict_step must return a tensor{several}")
        elif path := write_csv(trainer, "predictions.csv", [HEADER, *rows]):
            print(f"predictions: {path}")


def _targets(batch: Any, rows: int) -> list[str]:
    """Return the second tensor of a batch, if it has so many rows, else empty cells."""
    y = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(y, Tensor) or y.shape[:1] != (rows,):
        return [""] * rows
    return [_cell(value) for value in y]


def _cell(values: Tensor) -> str:
    numbers = values.flatten().tolist()
    return " ".join("" if number != number else repr(number) for number in numbers)
