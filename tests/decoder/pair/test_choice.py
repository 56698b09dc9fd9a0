"""Expert and anti as one batch: the tokens of two models, whatever shares the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proxytune_kernels.decoder import Speculation
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import tiny_llama

# PEFT asks a model what transformers has since renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROMPTS: list[Any] = [
    "hello",
    "stop it now, or else",
    {"base": "b", "expert": "a longer expert prompt", "anti": [40, 41]},
    "a",
    "x y z",
]
ALPHAS = [1.0, 0.5, -1.0, 0.0, 2.0]


def settings(sampled: bool) -> list[SamplingParams]:
    return [
        SamplingParams(
            alpha=alpha,
            temperature=float(sampled),
            seed=row,
            max_tokens=6 + 4 * (row % 3),
            ignore_eos=True,
        )
        for row, alpha in enumerate(ALPHAS)
    ]


@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"speculation": Speculation(adaptive=False, max_drafts=3)},
        {"speculation": Speculation(drafter="prompt_lookup", adaptive=False)},
        {"prefill_chunk": 4},
        {"pair": "separate"},
    ],
    ids=["plain", "speculative", "lookup", "chunked", "separate"],
)
def test_greedy_equals_the_naive_loop(lora_trio, make_decoder, greedy, options, max_batch_size):
    decoder = make_decoder(lora_trio, max_batch_size, **options)
    assert decoder.info()["pair"] == options.get("pair", "shared")
    params = settings(sampled=False)
    for output, p in zip(decoder.generate(PROMPTS, params), params, strict=True):
        wanted = greedy(lora_trio.models, output.prompt_token_ids, p.alpha, p.max_tokens)
        assert output.token_ids == wanted


@pytest.mark.parametrize(
    "speculation", [None, Speculation(adaptive=False)], ids=["plain", "drafts"]
)
def test_sampled_tokens_are_the_separate_models(lora_trio, make_decoder, speculation):
    shared = make_decoder(lora_trio, 3, speculation=speculation)
    apart = make_decoder(lora_trio, 3, pair="separate")
    params = settings(sampled=True)
    for one, two in zip(
        shared.generate(PROMPTS, params), apart.generate(PROMPTS, params), strict=True
    ):
        assert one.token_ids == two.token_ids


# Importing torch's own compiler calls what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_small_checkpoints_of_one_shape_run_as_one_batch(trio, make_decoder):
    assert make_decoder(trio).info()["pair"] == "batched"
    assert make_decoder(trio, compile=True).info()["pair"] == "separate"
    other = Trio.from_models(trio.base, trio.expert, tiny_llama(4, layers=1), trio.tokenizer)
    assert make_decoder(other).info()["pair"] == "separate"


def test_weights_are_held_once(lora_trio, make_decoder):
    decoder = make_decoder(lora_trio, 2)
    pointers = {p.data_ptr() for p in lora_trio.anti.parameters()}
    small = [m for roles, m in decoder._runner.models.items() if roles != ("base",)]
    assert len(small) == 3
    for member in small:
        large = [p for p in member.model.parameters() if p.numel() >= 1024]
        assert large
        assert all(p.data_ptr() in pointers for p in large)


def test_pairs_that_cannot_run_so_are_refused(trio, make_decoder):
    with pytest.raises(ValueError, match=r"pair='shared' takes an expert .* LlamaForCausalLM"):
        make_decoder(trio, pair="shared")
    with pytest.raises(ValueError, match=r"pair must be one of shared, .*, got 'joint'"):
        make_decoder(trio, pair="joint")
    with pytest.raises(ValueError, match=r"pair must be None where the base runs alone"):
        make_decoder(trio, roles=("base",), pair="separate")


@pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|torch.ao.quantization)")
def test_weights_that_are_packed_elsewhere_are_not_mixed_up(tokenizer, make_decoder):
    """torch.ao's dynamic int8 holds them in objects that are neither parameters nor buffers."""
    models = [tiny_llama(seed).float() for seed in range(3)]
    for model in models[1:]:
        model.model = torch.ao.quantization.quantize_dynamic(model.model, {torch.nn.Linear})
    trio = Trio.from_models(models[0], models[1], models[2], tokenizer)
    with pytest.raises(ValueError, match="must hold plain weights to run as one model, got Linear"):
        make_decoder(trio, pair="batched")
    decoder = make_decoder(trio)
    assert decoder.info()["pair"] == "separate"
    prompt = [5, 9, 13, 200]
    found = decoder._runner.prefill([0], {role: [prompt] for role in trio.roles})
    with torch.no_grad():
        for role, model in trio.models.items():
            # Activations are rounded by the largest of all, so the last token is not run alone.
            wanted = model(torch.tensor([prompt]), use_cache=False).logits[:, -1]
            torch.testing.assert_close(found[role], wanted, rtol=1e-4, atol=1e-4)
