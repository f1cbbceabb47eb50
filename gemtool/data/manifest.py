"""The names of the files of a shard folder, and its manifests: one, or one of each part.

A manifest is JSON with a checksum of its own: `crc32`, of the other members as compact JSON with
sorted keys. Files that are to replace those of a complete folder are *staged* under other names
until the last of them, the new manifest, is there.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemtool.errors import CorruptInput, GemtoolError, reason
from gemtool.stream.files import LOCK

FORMAT = "gemtool shards"
VERSION = 2


@dataclass(frozen=True, order=True)
class Names:
    """How one writer's files are called: those of the `index`-th of `of`, or of the only one."""

    index: int = 0
    of: int = 0

    @property
    def _stem(self) -> str:
        return f"-{self.index:05}-of-{self.of:05}" if self.of else ""

    @property
    def manifest(self) -> str:
        return f"manifest{self._stem}.json"

    @property
    def lock(self) -> str:
        return f"{LOCK}{self._stem}"

    def file(self, number: int, file_format: str = "arrow") -> str:
        return f"part{self._stem}-{number:05}.{file_format}"


def staged_name(name: str) -> str:
    """What a file is called until it may replace the one of that name."""
    return f".{name}.staged"


_NAMES = {
    kind: re.compile(pattern.replace("@", r"(?:-(?P<index>\d{5,})-of-(?P<of>\d{5,}))?"))
    for kind, pattern in {
        "manifest": r"manifest@\.json",
        "file": r"part@-\d{5,}\.(?:arrow|array_record)",
        "staged": r"\.(?:manifest|part)@(?:\.json|-\d{5,}\.(?:arrow|array_record))\.staged",
        "temporary": r"\.{1,2}(?:manifest|part)@(?:\.json|-\d{5,}\.(?:arrow|array_record))\..*",
        "lock": re.escape(LOCK) + "@",
    }.items()
}


def whose(name: str) -> tuple[str, Names] | None:
    """What a file of a shard folder is, and whose.

    That is "manifest", "file", "staged", "temporary" (left by a kill) or "lock"; None if the folder
    is not the place for it.
    """
    for kind, pattern in _NAMES.items():
        if match := pattern.fullmatch(name):
            return kind, Names(int(match["index"] or 0), int(match["of"] or 0))
    return None


class OtherManifest(CorruptInput):
    """A manifest, but not of shards."""


MANIFEST = Names().manifest
_SHARED = ("version", "length", "chunk", "vocab", "settings", "file_format")


def is_shard_folder(folder: Path) -> bool:
    """Whether a folder has shards, finished or not."""
    found = [whose(entry.name) for entry in folder.iterdir()]
    return any(kind != "lock" for kind, _ in filter(None, found))


def _manifests(folder: Path) -> list[Names]:
    found = [whose(entry.name) for entry in folder.iterdir()]
    return sorted(names for kind, names in filter(None, found) if kind == "manifest")


def read_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a folder: the one, or those of all its parts as one.

    Raises:
        GemtoolError: not a shard folder, not complete, of a newer version, or of parts that do
            not belong together.
        CorruptInput: a manifest is damaged.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise GemtoolError(f"{folder}: {what}; expected one of `gemtool shard`")
    names = _manifests(folder)
    if not names:
        raise GemtoolError(
            f"{folder}: has no {MANIFEST}: not a shard folder, or `gemtool shard` did not finish it"
        )
    of = names[-1].of
    if any(one.of != of for one in names):
        divisions = " and ".join(
            sorted({f"{one.of} parts" if one.of else "no parts" for one in names})
        )
        raise GemtoolError(f"{folder}: holds shards of {divisions}; they do not belong together")
    if not of:
        return read_manifest(folder, names[0])
    missing = sorted({*range(1, of + 1)} - {one.index for one in names})
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise GemtoolError(
            f"{folder}: not complete: of its {of} parts, {len(missing)} have not finished ({shown}); "
            f"run `gemtool shard --part {missing[0]}/{of}`"
        )
    return _merged(folder, names, [read_manifest(folder, one) for one in names])


def _merged(folder: Path, names: list[Names], parts: list[dict[str, Any]]) -> dict[str, Any]:
    first = parts[0]
    try:
        for one, part in zip(names, parts, strict=True):
            for key in _SHARED:
                if part.get(key) != first.get(key):
                    raise GemtoolError(
                        f"{folder / one.manifest}: its {key.replace('_', ' ')} is {part.get(key)}, "
                        f"that of the parts before it {first.get(key)}; all parts must be made alike"
                    )
        kinds = {kind: sum(part["tokens"][kind] for part in parts) for kind in first["tokens"]}
        return {
            **{key: value for key, value in first.items() if key not in ("part", "crc32")},
            "parts": len(parts),
            "sequences": sum(part["sequences"] for part in parts),
            "tokens": kinds,
            "files": [entry for part in parts for entry in part["files"]],
        }
    except (KeyError, TypeError, AttributeError) as problem:
        raise CorruptInput(f"{folder}: a malformed manifest ({problem!r})") from None


def read_manifest(folder: Path, names: Names, *, staged: bool = False) -> dict[str, Any]:
    """The manifest of one writer, or the one that is to replace it; raises as `read_folder`."""
    file = folder / (staged_name(names.manifest) if staged else names.manifest)
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise CorruptInput(f"{file}: not JSON ({problem})") from None
    except OSError as problem:
        raise GemtoolError(f"{file}: cannot be read: {reason(problem)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise OtherManifest(
            f"{file}: not the manifest of a shard folder; make one with `gemtool shard`"
        )
    if "crc32" in manifest and manifest["crc32"] != manifest_crc32(manifest):
        raise CorruptInput(
            f"{file}: damaged: it does not match its own checksum; copy it again, or run "
            "`gemtool shard -f` again"
        )
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise GemtoolError(
            f"{file}: shard version {version}; this gemtool reads up to {VERSION}, "
            "please upgrade it"
        )
    try:
        if version > 1 and "crc32" not in manifest:
            raise CorruptInput(f"{file}: damaged: it has no checksum of its own")
        file_format = manifest.get("file_format", "arrow")
        for number, entry in enumerate(manifest["files"]):
            if entry["name"] != names.file(number, file_format):
                raise CorruptInput(
                    f"{file}: file {number} is {entry['name']!r}, "
                    f"expected {names.file(number, file_format)!r}"
                )
    except (KeyError, TypeError) as problem:
        raise CorruptInput(f"{file}: malformed ({problem!r})") from None
    return manifest


def manifest_crc32(manifest: Mapping[str, Any]) -> int:
    """The checksum of a manifest, from all members but `crc32`."""
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written, with its checksum."""
    whole = {**manifest, "crc32": manifest_crc32(manifest)}
    return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode()
