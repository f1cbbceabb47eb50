"""Speed of video and sound against the ffmpeg command: `python bench/media.py`.

`gemtool tokenize` against what ffmpeg takes to decode the same file and to scale a frame a second
to 224 x 224 (and, where there is sound, to resample it to 16 kHz mono), each through a real pipe,
each with one thread. Ours includes log-mel and the start of two processes; the files, made by
ffmpeg here, are long enough for that to be small.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from measure import Row, compare, report, shell

REPEATS = 3
LOOPS = 5
"""How often the 20 seconds of a film are repeated."""
SOUND = 1800
"""Seconds of a recording."""

_PICTURE = "testsrc2=s=1280x720:r=30:d=20,noise=alls=6:allf=t"
_H264 = "-c:v libx264 -preset veryfast -c:a aac"
FILMS = {
    "H.264, GOP 30": f"{_H264} -g 30",
    "H.264, GOP 250": f"{_H264} -g 250",
    "VP9": "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 3M -g 128 -c:a libopus",
}
RECORDINGS = {
    "wav": "-c:a pcm_s16le",
    "flac": "-c:a flac",
    "ogg": "-c:a libvorbis",
    "mp3": "-c:a libmp3lame",
    "opus": "-c:a libopus -ar 48000",
    "m4a": "-c:a aac",
}
_RESAMPLED = "-map 0:a:0 -ac 1 -ar 16000 -f f32le"


def ffmpeg(arguments: str, folder: Path) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *arguments.split()], check=True, cwd=folder)


def rows(folder: Path) -> Iterator[Row]:
    if shutil.which("ffmpeg") is None:
        sys.exit("bench/media.py needs the ffmpeg command")
    tone = "-f lavfi -i aevalsrc=sin(440*t)*0.3+random(0)*0.1:s=44100:c=stereo:d=20"
    for name, codec in FILMS.items():
        ffmpeg(f"-f lavfi -i {_PICTURE} {tone} -pix_fmt yuv420p {codec} once.mkv", folder)
        ffmpeg(f"-stream_loop {LOOPS - 1} -i once.mkv -c copy film.mkv", folder)
        for heard in (False, True):
            what = f"video, {name}, {'with' if heard else 'without'} sound, against ffmpeg"
            yield against(what, "film.mkv", folder, picture=True, sound=heard)
    ffmpeg(f"{tone} once.wav", folder)
    for extension, codec in RECORDINGS.items():
        file = f"sound.{extension}"
        ffmpeg(f"-stream_loop -1 -i once.wav -t {SOUND} {codec} {file}", folder)
        what = f"sound, {extension}, {SOUND / 60:.0f} minutes, against ffmpeg"
        yield against(what, file, folder, picture=False, sound=True)
        (folder / file).unlink()


def against(what: str, file: str, folder: Path, *, picture: bool, sound: bool) -> Row:
    """Compares both for what is wanted of a file; where both are, ffmpeg writes the sound away."""
    frames = "-map 0:v:0 -vf fps=1:round=up,scale=224:224:flags=area -pix_fmt rgb24 -f rawvideo -"
    outputs = [frames] * picture + [f"{_RESAMPLED} {'/dev/null' if picture else '-'}"] * sound
    theirs = f"ffmpeg -v error -nostdin -y -threads 1 -i {file} {' '.join(outputs)}"
    ours = f"gemtool tokenize -q {file}" + ("" if sound else " --no-audio")
    return compare(
        what,
        lambda: shell(f"{ours} | cat > /dev/null", folder),
        lambda: shell(f"{theirs} | cat > /dev/null", folder),
        repeats=REPEATS,
        warm_up=False,  # files that were just written, processes that start anew
    )


if __name__ == "__main__":
    report(rows)
