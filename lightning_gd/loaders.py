"""Warnings about a DataLoader in place of a TensorDataModule."""

import math
from collections.abc import Iterator

from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler, RandomSampler

from lightning_gd.batch import EvenSteps


def effects(trainer: Trainer) -> Iterator[str]:
    """Yield the warnings about the training loader at the start of a fit."""
    loader = trainer.train_dataloader
    endless = math.isinf(trainer.num_training_batches) and not isinstance(loader, EvenSteps)
    if endless and trainer.world_size > 1:
        yield (
            "the loader has no length: where the batches of a process end before those of the "
            "others, the run hangs until the timeout; give the Trainer EvenSteps(loader)"
        )
    sampler = getattr(loader, "sampler", None)
    if trainer.global_step and isinstance(sampler, RandomSampler):
        yield (
            "the DataLoader shuffles by random numbers of this process: the resumed run sees the "
            "rows in another order than an uninterrupted one; a TensorDataModule does not"
        )
    if not isinstance(sampler, DistributedSampler):
        return
    rows, processes = len(sampler.dataset), sampler.num_replicas  # pyright: ignore[reportArgumentType]
    if extra := sampler.total_size - rows:
        what = f"{'repeats' if extra > 0 else 'leaves out'} {abs(extra)} of {rows} rows"
        yield (
            f"the DataLoader {what}, so that each of {processes} processes has as many: the run is "
            "not that of one process; a TensorDataModule divides the rows without it"
        )
