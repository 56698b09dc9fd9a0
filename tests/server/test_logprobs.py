"""Logprobs in the schema of each endpoint, what steering changed, and lm-eval's own clients."""

from __future__ import annotations

import json
from typing import Any

import pytest

import proxytune_kernels as ptk
from tests.server.serving import PROMPT, serving

SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 12}
# Two batches of other sizes differ by the rounding of fp32 products.
CLOSE: Any = {"rel": 1e-4, "abs": 1e-4}


@pytest.fixture(scope="module")
def output(reference):
    asked: dict[str, Any] = {**SAMPLED, "logprobs": 3, "prompt_logprobs": 3, "steering": True}
    return reference.generate(PROMPT, ptk.SamplingParams(**asked))[0]


def choices(server, path, stream=False, **body):
    """The choice of an answer, or those of a stream."""
    if path == "/v1/completions":
        body["prompt"] = body.get("prompt", PROMPT)
    else:
        body["messages"] = [{"role": "user", "content": PROMPT}]
    response, data = server.ask(path, {"model": "shipped", "stream": stream, **SAMPLED, **body})
    assert response.status == 200, data
    if not stream:
        return json.loads(data)["choices"]
    lines = [line for line in data.split(b"\n\n") if line.startswith(b"data: {")]
    return [json.loads(line[6:])["choices"][0] for line in lines]


def test_completions(server, output):
    [choice] = choices(server, "/v1/completions", logprobs=3)
    found = choice["logprobs"]
    assert "".join(found["tokens"]).startswith(choice["text"])
    own = [top[i] for top, i in zip(output.top_logprobs, output.token_ids, strict=True)]
    assert found["token_logprobs"] == pytest.approx(own, **CLOSE)
    for place, top in zip(found["top_logprobs"], output.top_logprobs, strict=True):
        assert sorted(place.values()) == pytest.approx(sorted(top.values()), **CLOSE)
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if offset < len(choice["text"]):
            assert choice["text"].startswith(token, offset)


def test_further_pairs(server, reference, output, trio32):
    body = {"model": "shipped", "prompt": PROMPT, "pair_alphas": [0.5]}
    assert "pair_alphas must have a number" in server.error(body)["message"]
    expert, anti = trio32.expert, trio32.anti
    trio = ptk.Trio.from_models(trio32.base, expert, anti, trio32.tokenizer, pairs=[(expert, anti)])
    with serving(ptk.Decoder(trio, 1)) as running:
        [choice] = choices(running, "/v1/completions", alpha=0.5, pair_alphas=[0.5])
    assert choice["text"] == output.text


def test_chat(server, output):
    [choice] = choices(server, "/v1/chat/completions", logprobs=True, top_logprobs=3)
    assert choice["logprobs"]["refusal"] is None
    content = choice["logprobs"]["content"]
    for place, top, i in zip(content, output.top_logprobs, output.token_ids, strict=True):
        assert place["logprob"] == pytest.approx(top[i], **CLOSE)
        assert bytes(place["bytes"]).decode() == place["token"]
        wanted = sorted(top.values(), reverse=True)[:3]
        assert [t["logprob"] for t in place["top_logprobs"]] == pytest.approx(wanted, **CLOSE)
    [choice] = choices(server, "/v1/chat/completions", logprobs=True)
    assert all(place["top_logprobs"] == [] for place in choice["logprobs"]["content"])


def test_streams_have_the_same_piece_by_piece(server):
    plain = "/v1/completions", {"logprobs": 2}
    chat = "/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}
    for path, asked in (plain, chat):
        [whole] = choices(server, path, steering=True, **asked)
        pieces = choices(server, path, stream=True, steering=True, **asked)
        parts = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
        for name in ("content",) if "chat" in path else ("tokens", "token_logprobs", "text_offset"):
            joined = [entry for part in parts for entry in part[name]]
            wanted = whole["logprobs"][name]
            if name == "content":
                joined, wanted = ([e["token"] for e in listed] for listed in (joined, wanted))
            assert joined == (pytest.approx(wanted, **CLOSE) if "logprobs" in name else wanted)
        steering = [s for piece in pieces for s in piece.get("steering", ())]
        assert [s["token"] for s in steering] == [s["token"] for s in whole["steering"]]


