"""Contexts and prompts -> answers: what `gemtool decode` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from gemtool.errors import CorruptInput, GemtoolError, did_you_mean, not_json
from gemtool.infer.answer import Answer
from gemtool.infer.contexts import load_context
from gemtool.infer.engine import Engine
from gemtool.infer.grammar import KINDS, Grammar
from gemtool.infer.media import media_files
from gemtool.infer.sampling import Sampling
from gemtool.infer.sequence import Sequence
from gemtool.infer.text import Prompt
from gemtool.infer.together import answer_together
from gemtool.stream.context import context_documents, open_contexts


@dataclass(frozen=True)
class Request:
    """A prompt of a run: what it is called, and which document it is about."""

    id: str
    prompt: Prompt
    doc: str | None = None
    """None: it is asked of every context."""


_SAMPLING = tuple(field.name for field in fields(Sampling))
_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "prompt": (str,),
    "doc": (str,),
    "prefix": (str,),
    "max_tokens": (int,),
    "stop": (list, str),
    "seed": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "json_schema": (dict, str),
    "regex": (str,),
    "grammar": (str,),
    "media": (str, list),
}


def read_requests(
    file: BinaryIO,
    name: str,
    default: Prompt,
    *,
    has_context: bool = False,
    folder: Path | None = None,
) -> Iterator[Request]:
    """Requests of JSONL, each when its line is there.

    Fields: `prompt`, and if wanted `id` (else the number of the line's object from 0), `doc`, and
    what overrides `default`: `prefix`, `max_tokens`, `stop`, `seed`, `temperature`, `top_k`,
    `top_p`, `min_p`, one of `json_schema`, `regex` and `grammar`, and `media`, files whose names are
    relative to `folder`.

    Raises:
        GemtoolError: a file of media does not exist.
        CorruptInput: a line is not JSON, lacks the prompt, asks nothing, or has an unknown or
            mistyped field, or a grammar that is none.
    """
    index = 0
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            request = _request(json.loads(line), index, default, folder or Path())
            if asks_nothing(request.prompt, has_context):
                raise ValueError("'prompt' is empty; expected a question")
        except (json.JSONDecodeError, UnicodeDecodeError) as problem:
            raise CorruptInput(
                f"{name}: line {number}: {not_json(problem)}; "
                'expected an object as {"prompt": "..."}'
            ) from None
        except (ValueError, RecursionError, GemtoolError) as problem:
            raise CorruptInput(f"{name}: line {number}: {problem}") from None
        yield _with_files(request, f"{name}: line {number}")
        index += 1


def _with_files(request: Request, where: str) -> Request:
    """With the files of its media, which have to be there."""
    try:
        media = media_files(request.prompt.media)
    except GemtoolError as problem:
        raise GemtoolError(f"{where}: {problem}") from None
    return replace(request, prompt=replace(request.prompt, media=media))


def asks_nothing(prompt: Prompt, has_context: bool) -> bool:
    """Whether a prompt is empty; a raw one may be where there is a document to continue."""
    return not (has_context or prompt.text or prompt.prefix) if prompt.raw else not prompt.text


def _request(row: Any, index: int, default: Prompt, folder: Path) -> Request:
    if not isinstance(row, dict):
        raise ValueError('not a JSON object; expected one as {"prompt": "..."}')
    for key, value in row.items():
        if key not in _FIELDS:
            raise ValueError(f"unknown field {key!r}{did_you_mean(key, _FIELDS)}")
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            kinds = " or ".join(kind.__name__ for kind in _FIELDS[key])
            raise ValueError(f"{key!r} is {value!r}; expected {kinds}")
    if "prompt" not in row:
        raise ValueError("no field 'prompt'; expected one with the question")
    changes: dict[str, Any] = {k: row[k] for k in ("prefix", "max_tokens", "seed") if k in row}
    if changes.get("max_tokens", 1) < 1:
        raise ValueError("'max_tokens' must be at least 1")
    if changes.get("seed", 0) < 0:
        raise ValueError("'seed' must not be negative")
    if "stop" in row:
        changes["stop"] = _strings(row, "stop")
    if "media" in row:
        changes["media"] = tuple(str(folder / path) for path in _strings(row, "media"))
    grammars = [kind for kind in KINDS if kind in row]
    if len(grammars) > 1:
        raise ValueError(f"{' and '.join(map(repr, grammars))} exclude each other")
    for kind in grammars:
        changes["grammar"] = Grammar.parse(kind, row[kind])
    changes["sampling"] = replace(default.sampling, **{k: row[k] for k in _SAMPLING if k in row})
    prompt = replace(default, text=row["prompt"], index=index, **changes)
    identity = str(row.get("id", index))
    identity.encode()  # half of a surrogate pair could not be written again
    return Request(identity, prompt, row.get("doc"))


def _strings(row: dict[str, Any], key: str) -> tuple[str, ...]:
    found = [row[key]] if isinstance(row[key], str) else row[key]
    if not all(isinstance(text, str) for text in found):
        raise ValueError(f"{key!r} must be a string or a list of strings")
    return tuple(found)


def answers(
    engine: Engine,
    cache: str | None,
    requests: Iterable[Request],
    on_text: Callable[[str], None] | None = None,
) -> Iterator[tuple[Request, str | None, Answer]]:
    """Answers requests, with the document that each answer is about.

    Without a cache, prompts are answered alone. Else the contexts are loaded one after the other
    (one in memory at a time), and each answers, in order, the requests that are for it: those of a list
    several at a time, others each as soon as it is there.

    Args:
        engine: the model.
        cache: a file of contexts, or "-" for stdin; None for none.
        requests: read once, as needed. Those of a list are known before the first answer.
        on_text: gets the text of answers while they are generated.

    Raises:
        GemtoolError: a request names a document that no context is of: at once where requests and
            contexts are known, else at the end.
    """
    if isinstance(requests, list):
        known = frozenset[str]() if cache is None else context_documents(cache)
        for request in requests:
            if known is not None:
                _require_document(request, known)
    if cache is None:
        for request, answer in _answered(engine, None, requests, on_text):
            yield request, None, answer
        return
    coming, seen = iter(requests), list[Request]()
    found = set[str]()
    with open_contexts(cache) as contexts:
        for reader in contexts:
            doc = reader.header.doc
            found.add(doc)
            sequence = load_context(engine, reader).sequence
            asked: Iterable[Request] = (
                requests if isinstance(requests, list) else _all(seen, coming)
            )
            for request, answer in _answered(engine, sequence, asked, on_text, doc):
                yield request, doc, answer
    for request in requests if isinstance(requests, list) else seen:
        _require_document(request, found)


def _answered(
    engine: Engine,
    context: Sequence | None,
    requests: Iterable[Request],
    on_text: Callable[[str], None] | None,
    doc: str | None = None,
) -> Iterator[tuple[Request, Answer]]:
    """The requests that are for the document of a context, answered: those of a list together."""
    if isinstance(requests, list):
        chosen = [request for request in requests if request.doc in (None, doc)]
        prompts = [request.prompt for request in chosen]
        yield from zip(chosen, answer_together(engine, context, prompts, on_text), strict=True)
        return
    for request in requests:
        if doc is None:
            _require_document(request, frozenset())
        if request.doc in (None, doc):
            yield request, engine.answer(context, request.prompt, on_text)


def _require_document(request: Request, known: Collection[str]) -> None:
    if request.doc is None or request.doc in known:
        return
    if not known:
        raise GemtoolError(
            f"prompt {request.id!r}: names document {request.doc!r}, but there is no --cache that "
            "could hold it"
        )
    raise GemtoolError(
        f"prompt {request.id!r}: no context of document {request.doc!r}"
        f"{did_you_mean(request.doc, known)}; there are {', '.join(map(repr, sorted(known)))}"
    )


def _all(seen: list[Request], coming: Iterator[Request]) -> Iterator[Request]:
    """Requests that were read before, then those that are still to come, which are kept."""
    yield from list(seen)
    for request in coming:
        seen.append(request)
        yield request


def to_row(request: Request, doc: str | None, answer: Answer) -> dict[str, Any]:
    """An answer as a JSON object."""
    row: dict[str, Any] = {"id": request.id}
    if doc is not None:
        row["doc"] = doc
    row |= {
        "text": answer.text,
        "tokens": answer.tokens,
        "finish": answer.finish,
        "usage": {
            "prompt": answer.prompt,
            "cached": answer.cached,
            "generated": len(answer.tokens),
            "seconds": round(answer.seconds, 6),
        },
    }
    if request.prompt.draft:
        row["usage"] |= {"drafted": answer.drafted, "accepted": answer.accepted}
    if request.prompt.logprobs:
        row["logprobs"] = answer.logprobs
    return row
