"""Every implementation of every kernel against its reference: one list of cases for all of them.

Tolerances are float32 ones and are never relaxed for an implementation: the same sums in another
order; where inputs are bfloat16, that of bfloat16 factors and results against the reference in
float32, for experts and gradients a share of the greatest value. The references themselves are held
against float64 loops written in numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from gemtool.kernels import attention, expert_mlp, experts, flash_attention
from gemtool.kernels.attention import chunk_segments, merge_attention, partial_attention
from gemtool.kernels.glu import Glu

FORWARD = {"rtol": 2e-5, "atol": 2e-5}
GRADIENT = {"rtol": 1e-4, "atol": 1e-4}
BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}

# Cases that an implementation refuses. It computes every other one: anything that it newly refuses,
# or no longer does, fails here.
UNSUPPORTED: dict[str, tuple[str, ...]] = {"pallas_tpu": ("float64",), "gpu": ("float64",)}


# What is for accelerators is interpreted here, which is slow to compile: these cases, each of which
# takes another path, run always, and all others among the slow tests.
INTERPRETED = {
    "gpu": (
        *("all-to-all-window", "segments-window", "chunked-step", "everything", "float16-buffer"),
        *("empty-buffer", "decode-window"),
        *("one-token", "all-to-one", "absent", "nobody", "bias-clamped_swiglu"),
    )
}


def fast(operation: Any) -> list[str]:
    return [name for name in operation.IMPLEMENTATIONS if name != "reference"]


def runs(operation: Any, cases: Iterable[str]) -> list[Any]:
    """Every implementation but the reference with every case."""
    return [
        pytest.param(impl, case, marks=pytest.mark.slow)
        if case not in INTERPRETED.get(impl, cases)
        else (impl, case)
        for impl in fast(operation)
        for case in cases
    ]


def normal(seed: int, *shape: int, dtype: Any = np.float32, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def check_gradient(got: np.ndarray, want: np.ndarray, key: str, in_bfloat16: bool) -> None:
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if got.dtype == np.float16 else GRADIENT
    if in_bfloat16 or narrow(got):
        tolerance = of_the_greatest(want)
    np.testing.assert_allclose(got.astype(np.float32), want, **tolerance, err_msg=key)


def of_the_greatest(want: np.ndarray) -> dict[str, float]:
    return {"rtol": 0, "atol": BFLOAT16["rtol"] * float(np.abs(want).max())}


def narrow(x: Any) -> bool:
    return bool(x.dtype == jnp.bfloat16)


def attempt(impl: str, case: str, call: Callable[[], Any]) -> Any:
    """What the call returns, or a skip with the reason if this is a case to be refused."""
    if case not in UNSUPPORTED.get(impl, ()):
        return call()
    with pytest.raises(NotImplementedError) as refused:
        call()
    pytest.skip(f"{impl}: {refused.value}")


def compiled(function: Any, impl: str) -> Any:
    """Jitted; references and what is interpreted here run once, so that optimising them would cost
    more than it saves."""
    once = impl in ("reference", "pallas_tpu", "gpu")
    level = {"xla_backend_optimization_level": 0} if once else None
    return jax.jit(function, compiler_options=level)


# Attention ---------------------------------------------------------------------------------------

# name: (B, T, S, H, KV, D), options. Gradients are compared too, but for FORWARD_ONLY.
# Where they are not, another case has the same backward pass.
FORWARD_ONLY = ("decode", "chunk-", "empty-", "window-1", "window-of", "window-above-all", "scale")
FORWARD_ONLY += ("chunked-above", "chunked-decode", "soft-cap-decode")
ATTENTION: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one-by-one": ((1, 1, 1, 1, 1, 4), {}),
    "causal": ((2, 129, 129, 2, 2, 8), {}),
    "several-blocks": ((1, 300, 300, 2, 1, 16), {}),
    "grouped": ((2, 70, 70, 6, 2, 8), {}),
    "all-to-all": ((1, 40, 150, 2, 2, 8), {"causal": False}),
    "all-to-all-window": ((1, 150, 150, 2, 2, 8), {"causal": False, "window": 20}),
    "window-1": ((1, 140, 140, 1, 1, 8), {"window": 1}),
    "window-below-block": ((2, 270, 270, 2, 1, 8), {"window": 17}),
    "window-of-a-block": ((1, 270, 270, 1, 1, 8), {"window": 128}),
    "window-above-block": ((1, 400, 400, 2, 2, 8), {"window": 200}),
    "window-above-all": ((1, 50, 50, 1, 1, 8), {"window": 1000}),
    "segments": ((2, 280, 280, 2, 1, 8), {"segments": True}),
    "segments-window": ((1, 280, 280, 2, 2, 8), {"segments": True, "window": 40}),
    "chunked": ((2, 300, 300, 4, 2, 8), {"chunk": 70}),
    "chunked-by-one": ((1, 40, 40, 2, 2, 8), {"chunk": 1}),
    "chunked-above-all": ((1, 50, 50, 1, 1, 8), {"chunk": 1000}),
    "chunked-segments": ((2, 280, 280, 2, 1, 8), {"chunk": 32, "segments": True, "sink": True}),
    "chunked-decode": ((2, 1, 600, 4, 2, 8), {"chunk": 64, "q_start": 580, "soft_cap": 2.0}),
    "chunked-step": ((1, 70, 400, 2, 1, 8), {"chunk": 90, "q_start": 330, "sink": True}),
    "soft-cap-window": ((1, 200, 200, 4, 2, 8), {"soft_cap": 1.5, "window": 50, "sink": True}),
    "soft-cap-segments": ((2, 150, 150, 2, 1, 8), {"soft_cap": 4.0, "segments": True}),
    "soft-cap-decode": ((1, 1, 700, 2, 1, 8), {"soft_cap": 0.5, "q_start": 650, "kv_length": 651}),
    "decode": ((3, 1, 1300, 4, 2, 8), {"q_start": 1100, "kv_length": 1101}),
    "decode-long": ((2, 1, 4500, 4, 2, 8), {"q_start": 4300, "kv_length": 4301}),
    "decode-first": ((1, 1, 700, 2, 2, 8), {"q_start": 0, "kv_length": 1}),
    "decode-window": ((1, 1, 700, 2, 1, 8), {"q_start": 650, "kv_length": 651, "window": 64}),
    "decode-short-buffer": ((1, 1, 129, 2, 2, 8), {"q_start": 128, "kv_length": 129}),
    "chunk": ((1, 64, 500, 4, 1, 8), {"q_start": 129, "kv_length": 193}),
    "chunk-to-the-end": ((2, 37, 333, 2, 2, 8), {"q_start": 296}),
    "chunk-of-a-tail": ((1, 64, 400, 2, 2, 8), {"q_start": 200, "kv_length": 210}),
    "empty-buffer": ((1, 5, 130, 2, 2, 8), {"kv_length": 0}),
    "sink": ((2, 150, 150, 4, 2, 8), {"sink": True}),
    "sink-and-nothing-else": ((1, 3, 20, 2, 2, 8), {"sink": True, "kv_length": 0}),
    "soft-cap": ((1, 150, 150, 2, 2, 8), {"soft_cap": 2.0}),
    "scale": ((1, 60, 60, 2, 2, 8), {"scale": 0.7}),
    "everything": (
        (2, 90, 200, 4, 2, 8),
        {"q_start": 100, "kv_length": 180, "sink": True, "soft_cap": 3.0, "segments": True},
    ),
    "float16-buffer": (
        (1, 33, 260, 4, 2, 8),
        {"q_start": 150, "kv_length": 183, "kv_dtype": np.float16, "sink": True},
    ),
    # Heads of whole vectors.
    "wide": ((1, 140, 140, 4, 2, 128), {"segments": True, "sink": True}),
    "wide-few": ((2, 21, 150, 6, 3, 128), {"q_start": 110, "segments": True, "sink": True}),
    "wide-window": ((1, 270, 270, 2, 1, 128), {"window": 90, "soft_cap": 3.0}),
    "decode-wide": ((2, 1, 300, 8, 4, 128), {"q_start": 270, "kv_length": 271, "sink": True}),
    "chunk-wide": ((1, 140, 400, 4, 2, 128), {"q_start": 150, "kv_length": 290}),
    "bfloat16": (
        (2, 150, 150, 4, 2, 8),
        {"dtype": jnp.bfloat16, "segments": True, "sink": True, "soft_cap": 3.0},
    ),
    "bfloat16-window": ((1, 270, 270, 2, 1, 32), {"dtype": jnp.bfloat16, "window": 90}),
    "bfloat16-wide": ((1, 140, 140, 4, 2, 128), {"dtype": jnp.bfloat16}),
    "decode-bfloat16": (
        (2, 1, 300, 8, 4, 128),
        {"dtype": jnp.bfloat16, "q_start": 270, "kv_length": 271, "sink": True},
    ),
    "decode-bfloat16-float16-buffer": (
        (1, 1, 300, 8, 4, 64),
        {"dtype": jnp.bfloat16, "kv_dtype": np.float16, "q_start": 270, "kv_length": 271},
    ),
    "bfloat16-buffer": (
        (1, 33, 260, 4, 2, 8),
        {"q_start": 150, "kv_length": 183, "kv_dtype": jnp.bfloat16, "sink": True},
    ),
}


def attention_case(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Differentiable arguments, other traced arguments, options."""
    (B, T, S, H, KV, D), options = ATTENTION[name]
    options = dict(options)
    dtype = options.pop("dtype", np.float32)
    kv_dtype = options.pop("kv_dtype", dtype)
    inputs = {
        "q": normal(1, B, T, H, D, dtype=dtype, scale=2),
        "k": normal(2, B, S, KV, D, dtype=kv_dtype),
        "v": normal(3, B, S, KV, D, dtype=kv_dtype),
    }
    if options.pop("sink", False):
        inputs["sink"] = normal(4, H)
    start = options.get("q_start", 0)
    traced = {x: np.int32(options.pop(x)) for x in ("q_start", "kv_length") if x in options}
    segmented, chunk = options.pop("segments", False), options.pop("chunk", None)
    if segmented:
        # Documents of unequal length, then padding; row 1 is padding throughout.
        segments = 1 + np.minimum(np.arange(S) // 45, np.arange(S) // 100 + 1).astype(np.int32)
        segments[-S // 10 :] = 0
        kv_segments = np.stack([segments * (b == 0) for b in range(B)])
    elif chunk:
        kv_segments = np.ones((B, S), np.int32)
    if chunk:
        positions = np.broadcast_to(positions_in(kv_segments), (B, S))
        kv_segments = np.asarray(chunk_segments(positions, kv_segments, chunk))
    if segmented or chunk:
        traced["kv_segments"] = kv_segments
        traced["q_segments"] = kv_segments[:, start : start + T]
    return inputs, traced, options


def positions_in(segments: np.ndarray) -> np.ndarray:
    """The index of each position within its segment: int32 [B, S] of a row or several alike."""
    row = segments[0]
    begins = np.flatnonzero(np.diff(row, prepend=-1))
    index = np.arange(len(row)) - np.repeat(begins, np.diff(begins, append=len(row)))
    return index.astype(np.int32)[None]


@functools.cache
def attention_results(
    name: str, impl: str
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    inputs, traced, options = attention_case(name)
    (B, T, _, H, _, D), _ = ATTENTION[name]
    along, along_lse = normal(5, B, T, H, D), normal(6, B, T, H)

    def forward(inputs: dict[str, Any], traced: dict[str, Any]) -> tuple[jax.Array, Any]:
        out, lse = partial_attention(**inputs, **traced, **options, impl=impl)
        sees = lse > -1e29
        return (out.astype(np.float32) * along).sum() + jnp.where(sees, lse * along_lse, 0).sum(), (
            out,
            lse,
        )

    if impl == "reference":
        inputs = {x: a.astype(np.float32) if narrow(a) else a for x, a in inputs.items()}
    arguments = jax.tree.map(jnp.asarray, (inputs, traced))
    if name.startswith(FORWARD_ONLY):
        out, lse = compiled(forward, impl)(*arguments)[1]
        return (np.asarray(out), np.asarray(lse)), {}
    run = compiled(jax.value_and_grad(forward, has_aux=True), impl)
    (_, (out, lse)), gradients = run(*arguments)
    return (np.asarray(out), np.asarray(lse)), {key: np.asarray(g) for key, g in gradients.items()}


@pytest.mark.parametrize(("impl", "name"), runs(attention, ATTENTION))
def test_attention(impl: str, name: str) -> None:
    out, gradients = attempt(impl, name, lambda: attention_results(name, impl))
    expected, expected_gradients = attention_results(name, "reference")
    inputs, _, _ = attention_case(name)
    in_bfloat16 = narrow(inputs["q"])
    assert out[0].dtype == inputs["q"].dtype
    for got, want in zip(out, expected, strict=True):
        tolerance = BFLOAT16 if in_bfloat16 else FORWARD
        np.testing.assert_allclose(got.astype(np.float32), want, **tolerance)
    for key, want in expected_gradients.items():
        got = gradients[key]
        assert got.dtype == inputs[key].dtype, key
        check_gradient(got, want, key, in_bfloat16)


@pytest.mark.parametrize("impl", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("with_sink", [False, True])
def test_attention_to_parts_merges_to_attention_to_all(impl: str, with_sink: bool) -> None:
    q, k, v = (jnp.asarray(normal(i, 2, 96, 4, 8, scale=2)) for i in (1, 2, 3))
    sink = jnp.asarray(normal(4, 4)) if with_sink else None
    along = jnp.asarray(normal(5, 2, 96, 4, 8))
    edges = [(0, 10), (10, 64), (64, 96)]

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, sink: Any) -> Any:
        out, lse = partial_attention(q, k, v, causal=False, sink=sink, impl=impl)
        return (out * along).sum(), (out, lse)

    def merged(q: jax.Array, k: jax.Array, v: jax.Array, sink: Any) -> Any:
        parts = [
            partial_attention(q, k[:, a:b], v[:, a:b], causal=False, impl=impl) for a, b in edges
        ]
        # Keys that nobody sees change nothing.
        parts.insert(1, partial_attention(q, k, v, kv_length=0, impl=impl))
        out, lse = merge_attention(parts, sink)
        return (out * along).sum(), (out, lse)

    names = (0, 1, 2, 3) if with_sink else (0, 1, 2)
    results = [
        compiled(jax.value_and_grad(f, argnums=names, has_aux=True), impl)(q, k, v, sink)
        for f in (whole, merged)
    ]
    ((_, outputs), gradients), ((_, expected), expected_gradients) = results[1], results[0]
    for got, want in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got, want, **FORWARD)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, **GRADIENT)


def test_parts_in_bfloat16_merge_in_float32() -> None:
    out = [jnp.asarray(normal(i, 1, 9, 2, 8), jnp.bfloat16) for i in (1, 2)]
    lse = [jnp.asarray(normal(i, 1, 9, 2)) for i in (3, 4)]
    got, total = merge_attention(list(zip(out, lse, strict=True)), jnp.asarray(normal(5, 2)))
    wide = [(x.astype(jnp.float32), y) for x, y in zip(out, lse, strict=True)]
    want, want_total = merge_attention(wide, jnp.asarray(normal(5, 2)))
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
    np.testing.assert_array_equal(total, want_total)


def attention_loop(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sink: np.ndarray | None = None,
    q_start: int = 0,
    kv_length: int | None = None,
    q_segments: np.ndarray | None = None,
    kv_segments: np.ndarray | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """The definition, one query at a time in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, D = q.shape
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, H):
        logits, values = [], []
        for s in range(k.shape[1] if kv_length is None else int(kv_length)):
            p = int(q_start) + t
            if (causal and s > p) or (window is not None and s <= p - window):
                continue
            if q_segments is not None and not (q_segments[b, t] == kv_segments[b, s] != 0):
                continue
            head = h // (H // k.shape[2])
            logit = q[b, t, h] @ k[b, s, head] * (D**-0.5 if scale is None else scale)
            logits.append(soft_cap * np.tanh(logit / soft_cap) if soft_cap else logit)
            values.append(v[b, s, head])
        if sink is not None:
            logits.append(float(sink[h]))
            values.append(np.zeros(D))
        if logits:
            p = np.exp(np.array(logits) - max(logits))
            out[b, t, h] = p @ np.array(values) / p.sum()
    return out


@pytest.mark.parametrize(
    "name",
    ["grouped", "all-to-all", "scale", "everything", "chunked", "float16-buffer", "empty-buffer"],
)
def test_attention_reference_is_the_definition(name: str) -> None:
    inputs, traced, options = attention_case(name)
    expected = attention_loop(**inputs, **traced, **options)
    with jax.enable_x64(True):
        wide = {x: jnp.asarray(a, jnp.float64) for x, a in inputs.items()}
        out = flash_attention(**wide, **traced, **options, impl="reference")
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", fast(attention))
def test_attention_in_float64(impl: str) -> None:
    inputs, traced, options = attention_case("everything")
    expected = attention_loop(**inputs, **traced, **options)
    with jax.enable_x64(True):
        wide = {x: jnp.asarray(a, jnp.float64) for x, a in inputs.items()}
        run = functools.partial(flash_attention, **wide, **traced, **options, impl=impl)
        out = attempt(impl, "float64", run)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


def test_chunks_begin_with_their_document() -> None:
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 2, 3, 4, 4, 4, 4]], np.int32)
    # The first document of row 1 goes on from another row; the second is of one token.
    positions = np.array(
        [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1], [7, 8, 9, 10, 0, 0, 0, 1, 2, 3]], np.int32
    )
    np.testing.assert_array_equal(
        chunk_segments(positions, segments, 3),
        [[1, 1, 1, 2, 2, 3, 3, 3, 0, 0], [1, 1, 2, 2, 3, 4, 5, 5, 5, 6]],
    )
    np.testing.assert_array_equal(
        chunk_segments(positions, segments, 100), [[1] * 5 + [2] * 3 + [0] * 2, segments[1]]
    )


@pytest.mark.parametrize("impl", fast(attention))
def test_attention_skips_what_cannot_be_seen(impl: str) -> None:
    """Keys of blocks beyond kv_length are not read: NaN there must not reach the result."""
    q, k = normal(1, 1, 4, 2, 8), normal(2, 1, 5000, 2, 8)
    poisoned = k.copy()
    poisoned[:, 1024:] = np.nan
    run = jax.jit(functools.partial(flash_attention, impl=impl))
    clean = run(q, k, k, q_start=jnp.int32(1020), kv_length=jnp.int32(1024))
    np.testing.assert_array_equal(
        run(q, poisoned, poisoned, q_start=jnp.int32(1020), kv_length=jnp.int32(1024)), clean
    )


@pytest.mark.parametrize("impl", fast(attention))
def test_attention_of_huge_scores_is_finite(impl: str) -> None:
    q, k, v = (normal(i, 1, 140, 2, 8, scale=1e4 if i < 3 else 1) for i in (1, 2, 3))
    loss = jax.grad(lambda *a: flash_attention(*a, impl=impl).sum(), argnums=(0, 1, 2))
    loss = compiled(loss, impl)
    assert all(np.isfinite(g).all() for g in loss(q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 9, 3, 8)}, "B, T|S, heads, D"),
        ({"k": (1, 9, 3, 8), "v": (1, 9, 3, 8)}, "do not match"),
        ({"window": 0}, "window=0"),
        ({"q_segments": (1, 9)}, "together"),
        ({"q_segments": (1, 9), "kv_segments": (1, 8)}, r"\[B, S\]"),
        ({"sink": (3,)}, "sink"),
    ],
)
def test_attention_says_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    shapes = {"q": (1, 9, 4, 8), "k": (1, 9, 2, 8), "v": (1, 9, 2, 8)} | change
    arguments = {x: jnp.zeros(s) if isinstance(s, tuple) else s for x, s in shapes.items()}
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments)


# Experts -----------------------------------------------------------------------------------------

# name: (T, K, E, D, F), how ids are chosen. Those called "bias" have biases; those that name an
# activation have that one, clamped at a limit that a good part of the values exceeds.
EXPERTS: dict[str, tuple[tuple[int, ...], str]] = {
    "one-token": ((1, 2, 4, 8, 12), "distinct"),
    "decode": ((5, 3, 8, 8, 12), "any"),
    "decode-absent": ((4, 3, 8, 8, 12), "absent"),
    "distinct": ((200, 2, 8, 16, 24), "distinct"),
    "repeated": ((150, 3, 4, 16, 24), "any"),
    "every-expert": ((60, 5, 5, 8, 12), "distinct"),
    "one-expert": ((130, 1, 1, 8, 12), "any"),
    "all-to-one": ((140, 2, 6, 8, 12), "last"),
    "more-experts-than-pairs": ((20, 1, 64, 8, 12), "any"),
    "absent": ((170, 2, 4, 8, 12), "absent"),
    "nobody": ((40, 2, 4, 8, 12), "none"),
    "tall-blocks": ((1100, 1, 1, 8, 12), "any"),
    "medium-blocks": ((600, 2, 2, 8, 12), "any"),
    "geglu": ((70, 2, 4, 8, 12), "distinct"),
    "bias": ((150, 2, 4, 16, 24), "any"),
    "bias-clamped_swiglu": ((170, 2, 4, 8, 12), "absent"),
    "bias-nobody": ((40, 2, 4, 8, 12), "none"),
    "decode-bias-clamped_swiglu": ((4, 3, 8, 8, 12), "absent"),
    "decode-bias-clamped_geglu": ((4, 3, 8, 8, 12), "any"),
    "decode-geglu": ((5, 3, 8, 8, 12), "any"),
    "bfloat16-bias": ((170, 2, 4, 16, 24), "absent"),
    "decode-bfloat16": ((5, 3, 8, 8, 12), "any"),
}


def activation(name: str) -> Glu:
    names = ("clamped_geglu", "clamped_swiglu", "geglu")
    return Glu(next((glu for glu in names if glu in name), "swiglu"), limit=0.8)


def expert_case(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    (T, K, E, D, F), choice = EXPERTS[name]
    rng = np.random.default_rng(7)
    ids = {
        "distinct": lambda: rng.random((T, E)).argsort(axis=1)[:, :K],
        "any": lambda: rng.integers(0, E, (T, K)),
        "absent": lambda: rng.integers(0, E + 1, (T, K)),
        "last": lambda: np.full((T, K), E - 1),
        "none": lambda: np.full((T, K), E),
    }[choice]()
    arrays = {
        "x": normal(1, T, D),
        "weights": normal(2, T, K),
        "w_gate": normal(3, E, D, F, scale=D**-0.5),
        "w_up": normal(4, E, D, F, scale=D**-0.5),
        "w_down": normal(5, E, F, D, scale=F**-0.5),
    }
    if "bias" in name:
        arrays |= {"b_gate": normal(8, E, F), "b_up": normal(9, E, F), "b_down": normal(10, E, D)}
    if "bfloat16" in name:
        arrays = {x: a if x == "weights" else a.astype(jnp.bfloat16) for x, a in arrays.items()}
    return arrays, ids.astype(np.int32)


@functools.cache
def expert_results(name: str, impl: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    arrays, ids = expert_case(name)
    along = normal(6, *arrays["x"].shape)

    def forward(arrays: dict[str, jax.Array], ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = expert_mlp(expert_ids=ids, **arrays, glu=activation(name), impl=impl)
        return (out.astype(np.float32) * along).sum(), out

    if impl == "reference":
        arrays = {x: a.astype(np.float32) for x, a in arrays.items()}
    inputs = jax.tree.map(jnp.asarray, arrays)
    run = compiled(jax.value_and_grad(forward, has_aux=True), impl)
    (_, out), gradients = run(inputs, jnp.asarray(ids))
    return np.asarray(out), {key: np.asarray(g) for key, g in gradients.items()}


@pytest.mark.parametrize(("impl", "name"), runs(experts, EXPERTS))
def test_experts(impl: str, name: str) -> None:
    out, gradients = attempt(impl, name, lambda: expert_results(name, impl))
    expected, expected_gradients = expert_results(name, "reference")
    arrays, ids = expert_case(name)
    in_bfloat16 = narrow(arrays["x"])
    forward = of_the_greatest(expected) if in_bfloat16 else FORWARD
    assert out.dtype == arrays["x"].dtype
    np.testing.assert_allclose(out.astype(np.float32), expected, **forward)
    if name.startswith(("one-token", "decode", "nobody", "distinct")):
        # Not differentiated, few pairs take another path, and others keep nothing.
        run = functools.partial(expert_mlp, glu=activation(name), impl=impl)
        plain = compiled(run, impl)(expert_ids=ids, **arrays)
        np.testing.assert_allclose(plain.astype(np.float32), expected, **forward)
    for key, want in expected_gradients.items():
        got = gradients[key]
        assert got.dtype == arrays[key].dtype, key
        check_gradient(got, want, key, in_bfloat16)


def gated(name: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The definition of the activations, in float64."""
    if "clamped_geglu" in name:
        gate, up = np.minimum(gate, 0.8), np.clip(up, -0.8, 0.8)
    if "geglu" in name:
        return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if "clamped_swiglu" in name:
        gate = np.minimum(gate, 0.8)
        return gate * expit(1.702 * gate) * (np.clip(up, -0.8, 0.8) + 1)
    return gate * expit(gate) * up


@pytest.mark.parametrize(
    "name",
    [
        *("decode-absent", "repeated", "geglu", "bias"),
        *("decode-bias-clamped_swiglu", "decode-bias-clamped_geglu"),
    ],
)
@pytest.mark.parametrize("impl", experts.IMPLEMENTATIONS)
def test_experts_in_float64_are_the_definition(impl: str, name: str) -> None:
    arrays, ids = expert_case(name)
    wide = {x: a.astype(np.float64) for x, a in arrays.items()}
    none = dict.fromkeys(("b_gate", "b_up", "b_down"), np.zeros((len(wide["w_gate"]), 1)))
    w = none | wide
    expected = np.zeros(wide["x"].shape)
    for t, choice in np.ndindex(ids.shape):
        e = ids[t, choice]
        if e < len(wide["w_gate"]):
            gate = wide["x"][t] @ w["w_gate"][e] + w["b_gate"][e]
            up = wide["x"][t] @ w["w_up"][e] + w["b_up"][e]
            y = gated(name, gate, up) @ w["w_down"][e] + w["b_down"][e]
            expected[t] += wide["weights"][t, choice] * y
    glu = activation(name)
    with jax.enable_x64(True):
        given = {"expert_ids": jnp.asarray(ids), **wide, "glu": glu, "impl": impl}
        out = attempt(impl, "float64", lambda: expert_mlp(**given))
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", fast(experts))
def test_experts_row_does_not_depend_on_the_others(impl: str) -> None:
    arrays, ids = expert_case("repeated")
    changed = arrays | {"x": normal(11, *arrays["x"].shape)}
    other_ids = np.random.default_rng(12).integers(0, 5, ids.shape).astype(np.int32)
    changed["x"][17], changed["weights"] = arrays["x"][17], arrays["weights"]
    other_ids[17] = ids[17]
    run = compiled(functools.partial(expert_mlp, impl=impl), impl)
    first = run(expert_ids=jnp.asarray(ids), **arrays)
    second = run(expert_ids=jnp.asarray(other_ids), **changed)
    np.testing.assert_allclose(first[17], second[17], rtol=1e-6, atol=1e-6)


def test_experts_say_what_does_not_fit() -> None:
    arrays, ids = expert_case("decode")
    with pytest.raises(ValueError, match=r"down \[8, 8, 12\]"):
        expert_mlp(expert_ids=ids, **(arrays | {"w_down": arrays["w_up"]}))
    with pytest.raises(ValueError, match="all three biases or none; got up_bias"):
        expert_mlp(expert_ids=ids, **arrays, b_up=np.zeros((8, 12), np.float32))
    with pytest.raises(ValueError, match="no activation 'relu'"):
        expert_mlp(expert_ids=jnp.asarray(ids), **arrays, glu=Glu("relu"))


@pytest.mark.parametrize("impl", fast(experts))
def test_experts_in_bfloat16(impl: str) -> None:
    """Forward and backward, against the reference with the same (rounded) numbers in float32."""
    arrays, ids = expert_case("bias")
    low = {name: jnp.asarray(array, jnp.bfloat16) for name, array in arrays.items()}
    along = normal(6, *arrays["x"].shape)

    def results(arrays: Any, impl: str) -> Any:
        def loss(arrays: Any) -> Any:
            out = expert_mlp(expert_ids=jnp.asarray(ids), **arrays, impl=impl)
            return (out.astype(jnp.float32) * along).sum(), out

        return compiled(jax.grad(loss, has_aux=True), impl)(arrays)

    got, want = results(low, impl), results(jax.tree.map(jnp.float32, low), "reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.asarray(a, np.float32) - np.asarray(b)
        assert np.linalg.norm(error) < 8e-3 * np.linalg.norm(b)
