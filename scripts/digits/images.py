"""Pictures of digits, brought to the form of MNIST's."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Grey = NDArray[np.float64]

SIDE, BOX = 28, 20  # pixels of a picture of MNIST, and of the box that its digit fills
LARGEST = 1024  # pixels per side; a larger picture is reduced first
OPAQUE = 128  # alpha from which a pixel counts as seen
CONTRAST = 32  # the least difference, of 255, between ink and paper
FAINT = 0.1  # of the darkest ink: fainter pixels do not extend the digit's box


def read_digit(path: Path) -> NDArray[np.uint8]:
    """Read a picture of one digit and bring it to MNIST's form.

    Args:
        path: A file of any format that Pillow reads; of several frames the first counts.

    Returns:
        Grey levels 0 (paper) … 255 (ink), shape [28, 28].

    Raises:
        OSError: If it cannot be read as a picture.
        ValueError: If there is nothing to see on it, it is too large, or it is a program (EPS).
    """
    if path.exists() and not path.is_file():  # which might never end
        raise OSError("cannot read the picture: this is a folder, a pipe or a device")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == "EPS":
                    raise ValueError(
                        "EPS is a program, which Ghostscript would run: save it as PNG"
                    )
                return mnist_form(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = f"it may have {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ValueError(f"the picture is too large: {most}") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # damaged bytes raise errors of many types
        raise OSError(f"cannot read the picture: {error}") from error


def mnist_form(image: Image.Image) -> NDArray[np.uint8]:
    """Scale a digit to a box of 20×20 and put its centre of mass into the middle of 28×28.

    Ink is what differs from the paper, whether darker, lighter or of another colour; the paper
    is the median colour of the picture's edge, or what is transparent.

    Args:
        image: A picture of one digit, upright, alone on its paper.

    Raises:
        ValueError: If ink and paper hardly differ.
    """
    ink = _ink(_reduced(image))
    seen = ink > max(FAINT * ink.max(), CONTRAST)
    if not seen.any():
        raise ValueError(f"no digit is seen: all colours lie within {ink.max():.0f} of 255")
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    digit = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX / max(digit.shape)
    height, width = (max(1, round(side * scale)) for side in digit.shape)
    picture = Image.fromarray(digit.astype(np.float32))
    small = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    return _centred(np.clip(small * (255 / small.max()), 0, 255))


def _reduced(image: Image.Image) -> NDArray[np.float64]:
    """Return red, green, blue and alpha in 0 … 255, shape [H, W, 4], turned upright by EXIF."""
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits: `convert` would cut them off at 255
        levels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(levels).all():
            raise ValueError("the picture holds numbers that are not finite")
        levels = (levels - levels.min()) * (255 / max(np.ptp(levels), 1e-300))
        image = Image.fromarray(levels.astype(np.uint8))
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image.thumbnail((LARGEST, LARGEST))
    return np.asarray(image, dtype=np.float64)


def _ink(pixels: NDArray[np.float64]) -> Grey:
    """Return how far each pixel is from the paper, 0 … 255, shape [H, W]."""
    colour, alpha = pixels[..., :3], pixels[..., 3:] / 255
    seen = colour[pixels[..., 3] >= OPAQUE]
    if len(seen) == 0:
        raise ValueError("no digit is seen: the picture is transparent")
    if alpha.min() < 1:
        if np.ptp(seen, axis=0).max() < 2 * CONTRAST:
            return pixels[..., 3]  # one ink on transparent paper, whatever its colour
        colour = alpha * colour + (1 - alpha) * np.median(seen, axis=0)
    edge = np.concatenate([colour[0], colour[-1], colour[:, 0], colour[:, -1]])
    distance = np.abs(colour - np.median(edge, axis=0)).max(axis=-1)
    # Ignore paper texture below three times its median contrast, which is 0 for a drawn picture.
    texture = 3 * np.median(np.abs(edge - np.median(edge, axis=0)).max(axis=-1))
    return np.clip(distance - texture, 0, None)


def _centred(digit: Grey) -> NDArray[np.uint8]:
    """Return the digit on empty paper, centred by mass as far as it stays inside."""
    field, place = np.zeros((SIDE, SIDE), dtype=np.uint8), []
    for axis, size in enumerate(digit.shape):
        mass = digit.sum(1 - axis)
        centre = (mass @ (np.arange(size) + 0.5)) / mass.sum()
        first = min(max(SIDE // 2 - int(centre), 0), SIDE - size)
        place.append(slice(first, first + size))
    field[tuple(place)] = np.round(digit)
    return field
