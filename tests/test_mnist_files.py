"""Files of MNIST: what is missing, damaged or downloaded, by torchvision's own downloader."""

import gc
import gzip
import hashlib
import shutil
import struct
from functools import partial
from http.client import BadStatusLine
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torchvision

from lightning_gd import MNISTParityData
from lightning_gd.data import mnist

# Torchvision leaves responses open; the garbage collector closes them, here at the latest.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


def load(root, **settings):
    data = MNISTParityData(source="torchvision", root=str(root), **settings)
    data.prepare_data()
    data.setup("fit")
    return data.tables


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
    tables = load(tmp_path, download=False)
    assert tables["train"].y.tolist() == [-1, 1] * 15 and len(tables["test"]) == 12
    pixels = np.frombuffer(small["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(12, 784)
    np.testing.assert_array_equal(tables["test"].raw.numpy(), pixels)
    with pytest.raises(ValueError, match="num_train=31 .*30 .*torchvision"):
        load(tmp_path, num_train=31)
    assert {path.name for path in raw.iterdir()} == set(small)


# Download: torchvision's own, from a server on loopback


@pytest.fixture
def mirror(small, monkeypatch, tmp_path):
    """The folder of the server that torchvision knows, with all files packed."""
    folder, dataset = tmp_path / "served", torchvision.datasets.MNIST
    folder.mkdir()
    packed = {f"{name}.gz": gzip.compress(small[name], 1) for name in small}
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(dataset, "resources", sums)
        monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield folder
        server.shutdown()


def garbage(*args, **named):
    raise BadStatusLine("this is not HTTP")


@pytest.mark.parametrize("manner", ["damaged", "missing", "no HTTP"])
def test_a_bad_download_is_one_line(mirror, small, tmp_path, monkeypatch, manner):
    root, file = tmp_path / "data", next(mirror.iterdir())
    if manner == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
    elif manner == "missing":
        file.unlink()
    else:
        monkeypatch.setattr("urllib.request.urlopen", garbage)
    with pytest.raises(ConnectionError, match="could not be downloaded into") as error:
        load(root)
    (line,) = str(error.value).splitlines()
    assert str(root / "MNIST" / "raw") in line and line.endswith("use --data.source offline")


def test_a_good_download(mirror, small, tmp_path):
    raw = written(tmp_path, {"train-images-idx3-ubyte": b"half", "train-labels.gz": b"half"})
    for _ in range(2):
        tables = load(tmp_path)  # three files were missing: what lay there did not count
        assert [len(tables[part]) for part in ("train", "test")] == [30, 12]
        assert {n: (raw / n).read_bytes() for n in small} == small
        shutil.rmtree(mirror, ignore_errors=True)  # not asked again


def test_a_file_in_the_way(mirror, tmp_path):
    (tmp_path / "data").write_text("mine")
    with pytest.raises(ConnectionError, match="data"):
        load(tmp_path / "data")
    assert (tmp_path / "data").read_text() == "mine"
