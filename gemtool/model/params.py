"""The parameters of a model: one table gives shapes, dtypes, logical axes and initial values.

`param_specs` is the only place that says what a model's weights are. Initialisation, abstract
shapes, counts, shardings and the golden text of the tests are all read off it. A tree is a
nested dict; a leaf's path reads `layers/0/attention/q`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemtool.model.config import EncoderConfig, LayerKind, ModelConfig
from gemtool.model.kinds import IndexConfig
from gemtool.model.stacking import Tree, stack_layers


@dataclass(frozen=True)
class ParamSpec:
    """One array of a model.

    `axes` names each dimension by its meaning ("embed", "heads", ...), so that a mesh may map
    meanings to devices. `init` is one of

    - "normal": independent normal values of deviation `scale`;
    - "constant": `scale` everywhere;
    - "identity": convolution taps [C, D] that pass the current token through, `scale` elsewhere 0;
    - "repeat": the sibling parameter `source`, each slice along axis 1 repeated to fill this shape.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    scale: float = 0.0
    source: str = ""
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def param_specs(config: ModelConfig, stacked: bool = False) -> Tree:
    """The nested table of `ParamSpec`, in the structure of the parameters, `stacked` or not (see
    stacking.py)."""
    if stacked:
        return stack_layers(config, param_specs(config), _stacked)
    d = config.d_model
    tree: Tree = {
        "embedding": ParamSpec((config.vocab_size, d), ("vocab", "embed"), scale=d**-0.5),
        "layers": {},
        "norm": _norm(config, d),
    }
    if not config.tie_embeddings:
        tree["unembedding"] = ParamSpec((config.vocab_size, d), ("vocab", "embed"), scale=d**-0.5)
    for index, kind in enumerate(config.layer_kinds):
        layer: Tree = {"attention_norm": _norm(config, d), "attention": _attention(config, kind)}
        if not config.parallel:
            layer["mlp_norm"] = _norm(config, d)
        if config.post_norms:
            layer["attention_post_norm"] = layer["mlp_post_norm"] = _norm(config, d)
        if config.is_moe(index):
            layer["moe"] = _moe(config)
        else:
            layer["mlp"] = _gated_mlp(config, config.d_ff, config.mlp_bias)
        tree["layers"][str(index)] = layer
    if config.encoders:
        tree["encoders"] = {e.kind: _encoder(config, e) for e in config.encoders}
    return tree


def _stacked(*same: ParamSpec) -> ParamSpec:
    first = same[0]
    return replace(first, shape=(len(same), *first.shape), axes=("layers", *first.axes))


def _norm(config: ModelConfig, width: int, axis: str = "embed") -> ParamSpec:
    return ParamSpec((width,), (axis,), "constant", 0.0 if config.norm_offset else 1.0)


def _bias(shape: tuple[int, ...], *axes: str) -> ParamSpec:
    return ParamSpec(shape, axes, "constant", 0.0)


def _out_scale(config: ModelConfig, fan_in: int) -> float:
    """Deviation of a matrix that writes to the residual stream: smaller in deep models, as in GPT-2."""
    return (2 * len(config.layers) * fan_in) ** -0.5


