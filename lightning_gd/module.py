"""The base of every model: one formula, two roads to `p.grad`."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gd.batch import Batch
from lightning_gd.blocks import BlockSchedule
from lightning_gd.checkpoints import SafeCheckpointIO
from lightning_gd.curves import Curves
from lightning_gd.distributed import RowMean, reduce_sum, world_size
from lightning_gd.evaluation import EvaluatedModule
from lightning_gd.leastsquares import LeastSquares
from lightning_gd.loading import check_class, read, stamp
from lightning_gd.moments import Moments
from lightning_gd.optimizers import build_optimizer, build_scheduler, needs_metric
from lightning_gd.refusals import DivergenceError, check_settings, check_trainer, check_width
from lightning_gd.resuming import adopt

Gradients = dict[str, Tensor]
BASIS = ("forward", "loss", "gradients")  # what the optional formulas rest on


class GradientDescentModule(EvaluatedModule):
    """A model trained with the gradient that its author derived, or with autograd's.

    A subclass writes `forward`, `loss` (a mean over the rows it is given, plus terms of the
    parameters alone) and beneath it `gradients`, the gradient of exactly that loss, keyed by
    the names of `named_parameters()`. Its `__init__` takes `**kwargs` and passes them here.

    Optional: `loss_and_gradients(x, y)`, both from one forward pass; for least squares
    `gradients_from_moments(moments)` with `loss_from_moments(moments)`, which need no rows. They
    count only for the class that defines them: a subclass that overrides `forward`, `loss` or
    `gradients` starts anew.

    Args:
        gradient: `explicit` trains from the formula `gradients` by manual optimization,
            `autograd` from the derivative of `loss` by Lightning's automatic optimization.
        lr: Learning rate λ of the update w ← w − λ ∂L/∂w; `auto` is 1/λmax of the curvature,
            for the full batch of a least-squares loss with SGD.
        momentum: Momentum of the optimizer; 0 for none.
        optimizer: A class of `torch.optim` that needs no closure, or a dotted path to one.
        optimizer_args: Further arguments of that class, such as `{"nesterov": true}`.
        scheduler: A class of `torch.optim.lr_scheduler`, or a dotted path; null for none.
        scheduler_args: Its arguments, such as `{"step_size": 10}`.
        scheduler_interval: Whether the scheduler steps after each `update` or each `epoch`.
        gradient_clip_val: Largest norm (or entry) of the gradient; null for no clipping.
        gradient_clip_algorithm: `norm` scales the whole gradient, `value` cuts each entry.
        accumulate_grad_batches: Batches whose gradients are summed, and divided once by all
            their rows, before an update. On the autograd road set the Trainer's.
        updates_per_step: The most updates in one `training_step` of the explicit road; null
            chooses by the size of the data. A block ends early where something must happen.
        moments: Read the data once and make every full-batch update from its moments xᵀx, xᵀy:
            the same numbers at a price that does not grow with the rows. Of no effect on the
            autograd road, which reads the rows.

    Raises:
        ValueError: If a setting is out of range, naming it, its value and the accepted form.
    """

    def __init__(
        self,
        gradient: Literal["explicit", "autograd"] = "explicit",
        lr: float | Literal["auto"] = 0.01,
        momentum: float = 0.0,
        optimizer: str = "SGD",
        optimizer_args: dict[str, Any] | None = None,
        scheduler: str | None = None,
        scheduler_args: dict[str, Any] | None = None,
        scheduler_interval: Literal["update", "epoch"] = "epoch",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
        updates_per_step: int | None = None,
        moments: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_settings(self.hparams)
        self.automatic_optimization = gradient == "autograd"
        self._mean = RowMean()
        self._epoch_loss = [0.0, 0]  # Σ loss · rows of the epoch so far, Σ rows
        self._test: Batch | Moments | None = None
        self._train: Moments | None = None  # where updates need no rows
        self._squares: LeastSquares | None = None
        self._test_every = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that changes the formulas does not inherit the shortcut made for the old ones."""
        super().__init_subclass__(**kwargs)
        if not cls._own("loss_and_gradients", BASIS):
            cls.loss_and_gradients = GradientDescentModule.loss_and_gradients

    # What a model says

    def gradients(self, x: Tensor, y: Tensor) -> Gradients:
        """The gradient of `loss`, derived by hand: one entry for each name of a parameter."""
        raise NotImplementedError(
            f"{type(self).__name__} must define gradients(x, y); gradient='autograd' does without"
        )

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Gradients]:
        """The loss and its gradient; override it where one forward pass serves both."""
        return self.loss(x, y), self.gradients(x, y)

    def gradients_from_moments(self, moments: Moments) -> Gradients:
        """The gradient of `loss` over the rows that `moments` sums up."""
        raise NotImplementedError(f"{type(self).__name__} has no formula from moments")

    def loss_from_moments(self, moments: Moments) -> Tensor:
        """`loss` over the rows that `moments` sums up."""
        raise NotImplementedError(f"{type(self).__name__} has no formula from moments")

    def loss_and_gradients_from_moments(self, moments: Moments) -> tuple[Tensor, Gradients]:
        """Both; override it where one product of matrix and vector serves both."""
        return self.loss_from_moments(moments), self.gradients_from_moments(moments)

    # Set-up

    def block_schedule(self) -> BlockSchedule:
        """Where the blocks of updates of this run end; the DataModule asks for it."""
        explicit = not self.automatic_optimization
        return BlockSchedule(
            self.trainer,
            limit=self.hparams["updates_per_step"] if explicit else 1,
            accumulate=self.hparams["accumulate_grad_batches"],
        )

    def configure_callbacks(self) -> list:
        """Add none; the first hook of a run refuses what cannot work, and makes its files safe."""
        check_trainer(self.trainer, self.hparams)
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        check_width(self, getattr(data, "num_features", None))
        if self.trainer.state.fn == "fit":
            self._check_fit()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = SafeCheckpointIO()
        self._squares = None
        return []

    def _check_fit(self) -> None:
        """Refuse what needs the full batch and has not, and build on trial what is built later."""
        h, reason = self.hparams, self._no_moments()
        if reason and self.uses_moments:
            raise ValueError(f"moments=True cannot be: {reason}")
        if h["lr"] == "auto":
            reason = reason if h["optimizer"] == "SGD" else "SGD is needed"
            if reason:
                raise ValueError(
                    f"lr='auto' is 1/λmax of a full-batch least-squares loss: {reason}"
                )
        self._build(1.0 if h["lr"] == "auto" else h["lr"])

    def _build(self, lr: float) -> tuple[Optimizer, LRScheduler | None]:
        h, trained = self.hparams, [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(
            h["optimizer"], trained, lr, h["momentum"], h["optimizer_args"] or {}
        )
        if h["scheduler"] is None:
            return optimizer, None
        return optimizer, build_scheduler(h["scheduler"], optimizer, h["scheduler_args"] or {})

    def configure_optimizers(self) -> Any:
        """The optimizer and the scheduler that the settings name."""
        h = self.hparams
        if h["lr"] == "auto":
            assert self.squares is not None
            self._set_lr(self.squares.curvature.auto_lr)
        optimizer, scheduler = self._build(h["lr"])
        if scheduler is None:
            return optimizer
        interval = "step" if h["scheduler_interval"] == "update" else "epoch"
        config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
        if self.automatic_optimization:  # Lightning would step a plateau after the checkpoint
            config.update(monitor=self.watched, frequency=2**62 if needs_metric(scheduler) else 1)
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _set_lr(self, lr: float) -> None:
        self._set_hparams({"lr": lr})
        self._hparams_initial = copy.deepcopy(self._hparams)  # what loggers are told

    def _no_moments(self) -> str | None:
        """Why moments cannot stand for the training rows of this run; `None` if they can."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if self.squares is None:
            return f"{type(self).__name__} with these data has no formula from moments"
        if data.batch_size is not None:
            return f"batch_size={data.batch_size} is not the full batch (null)"
        return None

    @property
    def uses_moments(self) -> bool:
        """Whether updates come from moments, and need no rows."""
        return self.hparams["moments"] and not self.automatic_optimization

    @property
    def squares(self) -> LeastSquares | None:
        """What this run knows of its least-squares loss; `None` for another loss or data."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        own = self._own("gradients_from_moments", BASIS) and self._own("loss_from_moments", BASIS)
        if self._squares is None and own and hasattr(data, "moments"):
            self._squares = LeastSquares(self, data)
        return self._squares

    @property
    def watched(self) -> str:
        """The metric that selection looks at: never one of the test data."""
        return "val/loss" if self.trainer.enable_validation else "train/loss"

    def on_fit_start(self) -> None:
        """Take this process's rows for the test curve, or the moments of all."""
        self._names = [name for name, p in self.named_parameters() if p.requires_grad]
        self._trained = [p for p in self.parameters() if p.requires_grad]
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        draw_test = getattr(data, "test_every", 0) != 0 and "test" in data.tables
        if self.uses_moments:
            self._train = self._moments_of("train")
            self._test = self._moments_of("test") if draw_test else None
        elif draw_test:
            self._test = self._here(data.share("test"))

    def on_train_start(self) -> None:
        """Fix the density of the curves, now that the length of an epoch is known."""
        self.curves.start(int(min(self.trainer.estimated_stepping_batches, 2**62)))
        if self._test is not None:
            data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            an_epoch = int(self.trainer.num_training_batches)
            self._test_every = data.test_every or (1 if data.batch_size is None else an_epoch)

    def _moments_of(self, part: str) -> Moments:
        assert self.squares is not None
        like = next(self.parameters())
        return self.squares.moments(part).to(device=like.device, dtype=like.dtype)

    @classmethod
    def _own(cls, optional: str, basis: tuple[str, ...]) -> bool:
        """Whether `optional` is defined at or below the last override of what it rests on."""
        order = [vars(ancestor) for ancestor in cls.__mro__]
        first = next(i for i, names in enumerate(order) if optional in names)
        return not any(name in names for names in order[:first] for name in basis)

    # The explicit road

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One update by autograd, or a block of updates by the formula."""
        batch = self.as_batch(batch)
        if self.automatic_optimization:
            return self._autograd_loss(batch)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._explicit_block(batch)
        return None

    def _explicit_block(self, batch: Batch) -> None:
        optimizer: Any = self.optimizers()
        step, losses, rows = self.trainer.global_step, [], []
        scheduled = bool(self.trainer.lr_scheduler_configs)
        # A callback that has this hook gets blocks that begin with what it wants to see.
        hooked = is_overridden("on_before_optimizer_step", self)
        due = self._updates_due(batch.sizes.updates)
        for (x, y, total), update in zip(batch.shares(), due, strict=True):
            if self._train is None:
                self._mean.add(self._own_means(x, y), len(y), total)
                if not update:
                    continue
                rows.append(self._mean.rows)
                loss, *gradients = self._mean.reduce(self._test_loss(step))
            else:  # the same on every process: nothing to reduce
                rows.append(total)
                loss, *gradients = [*self._means_of(self._train), *self._test_loss(step)]
            for parameter, gradient in zip(self._trained, gradients, strict=False):
                parameter.grad = gradient
            test = gradients[len(self._trained) :]
            norm = self.clip(self._trained)
            self._record(step, loss, norm, test, scheduled)
            if losses and not hooked:  # counted as by Lightning, without asking for hooks again
                optimizer._on_before_step()
                optimizer.optimizer.step()
                optimizer._on_after_step()
            else:
                optimizer.step()
            if scheduled:
                self._step_schedulers("step", loss)
            step += 1
            losses.append(loss)
        if losses:
            self._finish(step - len(losses), losses, rows)
        else:  # batches of an update that is not complete are no points on the x axis
            self.trainer.fit_loop.epoch_loop._batches_that_stepped -= 1
        if self.trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._step_schedulers("epoch")

    def _own_means(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Loss and gradients over this process's rows; zeros, and no formula, for none."""
        if len(y) == 0:
            return [self._trained[0].new_zeros(()), *map(torch.zeros_like, self._trained)]
        return self._in_order(*self.loss_and_gradients(x, y))

    def _means_of(self, moments: Moments) -> list[Tensor]:
        """Loss and gradients over all rows of all processes, from their moments."""
        return self._in_order(*self.loss_and_gradients_from_moments(moments))

    def _in_order(self, loss: Tensor, gradients: Gradients) -> list[Tensor]:
        try:
            return [loss, *[gradients[name] for name in self._names]]
        except KeyError as missing:
            raise ValueError(
                f"the gradients of {type(self).__name__} lack {missing}: they name "
                f"{sorted(gradients)}, and the trained parameters are {self._names}"
            ) from None

    def _updates_due(self, batches: int) -> list[bool]:
        """Which batches of a block end an update: all, or with accumulation the last, if any."""
        every, loop = self.hparams["accumulate_grad_batches"], self.trainer.fit_loop.epoch_loop
        if every == 1:
            return [True] * batches
        full = loop.batch_progress.current.ready % every == 0 or loop._num_ready_batches_reached()
        return [False] * (batches - 1) + [full]

    def _step_schedulers(self, interval: str, loss: Tensor | None = None) -> None:
        """What Lightning leaves undone in manual optimization; plateaus wait for their metric."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if config.interval != interval:
                continue
            if needs_metric(scheduler):
                if loss is not None:
                    scheduler.step(loss)
            elif not self.automatic_optimization:
                scheduler.step()

    # The autograd road

    def _autograd_loss(self, batch: Batch) -> Tensor:
        x, y, total = next(batch.shares())
        if len(y):
            loss = self.loss(x, y)
        else:  # an empty share still takes part in DDP's averaging
            loss = torch.stack([p.sum() * 0 for p in self._trained]).sum()
        self._mean.add([loss.detach().to(y.dtype)], len(y), total)
        # DDP averages over processes; this makes it the mean over all rows of the update.
        return loss * (len(y) * world_size() / total)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip on the autograd road as on the explicit one."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._norm = self.clip(self._trained)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """Record the update that autograd makes."""
        step = self.trainer.global_step
        with torch.no_grad():
            test = self._test_loss(step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        rows = self._mean.rows
        loss, *test = self._mean.reduce(test)
        self._record(step, loss, self._norm, test, bool(self.trainer.lr_scheduler_configs))
        self._step_schedulers("step", loss)
        self._finish(step, [loss], [rows])

    # Both roads

    def clip(self, parameters: list[Parameter]) -> Tensor:
        """Clip the gradients of `parameters` where that is set; their norm before."""
        limit = self.hparams["gradient_clip_val"]
        norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if limit is None:
            return norm
        if self.hparams["gradient_clip_algorithm"] == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        else:
            torch.nn.utils.clip_grad_value_(parameters, limit)
        return norm

    def _test_loss(self, step: int) -> list[Tensor]:
        """This process's part of the test loss, where the curve has a point at `step`."""
        if self._test is None or step % self._test_every:
            return []
        if isinstance(self._test, Moments):
            return [self.loss_from_moments(self._test)]
        return [self._share_of_loss(self._test)]

    def _record(
        self, step: int, loss: Tensor, norm: Tensor, test: list[Tensor], scheduled: bool
    ) -> None:
        values: dict[str, Tensor | float] = {"train/loss": loss, "gradient_norm": norm}
        if test:
            values["test/loss"] = test[0]
        if scheduled or step == 0:
            values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.curves.record(step, values)

    def _finish(self, first: int, losses: list[Tensor], rows: list[int]) -> None:
        """Close a block from update `first` on: keep the epoch's mean, write full curves."""
        stacked = torch.stack(losses)
        self._stop_if_diverged(first, stacked)
        self._epoch_loss[0] += (stacked * torch.tensor(rows).to(stacked)).sum()
        self._epoch_loss[1] += sum(rows)
        self.log("train/loss", losses[-1], prog_bar=True, logger=False)
        if self.curves.full():
            self.curves.write(self.trainer)

    def _stop_if_diverged(self, first: int, losses: Tensor) -> None:
        """Raise on every process alike, before anything is kept of it."""
        weights = torch.stack([p.isfinite().all() for p in self._trained])
        if torch.cat([losses.isfinite(), weights]).all():
            return
        self.curves.write(self.trainer)
        bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
        made = first + (bad[0] if bad else len(losses))
        what = f"the loss is {losses[bad[0]].item()}" if bad else "a weight is not finite"
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        stable = "" if self.squares is None else self._stable_rate()
        last = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
        kept = f"the last finite checkpoint is {last}" if last else "no checkpoint was written"
        raise DivergenceError(
            f"diverged: {what} after {made} updates at lr {lr:.4g}{stable}; {kept}"
        )

    def _stable_rate(self) -> str:
        assert self.squares is not None
        largest = self.squares.curvature.max_lr(self.hparams["momentum"])
        return f" (the largest stable rate of full-batch SGD is {largest:.4g})"

    def on_train_epoch_end(self) -> None:
        """The mean loss of an epoch of mini-batches, for what watches it; plateaus step."""
        total, rows = self._epoch_loss
        self._epoch_loss = [0.0, 0]
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if rows and getattr(data, "batch_size", 0) is not None:
            self.log("train/loss", total / rows, logger=False, sync_dist=True)
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if config.interval == "epoch" and needs_metric(scheduler):
                scheduler.step(self.trainer.callback_metrics[self.watched])

    def on_train_end(self) -> None:
        """Write the rest of the curves."""
        self.curves.write(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint never holds more updates than the curves show."""
        self.curves.write(self.trainer)
        checkpoint["epoch_loss"] = [float(self._epoch_loss[0]), self._epoch_loss[1]]
        stamp(checkpoint, self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model leaves the data of its run behind."""
        run = {"_test": None, "_train": None, "_squares": None, "curves": Curves()}
        return {**super().__getstate__(), **run}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what is not of this model; go on with the mean of an unfinished epoch."""
        adopt(checkpoint, self)
        self._epoch_loss = list(checkpoint.get("epoch_loss", [0.0, 0]))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, *args: Any, **kwargs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Lightning's, for local files of this very class, without running code in them."""
        check_class(read(checkpoint_path), cls)
        return super().load_from_checkpoint(
            checkpoint_path, *args, **{**kwargs, "weights_only": True}
        )

    @torch.no_grad()
    def final_losses(self) -> dict[str, Tensor]:
        """`train/loss` over all training rows at the present weights, if they can be had."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if self._train is not None:
            return {"train/loss": self.loss_from_moments(self._train)}
        if not hasattr(data, "share"):
            return {}
        return {"train/loss": reduce_sum(self._share_of_loss(self._here(data.share("train"))))}

    def _here(self, batch: Batch) -> Batch:
        like = next(self.parameters())
        return batch._replace(x=batch.x.to(like), y=batch.y.to(like))

    def _share_of_loss(self, batch: Batch) -> Tensor:
        """Σ over this process's rows, divided by the rows of all; their sum is the loss."""
        x, y, total = next(batch.shares())
        return self.loss(x, y).to(y) * (len(y) / total) if len(y) else y.new_zeros(())
