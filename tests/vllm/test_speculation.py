"""Drafts change nothing: n-gram and draft-model speculation give the decoder's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

from tests.vllm.trios import decode, generate, greedy, save_model, save_trio

# numba, about vLLM's n-gram search.
pytestmark = pytest.mark.filterwarnings("ignore:\\s*Encountered the use of a type")

PROMPTS = [list(b"hello world"), list(b"abcabcabcabcabc"), list(b"proxy tuning " * 9), [97]]
TOKENS = 32


def drafters(root: Path) -> dict[str, dict[str, Any]]:
    return {
        "ngram": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        "draft_model": {
            "method": "draft_model",
            "model": str(save_model(root, "expert")),
            "num_speculative_tokens": 3,
        },
    }


@pytest.fixture(scope="module", params=["ngram", "draft_model"])
def speculating(
    request: pytest.FixtureRequest, make_llm: Callable[..., Any], tmp_path_factory: Any
) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("members")
    trio = save_trio(root, "llama", alpha=0.5)
    config = drafters(root)[request.param]
    return trio, make_llm(trio, speculative_config=config, disable_log_stats=False)


def test_greedy_tokens(speculating):
    trio, llm = speculating
    got = generate(llm, PROMPTS, [None] * len(PROMPTS), TOKENS)
    assert got == decode(trio, PROMPTS, greedy([0.5] * len(PROMPTS), TOKENS))
    drafted = {m.name: m.value for m in llm.get_metrics() if "spec_decode_num_draft" in m.name}
    assert drafted["vllm:spec_decode_num_draft_tokens"] > 0


def test_an_alpha_that_would_be_dropped_is_refused(speculating):
    from vllm.exceptions import VLLMValidationError

    _, llm = speculating
    with pytest.raises(
        VLLMValidationError, match="own alpha does not reach the model under speculative"
    ):
        generate(llm, [[97]], [0.5], 2)
    # The engine goes on.
    assert len(generate(llm, [[97]], [None], 2)[0]) == 2
