"""generate() in its modes gives what a plain loop over the three models gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, pipeline, set_seed

from proxytune_kernels.integrations.hf.cache import CACHE
from tests.integrations.hf.conftest import ALPHA, PLAIN

PROMPTS = ["hello world", "a", "stop it now please"]
ALPHAS = [0.2, 0.9, -1.0]
OWN = [
    {"base": "hello", "expert": "Q: hello A:", "anti": "x"},
    {"base": "more words", "expert": "Q:", "anti": "xyz"},
]
COUNT = 10
CACHES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}


@pytest.fixture(params=CACHES, scope="module")
def cache(request):
    return CACHES[request.param]


def new(output, inputs):
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_with_an_alpha_per_row_of_a_padded_batch(hf_model, hf_trio, loop, cache):
    inputs = hf_model.tokenize(PROMPTS)
    options = {**PLAIN, **cache, "max_new_tokens": COUNT, "alpha": torch.tensor(ALPHAS)}
    output = hf_model.generate(**inputs, **options)
    wanted = [loop(hf_trio, p, COUNT, a) for p, a in zip(PROMPTS, ALPHAS, strict=True)]
    assert new(output, inputs) == wanted


@pytest.mark.parametrize("alpha", [None, 0.3, 0, 0.0, -0.5, torch.tensor(0.3), [0.3]])
def test_an_alpha_per_call(hf_model, hf_trio, loop, alpha, cache):
    inputs = hf_model.tokenize(PROMPTS[0])
    output = hf_model.generate(**inputs, **PLAIN, **cache, max_new_tokens=COUNT, alpha=alpha)
    value = ALPHA if alpha is None else float(torch.as_tensor(alpha).reshape(()))
    assert new(output, inputs) == [loop(hf_trio, PROMPTS[0], COUNT, value)]


FOR_THE_EXPERT = {"base": "hello", "expert": "[user] hello [assistant]", "anti": "hello"}


@pytest.mark.parametrize("prompts", [OWN, [FOR_THE_EXPERT]], ids=["roles", "expert"])
def test_a_prompt_per_role(hf_model, hf_trio, loop, cache, prompts):
    inputs = hf_model.tokenize(prompts)
    assert ("anti_input_ids" in inputs) == (prompts is OWN)
    output = hf_model.generate(**inputs, **PLAIN, **cache, max_new_tokens=COUNT)
    assert new(output, inputs) == [loop(hf_trio, prompt, COUNT) for prompt in prompts]


@pytest.mark.parametrize("drafter", ["lookup", "expert", "base"])
@pytest.mark.parametrize("prompt", ["a b a b a b a b", OWN[0]], ids=["shared", "own"])
def test_assisted_decoding(hf_model, hf_trio, loop, prompt, drafter):
    inputs = hf_model.tokenize(prompt)
    draft = {"assistant_model": hf_trio.models.get(drafter)}
    if drafter == "lookup":
        draft = {"prompt_lookup_num_tokens": 3}
    output = hf_model.generate(**inputs, **PLAIN, **draft, max_new_tokens=24, alpha=0.4)
    assert new(output, inputs) == [loop(hf_trio, prompt, 24, 0.4)]


@pytest.mark.parametrize("cache", ["dynamic", "none"])
def test_beams_with_an_alpha_per_row(hf_model, hf_trio, steered, cache):
    inputs = hf_model.tokenize(PROMPTS)
    options = {
        **PLAIN, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": COUNT,
        "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    ours = hf_model.generate(**inputs, **options, **CACHES[cache], alpha=torch.tensor(ALPHAS))
    theirs = steered(hf_trio, inputs, ALPHAS, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    # Sums of COUNT log-probabilities, each rounded to fp32 from logits below 64 and a sum over V.
    bound = COUNT * 64 * 4 * 2**-24
    assert torch.allclose(ours.sequences_scores, theirs.sequences_scores, rtol=0, atol=bound)


def test_beams_with_a_prompt_per_role_are_the_same_in_every_cache(hf_model):
    inputs = hf_model.tokenize(OWN)
    outputs = [
        hf_model.generate(**inputs, **PLAIN, **cache, num_beams=3, max_new_tokens=COUNT)
        for cache in CACHES.values()
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_sampled_beams_draw_as_transformers_does(hf_model, hf_trio, steered):
    inputs = hf_model.tokenize(PROMPTS)
    options = {**PLAIN, "do_sample": True, "num_beams": 2, "max_new_tokens": COUNT}
    set_seed(3)
    ours = hf_model.generate(**inputs, **options)
    set_seed(3)
    assert torch.equal(ours, steered(hf_trio, inputs, **options))


def test_sampling_with_the_expert_as_assistant_repeats_with_its_seed(hf_model):
    inputs = hf_model.tokenize(PROMPTS[0])
    options = {**PLAIN, "do_sample": True, "assistant_model": hf_model.expert}
    outputs = []
    for seed in (5, 5, 6):
        set_seed(seed)
        outputs.append(hf_model.generate(**inputs, **options, max_new_tokens=20))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    # The expert as it is has not seen alpha, and is as it was.
    assert hf_model.expert.training is False


def test_several_sequences_of_a_prompt_have_its_alpha(hf_model, hf_trio, loop, cache):
    inputs = hf_model.tokenize(PROMPTS)
    # A temperature this low draws the likeliest token.
    options = {**PLAIN, "do_sample": True, "temperature": 1e-4, "num_return_sequences": 2}
    output = hf_model.generate(
        **inputs, **options, **cache, max_new_tokens=COUNT, alpha=torch.tensor(ALPHAS)
    )
    wanted = [loop(hf_trio, p, COUNT, a) for p, a in zip(PROMPTS, ALPHAS, strict=True)]
    assert new(output, inputs) == [tokens for tokens in wanted for _ in range(2)]


def test_logits_and_scores_of_the_output(hf_model, hf_trio, cache):
    inputs = hf_model.tokenize(PROMPTS[0])
    wanted_too = dict.fromkeys(("output_logits", "output_scores", "return_dict_in_generate"), True)
    output = hf_model.generate(**inputs, **PLAIN, **cache, **wanted_too, max_new_tokens=3)
    with torch.no_grad():
        whole = output.sequences[:, :-1]
        base, expert, anti = (m(whole, use_cache=False).logits for m in hf_trio.models.values())
    wanted = (base + ALPHA * (expert - anti))[0, -3:].float()
    got = torch.cat(output.logits)
    # The models' logits are rounded to fp32 before they are combined, and once more by the fma.
    bound = 2**-24 * float(base.abs().max() + ALPHA * (expert.abs() + anti.abs()).max()) * 3
    assert torch.allclose(got, wanted, rtol=0, atol=bound)
    assert torch.equal(torch.cat(output.scores), got)


@pytest.mark.parametrize("cache", ["decoder", "dynamic"])
@pytest.mark.parametrize("alpha", [ALPHA, 0.0], ids=["steered", "resting"])
def test_a_cache_goes_on_in_the_next_turn(hf_model, hf_trio, loop, cache, alpha):
    first = hf_model.tokenize("hello")
    options = {**PLAIN, "alpha": alpha, "return_dict_in_generate": True}
    one = hf_model.generate(**first, **options, **CACHES[cache], max_new_tokens=5)
    turn = torch.cat([one.sequences, hf_model.tokenize(" and more")["input_ids"]], 1)
    # Past the room that was made for the first turn, and without a word of the first's prompt.
    two = hf_model.generate(turn, **options, **{CACHE: one.past_key_values}, max_new_tokens=20)
    wanted = loop(hf_trio, turn[0].tolist(), 20, alpha)
    assert two.sequences[0, turn.shape[1] :].tolist() == wanted
    assert ("handed in" in hf_model.info()["cache"]) == (cache == "dynamic")


@pytest.mark.parametrize("cache", ["decoder", "dynamic"])
def test_a_padded_batch_goes_on_with_turns_of_several_lengths(hf_model, hf_trio, loop, cache):
    first = hf_model.tokenize(["hello", "a longer one"])
    options = {**PLAIN, "return_dict_in_generate": True}
    one = hf_model.generate(**first, **options, **CACHES[cache], max_new_tokens=4)
    more = hf_model.tokenize([" and more words", " yes"])
    turn = torch.cat([one.sequences, more["input_ids"]], 1)
    seen = torch.ones_like(one.sequences)
    seen[:, : first["input_ids"].shape[1]] = first["attention_mask"]
    mask = torch.cat([seen, more["attention_mask"]], 1)
    options |= {CACHE: one.past_key_values, "max_new_tokens": COUNT}
    two = hf_model.generate(turn, attention_mask=mask, **options)
    prompts = [row[keep.bool()].tolist() for row, keep in zip(turn, mask, strict=True)]
    wanted = [loop(hf_trio, prompt, COUNT) for prompt in prompts]
    assert two.sequences[:, turn.shape[1] :].tolist() == wanted


@pytest.mark.parametrize("cache", ["decoder", "dynamic"])
def test_own_prompts_go_on_in_the_next_turn(hf_model, hf_trio, loop, cache):
    first = hf_model.tokenize(OWN[0])
    options = {**PLAIN, "return_dict_in_generate": True}
    one = hf_model.generate(**first, **options, **CACHES[cache], max_new_tokens=4)
    said = new(one.sequences, first)[0]
    ids = hf_trio.tokenize(OWN[0])
    later = {"base": "b", "expert": " [user] go", "anti": " on"}
    turn = {r: [*ids[r], *said, *hf_trio.tokenize(later)[r]] for r in ids}
    inputs = hf_model.tokenize(turn)
    two = hf_model.generate(
        **inputs, **options, **{CACHE: one.past_key_values}, max_new_tokens=COUNT
    )
    assert new(two.sequences, inputs) == [loop(hf_trio, turn, COUNT)]


def test_a_pipeline_takes_one_prompt_a_batch_and_a_chat(hf_model, hf_trio, loop):
    tokenizer = hf_trio.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    options = {**PLAIN, "max_new_tokens": 6, "max_length": None, "return_full_text": False}
    generate = pipeline("text-generation", model=hf_model, tokenizer=tokenizer)

    def wanted(text):
        return tokenizer.decode(loop(hf_trio, text, 6), skip_special_tokens=True)

    [one] = generate("hello world", **options)
    assert one["generated_text"] == wanted("hello world")
    tokenizer.padding_side = "left"
    batch = generate(PROMPTS, batch_size=3, **options)
    assert [each[0]["generated_text"] for each in batch] == [wanted(p) for p in PROMPTS]
    chat = [{"role": "user", "content": "hi"}]
    [answer] = generate(chat, **options)
    assert answer["generated_text"] == wanted("hi|")


def test_a_static_cache_compiles_into_one_graph(hf_model, hf_trio, loop):
    """Only the tracing: the graph runs as it was traced."""
    inputs = hf_model.tokenize(PROMPTS)
    compiling: Any = CompileConfig(fullgraph=True, mode="default", backend="eager")
    compiling._compile_all_devices = True  # by itself generate() compiles on GPUs alone
    options: Any = {**PLAIN, **CACHES["static"], "compile_config": compiling, "max_new_tokens": 5}
    output = hf_model.generate(**inputs, **options, alpha=torch.tensor(ALPHAS))
    wanted = [loop(hf_trio, p, 5, a) for p, a in zip(PROMPTS, ALPHAS, strict=True)]
    assert new(output, inputs) == wanted


@pytest.mark.parametrize("paged", [True, False])
def test_transformers_continuous_batching_is_refused(hf_model, paged):
    with pytest.raises(ValueError, match="one cache for one model: use custom_generate"):
        if paged:
            hf_model.generate(torch.tensor([[3, 4]]), cache_implementation="paged")
        else:
            hf_model.generate_batch([[3, 4]])
