"""Updates of explicit mode as CUDA graphs, recorded once and replayed for batch after batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities import apply_to_collection
from torch import Tensor
from torch.nn import Parameter

from lightning_gd.batch import DataBatch, as_batch, is_of_tensors, tensors
from lightning_gd.direct import OPTIONS, UpdatesOfStep
from lightning_gd.updates import in_order

WARM = 3  # calls before an update is recorded, for libraries that set themselves up at first
DEVICES = ("cuda",)  # with graphs
LONGEST = 4096  # updates of a step whose losses a recording keeps, or more where a step has more

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


class Replays:
    """The recordings of a run by the shapes of a batch, all for the same memory and options."""

    def __init__(self) -> None:
        self._holds: Any = None
        self._kept: dict[Any, Replay] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, content: Any, holds: Any, most: int, record: Callable[[int], Replay]) -> Replay:
        """Return the recording for such a batch and at least `most` updates per step."""
        if holds != self._holds:
            self._holds, self._kept = holds, {}
        key = tuple((values.shape, values.dtype) for values in tensors(content))
        if key not in self._kept or self._kept[key].most < most:
            self._kept[key] = record(max(LONGEST, most))
        return self._kept[key]


class ReplayedUpdates(UpdatesOfStep):
    """Makes updates by CUDA graphs where `UpdatesOfStep` would make them the shortest way.

    An update before which a callback reads gradients (`reads_gradients`, True by default), and one
    of a batch that holds anything but tensors, is not replayed.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._begun: list[Replay] = []  # recordings that were used in this step
        self._memory: list[int] = []  # what a recording holds for, looked up once per step

    def makes(self, content: Any) -> bool:
        batch = as_batch(content)
        if not self.is_short or self.module.device.type not in DEVICES:
            return super().makes(content)
        looking, rows = self.looking(), batch.rows(self.module)
        reads = any(getattr(callback, "reads_gradients", True) for callback in looking)
        if reads or not rows:
            return super().makes(content)
        if not isinstance(batch, DataBatch) or not is_of_tensors(batch.content):
            return super().makes(content)
        self.call(looking)
        replay = self._find(batch.content)
        replay.make(batch.content)
        k = replay.made - 1
        self.module.step_losses.append((replay.losses[k], rows))
        self.add_norm(replay.norms[k, None])
        self.count_update()
        return True

    def _find(self, content: Any) -> Replay:
        module = self.module
        module.replays = module.replays or Replays()
        if not self._memory:
            momentum = [buffer for buffer in self.buffers if buffer is not None]
            held = [*module.parameters(), *module.buffers(), *momentum]
            self._memory = [values.data_ptr() for values in held]
        holds = self._memory, [self.group[name] for name in ("lr", *OPTIONS)]

        def local(content: Any) -> tuple[Tensor, list[Tensor]]:
            return in_order(module, DataBatch(content), self.named)

        def record(most: int) -> Replay:
            # A full batch is the same object at every update, and need not be copied.
            same = self.batches.batches[0] is self.batches.batches[-1]
            how = self.trained, module.clip, self.step, list(module.buffers()), most
            return Replay(content, same, local, *how)

        replay = module.replays.find(content, holds, len(self.batches), record)
        if replay not in self._begun:
            self._begun.append(replay)
            replay.begin()
        return replay
