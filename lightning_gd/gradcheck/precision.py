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

    Attributes:
        backward_error: Relative, of a hand-written backward pass that asks for it, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backward_error, self._is_backward = BACKWARD_ERROR, False

    @contextmanager
    def counted(self, loss: torch.Tensor) -> Iterator[None]:
        """Count what is asked for inside a `with` block as part of the backward pass of a loss."""
        self._is_backward = loss.device.type == "cpu"
        try:
            yield
        finally:  # other threads make the backward pass of GPUs: all counts, that is not seen there
            self._is_backward = loss.device.type != "cpu"

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
        if self._is_backward and value != torch.float32:
            self.backward_error = max(self.backward_error, SAFETY * torch.finfo(value).eps)
        return torch.float64
