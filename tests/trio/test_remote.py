"""A remote base: each protocol gives the table's log-probabilities, and no fault gives others."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("circuitbreaker", reason="a remote base needs the extra remote")
pytest.importorskip("tenacity", reason="a remote base needs the extra remote")
pytest.importorskip("httpx2", reason="a remote base needs the extra remote")

import proxytune_kernels as ptk
from proxytune_kernels.trio import RemoteBase, RemoteError, endpoint, remote
from proxytune_kernels.trio.remote import RemoteModel
from proxytune_kernels.trio.token_texts import TokenMatcher, Vocabulary
from proxytune_kernels.trio.vocabulary import VocabularyError
from tests.decoder.conftest import byte_tokenizer
from tests.trio import fake_api
from tests.trio.fake_api import FakeApi, changed, cut, serving, slow, status

TEXTS = [[5, 9, 200, 17], [40, 41, 42], [100, 3, 100, 3, 7, 8]]
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> list[str]:
    vocabulary = Vocabulary(tokenizer)
    return [vocabulary.text_of(i) for i in range(len(tokenizer))]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, and few tokens are compared."""
    monkeypatch.setattr(endpoint, "_LONGEST_WAIT", 0.0)
    monkeypatch.setattr(remote, "_SAMPLE", 16)


@pytest.fixture(scope="module")
def shared(texts: list[str]) -> Iterator[FakeApi]:
    with serving(FakeApi(texts, ["prompt_logprobs"])) as running:
        yield running


@pytest.fixture
def api(shared: FakeApi) -> FakeApi:
    shared.faults.clear()
    shared.requests.clear()
    return shared


def expected(api: FakeApi, texts: list[list[int]], count: int, n: int) -> torch.Tensor:
    """[B, count, V]: the table's n likeliest at each place, -inf elsewhere."""
    rows = torch.stack([api.table[torch.tensor(text[-count:])] for text in texts])
    lowest = rows.topk(n if n > 0 else rows.shape[-1]).values[..., -1:]
    return rows.masked_fill(rows < lowest, -torch.inf)


SERVED = {
    "prompt_logprobs": (["prompt_logprobs"], "prompt_logprobs"),
    "echo": (["echo"], "echo"),
    "step": (["step"], "step"),
    "llama.cpp": (["content"], "step"),
}


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "texts"])
@pytest.mark.parametrize("name", SERVED)
def test_a_protocol_gives_the_likeliest_tokens(tokenizer, texts, name, ids):
    serves, protocol = SERVED[name]
    with serving(FakeApi(texts, serves, ids)) as api:
        model = RemoteModel(RemoteBase(api.url, top_n=7, tail="drop"), tokenizer)
        assert (model.protocol, model.model) == (protocol, fake_api.MODEL)
        assert model.config.max_position_embeddings == 510 - 32 * model.scores_drafts
        count = 3 if model.scores_drafts else 1
        before = model.endpoint.tries
        torch.testing.assert_close(model.score(TEXTS, count), expected(api, TEXTS, count, 7))
        assert model.endpoint.tries == before + 1
        if count == 1:
            with pytest.raises(RemoteError, match="one token's log-probabilities a call"):
                model.score(TEXTS, 2)


def test_all_tokens_may_be_asked_for(api, tokenizer):
    model = RemoteModel(RemoteBase(api.url, top_n=-1, tail="uniform"), tokenizer)
    torch.testing.assert_close(model.score(TEXTS, 2), expected(api, TEXTS, 2, -1))


def test_what_is_known_does_not_depend_on_the_token_that_stands_there(api, tokenizer):
    # With the likeliest comes the drafted token: with other drafts another one would be known.
    model = RemoteModel(RemoteBase(api.url, top_n=4, tail="drop"), tokenizer)
    one, other = model.score([[5, 9, 200], [5, 9, 31]], 2)
    assert torch.equal(one[0], other[0])
    assert one[0].isfinite().sum() == 4