def _attention(config: ModelConfig, kind: LayerKind) -> Tree:
    d, heads, kv_heads, head_dim = config.d_model, kind.heads, kind.kv_heads, kind.head_dim
    kv = ParamSpec((d, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), scale=d**-0.5)
    query_shape, query_axes = (d, heads, head_dim), ("embed", "heads", "head_dim")
    tree: Tree = {
        "q": ParamSpec(query_shape, query_axes, "repeat", source="k")
        if kind.tie_qk_init
        else ParamSpec(query_shape, query_axes, scale=d**-0.5),
        "k": kv,
        "v": kv,
        "o": ParamSpec(
            (heads, head_dim, d),
            ("heads", "head_dim", "embed"),
            scale=_out_scale(config, heads * head_dim),
        ),
    }
    if kind.shares:
        del tree["k"], tree["v"]
    if kind.qk_conv > 1:
        shape, axes = (kind.qk_conv, d), ("taps", "embed")
        tree["conv"] = (
            ParamSpec(shape, axes, "identity", 1.0)
            if kind.conv_init == "identity"
            else ParamSpec(shape, axes, scale=kind.qk_conv**-0.5)
        )
    if kind.qk_norm == "unit":
        # Adam moves a parameter by about the learning rate a step: a logarithm moves by percents.
        tree["log_temperature"] = ParamSpec(
            (heads,), ("heads",), "constant", math.log(kind.temperature)
        )
    if kind.qk_norm == "rms":
        tree["q_norm"] = tree["k_norm"] = _norm(config, head_dim, "head_dim")
    if kind.qk_norm == "rms_joint":
        one = _norm(config, 1).scale
        tree["q_norm"] = ParamSpec((heads, head_dim), ("heads", "head_dim"), "constant", one)
        tree["k_norm"] = ParamSpec((kv_heads, head_dim), ("kv_heads", "head_dim"), "constant", one)
    if kind.sink:
        tree["sink"] = ParamSpec((heads,), ("heads",), "constant", 0.0)
    if kind.qkv_bias:
        tree["q_bias"] = _bias((heads, head_dim), "heads", "head_dim")
        if not kind.shares:
            tree["k_bias"] = tree["v_bias"] = _bias((kv_heads, head_dim), "kv_heads", "head_dim")
    if kind.out_bias:
        tree["o_bias"] = _bias((d,), "embed")
    if kind.index is not None:
        tree["index"] = _index(d, kind.index, own_keys=not kind.shares)
    if kind.shares:
        tree.pop("k_norm", None)
    return tree


def _index(d: int, index: IndexConfig, *, own_keys: bool) -> Tree:
    # Axes without a name: it is small, and every device has all of it.
    def matrix(rows: int, columns: int) -> ParamSpec:
        return ParamSpec((rows, columns), (None, None), scale=rows**-0.5)

    query = matrix(index.hidden, index.dim)
    tree: Tree = {
        "hidden": matrix(d, index.hidden),
        "q": query,
        "log_temperature": ParamSpec((1,), (None,), "constant", math.log(index.temperature)),
    }
    if own_keys:
        # Equal contexts match before any training, as with `tie_qk_init`.
        tree["q"] = replace(query, init="repeat", source="k")
        tree["k"], tree["gate"] = query, matrix(index.hidden, index.landmarks)
    return tree


def _gated_mlp(config: ModelConfig, width: int, biases: bool, experts: int = 0) -> Tree:
    """A dense gated network, or the arrays of so many experts."""
    d, hidden = config.d_model, "expert_mlp" if experts else "mlp"
    count, axis = ((experts,), ("expert",)) if experts else ((), ())
    tree: Tree = {
        "gate": ParamSpec((*count, d, width), (*axis, "embed", hidden), scale=d**-0.5),
        "up": ParamSpec((*count, d, width), (*axis, "embed", hidden), scale=d**-0.5),
        "down": ParamSpec(
            (*count, width, d), (*axis, hidden, "embed"), scale=_out_scale(config, width)
        ),
    }
    if biases:
        tree["gate_bias"] = tree["up_bias"] = _bias((*count, width), *axis, hidden)
        tree["down_bias"] = _bias((*count, d), *axis, "embed")
    return tree


def _moe(config: ModelConfig) -> Tree:
    assert config.moe is not None
    moe, d = config.moe, config.d_model
    tree = _gated_mlp(config, moe.d_expert, moe.expert_bias, moe.experts)
    tree["router"] = ParamSpec((d, moe.experts), ("embed", "expert"), scale=d**-0.5)
    if moe.router_bias:
        tree["router_bias"] = _bias((moe.experts,), "expert")
    if moe.balance == "bias":
        tree["bias"] = _bias((moe.experts,), "expert")
    if moe.shared_experts:
        tree["shared"] = _gated_mlp(config, moe.shared_experts * moe.d_expert, config.mlp_bias)
    return tree


