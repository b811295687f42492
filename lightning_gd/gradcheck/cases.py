"""The ways in which a function is called to check its backward pass."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning_utilities import apply_to_collection as each
from torch import Tensor, clone, nn

Call = Callable[..., Any]


class Case(nn.Module):
    """A way to call a function: `arrange` makes its arguments, `store` what backward gets.

    Of several outputs `only` one may be used.
    """

    def __init__(
        self,
        inputs: Any,
        slots: Any,
        arrange: Call = tuple,
        store: Call = clone,
        only: int | None = None,
    ) -> None:
        super().__init__()
        self.only = only
        self.inputs, self.slots, self.arrange, self.store = inputs, slots, arrange, store
        for slot in slots:
            self.register_parameter(f"input {slot}", nn.Parameter(inputs[slot].detach().clone()))

    def arguments(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Return the arguments of the function, with the parameters among them."""
        replaced = dict(zip(self.slots, self.parameters(), strict=True))
        return self.arrange([replaced.get(i, value) for i, value in enumerate(inputs)])


def cases_of(given: Case, outputs: Sequence[int]) -> Iterator[tuple[str, Case]]:
    """Return the other cases that are made of the inputs given, by name.

    The outputs are the numbers of those that have a gradient.
    """
    inputs, slots = given.inputs, given.slots
    shapes = {i: value.shape for i, value in enumerate(inputs) if isinstance(value, Tensor)}
    rows = next(iter(shapes[slots[0]]), 0)
    places = [i for i, shape in shapes.items() if shape[:1] == (rows,)]

    def changed(change: Call, values: Sequence[Any]) -> Sequence[Any]:
        return [change(value) if i in places else value for i, value in enumerate(values)]

    def taken(count: int) -> Sequence[Any]:
        return changed(lambda t: t[torch.arange(count, device=t.device) % rows], inputs)

    if rows and not any(rows in shape[1:] for shape in shapes.values()):
        odd = 5 if rows == 7 else 7
        yield "1 row", Case(taken(1), slots)
        yield f"{odd} rows", Case(taken(odd), slots)
        twice = partial(changed, lambda t: torch.cat([t, t]))
        yield "repeated rows", Case(taken(-(-rows // 2)), slots, twice)
    yield "non-contiguous inputs", Case(inputs, slots, lambda a: each(a, Tensor, _strided))
    yield "non-contiguous cotangent", Case(inputs, slots, store=_strided)
    yield "expanded cotangent", Case(inputs, slots, store=lambda c: c.mean().expand_as(c))
    for slot in slots if len(slots) > 1 else ():
        yield f"input {slot} alone", Case(inputs, [slot])
    for place in outputs if len(outputs) > 1 else ():
        yield f"output {place} alone", Case(inputs, slots, only=place)


def _strided(values: Tensor) -> Tensor:
    """Return the same values with transposed storage, or with gaps where that is contiguous."""
    turned = values.mT.contiguous().mT if values.ndim > 1 else values
    return turned if not turned.is_contiguous() else torch.stack([values, values], -1)[..., 0]