def test_a_chat_gives_one_token(tokenizer, texts):
    with serving(FakeApi(texts, ["chat"], ids=False)) as api:
        model = RemoteModel(RemoteBase(api.url, top_n=5, tail="drop"), tokenizer)
        assert (model.protocol, model.goes_on) == ("chat", False)
        text = tokenizer.encode("a chat")
        [[row]] = model.score([text], 1)
        want = api.table[len("a chat")].topk(5)
        assert sorted(row.topk(5).indices.tolist()) == sorted(want.indices.tolist())
        # A token that the tokenizer lacks is not known; the others are.
        api.faults = [changed(lambda a: _entries(a)[0].update(token="<|elsewhere|>"))]
        [[row]] = model.score([text], 1)
        assert row.isfinite().sum() == 4


def _entries(answer: Any) -> Any:
    return answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


def test_no_protocol_says_what_was_tried(texts, tokenizer):
    with serving(FakeApi(texts, ["echo", "prompt_logprobs"], most=5)) as api:
        with pytest.raises(RemoteError) as caught:
            RemoteModel(RemoteBase(api.url, top_n=6, tail="drop"), tokenizer)
        # A chat might serve it, and would be another thing than was asked for.
        assert "prompt_logprobs: " in str(caught.value) and "chat" not in str(caught.value)
        assert "more than 5 logprobs" in str(caught.value)
        model = RemoteModel(RemoteBase(api.url, top_n=5, tail="drop", protocol="echo"), tokenizer)
        assert model.protocol == "echo"


def test_another_vocabulary_is_refused_with_the_first_token(texts, tokenizer, monkeypatch):
    monkeypatch.setattr(remote, "_SAMPLE", 262)
    moved = [*texts[:100], *texts[101:], "new"]
    for serves, word in (("prompt_logprobs", f"got {moved[100]!r} for id 100"), ("step", "'new'")):
        with (
            serving(FakeApi(moved, [serves], ids=serves != "step")) as api,
            pytest.raises(VocabularyError, match="base must have the tokens of its tok") as caught,
        ):
            RemoteModel(RemoteBase(api.url, top_n=-1, tail="drop"), tokenizer)
        assert word in str(caught.value)


Change = Callable[[dict[str, Any]], Any]


def test_a_special_token_may_come_without_its_text(tokenizer):
    """As llama.cpp's server writes it; any other may not."""
    special, other = min(tokenizer.added_tokens_decoder), 40
    matcher = TokenMatcher(tokenizer)
    assert matcher.id_of(special, "") == special
    matcher.settle()
    with pytest.raises(VocabularyError, match=r"got '' for id 40"):
        matcher.id_of(other, "")


def place(answer: Any) -> dict[str, Any]:
    """The first text's last place, of an answer with prompt_logprobs."""
    [choice] = [choice for choice in answer["choices"] if choice["index"] == 0]
    found: dict[str, Any] = choice["prompt_logprobs"][-1]
    return found


def logprob(value: Any) -> Change:
    return lambda answer: next(iter(place(answer).values())).update(logprob=value)


def other_id(token_id: str) -> Change:
    return lambda answer: place(answer).update({token_id: {"logprob": -30.0}})


