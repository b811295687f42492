"""Models, data and callbacks that nobody here wrote, in both modes, on one process and on two."""

import sys
from typing import Any

import pytest
import torch
from conftest import normal
from lightning.pytorch import Trainer
from test_distributed import launch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

from lightning_gd import GradientDescentModule, by_autograd

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
MODES = ("explicit", "autograd")


class Model(GradientDescentModule):
    """Layers by name, the same in every run."""

    gradients = by_autograd

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        torch.manual_seed(1)
        self.build()
        self.double()

    def build(self): ...


class Images(Model):
    """torchvision's resnet18, with batch statistics."""

    def build(self):
        from torchvision.models import resnet18

        self.net = resnet18(num_classes=4)

    def loss(self, x, y):
        return cross_entropy(self.net(x), y)


class Language(Model):
    """The next token, 0 being padding; the output shares its weights with the embedding."""

    def build(self):
        self.embed, self.out = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def loss(self, tokens):
        seen, following = tokens[:, :-1], tokens[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(seen.shape[1], dtype=torch.bool)
        hidden = self.layer(self.embed(seen), mask.to(seen.device), seen == 0, is_causal=True)
        return cross_entropy(self.out(hidden).transpose(1, 2), following, ignore_index=0)

    def rows(self, batch):
        return int((batch[:, 1:] > 0).sum())


class Sequences(Model):
    def build(self):
        self.lstm, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])[:, 0]

    def loss(self, x, y):
        return mse_loss(self(x), y)


class Bags(Model):
    """Integer inputs with a weight each."""

    def build(self):
        self.bag, self.out = nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, 3)

    def loss(self, tokens, weights, y):
        return cross_entropy(self.out(self.bag(tokens, per_sample_weights=weights)), y)


class Variational(Model):
    """Random numbers in the loss, and dropout; the target is the input."""

    def build(self):
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)
        self.drop = nn.Dropout(0.2)

    def loss(self, x):
        mean, log = self.encoder(self.drop(x)).chunk(2, 1)
        decoded = self.decoder(mean + torch.randn_like(mean) * (log / 2).exp())
        divergence = (mean.square() + log.exp() - 1 - log).sum(1) / 2
        return ((decoded - x).square().sum(1) + divergence).mean()


class Tied(Model):
    """An autoencoder whose decoder is the transposed encoder, on batches (x, x)."""

    def build(self):
        self.encoder = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.encoder(x)) @ self.encoder.weight

    def loss(self, x, y):
        return mse_loss(self(x), y)


class Rare(Model):
    """Softmax with class weights, which divides by their sum."""

    def build(self):
        self.out = nn.Linear(3, 4)
        self.register_buffer("importance", torch.tensor([1.0, 5.0, 0.5, 2.0]))

    def loss(self, x, y):
        return cross_entropy(self.out(x), y, weight=self.importance)

    def rows(self, batch):
        return self.importance[batch[1]].sum().item()


class Tasks(Model):
    """Two tasks on the same rows, by name."""

    def build(self):
        self.body, self.price, self.kind = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 3)

    def loss(self, x, price, kind):
        hidden = torch.tanh(self.body(x))
        return mse_loss(self.price(hidden)[:, 0], price) + cross_entropy(self.kind(hidden), kind)


class Packed(Model):
    def build(self):
        self.gru, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

    def loss(self, x, lengths, y):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return mse_loss(self.out(self.gru(packed)[1][0])[:, 0], y)


class Pairs(Model):
    def build(self):
        self.form = nn.Bilinear(3, 2, 1)

    def loss(self, left, right, y):
        return mse_loss(self.form(left, right)[:, 0], y)


N = 19
X, Y, LONG = normal(N, 3), normal(N, seed=1), normal(N, 5, 3, seed=2)
CLASS, LENGTHS = torch.arange(N) % 4, torch.arange(N) % 5 + 1
TOKENS = torch.arange(N * 6).view(N, 6) * 7 % 8 + 1
CONTENT: dict[type[Model], Any] = {
    Images: (normal(N, 3, 32, 32), CLASS),
    Language: TOKENS.masked_fill(torch.arange(6) > LENGTHS[:, None], 0),
    Sequences: (LONG, Y),
    Bags: (TOKENS, normal(N, 6, seed=3), CLASS % 3),
    Variational: X,
    Tied: (X, X),
    Rare: (X, CLASS),
    Tasks: {"x": X, "price": Y, "kind": CLASS % 3},
    Packed: (LONG, LENGTHS, Y),
    Pairs: (X, normal(N, 2, seed=4), Y),
}
SHARED = [kind for kind in CONTENT if kind not in (Images, Variational)]  # the same on 2 processes


def rows_of(content, rows: slice) -> Any:
    """Some rows of a batch of any structure."""
    if isinstance(content, dict):
        return {name: rows_of(part, rows) for name, part in content.items()}
    if isinstance(content, tuple):
        return tuple(rows_of(part, rows) for part in content)
    return content[rows]


def loader(kind, rank=0, world=1):
    """Batches of 8, 8 and 3 rows, of which each process takes every `world`-th row."""
    batches = [rows_of(CONTENT[kind], slice(first, first + 8)) for first in (0, 8, 16)]
    local: Any = [rows_of(batch, slice(rank, None, world)) for batch in batches]
    return DataLoader(local, batch_size=None)


def quiet(**settings):
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    given = {"accelerator": "cpu", "precision": "64-true", "max_steps": 12, "max_epochs": -1}
    return Trainer(**{**given, **dict.fromkeys(off, False), **settings})


def end_of(kind, gradient, rank=0, world=1, trainer=None, **settings):
    """All weights and buffers after 12 updates."""
    model = kind(**{"gradient": gradient, "lr": 0.05, "momentum": 0.5, **settings})
    if trainer is None:
        ddp: Any = {"strategy": "ddp", "devices": world, "use_distributed_sampler": False}
        trainer = quiet(**(ddp if world > 1 else {"devices": 1}))
    torch.manual_seed(2)
    trainer.fit(model, loader(kind, rank, world))
    assert trainer.global_step == 12
    return model.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other) and one.keys() == other.keys()


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k is Images else k for k in CONTENT],
)
def test_gradients_by_autograd_are_autograd_mode_to_the_bit(kind):
    """With Adam, which divides by the gradient: a difference of one bit would show."""
    first = kind().state_dict()
    for settings in ({}, {"optimizer": "Adam", "momentum": 0.0, "lr": 0.01}):
        explicit, autograd = (end_of(kind, mode, **settings) for mode in MODES)
        assert same(explicit, autograd)
        assert any(not torch.equal(first[name], explicit[name]) for name in first)


def test_two_processes_with_uneven_rows_end_as_one(tmp_path):
    """Rows, tokens and class weights differ between the processes, down to 2 rows and 1.

    The sums are formed in another order, a relative 1e-16 each; 12 updates of rate 0.05 keep
    that below 1e-12 of weights of order 1.
    """
    launch(2, [__file__, str(tmp_path)])
    ends = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for kind in SHARED:
        alone = end_of(kind, "explicit")
        for mode in MODES:
            mine, other = (end[kind.__name__, mode] for end in ends)
            assert same(mine, other)
            torch.testing.assert_close(mine, alone, rtol=0, atol=1e-12)


def main(folder):
    """Train every model that two processes can share, in both modes."""
    import os

    rank, ends = int(os.environ["RANK"]), {}
    for kind in SHARED:
        for mode in MODES:
            ends[kind.__name__, mode] = end_of(kind, mode, rank, 2)
    torch.save(ends, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
