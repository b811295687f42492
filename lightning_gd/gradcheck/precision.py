"""In which precision a loss is computed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Relative, of a backward pass: in float32 it rounds by some 1e-6, and mistakes are 1e-3 and more.
BACKWARD_ERROR = 1e-4
SAFETY = 8  # eps: of one in bfloat16 or float16
SHORT = (torch.float32, torch.bfloat16, torch.float16)
METHODS: dict[Any, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.bfloat16: torch.bfloat16,
    torch.Tensor.half: torch.float16,
}


@contextmanager
def eager(dtype: torch.dtype) -> Iterator[None]:
    """Let autograd work inside a `with` block, without autocast and compilation.

    New tensors are of that dtype, as Lightning has it in each precision.
    """
    usual = torch.get_default_dtype()
    with (
        ExitStack() as stack,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(device, enabled=False))
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


class InFloat64(TorchFunctionMode):
    """Computes in float64 where a shorter dtype is asked for, as by `.float()`.

    Args:
        on_cpu: Whether the backward pass is made by this thread. Other threads make that of GPUs,
            where nothing is seen: what the forward pass asks for counts in its place.

    Attributes:
        backward_error: Relative, of a hand-written backward pass that asks for it, too.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.backward_error, self._counts = BACKWARD_ERROR, not on_cpu

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Count what the backward pass asks for inside a `with` block."""
        before, self._counts = self._counts, True
        try:
            yield
        finally:
            self._counts = before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in METHODS:
            self._lifted(METHODS[func])
            func = torch.Tensor.double
        named = {name: self._lifted(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._lifted, args), **named)

    def _lifted(self, value: Any) -> Any:
        if not isinstance(value, torch.dtype) or value not in SHORT:
            return value
        if self._counts and value != torch.float32:
            self.backward_error = max(self.backward_error, SAFETY * torch.finfo(value).eps)
        return torch.float64
