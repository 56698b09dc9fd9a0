"""A remote base that our own server serves: where it tells all, the tokens are the local trio's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("circuitbreaker", reason="a remote base needs the extra remote")
pytest.importorskip("tenacity", reason="a remote base needs the extra remote")

import proxytune_kernels as ptk
from proxytune_kernels.decoder import remote
from proxytune_kernels.trio import RemoteError
from tests.cli import assert_one_sentence, invoke
from tests.decoder.conftest import near_trio
from tests.documents import examples
from tests.server.serving import PROMPT, Serving, serving

SHIPPED = Path(str(files("proxytune_kernels") / "data" / "trio"))
SETTINGS = [
    ptk.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    ptk.SamplingParams(seed=3, max_tokens=12, ignore_eos=True),
    ptk.SamplingParams(seed=4, max_tokens=6, temperature=0.7, top_p=0.9, alpha=0.5, logprobs=3),
    ptk.SamplingParams(seed=5, max_tokens=6, top_k=20, min_p=0.02, alpha=(1.0, 0.0), steering=True),
    ptk.SamplingParams(seed=6, max_tokens=4, alpha=0.0, prompt_logprobs=2, n=2),
    ptk.SamplingParams(seed=7, max_tokens=6, frequency_penalty=0.8, bad_words=["e"]),
]


@pytest.fixture(scope="module")
def alone() -> Iterator[Serving]:
    """A server of the shipped base, unsteered."""
    trio = ptk.load_trio(base=SHIPPED / "base", tokenizer=SHIPPED, dtype="float32")
    with serving(ptk.Decoder(trio), max_prompt_logprobs=-1, api_key="sk-1") as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROXYTUNE_BASE_KEY", "sk-1")
        yield


def opened(alone: Serving, **settings: Any) -> ptk.Trio:
    base = ptk.RemoteBase(f"{alone.url}/v1", **settings)
    return ptk.load_trio("shipped", base=base, dtype="float32")


@pytest.fixture(scope="module")
def known(alone: Serving) -> ptk.Trio:
    """Of each place the twenty likeliest tokens are known."""
    return opened(alone)


@pytest.fixture(scope="module")
def tiny() -> ptk.Trio:
    return near_trio()


@pytest.fixture(scope="module")
def decoder(tiny: ptk.Trio) -> Iterator[ptk.Decoder]:
    """Of a trio whose base is remote, and tells of all tokens."""
    alone = ptk.Trio.from_models(tiny.base, tokenizer=tiny.tokenizer)
    with serving(ptk.Decoder(alone), max_prompt_logprobs=-1) as running:
        base = ptk.RemoteBase(f"{running.url}/v1", top_n=-1)
        yield ptk.Decoder(ptk.Trio.from_models(base, tiny.expert, tiny.anti, tiny.tokenizer), 8)


def test_with_all_known_the_tokens_are_the_local_trios_seed_for_seed(decoder, tiny):
    # x is the local one but for a number a row. Rounded to fp32 it moves by 2^-20 at most, as do
    # forwards of another shape: a token differs only where two scores are as close.
    prompts = ["A", "a longer prompt"] * len(SETTINGS)
    params = [p for p in SETTINGS for _ in range(2)]
    ours, theirs = (d.generate(prompts, params) for d in (decoder, ptk.Decoder(tiny, 8)))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.token_ids, mine.text) == (other.token_ids, other.text)
        torch.testing.assert_close(mine.logprobs, other.logprobs, rtol=0, atol=1e-4)
        assert mine.coverage == pytest.approx([1.0] * len(mine.token_ids), abs=1e-5)
        assert other.coverage is None
        if other.prompt_logprobs is not None:
            assert mine.prompt_logprobs is not None
            pairs = zip(mine.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
            assert all(said == pytest.approx(wanted, abs=1e-4) for said, wanted in pairs)


def test_drafts_are_scored_by_one_call(known):
    decoder = ptk.Decoder(known, 2)
    before = known.base.endpoint.tries
    params = ptk.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = decoder.generate(PROMPT, params)
    calls = known.base.endpoint.tries - before
    assert calls <= 0.3 * len(outputs[0].token_ids)
    assert decoder.statistics()["speculative_rounds"] > 0
    assert decoder.info()["graphs"].startswith("none: the base answers from elsewhere")
    # Chunks of a prompt would be calls.
    short = ptk.Decoder(known, 1, prefill_chunk=8)
    before = known.base.endpoint.tries
    short.generate(PROMPT, ptk.SamplingParams(max_tokens=1))
    assert known.base.endpoint.tries == before + 1


def test_of_few_tokens_known_the_rest_goes_where_the_tail_says(alone, trio32):
    ids = torch.tensor([trio32.tokenize(PROMPT)["base"]])
    with torch.no_grad():
        base = trio32.base(ids).logits[0, -1].softmax(-1)
    known = float(base.topk(5).values.sum())
    params = ptk.SamplingParams(seed=1, max_tokens=3, steering=True)
    for tail in ("drop", "uniform"):
        [output] = ptk.Decoder(opened(alone, top_n=5, tail=tail), 1).generate(PROMPT, params)
        assert output.coverage and output.steering
        assert len(output.coverage) == len(output.token_ids) == 3
        assert output.coverage[0] == pytest.approx(known, abs=1e-4)
        # What is left is the whole where the rest is dropped.
        wanted = float(base[output.token_ids[0]]) / (known if tail == "drop" else 1)
        assert output.steering[0].base == pytest.approx(wanted, abs=1e-4)
        assert tail == "uniform" or max(s.base_rank for s in output.steering) <= 5


def test_complete_gives_all_mass_once():
    base = torch.tensor(
        [[-0.5, -2.0, -torch.inf, -torch.inf], [-0.1, -torch.inf, -4.0, -torch.inf]]
    )
    anti = torch.tensor([[5.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    known = torch.tensor([0.5, 0.1]).neg().exp() + torch.tensor([2.0, 4.0]).neg().exp()
    for tail, ratio in (("anti", 2.0), ("uniform", 0.0)):
        found, coverage = remote.complete(base, anti, tail, None)
        torch.testing.assert_close(coverage, known)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(2))
        assert torch.equal(found[base.isfinite()], base[base.isfinite()])
        assert found[0, 2] - found[0, 3] == pytest.approx(ratio, abs=1e-6)
    # The rows of a batch that are not steered have no anti, whatever stands in its logits.
    found, _ = remote.complete(base, anti, "anti", torch.tensor([True, False]))
    assert found[0].isfinite().all() and torch.equal(found[1], base[1])
    assert torch.equal(remote.complete(base, anti, "drop", None)[0], base)
    assert torch.equal(remote.complete(base, None, "anti", None)[0], base)


def test_a_call_that_fails_ends_the_requests_and_leaves_the_decoder_whole(decoder, monkeypatch):
    base = decoder.trio.base
    [wanted] = decoder.generate("a", SETTINGS[1])
    score = base.score
    calls: list[None] = []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise RemoteError("down")
        return score(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(base, "score", failing)
        with pytest.raises(RemoteError, match="down"):
            decoder.generate(["a", "b"], SETTINGS[1])
    [again] = decoder.generate("a", SETTINGS[1])
    assert again.token_ids == wanted.token_ids


def test_the_server_gives_the_logprobs_of_a_prompts_last_positions(alone, reference):
    ids = reference.trio.tokenize(PROMPT)["base"]
    body = {"model": "shipped", "prompt": [ids, ids[:9]], "max_tokens": 1}
    headers = {"authorization": "Bearer sk-1"}
    asked = {**body, "prompt_logprobs": 3, "prompt_logprobs_last": 4}
    whole, part = (
        json.loads(alone.ask("/v1/completions", given, **headers)[1])["choices"]
        for given in ({**body, "prompt_logprobs": 3}, asked)
    )
    for all_of, some, length in zip(whole, part, (len(ids), 9), strict=True):
        listed = some["prompt_logprobs"]
        assert len(listed) == length and listed[:-4] == [None] * (length - 4)
        for place, wanted in zip(listed[-4:], all_of["prompt_logprobs"][-4:], strict=True):
            assert {i: e["decoded_token"] for i, e in place.items()} == {
                i: e["decoded_token"] for i, e in wanted.items()
            }
            for i, entry in place.items():
                assert entry["logprob"] == pytest.approx(wanted[i]["logprob"], abs=1e-4)
    with torch.no_grad():
        rows = reference.trio.base(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, row in zip(whole[0]["prompt_logprobs"][1:], rows, strict=False):
        top = row.topk(3)
        assert set(map(str, top.indices.tolist())) <= set(place)
        assert place[str(int(top.indices[0]))]["logprob"] == pytest.approx(
            float(top.values[0]), abs=1e-3
        )


def test_the_server_bounds_prompt_logprobs(server):
    body = {"model": "shipped", "prompt": "a", "prompt_logprobs": 21}
    for more, word in (({}, "at most|in .0, 20"), ({"prompt_logprobs": -1}, "in .0, 20")):
        error = server.error({**body, **more})
        assert error["param"] == "prompt_logprobs" and "[0, 20]" in error["message"], word


def test_a_server_over_a_remote_base_says_what_is_known(known):
    with serving(ptk.Decoder(known, 4)) as running:
        body = {"model": "shipped", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        [choice] = json.loads(running.ask("/v1/completions", body)[1])["choices"]
        assert len(choice["coverage"]) == 4 and all(0.1 < x <= 1 for x in choice["coverage"])
        with running.open("/v1/completions", {**body, "stream": True}) as response:
            lines = [json.loads(x[6:]) for x in response.read().split(b"\n\n") if b"{" in x]
        streamed = [x for line in lines for c in line["choices"] for x in c.get("coverage", ())]
        assert streamed == pytest.approx(choice["coverage"], abs=1e-5)


def test_the_pages_example(alone, capsys):
    [code] = examples("docs/remote.md", "python")
    exec(code.replace("http://127.0.0.1:8000", alone.url), {})
    text, coverage, info = capsys.readouterr().out.rsplit("\n", 3)[:3]
    assert "#### 7" in text
    assert 0 < float(coverage) <= 1
    assert "'protocol': 'prompt_logprobs', 'top_n': 20, 'tail': 'anti'" in info


def test_the_commands_take_a_url(alone):
    url = f"{alone.url}/v1"
    given = ("generate", PROMPT, "--trio", "shipped", "--base-url", url, "--base-top-n", 8)
    result = invoke(
        *given, "--dtype", "float32", "--temperature", 0, "--max-tokens", 5, "--format", "jsonl"
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert len(record["coverage"]) == len(record["token_ids"]) == 5
    said = invoke("info", "--trio", "shipped", "--base-url", url).stdout
    assert f"shipped at {url}, asked by prompt_logprobs for 20 tokens, tail anti" in said
    assert_one_sentence(
        invoke("generate", "a", "--base", "x", "--base-url", url), 2, "give --base or --base-url"
    )
    assert_one_sentence(invoke("info", "--base-url", "x"), 2, "url must be such as")
    wrong = ("generate", "a", "--trio", "shipped", "--base-url", "http://127.0.0.1:9/v1")
    assert_one_sentence(invoke(*wrong), 1, "can't be reached", logs=True)
