"""Model architecture as data: frozen, hashable dataclasses that read from and write to TOML tables.

A `ModelConfig` names a decoder. Its `layers` pattern (`"LLGL"`) spells one letter a layer,
each letter standing for a `LayerKind` in the table `kinds`. Because every dataclass here is
hashable, a config can be a static argument of `jax.jit`. This module never imports jax.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from gemtool.errors import GemtoolError, did_you_mean

PRESETS = ("nano",)


class ConfigError(GemtoolError):
    """An architecture that does not make sense, or a key that is not known (exit 1)."""


@dataclass(frozen=True)
class LayerKind:
    """How one kind of layer attends.

    `attention`      "window": the last `window` positions, itself included; "full": all so far.
    `rope_theta`     base of the rotary position embedding (arXiv 2104.09864); 0: no position encoding.
    `qk_norm`        "unit": queries and keys of length one, times a learned temperature that starts at
                     `temperature`; "rms": RMSNorm with learned scales; "none". The last two divide
                     the scores by sqrt(head_dim).
    `sink`           a learned logit a head that takes attention and gives nothing (arXiv 2309.17453).
    `qk_conv`        width of the depthwise causal convolution that feeds queries and keys; 1: none.
    `conv_init`      "identity": starts as no convolution; "spread": starts as a random mix of all taps.
    `key_shift`      1: the key of position t sees t-1 and before, never t. A query that matches the
                     tokens before t then retrieves the *value* of t, the token that came next: an
                     induction head (arXiv 2209.11895) in one layer instead of two.
    `tie_qk_init`    W_q starts equal to W_k, so that equal contexts match before any training.
    """

    letter: str
    attention: str = "full"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    window: int = 0
    rope_theta: float = 0.0
    qk_norm: str = "unit"
    temperature: float = 12.0
    sink: bool = False
    qk_conv: int = 1
    conv_init: str = "identity"
    key_shift: int = 0
    tie_qk_init: bool = False

    def __post_init__(self) -> None:
        where = f"layer kind {self.letter!r}"
        _require(len(self.letter) == 1, f"{where}: its name must be a single letter")
        _choice(where, "attention", self.attention, ("window", "full"))
        _choice(where, "qk_norm", self.qk_norm, ("unit", "rms", "none"))
        _choice(where, "conv_init", self.conv_init, ("identity", "spread"))
        _positive(where, self, "heads", "kv_heads", "head_dim", "qk_conv")
        _require(
            self.heads % self.kv_heads == 0,
            f"{where}: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        _require(
            (self.window > 0) == (self.attention == "window"),
            f"{where}: window must be positive for window attention and 0 for full attention, "
            f"not {self.window}",
        )
        _require(self.key_shift in (0, 1), f"{where}: key_shift must be 0 or 1")
        _require(self.rope_theta >= 0, f"{where}: rope_theta must not be negative")
        _require(
            self.rope_theta == 0 or self.head_dim % 2 == 0,
            f"{where}: rotary positions need an even head_dim, not {self.head_dim}",
        )
        _require(
            self.qk_norm != "unit" or self.temperature > 0, f"{where}: temperature must be positive"
        )

    @property
    def conv_tail(self) -> int:
        """Rows before a position that its query and key still see through convolution and shift."""
        return self.qk_conv - 1 + self.key_shift


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: each token runs through its `top_k` of `experts` SwiGLU networks.

    `balance`    "bias": auxiliary-loss-free balancing (arXiv 2408.15664), a bias that only decides who
                 is chosen and that training moves by `bias_rate` a step; "auxiliary": the load
                 balancing loss of the Switch Transformer (arXiv 2101.03961), times `auxiliary_loss`.
    `score`      "softmax" over experts or independent "sigmoid" of the router's logits.
    `z_loss`     weight of the squared log-partition of the router (arXiv 2202.08906).
    """

    experts: int
    top_k: int
    d_expert: int
    shared_experts: int = 0
    balance: str = "bias"
    bias_rate: float = 0.001
    auxiliary_loss: float = 0.01
    z_loss: float = 0.001
    score: str = "softmax"

    def __post_init__(self) -> None:
        _positive("moe", self, "experts", "top_k", "d_expert")
        _choice("moe", "balance", self.balance, ("bias", "auxiliary"))
        _choice("moe", "score", self.score, ("softmax", "sigmoid"))
        _require(
            self.top_k <= self.experts,
            f"moe: top_k ({self.top_k}) must not exceed experts ({self.experts})",
        )
        _require(self.shared_experts >= 0, "moe: shared_experts must not be negative")


