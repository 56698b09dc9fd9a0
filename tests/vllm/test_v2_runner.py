"""The V2 runner, vLLM's default on a GPU, on a CPU: its Triton kernels run in the interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")
pytest.importorskip("triton", reason="triton is not installed here: `make vllm` runs these")

import proxytune_kernels as ptk
from tests.decoder.conftest import byte_tokenizer
from tests.documents import ROOT
from tests.vllm.trios import decode, greedy, rounding, save_model, save_trio

PROMPTS = [list(b"hello world"), [97], list(b"proxy tuning " * 9), list(b"zz 123")]
ALPHAS = [1.0, 0.0, 0.5, -1.0]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 20, "seed": 4},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "seed": 5},
    {"temperature": 0.0},
]
TOKENS = 10


def run_engine(directory: Path, trio: Path, batches: list[Any], **settings: Any) -> dict[str, Any]:
    requests = directory / "requests.json"
    requests.write_text(json.dumps({"model": str(trio), "settings": settings, "batches": batches}))
    command = [sys.executable, "-W", "ignore", "-m", "tests.vllm.v2_engine", str(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    # vLLM's logs go there, too.
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def request(prompt: list[int], **params: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": TOKENS, **params}


def tokens(batch: Any) -> list[list[int]]:
    return [output["token_ids"] for output in batch]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trio(tmp_path_factory.mktemp("members"), "llama")


@pytest.fixture(scope="module")
def results(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One engine for all of what follows: what it gave for each batch."""
    alphas = [{"extra_args": {"alpha": alpha}} for alpha in ALPHAS]
    rows = list(zip(PROMPTS, alphas, SAMPLING, strict=True))
    batches = [
        [request(p, temperature=0, logprobs=0, **a) for p, a, _ in rows],
        [request(p, **a, **s) for p, a, s in rows],
        # A neighbour whose logits vLLM must change, and which must get token 65 alone.
        [
            request(PROMPTS[0], **alphas[0], **SAMPLING[0]),
            request(PROMPTS[1], temperature=1.0, seed=9, allowed_token_ids=[65]),
            request(PROMPTS[2], temperature=0, repetition_penalty=1e6),
        ],
        [request(PROMPTS[0], extra_args={"alpha": "high"})],
        [request(PROMPTS[0], extra_args={"prompts": {"expert": "x"}})],
        # More than the cache holds at once.
        [
            request([97 + i] * 60, temperature=0.8, seed=i, extra_args={"alpha": 0.25 * i})
            | {"max_tokens": 40}
            for i in range(5)
        ],
        # vLLM masks the logits, our sampler draws.
        [
            request(PROMPTS[0], temperature=1.0, seed=1, choice=["yes", "no"])
            | {"ignore_eos": False}
        ],
    ]
    directory = tmp_path_factory.mktemp("requests")
    settings = {"num_gpu_blocks_override": 9, "block_size": 32, "disable_log_stats": False}
    return run_engine(directory, trio, batches, **settings)


def ours(alpha: float, **sampling: Any) -> ptk.SamplingParams:
    return ptk.SamplingParams(
        **{"max_tokens": TOKENS, "ignore_eos": True, "alpha": alpha, **sampling}
    )


