"""A model that ends its own process, for tests of what the others do then."""

import os
import signal
import time

from lightning_gd import LinearRegression


class Failing(LinearRegression):
    """At update `at`, on the process `rank`: `raise`, `kill` or `stop`."""

    def __init__(self, rank: int = 1, how: str = "raise", at: int = 20, **kwargs):
        super().__init__(**kwargs)
        self.place = rank, how, at

    def loss_and_gradients(self, x, y):
        rank, how, at = self.place
        if self.trainer.global_step >= at and self.trainer.global_rank == rank:
            print(f"\nfails at {time.time()}", flush=True)
            if how == "raise":
                raise ValueError("broken on purpose")
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return super().loss_and_gradients(x, y)
