"""A small file of every format that `tokenize` reads, made on the spot."""

from __future__ import annotations

import functools
import gzip
import io
import json

import av
import numpy as np
import pyarrow as pa
from PIL import Image

from tests.test_audio import chirp, encoded
from tests.test_video import film

TEXT = "".join(f"Line {i} of a small text, with a füßchen.\n" for i in range(200)).encode()
RECORDS = "".join(json.dumps({"text": f"Document {i}."}) + "\n" for i in range(20)).encode()

_SOUND = {  # container, codec, rate, layout
    "wav": ("wav", "pcm_s16le", 44_100, "stereo"),
    "flac": ("flac", "flac", 44_100, "stereo"),
    "ogg": ("ogg", "libvorbis", 44_100, "stereo"),
    "opus": ("ogg", "libopus", 48_000, "stereo"),
    "mp3": ("mp3", "libmp3lame", 44_100, "stereo"),
    "m4a": ("ipod", "aac", 44_100, "stereo"),
    "aac": ("adts", "aac", 44_100, "stereo"),
}
_FILMS = {  # container, codec, options of the container
    "mp4": ("mp4", "libx264", {"movflags": "faststart"}),
    "mov": ("mov", "mpeg4", {"movflags": "faststart"}),
    "mkv": ("matroska", "libx264", {}),
    "webm": ("webm", "libvpx-vp9", {}),
    "ts": ("mpegts", "libx264", {}),
    "avi": ("avi", "mpeg4", {}),
}
_PICTURES = ("png", "jpg", "webp", "gif", "tiff", "avif", "bmp", "jp2")
_COMPRESSED = ("txt.gz", "md.zst", "jsonl.gz", "jsonl.zst")
NAMES = (*_PICTURES, *_SOUND, *_FILMS, *_COMPRESSED, "txt", "jsonl")


def kind_of(name: str) -> str:
    """The kind of its spans."""
    if name in _PICTURES:
        return "image"
    return "audio" if name in _SOUND else "video" if name in _FILMS else "text"


@functools.cache
def sample(name: str) -> bytes:
    """A file of the format with this extension: a picture of 90 x 70 pixels, 2 s of sound or film.

    Raises:
        LookupError: this build of libav or Pillow cannot make it.
    """
    if name in _PICTURES:
        return picture(name)
    if name in _SOUND:
        container, codec, rate, layout = _SOUND[name]
        _require(codec)
        return encoded(chirp(2, rate), rate, container, codec, layout)
    if name in _FILMS:
        container, codec, options = _FILMS[name]
        _require(codec)
        fast = {"deadline": "realtime", "cpu-used": "8"} if name == "webm" else {}
        sound = None if name == "webm" else 2
        return film(
            container, codec, seconds=2, rate=10, sound=sound, options=fast,
            container_options=options,
        )  # fmt: skip
    content = RECORDS if "jsonl" in name else TEXT
    if name.endswith("gz"):
        return gzip.compress(content)
    if name.endswith("zst"):
        return pa.compress(content, "zstd", asbytes=True)
    return content


def picture(name: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    image = Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC)
    kind = {"jpg": "JPEG", "jp2": "JPEG2000"}.get(name, name.upper())
    Image.init()
    if kind not in Image.SAVE:
        raise LookupError(f"Pillow cannot write {kind}")
    image.save(file, kind)
    return file.getvalue()


def _require(codec: str) -> None:
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        raise LookupError(f"libav has no encoder {codec}") from None
