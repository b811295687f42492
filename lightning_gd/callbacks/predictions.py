"""What `predict` finds, as a file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_gd.data.tensors import EVALUATION_ROWS, TensorDataModule
from lightning_gd.distributed import reduce_sum


class Predictions(Callback):
    """Writes `predictions.csv` into the folder of a `predict` run, one line a test row.

    `row` counts the test rows from 0; for a table of the user's it is the line of its file, whose
    header is line 1. `target` is empty where it is not known.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for all rows, of which each process fills its own."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        test = data.tables.get("test") if isinstance(data, TensorDataModule) else None
        self._target = None if test is None else test.y
        rows = 0 if test is None else len(test)
        like = next(pl_module.parameters())
        self._found = torch.zeros(2, rows, dtype=like.dtype, device=like.device)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Put the predictions of this process's share of a batch in their rows."""
        if self._target is None:
            return
        first = batch_idx * EVALUATION_ROWS
        mine = slice(first + trainer.global_rank, first + EVALUATION_ROWS, trainer.world_size)
        self._found[0, mine], self._found[1, mine] = outputs, 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of all processes; the first one writes."""
        if self._target is None:
            return
        predictions, done = reduce_sum(self._found).cpu()
        if trainer.is_global_zero and trainer.logger is not None and trainer.logger.log_dir:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            rows = getattr(data, "test_lines", range(len(predictions)))
            known = [row for row, is_done in enumerate(done.tolist()) if is_done]
            path = Path(trainer.logger.log_dir) / "predictions.csv"
            _write(path, [(rows[i], self._target[i], predictions[i]) for i in known])
            print(f"predictions: {path}")


def _write(path: Path, rows: list[tuple[int, Tensor, Tensor]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "target", "prediction"])
        for row, target, prediction in rows:
            writer.writerow([row, "" if target.isnan() else target.item(), prediction.item()])
