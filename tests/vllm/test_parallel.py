"""Two processes: half of every layer and of the vocabulary each, or half of the layers."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

from tests.vllm.trios import decode, generate, greedy, save_model, write_trio

ALPHAS = [1.0, 0.0, -1.0]
PROMPTS = [list(b"hello world"), [97], list(b"proxy tuning " * 9)]
TOKENS = 12
# vLLM pads vocabularies to multiples of 64, so 262 and 300 are both 320 wide: 160 a rank.
WIDTH, SHARD = 300, 160


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_two_processes(kind, make_llm, tmp_path, monkeypatch):
    # vLLM's own choice wants a NUMA node for each.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    members = {
        "base": save_model(tmp_path, "tied"),
        "expert": save_model(tmp_path, "expert", vocab_size=WIDTH),
        "anti": save_model(tmp_path, "anti", vocab_size=WIDTH),
    }
    trio = write_trio(tmp_path / "trio", members)
    llm = make_llm(
        trio,
        **{f"{kind}_parallel_size": 2},
        distributed_executor_backend="mp",
        worker_extension_cls="tests.vllm.workers.WorkerTools",
    )
    llm.collective_rpc("make_intermediate_tensors")
    llm.collective_rpc("count_gathers")
    got = generate(llm, PROMPTS, ALPHAS, TOKENS)
    assert got == decode(trio, PROMPTS, greedy(ALPHAS, TOKENS))
    if kind == "tensor":
        for shapes, _ in llm.collective_rpc("traffic"):
            # A step gives each of the requests in it a row at most, and there are three requests:
            # three gathers a step would be three times as many.
            rows = sum(rows for rows, _ in shapes)
            assert {width for _, width in shapes} == {SHARD}
            assert len(ALPHAS) * TOKENS <= rows < 2 * len(ALPHAS) * TOKENS
