"""A run that is interrupted ends like one that is complete."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_gd.distributed import reduce_sum, world_size


class Interrupt(Callback):
    """Ends the fit at Ctrl-C or SIGTERM after the step that is being made, with a checkpoint.

    A second signal ends the process at once. Of several processes all end after the same step.

    Attributes:
        received: Number of the signal that ended the last fit; 0 for none.
    """

    def __init__(self) -> None:
        self.received = self._noted = 0
        self._before: dict[int, Any] = {}  # the handlers that Python and Lightning have set

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.received, self._noted, self._before = 0, 0, {}
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        noted = self._noted
        if world_size() > 1:
            noted = reduce_sum(torch.tensor(float(noted), device=pl_module.device)).item()
        if noted:
            self.received = self._noted or signal.SIGTERM
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        for each in self._before:  # Lightning's own would wait for the other processes
            signal.signal(each, signal.SIG_DFL)

    def _restore(self) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
