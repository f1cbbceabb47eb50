"""Choose the implementation of a kernel.

The choice is made while tracing. The argument `impl` is obeyed or fails; otherwise the implementations
of the platform that the program is for are tried in order, and one that raises `NotImplementedError`
passes the call to the next. A name given to `force`, else by the environment variable
`GEMTOOL_KERNELS`, is obeyed or fails by every operation that has an implementation of that name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from gemtool.errors import UsageError

ENVIRONMENT = "GEMTOOL_KERNELS"

# Platform -> names to try, best first. An operation may lack some.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("xla", "reference"),
    "gpu": ("gpu", "xla", "reference"),
    "tpu": ("pallas_tpu", "xla", "reference"),
}

NAMES = tuple(dict.fromkeys(name for names in PREFERENCE.values() for name in reversed(names)))
"""Of all implementations, those that every operation has first."""

_forced: str | None = None

# Part of the key of jit's caches: a function traced for one platform is traced anew for another.
_target = jax.make_user_context(default_value=None)


@contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it, kernels are those of "cpu", "gpu" or "tpu", whatever this process runs on: for
    programs that are compiled here to run elsewhere."""
    if platform not in PREFERENCE:
        raise ValueError(f"no platform {platform!r}; expected one of {', '.join(PREFERENCE)}")
    with _target(platform):
        yield


def force(name: str | None) -> None:
    """Has what is traced from now on computed by the implementations of this name, whatever the
    environment says; None: leaves it to that and the platform. An option of the verbs."""
    global _forced
    _forced = name


def target_platform() -> str:
    """What the program that is being traced is for: "cpu", "gpu" or "tpu"."""
    return _target.value or jax.default_backend()


def dispatch(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    impl: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call `implementations[name](*args, **kwargs)` for the chosen name.

    Raises:
        ValueError: `impl` names no implementation of this operation.
        UsageError: what is forced is no name, or does not support these arguments.
        NotImplementedError: no (chosen) implementation supports these arguments.
    """
    if impl is not None:
        if impl not in implementations:
            known = ", ".join(implementations)
            raise ValueError(f"{operation}: impl={impl!r}; expected one of {known}")
        return implementations[impl](*args, **kwargs)
    wanted = _forced or os.environ.get(ENVIRONMENT)
    if wanted:
        who = f"--kernels {wanted}" if _forced else f"{ENVIRONMENT}={wanted}"
        if wanted not in NAMES:
            raise UsageError(f"{who}: no such kernels; name one of {', '.join(NAMES)}, or none")
        if wanted in implementations:
            try:
                return implementations[wanted](*args, **kwargs)
            except NotImplementedError as reason:
                raise UsageError(f"{who}: {operation}: {reason}") from None
    reasons = []
    platform = target_platform()
    for name in PREFERENCE.get(platform, ("xla", "reference")):
        if name in implementations:
            try:
                return implementations[name](*args, **kwargs)
            except NotImplementedError as reason:
                reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{operation} on {platform}: " + "; ".join(reasons))


def deferred(module: str, name: str) -> Callable[..., Any]:
    """The function of that name, its module imported when it is called: Pallas takes a while."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call
