"""Media encoders: raw features of soft positions -> vectors in the place of token embeddings.

An image tile or a video frame is one group of 256 (or 64) patches; audio comes in groups of at most
a second. A group sees nothing but itself, so a video of any length streams through in constant
memory; relating groups to one another is the decoder's work.

    values -> stem + position -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] for each layer
           -> norm -> projection to the decoder's width

The stem of a frame is one projection of each patch, as in ViT (arXiv 2010.11929), here with some
pixels around it: a letter on the border of two patches then lies whole in the window of one. That of
a second of audio is convolutions over time (Whisper, arXiv 2212.04356), the last of which makes
tokens of log-mel frames.

Attention runs both ways, with QK-norm (arXiv 2302.05442). It is told places twice. Learned embeddings
of row and column, or of the moment, are added once; they also reach the decoder, which has to know
where in a frame it looks. Rotary ones turn queries and keys, half of a head's dimensions by row and
half by column (arXiv 2403.13298): "the patch to the left" is then the same offset everywhere, which
learned embeddings would have to discover for each place by itself.

Axes: N groups, P soft tokens, F raw features, W width of the encoder, H heads of K dimensions, D
model. It computes in the dtype of its parameters; norms, rotations and softmax in float32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemtool.model.config import EncoderConfig
from gemtool.model.layers import rms_norm
from gemtool.model.params import Tree
from gemtool.model.rope import frequencies, rotate

CHUNK = 2048
"""Soft tokens that are encoded at a time: enough rows for a matrix unit, 8 frames or 80 seconds."""
ROPE_THETA = 100.0
"""Base of the frequencies, for groups of at most 32 places: low, as places are few."""


def encode(
    p: Tree, encoder: EncoderConfig, values: jax.Array, rows: jax.Array, eps: float
) -> jax.Array:
    """Soft tokens of media groups.

    Groups are encoded a chunk at a time. A chunk without any real row is skipped, so that a batch
    that has room for more media than it holds costs no more than what it holds; the backward pass
    computes each chunk anew, so that memory does not grow with the number of groups.

    Args:
        p: parameters of this encoder, of one floating dtype.
        encoder: its configuration.
        values: raw features [N, P, F], uint8 or floating; P = `encoder.tokens`.
        rows: int32 [N], how many of the P rows are real. What the others hold has no influence.
        eps: of the norms.

    Returns:
        [N, P, D] in the dtype of `p`; rows that are not real mean nothing.
    """
    count, tokens, _ = values.shape
    chunks = -(-count * tokens // CHUNK)
    size = -(-count // chunks)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, chunks * size - count), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(chunks, size, *x.shape[1:])

    # Stacked for a scan: one layer is compiled, however many there are.
    layers = [p["layers"][str(i)] for i in range(encoder.depth)]
    p = {**p, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if layers else {}}

    # The loop is barrier enough against merging the second computation with the first.
    present = jax.checkpoint(partial(_encode, encoder, eps), prevent_cse=False)

    def absent(p: Tree, values: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.zeros((size, tokens, p["out"].shape[1]), p["out"].dtype)

    def chunk(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        values, rows = item
        return jax.lax.cond(jnp.any(rows > 0), present, absent, p, values, rows)

    soft = jax.lax.map(chunk, (cut(values), cut(rows)))
    return soft.reshape(chunks * size, tokens, -1)[:count]


def _encode(
    encoder: EncoderConfig, eps: float, p: Tree, values: jax.Array, rows: jax.Array
) -> jax.Array:
    present = _present(rows, encoder.tokens)
    values = jnp.where(present[..., None], values, jnp.zeros((), values.dtype))
    stem = _visual_stem if encoder.kind == "visual" else _audio_stem
    x = stem(p, encoder, values, rows)
    angle = jnp.asarray(_angles(encoder))

    def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
        h = rms_norm(x, p["attention_norm"], eps)
        x = x + _attention(p["attention"], h, present, angle, eps)
        h = rms_norm(x, p["mlp_norm"], eps)
        h = jax.nn.gelu(jnp.einsum("npw,wf->npf", h, p["mlp"]["in"]))
        return x + jnp.einsum("npf,fw->npw", h, p["mlp"]["out"]), None

    # Scores of many layers are gigabytes, of one chunk even: each layer is computed anew as well.
    if encoder.depth:
        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, p["layers"])
    return jnp.einsum("npw,wd->npd", rms_norm(x, p["norm"], eps), p["out"])


def _present(rows: jax.Array, places: int) -> jax.Array:
    """Which places of each group are real: int32 [N] -> bool [N, places]."""
    return jnp.arange(places, dtype=jnp.int32)[None, :] < rows[:, None]


def _attention(
    p: Tree, h: jax.Array, present: jax.Array, angle: jax.Array, eps: float
) -> jax.Array:
    """Of every row of a group to every real one: normed rows [N, P, W] -> [N, P, W].

    All scores at once: groups are short, and of a chunk they are few.
    """
    q, k, v = (jnp.einsum("npw,whk->nphk", h, p[name]) for name in "qkv")

    def place(x: jax.Array, scale: jax.Array) -> jax.Array:
        return rotate(rms_norm(x, scale, eps), angle[None])

    q, k = place(q, p["q_norm"]), place(k, p["k_norm"])
    scores = jnp.einsum("nphk,nqhk->nhpq", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    scores = jnp.where(present[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("nphk,hkw->npw", jnp.einsum("nhpq,nqhk->nphk", shares, v), p["o"])


def _angles(encoder: EncoderConfig) -> np.ndarray:
    """Radians by which each pair of a head turns at each place, float32 [P, K / 2]."""
    place = np.arange(encoder.tokens)
    side = encoder.side
    axes = [place // side, place % side] if encoder.kind == "visual" else [place]
    frequency, _ = frequencies(encoder.head_dim // len(axes), ROPE_THETA)
    return np.concatenate([np.outer(at, frequency) for at in axes], axis=1).astype(np.float32)


# --- frames ---------------------------------------------------------------------------------------


def _visual_stem(p: Tree, encoder: EncoderConfig, values: jax.Array, rows: jax.Array) -> jax.Array:
    """Patches [N, P, F] -> [N, P, W]: windows, projected, and where they are."""
    count, tokens, _ = values.shape
    pixels = windows(encoder, values.reshape(count, tokens, -1, 3))
    present = _present(rows, tokens)[..., None, None]
    inside = windows(encoder, jnp.broadcast_to(present, (count, tokens, encoder.patch**2, 1)))
    x = _normalise(pixels.astype(jnp.float32), inside.astype(jnp.float32), encoder.normalise)
    x = x.reshape(count, tokens, -1).astype(p["patch"].dtype)
    x = jnp.einsum("npf,fw->npw", x, p["patch"]) + p["patch_bias"][None, None, :]
    place = p["row"][:, None, :] + p["column"][None, :, :]
    return x + place.reshape(1, tokens, -1)


def windows(encoder: EncoderConfig, pixels: jax.Array) -> jax.Array:
    """Each patch with `overlap` pixels of its neighbours on every side; zeros beyond the frame.

    [N, P, patch * patch, C] -> [N, P, window * window, C], where window = patch + 2 * overlap.
    """
    if encoder.overlap == 0:
        return pixels
    count, tokens, _, channels = pixels.shape
    side, patch = encoder.side, encoder.patch
    x = pixels.reshape(count, side, side, patch, patch, channels)
    for grid, axis in ((1, 3), (2, 4)):
        x = _with_neighbours(x, grid, axis, encoder.overlap)
    return x.reshape(count, tokens, -1, channels)


def _with_neighbours(x: jax.Array, grid: int, axis: int, overlap: int) -> jax.Array:
    """Extends the pixels along `axis` by those of the patches before and after along `grid`."""
    side, patch = x.shape[grid], x.shape[axis]
    edge = [(0, 0)] * x.ndim
    edge[grid] = (1, 1)
    padded = jnp.pad(x, edge)

    def part(offset: int, start: int, stop: int) -> jax.Array:
        own = jax.lax.slice_in_dim(padded, offset, offset + side, axis=grid)
        return jax.lax.slice_in_dim(own, start, stop, axis=axis)

    return jnp.concatenate([part(0, patch - overlap, patch), x, part(2, 0, overlap)], axis=axis)


def _normalise(x: jax.Array, inside: jax.Array, how: str) -> jax.Array:
    """Features float32 [N, P, A, C] on a common scale; 0, the middle of it, outside.

    "row" goes by the mean and deviation of the window, not of the patch within: one scale for all of
    it, or an edge beside a flat patch would be divided by next to nothing. What lies `inside` the
    group (1 or 0, [N, P, A, 1]) is counted alone.
    """
    if how == "none":
        return x * inside
    if how == "pixel":
        return (x / 127.5 - 1.0) * inside
    axes, channels = (2, 3), x.shape[3]
    total = jnp.maximum(jnp.sum(inside, axes, keepdims=True) * channels, 1.0)
    x = (x - jnp.sum(x * inside, axes, keepdims=True) / total) * inside
    deviation = jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True) / total)
    # A flat patch or digital silence should stay flat, not become amplified rounding.
    return x / jnp.maximum(deviation, 1e-2)


# --- seconds --------------------------------------------------------------------------------------


def _audio_stem(p: Tree, encoder: EncoderConfig, values: jax.Array, rows: jax.Array) -> jax.Array:
    """Log-mel frames [N, P, F] -> [N, P, W]: convolutions over time within the group, and the moment.

    Beyond the group's real frames are zeros, before each convolution anew.
    """
    count, tokens, _ = values.shape
    x = values.astype(jnp.float32).reshape(count, tokens, -1, encoder.mels)
    x = _normalise(
        x, _present(rows, tokens)[..., None, None].astype(jnp.float32), encoder.normalise
    )
    x = x.reshape(count, -1, encoder.mels)
    for i, stride in enumerate(encoder.strides):
        kernel, bias = p["stem"][str(i)]["kernel"], p["stem"][str(i)]["bias"]
        x = jax.nn.gelu(_convolve(x.astype(kernel.dtype), kernel, stride) + bias[None, None, :])
        present = _present(rows * (x.shape[1] // tokens), x.shape[1])
        x = jnp.where(present[..., None], x, jnp.zeros((), x.dtype))
    return x + p["position"][None]


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Over time: [N, T, I] and a kernel [frames, I, O] -> [N, T / stride, O].

    One matrix product of shifted copies: in a loop, XLA on the CPU takes twenty times as long for the
    gradient of a convolution.
    """
    frames, length = kernel.shape[0], x.shape[1]
    beyond = (frames - stride) // 2
    x = jnp.pad(x, ((0, 0), (beyond, beyond), (0, 0)))
    last = length - stride + 1
    shifted = [jax.lax.slice_in_dim(x, j, j + last, stride, axis=1) for j in range(frames)]
    columns = jnp.concatenate(shifted, axis=-1)
    return jnp.einsum("ntk,kc->ntc", columns, kernel.reshape(-1, kernel.shape[2]))
