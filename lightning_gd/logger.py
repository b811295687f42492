"""TensorBoard, with all values of an update in one event and readable columns of settings."""

import contextlib
import os
import struct
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
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
        self.kept: list[tuple[int, dict[str, float]]] = []
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
    def log_points(self, points: list[tuple[int, dict[str, float]]]) -> None:
        """Write `(step, {tag: value})`, all values of a step in one event."""
        if not self.curves:
            return
        self.experiment.flush()  # what was added before comes first
        files = self._event_files()
        if not files:
            raise OSError(f"{self.log_dir} has lost its event file: was the folder deleted?")
        with files[-1].open("ab") as file:
            file.write(records(points, time.time()))

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
            points, end = _read(Path(self.log_dir, name))
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


def _read(file: Path) -> tuple[list[tuple[int, dict[str, float]]], int]:
    """Return the points in an event file, and the number of bytes up to which it is sound."""
    data, points, end = file.read_bytes() if file.is_file() else b"", [], 0
    with contextlib.suppress(struct.error, OverflowError):  # cut off, or of no possible length
        while end < len(data):
            start, (length,) = end + 12, struct.unpack_from("<Q", data, end)
            record = data[start : start + length]
            if struct.unpack_from("<I", data, start + length)[0] != masked_crc32c(record):
                break
            event, end = Event.FromString(record), start + length + 4
            scalars = (v for v in event.summary.value if v.HasField("simple_value"))
            if values := {v.tag: v.simple_value for v in scalars}:
                points.append((event.step, values))
    return points, end


def records(points: list[tuple[int, dict[str, float]]], now: float) -> bytes:
    """Return `(step, {tag: value})` as the records of an event file, one event per step.

    A record is length (uint64), masked CRC32C of the length, data, masked CRC32C of the data.
    Events with the same tags and as many bytes of the step are copies of the first, in which
    steps and values are replaced: TensorBoard would serialize and frame them one by one.
    """
    found, places = [b""] * len(points), {}
    for i, (step, values) in enumerate(points):
        places.setdefault((*values, (step.bit_length() + 6) // 7), []).append(i)
    for (*tags, size), same in places.items():
        data, steps = _copies(points[same[0]], len(same), now), [points[i][0] for i in same]
        for k in range(size):  # 7 bits per byte, the lowest first; the highest bit: more follow
            data[:, 10 + k] = [step >> 7 * k & 0x7F | (k + 1 < size) << 7 for step in steps]
        end = data.shape[1]
        for tag in reversed(tags):  # a value is the last of its message
            with np.errstate(over="ignore"):  # a loss that diverges becomes inf
                column = np.array([points[i][1][tag] for i in same]).astype("<f4")
            data[:, end - 4 : end] = column.view(np.uint8).reshape(-1, 4)
            end -= Summary(value=[Summary.Value(tag=tag, simple_value=0.0)]).ByteSize()
        header = struct.pack("<Q", data.shape[1])
        header += struct.pack("<I", masked_crc32c(header))
        for i, event, checksum in zip(same, data, _checksums(data), strict=True):
            found[i] = header + event.tobytes() + checksum.tobytes()
    return b"".join(found)


def _copies(point: tuple[int, dict[str, float]], count: int, now: float) -> np.ndarray:
    """Return the bytes of the event of a point, `count` times, shape [count, bytes]."""
    tags = [Summary.Value(tag=tag, simple_value=value) for tag, value in point[1].items()]
    event = Event(summary=Summary(value=tags), step=point[0], wall_time=now).SerializeToString()
    return np.tile(np.frombuffer(event, np.uint8), (count, 1))


def _checksums(rows: np.ndarray) -> np.ndarray:
    table, crc = np.array(CRC_TABLE, np.uint32), np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    return (((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)).astype("<u4")
