"""Many TensorBoard events framed at once: their checksums are computed side by side.

TensorBoard's own writer computes the CRC32C of each record byte by byte in Python, which costs more
than a small update. A file of events is a sequence of records: length (uint64), masked CRC of the
length, data, masked CRC of the data.
"""

from __future__ import annotations

import struct

import numpy as np
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE, masked_crc32c

_TABLE = np.array(CRC_TABLE, np.uint32)


def framed(events: list[bytes]) -> bytes:
    """The records of serialized events, in order; those of one length share the work."""
    records, by_length = [b""] * len(events), {}
    for i, event in enumerate(events):
        by_length.setdefault(len(event), []).append(i)
    for length, places in by_length.items():
        header = struct.pack("<Q", length)
        header += struct.pack("<I", masked_crc32c(header))
        data = np.frombuffer(b"".join(events[i] for i in places), np.uint8)
        sums = _masked_crc32c(data.reshape(len(places), length)).astype("<u4").tobytes()
        for k, i in enumerate(places):
            records[i] = header + events[i] + sums[4 * k : 4 * k + 4]
    return b"".join(records)


def _masked_crc32c(rows: np.ndarray) -> np.ndarray:
    """Of every row of bytes, shape [n, length], the masked CRC32C, shape [n]."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
