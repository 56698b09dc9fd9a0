"""The registered model beside its scores: several alphas, arguments, refusals, seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.registry import get_model
from transformers import PreTrainedTokenizerFast

import proxytune_kernels as ptk
from proxytune_kernels.integrations.lm_eval_model import ProxyTuneLM
from proxytune_kernels.integrations.lm_eval_model.generation import make_params
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import byte_tokenizer
from tests.integrations.lm_eval.conftest import make_trio, requests

SCORED = requests("loglikelihood", *(("Is it?", end) for end in (" yes", " no", " yes no", "!")))
TEXTS = requests("loglikelihood_rolling", ("A text of windows. " * 9,))
CONTINUED = requests("generate_until", ("Is it?", {"until": ["~"], "max_gen_toks": 8}))
ALPHAS = (0.0, 0.5, 1.0)


@contextmanager
def forwards(trio: Trio) -> Iterator[dict[str, int]]:
    """Counts calls of each role's body."""
    counts = dict.fromkeys(trio.roles, 0)

    def counter(role: str) -> Any:
        def count(*_: Any) -> None:
            counts[role] += 1

        return count

    hooks = [m.base_model.register_forward_hook(counter(r)) for r, m in trio.models.items()]
    yield counts
    for hook in hooks:
        hook.remove()


def ask(lm: Any) -> list[Any]:
    return [lm.loglikelihood(SCORED), lm.loglikelihood_rolling(TEXTS), lm.generate_until(CONTINUED)]


def test_several_alphas_share_the_forwards(trio):
    lm = ProxyTuneLM(trio, alpha=0.3, batch_size=2)
    alone = {}
    for alpha in ALPHAS:
        with forwards(trio) as counts:
            alone[alpha] = ask(ProxyTuneLM(trio, alpha=alpha, batch_size=2))[:2]
    with forwards(trio) as together:
        found = {alpha: ask(lm) for alpha in lm.each_alpha(ALPHAS)}
    # What the last alpha took alone, and the decoder's check of more slots: a plain forward and
    # three over the cache.
    assert 0 < together["base"] <= counts["base"] + 4
    assert {alpha: results[:2] for alpha, results in found.items()} == alone
    assert lm.alpha == 0.3
    decoder = ptk.Decoder(trio)
    for alpha, results in found.items():
        params = ptk.SamplingParams(alpha=alpha, temperature=0, max_tokens=8, stop="~")
        [output] = decoder.generate("Is it?", params)
        assert results[2] == [output.text]


def test_alpha_0_runs_the_base_alone(trio):
    lm = ProxyTuneLM(trio, alpha=0.0)
    with forwards(trio) as counts:
        lm.loglikelihood(SCORED, disable_tqdm=True)
    assert counts["base"] > 0 and counts["expert"] == counts["anti"] == 0
    base = ProxyTuneLM(Trio.from_models(trio.base, tokenizer=trio.tokenizer))
    own, alone = (each.loglikelihood(SCORED, disable_tqdm=True) for each in (lm, base))
    assert own == alone


def test_results_do_not_depend_on_what_is_kept(trio):
    """Asked twice under one alpha, then with more requests: the new ones are computed."""
    lm = ProxyTuneLM(trio, batch_size=2)
    [first] = (lm.loglikelihood(SCORED[:2], disable_tqdm=True) for _ in lm.each_alpha([0.5]))
    for _ in lm.each_alpha([0.5]):
        lm.loglikelihood(SCORED[:2], disable_tqdm=True)
        again = lm.loglikelihood(SCORED, disable_tqdm=True)
    assert [value for value, _ in again[:2]] == pytest.approx([value for value, _ in first])
    assert len(again) == len(SCORED)


def test_a_cache_of_responses_is_fed(trio, tmp_path):
    """lm_eval's --use_cache: what a run left is not computed again."""
    from lm_eval.api.model import CachingLM

    database = str(tmp_path / "cache.db")
    first = ask(CachingLM(ProxyTuneLM(trio), database))
    with forwards(trio) as counts:
        made = ProxyTuneLM(trio)
        before = dict(counts)
        assert ask(CachingLM(made, database)) == first
    assert counts == before


SAMPLED = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.9}


