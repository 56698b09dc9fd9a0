"""llama.cpp's library through ctypes: where it lies, what of it is used, and whether that is there.

Its functions take structures by value, whose fields change from one version to the next. So a
library is used only if it has every function, and if its own default parameters stand where the
fields are looked for. Structures go back to it with all bytes that came from it, and have room for
more: fields that a later version has at their end keep their values.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from ctypes import (
    POINTER,
    c_bool,
    c_char,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from proxytune_kernels.trio.files import LoadError, reason

VARIABLE = "PROXYTUNE_LIBLLAMA"
"""Environment variable: the path of a libllama of one's own."""
WHEEL, EXTRA = "xllamacpp", "proxytune_kernels[llama]"
"""The package whose extension module is a libllama, and the extra that pins it."""
VERSION = "0.6.0"
"""Of llama.cpp, whose structures these are."""

# Field, its type, its default.
_Fields = tuple[tuple[str, Any, Any], ...]
_MODEL_PARAMS: _Fields = (
    ("devices", c_void_p, None),
    ("tensor_buft_overrides", c_void_p, None),
    ("n_gpu_layers", c_int32, -1),
    ("split_mode", c_int32, 1),
    ("load_mode", c_int32, -1),
    ("lazy_mode", c_int32, 1),
    ("main_gpu", c_int32, 0),
    ("tensor_split", c_void_p, None),
    ("progress_callback", c_void_p, None),
    ("progress_callback_user_data", c_void_p, None),
    ("kv_overrides", c_void_p, None),
    ("vocab_only", c_bool, False),
    ("check_tensors", c_bool, False),
    ("use_extra_bufts", c_bool, True),
    ("no_host", c_bool, False),
    ("no_alloc", c_bool, False),
    ("load_mtp", c_bool, False),
)
_CONTEXT_PARAMS: _Fields = (
    ("n_ctx", c_uint32, 512),
    ("n_batch", c_uint32, 2048),
    ("n_ubatch", c_uint32, 512),
    ("n_seq_max", c_uint32, 1),
    ("n_rs_seq", c_uint32, 0),
    ("n_outputs_max", c_uint32, 0),
    ("n_outputs_max_per_seq", c_uint32, 1),
    ("n_threads", c_int32, 4),
    ("n_threads_batch", c_int32, 4),
    ("ctx_type", c_int32, 0),
    ("rope_scaling_type", c_int32, -1),
    ("pooling_type", c_int32, -1),
    ("attention_type", c_int32, -1),
    ("flash_attn_type", c_int32, -1),
    ("rope_freq_base", c_float, 0.0),
    ("rope_freq_scale", c_float, 0.0),
    ("yarn_ext_factor", c_float, -1.0),
    ("yarn_attn_factor", c_float, -1.0),
    ("yarn_beta_fast", c_float, -1.0),
    ("yarn_beta_slow", c_float, -1.0),
    ("yarn_orig_ctx", c_uint32, 0),
    ("defrag_thold", c_float, -1.0),
    ("cb_eval", c_void_p, None),
    ("cb_eval_user_data", c_void_p, None),
    ("type_k", c_int32, 1),
    ("type_v", c_int32, 1),
    ("moe_cache_size", c_size_t, 0),
    ("abort_callback", c_void_p, None),
    ("abort_callback_data", c_void_p, None),
    ("embeddings", c_bool, False),
    ("offload_kqv", c_bool, True),
    ("no_perf", c_bool, True),
    ("op_offload", c_bool, True),
    ("swa_full", c_bool, True),
    ("kv_unified", c_bool, False),
    ("samplers", c_void_p, None),
    ("n_samplers", c_size_t, 0),
    ("ctx_other", c_void_p, None),
)


def _structure(name: str, fields: _Fields) -> Any:
    # The library writes what it returns: room for a structure that has grown.
    declared = [*((field, kind) for field, kind, _ in fields), ("more", c_char * 512)]
    return type(name, (ctypes.Structure,), {"_fields_": declared})


ModelParams = _structure("llama_model_params", _MODEL_PARAMS)
ContextParams = _structure("llama_context_params", _CONTEXT_PARAMS)


