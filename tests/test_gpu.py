"""Programs for GPUs. There is none here: what can be seen is that Triton's compiler takes the kernels.

That they compute the right thing is tested by interpreting them, in test_kernels.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gemtool.kernels import dispatch, expert_mlp
from gemtool.kernels.attention import partial_attention
from tests.test_kernels import expert_case


def lowered_for_gpu(function: Any, *arguments: Any) -> str:
    with dispatch.compiling_for("gpu"):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def shaped(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(("dtype", "dim"), [(jnp.bfloat16, 128), (jnp.float32, 80)])
def test_attention_for_gpus_is_triton_code(dtype: Any, dim: int) -> None:
    q, kv = shaped(dtype, 2, 200, 6, dim), shaped(jnp.bfloat16, 2, 300, 2, dim)
    segments = shaped(jnp.int32, 2, 200), shaped(jnp.int32, 2, 300)

    def gradients(q: Any, k: Any, v: Any, sink: Any, start: Any, segments: Any) -> Any:
        def loss(*inputs: Any) -> Any:
            q, k, v, sink = inputs
            out, lse = partial_attention(
                q, k, v, sink=sink, q_start=start, kv_length=start, window=90, soft_cap=3.0,
                q_segments=segments[0], kv_segments=segments[1],
            )  # fmt: skip
            return out.astype(jnp.float32).sum() + lse.sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, sink)

    scalar = shaped(jnp.int32)
    text = lowered_for_gpu(gradients, q, kv, kv, shaped(jnp.float32, 6), scalar, segments)
    assert text.count("@__gpu$xla.gpu.triton") == 3
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_experts_for_gpus_are_triton_code(dtype: Any) -> None:
    arrays, ids = expert_case("bias-clamped_swiglu")
    inputs = {name: shaped(dtype, *array.shape) for name, array in arrays.items()}

    def gradients(inputs: Any, ids: Any) -> Any:
        return jax.grad(lambda a: expert_mlp(expert_ids=ids, **a).astype(jnp.float32).sum())(inputs)

    text = lowered_for_gpu(gradients, inputs, ids)
    # Three projections, the gradients of their rows and of their matrices.
    assert text.count("@__gpu$xla.gpu.triton") == 9
    assert "stablehlo.dot_general" not in text
