"""Tokens by themselves: as text, and as the bytes that they stand for."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from proxytune_kernels.decoder.text import special_tokens

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Character -> byte, in the alphabet of byte-level vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


class Vocabulary:
    """Tokens of one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = b"" if backend is None else (backend.decoder and backend.decoder.__getstate__())
        self._is_byte_level = b'"ByteLevel"' in (decoder or b"")
        self._known: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def is_special(self, token_id: int) -> bool:
        """Whether a token stands for no text, such as the end of a turn."""
        return token_id in special_tokens(self._tokenizer)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a special token's are its name's."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._bytes_of(token_id)
        return known

    def text_of(self, token_id: int) -> str:
        r"""A token as text: two tokens of different bytes have different texts.

        Bytes that are no characters of their own are written as ``bytes:\xe2\x80``.
        """
        text = self._texts.get(token_id)
        if text is None:
            data = self.bytes_of(token_id)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._texts[token_id] = text
        return text

    def _bytes_of(self, token_id: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:
            return b""
        if token_id in self._tokenizer.added_tokens_decoder:
            return str(name).encode()
        if self._is_byte_level:
            return bytes(_byte_of()[c] for c in name if c in _byte_of())
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        return str(name).replace("\u2581", " ").encode()
