"""``proxytune chat``: with a server, with a trio, its commands, its colours."""

from __future__ import annotations

from typing import Any

import proxytune_kernels as ptk
from proxytune_kernels.cli.chat import piece, style
from tests.cli import assert_one_sentence, invoke
from tests.server.serving import PROMPT, serving

LINE = PROMPT.replace("\n", " ")
SAMPLED = ("--temperature", "0.8", "--seed", "7", "--max-tokens", "12")
PARAMS: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 12}


def test_a_server_and_a_trio_answer_alike(server, reference):
    wanted = reference.generate(LINE, ptk.SamplingParams(**PARAMS))[0].text
    for place in (("--url", server.url), ("--trio", "shipped", "--dtype", "float32")):
        result = invoke("chat", *place, *SAMPLED, stdin=f"{LINE}\n")
        assert (result.exit_code, result.stdout) == (0, wanted + "\n"), result.output


def test_commands_change_what_follows(server, reference):
    lines = f"/alpha 0\n/seed 9\n{LINE}\n/alpha x\n/temperature -1\n/clear\n/help\n/quit\n{LINE}\n"
    result = invoke("chat", "--url", server.url, *SAMPLED, stdin=lines)
    params = ptk.SamplingParams(**{**PARAMS, "alpha": 0.0, "seed": 9})
    text = reference.generate(LINE, params)[0].text
    assert result.stdout.startswith(f"alpha 0.0\nseed 9\n{text}\nError: alpha must be a number")
    assert "Error: temperature must be 0 (greedy)" in result.stdout
    assert "forgotten\n/alpha NUMBER" in result.stdout
    assert result.stdout.count(text) == 1


def test_what_was_said_is_part_of_the_next_prompt(server, reference):
    params = ptk.SamplingParams(**PARAMS)
    first = reference.generate("Hello", params)[0].text
    second = reference.generate(f"Hello\n\n{first}\n\n{LINE}", params)[0].text
    result = invoke("chat", "--url", server.url, *SAMPLED, stdin=f"Hello\n{LINE}\n")
    assert result.stdout == f"{first}\n{second}\n"


def test_pieces_are_coloured_by_what_steering_moved():
    up = piece("a", [{"base": 0.1, "proxy": 0.4, "changed": False}])
    assert (up.text, round(up.moved, 6), up.changed) == ("a", 2, False)
    down = piece("b", [{"base": 0.5, "proxy": 0.4, "changed": False},
                       {"base": 0.4, "proxy": 0.1, "changed": True}])  # fmt: skip
    assert (down.text, round(down.moved, 6), down.changed) == ("b", -2, True)
    assert (style(up), style(down)) == ("green underline", "red strike bold")
    assert style(piece("c", None)) == style(piece("c", [{"base": 0.4, "proxy": 0.5,
                                                         "changed": False}])) == ""  # fmt: skip


def test_mistakes_are_one_sentence(server, trio32):
    assert_one_sentence(invoke("chat"), 2, "--url")
    assert_one_sentence(invoke("chat", "--url", "x"), 1, "--url")
    assert_one_sentence(invoke("chat", "--url", "http://127.0.0.1:1"), 1, "refused")
    assert_one_sentence(invoke("chat", "--trio", "shipped", "--alpha", "nan"), 2, "alpha")
    with serving(ptk.Decoder(trio32, max_batch_size=1), api_key="right") as guarded:
        assert_one_sentence(invoke("chat", "--url", guarded.url), 1, "API key")
        result = invoke("chat", "--url", guarded.url, stdin="/quit\n", PROXYTUNE_API_KEY="right")
        assert result.exit_code == 0
        long = invoke("chat", "--url", guarded.url, "--max-tokens", "5000", stdin="a\n",
                      PROXYTUNE_API_KEY="right")  # fmt: skip
        assert "Error: " in long.stdout and "max_seq_len" in long.stdout