def _encoder(config: ModelConfig, encoder: EncoderConfig) -> Tree:
    width = encoder.width
    tree: Tree = {}
    half = 0.5**0.5  # what is seen and where start with half of the variance each
    if encoder.kind == "visual":
        fan_in = 3 * (encoder.patch + 2 * encoder.overlap) ** 2
        scale = half * fan_in**-0.5
        tree["patch"] = ParamSpec((fan_in, width), ("features", "embed"), scale=scale)
        tree["patch_bias"] = _bias((width,), "embed")
        place = ParamSpec((encoder.side, width), (None, "embed"), scale=half * half)
        tree["row"] = tree["column"] = place
    else:
        tree["stem"] = {}
        for i, frames in enumerate(encoder.kernels):
            channels = width if i else encoder.mels
            shape, scale = (frames, channels, width), (frames * channels) ** -0.5
            tree["stem"][str(i)] = {
                "kernel": ParamSpec(shape, (None, "features", "embed"), scale=scale),
                "bias": _bias((width,), "embed"),
            }
        tree["position"] = ParamSpec((encoder.tokens, width), (None, "embed"), scale=half)
    tree["layers"] = {str(i): _encoder_layer(encoder) for i in range(encoder.depth)}
    tree["norm"] = _ones(width, "embed")
    # Soft tokens start as large as token embeddings.
    scale = config.embedding_scale * (config.d_model * width) ** -0.5
    tree["out"] = ParamSpec((width, config.d_model), ("mlp", "embed"), scale=scale)
    return tree


def _encoder_layer(encoder: EncoderConfig) -> Tree:
    width, hidden, heads, head_dim = encoder.width, encoder.hidden, encoder.heads, encoder.head_dim
    scale = width**-0.5
    out = (2 * encoder.depth) ** -0.5  # smaller in deep encoders, as in `_out_scale`
    qkv = ParamSpec((width, heads, head_dim), ("embed", "heads", "head_dim"), scale=scale)
    return {
        "attention_norm": _ones(width, "embed"),
        "attention": {
            "q": qkv,
            "k": qkv,
            "v": qkv,
            "q_norm": _ones(head_dim, "head_dim"),
            "k_norm": _ones(head_dim, "head_dim"),
            "o": ParamSpec(
                (heads, head_dim, width), ("heads", "head_dim", "embed"), scale=out * scale
            ),
        },
        "mlp_norm": _ones(width, "embed"),
        "mlp": {
            "in": ParamSpec((width, hidden), ("embed", "mlp"), scale=scale),
            "out": ParamSpec((hidden, width), ("mlp", "embed"), scale=out * hidden**-0.5),
        },
    }


def _ones(width: int, axis: str) -> ParamSpec:
    return ParamSpec((width,), (axis,), "constant", 1.0)


# --- what is read off the table -------------------------------------------------------------------


def flatten(tree: Tree) -> dict[str, Any]:
    """A nested dict as one dict with paths for keys, sorted: `{"layers/0/attention/q": leaf}`."""
    return dict(sorted(_leaves(tree, "")))


