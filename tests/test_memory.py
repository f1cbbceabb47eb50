"""Three hours of video through a pipe, in the memory of a small machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import command_environment
from tests.test_fuzz_media import Watch
from tests.test_video import ffmpeg

HOURS = 3
LARGEST = 300_000_000
"""Bytes resident, of the tool and its worker together, at any moment."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("container", ["matroska", "mpegts"])
def test_three_hours_through_a_pipe(container: str, tmp_path: Path) -> None:
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=size=1280x720:rate=5", "-f", "lavfi", "-i", "anoisesrc=a=0.1",
        "-t", 60, "-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-c:a", "aac",
        tmp_path / "minute.mkv",
    )  # fmt: skip
    again = str(60 * HOURS - 1)
    source = subprocess.Popen(
        [shutil.which("ffmpeg") or "ffmpeg", "-v", "quiet", "-stream_loop", again, "-i",
         str(tmp_path / "minute.mkv"), "-c", "copy", "-f", container, "-"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    tool = subprocess.Popen(
        [sys.executable, "-m", "gemtool", "tokenize", "-o", "/dev/null"],
        stdin=source.stdout,
        env=command_environment(),
        cwd=tmp_path,
    )
    assert source.stdout is not None
    source.stdout.close()
    watch = Watch(tool.pid)
    code, peak = tool.wait(), watch.close()
    assert (code, source.wait()) == (0, 0)
    print(f"{container}: peak {peak / 1e6:.0f} MB")
    assert 50_000_000 < peak < LARGEST
