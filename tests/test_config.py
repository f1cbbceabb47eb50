"""Configurations and the table of parameters: presets as recorded, mistakes named, nothing lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemtool.errors import GemtoolError
from gemtool.model import params
from gemtool.model.config import PRESETS, ModelConfig, load_preset
from gemtool.model.kinds import IndexConfig
from tests.test_model import CHUNKED, IMPORTED, PARALLEL, TINY

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets_are_as_recorded(name: str) -> None:
    """On purpose? Write params.describe(config) to tests/golden/NAME.txt and review the difference."""
    assert params.describe(load_preset(name)) == (GOLDEN / f"{name}.txt").read_text("utf-8")


ALL = [TINY, IMPORTED, CHUNKED, PARALLEL]


def indexed() -> ModelConfig:
    """TINY with an index, and a layer that shares its keys."""
    window, full = TINY.kinds
    index = IndexConfig(block=4, landmarks=2, dim=4, hidden=8, local=1, select=2)
    full = dataclasses.replace(full, attention="indexed", rope_theta=0.0, index=index)
    own = {"key_shift": 0, "tie_qk_init": False}
    shared = dataclasses.replace(full, letter="S", shares="G", **own)
    return dataclasses.replace(TINY, layers="LGLS", kinds=(window, full, shared))


@pytest.mark.parametrize(
    "config", [*ALL, indexed()], ids=["tiny", "imported", "chunked", "parallel", "indexed"]
)
def test_the_table_describes_the_arrays(config: ModelConfig) -> None:
    arrays = params.flatten(params.init_params(config, jax.random.key(0)))
    specs = params.flatten(params.param_specs(config))
    abstract = params.flatten(params.abstract_params(config))
    assert arrays.keys() == specs.keys() == abstract.keys()
    for path, array in arrays.items():
        assert array.shape == specs[path].shape == abstract[path].shape, path
        assert array.dtype == abstract[path].dtype, path
        assert not array.weak_type, path
        assert len(specs[path].axes) == array.ndim, path
    total, active = params.count_params(config)
    assert total == sum(array.size for array in arrays.values())
    assert config.moe is not None
    biases = 16 + 16 + 32 if config.moe.expert_bias else 0
    sleeping = config.moe.experts - config.moe.top_k
    mixtures = sum(config.is_moe(i) for i in range(len(config.layers)))
    assert total - active == sleeping * mixtures * (3 * 32 * 16 + biases)


def test_initial_values_depend_on_the_path_only() -> None:
    one = params.flatten(params.init_params(TINY, jax.random.key(0)))
    taller = dataclasses.replace(TINY, layers="LGLG")
    two = params.flatten(params.init_params(taller, jax.random.key(0)))
    np.testing.assert_array_equal(one["layers/1/attention/k"], two["layers/1/attention/k"])
    assert (one["layers/0/attention/k"] != one["layers/0/attention/v"]).any()
    heads = one["layers/1/attention/q"]
    np.testing.assert_array_equal(heads[:, :1], one["layers/1/attention/k"])
    np.testing.assert_array_equal(heads[:, 1:], one["layers/1/attention/k"])


@pytest.mark.parametrize("config", [*ALL, *map(load_preset, PRESETS)], ids=lambda c: c.layers[:4])
def test_config_round_trips_through_toml(config: ModelConfig) -> None:
    import tomllib

    import tomli_w

    text = tomli_w.dumps({"model": config.to_dict()})
    again = ModelConfig.from_dict(tomllib.loads(text)["model"])
    assert again == config
    assert hash(again) == hash(config)


YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64}


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ((), "d_modle", 3, "model: unknown key 'd_modle'; did you mean 'd_model'?"),
        ((), "d_model", "wide", "model: d_model must be int, not 'wide'"),
        ((), "layers", "LXL", "names the kind 'X'"),
        ((), "kv_dtype", "int3", "kv_dtype must be one of float16, float32"),
        (("kinds", "L"), "windw", 3, "model.kinds.L: unknown key 'windw'; did you mean 'window'?"),
        (("kinds", "L"), "window", 0, "window must be positive for window and chunk"),
        (("kinds", "G"), "kv_heads", 3, r"heads \(2\) must be a multiple of kv_heads \(3\)"),
        (("kinds", "G"), "sink", 1, "sink must be bool"),
        ((), "activation", "relu", "one of swiglu, geglu, clamped_swiglu, clamped_geglu"),
        ((), "glu_limit", 0, "glu_limit must be positive"),
        ((), "logit_soft_cap", -1.0, "logit_soft_cap must not be negative"),
        (("kinds", "G"), "window", 8, "0 for full and indexed attention, not 8"),
        (("kinds", "L"), "rope_scaling", 2, "model.kinds.L.rope_scaling must be a table, not 2"),
        (("kinds", "L"), "rope_scaling", {"kind": "yarn"}, "rope_scaling: missing factor"),
        (("kinds", "L"), "rope_scaling", {"kind": "x", "factor": 2}, "one of linear, ntk, yarn"),
        (("kinds", "L"), "rope_scaling", {"kind": "ntk", "factor": 0.5}, "factor must be at least"),
        (("kinds", "L"), "rope_scaling", YARN | {"original_length": 0}, "original_length must be"),
        (
            ("kinds", "L"),
            "rope_scaling",
            YARN | {"slow": 40.0},
            r"slow \(40.0\) must be below fast",
        ),
        (("kinds", "G"), "rope_scaling", YARN, "rope_scaling needs a rope_theta above 1"),
        (("moe",), "groups", 3, r"experts \(4\) must be a multiple of groups \(3\)"),
        (("moe",), "top_groups", 2, r"top_groups \(2\) must be at most groups \(1\)"),
        (("moe",), "weigh", "twice", "weigh must be one of output, input"),
        (("moe",), "every", 0, "every must be positive"),
        (("moe",), "top_k", 9, r"top_k \(9\) must not exceed experts \(4\)"),
        (("encoders", "visual"), "tokens", 15, "square number of patches, not 15"),
        (("encoders", "visual"), "features", 13, "3 x a square number of pixels, not 13"),
        (
            ("encoders", "visual"),
            "overlap",
            3,
            r"overlap \(3\) must not exceed the patch, 2 pixels",
        ),
        (
            ("encoders", "visual"),
            "width",
            20,
            r"width \(20\) must be a multiple of 4 x heads \(2\)",
        ),
        (("encoders", "visual"), "kernels", [3], "kernels are for audio"),
        (("encoders", "visual"), "hiden", 3, "visual: unknown key 'hiden'; did you mean 'hidden'?"),
        (("encoders", "audio"), "mels", 3, r"features \(8\) must be a multiple of mels \(3\)"),
        (("encoders", "audio"), "overlap", 1, "overlap is for visual encoders"),
        (("encoders", "audio"), "kernels", [], "kernels must have at least one convolution"),
        (
            ("encoders", "audio"),
            "kernels",
            [3, 5],
            "moves on by 4 spans 4, 6, 8, ... frames, not 5",
        ),
        (
            ("encoders", "audio"),
            "kernels",
            [2, 4],
            "moves on by 1 spans 1, 3, 5, ... frames, not 2",
        ),
        (("encoders", "audio"), "kernels", 3, "audio: kernels must be a list of int, not 3"),
        (("encoders", "audio"), "kernels", [3.0], "kernels must be a list of int"),
    ],
)
def test_bad_configs_say_what_is_wrong(where: Any, key: str, value: Any, message: str) -> None:
    table = TINY.to_dict()
    node = table
    for name in where:
        node = node[name]
    node[key] = value
    with pytest.raises(GemtoolError, match=message):
        ModelConfig.from_dict(table)


def test_missing_key_and_unknown_preset() -> None:
    table = TINY.to_dict()
    del table["d_ff"]
    with pytest.raises(GemtoolError, match="model: missing d_ff"):
        ModelConfig.from_dict(table)
    with pytest.raises(GemtoolError, match="unknown preset 'nanoo'; did you mean 'nano'"):
        load_preset("nanoo")


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("nano", 3e6, 6e6), ("mini", 3e7, 1.1e8), ("flash", 5e9, 1e10), ("pro", 2e10, 3e11)],
)
def test_size_of_presets(name: str, least: float, most: float) -> None:
    total, active = params.count_params(load_preset(name))
    assert least < active <= total < most
