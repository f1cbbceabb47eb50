"""A model on a device, ready to read contexts and to answer.

    engine = Engine(open_checkpoint("run"))
    context = engine.prefill(tokens)               # or the spans of a document
    engine.ask(context, "What is the number?")     # as often as wanted: the context stays as it is

Prefill and decode are the same compiled function at two tile shapes (`gemtool.infer.sequence`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemtool.checkpoint import Checkpoint
from gemtool.errors import GemtoolError
from gemtool.infer.answer import Answer, Answering
from gemtool.infer.draft import NgramDraft
from gemtool.infer.generate import Chooser, Step, chosen
from gemtool.infer.grammar import Constraint, Constraints
from gemtool.infer.logprobs import Entries
from gemtool.infer.mapped import MappedPages, can_map, mappable
from gemtool.infer.media import read_media
from gemtool.infer.pieces import Piece, Tile, pieces_of, tiles_of, tokens_of
from gemtool.infer.sampling import Sampling
from gemtool.infer.sequence import PROMPT_TILE, Sequence, capacity_for
from gemtool.infer.steps import abstract_sequence, encode
from gemtool.infer.text import Prompt
from gemtool.model import transformer
from gemtool.model.cache import full_layers, map_state, untouched
from gemtool.model.config import ModelConfig
from gemtool.model.execution import suitable
from gemtool.model.mesh import param_shardings
from gemtool.model.pages import paged_layers
from gemtool.model.params import in_dtype
from gemtool.stream.context import ContextHeader, Part
from gemtool.stream.spans import Span

CHUNKS = (512, 2048)
"""Positions that prefill runs at a time by default, least and most."""
EXPERT_ROWS = 128
"""That an expert wants of a chunk: shorter matmuls are slow."""


def default_chunk(config: ModelConfig) -> int:
    """Positions for prefill to run at a time: few stay in the processor's cache, and many give each
    expert enough rows."""
    least, most = CHUNKS
    rows = 0 if config.moe is None else EXPERT_ROWS * config.moe.experts // config.moe.top_k
    return min(max(least, 1 << (rows - 1).bit_length()), most)


class Engine:
    """A checkpoint's model on the default device, or spread over a mesh.

    Args:
        checkpoint: an open one.
        chunk: positions that prefill runs at a time, by default those of `default_chunk`; results do
            not depend on it.
        mesh: where it runs (`gemtool.model.mesh`), for a model that fits it; None: on one device.
            Contexts are the same wherever they are made.
        dtype: "float32" or "bfloat16", of activations and of weights where they are multiplied; by
            default what suits the device.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        chunk: int | None = None,
        mesh: Mesh | None = None,
        dtype: str | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        self.vocab = checkpoint.vocab
        self.constraints = Constraints(self.vocab)
        self.entries = Entries(self.vocab)
        self.chunk = chunk or default_chunk(self.config)
        self.reach = transformer.tail_reach(self.config)
        self.mesh = mesh
        places = None if mesh is None else param_shardings(self.config, mesh)
        dtype = dtype or suitable(jax.default_backend()).dtype
        self.params = jax.device_put(in_dtype(checkpoint.load_params(), dtype), places)

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which programs of this model run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def put(self, x: np.ndarray | np.generic) -> jax.Array:
        """An array on the device, or on all of the mesh."""
        where = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return jax.device_put(x, where)

    def tile_size(self, length: int) -> int:
        """Positions that a tile of `length` is padded to: of few sizes, as each is compiled, and
        not much more than it takes, whatever the chunk.
        """
        return min(self.chunk, max(CHUNKS[0], 1 << (length - 1).bit_length()))

    def header(self, doc: str) -> ContextHeader:
        """What the header of a context of this model says, provenance aside."""
        layout = tuple(
            {
                "attention": kind.attention,
                "kv_heads": kind.kv_heads,
                "head_dim": kind.head_dim,
                "window": kind.window,
                "conv_tail": kind.conv_tail,
            }
            | ({} if kind.index is None else {"index": asdict(kind.index)})
            for kind in self.config.layer_kinds
        )
        vocab = {"fingerprint": self.vocab.fingerprint, "size": self.vocab.size}
        return ContextHeader(doc, self.checkpoint.fingerprint, vocab, layout, self.config.kv_dtype)

    def begin(
        self, expected: int = 0, reuse: Sequence | None = None, kept: int | None = None
    ) -> Sequence:
        """An empty sequence with room for `expected` positions; it grows as needed. It takes the
        buffers of `reuse`, if given, which cannot be used any more: what they hold nobody sees.
        Where it will let go of positions (`gemtool.infer.spill`), so many are `kept`."""

        def empty(shapes: Any) -> Any:
            # Of numpy: those of jax would be a program to compile for each shape.
            return jax.tree.map(lambda x: _put(np.zeros(x.shape, x.dtype), x), shapes)

        behind = None if kept is None else capacity_for(max(kept, 1))
        room = capacity_for(max(expected, 1))
        buffers, state = abstract_sequence(self.config, room, self.mesh, behind)
        if reuse is None:
            return Sequence(self, empty(buffers), empty(state), 0)
        buffers, reuse._buffers = reuse._taken(), None
        sequence = Sequence(self, buffers, empty(state), 0)
        sequence.reserve(expected)
        return sequence

    def restore(
        self,
        length: int,
        blocks: Iterable[Part],
        state: Mapping[str, np.ndarray],
        logits: np.ndarray | None,
        most: int | None = None,
    ) -> Sequence:
        """A sequence from the blocks of a context, and what `Sequence.state` gave; `logits` are None
        where it is to go on before it is asked.

        Blocks that can be pages of the sequence (`gemtool.infer.mapped`), at `most` so many, stay where
        they are.

        Raises:
            CorruptInput: a block that is loaded is damaged.
            KeyError, ValueError: something is missing or of another shape.
        """
        blocks = list(blocks)
        count = mappable(self.config, blocks[:most]) if can_map(self.config, self.mesh) else 0
        pages = MappedPages(self.config, blocks[:count]) if count else None
        first = 0 if pages is None else pages.length
        room = capacity_for(length + 2 * PROMPT_TILE)
        behind = capacity_for(length + 2 * PROMPT_TILE - first)
        empty, like = abstract_sequence(self.config, room, self.mesh, behind)
        paged = paged_layers(self.config)

        def loaded(at: int, name: str, like: Any) -> jax.Array:
            skipped = count if at in paged and name != "landmarks" else 0
            return _filled(blocks[skipped:], f"layers/{at}/{name}", like)

        buffers = tuple(
            {name: loaded(at, name, shape) for name, shape in shapes.items()}
            for at, shapes in zip(full_layers(self.config), empty, strict=True)
        )
        given = {"length": np.int32(length), **state}
        cache = map_state(self.config, like, lambda path, x: _put(np.array(given[path]), x))
        if pages is not None:
            cache = untouched(self.config, cache, pages.room)
        sequence = Sequence(self, buffers, cache, length, pages)
        sequence._logits = None if logits is None else np.array(logits)
        return sequence

    def bytes_for(self, length: int, kept: int | None = None) -> int:
        """Memory of the parameters and of the buffers of a sequence, on each device; `kept` as in
        `begin`."""
        room = capacity_for(self._room(length))
        behind = None if kept is None else capacity_for(kept)
        buffers, _ = abstract_sequence(self.config, room, self.mesh, behind)
        return _bytes_here((self.params, buffers))

    def _room(self, length: int) -> int:
        """Positions that prefilling so many touches: the last tile may be padded."""
        return length + self.tile_size(min(length, self.chunk))

    def row_bytes(self) -> int:
        """Size of a position's keys and values, and of its share of landmarks."""
        kinds = [self.config.layer_kinds[i] for i in full_layers(self.config)]
        values = sum(2 * kind.kv_heads * kind.head_dim for kind in kinds)
        found = [kind.index for kind in kinds if kind.index is not None]
        landmarks = sum(4 * index.landmarks * index.dim // index.block for index in found)
        return values * np.dtype(self.config.kv_dtype).itemsize + landmarks

    def state_bytes(self) -> int:
        """Size of a state in a context file."""
        return _bytes_here(abstract_sequence(self.config, 0)[1])

    def encode(self, kind: str, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Soft tokens float32 [N, P, D] of raw features [N, P, F], of which the first `rows`
        int32 [N] of each group are real."""
        with self.on_mesh():
            soft = encode(self.params, self.config, kind, values, rows)
        return np.asarray(soft, np.float32)

    def spans(self, prompt: Prompt) -> list[Span]:
        """A prompt with the media that it shows; raises as `read_media`."""
        return prompt.spans(self.vocab, read_media(prompt.media, self.checkpoint))

    def pieces(self, spans: Iterable[Span]) -> list[Piece]:
        """All pieces of spans, media encoded; raises as `pieces_of`."""
        return list(pieces_of(spans, self.config, self.encode))

    def tiles(
        self, pieces: Iterable[Piece], boundary: int | None = None, start: int = 0
    ) -> Iterator[Tile]:
        """The tiles in which `prefill` runs a document, or what continues it from `start`."""
        return tiles_of(pieces, self.chunk, reach=self.reach, boundary=boundary, start=start)

    def prefill(
        self,
        document: np.ndarray | Iterable[Span],
        on_tokens: Callable[[int], None] = lambda count: None,
        reuse: Sequence | None = None,
    ) -> Sequence:
        """Reads a document, token ids int32 [n] or spans, and keeps what continues it.

        `on_tokens` is called with the number of tokens of each tile; `reuse` as in `begin`.
        """
        if isinstance(document, np.ndarray):
            room = self._room(len(document))
            sequence, pieces = self.begin(room, reuse), iter([Piece(document)])
        else:
            sequence, pieces = self.begin(0, reuse), pieces_of(document, self.config, self.encode)
        read = [sequence.tokens]
        for tile in self.tiles(pieces):
            sequence.run(tile, self.tile_size(len(tile.piece)))
            read.append(tile.piece.tokens)
            on_tokens(len(tile.piece))
        sequence.tokens = np.concatenate(read)
        return sequence

    def generate(
        self,
        context: Sequence | None,
        prompt: np.ndarray | list[Piece],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        seed: tuple[int, int] = (0, 0),
        max_tokens: int = 256,
        constraint: Constraint | None = None,
        draft: NgramDraft | None = None,
    ) -> Iterator[Step]:
        """Chooses tokens after a context and a prompt, int32 [n] or pieces.

        Ends after END_TURN or EOD, which are given too, when `constraint` is finished, or after
        `max_tokens`. The context is as before when the iterator has ended or is closed.

        Args:
            context: None is an empty one.
            prompt: may be empty where the context is not.
            sampling: how.
            seed: what random draws depend on, besides the step: seed and index of the prompt.
            max_tokens: at least 1.
            constraint: which tokens may be chosen; it takes those that are.
            draft: guesses them, for speed: they are the same as without, but where two tokens have the
                same score to the last bits.

        Raises:
            GemtoolError: neither context nor prompt has a token, or the constraint allows none.
        """
        chooser = Chooser(sampling, seed, max_tokens, constraint)
        yield from self._chosen(context, prompt, chooser, draft)

    def _chosen(
        self,
        context: Sequence | None,
        prompt: np.ndarray | list[Piece],
        chooser: Chooser,
        draft: NgramDraft | None,
    ) -> Iterator[Step]:
        asked = prompt if isinstance(prompt, np.ndarray) else tokens_of(prompt)
        self.require_tokens(context, [asked])
        with (self.begin() if context is None else context).fork() as live:
            if len(asked):
                live.extend(prompt)
            yield from chosen(live, chooser, draft)

    def require_tokens(self, context: Sequence | None, prompts: Iterable[np.ndarray]) -> None:
        """Refuses prompts, int32 [n] each, to which nothing could be the answer.

        Raises:
            GemtoolError: neither the context nor one of them has a token.
        """
        if (context is None or not context.length) and not all(map(len, prompts)):
            raise GemtoolError("nothing to continue: neither the context nor the prompt has tokens")

    def answering(
        self,
        prompt: Prompt,
        length: int,
        cached: int,
        on_text: Callable[[str], None] | None = None,
        started: float | None = None,
    ) -> tuple[Answering, Chooser]:
        """What makes an answer to a prompt of so many tokens after `cached` others, and what chooses
        its tokens. `started`: when work on it began, if not now."""
        started = time.perf_counter() if started is None else started
        constraint = None if prompt.grammar is None else self.constraints.begin(prompt.grammar)
        chooser = Chooser(
            prompt.sampling, (prompt.seed, prompt.index), prompt.max_tokens, constraint
        )
        answering = Answering(
            self.vocab, self.entries, prompt, length, cached, constraint, on_text, started
        )
        return answering, chooser

    def answer(
        self,
        context: Sequence | None,
        prompt: Prompt,
        on_text: Callable[[str], None] | None = None,
        spans: list[Span] | None = None,
    ) -> Answer:
        """Answers a prompt; `on_text` gets the text piece by piece as it becomes certain. `spans` are
        those of the prompt, where they are known."""
        started = time.perf_counter()
        pieces = self.pieces(self.spans(prompt) if spans is None else spans)
        question, draft = tokens_of(pieces), None
        cached = 0 if context is None else context.length
        answering, chooser = self.answering(prompt, len(question), cached, on_text, started)
        if prompt.draft:
            before = np.empty(0, np.int32) if context is None else context.tokens
            draft = NgramDraft(np.concatenate([before, question]))
        steps = self._chosen(context, pieces, chooser, draft)
        with contextlib.closing(steps):  # type: ignore[type-var]
            for step in steps:
                if answering.take(step):
                    break
        return answering.end(draft)

    def ask(self, context: Sequence | np.ndarray, text: str, **options: Any) -> str:
        """The answer to a question about a context, or about tokens int32 [n] that become one.

        `options` are fields of `Prompt`: prefix, max_tokens, sampling, stop, grammar, draft.
        """
        if isinstance(context, np.ndarray):
            context = self.prefill(context)
        return self.answer(context, Prompt(text, **options)).text


def _bytes_here(tree: Any) -> int:
    """Memory that arrays take on each device."""

    def shape(x: Any) -> tuple[int, ...]:
        return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)

    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _put(x: np.ndarray, like: Any) -> jax.Array:
    """`x` where `like` is to be."""
    return jax.device_put(x, like.sharding)


def _filled(blocks: Iterable[Part], path: str, like: Any) -> jax.Array:
    """A buffer as `like` that begins with what blocks have at a path: keys or values [1, n, N, K], or
    landmarks [1, M, I, n]."""
    buffer = np.zeros(like.shape, like.dtype)
    axis, rows = 3, buffer
    if not path.endswith("/landmarks"):
        axis, rows = 1, buffer.reshape(1, -1, *buffer.shape[-2:])
    at = 0
    for block in blocks:
        block.verify(path)
        array = block.arrays[path]
        count = array.shape[axis]
        rows[(slice(None),) * axis + (slice(at, at + count),)] = array
        at += count
    return _put(buffer, like)
