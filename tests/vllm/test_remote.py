"""A base that vLLM serves: ids are exact, one call scores drafts, tokens are the local trio's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import proxytune_kernels as ptk
from proxytune_kernels.trio import RemoteError
from proxytune_kernels.trio.vocabulary import VocabularyError
from tests.vllm.server import Server

SHIPPED = Path(str(files("proxytune_kernels") / "data" / "trio"))
QUESTION = "Question: {0} has {1} pens and buys {2} more. How many pens does {0} have now?\nAnswer:"
PROMPTS = [QUESTION.format(name, i, 9 - i) for i, name in enumerate(("Tom", "Ann", "Sam", "Mia"))]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("remote")
    base = Path(shutil.copytree(SHIPPED / "base", root / "base"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, base / name)
    options = (
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-num-seqs",
        "8",
        "--max-logprobs",
        "-1",
    )
    running = Server(base, root / "server.log", *options)
    yield running
    running.stop()


def opened(server: Server, **settings: object) -> ptk.Trio:
    base = ptk.RemoteBase(f"{server.address}/v1", **settings)  # type: ignore[arg-type]
    return ptk.load_trio("shipped", base=base, dtype="float32")


@pytest.fixture(scope="module")
def reference() -> ptk.Decoder:
    return ptk.Decoder(ptk.load_trio("shipped", dtype="float32"), 4)


def test_with_all_known_the_tokens_are_the_local_trios(server, reference):
    # One text and few tokens: vLLM tells of all tokens at all places of it, each time.
    params = ptk.SamplingParams(seed=5, max_tokens=8, ignore_eos=True, top_p=0.95)
    decoder = ptk.Decoder(opened(server, top_n=-1), 1)
    [mine], [other] = (d.generate(PROMPTS[0], params) for d in (decoder, reference))
    assert mine.token_ids == other.token_ids
    assert mine.coverage == pytest.approx([1.0] * 8, abs=1e-4)


def test_one_call_scores_the_drafts_of_all(server):
    trio = opened(server)
    assert trio.base.protocol == "prompt_logprobs"
    before = trio.base.endpoint.tries
    params = ptk.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = ptk.Decoder(trio, 4).generate(PROMPTS, params)
    assert trio.base.endpoint.tries - before <= 0.3 * 16
    assert all(min(output.coverage or [0.0]) > 0 for output in outputs)


@pytest.mark.parametrize("protocol", ["prompt_logprobs", "echo", "step"])
def test_each_protocol_tells_the_likeliest(server, reference, protocol):
    trio = opened(server, top_n=20, protocol=protocol)
    texts = [reference.trio.tokenize(prompt)["base"] for prompt in PROMPTS]
    count = 3 if trio.base.scores_drafts else 1
    found = trio.base.score(texts, count)
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            own = reference.trio.base(torch.tensor([text])).logits[0, -count:].log_softmax(-1)
        assert (row.isfinite().sum(-1) == 20).all()
        known = row.isfinite()
        torch.testing.assert_close(row[known], own[known], rtol=0, atol=1e-3)
        assert (row.argmax(-1) == own.argmax(-1)).all()


def test_what_vllm_refuses_is_said(server):
    with pytest.raises(RemoteError, match="404"):
        opened(server, model="other")
    moved = ptk.load_trio("shipped").tokenizer
    moved = type(moved).from_pretrained(str(SHIPPED))
    moved.add_tokens(["<|one|>", "<|two|>"])
    with pytest.raises((RemoteError, VocabularyError), match=r"vocabulary|tokens of its tokenizer"):
        ptk.Trio.from_models(
            ptk.RemoteBase(f"{server.address}/v1", top_n=20, tail="drop"), tokenizer=moved
        )
