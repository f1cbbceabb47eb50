"""Documents written as JSON, one a line: text, parts with media, or the messages of a chat."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gemtool.control import END_TURN, MODEL, SYSTEM, USER
from gemtool.errors import did_you_mean, not_json

CONTENT_KEYS = ("text", "parts", "messages")
RECORD_KEYS = (*CONTENT_KEYS, "id", "meta")
MEDIA_KEYS = ("image", "audio", "video")
ROLES = {"user": USER, "model": MODEL, "assistant": MODEL, "system": SYSTEM}


@dataclass(frozen=True, slots=True)
class Item:
    """One thing of a document, in its order.

    Attributes:
        kind: `text`, `image`, `audio`, `video` or `control`.
        value: the text, the path of the media file, or the id of the control token.
        weight: of its tokens as targets; None is the default of their kind.
    """

    kind: str
    value: str | int
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A document as it was written; the media are still paths."""

    items: tuple[Item, ...]
    id: str | None = None
    meta: dict[str, Any] | None = None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def parse_record(line: bytes) -> Record:
    """Reads one line, in UTF-8.

    Raises:
        ValueError: not JSON, or not a document; the message names the key.
    """
    try:
        value = _DECODER.decode(line.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
    except ValueError as problem:
        raise ValueError(not_json(problem)) from None
    _check_object(value, RECORD_KEYS, "the document")
    if not any(key in value for key in CONTENT_KEYS):
        raise ValueError("expected one of 'text', 'parts' and 'messages', found none of them")
    if "text" in value and "parts" in value:
        raise ValueError("'text' and 'parts' exclude each other; put the text among the parts")
    items: list[Item] = []
    if "text" in value:
        items.append(Item("text", _text(value["text"], "'text'")))
    if "parts" in value:
        items.extend(_parts(value["parts"], "'parts'", None))
    if "messages" in value:  # about what came before them, if anything did
        items.extend(_messages(value["messages"]))
    return Record(tuple(items), _id(value.get("id")), _meta(value.get("meta")))


def looks_like_record(head: bytes) -> bool:
    """Whether a text beginning with `head` is JSONL of documents: its first line is a document.

    Where the first line is longer than `head`, its first key decides.
    """
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"{"):
        return False
    line, newline, _ = head.partition(b"\n")
    try:
        parse_record(line)
        return True
    except ValueError:
        opening = line.replace(b" ", b"")[:20]
        keys = tuple(b'{"%b":' % key.encode() for key in RECORD_KEYS)
        return not newline and len(line) > 4096 and opening.startswith(keys)


def _check_object(value: Any, known: Iterable[str], what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    for key in value:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known are {', '.join(known)}"
            raise ValueError(f"{what} has an unknown key {key!r}{hint}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a string")
    return value


def _id(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("'id' is not a string")
    return _encodable(str(value), "'id'")


def _meta(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("'meta' is not an object")
    _encodable(json.dumps(value, ensure_ascii=False), "'meta'")
    return value


def _encodable(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair") from None
    return text


def _loss(value: dict[str, Any], default: float | None) -> float | None:
    loss = value.get("loss", default)
    if loss is None:
        return None
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not math.isfinite(loss):
        raise ValueError(f"'loss' is {loss!r}; expected a number")
    return float(loss)


def _parts(value: Any, what: str, text_weight: float | None) -> Iterator[Item]:
    """Items of a list of parts; `text_weight` is that of text without a weight of its own."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list")
    kinds = ("text", *MEDIA_KEYS)
    for index, part in enumerate(value):
        where = f"part {index + 1}"
        _check_object(part, (*kinds, "loss"), where)
        found = [kind for kind in kinds if kind in part]
        if len(found) != 1:
            given = " and ".join(found) or "none of them"
            raise ValueError(f"{where}: expected one of {', '.join(kinds)}; found {given}")
        kind = found[0]
        content = _text(part[kind], f"{kind!r} of {where}")
        if kind != "text":
            _encodable(content, f"{kind!r} of {where}")
            if not content or "\0" in content:
                raise ValueError(f"{kind!r} of {where} is no path of a file")
        yield Item(kind, content, _loss(part, text_weight if kind == "text" else None))


def _messages(value: Any) -> Iterator[Item]:
    """Items of a chat. What the model says is learned; all else only where `loss` asks for it."""
    if not isinstance(value, list):
        raise ValueError("'messages' is not a list")
    for index, message in enumerate(value):
        where = f"message {index + 1}"
        _check_object(message, ("role", "content", "loss"), where)
        role = message.get("role")
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise ValueError(f"{where}: role is {role!r}; expected one of {known}")
        token = ROLES[role]
        weight = _loss(message, 1.0 if token == MODEL else 0.0)
        content = message.get("content")
        if isinstance(content, str):
            content = [{"text": content}]
        yield Item("control", token, 0.0)
        yield from _parts(content, f"'content' of {where}", weight)
        yield Item("control", END_TURN, weight)
