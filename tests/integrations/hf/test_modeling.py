"""The model's own surface: forward, gradients, vocabulary, what it refuses and what it says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
from proxytune_kernels.integrations.hf.cache import CACHE
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.vocabulary import VocabularyError
from tests.decoder.conftest import VOCAB_SIZE, byte_tokenizer, kind, tiny_llama
from tests.integrations.hf.conftest import PLAIN, three

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "pad_token_id": 0,
}  # fmt: skip


def whole(models, ids, alpha):
    base, expert, anti = (m(ids, use_cache=False).logits for m in models)
    return base + alpha * (expert - anti)


def bound(models, ids, alpha):
    """Of each model's logits rounded to fp32, and the fma: 2^-24 of what is added up."""
    with torch.no_grad():
        base, expert, anti = (m(ids, use_cache=False).logits.abs().max() for m in models)
    return float(3 * 2**-24 * (base + abs(alpha) * (expert + anti)))


def test_forward_gives_the_combined_logits_of_every_token(hf_model, hf_trio):
    ids = hf_model.tokenize("some text")["input_ids"]
    models = list(hf_trio.models.values())
    with torch.no_grad():
        got = hf_model(ids, alpha=-1.5).logits
        last = hf_model(ids, alpha=torch.tensor([-1.5]), logits_to_keep=2).logits
        wanted = whole(models, ids, -1.5)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), wanted, rtol=0, atol=bound(models, ids, -1.5))
    assert torch.equal(last, got[:, -2:])


def test_forward_steps_over_a_cache_that_it_made(hf_model):
    ids = hf_model.tokenize("some text")["input_ids"]
    with torch.no_grad():
        first = hf_model(ids[:, :-1], use_cache=True)
        second = hf_model(ids[:, -1:], **{CACHE: first.past_key_values})
        wanted = hf_model(ids).logits[:, -1:]
    # fp64 forwards of other shapes, rounded to fp32: a unit in the last place.
    assert torch.allclose(second.logits, wanted, rtol=2**-22, atol=2**-22)


def test_a_loop_of_forwards_hands_the_cache_on(hf_model):
    """Nothing but what every causal LM's loop says: the cache is there unasked."""
    ids = hf_model.tokenize("some text")["input_ids"]
    with torch.no_grad():
        output = hf_model(ids)
        for _ in range(4):
            wanted = hf_model(ids, use_cache=False)
            assert CACHE not in wanted
            assert torch.allclose(
                output.logits[:, -1], wanted.logits[:, -1], rtol=2**-22, atol=2**-22
            )
            new = output.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
            output = hf_model(new, **{CACHE: output[CACHE]})


def test_no_cache_where_the_configuration_or_checkpointing_says_so():
    model = ProxyTunedForCausalLM.from_models(*three())
    ids = torch.tensor([[5, 9, 13, 7]])
    model.config.use_cache = False
    assert CACHE not in model(ids)
    model.config.use_cache = True
    model.expert.activation_checkpointing_enable()
    assert CACHE in model(ids)
    # Layers that are run anew write nothing into it.
    assert CACHE not in model.train()(ids)


def test_the_sizes_in_the_configuration_are_the_bases(hf_model, hf_trio):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim")  # fmt: skip
    config, base = hf_model.config, hf_trio.base.config
    assert {n: getattr(config, n) for n in names} == {n: getattr(base, n) for n in names}
    assert (config.hidden_size, config.num_hidden_layers) == (48, 3)
    assert config.vocab_size == hf_trio.vocab_size


@pytest.mark.parametrize("window", [None, 4])
def test_padding_on_the_right_gives_one_answer_on_every_cache(window):
    make, config = kind("Mistral", SIZES, sliding_window=window)
    models: list[Any] = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(make(config).double().eval())
    model = ProxyTunedForCausalLM.from_models(*models)
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]])
    mask = (ids != 0).long()
    options = {"attention_mask": mask, **PLAIN, "max_new_tokens": 6}
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "dynamic"},
                                  {"cache_implementation": "static"}]  # fmt: skip
    first, *others = (model.generate(ids, **options, **way) for way in ways)
    assert all(torch.equal(first, other) for other in others)
    # And a row that has none is what it is alone.
    assert torch.equal(first[1:], model.generate(ids[1:], **PLAIN, max_new_tokens=6))


