"""A model whose loss, gradients and slopes can be asked for at any weights."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import lightning_gd.gradcheck.graph as graph
from lightning_gd.batch import call, count_rows, tensors
from lightning_gd.distributed import NoCollectives, world_size
from lightning_gd.gradcheck.point import AUTOGRAD, FORMULA, Loss, Point, Weights
from lightning_gd.gradcheck.precision import InFloat64
from lightning_gd.gradcheck.randomness import RandomState
from lightning_gd.gradcheck.report import NoLoss
from lightning_gd.gradcheck.stepping import step_length
from lightning_gd.gradcheck.twin import Attributes, converted, same

# Rounding per term of a sum, relative to the gradient. Terms that cancel are larger than it: 16 eps
# were exceeded by 3 of 19,000 random models. Mistakes are 1e-3 and more.
ROUNDING = 1024
AGAIN = (
    "when it is asked again for the same batch, weights, buffers and random numbers: "
    "give loss=, a function of the module and the batch alone"
)
SCALE = 0.5  # of the loss in the backward pass: one that takes grad_output as 1 is wrong then
OTHER = 1e-3  # the relative difference of two losses above which rounding is no explanation


class Bench:
    """A model in one dtype, on which every call finds the same buffers.

    If the loss draws random numbers, every call finds the same random state, too.

    Args:
        model: A copy, which changes.
        batch: What `loss` takes; its floating tensors are converted to the dtype of the model.
        loss: The loss of a model and a batch, differentiable by autograd.
        state: The random state before each call.
        reference: Another loss with the same value, of plain operations; differences are its own.
        fresh: Every call finds the same attributes; else a formula that keeps some is noticed.
        scale: Factor of the loss in the backward pass; the gradients are divided by it.

    Attributes:
        lifted: What lets the loss compute in float64 where it asks for less, if anything does.
        is_strict: Whether a loss that computes in a shorter dtype is refused.
        draws: Whether the loss draws random numbers; None before the first call.
    """

    def __init__(
        self,
        model: Any,
        batch: Any,
        loss: Loss,
        state: RandomState,
        reference: Loss | None = None,
        fresh: bool = True,
        scale: float = SCALE,
    ) -> None:
        self.model, self.scale = model, scale
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = dtype = next(dtypes, torch.float64)
        self.batch = converted(batch, dtype)
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.called, self.is_strict = "", False  # the method that was called last
        self.lifted: InFloat64 | None = None
        self.eps = torch.finfo(dtype).eps
        self._loss, self._reference, self._state = loss, reference or loss, state
        self.attributes = Attributes(self.model) if fresh else None
        self.draws: bool | None = None
        self.mutated = set[str]()  # parameters that a call changes in place
        self.padding, self.by_design = graph.embeddings_of(self.model)
        # Buffers that a call assigns anew, and what they are before it.
        self._assigned: dict[str, tuple[nn.Module, str, Tensor | None]] = {}
        self.trained = [name for name, p in self.parameters.items() if p.requires_grad]
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._present = dict(self.model.named_buffers())
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        self.functions: dict[str, set[str]] = {}  # custom autograd Functions behind each parameter
        self.changed = set[str]()  # what is changed in place by what
        self.generator = torch.Generator().manual_seed(int(state.torch[0].sum()))
        self.rows = count_rows(self.batch) or 1
        self.rounding = ROUNDING * self.eps * self._terms()  # of a sum, relative
        if not fresh:  # a formula may give the gradients of frozen parameters, too
            self.model.requires_grad_()
        self.with_graph = False  # the loss differentiates inside itself

    def _terms(self) -> int:
        """Return the number of terms in the sums: rows, numbers per row, and of the parameters."""
        numbers = sum(t.numel() for t in tensors(self.batch)) // self.rows
        return self.rows + numbers + max(n for v in self.start.values() for n in (*v.shape, 1))

    def measure(self, weights: Weights, method: str | None = None) -> Point:
        """Return the loss, its gradient by autograd, and that of the formula of a method."""
        self._place(weights)
        with graph.precision_seen() if self.is_strict else nullcontext([]) as seen:
            loss = self._watched(self._loss, "loss")
        if loss.numel() != 1:
            raise ValueError(f"it has shape {list(loss.shape)}, and a loss is one number")
        if not loss.isfinite():
            if weights is self.start:
                raise NoLoss(f"it is {loss.item()} on this batch")
            raise ValueError(f"it is {loss.item()} after a random step of the weights")
        self.functions = self.functions or graph.functions_behind(loss, self.parameters)
        with self.lifted.backward() if self.lifted else nullcontext():
            found = graph.gradients_of(loss, self.parameters, self.scale, self.model)
        gradients = {AUTOGRAD: {n: gradient / self.scale for n, gradient in found.items()}}
        if method:
            gradients[FORMULA] = self.formula(method, weights)
        own = self._reference is self._loss
        if own and max([torch.finfo(loss.dtype).eps, *seen]) > self.eps:
            raise TypeError(f"it computes in less precision than {self.dtype}")
        first = loss.item()
        again = not own or self.attributes and weights is self.start
        value = self.loss(weights) if again else first
        if own and self.differ(first, value):
            raise ValueError(f"it is {first:g}, and {value:g} {AGAIN}")
        return Point(weights, value, gradients)

    @torch.no_grad()
    def is_less_precise(self) -> bool:
        """Tell whether the loss rounds by more than the reference; both are asked after a step.

        Raises:
            NoLoss: If the two differ by more than any rounding.
        """
        weights = self.moved(self.loss(self.start))  # at the given ones the loss may be nearly zero
        self._place(weights)
        found, right = self._watched(self._loss, "loss"), self.loss(weights)
        if found.numel() != 1:
            return False  # which `measure` refuses
        value = found.item()
        if abs(value - right) > max(OTHER, self.rounding) * max(abs(value), abs(right)):
            raise NoLoss(f"it is {value:.9g}, and reference= returns {right:.9g}", is_mistake=True)
        return self.differ(value, right)

    def differ(self, one: float, other: float) -> bool:
        """Tell whether two losses differ by more than their rounding."""
        return abs(one - other) > min(self.rounding, OTHER) * max(abs(one), abs(other))

    @torch.no_grad()
    def formula(self, method: str, weights: Weights) -> Weights:
        """Return the gradients that a method gives."""
        self._place(weights)
        found = self._watched(lambda model, batch: call(getattr(model, method), batch), method)
        found = found[1] if method == "loss_and_gradients" else found
        if not isinstance(found, dict):
            raise TypeError(f"it returned {type(found).__name__}, not a dict of tensors by name")
        return {name: gradient.detach().clone() for name, gradient in found.items()}

    def loss(self, weights: Weights) -> float:
        """Return the loss at other weights."""
        self._place(weights)
        try:
            with torch.set_grad_enabled(self.with_graph):
                return self._call(self._reference, "loss").item()
        except RuntimeError:
            if self.with_graph:
                raise
        found = self._call(self._reference, "loss").item()
        self.with_graph = True  # only now: outside of its domain the loss raises in any case
        return found

    def loss_near(self, weights: Weights) -> float:
        """Return the loss after a step that may leave its domain; NaN where it raises."""
        try:
            return self.loss(weights)
        except Exception:
            return math.nan

    def moved(self, loss: float) -> Weights:
        """Return the weights after a random step that changes the loss by half of its size.

        Where a fit starts or ends gradients vanish, and any multiple of zero is right; after this
        step they do not. The size of the loss is that at the given weights or at zero, whichever
        is larger: predictions then move by the scale of the targets, and cross kinks.
        """
        if not math.isfinite(loss):
            raise NoLoss(f"it is {loss} on this batch")
        way = {name: self.random(self.start[name]) for name in self.trained}
        nothing = {name: torch.zeros_like(value) for name, value in way.items()}
        zero = abs(self.loss_near({**self.start, **nothing}))
        wanted = max(abs(loss), zero if math.isfinite(zero) else 0.0) / 2 or 1.0

        def after(length: float) -> Weights:
            return {**self.start, **{n: self.start[n] + length * v for n, v in way.items()}}

        def change(length: float) -> float:
            return abs(self.loss_near(after(length)) - loss)

        return after(step_length(change, wanted))

    def random(self, like: Tensor) -> Tensor:
        """Return normal random numbers in the shape of a parameter."""
        # In float32, which torch draws several times faster.
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float32).to(like)

    def _place(self, weights: Weights) -> None:
        for name, value in weights.items():
            self.parameters[name].data = value.clone() if name in self.mutated else value

    def _watched(self, function: Loss, name: str) -> Any:
        """Call a function, and note what it changes in place."""
        before = {n: p.detach().clone() for n, p in self.parameters.items()}
        found = self._call(function, name)
        changed = {n: value for n, value in before.items() if not same(self.parameters[n], value)}
        for path, buffer in self.model.named_buffers():
            if self._present.get(path) is not buffer and path not in self._assigned:
                owner, _, leaf = path.rpartition(".")
                place = self.model.get_submodule(owner), leaf, self._present.get(path)
                self._assigned[path] = place
        given, kept = list(tensors(self._given)), list(tensors(self.batch))
        if len(given) != len(kept) or not all(map(same, given, kept)):
            self.changed.add(f"{name} changes its batch in place")
        self.changed |= {f"{name} changes {what} in place" for what in changed}
        for what, value in changed.items():
            self.parameters[what].data.copy_(value)  # which may be that of the weights
        self.mutated |= changed.keys()
        return found

    def _call(self, function: Loss, name: str) -> Any:
        self.called = name
        if self.draws is not False:
            self._state.restore()
        for module, leaf, buffer in self._assigned.values():
            setattr(module, leaf, buffer)
        for buffer, value in self._buffers:
            buffer.detach().copy_(value)
        if self.attributes:
            self.attributes.restore()
        self._given = converted(self.batch, None)
        is_first = self.draws is None and world_size() > 1
        with NoCollectives() if is_first else nullcontext():
            found = function(self.model, self._given)
        if self.draws is None:
            self.draws = not self._state.is_present()
        return found
