"""TensorBoard, with all values of an update in one event and readable columns of settings."""

import os
import struct
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE, masked_crc32c
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,  # pyright: ignore[reportAttributeAccessIssue]
)
from torch.utils.tensorboard.summary import hparams as hparams_summaries

try:
    import fcntl
except ImportError:
    fcntl = None

SHOWN = ("batch_size", "gradient", "lr", "momentum", "start")  # the first columns in TensorBoard
METRICS = ("train/loss", "test/loss", "test/accuracy")  # their last value is a column too


class RunLogger(TensorBoardLogger):
    """Logs one run to `<save_dir>/<name>/version_N`.

    Args:
        save_dir: Folder of all runs.
        name: Folder of this experiment's runs in it.
        version: Number or name of the run; null takes the next number.
    """

    def __init__(
        self,
        save_dir: str = "lightning_logs",
        name: str | None = "run",
        version: int | str | None = None,
    ) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False)
        self._claimed = version
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
    def log_points(self, points: list[tuple[int, dict[str, float]]]) -> None:
        """Write `(step, {tag: value})`, all values of a step in one event."""
        now, events = time.time(), []
        for step, values in points:
            tags = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            event = Event(summary=Summary(value=tags), step=step, wall_time=now)
            events.append(event.SerializeToString())
        self.experiment.flush()  # what was added before comes first
        with self._event_files()[-1].open("ab") as file:
            file.write(framed(events))

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
        """Remove what was written after `events` was returned; it is about to be written again."""
        for file in self._event_files():
            if file.name not in events:
                file.unlink()
            elif file.stat().st_size > events[file.name]:
                os.truncate(file, events[file.name])

    def _event_files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob("events.out.tfevents.*"))


def framed(events: list[bytes]) -> bytes:
    """Return the records of serialized events: TensorBoard frames them one by one, in Python.

    A record is length (uint64), masked CRC32C of the length, data, masked CRC32C of the data.
    The checksums of events of one length are computed together.
    """
    records, places = [b""] * len(events), {}
    for i, event in enumerate(events):
        places.setdefault(len(event), []).append(i)
    for length, same in places.items():
        header = struct.pack("<Q", length)
        header += struct.pack("<I", masked_crc32c(header))
        data = np.frombuffer(b"".join(events[i] for i in same), np.uint8).reshape(-1, length)
        for i, checksum in zip(same, _checksums(data), strict=True):
            records[i] = header + events[i] + checksum.tobytes()
    return b"".join(records)


def _checksums(rows: np.ndarray) -> np.ndarray:
    table, crc = np.array(CRC_TABLE, np.uint32), np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    return (((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)).astype("<u4")
