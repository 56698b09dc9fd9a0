"""Members with recurrent layers: their states go with their slots, and no other row's into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from proxytune_kernels.decoder import Decoder, Speculation, loop, memory
from proxytune_kernels.decoder.scoring import RoleStates
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import word_tokenizer
from tests.decoder.test_runner import VOCAB_SIZE, random_ids

_ALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_ATTENTION: dict[str, Any] = {
    **_ALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
KINDS: dict[str, Any] = {
    # Delta rule, and attention in every other layer.
    "qwen3.5": lambda: transformers.Qwen3_5ForCausalLM(
        transformers.Qwen3_5TextConfig(
            **_ATTENTION, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    ),
    # Both in one layer.
    "falcon-h1": lambda: transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(
            **_ATTENTION, num_hidden_layers=1, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8,
            mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=8, mamba_expand=2,
        )
    ),
    # No attention; several tokens behind a state lose it in transformers 5.23.
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(**_ALL, num_hidden_layers=2, state_size=8)
    ),
    # Convolutions alone.
    "lfm2": lambda: transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(
            **_ATTENTION, num_hidden_layers=2, layer_types=["conv", "full_attention"]
        )
    ),
}  # fmt: skip
PROMPTS = [random_ids(length, seed) for seed, length in enumerate((9, 1, 14, 7))]


def make_trio(kind: str) -> Trio:
    models: list[Any] = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(KINDS[kind]().double().eval())
        with torch.no_grad():
            for weight in models[-1].parameters():
                # As initialised, what a state holds hardly shows in the logits.
                weight *= 2.0 if weight.dim() > 1 else 1.0
    base, expert, anti = models
    return Trio.from_models(base, expert, anti, word_tokenizer(VOCAB_SIZE))


@pytest.fixture(scope="module", params=KINDS)
def trio(request) -> Trio:
    return make_trio(request.param)


@torch.no_grad()
def naive(trio: Trio, token_ids: list[int]) -> torch.Tensor:
    """Combined logits [q, V] at alpha 1, without any cache."""
    base, expert, anti = (
        trio.models[role](torch.tensor([token_ids]), use_cache=False).logits[0].float()
        for role in ("base", "expert", "anti")
    )
    return base + (expert - anti)


def continued(trio: Trio, prompt: list[int], count: int) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + count and token_ids[-1] != 1:
        token_ids.append(int(naive(trio, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=9, **params)


def test_tokens_are_those_of_whole_forwards_whatever_shares_the_batch(trio):
    wanted = [continued(trio, prompt, 9) for prompt in PROMPTS]
    decoder = Decoder(trio, 3, 64)
    # The second time slots hold what others left; both outputs of a prompt run it.
    for n in (1, 2):
        outputs = decoder.generate(PROMPTS, greedy(n=n))
        assert [list(o.token_ids) for o in outputs] == [w for w in wanted for _ in range(n)]


def test_a_step_leaves_the_states_of_a_prompt_that_runs_in_parts(trio, monkeypatch):
    """A prompt whose tokens are scored runs in parts, with steps of both rows between them."""
    monkeypatch.setattr(loop, "_SCORED", 5)
    decoder = Decoder(trio, 2, 64)
    prompt = PROMPTS[2]
    decoder.submit(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=2))
    decoder.submit(PROMPTS[3], greedy())
    # It takes the first slot, which the first leaves with its states.
    request_id = decoder.submit(prompt, greedy(prompt_logprobs=0))
    events = []
    while decoder.unfinished:
        events += decoder.step()
    [found] = [e.output for e in events if e.request_id == request_id and e.output is not None]
    scores = naive(trio, prompt).double().log_softmax(-1)
    assert found.prompt_logprobs is not None
    for place, given in enumerate(found.prompt_logprobs[1:]):
        assert given is not None
        # Of fp32 sums: some 1e-6 of logits of order 1.
        assert given[prompt[place + 1]] == pytest.approx(
            float(scores[place, prompt[place + 1]]), abs=1e-5
        )
    assert list(found.token_ids) == continued(trio, prompt, 9)


def test_what_would_have_to_be_rolled_back_or_compiled_is_refused(trio):
    with pytest.raises(ValueError, match=r"speculation must be None where layers are recurrent"):
        Decoder(trio, 2, 64, speculation=Speculation())
    with pytest.raises(ValueError, match=r"compile must be False where base has recurrent layers"):
        Decoder(trio, 2, 64, compile=True)


def test_memory_is_planned(trio, monkeypatch):
    decoder = Decoder(trio, 1, 64)
    decoder.generate(PROMPTS[:1], SamplingParams(max_tokens=2))
    one = decoder.info()["cache_bytes"]
    # Three slots and a half: of ten bytes that are free nine may be taken.
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(3.5 * one / 0.9))
    assert Decoder(trio, None, 64).max_batch_size == 3
    with pytest.raises(ValueError, match=r"max_batch_size must be at most 3, got 4"):
        Decoder(trio, 4, 64)


def test_scored_continuations_run_apart(trio):
    """Of one context they would be padded, which a state is of as well."""
    found = RoleStates("base", trio.base, trio.vocab_size)
    assert found.contexts_apart is not None
    assert found.head_unknown or "padding would enter the states" in found.contexts_apart
