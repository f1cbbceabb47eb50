"""The decoder computes what transformers computes: tiny models of nine families, random weights.

Logits of whole sequences, and of prefill and decoding through the cache, are compared in float32,
past every window and chunk.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.model import params, transformer
from gemtool.model.batch import Batch
from gemtool.model.cache import init_cache
from gemtool.model.config import LayerKind, ModelConfig, MoEConfig
from gemtool.model.kinds import RopeScaling
from gemtool.model.moe import moe_mlp, route
from gemtool.model.rope import frequencies
from tests.families import ATTENTION, QK_NORM, Family, Table, convert, experts, mlp

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, WINDOW, CHUNK = 89, 61, 16, 20
PREFILL = 24  # positions of a prefill step: two steps, then tokens one by one
TOLERANCE = 1e-4

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
}
HALVES = {"gate": slice(0, 24), "up": slice(24, None)}


def config(layers: str, kinds: tuple[LayerKind, ...], **rest: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"d_ff": 48, "norm_eps": 1e-5, "tie_embeddings": False}
    return ModelConfig("tiny", VOCAB, 32, layers, kinds, kv_dtype="float32", **{**defaults, **rest})


def kind(letter: str, attention: str = "full", window: int = 0, **rest: Any) -> LayerKind:
    defaults: dict[str, Any] = {"rope_theta": 1e4, "qk_norm": "none", "head_dim": 8}
    return LayerKind(letter, attention, 4, 2, window=window, **{**defaults, **rest})


def moe(experts: int, top_k: int, **rest: Any) -> MoEConfig:
    return MoEConfig(experts, top_k, 24, balance="auxiliary", **rest)


def halves(x: np.ndarray) -> np.ndarray:
    """Neighbours that are rotated as a pair, moved to the two halves of a head [H * K, D] of K = 16."""
    return x.reshape(-1, 8, 2, 32).swapaxes(1, 2).reshape(x.shape).T


PAIRS: Table = {
    f"layers/{{i}}/attention/{name}": (f"model.layers.{{i}}.self_attn.{name}_proj.weight", halves)
    for name in "qk"
}
BIASES: Table = {
    f"layers/{{i}}/attention/{name}_bias": f"model.layers.{{i}}.self_attn.{name}_proj.bias"
    for name in "qkvo"
}


def llama() -> Family:
    """A dense layer whose projections all have biases, those of attention and of the network."""
    return Family(
        "Llama",
        {
            **SIZES,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        config("G", (kind("G", qkv_bias=True, out_bias=True),), mlp_bias=True),
        ATTENTION
        | BIASES
        | mlp("mlp", "mlp")
        | {
            f"layers/{{i}}/mlp/{name}_bias": f"model.layers.{{i}}.mlp.{name}_proj.bias"
            for name in ("gate", "up", "down")
        },
    )


def mixtral() -> Family:
    """Sliding windows; softmax over the chosen experts."""
    return Family(
        "Mixtral",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        config("LL", (kind("L", "window", WINDOW),), dense_layers=0, moe=moe(4, 2)),
        ATTENTION
        | {"layers/{i}/moe/router": "model.layers.{i}.mlp.gate.weight"}
        | experts("model.layers.{i}.mlp.experts", **HALVES, transposed=True),
    )


def qwen3_moe() -> Family:
    """A dense first layer, then experts; norms of each head; YaRN with its amplitude."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    scaling = RopeScaling("yarn", 4.0, original_length=128)
    return Family(
        "Qwen3Moe",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "rope_parameters": {**yarn, "original_max_position_embeddings": 128},
        },
        config(
            "GG",
            (kind("G", head_dim=16, rope_theta=1e6, rope_scaling=scaling, qk_norm="rms"),),
            moe=moe(8, 3),
        ),
        ATTENTION
        | QK_NORM
        | mlp("mlp", "mlp")
        | {"layers/{i}/moe/router": "model.layers.{i}.mlp.gate.weight"}
        | experts("model.layers.{i}.mlp.experts", **HALVES, transposed=True),
    )


