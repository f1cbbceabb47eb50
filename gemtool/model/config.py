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

from gemtool.errors import did_you_mean
from gemtool.model.kinds import IndexConfig, LayerKind, RopeScaling
from gemtool.model.tables import (
    ConfigError,
    build,
    choice,
    not_negative,
    positive,
    require,
    without_none,
)

PRESETS = ("nano", "mini", "flash", "pro")
"""From the smallest to the largest."""


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: each token runs through its `top_k` of `experts` gated networks.

    `shared_experts`   how many more every token runs through (as one network of that many widths).
    `every`            one layer in so many is a mixture, beginning behind the dense ones; the others
                       are dense.
    `score`            "softmax" over experts or independent "sigmoid" of the router's logits.
    `normalise`        whether the scores of the chosen are divided by their sum. With "softmax" this is
                       the softmax of the chosen logits alone, as taken *after* the choice.
    `weight_scale`     multiplies the weights in the end.
    `weigh`            what the weights multiply: the experts' "output", or their "input".
    `groups`           experts lie in so many equal groups, and a token chooses among those of its
    `top_groups`       best few only, by the sum of their two best scores (arXiv 2412.19437).
    `balance`          "bias": auxiliary-loss-free balancing (arXiv 2408.15664), a bias that only
                       decides who is chosen and that training moves by `bias_rate` a step;
                       "auxiliary": the load balancing loss of the Switch Transformer (arXiv
                       2101.03961), times `auxiliary_loss`.
    `z_loss`           weight of the squared log-partition of the router (arXiv 2202.08906).
    `router_bias`      whether the router's logits have a bias, which gradients train.
    `expert_bias`      whether the three projections of an expert have.
    """

    experts: int
    top_k: int
    d_expert: int
    shared_experts: int = 0
    every: int = 1
    score: str = "softmax"
    normalise: bool = True
    weight_scale: float = 1.0
    weigh: str = "output"
    groups: int = 1
    top_groups: int = 1
    balance: str = "bias"
    bias_rate: float = 0.001
    auxiliary_loss: float = 0.01
    z_loss: float = 0.001
    router_bias: bool = False
    expert_bias: bool = False

    def __post_init__(self) -> None:
        counts = ("experts", "top_k", "d_expert", "every", "groups", "top_groups")
        positive("moe", self, *counts, "weight_scale")
        not_negative("moe", self, "shared_experts", "bias_rate", "auxiliary_loss", "z_loss")
        choice("moe", self, "balance", ("bias", "auxiliary"))
        choice("moe", self, "score", ("softmax", "sigmoid"))
        choice("moe", self, "weigh", ("output", "input"))
        require(
            self.top_k <= self.experts,
            f"moe: top_k ({self.top_k}) must not exceed experts ({self.experts})",
        )
        require(
            self.experts % self.groups == 0,
            f"moe: experts ({self.experts}) must be a multiple of groups ({self.groups})",
        )
        within = self.top_groups * (self.experts // self.groups)
        require(
            self.top_groups <= self.groups and self.top_k <= within,
            f"moe: top_groups ({self.top_groups}) must be at most groups ({self.groups}) and hold "
            f"top_k ({self.top_k}) experts, not {within}",
        )


@dataclass(frozen=True)
class EncoderConfig:
    """The network that turns one modality's raw features into soft tokens.

    `kind`         "visual" or "audio".
    `tokens`       soft tokens a group: patches of a frame (256 or 64), or of a second of audio.
    `features`     raw features a soft token: 588 = 14 x 14 pixels x 3; 320 = 4 log-mel frames x 80.
    `width`        of the layers; the last projection leads to the decoder's width.
    `depth`        bidirectional transformer layers within a group.
    `heads`        of their attention, each of width / heads dimensions.
    `hidden`       width of their feed-forward networks.
    `normalise`    "row": what a soft token is made of, its window of pixels or its log-mel frames, to
                   mean 0 and deviation 1; "pixel": x / 127.5 - 1; "none".
    `overlap`      visual: pixels of the neighbouring patches that a patch sees beyond each side; with
                   7, patches of 14 pixels see windows of 28.
    `mels`         audio: bands of a log-mel frame; a soft token is features / mels frames.
    `kernels`      audio: how many frames each convolution of the stem spans. The last one makes soft
                   tokens: it moves on by a token's frames at a time.
    """

    kind: str
    tokens: int
    features: int
    width: int
    hidden: int
    depth: int = 1
    heads: int = 1
    normalise: str = "row"
    overlap: int = 0
    mels: int = 80
    kernels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"encoder {self.kind!r}"
        choice("encoders", self, "kind", ("visual", "audio"))
        positive(where, self, "tokens", "features", "width", "hidden", "heads", "mels")
        choice(where, self, "normalise", ("row", "pixel", "none"))
        not_negative(where, self, "depth", "overlap")
        # Two places of a patch, each with pairs of dimensions to rotate; one of a moment.
        pairs = 4 if self.kind == "visual" else 2
        require(
            self.width % (self.heads * pairs) == 0,
            f"{where}: width ({self.width}) must be a multiple of {pairs} x heads ({self.heads})",
        )
        if self.kind == "visual":
            self._check_visual(where)
        else:
            self._check_audio(where)

    def _check_visual(self, where: str) -> None:
        require(
            self.side**2 == self.tokens,
            f"{where}: tokens must be a square number of patches, not {self.tokens}",
        )
        require(
            3 * self.patch**2 == self.features,
            f"{where}: features must be 3 x a square number of pixels, not {self.features}",
        )
        require(
            self.overlap <= self.patch,
            f"{where}: overlap ({self.overlap}) must not exceed the patch, {self.patch} pixels wide",
        )
        require(self.kernels == (), f"{where}: kernels are for audio")

    def _check_audio(self, where: str) -> None:
        require(
            self.features % self.mels == 0,
            f"{where}: features ({self.features}) must be a multiple of mels ({self.mels})",
        )
        require(self.overlap == 0, f"{where}: overlap is for visual encoders")
        require(self.kernels != (), f"{where}: kernels must have at least one convolution")
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            require(
                kernel >= stride and (kernel - stride) % 2 == 0,
                f"{where}: kernels {[*self.kernels]}: a convolution that moves on by {stride} spans "
                f"{stride}, {stride + 2}, {stride + 4}, ... frames, not {kernel}",
            )

    @property
    def side(self) -> int:
        """Patches along one side of a square frame."""
        return round(self.tokens**0.5)

    @property
    def patch(self) -> int:
        """Pixels along one side of a square patch."""
        return round((self.features / 3) ** 0.5)

    @property
    def head_dim(self) -> int:
        """Dimensions of a head of attention."""
        return self.width // self.heads

    @property
    def strides(self) -> tuple[int, ...]:
        """Frames that each convolution of the stem moves on by."""
        return (*[1] * (len(self.kernels) - 1), self.features // self.mels)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer over text and soft tokens.

    `layers`           spells the kind of each layer.
    `d_ff`             width of dense feed-forward layers.
    `dense_layers`     how many of the first layers are dense; the others are mixtures of experts where
                       `moe` is given.
    `activation`       of every gated network, dense or expert: "swiglu", "geglu" (with tanh's gelu;
                       both arXiv 2002.05202), "clamped_swiglu" (arXiv 2508.10925), which has
                       `glu_alpha` and `glu_limit`, or "clamped_geglu", which has `glu_limit`.
    `mlp_bias`         whether dense feed-forward projections have biases.
    `parallel`         attention and feed-forward read the same normed rows and are added together
                       (arXiv 2204.02311), instead of one after the other.
    `norm_offset`      RMSNorm multiplies by 1 + w, with w starting at 0, instead of w.
    `post_norms`       what attention and feed-forward give is normed too, before it is added.
    `embedding_scale`  multiplies token embeddings: with sqrt(d_model) they start with deviation 1 and
                       are not drowned by what the layers add, though the same table, unscaled, scores
                       the next token (`tie_embeddings`).
    `logit_soft_cap`   the last logits become cap * tanh(logits / cap); 0: they do not.
    `kv_dtype`         what keys and values are rounded to, in training too, so that a cache loses
                       nothing.
    """

    name: str
    vocab_size: int
    d_model: int
    layers: str
    kinds: tuple[LayerKind, ...]
    d_ff: int
    dense_layers: int = 1
    activation: str = "swiglu"
    glu_alpha: float = 1.702
    glu_limit: float = 7.0
    mlp_bias: bool = False
    parallel: bool = False
    norm_offset: bool = False
    post_norms: bool = False
    moe: MoEConfig | None = None
    encoders: tuple[EncoderConfig, ...] = ()
    embedding_scale: float = 1.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    logit_soft_cap: float = 0.0
    kv_dtype: str = "float16"

    def __post_init__(self) -> None:
        positive("model", self, "vocab_size", "d_model", "d_ff", "embedding_scale")
        positive("model", self, "glu_alpha", "glu_limit")
        not_negative("model", self, "dense_layers", "logit_soft_cap")
        choice("model", self, "kv_dtype", ("float16", "float32"))
        names = ("swiglu", "geglu", "clamped_swiglu", "clamped_geglu")
        choice("model", self, "activation", names)
        require(self.layers != "", "model: layers must name at least one layer, such as 'LLGL'")
        letters = [kind.letter for kind in self.kinds]
        for letter in dict.fromkeys(self.layers):
            require(
                letter in letters,
                f"model: layers {self.layers!r} names the kind {letter!r}, "
                f"which is not among kinds {', '.join(letters) or '(none)'}",
            )
        for kind in self.kinds:
            if kind.shares and kind.letter in self.layers:
                self._check_shared(kind)

    def _check_shared(self, kind: LayerKind) -> None:
        """That there is one layer whose keys those of this kind can attend to."""
        where, letter = f"layer kind {kind.letter!r}", kind.shares
        require(
            self.layers.count(letter) == 1
            and self.layers.index(letter) < self.layers.index(kind.letter),
            f"{where}: shares the keys of {letter!r}, of which there must be one layer, before its "
            f"own, not layers {self.layers!r}",
        )
        (source,) = (other for other in self.kinds if other.letter == letter)
        require(source.grows, f"{where}: {letter!r} keeps no keys that could be shared")
        alike = ("attention", "kv_heads", "head_dim", "rope_theta", "rope_scaling", "index")
        for name in alike:
            mine, theirs = getattr(kind, name), getattr(source, name)
            require(
                mine == theirs,
                f"{where}: its {name} must be that of {letter!r}, whose keys it shares: {theirs}",
            )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, first to last."""
        table = {kind.letter: kind for kind in self.kinds}
        return tuple(table[letter] for letter in self.layers)

    @property
    def has_index(self) -> bool:
        """Whether any layer's attention is indexed."""
        return any(kind.index is not None for kind in self.layer_kinds)

    def source(self, layer: int) -> int:
        """The layer whose keys and values a layer attends to: another one where it shares these."""
        shares = self.layer_kinds[layer].shares
        return self.layers.index(shares) if shares else layer

    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward part of a layer (counted from 0) is a mixture of experts."""
        behind = layer - self.dense_layers
        return self.moe is not None and behind >= 0 and behind % self.moe.every == 0

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
            _layer_kind(letter, kind, f"model.kinds.{letter}")
            for letter, kind in table.get("kinds", {}).items()
        )
        table["encoders"] = tuple(
            build(EncoderConfig, {"kind": kind, **encoder}, f"model.encoders.{kind}")
            for kind, encoder in table.get("encoders", {}).items()
        )
        if table.get("moe") is not None:
            table["moe"] = build(MoEConfig, table["moe"], "model.moe")
        return build(cls, table, "model")

    def to_dict(self) -> dict[str, Any]:
        """The tables that `from_dict` reads; keys that are None are left out, as TOML asks."""
        table = dataclasses.asdict(self)
        table["kinds"] = {kind.pop("letter"): kind for kind in table["kinds"]}
        table["encoders"] = {encoder.pop("kind"): encoder for encoder in table["encoders"]}
        return without_none(table)


def _layer_kind(letter: str, table: dict[str, Any], where: str) -> LayerKind:
    table = {"letter": letter, **table}
    if table.get("index") is not None:
        table["index"] = build(IndexConfig, table["index"], f"{where}.index")
    if table.get("rope_scaling") is not None:
        table["rope_scaling"] = build(RopeScaling, table["rope_scaling"], f"{where}.rope_scaling")
    return build(LayerKind, table, where)


def load_preset(name: str) -> ModelConfig:
    """A shipped architecture by name."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ConfigError(
            f"unknown preset {name!r}{did_you_mean(name, PRESETS)} (there is: {known})"
        )
    text = resources.files("gemtool.model").joinpath("presets", f"{name}.toml").read_text("utf-8")
    return ModelConfig.from_dict(tomllib.loads(text))
