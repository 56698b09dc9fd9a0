"""Two ranks with half of every layer and of the vocabulary each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import proxytune_kernels as ptk
from tests.vllm.trios import decode, save_model, write_trio

ALPHAS = [1.0, 0.0, -1.0]
PROMPTS = [list(b"hello world"), [97], list(b"proxy tuning " * 9)]
TOKENS = 12


# The widths of base and pair, and how many gathers a step takes. vLLM pads vocabularies to 64: 262
# and 300 to 320 both, 400 to 448.
@pytest.mark.parametrize(("width", "gathers"), [(300, 1), (400, 3)])
def test_two_ranks(
    width: int,
    gathers: int,
    make_llm: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import SamplingParams

    # A core for each rank; vLLM's own choice wants a NUMA node for each.
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    members = {
        "base": save_model(tmp_path, "tied"),
        "expert": save_model(tmp_path, "expert", vocab_size=width),
        "anti": save_model(tmp_path, "anti", vocab_size=width),
    }
    trio = write_trio(tmp_path / "trio", members)
    llm = make_llm(
        trio,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        worker_extension_cls="tests.vllm.gathers.CountGathers",
    )
    llm.collective_rpc("count_gathers")
    params = [
        SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args={"alpha": alpha}
        )
        for alpha in ALPHAS
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ours = [
        ptk.SamplingParams(alpha=a, temperature=0, max_tokens=TOKENS, ignore_eos=True)
        for a in ALPHAS
    ]
    assert [list(o.outputs[0].token_ids) for o in outputs] == decode(trio, PROMPTS, ours)
    for shapes in llm.collective_rpc("gathered"):
        steps = len(shapes) // gathers
        assert len(shapes) == steps * gathers
        assert steps >= TOKENS
        assert {shape[-1] for shape in shapes} == ({160} if gathers == 1 else {160, 224})
