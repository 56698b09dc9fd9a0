"""Every mode of the decoder gives the naive loop's greedy tokens, on every kind of model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from proxytune_kernels.decoder import Speculation
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio, load_trio
from tests.decoder.conftest import word_tokenizer
from tests.decoder.test_runner import ARCHITECTURES, VOCAB_SIZE, random_ids

pytestmark = pytest.mark.slow

Loop = Callable[..., list[int]]

TRIOS = {
    "llama": ("llama", "llama"),
    "qwen3": ("qwen3", "qwen3"),
    "mistral-window": ("mistral-window", "mistral-window"),
    "gemma2-softcap": ("gemma2-softcap", "gemma2-softcap"),
    # Each role must keep its own attention settings.
    "window-base-full-pair": ("mistral-window", "llama"),
    "full-base-window-pair": ("qwen3", "mistral-window"),
    "softcap-base-mixed-window-pair": ("gemma2-softcap", "qwen2-mixed-window"),
}
"""Architectures of base and pair."""

SPECULATION: dict[str, Speculation | None] = {
    "plain": None,
    **{
        f"{drafter}-{mode}": Speculation(drafter=drafter, mode=mode, max_drafts=4, adaptive=False)
        for drafter in ("expert", "prompt_lookup")
        for mode in ("coupled", "rejection")
    },
    "adaptive": Speculation(max_drafts=6),
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"speculation": speculation} for name, speculation in SPECULATION.items()},
    "chunked-prefill": {"prefill_chunk": 4},
    "chunked-prefill-speculation": {
        "prefill_chunk": 4,
        "speculation": SPECULATION["expert-coupled"],
    },
    "batched-pair": {"pair": "batched"},
    "batched-pair-expert-coupled": {
        "pair": "batched",
        "speculation": SPECULATION["expert-coupled"],
    },
}

PROMPTS: list[Any] = [
    random_ids(9, 0),
    random_ids(1, 1),
    # Longer than the windows; a text that comes back has drafts of its own.
    random_ids(6, 2) * 4,
    {"base": random_ids(2, 3), "expert": random_ids(17, 4), "anti": random_ids(5, 5)},
    random_ids(9, 6),
    {"base": random_ids(11, 7), "expert": random_ids(3, 8), "anti": random_ids(3, 8)},
]
ALPHAS = [1.0, 0.5, 2.0, 1.0, 0.0, -0.5]
LENGTHS = [14, 3, 22, 9, 1, 12]


def make_model(architecture: str, seed: int) -> Any:
    model_class, config = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = model_class(copy.deepcopy(config)).double().eval()
    if config.get_text_config().model_type == "gemma2":
        # SDPA has no soft caps.
        model.set_attn_implementation("eager")
    return model


class Case:
    """A trio, and what the naive loop says."""

    def __init__(self, name: str, greedy: Loop) -> None:
        base, pair = TRIOS[name]
        models = make_model(base, 0), make_model(pair, 1), make_model(pair, 2)
        with torch.no_grad():
            # The expert says most of what comes out, so that some of its drafts are kept.
            for model in (models[0], models[2]):
                model.get_output_embeddings().weight *= 0.3
        self.trio = Trio.from_models(*models, word_tokenizer(VOCAB_SIZE))
        self.params = [
            SamplingParams(alpha=a, temperature=0, max_tokens=n, ignore_eos=True)
            for a, n in zip(ALPHAS, LENGTHS, strict=True)
        ]
        self.wanted = [
            greedy(self.trio.models, self.trio.tokenize(prompt), p.alpha, p.max_tokens)
            for prompt, p in zip(PROMPTS, self.params, strict=True)
        ]
        self.base_alone = greedy({"base": self.trio.base}, {"base": PROMPTS[2]}, 0.0, LENGTHS[2])


@pytest.fixture(scope="module")
def make_case(greedy: Loop) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in cases:
            cases[name] = Case(name, greedy)
        return cases[name]

    return make


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", TRIOS)
def test_greedy_equals_the_naive_loop(make_case, make_decoder, name, options):
    """Ragged, refilled (six prompts in three slots), with prompts per role."""
    case = make_case(name)
    for max_batch_size in (3, 1):
        decoder = make_decoder(case.trio, max_batch_size, max_seq_len=48, **OPTIONS[options])
        outputs = decoder.generate(PROMPTS, case.params)
        assert [output.token_ids for output in outputs] == case.wanted
        if "expert" in options:
            # Rounds that roll back, and rounds that don't.
            counts = decoder.statistics()
            assert 0 < counts["accepted"] < counts["drafted"]


@pytest.mark.parametrize("name", TRIOS)
def test_base_alone(make_case, make_decoder, name):
    case = make_case(name)
    for speculation in (None, SPECULATION["prompt_lookup-coupled"]):
        decoder = make_decoder(case.trio, 2, roles=("base",), speculation=speculation)
        outputs = decoder.generate([PROMPTS[2], PROMPTS[0], PROMPTS[2]], case.params[2])
        assert outputs[0].token_ids == outputs[2].token_ids == case.base_alone


@pytest.mark.parametrize("speculation", ["plain", "expert-coupled", "prompt_lookup-coupled"])
def test_shipped_trio(make_decoder, greedy, speculation):
    trio = load_trio("shipped", dtype="float64")
    decoder = make_decoder(trio, 2, speculation=SPECULATION[speculation])
    prompts = ["2 + 2 =", "The sum of 14 and 3 is", "Once"]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (16, 24, 9)]
    outputs = decoder.generate(prompts, params)
    for output, p in zip(outputs, params, strict=True):
        wanted = greedy(trio.models, output.prompt_token_ids, p.alpha, p.max_tokens)
        assert output.token_ids == wanted
    if speculation == "expert-coupled":
        assert decoder.statistics()["accepted"] > 0
