"""Text as tokens come: no half characters, and nothing of a stop string before it is decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 5
"""Prompt tokens decoded along with the output, so that a tokenizer which strips a text's first
space doesn't strip the output's."""

_INCOMPLETE = "\ufffd"
"""What decoders put for bytes that aren't a character, or not yet."""


class Detokenizer:
    """Turns a request's tokens into text piece by piece; special tokens have none.

    The pieces joined are the text of the whole. A piece that ends in the middle of a character
    waits for the rest of it, or for :meth:`flush`.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        context = list(prompt_token_ids[-_CONTEXT:])
        if self._decode(context).endswith(_INCOMPLETE):
            context = []
        # Of _ids the first _read are already out, as _text; older tokens have been dropped.
        self._ids = context
        self._read = len(context)
        self._text = self._decode(context)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        return "" if text.endswith(_INCOMPLETE) else self._advance(text)

    def flush(self) -> str:
        """The text of what still waits, with replacement characters for what never completed."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._text) :]
        if piece:
            # What was read last stays as context: a token's spelling depends on the one before.
            self._ids = self._ids[self._read :]
            self._text = self._decode(self._ids)
        self._read = len(self._ids)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        # Cleaning up spaces would change text that is already out.
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
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

    def flush(self) -> str:
        """Text held back as the possible start of a stop string that will not come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
