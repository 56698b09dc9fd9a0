"""Rows of data as examples: a prompt for each role and the answer that follows it, checked."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune_kernels.trio.prompts import chat_answer, is_messages, tokenize
from proxytune_kernels.trio.roles import ROLES

FORMS = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
"""What a row may hold, by name: the keys that it must have. It may have more."""


@dataclass(frozen=True)
class Example:
    """One answer, and what stands before it.

    Args:
        line: of the file.
        prompts: role -> token ids.
        answer: token ids, its end among them; the same for every role.
    """

    line: int
    prompts: Mapping[str, list[int]]
    answer: list[int]

    @property
    def tokens(self) -> int:
        """Of prompt and answer, in the role where they are most."""
        return max(map(len, self.prompts.values())) + len(self.answer)


@dataclass(frozen=True)
class CheckedRow:
    """What a row is as examples.

    Args:
        line: of the file.
        examples: one for each answer in it; none where something is wrong.
        wrong: what is, in words, or None.
    """

    line: int
    examples: tuple[Example, ...] = ()
    wrong: str | None = None

    @property
    def tokens(self) -> int:
        """Of its longest example."""
        return max((example.tokens for example in self.examples), default=0)

    @property
    def masked(self) -> float:
        """Share of the tokens that the expert reads and the loss leaves out, 0 to 1."""
        prompts = sum(len(example.prompts["expert"]) for example in self.examples)
        return prompts / max(1, prompts + sum(len(example.answer) for example in self.examples))


@dataclass(frozen=True)
class Encoding:
    """How rows become token ids.

    Args:
        tokenizers: role -> tokenizer.
        styles: role -> ``"plain"`` or ``"chat"``.
        widths: role -> number of ids that its model reads.
        vocab_size: ids below this one mean the same to all roles.
    """

    tokenizers: Mapping[str, Any]
    styles: Mapping[str, str]
    widths: Mapping[str, int]
    vocab_size: int

    def examples(self, line: int, row: Mapping[str, Any]) -> tuple[Example, ...]:
        """The examples of a row: one for each answer, which is every assistant's turn of a chat.

        Raises:
            ValueError, TypeError: says what the row must hold and what it does.
        """
        form = form_of(row)
        if form == "text":
            ids = self._encoded(_text(row, "text"), special=True) + self._end()
            # The first token has nothing before it that could predict it.
            answers: list[tuple[Any, list[int]]] = [(ids[:1], ids[1:])]
        elif form == "messages":
            answers = self._turns(row["messages"])
        else:
            completion = self._encoded(_text(row, "completion")) + self._end()
            answers = [(_text(row, "prompt"), completion)]
        return tuple(self._example(line, prompt, answer) for prompt, answer in answers)

    def _turns(self, messages: Any) -> list[tuple[Any, list[int]]]:
        if not is_messages(messages):
            raise TypeError(
                "messages must be a list of objects with role and content, each a text, got "
                f"{messages!r:.80}"
            )
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0 or turns[-1] != len(messages) - 1:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ValueError(
                f"messages must begin with another's and end with the assistant's, got {roles:.80}"
            )
        return [(messages[:i], self._turn(messages[: i + 1])) for i in turns]

    def _turn(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not messages[-1]["content"]:
            raise ValueError(
                "messages must have an answer of the assistant in them, got an empty one"
            )
        if self.styles["expert"] == "chat":
            return chat_answer("expert", messages, self.tokenizers["expert"])
        return self._encoded(messages[-1]["content"]) + self._end()

    def _example(self, line: int, prompt: Any, answer: list[int]) -> Example:
        prompts = tokenize(prompt, self.tokenizers, self.styles, self.widths)
        outside = [token_id for token_id in answer if token_id >= self.vocab_size]
        if outside:
            token = self.tokenizers["expert"].convert_ids_to_tokens(outside[0])
            raise ValueError(
                f"an answer must be of tokens that the base shares, ids below {self.vocab_size}, "
                f"got {token!r}, id {outside[0]}"
            )
        return Example(line, prompts, answer)

    def _encoded(self, text: str, special: bool = False) -> list[int]:
        ids: list[int] = self.tokenizers["expert"].encode(text, add_special_tokens=special)
        return ids

    def _end(self) -> list[int]:
        token_id = self.tokenizers["expert"].eos_token_id
        if token_id is None:
            raise ValueError("the anti's tokenizer must have an EOS token to end answers with")
        return [token_id]


def form_of(row: Mapping[str, Any]) -> str:
    """Which of :data:`FORMS` a row has.

    Raises:
        ValueError: none, or several.
    """
    found = [form for form, keys in FORMS.items() if set(keys) <= set(row)]
    if len(found) != 1:
        keys = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(f"a row must hold one of {'; '.join(FORMS)}, got {keys:.200}")
    return found[0]


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value:
        raise TypeError(f"{key} must be a text that is not empty, got {value!r:.80}")
    return value


def check_rows(
    rows: Sequence[tuple[int, Mapping[str, Any]]], encoding: Encoding, max_length: int
) -> list[CheckedRow]:
    """Tokenize every row, and say of each what is wrong with it.

    Args:
        rows: a line's number and what it holds.
        encoding: how they become token ids.
        max_length: tokens of an example at most.
    """
    checked = []
    first = ""
    for line, row in rows:
        try:
            form = form_of(row)
            first = first or form
            if form != first:
                raise ValueError(f"a row must hold {first}, as the rows before it, got {form}")
            found = CheckedRow(line, encoding.examples(line, row))
        except (ValueError, TypeError) as error:
            found = CheckedRow(line, wrong=str(error))
        if found.tokens > max_length:
            wrong = f"it has {found.tokens} tokens, --max-length is {max_length}"
            found = CheckedRow(line, found.examples, wrong)
        checked.append(found)
    return checked


def split(
    checked: Sequence[CheckedRow], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those of ``count`` rows that are kept for measuring."""
    held_out = set(random.Random(seed).sample(range(len(checked)), count))
    parts: tuple[list[Example], list[Example]] = [], []
    for i, row in enumerate(checked):
        parts[i in held_out].extend(row.examples)
    return parts


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of what the expert reads of examples, and of their answers, in their order."""
    ids = [[example.prompts["expert"], example.answer] for example in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def prompt_styles(
    rows: Sequence[tuple[int, Mapping[str, Any]]], tokenizer: Any, trio: Mapping[str, Any]
) -> dict[str, str]:
    """Role -> how it reads a prompt, where rows are tuned on.

    The expert reads messages through its chat template if it has one (the paper's tuned models do);
    the other two read plain text unless their trio says otherwise.

    Args:
        rows: a line's number and what it holds.
        tokenizer: the expert's; None is one without a template.
        trio: what the trio.json says that they were named by.
    """
    chats = any("messages" in row for _, row in rows)
    own = "chat" if chats and getattr(tokenizer, "chat_template", None) else "plain"
    given = trio.get("prompts", {})
    return {role: given.get(role) or "plain" for role in ROLES} | {"expert": own}
