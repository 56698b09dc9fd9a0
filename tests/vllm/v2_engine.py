"""Runs requests through vLLM's V2 runner on a CPU, its Triton kernels interpreted.

    python -m tests.vllm.v2_engine REQUESTS.json

A process of its own: Triton decides when it is imported whether to interpret. vLLM wants Triton on
a CPU to have a backend for CPUs, which nothing uses when kernels are interpreted; one is named
here.

REQUESTS.json: {"model": DIR, "settings": {of LLM}, "batches": [[{"prompt": [ids], ...}]]}, where
the dots are of SamplingParams. Prints the token ids and logprobs of each batch, or the error of one
that was refused, and what its first worker told the others, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import triton.backends

from tests.vllm import conftest  # the environment

# Before vLLM is imported. The workers of several processes import this module first, too.
triton.backends.backends["cpu"] = types.SimpleNamespace(
    driver=types.SimpleNamespace(is_active=lambda: True), compiler=None
)


def generate(llm: Any, batch: list[dict[str, Any]]) -> Any:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    for request in batch:
        if "choice" in request:
            choice = StructuredOutputsParams(choice=request.pop("choice"))
            request["structured_outputs"] = choice
    prompts = [{"prompt_token_ids": request.pop("prompt")} for request in batch]
    params = [SamplingParams(**{"ignore_eos": True, **request}) for request in batch]
    try:
        outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    except VLLMValidationError as error:
        return str(error)
    return [
        {
            "token_ids": list(output.token_ids),
            "logprobs": output.logprobs
            and [
                row[token].logprob
                for row, token in zip(output.logprobs, output.token_ids, strict=True)
            ],
        }
        for output in outputs
    ]


def main() -> None:
    from vllm import LLM

    with open(sys.argv[1]) as file:
        said = json.load(file)
    tools = {"worker_extension_cls": "tests.vllm.workers.WorkerTools"}
    llm = LLM(said["model"], **{**conftest.ENGINE, **tools, **said["settings"]})
    runner, sampler = llm.collective_rpc("kinds")[0]
    llm.collective_rpc("count_gathers")
    results: dict[str, Any] = {"runner": runner, "sampler": sampler, "batches": [], "traffic": []}
    for batch in said["batches"]:
        results["batches"].append(generate(llm, batch))
        results["traffic"].append(llm.collective_rpc("traffic")[0])
    results |= {
        "preemptions": sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
        "drafts": sum(
            m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens"
        ),
    }
    print(json.dumps(results))
    conftest.close(llm)


if __name__ == "__main__":
    main()
