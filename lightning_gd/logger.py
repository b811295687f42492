"""TensorBoard, with many points written at once and the final metrics in the HParams tab."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,  # pyright: ignore[reportAttributeAccessIssue]
)
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from lightning_gd.events import framed

# TensorBoard shows five columns of settings at first: these.
SHOWN = ("batch_size", "gradient", "lr", "momentum", "start")


class RunLogger(TensorBoardLogger):
    """Logs one run to `<save_dir>/<name>/version_N`.

    Args:
        save_dir: Folder of all runs.
        name: Folder of this experiment's runs in it.
        version: Number or name of the run; null takes the next number.
        metrics: Curves whose last value stands in the HParams tab.
    """

    def __init__(
        self,
        save_dir: str = "lightning_logs",
        name: str | None = "run",
        version: int | str | None = None,
        metrics: tuple[str, ...] = ("train/loss", "test/loss", "test/accuracy"),
    ) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False)
        self.metrics = metrics

    @rank_zero_only
    def log_points(self, points: list[tuple[int, dict[str, float]]]) -> None:
        """Write `(step, {tag: value})`, all values of a step in one event."""
        now, events = time.time(), []
        for step, values in points:
            tags = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            event = Event(summary=Summary(value=tags), step=step, wall_time=now)
            events.append(event.SerializeToString())
        writer = self.experiment._get_file_writer().event_writer
        writer.flush()  # what was added before comes first
        writer._async_writer._writer._writer.write(framed(events))

    def events(self) -> dict[str, int]:
        """Flush, and tell the files of this run's events and their sizes in bytes."""
        self.experiment.flush()
        return {file.name: file.stat().st_size for file in self._event_files()}

    @rank_zero_only
    def cut(self, events: dict[str, int]) -> None:
        """Go back to `events`: what was written later is about to be written again."""
        for file in self._event_files():
            if file.name not in events:
                file.unlink()
            elif file.stat().st_size > events[file.name]:
                os.truncate(file, events[file.name])

    def _event_files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob("events.out.tfevents.*"))

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Name the columns of the HParams tab; it shows the last value of each curve itself."""
        params = dict(vars(params)) if isinstance(params, Namespace) else dict(params)
        self.hparams.update(params)
        columns = {name: _cell(v) for name, v in params.items() if not name.startswith("_")}
        experiment, *session = hparams_summaries(columns, dict.fromkeys(self.metrics, 0.0))
        plugin = experiment.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(plugin.content)
        for info in data.experiment.hparam_infos:
            info.differs = info.name in SHOWN  # these come first
        plugin.content = data.SerializeToString()
        writer = self.experiment._get_file_writer()
        for summary in (experiment, *session):
            writer.add_summary(summary)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All but the epoch that Lightning adds: the x axis counts updates."""
        super().log_metrics({tag: v for tag, v in metrics.items() if tag != "epoch"}, step)


def _cell(value: Any) -> int | float | str:
    plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    return value if plain else str(value)
