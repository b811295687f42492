"""Events that are written in bulk are those of TensorBoard's own serialization."""

import math
import struct

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from lightning_gd.event_file import records

# One byte of a step holds 7 bits.
STEPS = [0, 1, 127, 128, 129, 16_383, 16_384, 2**21 - 1, 2**21, 2**40]


def record(step, values):
    tags = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    data = Event(summary=Summary(value=tags), step=step, wall_time=1.5e9).SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(sums) + data + next(sums)


def test_records_are_those_of_the_library():
    values = [0.0, -0.0, 1.5, -math.pi, 1e-45, math.inf, -math.inf, math.nan, 3e38, 7.0]
    points = [(s, {"train/loss": v, "norm": -v}) for s, v in zip(STEPS, values, strict=True)]
    points += [(s, {"x" * 200: v}) for s, v in zip(STEPS, values, strict=True)]
    points += [(3, {"lr": 0.1, "train/loss": 2.0}), (4, {"lr": 0.2, "train/loss": 1.0})]
    assert records(points, 1.5e9) == b"".join(record(*point) for point in points)
    assert records([(5, {"loss": 1e300})], 1.5e9) == record(5, {"loss": math.inf})
