"""What the check of an update needs, kept before the update is made."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_gd.batch import Updates, batches_of
from lightning_gd.checked_update import Update
from lightning_gd.gradcheck.delivered import Part
from lightning_gd.gradcheck.randomness import RandomState
from lightning_gd.gradcheck.twin import converted, twin
from lightning_gd.module import GradientDescentModule


class KeptUpdate:
    """The local batches of an update, with the random state before each.

    Attributes:
        first: `global_step` before the first of them.
        steps: Batches of each step, its index, and the random state before it.
    """

    def __init__(self) -> None:
        self._wrapped: dict[str, Any] | None = None  # the attribute in place of a wrapped step
        self.begin(-1)

    def begin(self, step: int) -> None:
        """Forget the update before; of this one nothing is kept yet."""
        self.first, self.steps = step, list[tuple[Updates, int, RandomState]]()
        self._before: nn.Module | None = None  # the module before the update

    def when_it_starts(self, module: LightningModule, keep: Callable[[], None]) -> None:
        """Call `keep` before the training step, and after the module's own hook before it."""
        own = isinstance(module, GradientDescentModule)
        if own or not is_overridden("on_train_batch_start", module):
            keep()
            return
        step, attributes = module.training_step, vars(module)
        self._wrapped = {n: v for n, v in attributes.items() if n == "training_step"}

        @wraps(step)
        def kept(*args: Any, **kwargs: Any) -> Any:
            self.unwrap(module)
            keep()
            return step(*args, **kwargs)

        attributes["training_step"] = kept

    def unwrap(self, module: LightningModule) -> None:
        """Give `training_step` back; a step that the module's own hook left out has not done it."""
        if self._wrapped is not None:
            vars(module).pop("training_step")
            vars(module).update(self._wrapped)
        self._wrapped = None

    def add(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batches of a step; those of a foreign module are copied, as the module is."""
        own = isinstance(module, GradientDescentModule)
        lazy = any(isinstance(p, UninitializedParameter) for p in module.parameters())
        if self._before is None and not own and not lazy:
            self._before = twin(module)
        kept = batches_of(batch if own else converted(batch, None))
        self.steps.append((kept, batch_idx, RandomState.now()))

    def as_it_was(self, module: Any) -> nn.Module:
        """Return the module before the update, with its present weights."""
        if self._before is None:
            return module
        with torch.no_grad():
            for old, new in zip(self._before.parameters(), module.parameters(), strict=True):
                old.copy_(new)
        return self._before

    def parts(self, update: Update, state: RandomState) -> list[Part]:
        """Return the local batches of the update that begins with a state, with their own."""
        kept = [
            (batches, k, index, None if k else before)
            for batches, index, before in self.steps
            for k in range(len(batches))
        ]
        if not update.explicit:
            parts = [update.part(batches[k], index, before) for batches, k, index, before in kept]
            is_first = update.trainer.global_step == self.first  # of the optimizers of a batch
            return parts if is_first else [replace(part, state=state) for part in parts]
        every = update.module.batches_per_update  # only these are gathered from the table
        kept = kept[(update.trainer.global_step - self.first) * every :][:every]
        return [
            update.part(batches[k], index, None if i else state)
            for i, (batches, k, index, _) in enumerate(kept)
        ]