class Batch(ctypes.Structure):
    """llama_batch: tokens, each with its position and its sequence."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_ERROR = 4  # of ggml_log_level

# Models, contexts, vocabularies and memories are pointers that only the library looks behind.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "version": (c_char_p, []),
    "log_set": (None, [_LogCallback, c_void_p]),
    "backend_init": (None, []),
    "model_default_params": (ModelParams, []),
    "context_default_params": (ContextParams, []),
    "model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "model_free": (None, [c_void_p]),
    "model_get_vocab": (c_void_p, [c_void_p]),
    "model_n_ctx_train": (c_int32, [c_void_p]),
    "model_n_embd": (c_int32, [c_void_p]),
    "model_n_layer": (c_int32, [c_void_p]),
    "model_n_head": (c_int32, [c_void_p]),
    "model_n_head_kv": (c_int32, [c_void_p]),
    "model_n_params": (c_uint64, [c_void_p]),
    "model_size": (c_uint64, [c_void_p]),
    "model_desc": (c_int32, [c_void_p, c_char_p, c_size_t]),
    "model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "model_has_encoder": (c_bool, [c_void_p]),
    "model_has_decoder": (c_bool, [c_void_p]),
    "model_is_recurrent": (c_bool, [c_void_p]),
    "model_is_hybrid": (c_bool, [c_void_p]),
    "model_is_diffusion": (c_bool, [c_void_p]),
    "vocab_type": (c_int32, [c_void_p]),
    "vocab_n_tokens": (c_int32, [c_void_p]),
    "vocab_get_text": (c_char_p, [c_void_p, c_int32]),
    "vocab_bos": (c_int32, [c_void_p]),
    "vocab_eos": (c_int32, [c_void_p]),
    "vocab_eot": (c_int32, [c_void_p]),
    "init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "free": (None, [c_void_p]),
    "n_ctx_seq": (c_uint32, [c_void_p]),
    "n_batch": (c_uint32, [c_void_p]),
    "n_seq_max": (c_uint32, [c_void_p]),
    "n_threads": (c_int32, [c_void_p]),
    "get_memory": (c_void_p, [c_void_p]),
    "batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "batch_free": (None, [Batch]),
    "decode": (c_int32, [c_void_p, Batch]),
    "get_logits": (c_void_p, [c_void_p]),
    "memory_clear": (None, [c_void_p, c_bool]),
    "memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
}


class Library:
    """A libllama whose functions are attributes, without their ``llama_``.

    Args:
        path: of the file. Opening it runs code of it.

    Raises:
        LoadError: it is no library, or has other functions or structures.
    """

    def __init__(self, path: Path) -> None:
        wanted = f"runtime 'llama.cpp' needs a libllama whose API is that of llama.cpp {VERSION}"
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise LoadError(f"{wanted}, got {str(path)!r}: {reason(error)}") from error
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, f"llama_{name}", None)
            if function is None:
                raise LoadError(f"{wanted}, got {str(path)!r} without llama_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.path = path
        self.release: str = self.version().decode()
        """Its version of llama.cpp."""
        self.errors: deque[str] = deque(maxlen=4)
        # Kept: the library calls it as long as it runs.
        self._callback = _LogCallback(self._log)
        self.log_set(self._callback, None)
        self._check(f"{wanted}, got {self.release} ({str(path)!r})")
        self.backend_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"libllama has no function {name!r} that is used here")

    def _log(self, level: int, text: bytes | None, data: Any) -> None:
        if level == _ERROR and text:
            self.errors.append(text.decode(errors="replace").strip())

    def said(self) -> str:
        """The last errors that it logged, which are then forgotten."""
        errors = [*self.errors]
        self.errors.clear()
        return reason(ValueError("; ".join(errors) or "it gives no reason"))

    def _check(self, got: str) -> None:
        """Look for each default in its field, and for a batch's arrays in theirs."""
        for fields, params in (
            (_MODEL_PARAMS, self.model_default_params()),
            (_CONTEXT_PARAMS, self.context_default_params()),
        ):
            for name, _, default in fields:
                if (value := getattr(params, name)) != default:
                    raise LoadError(
                        f"{got}, where {name} of {type(params).__name__} is {value} in place of "
                        f"{default}: its structures are others"
                    )
        batch = self.batch_init(1, 0, 1)
        arrays = {name: bool(getattr(batch, name)) for name, _ in Batch._fields_[1:]}
        if batch.n_tokens or arrays != {name: name != "embd" for name in arrays}:
            raise LoadError(f"{got}, whose llama_batch has other fields")
        self.batch_free(batch)


def find_library() -> Path:
    """The file of libllama: what :data:`VARIABLE` names, else the wheel's.

    Raises:
        LoadError: there is none.
    """
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_file():
            raise LoadError(f"{VARIABLE} must name libllama's file, got {named!r}")
        return Path(named)
    spec = find_spec(WHEEL)
    for directory in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(directory).glob(f"{WHEEL}.*so")):
            return path
    raise LoadError(
        f"runtime 'llama.cpp' needs libllama, which is not installed: pip install '{EXTRA}', or "
        f"name one's own in {VARIABLE}"
    )


def library() -> Library:
    """The library, opened once.

    Raises:
        LoadError: there is none, or another one than is wanted.
    """
    return _open(find_library().resolve())


_open = cache(Library)
