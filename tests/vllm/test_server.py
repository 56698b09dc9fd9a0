"""An exported trio behind vLLM's OpenAI server, asked by the real client, end to end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import openai

import proxytune_kernels as ptk
from proxytune_kernels.integrations.vllm_plugin.export import export
from tests.documents import ROOT, examples
from tests.vllm.server import Server

SHIPPED = Path(str(files("proxytune_kernels") / "data" / "trio"))
QUESTION = "Question: {} has {} pens and buys {} more. How many pens does {} have now?\nAnswer:"
NAMES = ("Tom", "Ann", "Sam", "Mia", "Max", "Eva", "Ben", "Ida")
PROMPTS = [QUESTION.format(name, i, 9 - i, name) for i, name in enumerate(NAMES)]
ALPHAS = [1.0, 0.0, 0.5, -0.5, 1.5, 0.25, 0.75, 2.0]
TOKENS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    trio = Path(shutil.copytree(SHIPPED, root / "trio"))
    # The shipped trio has no chat template; the chat endpoint takes one.
    (trio / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    out = root / "served"
    export(out, trio, alpha=1.0)
    # fp32, as the decoder that tokens are compared with; nothing compiled, for the time it takes.
    options = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8")
    running = Server(out, root / "server.log", *options)
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def log(server: Server, request: pytest.FixtureRequest) -> Iterator[None]:
    """Show what the server said where a test fails."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        print(server.tail())


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def body(alpha: Any, **more: Any) -> dict[str, Any]:
    named = {} if alpha is None else {"vllm_xargs": {"alpha": alpha}}
    return {**named, "return_token_ids": True, "ignore_eos": True, **more}


def complete(client: openai.OpenAI, server: Server, prompt: str, alpha: Any, **more: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": TOKENS, "extra_body": body(alpha), **more}
    return client.completions.create(model=server.model, prompt=prompt, **settings)


def decode(prompts: Sequence[str], alphas: Sequence[float], **more: Any) -> list[ptk.RequestOutput]:
    """What our decoder gives."""
    settings = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, **more}
    params = [ptk.SamplingParams(alpha=alpha, **settings) for alpha in alphas]
    return ptk.Decoder(ptk.load_trio("shipped", dtype="float32")).generate(list(prompts), params)


def test_concurrent_requests_have_an_alpha_each(client, server):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda p, a: complete(client, server, p, a), PROMPTS, ALPHAS))
    wanted = decode(PROMPTS, ALPHAS)
    assert [a.choices[0].token_ids for a in answers] == [w.token_ids for w in wanted]
    assert [a.choices[0].text for a in answers] == [w.text for w in wanted]
    # The same prompt, so that nothing but alpha tells the answers apart.
    one = [
        complete(client, server, PROMPTS[0], alpha).choices[0].token_ids for alpha in (0, 0.5, 1)
    ]
    assert one == [w.token_ids for w in decode([PROMPTS[0]] * 3, [0.0, 0.5, 1.0])]
    assert len({tuple(ids) for ids in one}) > 1


def test_without_an_alpha_it_is_the_directorys(client, server):
    [wanted] = decode([PROMPTS[1]], [1.0], ignore_eos=False, max_tokens=40)
    answer = complete(client, server, PROMPTS[1], None, max_tokens=40, extra_body={})
    assert answer.choices[0].text == wanted.text == " 1 + 8 = 9\n#### 9"
    assert answer.choices[0].finish_reason == "stop"


def test_chat(client, server):
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": PROMPTS[2]}],
        temperature=0,
        max_tokens=TOKENS,
        extra_body=body(0.5),
    )
    [wanted] = decode([PROMPTS[2]], [0.5])
    assert answer.choices[0].message.content == wanted.text


def test_streaming(client, server):
    stream = complete(client, server, PROMPTS[3], 0.75, stream=True)
    parts = [chunk.choices[0].text for chunk in stream]
    assert len(parts) > 1
    assert "".join(parts) == decode([PROMPTS[3]], [0.75])[0].text


def test_a_seed_repeats_the_draws(client, server):
    drawn = [
        complete(client, server, PROMPTS[4], 0.5, temperature=1.0, seed=seed).choices[0].token_ids
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@torch.no_grad()
def raw_logprobs(prompt: str, token_ids: Sequence[int], alpha: float, dtype: str) -> torch.Tensor:
    """Log-softmax of the combined logits at the output's tokens, by plain forwards in ``dtype``."""
    trio = ptk.load_trio("shipped", dtype=dtype)
    ids = trio.tokenize(prompt)["base"]
    row = torch.tensor([[*ids, *token_ids]])
    base, expert, anti = (model(row).logits[0].double() for model in trio.models.values())
    scored = (base + alpha * (expert - anti))[len(ids) - 1 : -1].log_softmax(-1)
    return scored.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def test_logprobs(client, server):
    choice = complete(client, server, PROMPTS[5], 0.5, logprobs=2).choices[0]
    exact = raw_logprobs(PROMPTS[5], choice.token_ids, 0.5, "float64")
    # vLLM's fp32 sums run in another order than transformers': errors of one size, 8 times allowed.
    own = (raw_logprobs(PROMPTS[5], choice.token_ids, 0.5, "float32") - exact).abs().max()
    got = torch.tensor(choice.logprobs.token_logprobs, dtype=torch.float64)
    assert (got - exact).abs().max() < 8 * own
    assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)


@pytest.mark.parametrize("alpha", ["strong", [1.0, 2.0]])
def test_a_bad_alpha_is_refused(client, server, alpha):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, server, PROMPTS[0], alpha)
    assert caught.value.status_code == 400
    assert f"alpha must be a finite number, got {alpha!r}" in caught.value.message
    # The server goes on.
    assert complete(client, server, PROMPTS[0], 1.0).choices[0].finish_reason == "length"


def test_metrics(client, server):
    def generated() -> float:
        [value] = re.findall(
            r"^vllm:generation_tokens_total{.*} (\S+)$", server.read("/metrics"), re.M
        )
        return float(value)

    before = generated()
    complete(client, server, PROMPTS[6], 1.0)
    assert generated() - before == TOKENS


def test_the_client_of_the_documentation(server, tmp_path):
    [code] = [block for block in examples("docs/vllm.md", "python") if "openai" in block]
    (tmp_path / "client.py").write_text(code)
    address = {"OPENAI_BASE_URL": f"{server.address}/v1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, tmp_path / "client.py"], capture_output=True, text=True, timeout=60,
        check=False, cwd=tmp_path, env={**os.environ, **address, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 + 4 = 7" in done.stdout
