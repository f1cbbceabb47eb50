"""Prompts of JSONL: read line by line, every mistake named with its place."""

from __future__ import annotations

import io

import pytest

from gemtool.errors import CorruptInput
from gemtool.infer.decode import read_requests
from gemtool.infer.sampling import Sampling
from gemtool.infer.text import Prompt


def test_prompts_are_read_line_by_line() -> None:
    lines = (
        b'{"prompt": "a"}\n\n{"prompt": "b", "id": "x", "stop": "z", "top_k": 3}\n{"promt": 1}\n'
    )
    reader = read_requests(io.BytesIO(lines), "p.jsonl", Prompt("", sampling=Sampling(0.5)))
    first, second = next(reader), next(reader)
    assert (first.id, first.prompt.text, first.prompt.index) == ("0", "a", 0)
    assert (second.id, second.prompt.stop, second.prompt.index) == ("x", ("z",), 1)
    assert second.prompt.sampling == Sampling(0.5, top_k=3)
    with pytest.raises(CorruptInput, match="line 4: unknown field 'promt'; did you mean"):
        next(reader)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON: .*, at column 2; expected an object"),
        ('{"prompt": "a",}', "line 1: not JSON: .*, at column 16"),
        ('{"prompt": ""}', "line 1: 'prompt' is empty; expected a question"),
        ("[]", "not a JSON object"),
        ("{}", "no field 'prompt'"),
        ('{"prompt": 3}', "'prompt' is 3; expected str"),
        ('{"prompt": "a", "max_tokens": 0}', "at least 1"),
        ('{"prompt": "a", "max_tokens": true}', "expected int"),
        ('{"prompt": "a", "top_p": 2}', "top-p is 2; expected"),
        ('{"prompt": "a", "stop": [1]}', "'stop' must be"),
        ('{"prompt": "a", "seed": -1}', "not be negative"),
        ('{"prompt": "a", "id": "\\ud800"}', "surrogates"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_bad_prompts_are_named(line: str, message: str) -> None:
    with pytest.raises(CorruptInput, match=message):
        list(read_requests(io.BytesIO(line.encode()), "p.jsonl", Prompt("")))
