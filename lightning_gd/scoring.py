"""Odd or even: the answer of a trained model to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lightning_gd.data.mnist import SCALINGS
from lightning_gd.images import SIDE
from lightning_gd.loading import load, read

Scorer = Callable[[Sequence[NDArray[np.uint8]]], list[float]]


def scorer(checkpoint: str | Path) -> Scorer:
    """What turns pictures of shape [28, 28] into the raw scores ŷ of a model: odd where ŷ > 0.

    Pixels are scaled as in the run that made the checkpoint.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is refused (see `checkpoints.read`), or is not of a model of digits.
    """
    model = load(checkpoint).eval()
    scaling = read(checkpoint).get("datamodule_hyper_parameters", {}).get("scaling")
    width = model.hparams.get("num_features")
    if width != SIDE**2 or scaling not in SCALINGS:
        raise ValueError(
            f"checkpoint {checkpoint} is of {type(model).__name__} with num_features={width}, "
            f"pixels scaled by {scaling!r}: pictures need one that was trained on the {SIDE**2} "
            "pixels of MNISTParityData"
        )
    factor, shift = SCALINGS[scaling]

    @torch.no_grad()
    def scores(pictures: Sequence[NDArray[np.uint8]]) -> list[float]:
        x = torch.from_numpy(np.stack(pictures)).flatten(1)
        return model(x.to(next(model.parameters())).mul_(factor).add_(shift)).tolist()

    return scores


def pictures(paths: Sequence[Path]) -> list[Path]:
    """The files named, and of each folder those that end as pictures do, in order of name.

    Raises:
        ValueError: If a folder has none.
    """
    Image.init()
    endings, found = set(Image.registered_extensions()), []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [f for f in inside if not path.is_dir() or f.suffix.lower() in endings]
        if not files:
            raise ValueError(f"folder {path} holds no picture")
        found += files
    return found
