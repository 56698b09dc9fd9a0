"""Tokens as APIs write them: as text, and as the bytes that they stand for; and read so again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from proxytune_kernels.trio.vocabulary import VocabularyError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES, _NO_TEXT = "bytes:", "\ufffd"
"""How bytes that are no character of their own are written, exactly or not."""


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Character -> byte, in the alphabet of byte-level vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


@lru_cache(maxsize=16)
def special_tokens(tokenizer: Any) -> Mapping[int, str]:
    """Token -> its string, for those that stand for no text, such as the end of a turn."""
    named = {i: tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids}
    return named | {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}


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
                text = _BYTES + "".join(f"\\x{byte:02x}" for byte in data)
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


class TokenMatcher:
    """Finds the ids of tokens that another program names, by id, by text, or by both.

    Args:
        tokenizer: a transformers tokenizer, which the other program must have too.
        strict: a text that is none of its tokens is an error; else it has no id.
    """

    def __init__(self, tokenizer: Any, strict: bool = True) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._strict = strict
        self._known: dict[str, int | None] = {}  # text -> id
        self._checked: set[int] = set()
        self._differing: dict[int, str] = {}
        self._settled = False

    def id_of(self, token_id: int | None, text: str | None) -> int | None:
        """The id of a token; None where there is none, or where several tokens have its text.

        Raises:
            VocabularyError: the text is none of the tokens; the two do not go together, but before
                :meth:`settle`.
        """
        if token_id is None:
            assert text is not None
            return self._by_text(text)
        if text is not None and token_id not in self._checked:
            self._check(token_id, text)
            self._checked.add(token_id)
        return token_id

    def settle(self) -> None:
        """Raise a VocabularyError for the first id whose token differs, if there is one."""
        self._settled = True
        if self._differing:
            first = min(self._differing)
            raise VocabularyError(
                f"base must have the tokens of its tokenizer, got {self._differing[first]!r:.80} "
                f"for id {first}, which is {self._vocabulary.text_of(first)!r:.80} there"
            )

    def _check(self, token_id: int, text: str) -> None:
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:
            return  # padding; no id that all roles have
        ours = self._vocabulary.text_of(token_id)
        if ours.startswith(_BYTES) and not text.startswith(_BYTES):
            return  # a part of a character, which some write as nothing, or as the whole
        if not text and token_id in self._tokenizer.added_tokens_decoder:
            return  # llama.cpp's server writes special tokens as nothing
        # Decoded alone, a token may lose a blank at its start.
        alike = (name, ours, self._tokenizer.decode([token_id]))
        if text not in alike and text.strip() != ours.strip():
            self._differing[token_id] = text
            if self._settled:
                self.settle()

    def _by_text(self, text: str) -> int | None:
        if not self._known:
            named = self._tokenizer.get_vocab()
            self._known.update(named)
            seen: set[str] = set()
            for token_id in named.values():
                ours = self._vocabulary.text_of(token_id)
                self._known[ours] = None if ours in seen else token_id
                seen.add(ours)
        if text in self._known:
            return self._known[text]
        if self._strict and text and _NO_TEXT not in text:
            raise VocabularyError(
                f"base must have the tokens of its tokenizer, got {text!r:.80}, which is none"
            )
        return None
