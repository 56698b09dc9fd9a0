"""Rows as examples: what is prompt and what is answer, in each form and for each role."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxytune_kernels.analysis.rows import read_rows
from proxytune_kernels.tuning.data import Encoding, check_rows, prompt_styles, split
from tests.trio.checkpoints import make_tokenizer

CHATTY = make_tokenizer(extra=("<end>",))
CHATTY.chat_template = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN = make_tokenizer(chat=False)
CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def encoding(rows: list[Any], expert: Any = CHATTY, vocab_size: int = 260) -> Encoding:
    roles = ("base", "expert", "anti")
    styles = prompt_styles([(1, row) for row in rows], expert, {})
    tokenizers = {role: expert if role == "expert" else PLAIN for role in roles}
    return Encoding(tokenizers, styles, dict.fromkeys(roles, 300), vocab_size)


def texts(row: Any, expert: Any = CHATTY) -> list[tuple[str, str, str]]:
    """(the base's prompt, the expert's, the answer) of each example."""
    found = encoding([row], expert).examples(1, row)
    return [
        (
            PLAIN.decode(example.prompts["base"]),
            expert.decode(example.prompts["expert"]),
            expert.decode(example.answer),
        )
        for example in found
    ]


def test_each_turn_of_a_chat_is_an_answer_and_the_untuned_read_plain_text():
    # The line's end behind the token that ends a turn is not learnt.
    assert texts({"messages": CHAT}) == [
        ("a", "[user]a<end>\n[assistant]", "b<end>"),
        ("a\n\nb\n\nc", "[user]a<end>\n[assistant]b<end>\n[user]c<end>\n[assistant]", "d<end>"),
    ]


def test_a_template_that_ends_no_turn_is_ended_by_eos():
    assert texts({"messages": CHAT[:2]}, make_tokenizer()) == [
        ("a", "[user]a|[assistant]", "b|</s>")
    ]


def test_without_a_template_all_roles_read_plain_text():
    assert texts({"messages": CHAT[:2]}, PLAIN) == [("a", "a", "b</s>")]
    # Only messages are for the template.
    row = {"prompt": "2 + 2 =", "completion": " 4", "id": 7}
    assert texts(row) == [("2 + 2 =", "2 + 2 =", " 4</s>")]
    assert texts({"text": "abc"}) == [("a", "a", "bc</s>")]
    rows = [(1, {"messages": CHAT})]
    assert prompt_styles(rows, CHATTY, {"prompts": {"base": "chat", "expert": "plain"}}) == {
        "base": "chat", "expert": "chat", "anti": "plain"
    }  # fmt: skip
    assert set(prompt_styles(rows, None, {}).values()) == {"plain"}


def test_every_row_is_checked_and_what_is_wrong_is_said():
    rows: list[tuple[int, Any]] = [
        (1, {"prompt": "aaa", "completion": "b"}),
        (3, {"prompt": "a"}),
        (4, {"prompt": "a", "completion": ""}),
        (5, {"prompt": "a" * 9, "completion": "b"}),
        (6, {"text": "a"}),
        (7, {"prompt": 3, "completion": "b"}),
        (8, {"prompt": "a", "completion": "b<end>"}),
        (9, {"prompt": "a", "completion": "b", "text": "c"}),
    ]
    checked = check_rows(rows, encoding([]), max_length=10)
    assert [row.line for row in checked] == [line for line, _ in rows]
    right, *wrong = checked
    assert (right.wrong, right.tokens, right.masked) == (None, 5, 0.6)
    words = [
        "one of messages; prompt and completion; text, got 'prompt'",
        "completion must be a text that is not empty, got ''",
        "it has 11 tokens, --max-length is 10",
        "prompt and completion, as the rows before it, got text",
        "prompt must be a text that is not empty, got 3",
        "",
        "got 'prompt', 'completion', 'text'",
    ]
    for row, word in zip(wrong, words, strict=True):
        assert word in str(row.wrong)
    outside = check_rows([rows[6]], encoding([], vocab_size=259), max_length=10)
    assert "the base shares, ids below 259, got '<end>', id 259" in str(outside[0].wrong)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (CHAT[:1], "end with the assistant's, got user"),
        (CHAT[1:], "begin with another's"),
        ([], "messages must be a list of objects"),
        ("hi", "messages must be a list of objects"),
        ([CHAT[0], {"role": "assistant", "content": ""}], "got an empty one"),
    ],
)
def test_messages_that_hold_no_answer(messages, words):
    [row] = check_rows([(1, {"messages": messages})], encoding([]), 100)
    assert words in str(row.wrong)


def test_a_template_that_writes_a_prompt_otherwise_than_a_past_is_refused():
    own = make_tokenizer()
    own.chat_template = "{{ messages | length }}"
    row = {"messages": CHAT}
    [checked] = check_rows([(1, row)], encoding([row], own), 100)
    assert "does not begin with '1'" in str(checked.wrong)


def test_some_rows_are_held_out_with_all_their_answers():
    rows: list[Any] = [(i, {"messages": CHAT}) for i in range(10)]
    checked = check_rows(rows, encoding([rows[0][1]]), 100)
    left, kept = split(checked, 3, seed=1)
    assert len(kept) == 6 and len(left) == 14
    assert not {e.line for e in left} & {e.line for e in kept}
    assert (left, kept) == split(checked, 3, seed=1) != split(checked, 3, seed=2)


def test_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\n {"b": 2}')
    assert read_rows(path) == [(1, {"a": "\u2028"}), (3, {"b": 2})]
    deep = "[" * 100_000
    for text, words in (("{}\n[1]", "line 2"), ("{}\n" + deep, "line 2"), (" \n", "got none")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_rows(path)
    path.write_bytes(json.dumps({"a": "é"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_rows(path)