HOSTILE: dict[str, Change] = {
    "nan": logprob(math.nan),
    "infinite": logprob(math.inf),
    "positive": logprob(0.5),
    "null": logprob(None),
    "text": logprob("-1.0"),
    "true": logprob(True),
    "lowest integer": logprob(-(10**400)),
    "negative id": other_id("-3"),
    "huge id": other_id("99999999999999999999"),
    "no id": other_id("x"),
    "too likely together": lambda a: [e.update(logprob=-0.1) for e in place(a).values()] and None,
    "a place too few": lambda a: [c["prompt_logprobs"].pop() for c in a["choices"]] and None,
    "a place too many": lambda a: [c["prompt_logprobs"].append({}) for c in a["choices"]] and None,
    "a null place": lambda a: (
        [c["prompt_logprobs"].append(None) for c in a["choices"]]
        and [c["prompt_logprobs"].pop(0) for c in a["choices"]]
        and None
    ),
    "an answer too few": lambda a: a["choices"].pop() and None,
    "no index": lambda a: [c.pop("index") for c in a["choices"]] and None,
    "no choices": lambda a: a.pop("choices") and None,
    "a list": lambda a: [a],
    "an error": lambda a: {"error": "x"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_refused_at_once(api, tokenizer, hostile_model, name):
    api.faults = [changed(HOSTILE[name])]
    before = hostile_model.endpoint.tries
    with pytest.raises(RemoteError, match="/completions"):
        hostile_model.score(TEXTS, 2)
    assert hostile_model.endpoint.tries == before + 1
    hostile_model.score(TEXTS, 2)  # and the next call is as if nothing had been


@pytest.fixture(scope="module")
def hostile_model(shared: FakeApi, tokenizer: Any) -> RemoteModel:
    return RemoteModel(RemoteBase(shared.url, top_n=9, tail="drop"), tokenizer)


def test_a_token_named_twice_is_refused(tokenizer, texts):
    with serving(FakeApi(texts, ["content"])) as api:
        model = RemoteModel(RemoteBase(api.url, top_n=5, tail="drop"), tokenizer)
        for change in (
            lambda a: _entries(a)[1].update(id=_entries(a)[0]["id"], token=_entries(a)[0]["token"]),
            lambda a: _entries(a)[1].update(id="7"),
            lambda a: _entries(a)[1].update(id=1.5),
        ):
            api.faults = [changed(change)]
            with pytest.raises(RemoteError):
                model.score(TEXTS, 1)


def test_minus_infinity_is_known_and_padding_is_not_read(api, hostile_model):
    def change(answer: Any) -> None:
        entries = place(answer)
        least = min(entries, key=lambda i: entries[i]["logprob"])
        entries[least]["logprob"] = -math.inf
        entries["100000"] = {"logprob": -0.0001 + math.log(1 - _sum(entries)), "decoded_token": ""}

    api.faults = [changed(change)]
    row = hostile_model.score([[5, 9]], 1)[0, 0]
    # Nine were asked for: the padding, seven, and the tenth (the token that stands there) or the
    # one that can't be.
    assert row.isfinite().sum() == 8
    assert row[row.isfinite()].min() >= -9999


def _sum(entries: Any) -> float:
    return math.fsum(math.exp(e["logprob"]) for e in entries.values())


@pytest.mark.parametrize(
    "faults",
    [[status(500)], [status(429), status(503)], [cut, cut, cut], [changed(lambda a: None), cut]],
)
def test_what_passes_is_tried_again(api, tokenizer, faults):
    model = RemoteModel(RemoteBase(api.url, top_n=3, tail="drop"), tokenizer)
    api.faults = list(faults)
    torch.testing.assert_close(model.score(TEXTS, 1), expected(api, TEXTS, 1, 3))


def test_retries_end_with_the_attempts_and_with_the_budget(api, tokenizer):
    base = RemoteBase(api.url, top_n=3, tail="drop", attempts=3, budget=5.0)
    model = RemoteModel(base, tokenizer)
    before = model.endpoint.tries
    api.faults = [status(500)] * 3
    with pytest.raises(RemoteError, match="answered 500: .*later"):
        model.score(TEXTS, 1)
    assert model.endpoint.tries == before + 3
    api.faults = [status(429, retry_after="60")]
    with pytest.raises(RemoteError, match="answered 429"):
        model.score(TEXTS, 1)
    assert model.endpoint.tries == before + 4


def test_a_slow_answer_ends_with_the_timeout(api, tokenizer):
    base = RemoteBase(api.url, top_n=3, tail="drop", attempts=1, timeout=0.2)
    model = RemoteModel(base, tokenizer)
    api.faults = [slow(1.0)]
    with pytest.raises(RemoteError, match="can't be reached: .*timed out"):
        model.score(TEXTS, 1)


def test_a_huge_body_is_not_read_to_its_end(api, tokenizer):
    model = RemoteModel(RemoteBase(api.url, top_n=3, tail="drop"), tokenizer)
    api.faults = [lambda _: (200, {}, b" " * (2 << 20))]
    with pytest.raises(RemoteError, match="answered with more than 1[0-9]+ bytes"):
        model.score(TEXTS, 1)


def test_deep_brackets_are_no_crash(api, tokenizer):
    base = RemoteBase(api.url, top_n=3, tail="drop", attempts=1)
    model = RemoteModel(base, tokenizer)
    api.faults = [lambda _: (200, {}, b"[" * 200_000)]
    with pytest.raises(RemoteError, match="no JSON, or cut"):
        model.score(TEXTS, 1)


def test_a_redirect_is_not_followed(api, tokenizer):
    model = RemoteModel(RemoteBase(api.url, top_n=3, tail="drop"), tokenizer)
    api.faults = [status(307, location="http://127.0.0.1:9/v1/completions")]
    with pytest.raises(RemoteError, match="answered 307"):
        model.score(TEXTS, 1)


def test_the_circuit_opens_and_closes_again(api, tokenizer, monkeypatch):
    monkeypatch.setattr(endpoint, "_REST", 0.3)
    base = RemoteBase(api.url, top_n=3, tail="drop", attempts=4)
    model = RemoteModel(base, tokenizer)
    api.faults = [status(500)] * 8
    for _ in range(2):
        with pytest.raises(RemoteError, match="answered 500"):
            model.score(TEXTS, 1)
    sent = len(api.requests)
    with pytest.raises(RemoteError, match="has failed 8 times .*; it is left alone for"):
        model.score(TEXTS, 1)
    assert len(api.requests) == sent
    time.sleep(0.35)
    torch.testing.assert_close(model.score(TEXTS, 1), expected(api, TEXTS, 1, 3))


def test_nobody_there(tokenizer):
    with pytest.raises(RemoteError, match="http://127.0.0.1:9/v1 can't be reached"):
        RemoteModel(RemoteBase("http://127.0.0.1:9/v1", attempts=2, tail="drop"), tokenizer)


def test_the_key_is_sent_and_is_in_no_log(api, tokenizer, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PROXYTUNE_BASE_KEY", KEY)
    base = RemoteBase(api.url, top_n=3, tail="drop", attempts=2)
    model = RemoteModel(base, tokenizer)
    api.faults = [status(500, f"of {KEY}"), status(500, f"of {KEY}")]
    with pytest.raises(RemoteError, match=r"of \*\*\*") as caught:
        model.score(TEXTS, 1)
    assert {headers["authorization"] for _, _, headers in api.requests} == {f"Bearer {KEY}"}
    api.faults = [status(401, f"wrong key {KEY}")]
    with pytest.raises(RemoteError, match=r"401: .*\*\*\*.*read from PROXYTUNE_BASE_KEY") as denied:
        RemoteModel(base, tokenizer)
    said = [*caplog.messages, str(caught.value), str(denied.value), repr(base), repr(model)]
    said += [repr(model.endpoint), json.dumps(model.info())]
    assert caplog.messages and not [text for text in said if KEY in text]
    assert any(message.startswith("try 1: http://127.0.0.1") for message in caplog.messages)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"url": "127.0.0.1:8000"}, "url must be such as"),
        ({"url": "ftp://x/v1"}, "url must be such as .*'ftp'"),
        ({"url": "http://x/v1?key=1"}, "url must be such as .* a query"),
        ({"url": "http://me:key@x/v1"}, "url must hold no key"),
        ({"top_n": 0}, "top_n must be an integer of at least 1, or -1, got 0"),
        ({"top_n": True}, "top_n must be"),
        ({"tail": "expert"}, "tail must be one of drop, anti, uniform, got 'expert'"),
        ({"protocol": "grpc"}, "protocol must be one of"),
        ({"attempts": 0}, "attempts must be an integer of at least 1, got 0"),
        ({"timeout": math.inf}, "timeout must be seconds above 0, got inf"),
        ({"budget": -1}, "budget must be seconds above 0, got -1"),
        ({"context": 2}, "context must be an integer of at least 3, got 2"),
    ],
)
def test_arguments_are_checked(values, words):
    with pytest.raises(ValueError, match=words):
        RemoteBase(**{"url": "http://127.0.0.1:1/v1", **values})


def test_a_base_alone_has_no_anti(api, tokenizer):
    with pytest.raises(
        ValueError, match="tail must be 'drop' or 'uniform' where the base is alone"
    ):
        ptk.Trio.from_models(RemoteBase(api.url, tail="anti"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer must be given for a remote base alone"):
        ptk.load_trio(base=RemoteBase(api.url))
    trio = ptk.Trio.from_models(RemoteBase(api.url), tokenizer=tokenizer)
    assert (trio.base.tail, trio.roles) == ("drop", ("base",))
