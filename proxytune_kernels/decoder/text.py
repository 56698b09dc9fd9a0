"""Text as tokens come: no half characters, and nothing of a stop string before it is decided."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from proxytune_kernels.trio.token_texts import special_tokens

_CONTEXT = 5
"""Prompt tokens decoded along with the output, at least: what a tokenizer writes for a token can
depend on the one before, and one that strips a text's first space must not strip the output's."""

_INCOMPLETE = "\ufffd"
"""What decoders put for bytes that aren't a character, or not yet."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""The tokens of bytes in SentencePiece vocabularies. Their decoder reads a run of them as a whole:
one stray byte turns all the run's characters into replacement characters."""


class Detokenizer:
    """Turns a request's tokens into text piece by piece.

    The pieces joined are decode(prompt + output) behind what it has in common with decode(prompt).
    A piece waits while its last character lacks bytes, or its last token is one of a run of bytes,
    for the token that ends it or for :meth:`flush`.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_token_ids: the tokens before the output.
        skip_special_tokens: special tokens have no text.
    """

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._special = special_tokens(tokenizer) if skip_special_tokens else {}
        self._in_run = False  # the last token that has a text is one of a run of bytes
        # Of _ids the first _read are already out, as _text; older tokens have been dropped.
        self._ids = self._context(prompt_token_ids)
        self._read = len(self._ids)
        self._text = self._decode(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if token_id not in self._special:
            self._in_run = self._is_byte(token_id)
        if text.endswith(_INCOMPLETE) or self._in_run:
            return ""
        return self._advance(text)

    def waiting(self) -> str:
        """The whole characters that would come if the text ended here."""
        if self._read == len(self._ids):
            return ""
        return self._behind(self._decode(self._ids)).rstrip(_INCOMPLETE)

    def flush(self) -> str:
        """The text of what still waits, with replacement characters for what never completed."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = self._behind(text)
        if piece:
            # What was read last stays as context: a token's spelling depends on the one before.
            self._ids = self._ids[self._read :]
            self._text = self._decode(self._ids)
        self._read = len(self._ids)
        return piece

    def _behind(self, text: str) -> str:
        """A text without what is out.

        The output's first bytes may make another character of the prompt's last one, which then
        comes with them.
        """
        out = self._text
        while not text.startswith(out):
            out = out[:-1]
        return text[len(out) :]

    def _context(self, token_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from where they are read as within all of it."""
        start = max(len(token_ids) - _CONTEXT, 0)
        while start and not self._stands_alone(token_ids, start):
            start -= 1
        return list(token_ids[start:])

    def _stands_alone(self, token_ids: Sequence[int], start: int) -> bool:
        """Whether what is before ``start`` changes nothing in the text from there on."""
        if token_ids[start] in self._special or self._is_byte(token_ids[start]):
            return False
        text = self._decode(token_ids[start:])
        return bool(text) and not text.startswith(_INCOMPLETE)

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id) or "") is not None

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Cleaning up spaces would change text that is already out.
        text: str = self._tokenizer.decode(
            list(token_ids),
            skip_special_tokens=self._skips,
            clean_up_tokenization_spaces=False,
        )
        return text


class StopStrings:
    """Passes text on until a stop string is complete, the first to be completed in the text."""

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Text that can go out now, and the stop string that ends it, if one is complete."""
        text = self._held + piece
        found = [(text.find(s) + len(s), -len(s), s) for s in self._stop if s in text]
        if found:
            end, length, stop = min(found)
            self._held = ""
            return text[: end if self._include else end + length], stop
        kept = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], None

    def completes(self, piece: str) -> bool:
        """Whether a stop string would be complete with this piece, which is not taken."""
        return any(s in self._held + piece for s in self._stop)

    def flush(self) -> str:
        """Text held back as the possible start of a stop string that will not come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
