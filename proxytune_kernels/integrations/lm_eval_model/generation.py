"""lm_eval's generation requests as the decoder's: prompts, parameters, stop strings, seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from proxytune_kernels.decoder.pool import DecoderPool
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# What tasks say and what it must be: transformers' names for what is not done here.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "length_penalty": 1.0}


@dataclass(frozen=True)
class Generation:
    """One request.

    Args:
        prompt: token ids.
        until: strings that its text ends before.
        params: without alpha.
    """

    prompt: list[int]
    until: tuple[str, ...]
    params: SamplingParams

    @property
    def length(self) -> int:
        """Tokens of prompt and output at most."""
        return len(self.prompt) + self.params.max_tokens


def make_params(
    gen_kwargs: Mapping[str, Any], tokenizer: Any, eot: str | None, max_gen_toks: int, seed: int
) -> tuple[SamplingParams, tuple[str, ...]]:
    """Sampling parameters and the strings that end the text, of a task's ``generation_kwargs``.

    As lm_eval's own models read them: greedy unless a temperature is given, ``max_gen_toks`` under
    any of its names. Filters apply in transformers' order.

    Args:
        gen_kwargs: until, max_gen_toks, min_new_tokens, do_sample, temperature, top_k, top_p and
            min_p.
        tokenizer: knows which stop strings are special tokens.
        eot: the text of the end-of-text token, which ends a text wherever it comes from; None if
            there is none.
        max_gen_toks: where the task does not say.
        seed: of the request's noise.

    Raises:
        ValueError: names the entry that is not known, or a value out of its range.
    """
    given = dict(normalize_gen_kwargs(dict(gen_kwargs), max_gen_toks))
    until = handle_stop_sequences(given.pop("until"), eos=eot)
    max_tokens = given.pop("max_gen_toks")
    min_tokens = given.pop("min_new_tokens", None) or 0
    sampled = given.pop("do_sample")
    values = {name: given.pop(name) for name in _SAMPLING if name in given}
    for name, value in given.items():
        if name not in _NEUTRAL:
            known = ", ".join(("until", "max_gen_toks", "min_new_tokens", "do_sample", *_SAMPLING))
            raise ValueError(f"generate_until: generation_kwargs must be among {known}, got {name}")
        if value != _NEUTRAL[name]:
            raise ValueError(
                f"generate_until: {name} must be {_NEUTRAL[name]}, the only value there is here, "
                f"got {value!r}"
            )
    values.setdefault("temperature", 0.0)
    if not sampled:
        values = {"temperature": 0.0}
    strings, token_ids = _stops(until, tokenizer)
    params = SamplingParams(
        max_tokens=max_tokens,
        # transformers' minimum may be above its maximum, and no stop string ends a text below it.
        min_tokens=min(min_tokens, max_tokens),
        stop=strings,
        stop_token_ids=token_ids,
        filter_order="hf",
        seed=seed,
        **values,
    )
    return params, tuple(until)


def _stops(until: Sequence[str], tokenizer: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Strings to look for in the text, and special tokens, which have no text in it."""
    strings, token_ids = [], []
    special = set(tokenizer.all_special_ids)
    for text in filter(None, until):
        first = tokenizer.encode(text, add_special_tokens=False)[:1]
        if first and first[0] in special:
            token_ids.append(first[0])
        else:
            strings.append(text)
    return tuple(strings), tuple(token_ids)


def request_seed(seed: int, context: str, gen_kwargs: Mapping[str, Any], repeat: int) -> int:
    """A key for a request's noise that does not depend on the requests around it.

    ``repeat`` tells the copies of a request apart that a task asks for.
    """
    named = json.dumps([seed, context, gen_kwargs, repeat], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest(), "little")


class Generator:
    """Decodes requests for several alphas, all in one run of the decoder."""

    def __init__(
        self, trio: Trio, max_batch_size: int, max_length: int, backend: str | None
    ) -> None:
        self._trio = trio
        self._pool = DecoderPool(max_batch_size, max_length, backend=backend)

    def generate(self, requests: Sequence[Generation], alphas: Sequence[float], done: Any) -> None:
        """Decode requests; each text goes to ``done(request, alpha's place, text)``."""
        # The longest first, as its caches are what may not fit; copies of a prompt together.
        order = sorted(range(len(requests)), key=lambda i: -requests[i].length)
        jobs = [(i, a) for i in order for a in range(len(alphas))]
        longest = requests[order[0]].length
        decoder = self._pool.decoder_for(self._trio, requests=len(jobs), tokens=longest)
        prompts = [requests[i].prompt for i, _ in jobs]
        params = [replace(requests[i].params, alpha=alphas[a]) for i, a in jobs]
        for event in decoder.stream(prompts, params):
            if event.output is not None:
                i, a = jobs[event.index]
                done(i, a, self._text(event.output.token_ids, requests[i].until))

    def _text(self, token_ids: Sequence[int], until: Sequence[str]) -> str:
        """As lm_eval's own models cut it: the output decoded alone, up to the first stop string."""
        text = self._trio.tokenizer.decode(token_ids, skip_special_tokens=True)
        cut: str = postprocess_generated_text(text, list(until), None)
        return cut
