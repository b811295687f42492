"""What `predict` finds, as a file."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_gd.callbacks.run_folder import write_csv
from lightning_gd.data.tensors import EVALUATION_ROWS, tensor_data
from lightning_gd.distributed import reduce_sum


class Predictions(Callback):
    """Writes `predictions.csv` into the folder of a `predict` run, one line per test row.

    `row` counts the test rows from 0; for a table read from a file it is the line of that file,
    whose header is line 1. `target` is empty where it is not known. Several numbers per row stand
    in one cell, separated by spaces. It needs a TensorDataModule.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._found: Tensor | None = None  # shape [N, K + 1]: K numbers, and 1 if they are known

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        data, first = tensor_data(trainer), batch_idx * EVALUATION_ROWS
        if data is None or not isinstance(outputs, Tensor) or outputs.ndim == 0:
            return
        values = outputs[:, None].flatten(1)
        if self._found is None:
            self._found = values.new_zeros(len(data.tables["test"]), values.shape[1] + 1)
        rows = self._found[first : first + EVALUATION_ROWS]
        rows = rows[trainer.global_rank :: trainer.world_size]
        if len(rows) == len(values):
            rows.copy_(torch.cat([values, torch.ones_like(values[:, :1])], dim=1))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = tensor_data(trainer)
        if data is None or self._found is None:
            return
        found = reduce_sum(self._found).cpu()
        if not trainer.is_global_zero:
            return
        target = data.tables["test"].targets()
        numbers = getattr(data, "test_lines", range(len(found)))
        rows: list[tuple[Any, ...]] = [("row", "target", "prediction")]
        for i in found[:, -1].nonzero().flatten().tolist():
            rows.append((numbers[i], _cell(target[i]), _cell(found[i, :-1])))
        if path := write_csv(trainer, "predictions.csv", rows):
            print(f"predictions: {path}")


def _cell(values: Tensor) -> str:
    numbers = values.flatten().tolist()
    return " ".join("" if number != number else repr(number) for number in numbers)