@dataclass(frozen=True)
class EncoderConfig:
    """The network that turns one modality's raw features into soft tokens.

    `kind`         "visual" or "audio".
    `tokens`       most soft tokens a group: patches of a frame (256 or 64), or of a second of audio.
    `features`     raw features a soft token: 588 = 14 x 14 pixels x 3; 320 = 4 log-mel frames x 80.
    `normalise`    "row": each soft token to mean 0 and deviation 1; "pixel": x / 127.5 - 1; "none".
    `depth`        residual MLP blocks after the first projection.
    """

    kind: str
    tokens: int
    features: int
    hidden: int = 256
    depth: int = 0
    normalise: str = "row"

    def __post_init__(self) -> None:
        where = f"encoder {self.kind!r}"
        _choice("encoders", "name", self.kind, ("visual", "audio"))
        _positive(where, self, "tokens", "features", "hidden")
        _choice(where, "normalise", self.normalise, ("row", "pixel", "none"))
        _require(self.depth >= 0, f"{where}: depth must not be negative")
        _require(
            self.kind != "visual" or self.side**2 == self.tokens,
            f"{where}: tokens must be a square number of patches, not {self.tokens}",
        )

    @property
    def side(self) -> int:
        """Patches along one side of a square frame."""
        return round(self.tokens**0.5)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with pre-norm blocks over text and soft tokens.

    `layers` spells the kind of each layer; the first `dense_layers` have a dense SwiGLU of width
    `d_ff`, the others a mixture of experts where `moe` is given. `embedding_scale` multiplies
    token embeddings: with sqrt(d_model) they start with deviation 1 and are not drowned by what the
    layers add, though the same table, unscaled, scores the next token. `kv_dtype` is what keys and
    values are rounded to, in training too, so that a cache loses nothing.
    """

    name: str
    vocab_size: int
    d_model: int
    layers: str
    kinds: tuple[LayerKind, ...]
    d_ff: int
    dense_layers: int = 1
    moe: MoEConfig | None = None
    encoders: tuple[EncoderConfig, ...] = ()
    embedding_scale: float = 1.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    kv_dtype: str = "float16"

    def __post_init__(self) -> None:
        _positive("model", self, "vocab_size", "d_model", "d_ff", "embedding_scale")
        _choice("model", "kv_dtype", self.kv_dtype, ("float16", "float32"))
        _require(self.layers != "", "model: layers must name at least one layer, such as 'LLGL'")
        letters = [kind.letter for kind in self.kinds]
        for letter in dict.fromkeys(self.layers):
            _require(
                letter in letters,
                f"model: layers {self.layers!r} names the kind {letter!r}, "
                f"which is not among kinds {', '.join(letters) or '(none)'}",
            )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, first to last."""
        table = {kind.letter: kind for kind in self.kinds}
        return tuple(table[letter] for letter in self.layers)

    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward part of a layer (counted from 0) is a mixture of experts."""
        return self.moe is not None and layer >= self.dense_layers

    def encoder(self, kind: str) -> EncoderConfig:
        """The encoder of "visual" or "audio"; ConfigError where the model has none."""
        for encoder in self.encoders:
            if encoder.kind == kind:
                return encoder
        raise ConfigError(f"model {self.name!r} has no {kind} encoder: it cannot take {kind} input")

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> ModelConfig:
        """Builds a config from TOML tables; an unknown key or a value of a wrong type is an error."""
        table = dict(table)
        table["kinds"] = tuple(
            _build(LayerKind, {"letter": letter, **kind}, f"model.kinds.{letter}")
            for letter, kind in table.get("kinds", {}).items()
        )
        table["encoders"] = tuple(
            _build(EncoderConfig, {"kind": kind, **encoder}, f"model.encoders.{kind}")
            for kind, encoder in table.get("encoders", {}).items()
        )
        if table.get("moe") is not None:
            table["moe"] = _build(MoEConfig, table["moe"], "model.moe")
        return _build(cls, table, "model")

    def to_dict(self) -> dict[str, Any]:
        """The tables that `from_dict` reads; keys that are None are left out, as TOML asks."""
        table = dataclasses.asdict(self)
        table["kinds"] = {kind.pop("letter"): kind for kind in table["kinds"]}
        table["encoders"] = {encoder.pop("kind"): encoder for encoder in table["encoders"]}
        return {key: value for key, value in table.items() if value is not None}


def load_preset(name: str) -> ModelConfig:
    """A shipped architecture by name."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ConfigError(
            f"unknown preset {name!r}{did_you_mean(name, PRESETS)} (there is: {known})"
        )
    text = resources.files("gemtool.model").joinpath("presets", f"{name}.toml").read_text("utf-8")
    return ModelConfig.from_dict(tomllib.loads(text))


_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def _build(cls: type[Any], table: dict[str, Any], where: str) -> Any:
    """A dataclass from a table, checked key by key and type by type."""
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
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in table
    ]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    # TOML writes 10000 where a float is meant; one spelling, so that equal configs compare equal.
    values = {k: float(v) if fields[k].type == "float" else v for k, v in table.items()}
    return cls(**values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _choice(where: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{where}: {key} must be one of {', '.join(allowed)}, not {value!r}")


def _positive(where: str, table: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(table, key)
        _require(value > 0, f"{where}: {key} must be positive, not {value}")