def test_what_a_later_alpha_asks_first_is_cached_as_its_own(trio):
    class Hook:
        def __init__(self) -> None:
            self.fed: dict[tuple[str, Any], Any] = {}

        def add_partial(self, kind: str, arguments: Any, result: Any) -> None:
            self.fed[kind, arguments[0]] = result

    lm = ProxyTuneLM(trio)
    lm.cache_hook = Hook()
    found = {}
    for alpha in lm.each_alpha([0.0, 1.0]):
        if alpha == 1.0:  # the first alpha did not ask for any of it
            found["loglikelihood"] = lm.loglikelihood(SCORED[:1], disable_tqdm=True)
            found["generate_until"] = lm.generate_until(CONTINUED, disable_tqdm=True)
    steered, alone = (ProxyTuneLM(trio, alpha=alpha) for alpha in (1.0, 0.0))
    for kind, asked in (("loglikelihood", SCORED[:1]), ("generate_until", CONTINUED)):
        assert getattr(steered, kind)(asked) != getattr(alone, kind)(asked)
        assert [lm.cache_hook.fed[kind, "Is it?"]] == found[kind]


def test_an_empty_context_is_continued_from_the_prefix_token(trio):
    lm = ProxyTuneLM(trio, alpha=0.5)
    empty = requests("generate_until", ("", {"until": ["~"], "max_gen_toks": 8}))
    params = ptk.SamplingParams(alpha=0.5, temperature=0, max_tokens=8, stop="~")
    [output] = ptk.Decoder(trio).generate([[lm.prefix_token_id]], params)
    assert lm.generate_until(empty, disable_tqdm=True) == [output.text]


def test_a_tokenizer_without_bos_and_eos_scores_what_has_a_context(trio):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    assert tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
    bare = Trio.from_models(**trio.models, tokenizer=tokenizer)
    lm, known = ProxyTuneLM(bare), ProxyTuneLM(trio)
    assert lm.loglikelihood(SCORED) == known.loglikelihood(SCORED)
    assert lm.generate_until(CONTINUED) == known.generate_until(CONTINUED)
    wanted = "prefix_token_id must be given for an empty context or a rolling text"
    empty = requests("generate_until", ("", {"until": ["~"], "max_gen_toks": 8}))
    for ask_for, asked in (
        (lm.loglikelihood, requests("loglikelihood", ("", " yes"))),
        (lm.loglikelihood_rolling, TEXTS),
        (lm.generate_until, empty),
    ):
        with pytest.raises(ValueError, match=wanted):
            ask_for(asked)
    prefixed = ProxyTuneLM(bare, prefix_token_id=known.prefix_token_id)
    assert prefixed.loglikelihood_rolling(TEXTS) == known.loglikelihood_rolling(TEXTS)


def test_min_new_tokens_is_taken(trio):
    """As transformers' models of lm_eval take it; it may be above the maximum."""
    for given, most, wanted in ((5, 8, 5), (50, 8, 8), (None, 8, 0)):
        kwargs = {"until": ["~"], "max_gen_toks": most, "min_new_tokens": given}
        params, _ = make_params(kwargs, trio.tokenizer, "</s>", 256, 0)
        assert params.min_tokens == wanted


def test_sampled_texts_depend_on_seed_prompt_and_repeat_alone(trio):
    def run(prompts: list[str], **arguments: Any) -> list[str]:
        lm = ProxyTuneLM(trio, **{"seed": 7, **arguments})
        asked = requests("generate_until", *((prompt, SAMPLED) for prompt in prompts))
        return lm.generate_until(asked, disable_tqdm=True)

    texts = run(["a", "b", "a"], batch_size=3)
    assert len(set(texts)) == 3
    assert run(["b", "a", "c", "a"], batch_size=2)[:2] == [texts[1], texts[0]]
    assert run(["a"], seed=8) != texts[:1]
    torch.manual_seed(11)
    by_torch = run(["a"], seed=None)
    torch.manual_seed(12)
    assert run(["a"], seed=None) != by_torch
    torch.manual_seed(11)
    assert run(["a"], seed=None) == by_torch


def params_of(trio: Trio, **gen_kwargs: Any) -> Any:
    return make_params(gen_kwargs, trio.tokenizer, "</s>", 256, 3)


