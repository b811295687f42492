"""The private names of torch that this package uses, and why; checked with torch 2.6 and 2.14."""

from collections.abc import Iterator
from typing import Any

import torch.optim.optimizer as torchs
from torch.utils._python_dispatch import TorchDispatchMode

# There is no public way to see what collectives a function calls, whoever calls them.
DispatchMode = TorchDispatchMode


def step_hooks(optimizer: Any) -> Iterator[Any]:
    """Yield the hooks of `optimizer.step()`: torch.optim has no public way to ask for them."""
    yield from optimizer._optimizer_step_pre_hooks.values()
    yield from optimizer._optimizer_step_post_hooks.values()
    yield from torchs._global_optimizer_pre_hooks.values()  # pyright: ignore[reportAttributeAccessIssue]
    yield from torchs._global_optimizer_post_hooks.values()  # pyright: ignore[reportAttributeAccessIssue]
