"""Pages of context files: what of a context is attended to where it lies, and verified when it was."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gemtool.model.config import ModelConfig
from gemtool.model.pages import PAGE, UNIT, Pages, paged_layers
from gemtool.stream.context import Part
from gemtool.stream.mapped import MappedSource, map_together

AREAS = (2 << 30, 8 << 30)
"""Bytes of address space for the files of a context: of few sizes, as each is compiled, and no more, as
rows of memory are counted in int32."""
ROOM = 1024
"""Pages that tables have room for, this many or four, sixteen times as many: for the same reason."""


def can_map(config: ModelConfig, mesh: Mesh | None) -> bool:
    """Whether this model attends to keys and values in files: it has layers that do it by blocks, and
    computes in the memory that files are mapped to. Elsewhere they are loaded."""
    here = mesh is None and jax.default_backend() == "cpu" and sys.platform != "win32"
    return here and bool(paged_layers(config))


def mappable(config: ModelConfig, blocks: Sequence[Part]) -> int:
    """How many of the blocks of a context, from the first on, can be pages: those that are whole, of
    mapped files, and not read yet. The others are to be loaded.

    Raises:
        KeyError, ValueError: one lacks keys or values, or they are not the model's.
    """
    files: dict[MappedSource, int] = {}
    for count, part in enumerate(blocks):
        lazy = part.origin
        if lazy is None or (part.start, part.stop) != (count * PAGE, count * PAGE + PAGE):
            return count
        for at in paged_layers(config):
            kind = config.layer_kinds[at]
            for path in _paths(at):
                array = part.arrays[path]
                if array.shape != (1, PAGE, kind.kv_heads, kind.head_dim):
                    raise ValueError(f"{path} at token {part.start:,} is {list(array.shape)}")
                if array.dtype != config.kv_dtype:
                    raise ValueError(f"{path} at token {part.start:,} is {array.dtype}")
                if path not in lazy.left or lazy.source.offset(array) % UNIT:
                    return count
        files[lazy.source] = lazy.source.size
        if sum(files.values()) > AREAS[-1] - len(files) * mmap.PAGESIZE:
            return count
    return len(blocks)


class MappedPages:
    """The whole blocks that a context begins with.

    Attributes:
        length: positions in them.
        room: pages that tables have room for.
        tables: `gemtool.model.pages.Pages` of each layer that is paged.
    """

    def __init__(
        self, config: ModelConfig, parts: Sequence[Part], before: MappedPages | None = None
    ) -> None:
        """Takes blocks that are `mappable`, at least one; the first ones may be those of `before`, and
        what was verified of them is not again."""
        self._parts, self._verified = parts, dict[int, set[int]]()
        sources = dict.fromkeys(part.origin.source for part in parts if part.origin)
        self._stamps = {source: source.stamp() for source in sources}
        memory, begins = map_together([source.descriptor for source in sources], AREAS)
        places = dict(zip(sources, begins, strict=True))
        self.length = len(parts) * PAGE
        self.room = ROOM
        while self.room < len(parts):
            self.room *= 4
        dtype = np.dtype(config.kv_dtype)
        # Of what is aligned as a mapping is, JAX makes no copy on a CPU.
        rows = jax.device_put(memory.view(dtype).reshape(-1, UNIT // dtype.itemsize))
        self.tables: dict[int, Pages] = {}
        for at in sorted(paged_layers(config)):
            self._verified[at] = set() if before is None else before._verified[at]
            table = np.zeros((2, self.room), np.int32)
            for page, part in enumerate(parts):
                assert part.origin is not None
                source = part.origin.source
                for which, path in enumerate(_paths(at)):
                    byte = places[source] + source.offset(part.arrays[path])
                    table[which, page] = byte // UNIT
            self.tables[at] = Pages(
                rows, jax.device_put(table), jax.device_put(np.int32(self.length))
            )

    def verify(self, touched: Mapping[int, np.ndarray]) -> None:
        """Compares pages with their checksums, each the first time, and all again when somebody wrote
        to a file; `touched` has the numbers, by layer, of all that what is computed came of.

        Raises:
            CorruptInput: one is damaged, so that nothing that came of it may be used.
        """
        stamps = {source: source.stamp() for source in self._stamps}
        if stamps != self._stamps:
            self._stamps = stamps
            for verified in self._verified.values():
                verified.clear()
        for at, pages in touched.items():
            for page in set(pages.tolist()) - self._verified[at]:
                for path in _paths(at):
                    self._parts[page].verify(path)
                self._verified[at].add(page)

    def block(self, start: int) -> dict[str, np.ndarray]:
        """Keys and values of a page, that of position `start`, by the paths of a context file; raises
        as `verify`."""
        page = start // PAGE
        self.verify({at: np.array([page]) for at in self.tables})
        part = self._parts[page]
        return {path: part.arrays[path] for at in self.tables for path in _paths(at)}


def _paths(layer: int) -> tuple[str, str]:
    return f"layers/{layer}/k", f"layers/{layer}/v"