def test_it_is_the_v2_runner_with_our_sampler(results):
    assert results["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert results["sampler"] == "FusedSampler"


def test_greedy_tokens_and_logprobs(trio, results):
    batch = results["batches"][0]
    assert tokens(batch) == decode(trio, PROMPTS, greedy(ALPHAS, TOKENS))
    for prompt, alpha, output in zip(PROMPTS, ALPHAS, batch, strict=True):
        chosen = output["token_ids"]
        x, error = rounding(trio, prompt + chosen[:-1], alpha)
        exact = x[len(prompt) - 1 :].log_softmax(-1)[range(TOKENS), chosen]
        assert (exact - exact.new_tensor(output["logprobs"])).abs().max() <= 2 * error


def test_seeded_draws_are_the_decoders(trio, results):
    params = [ours(a, **s) for a, s in zip(ALPHAS, SAMPLING, strict=True)]
    assert tokens(results["batches"][1]) == decode(trio, PROMPTS, params)


def test_what_a_neighbour_asks_of_vllm_changes_no_draw(results):
    seeded, allowed, penalised = tokens(results["batches"][2])
    assert seeded == tokens(results["batches"][1])[0]
    assert allowed == [65] * TOKENS
    assert len(set(penalised)) == TOKENS


def test_a_grammar_masks_what_our_sampler_draws_from(results):
    (chosen,) = tokens(results["batches"][6])
    assert byte_tokenizer().decode(chosen, skip_special_tokens=True) in ("yes", "no")


def test_bad_requests_are_refused(results):
    assert "alpha must be a finite number, got 'high'" in results["batches"][3]
    assert "prompts per role need proxytune_kernels.Decoder" in results["batches"][4]


def test_a_preempted_request_goes_on_with_its_draws(trio, results):
    assert results["preemptions"] > 0
    prompts = [[97 + i] * 60 for i in range(5)]
    params = [ours(0.25 * i, temperature=0.8, seed=i, max_tokens=40) for i in range(5)]
    assert tokens(results["batches"][5]) == decode(trio, prompts, params)


def test_each_alpha_holds_under_speculation(trio, tmp_path):
    drafter = {
        "method": "draft_model",
        "model": str(save_model(trio.parent, "expert")),
        "num_speculative_tokens": 2,
    }
    batch = [
        request(p, temperature=0, extra_args={"alpha": a})
        for p, a in zip(PROMPTS, ALPHAS, strict=True)
    ]
    results = run_engine(
        tmp_path, trio, [batch], speculative_config=drafter, disable_log_stats=False
    )
    assert results["drafts"] > 0
    assert results["sampler"] == "Sampler"
    wanted = decode(trio, PROMPTS, greedy(ALPHAS, TOKENS))
    assert tokens(results["batches"][0]) == wanted


def test_two_ranks_draw_from_their_parts_of_the_logits(trio, tmp_path, monkeypatch):
    # vLLM's own choice of cores wants a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    sampling = [*SAMPLING[:3], {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "seed": 6}]
    asked = [{"extra_args": {"alpha": a}} | s for a, s in zip(ALPHAS, sampling, strict=True)]
    first = request(PROMPTS[0], **asked[0])
    batches = [
        [request(p, **a) for p, a in zip(PROMPTS, asked, strict=True)],
        # None has top_p alone, nothing is read back from the device; one, and no promise holds.
        [request(p, **asked[i]) for i, p in enumerate(PROMPTS) if i != 2],
        [request(PROMPTS[2], **asked[2])],
        # What needs whole rows.
        [first | {"logprobs": 2}],
        [first | {"prompt_logprobs": 0}],
        [first | {"temperature": 0, "repetition_penalty": 1e6}],
        [first | {"choice": ["yes", "no"], "ignore_eos": False}],
    ]
    results = run_engine(
        tmp_path,
        trio,
        batches,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        disable_log_stats=False,
    )
    wanted = decode(trio, PROMPTS, [ours(a, **s) for a, s in zip(ALPHAS, sampling, strict=True)])
    every, counted, alone, logprobs, prompt_logprobs, penalised, chosen = map(
        tokens, results["batches"]
    )
    assert every == wanted
    assert counted == [row for i, row in enumerate(wanted) if i != 2]
    assert alone == wanted[2:3]
    assert logprobs == prompt_logprobs == wanted[:1]
    assert len(set(*penalised)) == TOKENS
    assert byte_tokenizer().decode(*chosen, skip_special_tokens=True) in ("yes", "no")
    for batch, (gathers, sent) in list(zip(batches, results["traffic"], strict=True))[:3]:
        assert gathers == []
        # Gathered logits would be 4 bytes * V a row.
        assert 0 < sum(sent) < 2000 * TOKENS * len(batch)
    assert all(gathers and not sent for gathers, sent in results["traffic"][3:])
