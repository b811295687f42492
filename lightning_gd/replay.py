"""One update of explicit mode as a CUDA graph, recorded once and replayed for batch after batch."""

from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor
from torch.nn import Parameter

from lightning_gd.batch import tensors

WARM = 3  # calls before an update is recorded, for libraries that set themselves up at first

Local = Callable[[Any], tuple[Tensor, list[Tensor]]]  # loss and gradients of a batch


class Replay:
    """An update whose kernels the device launches by itself, in the memory of the recording.

    The k-th update after `begin` leaves its loss in `losses[k]` and its norm in `norms[k]`, so that
    nothing waits for the device.

    Args:
        content: The first batch, which gives the shapes.
        local: Function that returns the loss and the gradients of a batch.
        trained: The parameters, in the order of these gradients.
        clip: Function of the parameters that clips their gradients, and returns the norm before.
        step: Function that updates the parameters in place by their `grad`.
        most: Largest number of updates after `begin`.
    """

    def __init__(
        self,
        content: Any,
        local: Local,
        trained: list[Parameter],
        clip: Callable[[list[Parameter]], Tensor],
        step: Callable[[], None],
        most: int,
    ) -> None:
        self._local, self._trained, self._clip, self._step = local, trained, clip, step
        self._content = apply_to_collection(content, Tensor, torch.clone)
        self._gradients: list[Tensor] = []
        self.losses, self.norms = trained[0].new_zeros(2, most)
        self._number = torch.zeros(1, dtype=torch.int64, device=trained[0].device)
        self.made = 0
        self._replay = recorded(self._update, lambda: local(self._content))

    def begin(self) -> None:
        """Count updates from 0."""
        self.made = 0
        self._number.zero_()

    def make(self, content: Any) -> None:
        """Make one update on a batch of the shapes of the first."""
        for own, given in zip(tensors(self._content), tensors(content), strict=True):
            own.copy_(given)
        self._replay()
        self._show_gradients()
        self.made += 1

    def _update(self) -> None:
        loss, self._gradients = self._local(self._content)
        self._show_gradients()
        norm = self._clip(self._trained)
        for kept, value in ((self.losses, loss), (self.norms, norm)):
            kept.index_copy_(0, self._number, value.reshape(1).to(kept))
        self._number.add_(1)
        self._step()

    def _show_gradients(self) -> None:
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient


def recorded(update: Callable[[], None], warm: Callable[[], Any]) -> Callable[[], None]:
    """Record what a function does on the GPU, without doing it, and return what does it."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            warm()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, stream=stream):
            update()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cuda_graph=True: this loss or its gradients cannot be recorded ({reason}): they may "
            "not wait for the GPU, as .item() and boolean masks do; set --model.cuda_graph false"
        ) from error
    return graph.replay
