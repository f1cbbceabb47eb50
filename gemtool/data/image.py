"""Still images as tiles of patches.

The tile rule and the budget of 258 tokens a tile are those of the Gemini API.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Resampling, Transpose

from gemtool.data.pieces import Piece
from gemtool.data.settings import PATCH, MediaSettings
from gemtool.errors import CorruptInput, GemtoolError

SMALL = 384
"""An image with no side longer than this is one tile."""

MAX_PIXELS = 100_000_000
"""An image of more is refused by its header, before memory is taken for it."""

# Only formats that Pillow decodes itself: others, such as EPS, start an outside program.
_FORMATS = "AVIF BMP GIF ICO JPEG JPEG2000 PCX PNG PPM QOI TGA TIFF WEBP".split()

_ORIENTATION = 0x0112
"""EXIF's tag of how a picture is to be turned."""

_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# Whether columns count from the right, rows from below, and both change places.
_AXES = {
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}

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
            picture = _Picture(file, name)
    else:
        picture = _Picture(source, name)
    size = (settings.image_size, settings.image_size)
    for box in tile_boxes(*picture.size) if settings.tiles else [(0, 0, *picture.size)]:
        tile = picture.crop(box).resize(size, Resampling.BICUBIC)
        meta: dict[str, Any] = {"source": name, "box": list(box), "size": list(picture.size)}
        if picture.several:
            meta["frame"] = 0
        yield Piece("image", payload=patchify(np.asarray(tile)), meta=meta)


class _Picture:
    """The first picture of a file, decoded; upright and RGB only where it is looked at.

    So there is one copy of its pixels in memory, in the file's own mode.

    Attributes:
        size: width and height when upright.
        several: whether the file holds more pictures.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        try:
            with warnings.catch_warnings():
                # Pillow warns below our own limit; odd metadata is not our concern.
                warnings.simplefilter("ignore")
                Image.init()
                image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                self.several = getattr(image, "is_animated", False)
                image.load()
                orientation = image.getexif().get(_ORIENTATION, 1)
                self._low, self._high = _extremes(image) if image.mode == "F" else (0.0, 0.0)
        except Image.DecompressionBombError:
            raise GemtoolError(
                f"{name}: the image has more than {MAX_PIXELS:,} pixels; scale it down or cut it "
                "first"
            ) from None
        except UnidentifiedImageError:
            raise CorruptInput(f"{name}: not an image in a known format") from None
        except MemoryError:
            raise
        except Exception as error:
            # Pillow's parsers raise whatever a damaged file makes them stumble over.
            raise CorruptInput(f"{name}: damaged or truncated image: {error}") from None
        self._image = image
        self._turn = _TURNS.get(orientation)
        width, height = image.size
        self._mirrored, self._flipped, self._swapped = _AXES.get(orientation, (False,) * 3)
        self.size = (height, width) if self._swapped else (width, height)

    def crop(self, box: Box) -> Image.Image:
        """A part of the upright picture, in RGB."""
        xs, ys = (box[0], box[2]), (box[1], box[3])
        if self._swapped:
            xs, ys = ys, xs
        if self._mirrored:
            xs = (self._image.width - xs[1], self._image.width - xs[0])
        if self._flipped:
            ys = (self._image.height - ys[1], self._image.height - ys[0])
        part = self._to_rgb(self._image.crop((xs[0], ys[0], xs[1], ys[1])))
        return part if self._turn is None else part.transpose(self._turn)

    def _to_rgb(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255
            grey = np.clip(np.asarray(image, np.float64) / 257, 0, 255)
            return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
        if image.mode == "F":  # no fixed range: its own is stretched to full contrast
            values = np.nan_to_num(np.asarray(image, np.float64)) - self._low
            grey = values * (255 / (self._high - self._low) if self._high > self._low else 0)
            return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return Image.alpha_composite(white, rgba).convert("RGB")
        return image.convert("RGB")


def _extremes(image: Image.Image) -> tuple[float, float]:
    """Least and greatest value of a picture in floating point, some rows at a time."""
    low, high = math.inf, -math.inf
    for top in range(0, image.height, 64):
        rows = image.crop((0, top, image.width, min(top + 64, image.height)))
        values = np.nan_to_num(np.asarray(rows, np.float64))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high
