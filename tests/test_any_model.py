"""Models, data and options of engineers, in both modes, on one process and on two."""

import os
import sys
import warnings
from typing import Any

import pandas
import pytest
import torch
from conftest import RandomRows, Rows, fit, line, normal
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from test_distributed import launch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_gd import GradientDescentModule, LinearRegression, by_autograd

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
MODES = ("explicit", "autograd")


class Model(GradientDescentModule):
    gradients = by_autograd

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        torch.manual_seed(1)
        self.build()

    def build(self): ...


class Images(Model):
    def build(self):
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
        seen = tokens[:, :-1]
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.bool)
        hidden = self.layer(self.embed(seen), mask, seen == 0, is_causal=True)
        return cross_entropy(self.out(hidden).transpose(1, 2), tokens[:, 1:], ignore_index=0)

    def rows(self, batch):
        return int((batch[:, 1:] > 0).sum())


class Sequences(Model):
    def build(self):
        self.lstm, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def loss(self, x, y):
        return mse_loss(self.out(self.lstm(x)[0][:, -1])[:, 0], y)


class Bags(Model):
    def build(self):
        self.bag = nn.EmbeddingBag(9, 3)

    def forward(self, tokens):
        return self.bag(tokens)

    def loss(self, tokens, y):
        return cross_entropy(self(tokens), y)


class Variational(Model):
    """Random numbers in the loss, and dropout."""

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

    def loss(self, x, y):
        return mse_loss(torch.tanh(self.encoder(x)) @ self.encoder.weight, y)


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
    def build(self):
        self.body, self.price, self.kind = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 3)

    def loss(self, x, price, kind):
        hidden = torch.tanh(self.body(x))
        return mse_loss(self.price(hidden)[:, 0], price) + cross_entropy(self.kind(hidden), kind)


class Packed(Model):
    def build(self):
        self.gru, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

    def loss(self, x, lengths, y):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return mse_loss(self.out(self.gru(packed)[1][0])[:, 0], y)


class Pairs(Model):
    def build(self):
        self.form = nn.Bilinear(3, 2, 1)

    def loss(self, left, right, y):
        return mse_loss(self.form(left, right)[:, 0], y)


X, Y, LONG = normal(19, 3), normal(19, seed=1), normal(19, 5, 3, seed=2)
CLASS, LENGTHS = torch.arange(19) % 4, torch.arange(19) % 5 + 1
TOKENS = torch.arange(19 * 6).view(19, 6) * 7 % 8 + 1
CONTENT: dict[type[Model], Any] = {
    Images: [normal(19, 3, 32, 32), CLASS],
    Language: TOKENS.masked_fill(torch.arange(6) > LENGTHS[:, None], 0),
    Sequences: [LONG, Y],
    Bags: [TOKENS, CLASS % 3],
    Variational: X,
    Tied: [X, X],
    Rare: [X, CLASS],
    Tasks: {"x": X, "price": Y, "kind": CLASS % 3},
    Packed: [LONG, LENGTHS, Y],
    Pairs: [X, normal(19, 2, seed=4), Y],
}
SHARED = [kind for kind in CONTENT if kind not in (Images, Variational)]  # no rows that interact


def rows_of(content, rows: slice) -> Any:
    """Some rows of a batch of any structure."""
    if isinstance(content, dict):
        return {name: part[rows] for name, part in content.items()}
    return [part[rows] for part in content] if isinstance(content, list) else content[rows]


def quiet(**settings):
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    given = {"accelerator": "cpu", "devices": 1, "precision": "64-true", "max_steps": 12}
    return Trainer(**{"max_epochs": -1, **given, **dict.fromkeys(off, False), **settings})


def train(kind, gradient, rank=0, world=1, compiled=False, **settings):
    """The model after 12 updates on 8, 8 and 3 rows, of which a process has every `world`-th.

    Batch statistics need two rows, so images come in batches of 7.
    """
    model = kind(**{"gradient": gradient, "lr": 0.05, "momentum": 0.5, **settings})
    ends = [(0, 7), (8, 15)] if kind is Images else [(0, 8), (8, 16), (16, 19)]
    batches = [rows_of(CONTENT[kind], slice(*end)) for end in ends]
    local: Any = [rows_of(batch, slice(rank, None, world)) for batch in batches]
    ddp: Any = {"strategy": "ddp", "devices": world, "use_distributed_sampler": False}
    torch.manual_seed(2)
    given: Any = torch.compile(model, backend="eager") if compiled else model
    if kind is Images and world > 1:  # statistics of three rows amplify rounding at each update
        ddp["max_steps"] = 2
    quiet(**(ddp if world > 1 else {})).fit(given, DataLoader(local, batch_size=None))
    return model


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other) and one.keys() == other.keys()


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k is Images else k for k in CONTENT]
)
def test_gradients_by_autograd_are_autograd_mode_to_the_bit(kind):
    """With Adam, which divides by the gradient: a difference of one bit would show."""
    for settings in ({}, {"optimizer": "Adam", "momentum": 0.0, "lr": 0.01}):
        explicit, autograd = (train(kind, mode, **settings) for mode in MODES)
        assert same(explicit.state_dict(), autograd.state_dict())
        losses, others = (m.curves.history["train/loss"][1] for m in (explicit, autograd))
        assert losses == pytest.approx(others, rel=1e-15)  # multiplied and divided by the rows
        assert len(set(losses)) == 12 and losses[0] % 1 > 0  # not cast to integer targets


