"""Media that were not made here go through every verb: a film, speech, photographs, ten scripts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from gemtool.control import PLACEHOLDERS
from gemtool.data.vocab import Vocab
from gemtool.stream.spans import open_spans
from tests.conftest import ROOT, Command, command_environment

TINY = ROOT / "tests" / "tiny.toml"


def test_every_verb_on_real_media(gemtool: Command, real_media: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    shutil.copytree(real_media, media)
    gemtool("tokenize", "media", "-o", "all.spans", cwd=tmp_path)
    stats = json.loads(gemtool("view", "--stats", "all.spans").stdout)
    assert all(stats["tokens"][kind] > 0 for kind in ("text", "image", "video", "audio", "control"))
    counted = [
        json.loads(line) for line in gemtool("tokenize", "--count", "media").stdout.splitlines()
    ]
    assert counted[-1]["tokens"] == stats["tokens"]["total"]

    # Texts in ten scripts come back byte for byte.
    vocab, texts = Vocab.load(), {path.name: path.read_bytes() for path in media.glob("text-*.txt")}
    assert len(texts) == 10
    found: dict[str, bytes] = {}
    with open_spans(str(tmp_path / "all.spans")) as spans:
        for span in spans:
            name = Path(span.doc).name
            if span.kind == "text" and name in texts:
                found[name] = found.get(name, b"") + vocab.decode_bytes(span.tokens)
            if span.payload is not None:
                soft = sum(int(token) in PLACEHOLDERS for token in span.tokens)
                assert soft == len(span.payload)
    assert found == texts

    gemtool("pack", "--length", "1024", "all.spans", "-o", "packed.spans")
    gemtool("shard", "packed.spans", "-o", "shards")
    packed = json.loads(gemtool("view", "--stats", "shards").stdout)
    assert packed["tokens"] == stats["tokens"]
    metrics = gemtool(
        "train", "--data", "shards", "--model", TINY, "--steps", 2, "--batch", 2, "--ckpt", "run"
    ).stdout
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [1, 2]
    assert b"run: ok" in gemtool("view", "--verify", "run").stdout

    speech = min(path.name for path in media.glob("speech-*.wav"))
    film = gemtool("tokenize", "--for", "run", "media/film.mp4", f"media/{speech}").stdout
    gemtool("prefill", "--ckpt", "run", "-o", "film.ctx", input=film)
    verified = gemtool("view", "--verify", "film.ctx").stdout.decode().splitlines()
    assert len(verified) == 2
    assert "film.mp4: ok" in verified[0]
    rows = gemtool(
        *("decode", "--ckpt", "run", "--cache", "film.ctx", "--max-tokens", 4, "--prompt", "Who?")
    ).stdout.splitlines()
    answers = [json.loads(row) for row in rows]
    assert [Path(answer["doc"]).name for answer in answers] == ["film.mp4", speech]
    assert all(answer["usage"]["cached"] > 50 for answer in answers)
    probed = gemtool(
        *("probe", "needle", "--ckpt", "run", "--lengths", "200", "--depths", 1),
        *("--haystack", "media/text-de.txt"),
    ).stdout
    assert json.loads(probed)["score"] in (0.0, 1.0)


def test_the_pipeline_of_the_readme_through_pipes(real_media: Path, tmp_path: Path) -> None:
    """One shell line with real pipes gives the same bytes as files between the stages."""
    shutil.copy(real_media / "film.mp4", tmp_path)
    command = (
        "set -e; "
        "gemtool tokenize --no-pg film.mp4 -o a.spans; "
        "gemtool pack --no-pg --length 1024 a.spans -o a.packed; "
        "gemtool shard --no-pg a.packed -o a; "
        "gemtool tokenize --no-pg film.mp4 | gemtool pack --no-pg --length 1024 "
        "| gemtool shard --no-pg -o b; "
        "cmp a/part-00000.arrow b/part-00000.arrow; cmp a/manifest.json b/manifest.json"
    ).replace("gemtool", f"{sys.executable} -m gemtool")
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=command_environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
