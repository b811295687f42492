"""In which precision a loss is computed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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
    """Computes in float64 where `.float()` or the dtype float32 is asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {name: _as_float64(value) for name, value in (kwargs or {}).items()}
        return func(*map(_as_float64, args), **named)


def _as_float64(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
