"""The base of every model: one formula, two roads to `p.grad`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lightning_gd.batch import Batch, whole
from lightning_gd.blocks import BlockSchedule
from lightning_gd.curves import Curves
from lightning_gd.distributed import RowMean, reduce_sum, world_size
from lightning_gd.optimizers import build_optimizer, build_scheduler, needs_metric
from lightning_gd.refusals import check_settings, check_trainer

Gradients = dict[str, Tensor]


class GradientDescentModule(LightningModule):
    """A model trained with the gradient that its author derived, or with autograd's.

    A subclass writes `forward`, `loss` (a mean over the rows it is given, plus terms of the
    parameters alone) and beneath it `gradients`, the gradient of exactly that loss, keyed by
    the names of `named_parameters()`. Its `__init__` takes `**kwargs` and passes them here.

    Optional: `loss_and_gradients(x, y)`, both from one forward pass. It counts only for the
    class that defines it: a subclass that overrides `forward`, `loss` or `gradients` starts
    anew.

    Args:
        gradient: `explicit` trains from the formula `gradients` by manual optimization,
            `autograd` from the derivative of `loss` by Lightning's automatic optimization.
        lr: Learning rate λ of the update w ← w − λ ∂L/∂w.
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

    Raises:
        ValueError: If a setting is out of range, naming it, its value and the accepted form.
    """

    def __init__(
        self,
        gradient: Literal["explicit", "autograd"] = "explicit",
        lr: float = 0.01,
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
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_settings(self.hparams)
        self.automatic_optimization = gradient == "autograd"
        self.curves = Curves()
        self._mean = RowMean()
        self._epoch_loss = [0.0, 0]  # Σ loss · rows of the epoch so far, Σ rows
        self._test: Batch | None = None
        self._test_every = 0

    # What a model says

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss: a mean over the rows, plus terms of the parameters alone.

        Args:
            x: Inputs, shape [N, D] or what `forward` takes.
            y: Targets, shape [N].
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(x, y)")

    def gradients(self, x: Tensor, y: Tensor) -> Gradients:
        """The gradient of `loss`, derived by hand: one entry for each name of a parameter."""
        raise NotImplementedError(
            f"{type(self).__name__} must define gradients(x, y); gradient='autograd' does without"
        )

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Gradients]:
        """The loss and its gradient; override it where one forward pass serves both."""
        return self.loss(x, y), self.gradients(x, y)

    def metrics(self) -> dict[str, Metric]:
        """Fresh torchmetrics objects for an evaluation, by name, fed `(prediction, target)`.

        `loss`, the mean of the loss over all rows, is always there; return one of that name
        to compute it from predictions instead.
        """
        return {}

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
        """Add none; as the first hook of a run it refuses what cannot work."""
        check_trainer(self.trainer, self.hparams)
        return []

    def configure_optimizers(self) -> Any:
        """The optimizer and the scheduler that the settings name."""
        h = self.hparams
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(
            h["optimizer"], trained, h["lr"], h["momentum"], h["optimizer_args"] or {}
        )
        if h["scheduler"] is None:
            return optimizer
        scheduler = build_scheduler(h["scheduler"], optimizer, h["scheduler_args"] or {})
        interval = "step" if h["scheduler_interval"] == "update" else "epoch"
        config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
        if self.automatic_optimization:  # Lightning watches only on this road
            config["monitor"] = self.watched
        return {"optimizer": optimizer, "lr_scheduler": config}

    @property
    def watched(self) -> str:
        """The metric that selection looks at: never one of the test data."""
        return "val/loss" if self.trainer.enable_validation else "train/loss"

    def on_fit_start(self) -> None:
        """Choose the formula, and take this process's rows for the test curve."""
        self._names = [name for name, p in self.named_parameters() if p.requires_grad]
        self._trained = [p for p in self.parameters() if p.requires_grad]
        one_pass = self._own("loss_and_gradients", ("forward", "loss", "gradients"))
        self._formula = (
            self.loss_and_gradients
            if one_pass
            else lambda x, y: (self.loss(x, y), self.gradients(x, y))
        )
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if getattr(data, "test_every", 0) != 0 and "test" in data.tables:
            self._test = self._here(data.share("test"))

    def on_train_start(self) -> None:
        """Fix the density of the curves, now that the length of an epoch is known."""
        self.curves.start(int(min(self.trainer.estimated_stepping_batches, 2**62)))
        if self._test is not None:
            data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            an_epoch = int(self.trainer.num_training_batches)
            self._test_every = data.test_every or (1 if data.batch_size is None else an_epoch)

    @classmethod
    def _own(cls, optional: str, basis: tuple[str, ...]) -> bool:
        """Whether `optional` is defined at or below the last override of what it rests on."""
        order = [vars(ancestor) for ancestor in cls.__mro__]
        first = next(i for i, names in enumerate(order) if optional in names)
        return not any(name in names for names in order[:first] for name in basis)

    # The explicit road

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One update by autograd, or a block of updates by the formula."""
        batch = self._as_batch(batch)
        if self.automatic_optimization:
            return self._autograd_loss(batch)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._explicit_block(batch)
        return None

    def _explicit_block(self, batch: Batch) -> None:
        optimizer: Any = self.optimizers()
        step, losses, rows = self.trainer.global_step, [], []
        due = self._updates_due(batch.sizes.updates)
        for (x, y, total), update in zip(batch.shares(), due, strict=True):
            self._mean.add(self._own_means(x, y), len(y), total)
            if not update:
                continue
            rows.append(self._mean.rows)
            loss, *gradients = self._mean.reduce(self._test_loss(step))
            for parameter, gradient in zip(self._trained, gradients, strict=False):
                parameter.grad = gradient
            test = gradients[len(self._trained) :]
            norm = self._clip()
            self._record(step, loss, norm, test)
            optimizer.step()
            self._step_schedulers("step", loss)
            step += 1
            losses.append(loss)
        if losses:
            self._finish(losses, rows)
        else:  # batches of an update that is not complete are no points on the x axis
            self.trainer.fit_loop.epoch_loop._batches_that_stepped -= 1
        if self.trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._step_schedulers("epoch")

    def _own_means(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Loss and gradients over this process's rows; zeros, and no formula, for none."""
        if len(y) == 0:
            return [self._trained[0].new_zeros(()), *map(torch.zeros_like, self._trained)]
        loss, gradients = self._formula(x, y)
        return [loss, *[gradients[name] for name in self._names]]

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
            if config.interval != interval:
                continue
            if not needs_metric(config.scheduler):
                config.scheduler.step()
            elif loss is not None:
                config.scheduler.step(loss)

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
        self._norm = self._clip()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """Record the update that autograd makes."""
        step = self.trainer.global_step
        with torch.no_grad():
            test = self._test_loss(step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        rows = self._mean.rows
        loss, *test = self._mean.reduce(test)
        self._record(step, loss, self._norm, test)
        self._finish([loss], [rows])

    # Both roads

    def _clip(self) -> Tensor:
        """Clip the gradients where that is asked for; their norm before."""
        limit = self.hparams["gradient_clip_val"]
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(p.grad) for p in self._trained])
        )
        if limit is None:
            return norm
        if self.hparams["gradient_clip_algorithm"] == "norm":
            torch.nn.utils.clip_grads_with_norm_(self._trained, limit, norm)
        else:
            torch.nn.utils.clip_grad_value_(self._trained, limit)
        return norm

    def _test_loss(self, step: int) -> list[Tensor]:
        """This process's part of the test loss, where the curve has a point at `step`."""
        if self._test is None or step % self._test_every:
            return []
        return [self._share_of_loss(self._test)]

    def _record(self, step: int, loss: Tensor, norm: Tensor, test: list[Tensor]) -> None:
        values: dict[str, Tensor | float] = {"train/loss": loss, "gradient_norm": norm}
        if test:
            values["test/loss"] = test[0]
        if self.trainer.lr_scheduler_configs or step == 0:
            values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.curves.record(step, values)

    def _finish(self, losses: list[Tensor], rows: list[int]) -> None:
        """Close a block: keep the epoch's mean, show the last loss, write full curves."""
        stacked = torch.stack(losses)
        self._epoch_loss[0] += (stacked * torch.tensor(rows).to(stacked)).sum()
        self._epoch_loss[1] += sum(rows)
        self.log("train/loss", losses[-1], prog_bar=True, logger=False)
        if self.curves.full():
            self.curves.write(self.trainer)

    def on_train_epoch_end(self) -> None:
        """The mean loss of an epoch of mini-batches, for what watches it; plateaus step."""
        total, rows = self._epoch_loss
        self._epoch_loss = [0.0, 0]
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if rows and getattr(data, "batch_size", 0) is not None:
            self.log("train/loss", total / rows, logger=False, sync_dist=True)
        if self.automatic_optimization:
            return
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "epoch" and needs_metric(config.scheduler):
                config.scheduler.step(self.trainer.callback_metrics[self.watched])

    def on_train_end(self) -> None:
        """Write the rest of the curves."""
        self.curves.write(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint never holds more updates than the curves show."""
        self.curves.write(self.trainer)
        checkpoint["epoch_loss"] = [float(self._epoch_loss[0]), self._epoch_loss[1]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the mean of an unfinished epoch."""
        self._epoch_loss = list(checkpoint.get("epoch_loss", [0.0, 0]))

    @torch.no_grad()
    def final_losses(self) -> dict[str, Tensor]:
        """`train/loss` over all training rows at the present weights, if they can be had."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
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

    def _as_batch(self, batch: Any) -> Batch:
        """Accept `(x, y)` of other loaders too; their rows are counted over the processes."""
        if not isinstance(batch, Batch):
            x, y = batch
            total = torch.tensor(float(len(y)), device=y.device)
            batch = whole(x, y, int(reduce_sum(total)))
        check_shapes(batch.x, batch.y)
        return batch

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The predictions ŷ for the rows of this batch, shape [N]."""
        return self(self._as_batch(batch).x)

    def _start_evaluation(self) -> None:
        self._evaluation = {"loss": MeanMetric(), **self.metrics()}
        for metric in self._evaluation.values():
            metric.to(self.device)
            if self.device.type != "mps":  # which knows no float64
                metric.set_dtype(torch.float64)

    def _evaluate(self, batch: Any) -> None:
        x, y, _ = next(self._as_batch(batch).shares())
        if len(y) == 0:
            return
        predictions = self(x)
        for metric in self._evaluation.values():
            if isinstance(metric, MeanMetric):
                metric.update(self.loss(x, y), len(y))
            else:
                metric.update(predictions, y)

    def _end_evaluation(self, part: str) -> None:
        values = {f"{part}/{name}": metric.compute() for name, metric in self._evaluation.items()}
        fitting = self.trainer.state.fn == "fit"
        self.log_dict(values, logger=False if fitting else None, sync_dist=True)
        if fitting and not self.trainer.sanity_checking:  # on the axis of the other curves
            self.curves.record(self.trainer.global_step, dict(values))


def check_shapes(x: Tensor, y: Tensor) -> None:
    """Refuse shapes that would broadcast silently.

    Raises:
        ValueError: Naming both shapes.
    """
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) and len(y) > 0:
        raise ValueError(
            f"a batch needs x of shape [N, D] and y of shape [N]; got x {list(x.shape)} and "
            f"y {list(y.shape)}"
        )


