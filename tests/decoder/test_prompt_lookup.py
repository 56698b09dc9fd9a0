"""Drafts from the text itself, against a search in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune_kernels.decoder.speculation import History, Speculation
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import tiny_llama, word_tokenizer

CPU = torch.device("cpu")
CAPACITY = 14
# Few different tokens, so that texts repeat themselves.
TOKEN = st.integers(0, 2)
TEXT = st.lists(TOKEN, min_size=1, max_size=CAPACITY)
WIDTH = st.integers(1, 5)


def begin(history: History, slot: int, text: list[int]) -> None:
    """The last token is the first that was drawn."""
    token_ids, lengths = History.numbers([text[:-1]])
    history.start(torch.tensor([slot]), token_ids, lengths, torch.tensor(text[-1:] or [-1]))
    history.lengths[slot] = len(text)


def search(text: list[int], width: int) -> list[int]:
    """What followed the latest earlier occurrence of the last three tokens, else of the last two.

    Exactly ``width`` of them, -1 where the text ends before.
    """
    for size in (3, 2):
        ending = text[-size:]
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == ending:
                return [*text[end : end + width], *[-1] * width][:width]
    return [-1] * width


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2]),
        # The latest of several, and three tokens before two.
        ([1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3], [9, 1, 2]),
        ([1, 2, 3, 8, 7, 2, 3, 9, 1, 2, 3], [8, 7, 2]),
        # Drafts may run up to the end of the text, and not beyond.
        ([5, 5, 5, 5], [5, -1, -1]),
        ([4, 6, 4, 6], [4, 6, -1]),
        # One equal token is not enough; nor is a text that only is its own end.
        ([7, 1, 2, 7], [-1, -1, -1]),
        ([1, 2, 3], [-1, -1, -1]),
        ([1, 1], [-1, -1, -1]),
        ([1], [-1, -1, -1]),
    ],
)
def test_lookup(text, wanted):
    assert search(text, 3) == wanted
    history = History(1, 16, 10, CPU)
    begin(history, 0, text)
    assert history.lookup(1, 3).tolist() == [wanted]


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_drafts_are_ids_that_every_member_has(make_decoder, mode):
    """The base's prompt has ids past the pair's embedding, between and before ids to draft."""
    base = tiny_llama(0, 16, 1, vocab_size=100)
    trio = Trio.from_models(
        base,
        tiny_llama(1, 16, 1, vocab_size=96),
        tiny_llama(2, 16, 1, vocab_size=96),
        {"base": word_tokenizer(100), "expert": word_tokenizer(96), "anti": word_tokenizer(96)},
    )
    assert trio.vocab_size == 96
    text = [5, 6, 7, 97, 8, 9, 99, 98, 5, 6, 7, 97, 8]
    prompt = {"base": text * 2, "expert": [5, 6, 7, 8], "anti": [5, 6, 7, 8]}
    speculation = Speculation(drafter="prompt_lookup", mode=mode, max_drafts=4, adaptive=False)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [plain] = make_decoder(trio, 1).generate([prompt], params)
    [output] = make_decoder(trio, 1, speculation=speculation).generate([prompt], params)
    assert output.token_ids == plain.token_ids


def test_nothing_is_drafted_behind_an_id_that_a_member_lacks():
    history = History(1, 16, 10, CPU)
    for text, wanted in (
        ([1, 2, 3, 10, 5, 1, 2, 3], [-1, -1, -1]),
        ([1, 2, 3, 9, 10, 1, 2, 3], [9, -1, -1]),
        ([1, 2, 10, 9, 8, 1, 2, 10], [9, 8, 1]),
    ):
        begin(history, 0, text)
        assert history.lookup(1, 3).tolist() == [wanted]


@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(TOKEN, min_size=CAPACITY), WIDTH)
def test_lookup_is_the_naive_search(texts, garbage, width):
    """Lengths from one token to the capacity; what lies behind them is never read."""
    history = History(len(texts) + 1, CAPACITY, 3, CPU)
    for slot, text in enumerate(texts):
        begin(history, slot, text)
        history.token_ids[slot, len(text) :] = torch.tensor(garbage[: CAPACITY - len(text)])
    wanted = [search(text, width) for text in texts]
    assert history.lookup(len(texts), width).tolist() == wanted


ROUNDS = st.lists(st.tuples(st.lists(TOKEN, min_size=3, max_size=3), st.integers(0, 3)), max_size=8)


@given(TEXT, st.lists(TOKEN, min_size=1, max_size=CAPACITY - 1), ROUNDS, WIDTH)
def test_text_grows_by_what_rounds_emit(first, second, rounds, width):
    """Of three tokens the first 0 to 3 count. The slot beside it does not run: it is written to
    behind its end, and does not grow."""
    history = History(3, CAPACITY, 3, CPU)
    begin(history, 0, second)
    begin(history, 1, first)
    text = list(first)
    for tokens, count in rounds:
        if len(text) + len(tokens) > CAPACITY:
            break
        history.append(torch.tensor([[2, 2, 2], tokens]), torch.tensor([0, count]))
        text += tokens[:count]
        wanted = [search(second, width), search(text, width)]
        assert history.lookup(2, width).tolist() == wanted
    history.move(1, 0)
    assert history.lookup(1, width).tolist() == [search(text, width)]
    begin(history, 0, second)
    assert history.lookup(1, width).tolist() == [search(second, width)]
