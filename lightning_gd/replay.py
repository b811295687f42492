"""One update of explicit mode as a CUDA graph, recorded once and replayed for batch after batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
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
        same: Every batch is this one; otherwise each is copied into the memory of the recording.
        local: Function that returns the loss and the gradients of a batch.
        trained: The parameters, in the order of these gradients.
        clip: Function of the parameters that clips their gradients, and returns the norm before.
        step: Function that updates the parameters in place by their `grad`.
        buffers: Of the module.
        most: Largest number of updates after `begin`.
    """

    def __init__(
        self,
        content: Any,
        same: bool,
        local: Local,
        trained: list[Parameter],
        clip: Callable[[list[Parameter]], Tensor],
        step: Callable[[], None],
        buffers: Sequence[Tensor],
        most: int,
    ) -> None:
        self.most, self.made, self._trained = most, 0, trained
        own = content if same else apply_to_collection(content, Tensor, torch.clone)
        self._content, self._gradients = own, list[Tensor]()
        self._number = torch.zeros(1, dtype=torch.int64, device=trained[0].device)
        kept = [buffer.clone() for buffer in buffers]
        with isolate_rng():
            loss, _ = local(own)
            self.losses, self.norms = loss.new_zeros(most), trained[0].new_zeros(most)

            def update() -> None:
                loss, self._gradients = local(own)
                self._show_gradients()
                for values, value in ((self.losses, loss), (self.norms, clip(trained))):
                    values.index_copy_(0, self._number, value.reshape(1).to(values))
                self._number.add_(1)
                step()

            self._replay = recorded(update, lambda: local(own))
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)

    def begin(self) -> None:
        """Count updates from 0."""
        self.made = 0
        self._number.zero_()

    def make(self, content: Any) -> None:
        """Make one update on a batch of the shapes of the first."""
        if content is not self._content:
            for own, given in zip(tensors(self._content), tensors(content), strict=True):
                own.copy_(given)
        self._replay()
        if self._trained[0].grad is not self._gradients[0]:
            self._show_gradients()
        self.made += 1

    def _show_gradients(self) -> None:
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient


def recorded(update: Callable[[], None], warm: Callable[[], Any]) -> Callable[[], None]:
    """Record the kernels that `update` launches, without running them; return what runs them."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            warm()
        try:
            with torch.cuda.graph(graph, stream=stream):
                update()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"cuda_graph=True: the loss or its gradients cannot be recorded ({reason}): they "
                "may not wait for the GPU, as .item() and boolean masks do; set --model.cuda_graph "
                "false"
            ) from error
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
