"""A long run takes no more memory and no more time per update than a short one."""

import os
import time

import pytest
from conftest import run, trainer_words
from lightning.pytorch import Callback

import lightning_gd

UPDATES, STEP = 200_000, 500


class Meter(Callback):
    """Notes the resident memory, in bytes, and the time, in seconds, after each step."""

    noted: list[tuple[int, float]] = []

    def on_train_batch_end(self, *_):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        Meter.noted.append((pages * os.sysconf("SC_PAGESIZE"), time.process_time()))


@pytest.mark.slow
def test_200_000_updates(tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_gd, "Meter", Meter, raising=False)
    words = [
        "--config",
        "linear",
        "--data.updates_per_step",
        str(STEP),
        "--test_curve.every_n_updates",
        "100",
    ]
    words += [
        "--pictures",
        "null",
        "--data.passes_per_epoch",
        "50000",
        "--checkpoint.every_n_updates",
        "10000",
    ]
    words += ["--trainer.callbacks+=test_length.Meter", "--model.momentum", "0.9"]
    Meter.noted = []
    status, _, error = run(
        "fit", *words, *trainer_words(max_steps=UPDATES, default_root_dir=tmp_path)
    )
    assert status == 0, error
    memory, seconds = zip(*Meter.noted, strict=True)
    assert len(memory) == UPDATES // STEP
    assert max(memory[20:]) - memory[20] < 5e6  # after the first 10,000 updates
    tenth = len(seconds) // 10
    first, last = seconds[2 * tenth] - seconds[tenth], seconds[-1] - seconds[-1 - tenth]
    assert last < 1.3 * first  # of CPU; from update 131,072 on every second point is written
    (events,) = tmp_path.rglob("events*")
    # 165,536 events of 3 curves, about 100 bytes each.
    assert events.stat().st_size < 25e6