def olmoe() -> Family:
    """Norms of all heads as one vector; weights of experts that do not sum to one."""
    return Family(
        "Olmoe",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        config(
            "GG", (kind("G", qk_norm="rms_joint"),), dense_layers=0, moe=moe(8, 4, normalise=False)
        ),
        ATTENTION
        | QK_NORM
        | {"layers/{i}/moe/router": "model.layers.{i}.mlp.gate.weight"}
        | experts("model.layers.{i}.mlp.experts", **HALVES, transposed=True),
    )


def gpt_oss() -> Family:
    """Windows and full attention in turn, sinks, biases everywhere, clamped SwiGLU, YaRN."""
    yarn = {"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 32.0, "truncate": False}
    yarn |= {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
    scaling = RopeScaling("yarn", 32.0, original_length=4096, truncate=False)
    alike = {"rope_theta": 1.5e5, "rope_scaling": scaling, "sink": True}
    alike |= {"qkv_bias": True, "out_bias": True, "head_dim": 16}
    gate, up, their = slice(0, None, 2), slice(1, None, 2), "model.layers.{i}.mlp.experts"
    return Family(
        "GptOss",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "intermediate_size": 24,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.0,  # so that it is met
            "rope_parameters": yarn,
        },
        config(
            "LG",
            (kind("L", "window", WINDOW, **alike), kind("G", **alike)),
            dense_layers=0,
            activation="clamped_swiglu",
            glu_limit=1.0,
            moe=moe(4, 2, router_bias=True, expert_bias=True),
        ),
        ATTENTION
        | BIASES
        | {
            "layers/{i}/attention/sink": "model.layers.{i}.self_attn.sinks",
            "layers/{i}/moe/router": "model.layers.{i}.mlp.router.weight",
            "layers/{i}/moe/router_bias": "model.layers.{i}.mlp.router.bias",
            "layers/{i}/moe/gate_bias": (f"{their}.gate_up_proj_bias", lambda x: x[:, gate]),
            "layers/{i}/moe/up_bias": (f"{their}.gate_up_proj_bias", lambda x: x[:, up]),
            "layers/{i}/moe/down_bias": f"{their}.down_proj_bias",
        }
        | experts(their, gate, up, transposed=False),
    )


POST_NORMS: Table = {
    "layers/{i}/attention_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/{i}/mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers/{i}/mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}
GEMMA = {
    "activation": "geglu",
    "norm_offset": True,
    "post_norms": True,
    "embedding_scale": float(np.float32(32**0.5)),
    "tie_embeddings": True,
    "logit_soft_cap": 3.0,
}


def gemma2() -> Family:
    """Norms before and after, of scale 1 + w; GeGLU; soft caps of scores and logits."""
    alike = {"head_dim": 16, "score_scale": 24**-0.5, "soft_cap": 2.0}
    return Family(
        "Gemma2",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        config("LG", (kind("L", "window", WINDOW, **alike), kind("G", **alike)), **GEMMA),
        ATTENTION | mlp("mlp", "mlp") | POST_NORMS,
    )


def gemma3() -> Family:
    """As Gemma 2 but for the soft cap of scores; norms of each head; a RoPE for each kind."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    alike = {"head_dim": 16, "qk_norm": "rms", "score_scale": 24**-0.5}
    return Family(
        "Gemma3",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
            "rope_parameters": rope,
        },
        config(
            "LG",
            (
                kind("L", "window", WINDOW, **alike),
                kind("G", **(alike | {"rope_theta": 1e6}), rope_scaling=RopeScaling("linear", 8.0)),
            ),
            **GEMMA,
        ),
        ATTENTION | QK_NORM | mlp("mlp", "mlp") | POST_NORMS,
    )


def llama4() -> Family:
    """Chunks with rotary positions and plain norms; every other layer full without positions, its
    queries growing with length; experts weighed at their input, in every other layer, one shared."""
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    scaling = RopeScaling("llama3", 8.0, original_length=256, fast=4.0)
    their = "model.layers.{i}.feed_forward"
    return Family(
        "Llama4",
        {
            **SIZES,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "intermediate_size": 24,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": CHUNK,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "floor_scale": 8,
            "attn_scale": 0.3,
            "rope_parameters": llama3,
        },
        config(
            "CGC",
            (
                kind(
                    "C",
                    "chunk",
                    CHUNK,
                    head_dim=16,
                    rope_theta=5e5,
                    rope_scaling=scaling,
                    qk_norm="rms_plain",
                ),
                kind("G", head_dim=16, rope_theta=0.0, length_scale=0.3, length_floor=8),
            ),
            moe=moe(
                4, 2, shared_experts=1, every=2, score="sigmoid", normalise=False, weigh="input"
            ),
        ),
        ATTENTION
        | PAIRS
        | mlp("mlp", "feed_forward")
        | mlp("moe/shared", "feed_forward.shared_expert")
        | {"layers/{i}/moe/router": f"{their}.router.weight"}
        | experts(f"{their}.experts", **HALVES, transposed=False),
    )


def cohere2_moe() -> Family:
    """Attention and network side by side, of rows normed once: a dense layer of a window, then experts,
    one shared, beside full attention without positions."""
    return Family(
        "Cohere2Moe",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "intermediate_size": 24,
            "prefix_dense_intermediate_size": 48,
            "layer_types": ["sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "sliding_window": WINDOW,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_selection_fn": "sigmoid",
            "num_shared_experts": 1,
            "shared_expert_combination_strategy": "sum",
            "logit_scale": 1.0,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        config(
            "LG",
            (kind("L", "window", WINDOW, head_dim=16), kind("G", head_dim=16, rope_theta=0.0)),
            parallel=True,
            moe=moe(4, 2, shared_experts=1, score="sigmoid"),
        ),
        ATTENTION
        | PAIRS
        | mlp("mlp", "mlp")
        | mlp("moe/shared", "mlp.shared_experts")
        | {"layers/{i}/moe/router": "model.layers.{i}.mlp.gate.weight"}
        | experts("model.layers.{i}.mlp.experts", **HALVES, transposed=True),
    )


ALL = (llama, mixtral, qwen3_moe, olmoe, gpt_oss, gemma2, gemma3, llama4, cohere2_moe)
FAMILIES = {f.__name__: f for f in ALL}


def random_model(family: Family) -> Any:
    """A model of transformers, all of whose weights are random: norms, biases and sinks too."""
    makers = {"Gemma3": "TextConfig", "Llama4": "TextConfig"}
    their_config = getattr(transformers, family.model + makers.get(family.model, "Config"))(
        **family.theirs, attn_implementation="eager"
    )
    their_config._experts_implementation = "eager"
    model = getattr(transformers, f"{family.model}ForCausalLM")(their_config).float().eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            # Norms begin at 0 or 1, and what is not initialised at anything.
            start = 1.0 if float(parameter.detach().mean()) == 1 else 0.0
            parameter.data = start + 0.3 * noise
        else:
            parameter.data = 0.2 * noise
    return model


@cache
def case(name: str) -> tuple[ModelConfig, params.Tree, np.ndarray, np.ndarray]:
    """Our configuration and parameters, tokens int32 [2, LENGTH], and the logits that are right."""
    family = FAMILIES[name]()
    tokens = np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH), np.int32)
    model = random_model(family)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    return family.ours, convert(family, model), tokens, logits


def assert_equal_logits(actual: jax.Array, expected: np.ndarray) -> None:
    assert expected.std() > 0.3  # not vacuous
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_sequences(name: str) -> None:
    ours, p, tokens, expected = case(name)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    ones = jnp.ones(tokens.shape, jnp.int32)
    batch = Batch(jnp.asarray(tokens), ones, positions, jnp.asarray(tokens), ones.astype("float32"))

    @jax.jit
    def run(p: params.Tree, batch: Batch) -> jax.Array:
        hidden, _ = transformer.forward(p, ours, batch)
        return transformer.logits(p, ours, hidden)

    assert_equal_logits(run(p, batch), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decode(name: str) -> None:
    ours, p, tokens, expected = case(name)

    @partial(jax.jit, donate_argnums=2)
    def run(p: params.Tree, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        x = transformer.embed(p, ours, tokens)
        valid = jnp.asarray(tokens.shape[1], jnp.int32)
        hidden, cache = transformer.step(p, ours, x, cache, valid)
        return transformer.logits(p, ours, hidden), cache

    state, parts, at = init_cache(ours, len(tokens), LENGTH), [], 0
    while at < LENGTH:
        size = PREFILL if at < 2 * PREFILL else 1
        logits, state = run(p, jnp.asarray(tokens[:, at : at + size]), state)
        parts.append(logits)
        at += size
    assert_equal_logits(jnp.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        (RopeScaling("linear", 4.0), {}),
        # Theirs grows with the length: 2 * 8192 / 4096 - 1 = 3 at 8,192 positions.
        (RopeScaling("ntk", 3.0), {"rope_type": "dynamic", "factor": 2.0}),
        (RopeScaling("yarn", 8.0, 512), {}),
        (RopeScaling("yarn", 8.0, 4096, slow=2, fast=16, truncate=False, amplitude=1.2), {}),
        (RopeScaling("yarn", 2.0, 8), {}),
        (RopeScaling("llama3", 8.0, 512, fast=4.0), {}),
        (RopeScaling("llama3", 32.0, 8192, slow=0.5, fast=3.0), {}),
    ],
    ids=lambda value: value.kind if isinstance(value, RopeScaling) else "",
)
def test_rope_scaling(scaling: RopeScaling, theirs: dict[str, Any], head_dim: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    table: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor} | theirs
    if scaling.original_length:
        table["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "yarn":
        table |= {"beta_slow": scaling.slow, "beta_fast": scaling.fast}
        table |= {"truncate": scaling.truncate, "attention_factor": scaling.amplitude or None}
    if scaling.kind == "llama3":
        table |= {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast}
    their_config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={**table, "rope_theta": 1e4},
    )
    compute = ROPE_INIT_FUNCTIONS[table["rope_type"]]
    expected, expected_amplitude = compute(their_config, torch.device("cpu"), seq_len=8192)
    frequency, amplitude = frequencies(head_dim, 1e4, scaling)
    np.testing.assert_allclose(frequency, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(amplitude, expected_amplitude, rtol=1e-6)


def test_choice_within_groups() -> None:
    """The router of DeepSeek-V3: sigmoid scores, a balance bias, the best groups only."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    their_config = transformers.DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=24,
        num_experts_per_tok=5,
        n_group=6,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(their_config)
    rng = np.random.default_rng(1)
    weight, x = rng.normal(size=(24, 32)), rng.normal(size=(50, 32))
    bias, x = rng.normal(size=24).astype(np.float32), x.astype(np.float32)
    router.weight.data = torch.from_numpy(weight.astype(np.float32))
    router.e_score_correction_bias.data = torch.from_numpy(bias)
    with torch.no_grad():
        _, expected, chosen = router(torch.from_numpy(x))
    order = np.argsort(chosen.numpy(), axis=1)
    mixture = MoEConfig(
        24, 5, 8, score="sigmoid", groups=6, top_groups=2, weight_scale=2.5, balance="bias"
    )
    p = {"router": jnp.asarray(weight.T, jnp.float32), "bias": jnp.asarray(bias)}
    ids, weights, _, _ = route(p, mixture, jnp.asarray(x))
    ours = np.argsort(ids, axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(ids), ours, 1), np.take_along_axis(chosen.numpy(), order, 1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(weights), ours, 1),
        np.take_along_axis(expected.numpy(), order, 1),
        rtol=1e-5,
    )


@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss(padded: bool) -> None:
    """That of Mixtral, whose shares of tokens are not divided by the number of choices."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours = config("G", (kind("G"),), dense_layers=0, moe=moe(6, 3))
    p = params.init_params(ours, jax.random.key(0))["layers"]["0"]["moe"]
    x = np.random.default_rng(2).normal(0.3, 1, (2, 20, 32)).astype(np.float32)
    present = np.ones((2, 20), bool)
    present[1, 5:] = not padded
    logits = torch.from_numpy(x.reshape(40, 32) @ np.asarray(p["router"]))
    expected = load_balancing_loss_func((logits,), 6, 3, torch.from_numpy(present)) / 3
    assert abs(float(expected) - 1) > 0.01  # neither balance nor a constant
    _, stats = jax.jit(moe_mlp, static_argnums=1)(p, ours, jnp.asarray(x), jnp.asarray(present))
    np.testing.assert_allclose(stats["balance_loss"], expected, rtol=1e-5)
