"""Programs that read a text once and keep what they made of it as a file: gemtool, llama.cpp and
transformers, each behind the same methods, for `bench/contexts.py`.

Each runs on one thread, in a process of its own (`measure.OwnProcess`), and imports there only what
it needs. Tokens are int32 [n]; scores are float32 [V].
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np


class Gemtool:
    """Ours: the engine of the verbs, and context files with their checksums, synced to disk."""

    def __init__(self, folder: str) -> None:
        from gemtool.checkpoint import open_checkpoint
        from gemtool.infer.engine import Engine
        from gemtool.runtime import setup_jax

        setup_jax()
        self._engine = Engine(open_checkpoint(Path(folder, "gemtool")))
        self._context: Any = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Reads tokens; the scores after the last one."""
        self._context = self._engine.prefill(tokens, reuse=self._context)
        return self._context.logits

    def save(self, path: str) -> int:
        """Writes what was read to a file, as `gemtool prefill` does; its bytes."""
        from gemtool.stream.context import BLOCK, ContextWriter
        from gemtool.stream.files import atomic_file

        context = self._context
        with atomic_file(Path(path)) as sink:
            writer = ContextWriter(sink, self._engine.header("bench"))
            for start in range(0, context.length, BLOCK):
                stop = min(start + BLOCK, context.length)
                writer.block(context.tokens[start:stop], context.block(start, stop))
            writer.state(context.state())
            writer.end(context.logits)
            writer.close({"text": context.length}, {})
        return Path(path).stat().st_size

    def load(self, path: str, token: np.ndarray) -> np.ndarray:
        """Takes what is in a file in place of what was read; the scores after one more token."""
        from gemtool.infer.contexts import load_context
        from gemtool.stream.context import open_contexts

        self._context = None
        with open_contexts(path) as contexts:
            self._context = load_context(self._engine, next(contexts)).sequence
            return self.decode(token)[0]

    def decode(self, tokens: np.ndarray) -> list[np.ndarray]:
        """After what was read, each token by itself; the scores after each. What was read stays."""
        found = []
        with self._context.fork() as live:
            for token in tokens:
                live.extend(token[None])
                found.append(live.logits)
        return found


class Transformers:
    """A model of transformers on torch (sdpa), and its cache as torch saves it.

    Args:
        model: one of transformers, or the folder of `formats.write_model`.
    """

    def __init__(self, model: Any) -> None:
        if isinstance(model, str):
            import torch
            from transformers import AutoModelForCausalLM
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
            torch.set_num_threads(1)
            model = AutoModelForCausalLM.from_pretrained(
                Path(model, "transformers"), dtype=torch.float32, attn_implementation="sdpa"
            ).eval()
        self.model = model
        self.cache: Any = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """As `Gemtool.prefill`."""
        self.cache = None
        return self._run(tokens)

    def save(self, path: str) -> int:
        """As `Gemtool.save`."""
        import torch

        torch.save(self.cache, path)
        return Path(path).stat().st_size

    def load(self, path: str, token: np.ndarray) -> np.ndarray:
        """As `Gemtool.load`."""
        import torch

        self.cache = torch.load(path, weights_only=False)
        return self.decode(token)[0]

    def decode(self, tokens: np.ndarray) -> list[np.ndarray]:
        """As `Gemtool.decode`."""
        found = [self._run(token[None]) for token in tokens]
        self.cache.crop(-len(tokens))
        return found

    def _run(self, tokens: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(tokens[None].astype(np.int64))
            out = self.model(ids, cache=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = out.cache
            return out.logits[0, -1].numpy()


class LlamaCpp:
    """llama.cpp through the bindings of llama-cpp-python, and its session files.

    Args:
        folder: of `formats.write_model`.
        weights: "float32" or "float16", which of its files; keys and values are float16, its default.
        flash: attend as it does by default, or by matrix multiplications.
        capacity: positions that it has room for.
    """

    def __init__(self, folder: str, weights: str, flash: bool, capacity: int) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        # It tells of every step on stderr; what goes wrong shows in what its functions return.
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        file = os.fsencode(Path(folder, f"{weights}.gguf"))
        self._model = self._made(
            llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = capacity, min(capacity, 2048)
        options.n_threads = options.n_threads_batch = 1
        if not flash:
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._made(llama_cpp.llama_init_from_model(self._model, options))
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._size, self._batch = llama_cpp.llama_vocab_n_tokens(vocab), options.n_batch
        self._capacity, self._tokens = capacity, np.empty(0, np.int32)

    @staticmethod
    def _made(pointer: Any) -> Any:
        if not pointer:
            raise RuntimeError("llama.cpp cannot load the model")
        return pointer

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """As `Gemtool.prefill`."""
        self._library.llama_memory_clear(self._memory, True)
        self._tokens = tokens
        for start in range(0, len(tokens), self._batch):
            scores = self._run(tokens[start : start + self._batch])
        return scores

    def save(self, path: str) -> int:
        """As `Gemtool.save`."""
        given = _pointer(self._tokens), len(self._tokens)
        if not self._library.llama_state_save_file(self._context, os.fsencode(path), *given):
            raise RuntimeError("llama.cpp cannot save its state")
        return Path(path).stat().st_size

    def load(self, path: str, token: np.ndarray) -> np.ndarray:
        """As `Gemtool.load`."""
        tokens, count = np.empty(self._capacity, np.int32), ctypes.c_size_t()
        given = _pointer(tokens), self._capacity, ctypes.byref(count)
        if not self._library.llama_state_load_file(self._context, os.fsencode(path), *given):
            raise RuntimeError("llama.cpp cannot load its state")
        self._tokens = tokens[: count.value]
        return self.decode(token)[0]

    def decode(self, tokens: np.ndarray) -> list[np.ndarray]:
        """As `Gemtool.decode`."""
        found = [self._run(token[None]) for token in tokens]
        self._library.llama_memory_seq_rm(self._memory, 0, len(self._tokens), -1)
        return found

    def _run(self, tokens: np.ndarray) -> np.ndarray:
        tokens = np.ascontiguousarray(tokens, np.int32)
        batch = self._library.llama_batch_get_one(_pointer(tokens), len(tokens))
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp cannot run its model")
        scores = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(scores, (self._size,)).copy()


def _pointer(tokens: np.ndarray) -> Any:
    return tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