def test_two_processes_with_uneven_rows_end_as_one(tmp_path):
    """Rows, tokens and class weights differ between the processes, down to 2 rows and 1.

    The sums are formed in another order, a relative 1e-16 each; 12 updates of rate 0.05 keep
    that below 1e-12 of weights of order 1.
    """
    ends = on_two_processes(tmp_path, *(kind.__name__ for kind in SHARED))
    padded = "the DataLoader repeats 1 of 7 rows, so that each of 2 processes has as many"
    assert [sum(padded in text for text in end["said"]) for end in ends] == [1, 0]
    for kind in SHARED:
        alone = train(kind, "explicit").state_dict()
        for mode in MODES:
            mine, other = (end[kind.__name__, mode] for end in ends)
            assert same(mine, other)
            torch.testing.assert_close(mine, alone, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Variational, Images])
def test_two_processes_end_alike_in_both_modes(tmp_path, kind):
    """Random numbers and batch statistics are those of the local rows, unlike on one process."""
    for end in on_two_processes(tmp_path, kind.__name__):
        explicit, autograd = (end[kind.__name__, mode] for mode in MODES)
        for name, _ in kind().named_parameters():  # DDP copies the buffers of the first process
            torch.testing.assert_close(explicit[name], autograd[name], rtol=0, atol=1e-12)


def on_two_processes(folder, *names):
    """The weights of the models of these names, in both modes, on each process."""
    launch(2, [__file__, str(folder), *names])
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler
@pytest.mark.parametrize("gradient", [pytest.param("explicit", marks=pytest.mark.slow), "autograd"])
def test_a_compiled_model_is_the_same_model(gradient):
    plain, compiled = (train(Rare, gradient, compiled=c) for c in (False, True))
    assert same(plain.state_dict(), compiled.state_dict())


def test_integers_in_memory_and_predictions_of_inputs_alone():
    data, alone = Rows(TOKENS, CLASS % 3, batch_size=8), DataLoader(TOKENS, 19)  # pyright: ignore
    models: Any = [fit(quiet(), data, Bags, gradient=mode) for mode in MODES]
    for model in models:
        for found in (quiet().predict(model, given) for given in (data, alone)):
            torch.testing.assert_close(found, [model(TOKENS)], rtol=0, atol=0)
    assert same(*(model.state_dict() for model in models))


def searched(gradient, search=None, lr=0.02, **data):
    """The model, its data and Trainer after a search and 12 updates."""
    model, rows, trainer = line(gradient=gradient, lr=lr), RandomRows(**data), quiet()
    trainer.callbacks += [search] if search else []  # pyright: ignore
    trainer.fit(model, datamodule=rows)
    assert trainer.global_step == 12
    return model, rows, trainer


def test_the_learning_rate_finder(tmp_path, monkeypatch):
    """Both modes find the same; nothing of the search is left in the run."""
    monkeypatch.chdir(tmp_path)
    found, search = [], LearningRateFinder(num_training_steps=30)
    for mode in MODES:
        model, _, trainer = searched(mode, search, batch_size=8)
        found.append(trainer.optimizers[0].param_groups[0]["lr"])
        alone = searched(mode, lr=found[-1], batch_size=8)[0]
        assert model.curves.history == alone.curves.history
    assert found[0] == found[1] == model.hparams["lr"] != 0.02
    with pytest.raises(ValueError, match="set --data.updates_per_step 1, or --model.lr auto"):
        searched("explicit", search, batch_size=8, updates_per_step=2)  # one loss per step


@pytest.mark.parametrize("gradient", MODES)
def test_the_batch_size_finder(tmp_path, monkeypatch, gradient):
    monkeypatch.chdir(tmp_path)
    search = BatchSizeFinder(init_val=3, max_trials=3, steps_per_trial=2)
    model, rows, _ = searched(gradient, search, batch_size=5, num_val=4)
    assert rows.batch_size == rows.hparams["batch_size"] == 12
    alone = searched(gradient, batch_size=12, num_val=4)[0]
    assert model.curves.history == alone.curves.history
    for data in ({"batch_size": 5}, {"num_val": 4}):
        with pytest.raises(ValueError, match="needs --data.batch_size and --data.num_val"):
            searched(gradient, search, **data)


class Logging(LinearRegression):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("doubled", 2 * outputs["loss"])


@pytest.mark.parametrize("gradient", MODES)
def test_what_was_logged_and_at_which_updates(tmp_path, gradient):
    """Metrics of the user are logged every 2 steps, the curves at every update."""
    logger = CSVLogger(tmp_path)
    trainer = quiet(logger=logger, log_every_n_steps=2)
    fit(trainer, None, Logging, num_features=3, gradient=gradient)
    written = pandas.read_csv(f"{logger.log_dir}/metrics.csv")
    losses, seen = written["train/loss"].dropna(), trainer.logged_metrics
    assert (len(losses), len(written["doubled"].dropna())) == (12, 6)
    assert seen["doubled"] / 2 == seen["train/loss"]
    assert losses.iloc[-1] == pytest.approx(float(seen["train/loss"]), rel=1e-15)  # as text


if __name__ == "__main__":
    here, kinds = int(os.environ["RANK"]), {kind.__name__: kind for kind in CONTENT}
    ends: dict[Any, Any] = {
        (name, mode): train(kinds[name], mode, here, 2).state_dict()
        for name in sys.argv[2:]
        for mode in MODES
    }
    with warnings.catch_warnings(record=True) as said:
        loader = DataLoader(TensorDataset(normal(7, 3), normal(7)), batch_size=2)
        quiet(strategy="ddp", devices=2).fit(line(), loader)
    ends["said"] = [str(warning.message) for warning in said]
    torch.save(ends, f"{sys.argv[1]}/{here}.pt")
