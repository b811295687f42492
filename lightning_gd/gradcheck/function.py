"""Checks a hand-written backward pass of a Function, or of a pair of functions, in many cases."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning_utilities import apply_to_collection as each
from torch import Tensor, clone
from torch.autograd import Function

from lightning_gd.batch import tensors
from lightning_gd.gradcheck.bench import Bench
from lightning_gd.gradcheck.cases import Call, Case, cases_of
from lightning_gd.gradcheck.comparison import Comparison
from lightning_gd.gradcheck.delivered import compared, explained
from lightning_gd.gradcheck.diagnosis import alike, first_line, largest, unfit
from lightning_gd.gradcheck.point import AUTOGRAD
from lightning_gd.gradcheck.precision import eager
from lightning_gd.gradcheck.randomness import RandomState, same_randomness
from lightning_gd.gradcheck.report import FunctionReport, GradientReport, ParameterReport
from lightning_gd.gradcheck.twin import converted, same, shaken, twin
from lightning_gd.gradcheck.vmapped import check_vmap, claims_vmap, tuple_of

SHAKES = 16  # of the inputs, so that ties fall either way
REPEATS = 16  # eps: between two backward passes that add up in another order


def check_function(
    function: Any, *inputs: Any, reference: Call | None = None, seed: int = 0
) -> FunctionReport:
    """Check a hand-written backward pass in many cases made of example inputs.

    The gradient of Σ cotangent · output is compared with differences as in `check_gradients`, in
    float64 or the longest dtype that the function computes in: for the inputs, other numbers of
    rows (the first dimension, where no other is as large), repeated rows, non-contiguous inputs and
    cotangents, each input and each output alone. Numbers are up to an eighth closer to zero, off
    kinks. A Function with a rule for `torch.func.vmap` is compared under it with a loop of its own
    calls.

    In float32 and bfloat16 the truth is the float64 gradient of `reference` or the function at the
    same inputs. The bound is 32 (8 in bfloat16) times its change by random changes of the inputs by
    eps, plus eps of the gradient or of |cotangent| |output| / |input|, plus twice the error of
    `reference` in that dtype, in the 2-norm.

    Args:
        function: A `torch.autograd.Function`; a pair of functions, `forward(*inputs)` and
            `backward(cotangent, *inputs)`, which returns the gradient of each floating input; or
            a callable that uses such Functions, of which only the gradients are checked.
        *inputs: Floating tensors that require a gradient are differentiated; all if none does.
        reference: The same function of plain torch operations, which is differentiated instead.
        seed: Of cotangents, directions, and random numbers that the function draws by torch.
    """
    floating = [i for i, value in enumerate(inputs) if _is_floating(value) and value.numel()]
    slots = [i for i in floating if inputs[i].requires_grad] or floating
    if not slots:
        raise ValueError("no input is a tensor of floating-point numbers")
    with same_randomness(), eager(torch.get_default_dtype()):
        form, given = _Form(function, reference, seed), Case(inputs, slots)
        found: dict[str, GradientReport] = {}
        for longest in (torch.float64, torch.float32, inputs[slots[0]].dtype):
            found["as given"] = form.report(given, longest, longest)
            if found["as given"].parameters:  # otherwise forward refuses this dtype
                break
        cases = cases_of(given, form.places)
        found |= {name: form.report(case, longest, longest) for name, case in cases}
        if claims_vmap(function) and found["as given"].parameters:
            found["vmap"] = check_vmap(function, converted(inputs, longest), slots, form.state)
        truth = torch.float64 if reference else longest
        for dtype in (torch.float32, torch.bfloat16):
            if dtype != truth and (reference or found["as given"].ok):
                found[str(dtype).removeprefix("torch.")] = form.report(given, dtype, truth)
    return FunctionReport(found, "" if longest == torch.float64 else f"checked in {longest}")


class _Form:
    """A function whose backward pass is watched."""

    def __init__(self, function: Any, reference: Call | None, seed: int) -> None:
        self.function, self.seed = self._watched(function), seed
        self.plain = partial(self.loss, function=reference) if reference else None
        self.state = RandomState.seeded(seed)
        self.random = torch.Generator().manual_seed(seed)
        self.mistakes: dict[str, str] = {}  # by input, whatever the numbers are; "" is all
        self.given: Sequence[Any] = ()  # the arguments of the last call
        self.places: list[int] = []  # of the outputs that have a gradient
        self.size, self.numbers = 0.0, 0  # |cotangent| · |output| and numbers in the outputs
        self.is_short = False  # all outputs are numbers of float32, as of kernels that cast inside

    def loss(self, case: Any, inputs: Any, function: Call | None = None) -> Tensor:
        """Return Σ cotangent · output."""
        self.given = case.arguments(inputs)
        found = tuple_of((function or self.function)(*self.given))
        if torch.is_grad_enabled() and function is None:
            self.places = [i for i, v in enumerate(found) if getattr(v, "requires_grad", False)]
        random, total = torch.Generator().manual_seed(self.seed), torch.zeros(())
        self.size, self.numbers, self.is_short = 0.0, 0, True
        for place in self.places if case.only is None else [case.only]:
            output = found[place]
            output = torch.view_as_real(output) if output.is_complex() else output
            if torch.finfo(output.dtype).eps > torch.finfo(next(case.parameters()).dtype).eps:
                raise TypeError(f"it computes in {output.dtype}")
            self.is_short &= bool((output == output.float()).all())
            normal = torch.randn(output.shape, generator=random).bfloat16()  # alike in any dtype
            cotangent = case.store(normal.to(output))
            if output.requires_grad:  # a hook keeps the storage
                output.register_hook(lambda _, cotangent=cotangent: cotangent)
            total = total + (output.double() * cotangent.double()).sum()
            self.size += float(cotangent.norm() * output.detach().norm())
            self.numbers += output.numel()
        return total

    def report(self, case: Case, dtype: torch.dtype, truth: torch.dtype) -> GradientReport:
        """Compare a gradient with that in a longer dtype; with differences in the same."""
        model, self.mistakes = twin(case, dtype), {}
        for parameter in model.parameters():
            parameter.data = self._shrunk(parameter.data)
        try:
            self.loss(model, converted(case.inputs, dtype))
        except Exception as error:  # whatever a function raises belongs in the report
            return GradientReport((), f"not supported: {first_line(error)}")
        if dtype == truth == torch.float64 and self.is_short and self.size:
            return GradientReport((), "not supported: its outputs are numbers of float32")
        bench = Bench(model, case.inputs, self.loss, self.state, self.plain, scale=1.0)
        moved = {name: self._shrunk(value) for name, value in bench.start.items()}
        try:
            if dtype == truth:
                report = Comparison(bench, explicit=False, moved=moved).report()
            else:
                report = self._rounded(bench, truth)
        except Exception as error:
            words = f"raised {first_line(error)}"
            found = [ParameterReport(name, diagnosis=words) for name in bench.start]
            report = GradientReport(tuple(found))
        general = self.mistakes.get("") or ", ".join(sorted(bench.changed))
        words = {p.name: p.diagnosis for p in report.parameters}
        words |= dict.fromkeys(bench.start, general) if general else self.mistakes
        found = [replace(p, diagnosis=words[p.name]) for p in report.parameters]
        return replace(report, parameters=tuple(found))

    def _rounded(self, bench: Bench, truth: torch.dtype) -> GradientReport:
        """Compare a gradient with that in a longer dtype at the same rounded inputs."""
        found, near = bench.measure(bench.start).gradients[AUTOGRAD], []
        if bench.draws:
            return GradientReport((), f"not compared: random numbers differ in {truth}")
        loss, model = self.plain or self.loss, partial(twin, bench.model)
        exact = Bench(model(truth), bench.batch, loss, self.state, scale=1.0)
        batch = exact.batch
        for eps in (0.0, *[bench.eps] * SHAKES):
            exact.batch = shaken(batch, eps, self.random)
            near.append(exact.measure(shaken(exact.start, eps, self.random)).gradients[AUTOGRAD])
        short, reports = near[0], []
        if self.plain:
            plain = Bench(model(bench.dtype), bench.batch, self.plain, self.state, scale=1.0)
            short = plain.measure(plain.start).gradients[AUTOGRAD]
        for name, value in exact.start.items():
            gradients, terms = [g[name] for g in near], max(1.0, self.numbers / value.numel())
            least = self.size / (float(value.norm()) * terms**0.5)
            bound = explained(gradients, bench.eps, least)
            bound += 2 * float((short[name] - gradients[0]).norm())
            reports.append(compared(name, found[name], gradients[0], bound, bench.rows))
        return GradientReport(tuple(reports))

    def _shrunk(self, values: Tensor) -> Tensor:
        """Return values up to an eighth closer to zero; zeros become positive."""
        part = 1 - torch.rand(values.shape, generator=self.random).to(values) / 8
        return values.masked_fill(values == 0, (largest(values) or 1.0) / 8) * part

    def _watched(self, form: Any) -> Call:
        """Return the callable of a form; a Function is asked three times for its gradients."""
        form = pair_of(*form) if isinstance(form, tuple) else form
        if not (isinstance(form, type) and issubclass(form, Function)):
            return form
        name = "backward" if form.backward is not Function.backward else "vjp"
        inner = getattr(form, name)

        def backward(ctx: Any, *cotangents: Any) -> Any:
            return self._ask(partial(inner, ctx), cotangents)

        return type(form.__name__, (form,), {name: staticmethod(backward)}).apply

    def _ask(self, backward: Call, cotangents: Sequence[Any]) -> Any:
        """Return gradients, and note what is wrong with them, whatever the numbers are."""
        now = {"the cotangent": cotangents, "an input": self.given}
        before = each(now, Tensor, clone)
        first = each(tuple_of(backward(*cotangents)), Tensor, clone)
        for what, values in now.items():
            if not all(map(same, tensors(values), tensors(before[what]))):
                self.mistakes[""] = f"{what} is changed in place"
        again = tuple_of(backward(*cotangents))
        minus = each(cotangents, Tensor, lambda t: t.neg() if t.dtype != torch.bool else t)
        negative = tuple_of(backward(*minus))
        for k, wanted in enumerate(self.given):
            gradient = first[k]
            if gradient is None or not _is_floating(wanted):
                continue
            noise = REPEATS * torch.finfo(wanted.dtype).eps * largest(gradient)
            if words := unfit(gradient, wanted):
                self.mistakes[f"input {k}"] = words
            elif not alike(again[k], gradient, noise):
                self.mistakes.setdefault("", "a second backward pass returns something else")
            elif noise and alike(negative[k], gradient):
                self.mistakes[f"input {k}"] = "the cotangent is ignored"
        return first


def pair_of(forward: Call, backward: Call) -> type[Function]:
    """Return a Function made of a forward and a backward function."""

    class Pair(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.inputs = inputs
            return forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            found = iter(tuple_of(backward(*cotangents, *ctx.inputs)))
            return tuple(next(found) if _is_floating(value) else None for value in ctx.inputs)

    return Pair


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
