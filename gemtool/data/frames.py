"""Media of spans as files for a person: pictures and spectrograms, to see what a model sees."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemtool.data.image import unpatchify
from gemtool.data.pixels import is_picture
from gemtool.data.settings import FRAMES_PER_AUDIO_TOKEN, MELS
from gemtool.errors import GemtoolError, UsageError, reason
from gemtool.signals import removed_on_signal
from gemtool.stream.files import sync_folder
from gemtool.stream.spans import Span

LIST = "frames.jsonl"
"""File of the folder that says where each of the others comes from; by it, a folder is ours."""

LONGEST = 60
"""Spans of sound, of up to a second each, in one spectrogram."""

BAND_HEIGHT = 3
"""Pixels of a mel band in a spectrogram; a frame of 10 ms is one wide."""

# Log-mel is (log10(power) + 4) / 4, so -1.5 is silence and 1.5 as loud as sound is.
_DARKEST, _BRIGHTEST = -1.5, 1.5


def write_frames(spans: Iterable[Span], folder: Path, *, force: bool = False) -> int:
    """Writes the pictures and the sound of spans; returns how many files of these there are.

    A picture is a PNG. Sound that goes on without a gap, up to a minute, is a spectrogram as PNG
    (time to the right, 100 pixels a second; low tones at the bottom) and the log-mel as .npy,
    float16 [frames, 80].
    Each document has a folder, numbered as they come; of packed spans, each segment has one.
    The folder appears when it is whole.

    Raises:
        UsageError: the folder holds something and `force` is false, or something else.
        GemtoolError: it cannot be written.
    """
    _require_free(folder, force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}")
        count = 0
        with removed_on_signal(lambda: shutil.rmtree(temporary, ignore_errors=True)):
            try:
                temporary.mkdir()
                with (temporary / LIST).open("w", encoding="utf-8") as rows:
                    for row in _write_all(spans, temporary):
                        rows.write(json.dumps(row, ensure_ascii=False) + "\n")
                        count += 1
                _require_free(folder, force)
                _replace(folder, temporary)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except OSError as problem:
        raise GemtoolError(f"{folder}: cannot be written: {reason(problem)}") from None
    return count


def _require_free(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder}: is not a folder; --frames writes one")
    names = {entry.name for entry in folder.iterdir()}
    if names and LIST not in names:
        raise UsageError(f"{folder}: holds other files; name a new or an empty folder")
    if names and not force:
        raise UsageError(f"{folder}: holds frames already; add -f to replace them")


def _replace(folder: Path, temporary: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    sync_folder(folder.parent)


def _write_all(spans: Iterable[Span], root: Path) -> Iterator[dict[str, Any]]:
    """Writes each picture and each run of sound; gives a row of the list for each."""
    place, number = "", 0
    run: list[Span] = []
    doc, last = None, -1
    for span in spans:
        begins = span.doc != doc or span.span <= last or span.span == 0 == span.start
        if span.seq is not None:
            here = f"{span.seq:06}-{span.segment or 0:03}-{_plain(span.doc)}"
            begins = here != place
        elif begins:
            number += 1
            here = f"{number:05}-{_plain(span.doc)}"
        else:
            here = place
        doc, last = span.doc, span.span
        if run and (begins or (span.kind == "audio" and not _continues(run, span))):
            yield _write_sound(run, root, place)
            run = []
        place = here
        if span.payload is None:
            continue
        if span.kind == "audio" and span.payload.shape[1:] == (FRAMES_PER_AUDIO_TOKEN, MELS):
            run.append(span)
        elif is_picture(span.payload):
            yield _write_picture(span, root, place)
    if run:
        yield _write_sound(run, root, place)


def _continues(run: list[Span], span: Span) -> bool:
    """Whether a span goes on where the sound of a run ends."""
    end = run[-1].time
    return len(run) < LONGEST and bool(end and span.time and end[1] == span.time[0])


def _write_picture(span: Span, root: Path, place: str) -> dict[str, Any]:
    from PIL import Image

    assert span.payload is not None
    name = f"{place}/{_name(span)}.png"
    with _new_file(root / name) as file:
        Image.fromarray(unpatchify(span.payload)).save(file, "png")
    return _row(span, name)


def _write_sound(run: list[Span], root: Path, place: str) -> dict[str, Any]:
    from PIL import Image

    mel = np.concatenate(
        [span.payload.reshape(-1, MELS) for span in run if span.payload is not None]
    )
    name = f"{place}/{_name(run[0])}"
    with _new_file(root / f"{name}.npy") as file:
        np.save(file, mel)
    level = (mel.astype(np.float32) - _DARKEST) / (_BRIGHTEST - _DARKEST)
    grey = np.nan_to_num(np.clip(level, 0, 1) * 255).astype(np.uint8)
    bands = np.repeat(grey.T[::-1], BAND_HEIGHT, axis=0)
    with _new_file(root / f"{name}.png") as file:
        Image.fromarray(bands).save(file, "png")
    row = _row(run[0], f"{name}.png")
    if run[0].time is not None and run[-1].time is not None:
        row["time"] = {"start": run[0].time[0], "end": run[-1].time[1]}
    return {**row, "spans": len(run), "log_mel": f"{name}.npy"}


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Any]:
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        yield file


def _name(span: Span) -> str:
    """`000012-video-0h00m03.500s`: span, kind, time where it has one."""
    name = f"{span.span:06}-{span.kind}"
    if span.time is not None:
        minutes, microseconds = divmod(span.time[0], 60_000_000)
        hours, minutes = divmod(minutes, 60)
        name += f"-{hours}h{minutes:02}m{microseconds / 1e6:06.3f}s"
    return name


def _plain(doc: str) -> str:
    """The end of a document's id as one name of a file, without a place or a command in it."""
    return re.sub(r"[^\w.-]+", "_", doc)[-80:].lstrip(".-") or "_"


def _row(span: Span, file: str) -> dict[str, Any]:
    row: dict[str, Any] = {"file": file, "doc": span.doc, "span": span.span, "kind": span.kind}
    if span.time is not None:
        row["time"] = {"start": span.time[0], "end": span.time[1]}
    if span.seq is not None:
        row.update(seq=span.seq, offset=span.offset, segment=span.segment)
    if span.meta is not None:
        row["meta"] = span.meta
    return row