def test_a_key_is_there_and_null_where_nothing_is_asked_for(server):
    for path in ("/v1/completions", "/v1/chat/completions"):
        [choice] = choices(server, path)
        assert choice["logprobs"] is None and "steering" not in choice


def test_logprobs_as_drawn(server, output):
    [choice] = choices(server, "/v1/completions", logprobs=0, logprobs_mode="drawn")
    found = choice["logprobs"]["token_logprobs"]
    assert found == pytest.approx(output.logprobs, **CLOSE)
    assert found != pytest.approx(output.raw_logprobs, **CLOSE)


def test_an_echoed_prompt_has_its_logprobs(server, output):
    [choice] = choices(server, "/v1/completions", logprobs=3, echo=True)
    ids, known = output.prompt_token_ids["base"], output.prompt_logprobs
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    wanted = [top[i] for top, i in zip(known[1:], ids[1:], strict=True)]
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(wanted, **CLOSE)
    assert len(found["tokens"]) == len(ids) + len(output.token_ids)
    assert found["text_offset"][len(ids)] == len(PROMPT)
    error = server.error({"model": "shipped", "prompt": "a", "echo": True, "logprobs": 1,
                          "stream": True})  # fmt: skip
    assert error["param"] == "echo"


def test_steering(server, output):
    [choice] = choices(server, "/v1/completions", steering=True)
    for found, wanted in zip(choice["steering"], output.steering, strict=True):
        assert found.pop("token")
        assert found == pytest.approx(wanted._asdict(), **CLOSE)
    # Of what is not steered the pair says nothing.
    [choice] = choices(server, "/v1/completions", steering=True, alpha=0)
    assert {token["expert"] for token in choice["steering"]} == {None}


def test_parts_of_characters_are_bytes(server, reference):
    token_ids = reference.trio.tokenize("é", False)["base"]
    names = [reference.trio.tokenizer.convert_ids_to_tokens(i) for i in token_ids]
    assert len(token_ids) == 2, names
    [choice] = choices(
        server, "/v1/completions", prompt=[5, *token_ids], echo=True, logprobs=0, max_tokens=1
    )
    assert choice["logprobs"]["tokens"][1:3] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_lm_evals_clients_score_as_our_model_does(server, trio32, tmp_path):
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    pytest.importorskip("tenacity", reason="lm-eval's models behind an API need tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    from proxytune_kernels.integrations.lm_eval_model import ProxyTuneLM

    trio32.tokenizer.save_pretrained(tmp_path)
    ours = ProxyTuneLM(trio32)
    theirs = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="shipped", tokenizer=str(tmp_path),
        tokenizer_backend="huggingface", max_retries=1, num_concurrent=1, batch_size=2,
    )  # fmt: skip
    pairs = [(PROMPT, text) for text in (" 3 + 4 = 7", " 4 - 3 = 1", " 3 apples")]
    scored = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for found, wanted in zip(
        theirs.loglikelihood(scored, disable_tqdm=True), ours.loglikelihood(scored), strict=True
    ):
        assert found[0] == pytest.approx(wanted[0], **CLOSE)
        assert found[1] == wanted[1]
    until = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    asked = [Instance("generate_until", {}, (PROMPT, dict(until)), 0)]
    [text] = ours.generate_until(asked)
    assert theirs.generate_until(asked, disable_tqdm=True) == [text]
    chat = LocalChatCompletion(
        base_url=f"{server.url}/v1/chat/completions", model="shipped", max_retries=1
    )
    messages = json.dumps([{"role": "user", "content": PROMPT}])
    from lm_eval.models.api_models import JsonChatStr

    asked = [Instance("generate_until", {}, (JsonChatStr(messages), dict(until)), 0)]
    assert chat.generate_until(asked, disable_tqdm=True) == [text]
