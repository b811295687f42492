"""A model that ends its own process, for tests of what the others do then."""

import os
import signal
import time

from lightning_gd import LinearRegression


class Failing(LinearRegression):
    """At update 20, on the process `rank`: `raise`, `kill` or `stop`."""

    def __init__(self, rank: int = 1, how: str = "raise", **kwargs):
        super().__init__(**kwargs)
        self.rank, self.how = rank, how

    def loss_and_gradients(self, x, y):
        if self.trainer.global_step >= 20 and self.trainer.global_rank == self.rank:
            print(f"\nfails at {time.time()}", flush=True)
            if self.how == "raise":
                raise ValueError("broken on purpose")
            os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)
        return super().loss_and_gradients(x, y)
