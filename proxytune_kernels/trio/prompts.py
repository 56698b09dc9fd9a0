"""A prompt in any of its forms, as each role's token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PROMPT_STYLES = ("plain", "chat")
"""How a role reads a prompt: ``"plain"`` text, or through its tokenizer's ``"chat"`` template."""

_WANTED = "a string, a list of token ids, chat messages, or a mapping from role to one of these"


def tokenize(
    prompt: Any,
    tokenizers: Mapping[str, Any],
    styles: Mapping[str, str],
    widths: Mapping[str, int],
) -> dict[str, list[int]]:
    """Token ids of a prompt for each role.

    Args:
        prompt: a string, a list of token ids, chat messages (dicts with ``role`` and ``content``),
            or a mapping from every role to one of these.
        tokenizers: role -> tokenizer.
        styles: role -> ``"plain"`` or ``"chat"``. Chat turns a string into one user message and
            applies the template with the assistant's turn opened. Plain takes text as it is, and
            joins the contents of messages with blank lines (the paper's untuned models see plain
            text). Token ids are taken as they are.
        widths: role -> number of ids that the model can read.

    Raises:
        ValueError, TypeError: names the prompt's part, what it got and what it wanted.
    """
    if isinstance(prompt, Mapping):
        if set(prompt) != set(tokenizers):
            raise ValueError(
                f"prompt must have one entry per role ({', '.join(tokenizers)}), "
                f"got {', '.join(map(str, prompt)) or 'none'}"
            )
        parts = prompt
    else:
        parts = dict.fromkeys(tokenizers, prompt)
    return {
        role: _token_ids(role, parts[role], tokenizer, styles[role], widths[role])
        for role, tokenizer in tokenizers.items()
    }


def _token_ids(role: str, part: Any, tokenizer: Any, style: str, width: int) -> list[int]:
    if isinstance(part, str):
        messages = [{"role": "user", "content": part}]
        ids = _templated(role, messages, tokenizer) if style == "chat" else tokenizer.encode(part)
    elif _is_messages(part):
        if style == "chat":
            ids = _templated(role, part, tokenizer)
        else:
            ids = tokenizer.encode("\n\n".join(message["content"] for message in part))
    elif _is_token_ids(part):
        ids = [int(i) for i in part]
    else:
        raise TypeError(f"prompt of {role} must be {_WANTED}, got {part!r:.80}")
    if not ids:
        raise ValueError(f"prompt of {role} must have at least one token, got none")
    outside = [i for i in ids if not 0 <= i < width]
    if outside:
        raise ValueError(f"prompt of {role} must have token ids in [0, {width}), got {outside[0]}")
    return ids


def _templated(role: str, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"prompts of {role} must be 'plain' for a tokenizer without a chat template, got 'chat'"
        )
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(ids)


def _is_messages(part: Any) -> bool:
    return (
        _is_list(part)
        and bool(part)
        and all(
            isinstance(m, Mapping)
            and {"role", "content"} <= set(m)
            and isinstance(m["content"], str)
            for m in part
        )
    )


def _is_token_ids(part: Any) -> bool:
    return _is_list(part) and all(isinstance(i, int) and not isinstance(i, bool) for i in part)


def _is_list(part: Any) -> bool:
    return isinstance(part, Sequence) and not isinstance(part, (str, bytes))
