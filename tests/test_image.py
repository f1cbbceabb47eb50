"""Images: the tile rule, patches, and every kind of pixel that Pillow reads."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from gemtool.data.image import count_image, image_pieces, patchify, tile_boxes, unpatchify
from gemtool.data.settings import MediaSettings
from gemtool.errors import CorruptInput, GemtoolError

WHOLE = MediaSettings(tiles=False)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def only_piece(data: bytes, settings: MediaSettings = WHOLE) -> np.ndarray:
    (piece,) = image_pieces(data, settings, "x")
    assert piece.kind == "image"
    assert piece.payload is not None
    assert piece.payload.dtype == np.uint8
    return unpatchify(piece.payload)


@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        ((960, 540), 6),
        ((384, 384), 1),
        ((1, 1), 1),
        ((385, 384), 4),
        ((385, 100), 2),
        ((4000, 3000), 24),
    ],
)
def test_tiles_of_the_report(size: tuple[int, int], tiles: int) -> None:
    assert len(tile_boxes(*size)) == tiles
    assert count_image(*size, MediaSettings()) == 258 * tiles
    assert count_image(*size, MediaSettings(image_tokens=66)) == 66 * tiles
    assert count_image(*size, WHOLE) == 258


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_tiles_cover_the_image_exactly(width: int, height: int) -> None:
    boxes = tile_boxes(width, height)
    assert sum((right - left) * (low - top) for left, top, right, low in boxes) == width * height
    assert all(0 <= a < c <= width and 0 <= b < d <= height for a, b, c, d in boxes)
    assert len({box[:2] for box in boxes}) == len(boxes)
    if max(width, height) > 384:
        unit = min(768, max(256, math.floor(min(width, height) / 1.5)))
        assert len(boxes) == math.ceil(width / unit) * math.ceil(height / unit)


@pytest.mark.parametrize("size", [112, 224])
def test_patches_are_raster_order_and_invert(size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    patches = patchify(pixels)
    assert patches.shape == ((size // 14) ** 2, 14, 14, 3)
    assert np.array_equal(patches[1], pixels[:14, 14:28])
    assert np.array_equal(patches[size // 14], pixels[14:28, :14])
    assert np.array_equal(unpatchify(patches), pixels)


def test_each_tile_shows_its_part() -> None:
    pixels = np.zeros((540, 960, 3), np.uint8)
    boxes = tile_boxes(960, 540)
    for number, (left, top, right, low) in enumerate(boxes):
        pixels[top:low, left:right] = 40 * number
    pieces = list(image_pieces(encoded(Image.fromarray(pixels)), MediaSettings(), "photo.png"))
    assert [piece.payload.shape for piece in pieces] == [(256, 14, 14, 3)] * 6
    for number, piece in enumerate(pieces):
        assert np.all(piece.payload == 40 * number)
        assert piece.meta == {
            "source": "photo.png",
            "box": list(boxes[number]),
            "size": [960, 540],
        }


def test_low_resolution() -> None:
    (piece,) = image_pieces(
        encoded(Image.new("RGB", (300, 200), "red")), MediaSettings(image_tokens=66), "x"
    )
    assert piece.payload.shape == (64, 14, 14, 3)


def test_exif_turns_the_image() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :100] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter clockwise: the left edge becomes the top
    data = encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)
    upright = only_piece(data)
    assert upright[:100].min() > 250
    assert upright[124:].max() < 5
    (piece,) = image_pieces(data, WHOLE, "x")
    assert piece.meta["size"] == [100, 200]


def test_transparency_lies_over_white() -> None:
    half = Image.new("RGBA", (50, 50), (255, 0, 0, 128))
    assert np.allclose(only_piece(encoded(half)), (255, 127, 127), atol=1)
    palette = Image.new("P", (50, 50), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert np.all(only_piece(encoded(palette)) == (0, 0, 255))
    assert np.all(only_piece(encoded(palette, transparency=1)) == 255)
    assert np.all(only_piece(encoded(Image.new("LA", (9, 9), (0, 0)))) == 255)


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (Image.fromarray(np.full((20, 20), 0x8080, np.uint16)), "PNG", (128, 128, 128)),
        (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("L", (20, 20), 77), "WEBP", (77, 77, 77)),
        (Image.new("1", (20, 20), 1), "PNG", (255, 255, 255)),
        (Image.new("YCbCr", (20, 20), (128, 128, 128)), "JPEG", (128, 128, 128)),
    ],
)
def test_kinds_of_pixels(image: Image.Image, format: str, expected: tuple[int, ...]) -> None:
    assert np.allclose(only_piece(encoded(image, format)), expected, atol=2)


def test_floating_point_pixels_are_stretched() -> None:
    ramp = np.linspace(-3, 5, 224 * 224, dtype=np.float32).reshape(224, 224)
    pixels = only_piece(encoded(Image.fromarray(ramp), "TIFF"))
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (piece,) = image_pieces(data, WHOLE, "x")
    assert piece.meta["frame"] == 0
    assert np.all(unpatchify(piece.payload) == (255, 0, 0))


def test_path_bytes_and_file_agree(tmp_path) -> None:
    data = encoded(Image.linear_gradient("L").resize((500, 400)), "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    results = []
    for source in (data, path, str(path), io.BytesIO(data)):
        results.append([piece.payload for piece in image_pieces(source, MediaSettings(), "x")])
    assert len(results[0]) == 4
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_damaged_images_are_named() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        data = encoded(Image.fromarray(noise), kind)
        for cut in (0, 3, 20, len(data) // 2, len(data) - 500):
            with pytest.raises(CorruptInput, match=r"^cat\.pic: .*"):
                list(image_pieces(data[:cut], WHOLE, "cat.pic"))
    with pytest.raises(CorruptInput, match="not an image"):
        list(image_pieces(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", WHOLE, "x.eps"))


def test_decompression_bomb_is_refused() -> None:
    data = encoded(Image.new("1", (20000, 20000)))
    with pytest.raises(GemtoolError, match=r"bomb\.png: the image has more than [\d,]+ pixels"):
        list(image_pieces(data, WHOLE, "bomb.png"))


def test_photographs(real_media) -> None:
    for name in ("china.jpg", "flower.jpg"):
        pieces = list(image_pieces(real_media / name, MediaSettings(), name))
        assert len(pieces) == 6  # 640 x 427: u = 284
        assert all(20 < piece.payload.mean() < 235 for piece in pieces)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 50, 3), np.uint8)
    image = Image.fromarray(noise).resize((500, 900))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    tiles = list(image_pieces(data, MediaSettings(), "x"))
    assert len(tiles) == len(tile_boxes(*upright.size)) == 6
    for piece in tiles:
        expected = upright.crop(piece.meta["box"]).resize((224, 224), Image.Resampling.BICUBIC)
        assert np.array_equal(unpatchify(piece.payload), np.asarray(expected))
        assert piece.meta["size"] == list(upright.size)
