"""TensorBoard's event files as bytes: many points at once."""

import contextlib
import struct
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE, masked_crc32c

from lightning_gd.curves import Points


def read(file: Path) -> tuple[Points, int]:
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


def records(points: Points, now: float) -> bytes:
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
