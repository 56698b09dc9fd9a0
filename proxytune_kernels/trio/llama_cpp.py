"""Models that llama.cpp runs: GGUF files, and sequences of tokens over one."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int8, c_int32
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from proxytune_kernels.trio.files import LoadError, Place, check_gguf, file_in
from proxytune_kernels.trio.libllama import Batch, Library, library
from proxytune_kernels.trio.vocabulary import RoleVocabulary, VocabularyError, agree

RUNTIME = "llama.cpp"
_BATCH = 512
"""Tokens of one call at most."""
_OUTPUTS = 32
"""Rows of logits of one call, or as many as there are sequences: their memory is taken at once."""

Row = tuple[int, int, Sequence[int]]
"""A sequence, the position of its first new token, and the new tokens."""


class LlamaModel(Module):
    """A GGUF file that libllama has opened, in the place of a causal LM of transformers.

    It has no parameters: the library holds the weights, as they are in the file, and runs them on
    what it was built for. Logits are fp32, in the host's memory.

    Args:
        role: base, expert or anti, for messages.
        place: where the file lies.
        file: its plain name.

    Raises:
        LoadError: no file that llama.cpp can open, or a model that is no causal LM with attention.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, role: str, place: Place, file: str) -> None:
        super().__init__()
        self.eval()
        path = file_in(role, place.directory, file)
        check_gguf(role, path)
        self.library = lib = library()
        params = lib.model_default_params()
        params.check_tensors = True
        lib.errors.clear()
        self.pointer = lib.model_load_from_file(os.fsencode(path), params)
        wanted = f"{role} must be a GGUF file that llama.cpp {lib.release} can run"
        if not self.pointer:
            raise LoadError(f"{wanted}, got {str(path)!r}: {lib.said()}")
        self._freed = weakref.finalize(self, lib.model_free, self.pointer)
        self._vocab = lib.model_get_vocab(self.pointer)
        if (kind := self._unserved()) is not None:
            raise LoadError(f"{wanted}, got {str(path)!r}, which holds {kind}")
        from transformers import GenerationConfig, PreTrainedConfig

        self.width = lib.vocab_n_tokens(self._vocab)
        self.path = path
        facts: dict[str, Any] = {
            "vocab_size": self.width,
            "hidden_size": lib.model_n_embd(self.pointer),
            "num_hidden_layers": lib.model_n_layer(self.pointer),
            "max_position_embeddings": lib.model_n_ctx_train(self.pointer),
            "bos_token_id": self._token("bos"),
            "eos_token_id": self._token("eos"),
        }
        self.config = PreTrainedConfig(**facts)
        self.config._name_or_path = place.name
        ends = [token for name in ("eos", "eot") if (token := self._token(name)) is not None]
        self.generation_config = GenerationConfig(eos_token_id=ends or None)
        # What is asked for a width or a device: it has no memory.
        shape = self.width, self.config.hidden_size
        self._embeddings = SimpleNamespace(weight=torch.zeros(()).expand(shape))

    def _unserved(self) -> str | None:
        """What it is that can't be steered; None for a causal LM."""
        lib, model = self.library, self.pointer
        if lib.model_has_encoder(model) or not lib.model_has_decoder(model):
            return "an encoder"
        if lib.model_is_diffusion(model):
            return "a diffusion model"
        if lib.model_is_recurrent(model) or lib.model_is_hybrid(model):
            return "a recurrent model, whose tokens can't be rolled back"
        return None if lib.vocab_type(self._vocab) else "no vocabulary"

    def _token(self, name: str) -> int | None:
        found: int = getattr(self.library, f"vocab_{name}")(self._vocab)
        return found if found >= 0 else None

    def tokens(self) -> dict[int, str]:
        """The file's token by id."""
        text = self.library.vocab_get_text
        return {i: text(self._vocab, i).decode(errors="replace") for i in range(self.width)}

    def check_tokenizer(self, role: str, tokenizer: Any) -> None:
        """Check that a tokenizer's ids are those of the file.

        Raises:
            VocabularyError: names the first that differ.
        """
        file = RoleVocabulary(self.tokens(), self.width)
        try:
            agree({f"tokenizer of {role}": RoleVocabulary.of(tokenizer, self.width), "file": file})
        except VocabularyError as error:
            raise VocabularyError(f"{error} ({self.path})") from error

    def metadata(self, key: str) -> str | None:
        """A value of the file, by its key."""
        buffer = ctypes.create_string_buffer(256)
        found = self.library.model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if found >= 0 else None

    def head_sizes(self) -> tuple[int, int, int]:
        """Heads that have keys, and the sizes of a key and of a value, in the first layer."""
        lib, kind = self.library, self.metadata("general.architecture")
        usual = self.config.hidden_size // max(1, lib.model_n_head(self.pointer))
        named = (self.metadata(f"{kind}.attention.{part}_length") for part in ("key", "value"))
        key, value = (int(size) if size and size.isdecimal() else usual for size in named)
        return lib.model_n_head_kv(self.pointer), key, value

    def get_input_embeddings(self) -> Any:
        """Something with a ``weight`` [tokens, hidden size], whose values mean nothing."""
        return self._embeddings

    get_output_embeddings = get_input_embeddings

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits fp32 [B, n, V] of whole texts int64 [B, n], each alone and without a cache."""
        context = LlamaContext(self, 1, input_ids.shape[1])
        each = [context.run([(0, 0, row)], every=True).clone() for row in input_ids.tolist()]
        return SimpleNamespace(logits=torch.stack(each))

    def info(self) -> dict[str, Any]:
        """As :func:`~proxytune_kernels.trio.trio.model_info` describes a model."""
        buffer = ctypes.create_string_buffer(256)
        self.library.model_desc(self.pointer, buffer, len(buffer))
        return {
            "model": f"{buffer.value.decode(errors='replace')}, llama.cpp {self.library.release}",
            "name": self.config._name_or_path,
            "parameters": self.library.model_n_params(self.pointer),
            "dtype": "float32",
            "device": "llama.cpp",
            "logits": self.width,
            "quantized": self.path.name,
            "products": {},
            "adapter_parameters": 0,
            "bytes": self.library.model_size(self.pointer),
        }


class LlamaContext:
    """Sequences of tokens over one model, each with its keys and values.

    Args:
        model: it lives as long as the context does.
        sequences: how many.
        tokens: room of each.

    Raises:
        MemoryError: the library can't make it.
    """

    def __init__(self, model: LlamaModel, sequences: int, tokens: int) -> None:
        self._library: Library = model.library
        self._width = model.width
        self._outputs = max(sequences, _OUTPUTS)
        # The library rounds up to a multiple of 256 itself; the check below holds it to that.
        room = -(-tokens // 256) * 256
        lib, threads = self._library, torch.get_num_threads()
        params = lib.context_default_params()
        params.n_ctx, params.n_seq_max = sequences * room, sequences
        params.n_batch = params.n_ubatch = _BATCH
        params.n_outputs_max = self._outputs
        params.n_threads = params.n_threads_batch = threads
        lib.errors.clear()
        self._pointer = lib.init_from_model(model.pointer, params)
        wanted = f"{sequences} sequences of {tokens} tokens of {str(model.path)!r}"
        if not self._pointer:
            raise MemoryError(f"llama.cpp can't make {wanted}: {lib.said()}")
        # The model goes after its contexts.
        weakref.finalize(self, _free, lib, self._pointer, model)
        self._batch_size = lib.n_batch(self._pointer)
        got = (
            lib.n_ctx_seq(self._pointer),
            lib.n_seq_max(self._pointer),
            lib.n_threads(self._pointer),
        )
        if got[0] < tokens or got[1:] != (sequences, threads):
            raise MemoryError(
                f"llama.cpp can't make {wanted}, it made (room, number, threads) {got}"
            )
        self._memory = lib.get_memory(self._pointer)
        self._lengths = [0] * sequences
        self._token, self._pos, self._sequence = ((c_int32 * self._batch_size)() for _ in range(3))
        self._wanted = (c_int8 * self._batch_size)()
        places = [
            ctypes.pointer(c_int32.from_buffer(self._sequence, 4 * i))
            for i in range(self._batch_size)
        ]
        self._batch = Batch(
            token=self._token,
            pos=self._pos,
            n_seq_id=(c_int32 * self._batch_size)(*[1] * self._batch_size),
            seq_id=(POINTER(c_int32) * self._batch_size)(*places),
            logits=self._wanted,
        )

    def run(self, rows: Sequence[Row], *, every: bool) -> Tensor:
        """Run new tokens; what a sequence holds from their place on is dropped first.

        Args:
            rows: each sequence once, in ascending order.
            every: give the logits behind all tokens, else behind the last one of each row.

        Returns:
            fp32 [outputs, V], row by row: the library's memory, which the next call writes over.

        Raises:
            RuntimeError: the library can't run them; what the sequences hold is then unknown.
        """
        token: list[int] = []
        pos: list[int] = []
        sequence: list[int] = []
        wanted: list[bool] = []
        for row, start, tokens in rows:
            self.cut(row, start)
            token += tokens
            pos += range(start, start + len(tokens))
            sequence += [row] * len(tokens)
            wanted += [every] * (len(tokens) - 1) + [True]
            self._lengths[row] = start + len(tokens)
        most = min(self._batch_size, self._outputs) if every else self._batch_size
        found = []
        for begin in range(0, len(token), most):
            part = slice(begin, begin + most)
            n = self._batch.n_tokens = len(token[part])
            self._token[:n], self._pos[:n] = token[part], pos[part]
            self._sequence[:n], self._wanted[:n] = sequence[part], wanted[part]
            self._decode()
            if outputs := sum(wanted[part]):
                found.append(self._logits(outputs))
            if n < len(token) and found:
                found[-1] = found[-1].clone()
        return found[0] if len(found) == 1 else torch.cat(found)

    def _decode(self) -> None:
        self._library.errors.clear()
        if code := self._library.decode(self._pointer, self._batch):
            raise RuntimeError(f"llama_decode failed with code {code}: {self._library.said()}")

    def _logits(self, rows: int) -> Tensor:
        address = self._library.get_logits(self._pointer)
        memory: Any = (c_float * (rows * self._width)).from_address(address)
        memory.context = self  # which lives as long as the tensor
        return torch.frombuffer(memory, dtype=torch.float32).view(rows, self._width)

    def cut(self, sequence: int, length: int) -> None:
        """Drop a sequence's tokens from a place on.

        Raises:
            RuntimeError: it is shorter, or the library can't.
        """
        held = self._lengths[sequence]
        if held > length and self._library.memory_seq_rm(self._memory, sequence, length, -1):
            self._lengths[sequence] = held = length
        if held != length:
            raise RuntimeError(f"sequence {sequence} of {held} tokens can't have {length} of them")

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a sequence hold the first tokens of another, and no more."""
        self._library.memory_seq_cp(self._memory, source, target, -1, -1)
        self._lengths[target] = self._lengths[source]
        self.cut(target, length)

    def clear(self) -> None:
        """Empty all sequences, whatever they hold."""
        self._library.memory_clear(self._memory, True)
        self._lengths = [0] * len(self._lengths)


def _free(lib: Library, pointer: int, model: LlamaModel) -> None:
    lib.free(pointer)
