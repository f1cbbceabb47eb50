"""How a kind of layer attends, as data: `LayerKind`, the scaling of its rotary positions, its index."""

from __future__ import annotations

from dataclasses import dataclass

from gemtool.model.tables import choice, not_negative, positive, require


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for sequences longer than those first trained on.

    `kind`             "linear": all divided by `factor` (arXiv 2306.15595);
                       "ntk": a larger base, such that the lowest is divided by `factor` and the
                       highest is kept ("NTK-aware", arXiv 2309.00071, section 3.1);
                       "yarn": divided, kept or in between by dimension (arXiv 2309.00071);
                       "llama3": the same by wavelength (arXiv 2407.21783).
    `original_length`  sequence length of the first training ("yarn", "llama3").
    `slow`, `fast`     a frequency that turns fewer than `slow` times within that length is divided,
                       one that turns more than `fast` times is kept. Usually 1 and 32 for "yarn", 1
                       and 4 for "llama3".
    `truncate`         "yarn": whether the dimensions that `slow` and `fast` fall on are rounded
                       outwards to whole ones.
    `amplitude`        "yarn": what rotated queries and keys are multiplied by; 0: 0.1 log(factor) + 1.
    """

    kind: str
    factor: float
    original_length: int = 0
    slow: float = 1.0
    fast: float = 32.0
    truncate: bool = True
    amplitude: float = 0.0

    def __post_init__(self) -> None:
        where = "rope_scaling"
        choice(where, self, "kind", ("linear", "ntk", "yarn", "llama3"))
        require(self.factor >= 1, f"{where}: factor must be at least 1, not {self.factor}")
        not_negative(where, self, "amplitude")
        if self.kind in ("yarn", "llama3"):
            positive(where, self, "original_length", "slow")
            require(
                self.slow < self.fast,
                f"{where}: slow ({self.slow}) must be below fast ({self.fast})",
            )


@dataclass(frozen=True)
class IndexConfig:
    """How the queries of an "indexed" layer find the blocks of keys that they attend to.

    A query attends to its own block and the `local` ones before it, and to those that it chooses among
    all earlier ones. A small network makes of every query a vector, and of the keys of a block a few,
    its landmarks; a block scores as high as the best product of its landmarks with the vectors of the
    query and of the few before it. What is chosen depends on the content and on absolute positions
    only, not on how a sequence was cut into steps.

    `block`        positions of a block.
    `landmarks`    vectors that summarise a block, each a mean of its keys' vectors by weights that the
                   network gives too.
    `dim`          of a landmark and of a query's vector, which have length one.
    `hidden`       width of the network's hidden layer, which queries and keys share.
    `local`        blocks before its own that a query attends to in any case.
    `select`       blocks that it chooses at positions below 2 * `floor`,
    `growth`       and how many more with each doubling from there.
    `floor`
    `sticky`       the scores of so many queries, itself and those before it, count for a query.
    `temperature`  what scores are multiplied by where the index learns, at first.
    `horizon`      the position whose queries it learns from, where those of a layer grow with their
                   position (`length_scale`): what far ones look for is to be found.
    """

    block: int = 64
    landmarks: int = 4
    dim: int = 32
    hidden: int = 128
    local: int = 2
    select: int = 16
    growth: int = 2
    floor: int = 16384
    sticky: int = 8
    temperature: float = 16.0
    horizon: int = 1_000_000

    def __post_init__(self) -> None:
        positive("index", self, "block", "landmarks", "dim", "hidden", "select", "floor", "sticky")
        positive("index", self, "temperature", "horizon")
        not_negative("index", self, "local", "growth")
        require(
            self.block & (self.block - 1) == 0 and self.block <= 4096,
            f"index: block ({self.block}) must be a power of two of at most 4096",
        )

    def most(self, capacity: int) -> int:
        """Blocks that a query at a position below `capacity` chooses at most."""
        return self.select + self.growth * max((capacity // self.floor).bit_length() - 1, 0)


@dataclass(frozen=True)
class LayerKind:
    """How one kind of layer attends.

    `attention`      "window": the last `window` positions, itself included; "chunk": the positions so
                     far of its own chunk of `window`, counted from the document's beginning;
                     "full": all so far; "indexed": all so far in training, and in inference those
                     of a few blocks, which an index chooses.
    `rope_theta`     base of the rotary position embedding (arXiv 2104.09864); 0: no position encoding.
    `rope_scaling`   how its frequencies are lowered for longer sequences, if they are.
    `qk_norm`        "unit": queries and keys of length one, times a learned temperature that starts at
                     `temperature`; "rms": RMSNorm of each head with learned scales; "rms_joint": of all
                     heads as one vector; "rms_plain": of each head without scales; "none".
    `score_scale`    what scores are multiplied by; 0: 1 with "unit", else head_dim ** -0.5.
    `soft_cap`       scores become cap * tanh(scores / cap) (arXiv 2408.00118); 0: they do not.
    `sink`           a learned logit a head that takes attention and gives nothing (arXiv 2309.17453).
    `length_scale`   queries grow with their position p, by 1 + length_scale * log(1 + floor((p + 1) /
    `length_floor`   length_floor)), so that softmax stays as sharp among more keys (arXiv 2501.19399).
                     length_scale 0: they do not.
    `qkv_bias`       whether queries, keys and values have a bias.
    `out_bias`       whether the output projection has.
    `qk_conv`        width of the depthwise causal convolution that feeds queries and keys; 1: none.
    `conv_init`      "identity": starts as no convolution; "spread": starts as a random mix of all taps.
    `key_shift`      1: the key of position t sees t-1 and before, never t. A query that matches the
                     tokens before t then retrieves the *value* of t, the token that came next: an
                     induction head (arXiv 2209.11895) in one layer instead of two.
    `tie_qk_init`    W_q starts equal to W_k, so that equal contexts match before any training.
    `index`          the index of an "indexed" kind.
    `shares`         the letter of another kind, of which there is one layer, before all of this kind:
                     queries attend to its keys and values, and choose among its landmarks, so that a
                     context is kept once for all of them (YOCO, arXiv 2405.05254). "": to its own.
    """

    letter: str
    attention: str = "full"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    window: int = 0
    rope_theta: float = 0.0
    rope_scaling: RopeScaling | None = None
    qk_norm: str = "unit"
    temperature: float = 12.0
    score_scale: float = 0.0
    soft_cap: float = 0.0
    sink: bool = False
    length_scale: float = 0.0
    length_floor: int = 8192
    qkv_bias: bool = False
    out_bias: bool = False
    qk_conv: int = 1
    conv_init: str = "identity"
    key_shift: int = 0
    tie_qk_init: bool = False
    index: IndexConfig | None = None
    shares: str = ""

    def __post_init__(self) -> None:
        where = f"layer kind {self.letter!r}"
        require(len(self.letter) == 1, f"{where}: its name must be a single letter")
        choice(where, self, "attention", ("window", "chunk", "full", "indexed"))
        require(
            (self.index is not None) == (self.attention == "indexed"),
            f"{where}: indexed attention, and no other, has a table `index`",
        )
        choice(where, self, "qk_norm", ("unit", "rms", "rms_joint", "rms_plain", "none"))
        choice(where, self, "conv_init", ("identity", "spread"))
        positive(where, self, "heads", "kv_heads", "head_dim", "qk_conv", "length_floor")
        not_negative(where, self, "rope_theta", "score_scale", "soft_cap", "length_scale")
        require(
            self.heads % self.kv_heads == 0,
            f"{where}: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        require(
            (self.window > 0) == self.bounded,
            f"{where}: window must be positive for window and chunk attention and 0 for full and "
            f"indexed attention, not {self.window}",
        )
        require(self.key_shift in (0, 1), f"{where}: key_shift must be 0 or 1")
        require(
            not self.shares or not (self.bounded or self.key_shift or self.tie_qk_init),
            f"{where}: has no keys of its own: a kind that shares another's attends to all of them "
            "(full or indexed), without key_shift and tie_qk_init",
        )
        require(
            self.rope_theta == 0 or self.head_dim % 2 == 0,
            f"{where}: rotary positions need an even head_dim, not {self.head_dim}",
        )
        require(
            self.rope_scaling is None or self.rope_theta > 1,
            f"{where}: rope_scaling needs a rope_theta above 1, not {self.rope_theta}",
        )
        require(
            self.rope_scaling is None or self.rope_scaling.kind != "ntk" or self.head_dim > 2,
            f"{where}: ntk scaling needs a head_dim above 2",
        )
        require(
            self.qk_norm != "unit" or self.temperature > 0, f"{where}: temperature must be positive"
        )

    @property
    def bounded(self) -> bool:
        """Whether a query reaches back a bounded way, so that `window` rows of cache suffice."""
        return self.attention in ("window", "chunk")

    @property
    def grows(self) -> bool:
        """Whether it keeps keys and values of its own that grow with the context."""
        return not (self.bounded or self.shares)

    @property
    def reach(self) -> int:
        """Positions before one that its output needs, beside those that blocks keep."""
        looks_back = 0 if self.index is None else self.index.sticky - 1
        return (self.window - 1 if self.bounded else looks_back) + self.conv_tail

    @property
    def conv_tail(self) -> int:
        """Rows before a position that its query and key still see through convolution and shift."""
        return self.qk_conv - 1 + self.key_shift

    @property
    def scale(self) -> float:
        """What scores are multiplied by beside a learned temperature."""
        return self.score_scale or (1.0 if self.qk_norm == "unit" else self.head_dim**-0.5)
