"""Tests of a module's gradient, to inherit in your own test suite."""

import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import SkipTest

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.testing import assert_close

from lightning_gd.batch import count_rows, take_rows, tensors
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.gradcheck import GradientError
from lightning_gd.gradcheck.twin import converted
from lightning_gd.module import GradientDescentModule

OFF = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class GradientTests:
    """Tests whether the gradient of a module is right, and whether a mistake would be noticed.

    A subclass whose name begins with `Test` defines `module` and `batch`, which return the same
    at every call. Both are pickled for a second process: their classes and functions are those of
    a file, and no attribute is a lambda or a generator. `test_... = None` leaves a test out: two
    processes differ where the loss is no mean over rows, or BatchNorm or dropout is in it, and a
    resumed run where a checkpoint does not hold all that matters. A module that asks for float32,
    as by `.float()`, needs `precision = "32-true"`, and a `tolerance` of that size.
    """

    loss: Any = None  # as in GradientCheck
    reference: Any = None
    rows: tuple[int, ...] = (1, 3)  # of the batch, tested beside all
    updates = 4
    tolerance = 1e-9  # between one and two processes
    precision = "64-true"  # of the runs

    def module(self) -> Any:
        """Return a new LightningModule."""
        raise NotImplementedError(f"{type(self).__name__} must define module")

    def batch(self) -> Any:
        """Return a batch as the loader yields it."""
        raise NotImplementedError(f"{type(self).__name__} must define batch")

    def test_the_gradient_is_right(self) -> None:
        """Check the gradient on the whole batch, and on its first rows where it can be cut."""
        batch = self.batch()
        sizes = [n for n in self.rows if n <= shared_rows(batch)]
        for part in [batch, *(take_rows(batch, slice(n)) for n in sizes)]:
            found = self._checked(self._new(), part)
            rows = f"{count_rows(part)} rows: the loss may not be finite; set `rows` to others"
            assert found.checks, f"nothing was checked on {rows}"

    def test_each_mistake_is_noticed(self) -> None:
        """Double the gradient of one parameter after another, unless it vanishes."""
        found = self._checked(self._new(), self.batch())
        tested = found.tested
        assert found.checks, "nothing was checked: the loss may not be finite"
        assert any(tested.values()), "the gradients of all parameters vanish"
        missed = [name for name, times in tested.items() if times and not self._finds(name)]
        assert not missed, f"a doubled gradient was not noticed: {', '.join(missed)}"

    def test_two_processes_make_the_updates_of_one(self) -> None:
        """Train on two processes, each with half of the rows, and compare the weights."""
        batch = self.batch()
        if not (half := shared_rows(batch) // 2):
            raise SkipTest("the batch cannot be cut")
        one, two = self._new(), self._new()
        strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
        self._fit(one, take_rows(batch, slice(2 * half)))
        self._fit(two, batch, strategy=strategy, devices=2)
        assert_same(
            "a run of two processes ends", two.state_dict(), one.state_dict(), self.tolerance
        )

    def test_a_resumed_run_ends_like_an_uninterrupted_one(self) -> None:
        """Compare the weights and the state of the optimizers to the bit."""
        one, other = self._new(), self._new()
        with tempfile.TemporaryDirectory() as folder:
            path, steps = f"{folder}/half.ckpt", 2 * self.updates
            self._fit(self._new(), self.batch()).save_checkpoint(path)
            whole = self._fit(one, self.batch(), max_steps=steps)
            rest = self._fit(other, self.batch(), path, max_steps=steps)
        expected, found = (
            [module.state_dict(), [o.state_dict()["state"] for o in trainer.optimizers]]
            for module, trainer in ((one, whole), (other, rest))
        )
        assert_same("the resumed run ends", found, expected)

    def _new(self) -> Any:
        torch.manual_seed(0)
        module = self.module()  # Lightning restores a checkpoint in the dtype that the module has
        return module.double() if self.precision == "64-true" else module

    def _checked(self, module: Any, batch: Any) -> GradientCheck:
        check = GradientCheck(loss=self.loss, reference=self.reference)
        self._fit(module, batch, callbacks=[check])
        return check

    def _finds(self, name: str) -> bool:
        try:
            self._checked(doubled(self._new(), name), self.batch())
        except GradientError as error:
            return f"{name}: WRONG" in str(error)
        return False

    def _fit(self, module: Any, batch: Any, path: str | None = None, **settings: Any) -> Trainer:
        known = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "max_steps": self.updates}
        known |= {"precision": self.precision, **dict.fromkeys(OFF, False)}
        trainer = Trainer(**{**known, **settings}, use_distributed_sampler=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)  # no rows to validate
            warnings.filterwarnings("ignore", "GradientCheck: no gradient")  # as of a single row
            dtype = torch.float64 if self.precision == "64-true" else None
            try:
                batches = OneBatch(converted(batch, dtype))
                trainer.fit(module, batches, ckpt_path=path, weights_only=False)
            except RuntimeError as error:
                if dtype and "dtype" in str(error):
                    hint = "it may ask for float32, as by .float(): set precision = '32-true'"
                    raise RuntimeError(f"{error} ({hint})") from error
                raise
        return trainer


class OneBatch:
    """A loader of one batch, of which each process gets its part."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        torch.manual_seed(0)  # which a resumed run finds again
        group = torch.distributed
        if not group.is_initialized():
            return iter([self.batch])
        rank, size = group.get_rank(), count_rows(self.batch) // group.get_world_size()
        return iter([take_rows(self.batch, slice(rank * size, (rank + 1) * size))])


def shared_rows(batch: Any) -> int:
    """Return the number of rows that all tensors of a batch have; 0 if they differ."""
    return count_rows(batch) if len({t.shape[:1] for t in tensors(batch)}) == 1 else 0


def doubled(module: Any, name: str) -> Any:
    """Double the gradient of one parameter: that of the formula, or in `backward`."""
    if not isinstance(module, GradientDescentModule) or module.automatic_optimization:
        module.get_parameter(name).register_hook(lambda gradient: 2 * gradient)
        return module

    class Doubled(type(module)):
        def gradients(self, *batch: Any, **named: Any) -> dict[str, Tensor]:
            found = super().gradients(*batch, **named)
            return {**found, name: 2 * found[name]}

    module.__class__ = Doubled  # whose other methods rest on this formula
    return module


def assert_same(what: str, found: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Compare two nests of tensors; the error names the first that differs."""
    words = partial("{} in other numbers: {}".format, what)
    assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=words)
