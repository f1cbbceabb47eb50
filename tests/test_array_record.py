"""Shards for other trainers: ArrayRecord files, read back with the library of that format."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from gemtool.data.shards import ShardFolder
from gemtool.errors import GemtoolError
from gemtool.stream.spans import spans_of
from tests.conftest import Command, command_environment
from tests.test_shard import LENGTH, assert_same, packed_spans, stream
from tests.test_sharding import ARGUMENTS, content, times

array_record = pytest.importorskip("array_record.python.array_record_module")
EXPORT = (*ARGUMENTS, "--to", "array_record")


def records(file: Path) -> list[bytes]:
    reader = array_record.ArrayRecordReader(str(file))
    try:
        assert "group_size:1," in reader.writer_options_string()
        return [reader.read([index])[0] for index in range(reader.num_records())]
    finally:
        reader.close()


def test_each_sequence_is_a_record(gemtool: Command, tmp_path: Path) -> None:
    spans = packed_spans(30)
    gemtool("shard", "-o", "s", *EXPORT, input=stream(spans))
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_bytes())
    assert manifest["file_format"] == "array_record"
    assert manifest["chunk"] == LENGTH
    found = []
    for entry in manifest["files"]:
        file = tmp_path / "s" / entry["name"]
        assert file.stat().st_size == entry["bytes"]
        here = records(file)
        assert len(here) == entry["sequences"]
        for record in here:
            (batch,) = pa.ipc.open_stream(io.BytesIO(record))
            sequence = list(spans_of(batch))
            assert {span.seq for span in sequence} == {len(found)}
            found.append(sequence)
    assert len(manifest["files"]) > 1
    assert len(found) == manifest["sequences"] == spans[-1].seq + 1
    assert_same([span for sequence in found for span in sequence], spans)
    with pytest.raises(GemtoolError, match="an export for other trainers"):
        ShardFolder(tmp_path / "s")
    refused = gemtool("train", "--data", "s", "--steps", "1", "--ckpt", "run", check=False)
    assert refused.returncode == 1
    assert b"--to arrow" in refused.stderr


def test_a_re_run_is_found_finished_or_continued(gemtool: Command, tmp_path: Path) -> None:
    packed = stream(packed_spans(30))
    gemtool("shard", "-o", "s", *EXPORT, input=packed)
    before, held = times(tmp_path / "s"), content(tmp_path / "s")
    assert b"complete already" in gemtool("shard", "-o", "s", *EXPORT, input=packed).stderr
    assert times(tmp_path / "s") == before
    other = stream(packed_spans(30, 1))
    refused = gemtool("shard", "-o", "s", *EXPORT, input=other, check=False)
    assert refused.returncode == 2
    assert b"holds other sequences" in refused.stderr
    refused = gemtool("shard", "-o", "s", *ARGUMENTS, "--chunk", LENGTH, input=packed, check=False)
    assert refused.returncode == 2
    assert b"another file format (array_record, not arrow)" in refused.stderr
    assert content(tmp_path / "s") == held

    (tmp_path / "s" / "manifest.json").unlink()
    (tmp_path / "s" / "part-00001.array_record").write_bytes(b"half")
    (tmp_path / "s" / ".part-00002.array_record.0123abcd").write_bytes(b"half")
    again = gemtool("shard", "-o", "s", *EXPORT, input=packed)
    assert b"of them kept from before" in again.stderr
    assert content(tmp_path / "s") == held
    assert times(tmp_path / "s")["part-00000.array_record"] == before["part-00000.array_record"]

    gemtool("shard", "-o", "s", *ARGUMENTS, "-f", input=packed)  # and back to files of our own
    gemtool("shard", "-o", "arrow", *ARGUMENTS, input=packed)
    assert content(tmp_path / "s") == content(tmp_path / "arrow")


def test_a_failure_leaves_no_half_file(gemtool: Command, tmp_path: Path) -> None:
    done = gemtool("shard", "-o", "s", *EXPORT, input=stream(packed_spans(30))[:-20], check=False)
    assert done.returncode == 3
    for file in (tmp_path / "s").iterdir():
        assert file.name.startswith("part-")
        assert records(file)


def test_without_the_library_the_message_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['array_record'] = None\nfrom gemtool.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "shard", "-o", "s", "--to", "array_record"],
        input=stream(packed_spans(3)),
        cwd=tmp_path,
        env=command_environment(),
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"pip install 'gemtool[array_record]'" in done.stderr
    assert not (tmp_path / "s").exists()


def test_chunks_belong_to_our_own_files(gemtool: Command) -> None:
    done = gemtool("shard", "-o", "s", *EXPORT, "--chunk", "10", input=b"", check=False)
    assert done.returncode == 2
    assert b"--chunk is for --to arrow" in done.stderr


def test_exporting_needs_no_jax(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(stream(packed_spans(3)))
    script = (
        "import sys; sys.argv[1:] = 'shard packed -o s --to array_record'.split()\n"
        "from gemtool.cli import main\n"
        "try: main()\n"
        "finally: assert 'array_record' in sys.modules and 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=command_environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
