"""Three models, their tokenizers, and the vocabulary they share."""

from proxytune_kernels.trio.endpoint import RemoteError
from proxytune_kernels.trio.remote import RemoteBase
from proxytune_kernels.trio.trio import Trio, eos_token_ids, load_trio, model_info

__all__ = ["RemoteBase", "RemoteError", "Trio", "eos_token_ids", "load_trio", "model_info"]