def _leaves(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflatten(flat: dict[str, Any]) -> Tree:
    """The nested dict of `flatten`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_specs(
    config: ModelConfig, build: Callable[[str, ParamSpec], Any], stacked: bool = False
) -> Tree:
    """`build(path, spec)` of every parameter, in the structure of the parameters."""
    specs = flatten(param_specs(config, stacked))
    return unflatten({path: build(path, spec) for path, spec in specs.items()})


def abstract_params(config: ModelConfig, stacked: bool = False) -> Tree:
    """Shapes and dtypes (`jax.ShapeDtypeStruct`) of the parameters; nothing is allocated."""

    def build(_: str, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype))

    return map_specs(config, build, stacked)


def init_params(config: ModelConfig, key: jax.Array) -> Tree:
    """Fresh parameters. An array depends on `key` and its own path only, so that adding a layer
    leaves the others as they were.

    Values are drawn by NumPy on the host: the same on every device, and nothing is compiled (one
    program for each of forty shapes takes XLA longer than the first training steps). So `key` must be
    concrete: call this outside `jit`.
    """
    specs = flatten(param_specs(config))
    seed = np.asarray(jax.random.key_data(key)).tolist()

    def build(path: str, spec: ParamSpec) -> np.ndarray:
        match spec.init:
            case "constant":
                value = np.full(spec.shape, spec.scale)
            case "identity":
                value = np.zeros(spec.shape)
                value[0] = spec.scale
            case "repeat":
                source = path.rpartition("/")[0] + "/" + spec.source
                value = build(source, specs[source])
                value = np.repeat(value, spec.shape[1] // value.shape[1], axis=1)
            case _:
                own = np.random.Generator(np.random.Philox([*seed, zlib.crc32(path.encode())]))
                value = own.standard_normal(spec.shape, np.float32) * np.float32(spec.scale)
        return value.astype(spec.dtype)

    return map_specs(config, lambda path, spec: jnp.asarray(build(path, spec)))


def count_params(config: ModelConfig) -> tuple[int, int]:
    """Number of parameters in all, and those that one token runs through.

    Of the experts only the chosen `top_k` are active; the embedding and the encoders count whole.
    """
    total = active = 0
    for spec in flatten(param_specs(config)).values():
        total += spec.size
        if config.moe is not None and spec.axes[0] == "expert" and len(spec.axes) > 1:
            active += spec.size * config.moe.top_k // config.moe.experts
        else:
            active += spec.size
    return total, active


def describe(config: ModelConfig) -> str:
    """The parameters as text, one a line: path, shape, dtype, logical axes, initial values. Layers that
    have the same ones are one block under their numbers.
    """
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    for path, spec in flatten(param_specs(config)).items():
        shape = "x".join(map(str, spec.shape))
        axes = ",".join(axis or "-" for axis in spec.axes)
        init = f"repeat {spec.source}" if spec.init == "repeat" else f"{spec.init} {spec.scale:.4g}"
        layer = re.fullmatch(r"(.*\blayers/\d+)/(.*)", path)
        where, name = layer.groups() if layer else ("", path)
        groups.setdefault(where, {})[name] = (shape, spec.dtype, axes, init)
    alike: dict[Any, list[str]] = {}
    for where, table in groups.items():
        prefix, _, number = where.rpartition("/")
        alike.setdefault((prefix, tuple(table.items())), []).append(number)
    lines = []
    for (prefix, rows), numbers in alike.items():
        if prefix:
            lines.append(f"{prefix}/{','.join(sorted(numbers, key=int))}")
        indent = "  " if prefix else ""
        cells = [(indent + name, *row) for name, row in rows]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        for row in cells:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    total, active = count_params(config)
    return "\n".join([*lines, f"total {total:,}  active per token {active:,}", ""])


_ALWAYS_FLOAT32 = ("router", "router_bias", "sink", "log_temperature")


def in_dtype(params: Tree, dtype: Any) -> Tree:
    """Parameters, or those of a layer, as they are multiplied where activations have this dtype.

    Routers, indices, norms, sinks and temperatures stay float32: they are small, and they decide.
    """

    def cast(path: str, leaf: Any) -> Any:
        name = path.rpartition("/")[2]
        decides = name in _ALWAYS_FLOAT32 or is_balance_bias(path) or is_index(path)
        stays = decides or name.endswith("norm")
        return leaf if stays or leaf.dtype == dtype else leaf.astype(dtype)

    return unflatten({path: cast(path, leaf) for path, leaf in flatten(params).items()})


def is_balance_bias(path: str) -> bool:
    """Whether a path names a router's balance bias: moved by load (see moe.py), not by gradient."""
    return path.endswith("moe/bias")


def is_index(path: str) -> bool:
    """Whether a path names a parameter of the index of an attention layer (see index.py)."""
    return "index" in path.split("/")
