"""Models of transformers as ours: a family is a configuration and a table of names, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemtool.model import params
from gemtool.model.config import ModelConfig

Table = dict[str, str | tuple[str, Callable[[np.ndarray], np.ndarray]]]
"""Paths of ours to their names, and how an array of theirs becomes ours where it takes more than to
transpose and reshape it. `{i}` is the number of a layer."""

ATTENTION: Table = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
    "layers/{i}/attention_norm": "model.layers.{i}.input_layernorm.weight",
    "layers/{i}/mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    **{
        f"layers/{{i}}/attention/{name}": f"model.layers.{{i}}.self_attn.{name}_proj.weight"
        for name in "qkvo"
    },
}
QK_NORM: Table = {
    f"layers/{{i}}/attention/{name}_norm": f"model.layers.{{i}}.self_attn.{name}_norm.weight"
    for name in "qk"
}


def mlp(ours: str, theirs: str) -> Table:
    """A dense gated network."""
    names = ("gate", "up", "down")
    return {
        f"layers/{{i}}/{ours}/{name}": f"model.layers.{{i}}.{theirs}.{name}_proj.weight"
        for name in names
    }


def experts(theirs: str, gate: slice, up: slice, transposed: bool) -> Table:
    """Experts whose gate and up projections are one array, and how to tell them apart."""

    def ours(x: np.ndarray) -> np.ndarray:
        return x.swapaxes(1, 2) if transposed else x

    return {
        "layers/{i}/moe/gate": (f"{theirs}.gate_up_proj", lambda x: ours(x)[..., gate]),
        "layers/{i}/moe/up": (f"{theirs}.gate_up_proj", lambda x: ours(x)[..., up]),
        "layers/{i}/moe/down": (f"{theirs}.down_proj", ours),
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """`model` and `theirs` make a model of transformers; `ours` and `table` say the same here."""

    model: str
    theirs: dict[str, Any]
    ours: ModelConfig
    table: Table


def convert(family: Family, model: Any) -> params.Tree:
    """Our parameters of their model. Every array of ours must have a name, and theirs all be used."""
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}
    used = set()
    flat = {}
    for path, spec in params.flatten(params.param_specs(family.ours)).items():
        layer = path.split("/")[1] if path.startswith("layers/") else ""
        entry = family.table[path.replace(f"layers/{layer}/", "layers/{i}/") if layer else path]
        name, change = entry if isinstance(entry, tuple) else (entry, None)
        name = name.format(i=layer)
        array = state[name]
        if change is not None:
            array = change(array)
        elif array.ndim == 2 and name.endswith(".weight") and spec.axes[0] != "vocab":
            array = array.T
        used.add(name)
        flat[path] = jnp.asarray(np.ascontiguousarray(array.reshape(spec.shape)))
    assert used == state.keys()
    return params.unflatten(flat)
