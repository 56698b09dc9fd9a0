"""What steering did to each token of a text: one that was generated, or one that was given."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from proxytune_kernels.decoder import Decoder, Steering
from proxytune_kernels.decoder.arguments import shortest_context
from proxytune_kernels.decoder.scoring import Scorer
from proxytune_kernels.decoder.vocabulary import Vocabulary
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio

ALTERNATIVES = 5
"""Likely tokens that are reported beside each token."""

MOVED_BITS = 0.5
"""log2 of proxy over base from which a token counts as moved."""


def moved_bits(base: float, proxy: float) -> float:
    """How far steering moved a token: log2 of its probability under proxy and base."""
    return math.log2(max(proxy, 1e-12) / max(base, 1e-12))


class Token(NamedTuple):
    """A token of a text, and what steering did to it."""

    token_id: int
    token: str
    """Its name in the vocabulary, also where it has no text of its own."""
    text: str
    """What it adds to the text; empty for a special token, or where a character lacks bytes."""
    start: int
    """Where that stands in the text, in characters."""
    steering: Steering
    alternatives: tuple[tuple[str, float], ...]
    """The likeliest other tokens there, and their probabilities under the proxy."""

    @property
    def end(self) -> int:
        """Where its text ends."""
        return self.start + len(self.text)

    @property
    def added(self) -> float:
        """Probability that steering added to it."""
        return self.steering.proxy - self.steering.base

    @property
    def moved(self) -> float:
        """See :func:`moved_bits`."""
        return moved_bits(self.steering.base, self.steering.proxy)


@dataclass(frozen=True)
class Analysed:
    """A text, token by token.

    Args:
        index: its prompt's place among the prompts.
        prompt: what stands before it, as it was given.
        tokens: its tokens, the one that ended it included.
        alpha: strength of the steering, one for all tokens or one for each of the first.
        finish_reason: as in :class:`proxytune_kernels.RequestOutput`; None for a given text.
        sample: which of the outputs of its prompt it is.
    """

    index: int
    prompt: Any
    tokens: tuple[Token, ...]
    alpha: float | Sequence[float]
    finish_reason: str | None = None
    sample: int = 0

    @property
    def text(self) -> str:
        """The text of its tokens."""
        return "".join(token.text for token in self.tokens)


class Given(NamedTuple):
    """A text that stands already, to be scored."""

    prompt: Any
    """What is before it, in any form that the decoder takes; None: its first token."""
    text: str


def generated(
    decoder: Decoder, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams]
) -> Iterator[Analysed]:
    """Continue prompts, and say what steering did: all of it comes from the decoding itself.

    Args:
        decoder: of a whole trio.
        prompts: as :meth:`Decoder.generate` takes them.
        params: one for all, or one per prompt.

    Returns:
        The outputs in the order of the prompts, each as soon as it is there.
    """
    if len(decoder.roles) == 1:
        raise ValueError("decoder must have all roles, got the base alone: nothing steers it")
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    # One more than is wanted: the token itself may be among them.
    asked = [
        replace(p, steering=True, logprobs=ALTERNATIVES + 1, logprobs_mode="raw") for p in each
    ]
    order = [(i, sample) for i, p in enumerate(asked) for sample in range(p.n)]
    vocabulary = Vocabulary(decoder.trio.tokenizer)
    waiting: dict[tuple[int, int], Analysed] = {}
    current = 0
    for event in decoder.stream(prompts, asked):
        if (output := event.output) is not None:
            steering = output.steering or ()
            tops = [other.items() for other in output.top_logprobs or ()]
            tokens = _tokens(vocabulary, output.token_ids, steering, tops)
            alpha = asked[output.index].alpha
            waiting[output.index, output.sample] = Analysed(
                output.index, output.prompt, tokens, alpha, output.finish_reason, output.sample
            )
        while current < len(order) and order[current] in waiting:
            yield waiting.pop(order[current])
            current += 1


def scored(
    trio: Trio,
    texts: Sequence[Given],
    alphas: Sequence[float],
    *,
    batch_size: int = 8,
    backend: str | None = None,
) -> Iterator[Analysed]:
    """Say what steering does to given texts, by one forward of each role.

    Args:
        trio: with all roles.
        texts: what is scored; a text without a prompt but for its first token.
        alphas: strength of the steering, one per text.
        batch_size: texts that run at the same time.
        backend: of the ops; None is the fastest usable one.

    Returns:
        The texts in their order.

    Raises:
        ValueError: names the text, what it got and what was wanted.
    """
    if len(trio.roles) == 1:
        raise ValueError("trio must have all roles, got the base alone: nothing steers it")
    ids = [_token_ids(trio, i, given) for i, given in enumerate(texts)]
    vocabulary = Vocabulary(trio.tokenizer)
    waiting: dict[int, Analysed] = {}
    current = 0
    found = Scorer(trio, backend).attribute(
        ids, alphas, batch_size=batch_size, top_logprobs=ALTERNATIVES + 1
    )
    for i, attributed in found:
        steering = [
            Steering(base, expert, anti, proxy, int(rank), bool(changed), kl)
            for base, expert, anti, proxy, rank, changed, kl in attributed.steering
        ]
        tops = map(zip, attributed.top_token_ids, attributed.top_logprobs)
        prompt = texts[i].prompt
        if prompt is None:
            prompt = vocabulary.text_of(ids[i][0]["base"][0])
        tokens = _tokens(vocabulary, ids[i][1], steering, tops)
        waiting[i] = Analysed(i, prompt, tokens, alphas[i])
        while current in waiting:
            yield waiting.pop(current)
            current += 1


def _token_ids(trio: Trio, index: int, given: Given) -> tuple[dict[str, list[int]], list[int]]:
    """Role -> ids before a text, and the ids of the text."""
    try:
        if given.prompt is None:
            whole = trio.tokenize(given.text)
            apart = [role for role in trio.roles if whole[role] != whole["base"]]
            if apart:
                raise ValueError(
                    f"it needs a prompt where a role has prompts of its own ({', '.join(apart)})"
                )
            contexts = {role: ids[:1] for role, ids in whole.items()}
            targets = whole["base"][1:]
        else:
            contexts = trio.tokenize(given.prompt)
            targets = _continuation(trio, given, contexts["base"])
        if not targets:
            raise ValueError("it must have a token to score, got none")
        outside = [i for i in targets if i >= trio.vocab_size]
        if outside:
            raise ValueError(
                f"it must have tokens that all roles know, below {trio.vocab_size}, "
                f"got {outside[0]}"
            )
        longest = max(map(len, contexts.values())) + len(targets)
        most, what = shortest_context(trio.models)
        if longest - 1 > most:  # the last one is not run
            raise ValueError(f"it must fit in {most} tokens, {what}, got {longest}")
    except (ValueError, TypeError) as error:
        raise type(error)(f"texts[{index}]: {error}") from error
    return contexts, targets


def _continuation(trio: Trio, given: Given, context: list[int]) -> list[int]:
    """The ids of a text behind its prompt: as in one text with it, where that begins as it does."""
    if isinstance(given.prompt, str) and trio.prompts["base"] == "plain":
        whole = trio.tokenize(given.prompt + given.text)["base"]
        if whole[: len(context)] == context:
            return whole[len(context) :]
    ids: list[int] = trio.tokenizer.encode(given.text, add_special_tokens=False)
    return ids


def _tokens(
    vocabulary: Vocabulary,
    token_ids: Sequence[int],
    steering: Iterable[Steering],
    tops: Iterable[Iterable[tuple[int, float]]],
) -> tuple[Token, ...]:
    """Tokens with the text that each adds; a character comes with the last of its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens, start = [], 0
    for place, (token_id, s, top) in enumerate(zip(token_ids, steering, tops, strict=True), 1):
        is_special = vocabulary.is_special(token_id)
        data = b"" if is_special else vocabulary.bytes_of(token_id)
        text = decoder.decode(data, place == len(token_ids))
        others = [(i, p) for i, p in top if i != token_id and i >= 0][:ALTERNATIVES]
        alternatives = tuple((vocabulary.text_of(i), math.exp(p)) for i, p in others)
        tokens.append(Token(token_id, vocabulary.text_of(token_id), text, start, s, alternatives))
        start += len(text)
    return tuple(tokens)
