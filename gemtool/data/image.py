"""Still images as tiles of patches.

The tile rule and the budget of 258 tokens a tile are those of the Gemini API.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gemtool.data.pieces import Piece
from gemtool.data.settings import PATCH, MediaSettings
from gemtool.errors import CorruptInput, GemtoolError

if TYPE_CHECKING:
    from PIL import Image

SMALL = 384
"""An image with no side longer than this is one tile."""

# Only formats that Pillow decodes itself: others, such as EPS, start an outside program.
_FORMATS = "AVIF BMP GIF ICO JPEG JPEG2000 PCX PNG PPM QOI TGA TIFF WEBP".split()

Box = tuple[int, int, int, int]


def tile_boxes(width: int, height: int) -> list[Box]:
    """Boxes (left, top, right, bottom) that cover an image exactly, row by row.

    Both sides at most 384 pixels: one tile. Else squares of u = floor(min(width, height) / 1.5)
    pixels, u kept within 256..768; those at the right and bottom edges are what remains.
    """
    if max(width, height) <= SMALL:
        return [(0, 0, width, height)]
    unit = min(768, max(256, math.floor(min(width, height) / 1.5)))
    return [
        (left, top, min(left + unit, width), min(top + unit, height))
        for top in range(0, height, unit)
        for left in range(0, width, unit)
    ]


def count_image(width: int, height: int, settings: MediaSettings) -> int:
    """Tokens of an image of this size, its markers included, without reading it."""
    tiles = len(tile_boxes(width, height)) if settings.tiles else 1
    return tiles * settings.image_tokens


def patchify(pixels: np.ndarray) -> np.ndarray:
    """Cuts [S, S, 3] into [(S/14)^2, 14, 14, 3], row by row; dtype kept."""
    side = len(pixels) // PATCH
    grid = pixels.reshape(side, PATCH, side, PATCH, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(side * side, PATCH, PATCH, 3)


def unpatchify(patches: np.ndarray) -> np.ndarray:
    """The inverse of `patchify`: [n, 14, 14, 3] to [S, S, 3]."""
    side = math.isqrt(len(patches))
    grid = patches.reshape(side, side, PATCH, PATCH, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(side * PATCH, side * PATCH, 3)


def image_pieces(
    source: str | Path | bytes | BinaryIO, settings: MediaSettings, name: str
) -> Iterator[Piece]:
    """Yields a piece a tile, each scaled to `settings.image_size` pixels square.

    The image is turned upright by its EXIF orientation and laid over white where transparent; of
    an animation, or a file of several pages, the first picture is taken and `meta["frame"]` is 0.

    Args:
        source: a path, the file's bytes, or a binary file.
        settings: the token budget; `tiles` says whether large images are cut.
        name: of the source, for `meta` and messages.

    Raises:
        CorruptInput: not an image, truncated or damaged.
        GemtoolError: too large to decode safely.
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            image, several = _open(file, name)
    else:
        image, several = _open(source, name)

    from PIL import Image

    size = (settings.image_size, settings.image_size)
    boxes = tile_boxes(*image.size) if settings.tiles else [(0, 0, *image.size)]
    for box in boxes:
        tile = image.crop(box).resize(size, Image.Resampling.BICUBIC)
        meta: dict[str, Any] = {"source": name, "box": list(box), "size": list(image.size)}
        if several:
            meta["frame"] = 0
        yield Piece("image", payload=patchify(np.asarray(tile)), meta=meta)


def _open(file: BinaryIO, name: str) -> tuple[Image.Image, bool]:
    """Decodes the first picture to upright RGB; also whether the file holds several."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns at half the size that it refuses; odd metadata is not our concern.
            warnings.simplefilter("ignore")
            Image.init()
            image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
            several = getattr(image, "is_animated", False)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image)), several
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise GemtoolError(
            f"{name}: the image has more than {limit:,} pixels; scale it down or cut it first"
        ) from None
    except UnidentifiedImageError:
        raise CorruptInput(f"{name}: not an image in a known format") from None
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's parsers raise whatever a damaged file makes them stumble over.
        raise CorruptInput(f"{name}: damaged or truncated image: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255
        grey = np.clip(np.asarray(image, np.float64) / 257, 0, 255)
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # no fixed range: its own is stretched to full contrast
        values = np.nan_to_num(np.asarray(image, np.float64))
        low, high = values.min(), values.max()
        grey = (values - low) * (255 / (high - low) if high > low else 0)
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
