"""What a model is asked about: batches of any structure, and several of them per step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities import apply_to_collection
from torch import Tensor

from lightning_gd.distributed import any_process

BASIS = ("forward", "loss", "gradients")  # the methods that shortcuts of a model rest on


class Batch:
    """Local rows of one batch, with the questions that a model answers about them."""

    def loss(self, model: Any) -> Tensor:
        """Return the loss of `model`, the mean over these rows, shape []."""
        raise NotImplementedError

    def loss_and_gradients(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the explicit gradient of each parameter, by name."""
        raise NotImplementedError

    def rows(self, model: Any) -> float:
        """Return the number of local rows, the weight of this batch in a mean over processes."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> "Batch":
        """Return this batch on another device."""
        raise NotImplementedError


class DataBatch(Batch):
    """What a DataLoader yields: `loss(*tuple)`, `loss(**dict)` or `loss(tensor)`."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def loss(self, model: Any) -> Tensor:
        return call(model.loss, self.content)

    def loss_and_gradients(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if is_current(type(model), "loss_and_gradients"):
            return call(model.loss_and_gradients, self.content)
        return call(model.loss, self.content), call(model.gradients, self.content)

    def rows(self, model: Any) -> float:
        return model.rows(self.content)

    def to(self, device: torch.device | str) -> "DataBatch":
        return DataBatch(move_data_to_device(self.content, torch.device(device)))


class NoRows(Batch):
    """The batch of a process that has no rows left: it weighs nothing, and has no loss."""

    def rows(self, model: Any) -> float:
        return 0

    def to(self, device: torch.device | str) -> "NoRows":
        return self


class EvenSteps:
    """Gives every process as many batches: those of its loader, then empty ones.

    An epoch ends when the loaders of all processes have ended. For loaders without a length, and
    for a GradientDescentModule in both modes; it costs a collective of one number per batch.

    Args:
        loader: The local batches, in any structure; each process may have another number of them.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self.loader), NoRows()
        batch = next(batches, end)
        while any_process(batch is not end):
            yield batch
            batch = next(batches, end)


class Updates:
    """The batches of one `training_step` that makes several updates, in order."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        return self.batches[number]

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def to(self, device: torch.device | str) -> "Updates":
        """Move all batches to a device; one that occurs several times is moved once."""
        moved = {id(batch): batch for batch in self.batches}
        moved = {key: move_data_to_device(b, torch.device(device)) for key, b in moved.items()}
        return Updates([moved[id(batch)] for batch in self.batches])


@runtime_checkable
class TakesUpdates(Protocol):
    """What a DataModule asks of the model that it feeds."""

    @property
    def several_updates(self) -> bool:
        """Whether `training_step` makes one update for each batch of an `Updates`."""
        ...

    @property
    def batches_per_update(self) -> int:
        """The number of batches whose gradients are accumulated per update."""
        ...


@runtime_checkable
class GivesUpdates(Protocol):
    """What a model and its callbacks ask of the DataModule that feeds them."""

    updates_per_step: int

    @property
    def full_batch(self) -> bool:
        """Whether every update sees all training rows."""
        ...


@runtime_checkable
class CountsUpdates(Protocol):
    """What a run asks of the loader that feeds it."""

    @property
    def updates_per_epoch(self) -> int:
        """The number of updates per epoch."""
        ...

    def updates_in_epoch(self) -> int | None:
        """Return the number of updates made in this epoch, 0 after the last; None: unknown."""
        ...


def batches_of(content: Any) -> Updates:
    """Return the batches of one `training_step`, whatever the loader yielded."""
    return content if isinstance(content, Updates) else Updates([content])


def as_batch(content: Any) -> Batch:
    """Wrap what a DataLoader yields; a `Batch` is returned as it is."""
    return content if isinstance(content, Batch) else DataBatch(content)


def call(function: Callable[..., Any], content: Any) -> Any:
    """Call `function(*content)`, `function(**content)` or `function(content)` by its type."""
    if isinstance(content, (tuple, list)):
        return function(*content)
    return function(**content) if isinstance(content, Mapping) else function(content)


def tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, in order, through tuples, lists and dicts."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (tuple, list, Mapping)):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from tensors(part)


def is_of_tensors(content: Any) -> bool:
    """Tell whether a batch holds tensors and nothing else, in tuples, lists and dicts."""
    if isinstance(content, (tuple, list, Mapping)):
        return all(
            map(is_of_tensors, content.values() if isinstance(content, Mapping) else content)
        )
    return isinstance(content, Tensor)


def count_rows(content: Any) -> int:
    """Return the length of the first tensor of a batch that has one; 0 without any."""
    return next((len(values) for values in tensors(content) if values.ndim), 0)


def take_rows(content: Any, rows: Tensor | slice) -> Any:
    """Return some rows of every tensor that has as many as the first."""
    count = count_rows(content)

    def taken(values: Tensor) -> Tensor:
        return values[rows] if values.shape[:1] == (count,) else values

    return apply_to_collection(content, Tensor, taken)


def draw(content: Any, rows: int, seed: int) -> Any:
    """Return at most so many rows of a batch of any structure, drawn at random."""
    order = torch.randperm(count_rows(content), generator=torch.Generator().manual_seed(seed))
    return take_rows(content, order[:rows])


@cache
def is_current(cls: type, name: str, basis: tuple[str, ...] = BASIS) -> bool:
    """Tell whether method `name` still belongs to the formulas of `cls`.

    A class that overrides one of `basis` does not inherit a shortcut written for the old
    formulas: `name` must be defined in that class or below it.
    """
    for ancestor in cls.__mro__:
        if name in vars(ancestor):
            return True
        if any(method in vars(ancestor) for method in basis):
            return False
    return False
