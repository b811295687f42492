"""The same work without this package, as somebody who knows the tools would write it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.linear_model import LinearRegression, RidgeClassifier, SGDRegressor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision import transforms
from torchvision.datasets import MNIST

from benchmarks import ours
from benchmarks.harness import Job, Run
from benchmarks.ours import BATCH, FULL_LR, HUBER, LR, UPDATES, Prepared, weights
from lightning_gd.data.tensors import TensorDataModule


def order(rows: int, epoch: int) -> Tensor:
    """The order of an epoch, the same for all sides: or they would not end in the same weights."""
    source = np.random.SeedSequence(0, spawn_key=(epoch,))
    return torch.from_numpy(np.random.default_rng(source).permutation(rows))


def training_rows(job: Job, rows: int) -> tuple[Tensor, Tensor]:
    """Training digits, normalised, and their targets."""
    table = ours.digits(job, rows).tables["train"]
    return table.x, table.y


def explicit_loop(job: Job, rows: int, epochs: int) -> Prepared:
    """Mini-batches by the formula, updated in place."""
    x, y = training_rows(job, rows)

    @torch.no_grad()
    def run() -> Run:
        w, b, losses = torch.zeros(x.shape[1]), torch.zeros(()), []
        for epoch in range(epochs):
            for index in order(rows, epoch).split(BATCH):
                batch = x.index_select(0, index)
                r = torch.addmv(b, batch, w) - y.index_select(0, index)
                losses.append(r.dot(r) / len(r))
                scaled = r * (2 / len(r))
                w.sub_(scaled @ batch, alpha=LR)
                b.sub_(scaled.sum(), alpha=LR)
        assert len(torch.stack(losses).tolist()) == len(losses)
        return Run(weights(w, b), epochs)

    return run


def huber_loop(job: Job, rows: int, epochs: int) -> Prepared:
    """Mini-batches of the Huber loss by its formula, with momentum and clipping."""
    x, y = training_rows(job, rows)
    lr, momentum, limit = HUBER["lr"], HUBER["momentum"], HUBER["gradient_clip_val"]

    @torch.no_grad()
    def run() -> Run:
        w, b, losses = torch.zeros(x.shape[1]), torch.zeros(()), []
        velocity_w, velocity_b = torch.zeros_like(w), torch.zeros_like(b)
        for epoch in range(epochs):
            for index in order(rows, epoch).split(BATCH):
                batch, target = x.index_select(0, index), y.index_select(0, index)
                prediction = torch.addmv(b, batch, w)
                losses.append(nn.functional.huber_loss(prediction, target))
                slope = (prediction - target).clamp_(-1, 1).div_(len(index))
                gradient_w, gradient_b = slope @ batch, slope.sum()
                norm = (gradient_w.dot(gradient_w) + gradient_b.square()).sqrt()
                factor = (limit / (norm + 1e-6)).clamp_(max=1.0)
                velocity_w.mul_(momentum).addcmul_(gradient_w, factor)
                velocity_b.mul_(momentum).addcmul_(gradient_b, factor)
                w.sub_(velocity_w, alpha=lr)
                b.sub_(velocity_b, alpha=lr)
        assert len(torch.stack(losses).tolist()) == len(losses)
        return Run(weights(w, b), epochs)

    return run


def autograd_loop(job: Job, rows: int, epochs: int) -> Prepared:
    """Mini-batches by `backward()` and `torch.optim.SGD`."""
    x, y = training_rows(job, rows)

    def run() -> Run:
        model, losses = _linear(x.shape[1]), []
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for epoch in range(epochs):
            for index in order(rows, epoch).split(BATCH):
                prediction = model(x.index_select(0, index)).squeeze(1)
                loss = nn.functional.mse_loss(prediction, y.index_select(0, index))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        assert len(torch.stack(losses).tolist()) == len(losses)
        return Run(weights(model.weight, model.bias), epochs)

    return run


def _linear(features: int) -> nn.Linear:
    model = nn.Linear(features, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


class PlainLightning(LightningModule):
    """The same regression as Lightning's documentation would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = _linear(784)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss; Lightning does the rest."""
        x, y = batch
        loss = nn.functional.mse_loss(self.linear(x.flatten(1)).squeeze(1), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=LR)


class Order(Sampler[int]):
    """The order of the other sides, in place of `shuffle=True`."""

    def __init__(self, rows: int) -> None:
        self.rows, self.epoch = rows, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(order(self.rows, self.epoch - 1).tolist())


