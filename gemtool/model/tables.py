"""Frozen dataclasses from TOML tables, checked key by key and type by type."""

from __future__ import annotations

import dataclasses
from typing import Any

from gemtool.errors import GemtoolError, did_you_mean


class ConfigError(GemtoolError):
    """An architecture that does not make sense, or a key that is not known (exit 1)."""


_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}
_INTS = "tuple[int, ...]"


def build(cls: type[Any], table: dict[str, Any], where: str) -> Any:
    """A dataclass from a table.

    Raises:
        ConfigError: an unknown or a missing key, or a value of a wrong type; `where` names the table.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table, not {table!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)}")
        wanted = _SCALARS.get(str(fields[key].type))
        # bool is an int in Python, but `heads = true` is a mistake.
        if wanted and (
            not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)
        ):
            raise ConfigError(f"{where}: {key} must be {fields[key].type}, not {value!r}")
        if fields[key].type == _INTS and not (
            isinstance(value, (list, tuple)) and all(type(entry) is int for entry in value)
        ):
            raise ConfigError(f"{where}: {key} must be a list of int, not {value!r}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in table
    ]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    # TOML writes 10000 where a float is meant; one spelling, so that equal configs compare equal.
    # Lists become tuples, which are hashable.
    spell = {"float": float, _INTS: tuple}
    values = {k: spell.get(str(fields[k].type), lambda v: v)(v) for k, v in table.items()}
    return cls(**values)


def without_none(value: Any) -> Any:
    """A nest of dicts without the keys that are None, which TOML cannot write."""
    if not isinstance(value, dict):
        return value
    return {key: without_none(entry) for key, entry in value.items() if entry is not None}


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def choice(where: str, table: Any, key: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless a field has one of the allowed values."""
    value = getattr(table, key)
    require(value in allowed, f"{where}: {key} must be one of {', '.join(allowed)}, not {value!r}")


def positive(where: str, table: Any, *keys: str) -> None:
    """Raises ConfigError unless these fields are above 0."""
    for key in keys:
        value = getattr(table, key)
        require(value > 0, f"{where}: {key} must be positive, not {value}")


def not_negative(where: str, table: Any, *keys: str) -> None:
    """Raises ConfigError unless these fields are 0 or more."""
    for key in keys:
        value = getattr(table, key)
        require(value >= 0, f"{where}: {key} must not be negative, not {value}")
