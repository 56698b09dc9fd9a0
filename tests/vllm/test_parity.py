"""vLLM's tokens for a trio are our decoder's, on every kind of member."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import proxytune_kernels as ptk
from proxytune_kernels.integrations.vllm_plugin.export import export
from tests.vllm.trios import decode, generate, greedy, rounding, save_trio

ALPHAS = [1.0, 0.0, 0.5, -1.0]
PROMPTS: list[list[int]] = [list(b"hello world"), [97], list(b"proxy tuning " * 9), list(b"zz 123")]
TOKENS = 24

TRIOS = {
    "llama": ("llama",),
    "head-64": ("head-64",),
    "three-kv-heads": ("three-kv-heads",),
    "window": ("window",),
    "tied": ("tied",),
    "softcap": ("softcap",),
    "window-expert": ("llama", "window-expert"),
    "softcap-expert": ("tied", "softcap-expert"),
}


@pytest.mark.parametrize("members", TRIOS.values(), ids=TRIOS)
def test_tokens_are_the_decoders(members, make_llm, tmp_path):
    trio = save_trio(tmp_path, *members)
    got = generate(make_llm(trio), PROMPTS, ALPHAS, TOKENS)
    assert got == decode(trio, PROMPTS, greedy(ALPHAS, TOKENS))
    for prompt, alpha, tokens in zip(PROMPTS, ALPHAS, got, strict=True):
        exact, error = rounding(trio, prompt + tokens[:-1], alpha)
        best = exact[len(prompt) - 1 :].topk(2).values
        # Rounding could not have chosen another token: the test means what it says.
        assert float((best[:, 0] - best[:, 1]).min()) > 2 * error


def test_the_shipped_trio(make_llm, tmp_path):
    exported = export(tmp_path / "served", "shipped").directory
    trio = ptk.load_trio("shipped", dtype="float32")
    prompt = "Question: Ann has 2 pens and buys 5 more. How many pens does Ann have now?\nAnswer:"
    ids = trio.tokenize(prompt)["base"]
    outputs = ptk.Decoder(trio).generate([ids] * len(ALPHAS), greedy(ALPHAS, TOKENS))
    wanted = [list(output.token_ids) for output in outputs]
    assert generate(make_llm(exported), [ids] * len(ALPHAS), ALPHAS, TOKENS) == wanted