def lightning_tensors(job: Job, rows: int, epochs: int, every: int = 1) -> Prepared:
    """Plain Lightning on a TensorDataset, with each `every`-th loss in TensorBoard."""
    x, y = training_rows(job, rows)
    return _plain_fit(TensorDataset(x, y), job, rows, epochs, every)


def lightning_torchvision(job: Job, rows: int, epochs: int) -> Prepared:
    """Plain Lightning on torchvision's dataset with transforms, every loss in TensorBoard."""
    normalise = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    pictures = MNIST(job.root, transform=normalise, target_transform=_parity)
    return _plain_fit(pictures, job, rows, epochs, every=1)


def _parity(digit: int) -> float:
    return float(2 * (digit % 2) - 1)


class _Float32(PlainLightning):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The collation of Python floats gives float64."""
        return batch[0], batch[1].float()


def _plain_fit(dataset: Any, job: Job, rows: int, epochs: int, every: int) -> Prepared:
    def run() -> Run:
        model = _Float32()
        loader = DataLoader(dataset, BATCH, sampler=Order(rows))
        Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            logger=TensorBoardLogger(tempfile.mkdtemp(dir=job.folder)),
            log_every_n_steps=every,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, loader)
        return Run(weights(model.linear.weight, model.linear.bias), epochs)

    return run


def notebook(job: Job, rows: int) -> Prepared:
    """All rows in every update; train and test loss from forward passes of their own."""
    data = ours.digits(job, rows)
    (x, y), (x_test, y_test) = ((data.tables[p].x, data.tables[p].y) for p in ("train", "test"))

    @torch.no_grad()
    def run() -> Run:
        w, b = torch.zeros(x.shape[1]), torch.zeros(())
        losses: dict[str, list[float]] = {"train": [], "test": []}
        for _ in range(UPDATES):
            losses["train"].append((x @ w + b - y).square().mean().item())
            losses["test"].append((x_test @ w + b - y_test).square().mean().item())
            r = x @ w + b - y
            w -= FULL_LR * (2 / len(y) * (r @ x))
            b -= FULL_LR * (2 * r.mean())
        return Run(weights(w, b), UPDATES)

    return run


def _solved(
    make: Callable[[], Any],
    quality: Callable[[TensorDataModule, Tensor, Tensor], np.ndarray],
    job: Job,
    rows: int,
    dtype: type,
    units: float = 1.0,
) -> Prepared:
    data = ours.digits(job, rows)
    train = data.tables["train"]
    x, y = train.x.numpy().astype(dtype), train.y.numpy().astype(dtype)

    def run() -> Run:
        start = time.perf_counter()
        model = make().fit(x, y)
        seconds = time.perf_counter() - start
        weight, bias = torch.from_numpy(model.coef_).reshape(-1), np.ravel(model.intercept_)
        return Run(quality(data, weight, torch.tensor(float(bias[0]))), units, seconds)

    return run


def ridge_classifier(job: Job, rows: int, dtype: type) -> Prepared:
    """scikit-learn's classifier for this loss, with its default penalty."""
    return _solved(RidgeClassifier, ours.training_loss, job, rows, dtype)


def linear_regression(job: Job, rows: int, dtype: type) -> Prepared:
    """scikit-learn's least squares."""
    return _solved(LinearRegression, ours.training_loss, job, rows, dtype)


def sgd_regressor(job: Job, rows: int, epochs: int) -> Prepared:
    """scikit-learn's SGD, one row an update."""
    settings: dict[str, Any] = {"learning_rate": "constant", "eta0": 2e-5, "random_state": 0}
    make = partial(SGDRegressor, penalty=None, max_iter=epochs, tol=None, **settings)
    return _solved(make, ours.accuracy, job, rows, np.float32, epochs)


def full_jacobian(job: Job, rows: int, vectorize: bool) -> Prepared:
    """The whole Jacobian [N, 3, N, 3], of which the diagonal is wanted."""
    x, n = torch.stack(ours.samples(rows), dim=1), torch.arange(rows)

    def run() -> Run:
        full = torch.autograd.functional.jacobian(
            lambda x: ours.cubes(*x.unbind(1)), x, vectorize=vectorize
        )
        assert isinstance(full, Tensor)
        return Run(full[n, :, n, :][-1000:].double().numpy(), rows)

    return run


def mapped_jacobian(job: Job, rows: int) -> Prepared:
    """`torch.func`: the Jacobian of one sample, mapped over the batch."""
    x = torch.stack(ours.samples(rows), dim=1)
    one = torch.func.vmap(torch.func.jacrev(lambda x: ours.cubes(*x.unbind())))
    return lambda: Run(one(x)[-1000:].double().numpy(), rows)
