"""The state of the generators that a loss may draw random numbers from."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class RandomState(NamedTuple):
    """The state of every generator that a training step may draw from."""

    torch: list[Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> "RandomState":
        """Return the present state."""
        return cls(torch_states(), random.getstate(), np.random.get_state())

    @classmethod
    def seeded(cls, seed: int) -> "RandomState":
        """Return torch's state after a seed; Python's and NumPy's are the same for every seed."""
        gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        torch_ones = (torch.Generator(device).manual_seed(seed) for device in ("cpu", *gpus))
        return cls([generator.get_state() for generator in torch_ones], *_FIRST)

    def restore(self) -> None:
        """Continue from this state."""
        torch.set_rng_state(self.torch[0])
        torch.cuda.set_rng_state_all(self.torch[1:])
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def is_present(self) -> bool:
        """Tell whether no number was drawn since."""
        now = RandomState.now()
        same = all(map(torch.equal, now.torch, self.torch)) and now.python == self.python
        return same and all(map(np.array_equal, now.numpy, self.numpy))


_FIRST = random.Random(0).getstate(), np.random.RandomState(0).get_state()


def torch_states(own: Iterable[torch.Generator] = ()) -> list[Tensor]:
    """Return the states of torch's generators, of the CPU and of GPUs in use, and of others."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus, *(generator.get_state() for generator in own)]


def generators_of(model: nn.Module) -> list[torch.Generator]:
    """Return the generators that are attributes of a model."""
    values = (value for module in model.modules() for value in vars(module).values())
    return [value for value in values if isinstance(value, torch.Generator)]


@contextmanager
def same_randomness() -> Iterator[None]:
    """Leave the random state after a `with` block as it was before."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()