def test_padding_does_not_change_a_row(hf_model):
    ids = hf_model.tokenize(["some text", "a"])
    with torch.no_grad():
        both = hf_model(**ids).logits[1, -1]
        alone = hf_model(**hf_model.tokenize("a")).logits[0, -1]
    assert torch.allclose(both, alone, rtol=2**-22, atol=2**-22)


def test_gradients_reach_the_three_models_and_alpha():
    models = three()
    model = ProxyTunedForCausalLM.from_models(*models)
    ids = torch.tensor([[5, 9, 13, 7]])
    alpha = torch.tensor([0.5], requires_grad=True)
    loss = model(ids, labels=ids, alpha=alpha).loss
    loss.backward()
    ours = [m.lm_head.weight.grad.clone() for m in models]
    assert alpha.grad is not None
    slope = float(alpha.grad)
    for m in models:
        m.zero_grad()
    x = whole(models, ids, 0.5)[0, :-1]
    wanted = torch.nn.functional.cross_entropy(x, ids[0, 1:])
    wanted.backward()
    # The loss is taken in fp32 of logits below 8.
    assert loss.item() == pytest.approx(wanted.item(), abs=2**-18)
    for got, m in zip(ours, models, strict=True):
        assert torch.allclose(got, m.lm_head.weight.grad, rtol=0, atol=2**-18)
    with torch.no_grad():
        sides = [
            torch.nn.functional.cross_entropy(whole(models, ids, a)[0, :-1], ids[0, 1:])
            for a in (0.499, 0.501)
        ]
    # A central difference of step 1e-3 is off by about its square.
    assert slope == pytest.approx(float(sides[1] - sides[0]) / 0.002, abs=1e-4)


