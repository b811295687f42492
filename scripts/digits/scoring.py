"""Odd or even: the scores that a trained model gives to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from digits.images import SIDE
from lightning_gd import load
from lightning_gd.checkpoints import read
from lightning_gd.data.mnist import SCALINGS

Scorer = Callable[[Sequence[NDArray[np.uint8]]], list[float]]


def scorer(checkpoint: str | Path) -> Scorer:
    """Return a function from pictures of shape [28, 28] to scores ŷ: odd where ŷ > 0.

    Pixels are scaled as in the run that made the checkpoint.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is refused (see `checkpoints.read`), or is not of a model of digits.
    """
    model = load(checkpoint).eval()
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"checkpoint {checkpoint}: {name} holds numbers that are not finite")
    scaling = read(checkpoint).get("datamodule_hyper_parameters", {}).get("scaling")
    width = model.hparams.get("num_features")
    if width != SIDE**2 or str(scaling) not in SCALINGS:
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
    """Return the files named, and the pictures in each folder named, in order of name.

    Raises:
        ValueError: If a folder has none.
    """
    Image.init()
    endings, found = set(Image.registered_extensions()), []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
            if not files:
                raise ValueError(f"folder {path} holds no picture")
        found += files
    return found
