"""LightningModules that know nothing of this package, as people write them."""

import random
from typing import Any

import numpy as np
import torch
import torchmetrics
import torchvision
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import (
    BoringModel,
    DemoModel,
    LightningLSTM,
    LightningTransformer,
    SimpleLSTM,
    Transformer,
)
from lightning_utilities import apply_to_collection
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence


class Doubled(Function):
    """The planted mistake: x, with 2 g as its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * g


def spoil(module, layer):
    """Double the gradient of what a layer returns."""

    def double(_, args, output):
        return apply_to_collection(
            output, torch.Tensor, lambda t: Doubled.apply(t) if t.requires_grad else t
        )

    module.get_submodule(layer).register_forward_hook(double)


class Batches:
    """A loader of batches that are given."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Plain(LightningModule):
    """Any network and any loss."""

    def __init__(self, net, loss=F.cross_entropy):
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(*batch[:-1]), batch[-1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Metrics(Plain):
    """Uses metrics, the Trainer and the logger while it trains, and keeps results."""

    def __init__(self):
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)]
        super().__init__(nn.Sequential(*layers))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.mean, self.seen, self.last = torchmetrics.MeanMetric(), 0, None

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.last = self.net(x)  # with its graph
        loss = self.loss(self.last, y) / (1 + 0.1 * self.seen + self.current_epoch)
        self.seen += 1
        self.mean.update(loss.detach())
        self.log("accuracy", self.accuracy(self.last, y), prog_bar=True)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        if self.logger and self.trainer.global_step == 1:
            self.logger.experiment.log_metrics({"noted": self.seen})  # pyright: ignore
        return {"loss": loss, "scores": self.last.detach()}


class VAE(Plain):
    def __init__(self):
        super().__init__(nn.Linear(6, 4))
        self.out = nn.Linear(2, 6)

    def training_step(self, batch, batch_idx):
        mean, log = self.net(batch).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (log / 2).exp() + random.random() + np.random.rand()
        kl = (mean.square() + log.exp() - 1 - log).sum(1).mean() / 2
        return F.mse_loss(self.out(z), batch) + kl


class GAN(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        self.judge = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(), nn.Linear(8, 1))

    def maker_loss(self, batch):
        return F.softplus(-self.judge(self.maker(batch["z"]))).mean()

    def judge_loss(self, batch):
        made = self.maker(batch["z"]).detach()
        return F.softplus(-self.judge(batch["x"])).mean() + F.softplus(self.judge(made)).mean()

    def training_step(self, batch, batch_idx):
        losses = self.maker_loss, self.judge_loss
        optimizers: Any = self.optimizers()
        for optimizer, loss in zip(optimizers, losses, strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), 0.01) for net in (self.maker, self.judge)]


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.encoder, self.middle = nn.Linear(6, 4), nn.Linear(4, 4)
        self.again = self.middle

    def forward(self, x):
        code = self.again(self.middle(self.encoder(x)).tanh())
        return F.linear(code, self.encoder.weight.T)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.gru(packed)[1][0])


class Tasks(Plain):
    """A dict batch, two heads, a layer that is not used and one that is frozen."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5))
        self.heads = nn.ModuleDict({"size": nn.Linear(5, 1), "kind": nn.Linear(5, 3)})
        self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(5, 5).requires_grad_(False)

    def training_step(self, batch):
        hidden = self.frozen(self.net(batch["x"]).relu()).sigmoid()
        size = F.huber_loss(self.heads["size"](hidden).squeeze(1), batch["size"])
        return size + F.cross_entropy(self.heads["kind"](hidden), batch["kind"])

    def configure_optimizers(self):
        rest = [*self.heads.parameters(), *self.unused.parameters(), *self.frozen.parameters()]
        groups = [{"params": self.net.parameters(), "lr": 0.1}, {"params": rest}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.net = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)

    def forward(self, tokens):
        x = self.table(tokens) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
        return (self.net(x, x, tgt_mask=mask) @ self.table.weight.T).flatten(0, 1)


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 4, 2, batch_first=True, dropout=0.2), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Text(LightningTransformer):
    def __init__(self):
        super().__init__(11)
        self.model = Transformer(11, ninp=8, nhid=8, nlayers=1)

    def prepare_data(self):
        """Load nothing."""


class Lines(LightningLSTM):
    """Its hidden state goes on from batch to batch."""

    def __init__(self):
        super().__init__(11)
        self.model = SimpleLSTM(11, ninp=6, nhid=6, nlayers=1, dropout=0.0)

    def prepare_data(self):
        """Load nothing."""


def images(n=4):
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def tokens(n=4):
    return torch.randint(11, (n, 5)), torch.randint(11, (5 * n,))


def rows(n=8):
    return torch.randn(n, 6), torch.randint(3, (n,))


def numbers(n=4):
    return torch.randn(n, 32)


def tasks(n=8):
    return {"x": torch.randn(n, 4), "size": torch.randn(n), "kind": torch.randint(3, (n,))}


def sequences(n=4):
    return torch.randn(n, 5, 3), torch.randint(3, (n,))


def packed(n=4):
    return torch.randn(n, 5, 3), torch.tensor([5, 2, 1, 4])[:n], torch.randint(2, (n,))


def noise(n=6):
    return {"z": torch.randn(n, 2), "x": torch.randn(n, 3)}


VISION = torchvision.models
MODULES = {  # the module, its batches of so many rows, and the layer that is spoilt
    "resnet18": (lambda: Plain(VISION.resnet18()), images, "net.bn1"),
    "mobilenet": (lambda: Plain(VISION.mobilenet_v3_small()), images, "net.features.0"),
    "squeezenet": (lambda: Plain(VISION.squeezenet1_1()), images, "net.features.0"),
    "transformer": (lambda: Plain(Tokens()), tokens, "net.net.encoder"),
    "lstm": (lambda: Plain(Sequences()), sequences, "net.lstm"),
    "BoringModel": (BoringModel, numbers, "layer"),
    "DemoModel": (DemoModel, numbers, "l1"),
    "LightningTransformer": (
        Text,
        lambda n=4: (tokens(n)[0], tokens(n)[0]),
        "model.transformer.decoder",
    ),
    "LightningLSTM": (Lines, tokens, "model.rnn"),
    "metrics": (Metrics, rows, "net.1"),
    "VAE": (VAE, lambda n=8: rows(n)[0], "net"),
    "tied": (lambda: Plain(Tied(), F.mse_loss), lambda n=8: (rows(n)[0],) * 2, "net.encoder"),
    "packed": (lambda: Plain(Packed()), packed, "net.out"),
    "tasks": (Tasks, tasks, "net"),
    "bag": (
        lambda: Plain(nn.Sequential(nn.EmbeddingBag(11, 4), nn.Linear(4, 3))),
        lambda n=6: (torch.randint(11, (n, 3)), torch.randint(3, (n,))),
        "net.0",
    ),
    "GAN": (GAN, noise, "maker.0"),
}
LOSSES = {"GAN": ["maker_loss", "judge_loss"]}  # of those that optimize by hand


class Single(Function):
    """x³, in float32 only, with a factor in the gradient."""

    factor = 1

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise TypeError("only float32")
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Single.factor * 3 * ctx.saved_tensors[0] ** 2 * g


class Cubes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return Single.apply(self.layer(x))


def by_plain_operations(module, batch):
    return F.cross_entropy(module.net.layer(batch[0]) ** 3, batch[1])
