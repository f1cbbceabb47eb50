"""How this process runs JAX: strict numerics, and compiled programs kept for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from gemtool import log
from gemtool.errors import reason

CACHE_BYTES = 1 << 30
"""Of compiled programs that are kept, at most: those of some thousand shapes of a small model."""

VECTOR_WIDTH = "--xla_cpu_prefer_vector_width"


def setup_jax(keep_programs: bool = True, kernels: str | None = None) -> None:
    """Configures JAX; every verb that computes calls this before its first JAX operation.

    Types never widen silently and ranks never broadcast silently. Compiled programs are kept in
    `cache_folder()`, so that a verb called a second time starts at once, and of what exceeds
    `CACHE_BYTES` at its start the least recently used are removed; those for devices that are not
    here cannot be read back, hence `keep_programs`. Platforms are left to JAX_PLATFORMS, and kernels
    to `kernels.dispatch` unless these are named.
    """
    _keep_pages()
    _use_whole_vectors()
    import jax

    from gemtool.kernels import dispatch

    dispatch.force(kernels)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # JAX and orbax tell through logging what is of no use to the user of a command. What fails in
    # orbax is raised too, and then said once.
    logging.getLogger("jax").setLevel(logging.ERROR)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _tell_of_programs()
    folder = cache_folder() if keep_programs else None
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as problem:
        # Nobody asked for the default place; who named another one wants to know.
        tell = log.warning if os.environ.get("GEMTOOL_CACHE") else log.debug
        tell(f"{folder}: compiled programs are not kept: {reason(problem)}")
        return
    _drop_oldest(folder, CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _drop_oldest(folder: Path, most: int) -> None:
    """Where files of a folder take more than `most` bytes, removes those that were not used for
    longest, until they take three quarters of that.

    JAX can bound its cache too, but writes a second file a program and from then on keeps nothing if
    one of them is missing, as after a kill -9.
    """
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process removes it
            state = path.stat()
            # Some systems never tell when a file was read: then the oldest go.
            found.append((max(state.st_atime, state.st_mtime), state.st_size, path))
    left = sum(size for _, size, _ in found)
    if left <= most:
        return
    for _, size, path in sorted(found):
        if left <= most * 3 // 4:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        left -= size


@functools.cache  # once a process
def _keep_pages() -> None:
    """Has glibc's malloc keep what is freed for the next request, in one heap.

    XLA on a CPU takes memory for a program's temporaries and frees it at every run. By default such
    sizes are mapped and unmapped each time, and a training step spends a sixth of its time on the
    page faults. Other C libraries are left as they are.
    """
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # M_* of malloc.h
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
            set_option(option, value)


def _use_whole_vectors() -> None:
    """Has XLA compile loops for vectors of 512 bits where a CPU has them, unless XLA_FLAGS say else.

    By default it takes half of each, for CPUs that slowed down when vectors were whole. On one that
    does not (Zen 5), attention takes a tenth less time. XLA ends a process that gives it an option it
    does not know; jaxlib 0.10 and 0.11 know this one.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if VECTOR_WIDTH not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {VECTOR_WIDTH}=512".lstrip()


@functools.cache  # once a process
def _tell_of_programs() -> None:
    """Has the debug log say which programs were compiled, and which the cache had."""
    import jax

    this = threading.local()

    def on_event(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            this.hit = True

    def on_duration(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            how = "from the cache" if getattr(this, "hit", False) else "compiled"
            this.hit = False
            log.debug(f"{about.get('fun_name', 'a program')}: {how} in {duration_secs:.3f} s")

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)


def memory_size() -> int | None:
    """Bytes of memory of the device that computes, all of it; None where that is not told."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def cache_folder() -> Path | None:
    """Where compiled programs are kept, or None.

    `$GEMTOOL_CACHE/xla` if that is set ("off": nowhere), else `$XDG_CACHE_HOME/gemtool/xla`, else
    `~/.cache/gemtool/xla`. It may be deleted at any time.
    """
    own = os.environ.get("GEMTOOL_CACHE")
    if own == "off":
        return None
    if own:
        return Path(own) / "xla"
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "gemtool" / "xla"
    except RuntimeError:  # no home directory, as under some daemons
        return None
