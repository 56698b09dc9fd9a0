"""A prompt in any of its forms, as each role's token ids."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from proxytune_kernels.trio.files import reason

PROMPT_STYLES = ("plain", "chat")
"""How a role reads a prompt: ``"plain"`` text, or through its tokenizer's ``"chat"`` template."""

# The templates of today's chat models take tens for each message. 0.5 s.
_TEMPLATE_LINES = 2_000_000
_WANTED = "a string, a list of token ids, chat messages, or a mapping from role to one of these"


def tokenize(
    prompt: Any,
    tokenizers: Mapping[str, Any],
    styles: Mapping[str, str],
    widths: Mapping[str, int],
    add_special_tokens: bool = True,
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
        add_special_tokens: what the tokenizer puts around plain text. A BOS that the text begins
            with is not put there twice. Templates write their own special tokens.

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
        role: _token_ids(
            role, parts[role], tokenizer, styles[role], widths[role], add_special_tokens
        )
        for role, tokenizer in tokenizers.items()
    }


def _token_ids(
    role: str, part: Any, tokenizer: Any, style: str, width: int, add_special_tokens: bool
) -> list[int]:
    for text in _texts(part):
        if not _is_unicode(text):
            raise ValueError(
                f"prompt of {role} must be text that UTF-8 can write, got a lone surrogate in "
                f"{text!a:.80}"
            )
    if isinstance(part, str) or is_messages(part):
        if style == "chat":
            messages = [{"role": "user", "content": part}] if isinstance(part, str) else part
            ids = _templated(role, messages, tokenizer)
        else:
            text = "\n\n".join(_texts(part))
            ids = _encoded(text, tokenizer, add_special_tokens)
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


def _encoded(text: str, tokenizer: Any, add_special_tokens: bool) -> list[int]:
    """Token ids of plain text, with no BOS before one that the text begins with."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    bos = tokenizer.bos_token_id
    if bos is None or ids[:2] != [bos, bos]:
        return ids
    written = tokenizer.encode(text, add_special_tokens=False)
    return ids[1:] if _leading(bos, ids) > _leading(bos, written) > 0 else ids


def _leading(token_id: int, ids: Sequence[int]) -> int:
    """How many times a text's tokens begin with one."""
    return sum(1 for _ in takewhile(token_id.__eq__, ids))


def chat_answer(role: str, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of the last message, as they go on after the prompt that the others are.

    They end with the special token that the template ends the turn with: what it writes behind it,
    such as a line's end, is left out. EOS ends a turn that the template ends with no such token.

    Raises:
        ValueError: the tokenizer has no template, or its text of all messages does not begin with
            the prompt.
    """
    prompt = _applied(role, messages[:-1], tokenizer, add_generation_prompt=True, tokenize=False)
    text = _applied(role, messages, tokenizer, tokenize=False)
    if not text.startswith(prompt):
        raise ValueError(
            f"messages of {role} must be written by the chat template of its tokenizer as a prompt "
            f"and what follows it, got {text!r:.80}, which does not begin with {prompt!r:.80}"
        )
    ids: list[int] = tokenizer.encode(text[len(prompt) :], add_special_tokens=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = max((i for i, token_id in enumerate(ids, 1) if token_id in special), default=0)
    if end and not tokenizer.decode(ids[end:]).strip():
        return ids[:end]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _templated(role: str, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return list(_applied(role, messages, tokenizer, **how))


def _applied(role: str, messages: Sequence[Mapping[str, str]], tokenizer: Any, **how: Any) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"prompts of {role} must be 'plain' for a tokenizer without a chat template, got 'chat'"
        )
    _check_no_powers(role, tokenizer.chat_template)
    try:
        with _bounded():
            return tokenizer.apply_chat_template(list(messages), **how)
    # A template comes from outside and can raise anything, by raise_exception on purpose.
    except Exception as error:
        raise ValueError(
            f"prompt of {role} must fit the chat template of its tokenizer, got: {reason(error)}"
        ) from error


class _TemplateTimeoutError(Exception):
    """A chat template runs for longer than one does that ends."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop a chat template after `_TEMPLATE_LINES` lines of it.

    jinja compiles a template to Python, so a tracing function sees its lines. It is of this thread
    alone, and costs the other code one call for each call.
    """
    lines = 0

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        if lines > _TEMPLATE_LINES:
            raise _TemplateTimeoutError(f"it did not end within {_TEMPLATE_LINES:,} lines")
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def _check_no_powers(role: str, templates: str | Mapping[str, str]) -> None:
    """Refuse ``**``: one line with it, such as 9 ** 9 ** 9, can take for ever."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    for text in [templates] if isinstance(templates, str) else templates.values():
        if "**" not in text:
            continue
        try:
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        except TemplateSyntaxError:
            continue  # it will not render either
        if parsed.find(nodes.Pow):
            raise ValueError(
                f"prompt of {role} must have a chat template without powers, got one with **"
            )


def _texts(part: Any) -> list[str]:
    """The strings in a prompt."""
    if isinstance(part, str):
        return [part]
    return [message["content"] for message in part] if is_messages(part) else []


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_messages(part: Any) -> bool:
    """Whether a prompt is chat messages: dicts with ``role`` and text as ``content``."""
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
