"""A model of random weights, and its files for the programs of `bench/peers.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemtool.checkpoint import write_checkpoint
from gemtool.data.settings import MediaSettings
from gemtool.data.vocab import Vocab
from gemtool.model.config import LayerKind, ModelConfig
from tests.families import ATTENTION, QK_NORM, Family, convert, mlp

THETA = 1e6
POSITIONS = 32768


def qwen3(
    layers: int = 12, width: int = 512, heads: tuple[int, int] = (8, 4), hidden: int = 1536
) -> Family:
    """A dense Qwen3 with our vocabulary: 55 million parameters, or a smaller one."""
    vocab, head_dim = Vocab.load().size, 64
    theirs = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "intermediate_size": hidden,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }
    kind = LayerKind("G", "full", *heads, head_dim=head_dim, rope_theta=THETA, qk_norm="rms")
    ours = ModelConfig(
        "qwen3", vocab, width, "G" * layers, (kind,), hidden, layers, tie_embeddings=False
    )
    return Family("Qwen3", theirs, ours, ATTENTION | QK_NORM | mlp("mlp", "mlp"))


def write_model(family: Family, folder: Path) -> None:
    """Draws weights, float32, and writes them for gemtool and transformers, and, where the package
    gguf is installed, for llama.cpp, as float32 and as float16.

    Raises:
        ImportError: torch or transformers is not installed.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.model}Config")(**family.theirs)
    model = getattr(transformers, f"{family.model}ForCausalLM")(config).float().eval()
    model.save_pretrained(folder / "transformers")
    params = convert(family, model)
    write_checkpoint(folder / "gemtool", family.ours, params, Vocab.load(), MediaSettings(), {}, 0)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for dtype in ("float32", "float16"):
        write_gguf(folder / f"{dtype}.gguf", family.theirs, weights, dtype)


def write_gguf(
    path: Path, settings: dict[str, Any], weights: dict[str, np.ndarray], dtype: str
) -> None:
    """A Qwen3 for llama.cpp, without a tokenizer; vectors are float32 in any case. Nothing is written
    where the package gguf is not installed."""
    try:
        import gguf
    except ImportError:
        return
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_value_length(settings["head_dim"])
    writer.add_rope_freq_base(settings["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, settings["num_hidden_layers"])
    for name, array in weights.items():
        kept = array.astype("float32" if array.ndim == 1 else dtype)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
