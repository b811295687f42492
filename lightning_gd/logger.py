"""TensorBoard, with all values of an update in one event and readable columns of settings."""

import os
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,  # pyright: ignore[reportAttributeAccessIssue]
)
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from lightning_gd import event_file
from lightning_gd.curves import Points

try:
    import fcntl
except ImportError:
    fcntl = None

SHOWN = (
    "model",
    "batch_size",
    "gradient",
    "lr",
    "momentum",
    "start",
)  # the first columns in TensorBoard
METRICS = ("train/loss", "test/loss", "test/accuracy")  # their last value is a column too


class RunLogger(TensorBoardLogger):
    """Logs one run to `<save_dir>/<name>/version_N`.

    Attributes:
        kept: Points `(update, {tag: value})` of the run before it was resumed.

    Args:
        save_dir: Folder of all runs.
        name: Folder of this experiment's runs in it.
        version: Number or name of the run; null takes the next number.
        curves: Whether TensorBoard's files are written; without them it keeps the folder of a run
            that other loggers log.
    """

    def __init__(
        self,
        save_dir: str = "lightning_logs",
        name: str | None = "run",
        version: int | str | None = None,
        curves: bool = True,
    ) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False)
        self.curves, self._claimed = curves, version
        self.kept: Points = []
        self._lock: int | None = None  # an open file, while a fit writes into the folder

    @property
    def version(self) -> int | str:
        """The number or name of the run; on the first process its folder is made for it alone."""
        number = super().version if self._claimed is None else self._claimed
        while self._claimed is None and rank_zero_only.rank == 0:
            try:
                Path(self.root_dir, f"version_{number}").mkdir(parents=True)
                self._claimed = number
            except FileExistsError:  # another run was faster
                number = int(number) + 1
        return number

    @property
    def experiment(self) -> Any:
        """TensorBoard's SummaryWriter; without curves, what does nothing."""
        return super().experiment if self.curves else DummyLogger().experiment

    @rank_zero_only
    def lock(self) -> None:
        """Keep other processes from continuing this run until `finalize`.

        On Windows, and where the file system knows no locks, nothing happens.
        """
        if fcntl is None:
            return
        Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        self._lock = os.open(Path(self.log_dir, ".lock"), os.O_WRONLY | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            raise OSError(f"{self.log_dir} is being written by another run: wait for it") from error
        except OSError:  # no locks there
            self._unlock()

    @rank_zero_only
    def log_points(self, points: Points) -> None:
        """Write `(step, {tag: value})`, all values of a step in one event."""
        if not self.curves:
            return
        self.experiment.flush()  # what was added before comes first
        files = self._event_files()
        if not files:
            raise OSError(f"{self.log_dir} has lost its event file: was the folder deleted?")
        with files[-1].open("ab") as file:
            file.write(event_file.records(points, time.time()))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all but the epoch that Lightning adds: the x axis counts updates."""
        super().log_metrics({tag: v for tag, v in metrics.items() if tag != "epoch"}, step)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: Any = None, step: int | None = None
    ) -> None:
        """Write the settings; TensorBoard adds the last value of each of `METRICS`."""
        super().log_hyperparams(params)
        if not self.curves:
            return
        settings: Any = self.hparams
        columns = {
            name: value if isinstance(value, (int, float)) else str(value)
            for name, value in settings.items()
            if not name.startswith("_")
        }
        experiment, *session = hparams_summaries(columns, dict.fromkeys(METRICS, 0.0))
        plugin = experiment.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(plugin.content)
        for info in data.experiment.hparam_infos:
            info.differs = info.name in SHOWN
        plugin.content = data.SerializeToString()
        for summary in (experiment, *session):
            self.experiment.file_writer.add_summary(summary)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush, and leave the files open: a test after the fit writes to them too."""
        self.experiment.flush()
        if status == "success":
            self.save()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def events(self) -> dict[str, int]:
        """Flush, and return the event files of this run with their sizes in bytes."""
        self.experiment.flush()
        return {file.name: file.stat().st_size for file in self._event_files()}

    @rank_zero_only
    def cut(self, events: dict[str, int]) -> None:
        """Remove what was written after `events` was returned; it is about to be written again.

        What is left is read into `kept`; a warning names files that are missing or damaged.
        """
        for file in self._event_files():
            if file.name not in events:
                file.unlink()
            elif file.stat().st_size > events[file.name]:
                os.truncate(file, events[file.name])
        self.kept, damaged = [], []
        for name, size in sorted(events.items()):
            points, end = event_file.read(Path(self.log_dir, name))
            self.kept += points
            damaged += [name] if end < size else []
        if damaged:
            warnings.warn(
                f"{', '.join(damaged)} in {self.log_dir} is missing or damaged: the run goes on, "
                "but TensorBoard and the pictures lack points that were written before",
                stacklevel=2,
            )

    def _event_files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob("events.out.tfevents.*"))