def test_live_models_keep_their_attention():
    models = three()
    models[1].set_attn_implementation("eager")
    ids = torch.tensor([[5, 9, 13, 7]])
    with torch.no_grad():
        before = [m(ids).logits for m in models]
        model = ProxyTunedForCausalLM.from_models(*models)
        copied = copy.deepcopy(model)
        after = [m(ids).logits for m in models]
    assert [m.config._attn_implementation for m in models] == ["sdpa", "eager", "sdpa"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.set_attn_implementation("eager")
    assert {m.config._attn_implementation for m in models} == {"eager"}
    assert copied.info()["attention"] == {"base": "sdpa", "expert": "eager", "anti": "sdpa"}


def test_making_it_leaves_weights_and_modes_alone():
    models = three()
    models[1].train()
    weights = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    model = ProxyTunedForCausalLM.from_models(*models)
    assert [m.training for m in models] == [False, True, False]
    for before, m in zip(weights, models, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert not model.training


def test_ids_past_the_shared_vocabulary_are_never_produced():
    tokenizer = byte_tokenizer()
    base, anti = tiny_llama(0, 16, 1), tiny_llama(2, 16, 1)
    expert = tiny_llama(1, 16, 1, vocab_size=VOCAB_SIZE + 10)
    with torch.no_grad():
        expert.lm_head.weight[VOCAB_SIZE:] *= 1000
    model = ProxyTunedForCausalLM.from_models(base, expert, anti, tokenizer)
    inputs = model.tokenize("ab")
    assert model.config.vocab_size == VOCAB_SIZE
    assert model(**inputs).logits.shape[-1] == VOCAB_SIZE
    plain = model.generate(**inputs, **PLAIN, max_new_tokens=12)
    assert int(plain.max()) < VOCAB_SIZE
    # The assistant would draft the ids that only it has.
    for do_sample in (False, True):
        drafted = model.generate(
            **inputs, **{**PLAIN, "do_sample": do_sample}, assistant_model=expert, max_new_tokens=12
        )
        assert int(drafted.max()) < VOCAB_SIZE
        assert do_sample or torch.equal(drafted, plain)


def test_without_tokenizers_the_widths_must_agree():
    base, expert, anti = three()
    wider = tiny_llama(1, 16, 1, vocab_size=VOCAB_SIZE + 10)
    with pytest.raises(ValueError, match=r"tokenizer must be given .* got None and 262 of base, 2"):
        ProxyTunedForCausalLM.from_models(base, wider, anti)
    model = ProxyTunedForCausalLM.from_models(base, expert, anti)
    assert "taken to mean the same" in model.info()["vocabulary_notes"][0]
    with pytest.raises(ValueError, match="tokenize needs tokenizers"):
        model.tokenize("a")


def test_tokenizers_that_disagree_are_refused():
    other = byte_tokenizer()
    other.add_tokens(["new"])
    shifted = copy.deepcopy(other)
    shifted.get_vocab = lambda: {t: (i + 1) % VOCAB_SIZE for t, i in other.get_vocab().items()}
    tokenizers = {"base": other, "expert": shifted, "anti": other}
    with pytest.raises(VocabularyError, match="must share one vocabulary"):
        ProxyTunedForCausalLM.from_models(*three(), tokenizers)


def test_one_model_may_be_expert_and_anti():
    base, expert, _ = three()
    model = ProxyTunedForCausalLM.from_models(base, expert, expert)
    ids = torch.tensor([[5, 9, 13, 7]])
    steered = model.generate(ids, **PLAIN, max_new_tokens=8)
    assert torch.equal(steered, base.generate(ids, **PLAIN, max_new_tokens=8))


ROWS_OF_THREE = torch.tensor([[5, 6]] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": torch.ones(2)}, r"alpha must be .* \(a tensor \[3\]\), got a tensor \[2\]"),
        ({"alpha": "high"}, "alpha must be a number or one per row .*, got 'high'"),
        ({"expert_attention_mask": ROWS_OF_THREE}, "must come with expert_input_ids"),
        ({"anti_input_ids": ROWS_OF_THREE[:2]}, r"anti_input_ids must be \[B, P\] for B = 3"),
        (
            {"anti_input_ids": ROWS_OF_THREE, "anti_attention_mask": ROWS_OF_THREE[:, :1]},
            r"anti_attention_mask must be \[3, 2\]",
        ),
        ({CACHE: DynamicCache()}, "a cache that this model gave back.*DynamicCache"),
        ({"cache_implementation": "quantized"}, "one of dynamic, offloaded, static,"),
        ({"output_attentions": True}, "forward: output_attentions is not supported here"),
        ({"inputs_embeds": torch.zeros(3, 2, 4)}, "inputs_embeds"),
        ({"alfa": 1.0}, "alfa"),
        (
            {"expert_input_ids": ROWS_OF_THREE, "prefill_chunk_size": 1},
            "prefill_chunk_size must be None where roles have prompts of their own",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_generate_refuses(hf_model, arguments, message):
    ids = {} if "inputs_embeds" in arguments else {"input_ids": ROWS_OF_THREE}
    with pytest.raises((ValueError, TypeError), match=message):
        hf_model.generate(**ids, **PLAIN, max_new_tokens=2, **arguments)


def test_the_pair_rests_at_alpha_0_and_not_at_a_tensor_of_zeros(hf_model):
    ids = torch.tensor([[5, 6, 7]])
    rested, ran = (
        hf_model.generate(ids, **PLAIN, max_new_tokens=3, alpha=alpha, return_dict_in_generate=True,
                          cache_implementation="dynamic")
        for alpha in (0, torch.zeros(1))
    )  # fmt: skip
    caches = rested.past_key_values.caches, ran.past_key_values.caches
    assert [[c.get_seq_length() for c in each.values()] for each in caches] == [[5, 0, 0], [5] * 3]
    hf_model.generate(ran.sequences, **{CACHE: ran.past_key_values}, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"got a cache filled at alpha 0, where they rest"):
        hf_model.generate(rested.sequences, **{CACHE: rested.past_key_values}, max_new_tokens=3)


@pytest.mark.parametrize("given", [DynamicCache(), ((torch.zeros(1), torch.zeros(1)),)])
def test_forward_refuses_a_cache_of_one_model(hf_model, given):
    with pytest.raises(ValueError, match=f"{CACHE} must be .* or None to begin one, got "):
        hf_model(torch.tensor([[5, 6, 7]]), past_key_values=given)


def test_a_configuration_alone_has_no_weights(hf_model):
    with pytest.raises(ValueError, match="a configuration alone has no weights"):
        ProxyTunedForCausalLM(hf_model.config)


def test_a_base_alone_is_no_model():
    with pytest.raises(ValueError, match="trio must have base, expert, anti, got base"):
        ProxyTunedForCausalLM.from_trio(Trio.from_models(three()[0], tokenizer=byte_tokenizer()))