def test_parameters_of_generation(trio):
    params, until = params_of(trio, until=["a", "<pad>\n"], temperature=0.5, top_k=7, min_p=0.1)
    assert until == ("a", "<pad>\n", "</s>")
    # Special tokens have no text to look for: they end the text themselves.
    assert params.stop == ("a",) and params.stop_token_ids == (0, 2)
    assert (params.temperature, params.top_k, params.min_p, params.seed) == (0.5, 7, 0.1, 3)
    assert (params.top_p, params.max_tokens, params.filter_order) == (1.0, 256, "hf")
    greedy, _ = params_of(trio, do_sample=False, temperature=0.9, top_p=0.5, max_tokens=4)
    assert (greedy.temperature, greedy.top_p, greedy.max_tokens) == (0.0, 1.0, 4)
    assert params_of(trio)[0].temperature == 0.0


@pytest.mark.parametrize(
    ("gen_kwargs", "words"),
    [
        ({"num_beams": 4}, "num_beams must be 1, the only value there is here, got 4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty must be 1.0"),
        ({"typical_p": 0.5}, "must be among until, max_gen_toks, .* got typical_p"),
        ({"temperature": -1.0, "do_sample": True, "max_gen_toks": 4}, "temperature must be"),
        ({"max_gen_toks": 96}, "max_gen_toks must be below max_length 96, got 96"),
    ],
)
def test_generation_that_can_not_be(trio, gen_kwargs, words):
    with pytest.raises(ValueError, match=words):
        ProxyTuneLM(trio).generate_until(requests("generate_until", ("a", gen_kwargs)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": "auto"}, "batch_size must be an integer of at least 1, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"max_length": 97}, "max_length must be at most 96, the context of base, got 97"),
        ({"alpha": "0:1"}, "alpha must be a finite number, got '0:1'"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"base": "x"}, "base must not be given with a Trio"),
        ({"backend": "none"}, "backend"),
    ],
)
def test_arguments_that_make_no_sense(trio, arguments, words):
    with pytest.raises((ValueError, RuntimeError), match=words):
        ask(ProxyTuneLM(trio, **arguments))


def test_prompts_of_a_role_are_refused():
    plain = make_trio()
    styles = {"expert": "chat", "base": "plain"}
    trio = Trio.from_models(**plain.models, tokenizer=plain.tokenizer, prompts=styles)
    with pytest.raises(ValueError, match="prompts of expert must be 'plain', got 'chat'"):
        ProxyTuneLM(trio)


def test_requests_without_a_token_are_refused(trio):
    lm = ProxyTuneLM(trio)
    with pytest.raises(ValueError, match="continuation must have at least one token"):
        lm.loglikelihood(requests("loglikelihood", ("a", "")), disable_tqdm=True)
    with pytest.raises(ValueError, match="at most max_length 96 tokens, got 97"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 97)), disable_tqdm=True)


def test_chat_templates_are_the_tokenizers(trio, trio_with_bos):
    chat = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Is it?"}]
    lm = ProxyTuneLM(trio_with_bos)
    assert lm.apply_chat_template(chat) == "[system] Be.\n[user] Is it?\n[assistant]"
    assert lm.chat_template(True) == trio_with_bos.tokenizer.chat_template
    with pytest.raises(ValueError, match="give tokenizer= the expert's directory"):
        ProxyTuneLM(trio).apply_chat_template(chat)


def test_the_name_that_lm_eval_knows_it_by():
    assert get_model("proxytune") is ProxyTuneLM
    lm = get_model("proxytune").create_from_arg_string(
        "trio=shipped,alpha=0.5,dtype=float32,max_length=64,add_bos_token=False",
        {"batch_size": 4, "max_batch_size": None, "device": "cuda:0"},
    )
    assert (lm.alpha, lm.batch_size, lm.max_length) == (0.5, 4, 64)
    assert lm.trio.base.dtype == torch.float32
    if not torch.cuda.is_available():
        assert lm.device.type == "cpu"  # cuda:0 is what lm_eval says unasked
    assert lm.tokenizer_name and lm.get_model_info()["alpha"] == 0.5
    assert lm_eval.api.model.LM in ProxyTuneLM.__mro__
