"""Files of MNIST: what is missing, damaged or downloaded, by torchvision's own downloader."""

import contextlib
import gc
import gzip
import hashlib
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


class Mirror(BaseHTTPRequestHandler):
    """Serves `files` in the manner that the first part of the path names."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        _, manner, name = self.path.split("/")
        getattr(self, manner)(self.files[name])

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

    def cut(self, content):
        self.close_connection = True

    def garbage(self, content):
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def log_message(self, *args):
        """Keep quiet."""


@pytest.fixture
def mirrors(monkeypatch):
    """Make mirrors of the given manners the ones that torchvision knows."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    dataset = torchvision.datasets.MNIST

    def know(files, *manners):
        Mirror.files = {f"{name}.gz": gzip.compress(files[name], 1) for name in files}
        sums = [(name, hashlib.md5(content).hexdigest()) for name, content in Mirror.files.items()]
        monkeypatch.setattr(dataset, "resources", sums)
        urls = [f"http://127.0.0.1:{server.server_port}/{manner}/" for manner in manners]
        monkeypatch.setattr(dataset, "mirrors", urls)
        Mirror.asked.clear()
        return server

    yield know
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("manner", ["half", "wrong", "not_found", "cut", "garbage"])
def test_a_bad_download_is_one_line_and_the_next_mirror_is_tried(small, mirrors, tmp_path, manner):
    root = tmp_path / "data"
    mirrors(small, manner)
    with pytest.raises(ConnectionError) as error:
        load(root)
    (line,) = str(error.value).splitlines()
    assert str(root / "MNIST" / "raw") in line and line.endswith("use --data.source offline")
    assert [name for name in small if (root / "MNIST" / "raw" / name).exists()] == []
    assert Mirror.asked
    # Of the failures that end a download, torchvision tries the next mirror for all but these.
    mirrors(small, *([] if manner in ("cut", "garbage") else [manner]), "good")
    assert len(load(root)["train"]) == 30


def test_a_good_download(small, mirrors, tmp_path):
    mirrors(small, "good")
    raw = written(tmp_path, {"train-images-idx3-ubyte": b"half", "train-labels.gz": b"half"})
    tables = load(tmp_path)  # three files were missing: what lay there did not count
    assert [len(tables[part]) for part in ("train", "test")] == [30, 12]
    assert {n: (raw / n).read_bytes() for n in small} == small
    Mirror.asked.clear()
    load(tmp_path)
    assert Mirror.asked == []


def test_a_file_in_the_way_and_an_unreachable_mirror(small, mirrors, tmp_path):
    server = mirrors(small, "good")
    (tmp_path / "data").write_text("mine")
    with pytest.raises(ConnectionError, match="data"):
        load(tmp_path / "data")
    assert (tmp_path / "data").read_text() == "mine"
    server.server_close()
    with pytest.raises(ConnectionError, match="could not be downloaded into .*other.*offline"):
        load(tmp_path / "other")
