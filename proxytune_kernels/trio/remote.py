"""A base behind an API: of each next token's distribution it tells the likeliest tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.nn import Module

from proxytune_kernels.trio.endpoint import Endpoint, RefusedError, RemoteError
from proxytune_kernels.trio.token_texts import TokenMatcher

PROTOCOLS = ("prompt_logprobs", "echo", "step", "chat")
"""How an endpoint is asked, the first that it serves: for the log-probabilities of a prompt's
tokens, by vLLM's field or with ``echo``, so that one call scores many drafts; for those of one next
token; or, where it takes nothing but chats, for those of an answer's first token."""
TAILS = ("drop", "anti", "uniform")

_MOST_DRAFTS = 32
_SAMPLE = 256
"""Tokens of the vocabulary that are compared before the first request."""
_LOWEST = -9999.0
"""What APIs write for the logarithm of 0; it is known, unlike what they leave out."""
_ROUNDED = 0.01
"""The logarithm of what probabilities that were computed in bf16 may add up to."""
_IDS = 1 << 31
_ENTRY, _ANSWER = 256, 1 << 20
"""Bytes that an answer may have for each token that it names, and for all else."""


@dataclass(frozen=True)
class RemoteBase:
    """A base that can't be opened, behind an OpenAI-compatible API.

    Args:
        url: of the API, with its version: ``http://127.0.0.1:8000/v1``.
        model: its name there; None is the only one that there is.
        top_n: how many of the likeliest tokens to ask for at each place; -1 is all.
        tail: where the mass of the others goes. ``"drop"``: they are never drawn (the paper).
            ``"anti"``: to them, in the anti's proportions. ``"uniform"``: to them, evenly. None is
            ``"anti"`` where there is one, else ``"drop"``.
        protocol: one of :data:`PROTOCOLS`; None is the first that the endpoint serves.
        context: tokens that it reads at most; None is what it says, or else no limit.
        key_variable: of the environment, with the API's key; there need not be one.
        timeout: seconds that a try may take.
        attempts: tries of a call at most, with pauses that grow.
        budget: seconds behind which a call is not tried again.

    Raises:
        ValueError: names the argument, what it got and what it wanted.

    Example:
        >>> RemoteBase("http://127.0.0.1:8000/v1", "llama-70b", top_n=20, tail="anti").top_n
        20

    Source: Liu et al. 2024, arXiv 2401.08565, section 5 (GPT-3.5); docs/remote.md.
    """

    url: str
    model: str | None = None
    top_n: int = 20
    tail: str | None = None
    protocol: str | None = None
    context: int | None = None
    key_variable: str = "PROXYTUNE_BASE_KEY"
    timeout: float = 60.0
    attempts: int = 4
    budget: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(str(self.url))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(
                f"url must be such as http://127.0.0.1:8000/v1, got one with scheme "
                f"{parts.scheme!r}, host {parts.hostname!r}, {'a' if parts.query else 'no'} query"
            )
        if parts.username or parts.password:
            raise ValueError(
                f"url must hold no key, got one: it is read from {self.key_variable} in the "
                f"environment"
            )
        for name, known in (("tail", TAILS), ("protocol", PROTOCOLS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not _is(self.top_n, int) or (self.top_n < 1 and self.top_n != -1):
            raise ValueError(f"top_n must be an integer of at least 1, or -1, got {self.top_n!r}")
        if self.context is not None and (not _is(self.context, int) or self.context < 3):
            raise ValueError(f"context must be an integer of at least 3, got {self.context!r}")
        for name, kind, wanted in (
            ("attempts", int, "an integer of at least 1"),
            ("timeout", (int, float), "seconds above 0"),
            ("budget", (int, float), "seconds above 0"),
        ):
            value = getattr(self, name)
            if not _is(value, kind) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class RemoteModel(Module):
    """A remote base that answers: a causal LM as far as a trio asks for one, without weights.

    Args:
        base: says where it is and what to ask for.
        tokenizer: that it has, too.
        expert: its log-probabilities are wanted where this one is; None where there is no pair.

    Raises:
        ValueError: it wants a tail from an anti that there is not, or its key is no text.
        RemoteError: it can't be reached, or does not serve what is needed; says what was tried.
        VocabularyError: it has other tokens; names the first one.
    """

    def __init__(self, base: RemoteBase, tokenizer: Any, expert: Any = None) -> None:
        super().__init__()
        from transformers import PreTrainedConfig

        self.base, self.tokenizer = base, tokenizer
        self.tail = base.tail or ("drop" if expert is None else "anti")
        if self.tail == "anti" and expert is None:
            raise ValueError("tail must be 'drop' or 'uniform' where the base is alone, got 'anti'")
        self.device = torch.device("cpu") if expert is None else expert.device
        self.dtype, self.generation_config = torch.float32, None
        key = os.environ.get(base.key_variable) or None
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{base.key_variable} must hold printable ASCII characters")
        url = base.url.rstrip("/")
        self.endpoint = Endpoint(url, key, base.timeout, base.attempts, base.budget)
        self.width = 1 + max(tokenizer.get_vocab().values())
        self.model, said = self._find()
        context = self.base.context or said or 1 << 31
        self.protocol, self._extra = self._probe(min(_SAMPLE, context - 2))
        # One token more than a text is read, and one is drawn; drafts stand behind the text.
        drafts = _MOST_DRAFTS if self.scores_drafts else 0
        described: dict[str, Any] = {
            "vocab_size": self.width,
            "max_position_embeddings": max(1, context - 2 - drafts),
            "name_or_path": f"{self.model} at {url}",
        }
        self.config = PreTrainedConfig(**described)
        self.eval()

    def get_input_embeddings(self) -> Any:
        """Only their number, and where token ids go."""
        return SimpleNamespace(weight=torch.empty((self.width, 0), device=self.device))

    get_output_embeddings = get_input_embeddings

    @property
    def scores_drafts(self) -> bool:
        """Whether one call scores several tokens of a text."""
        return self.protocol in ("prompt_logprobs", "echo")

    @property
    def goes_on(self) -> bool:
        """Whether it takes a text's tokens, and so can give more than an answer's first."""
        return self.protocol != "chat"

    def info(self) -> dict[str, Any]:
        """How it is asked, as plain values, and how often it has been."""
        return {
            "url": self.base.url,
            "protocol": self.protocol,
            "top_n": self.base.top_n,
            "tail": self.tail,
            "calls": self.endpoint.tries,
        }

    def score(self, texts: Sequence[Sequence[int]], count: int) -> Tensor:
        """What is known of the tokens that follow each text's last ``count`` tokens.

        Args:
            texts: token ids, of each at least ``count``.
            count: 1 where it does not score drafts.

        Returns:
            fp32 [B, count, V] on the CPU: log-probabilities; -inf where nothing is known.
        """
        if not self.scores_drafts and count > 1:
            raise RemoteError(f"{self.base.url} gives one token's log-probabilities a call")
        return self._score(texts, count, self.base.top_n, self.protocol, self._extra)

    def _score(
        self,
        texts: Sequence[Sequence[int]],
        count: int,
        top_n: int,
        protocol: str,
        extra: Mapping[str, Any],
    ) -> Tensor:
        if protocol == "chat":
            return torch.stack([self._chat(text, top_n) for text in texts])
        body, read = _PROTOCOLS[protocol]
        asked = {"model": self.model, "max_tokens": 1, "temperature": 1.0, **extra}
        asked |= body(texts, top_n, count)

        def places(answer: Any) -> Tensor:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != len(texts):
                raise RefusedError(f"{len(texts)} texts have {len(choices)} answers")
            rows = [read(c, len(t), count) for c, t in zip(choices, texts, strict=True)]
            return self._logits([place for row in rows for place in row], top_n)

        tokens = sum(len(text) + 2 for text in texts)
        logits = self.endpoint.call("/completions", asked, places, self._most(tokens))
        return logits.unflatten(0, (len(texts), count))

    def _chat(self, text: Sequence[int], top_n: int) -> Tensor:
        content = self.tokenizer.decode(text, skip_special_tokens=True)
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 1.0,
            "logprobs": True,
            "top_logprobs": top_n,
        }

        def first(answer: Any) -> Tensor:
            return self._logits(_listed(answer["choices"][0]["logprobs"])[:1], top_n)

        return self.endpoint.call("/chat/completions", asked, first, self._most(2))

    def _most(self, tokens: int) -> int:
        """Bytes of an answer that names the likeliest at so many tokens."""
        each = self.width if self.base.top_n == -1 else self.base.top_n
        return _ANSWER + _ENTRY * tokens * (each + 2)

    def _logits(self, places: Sequence[Any], top_n: int) -> Tensor:
        """fp32 [places, V] of their entries, which are checked."""
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for row, place in enumerate(places):
            named = self._likeliest(place, top_n)
            rows += [row] * len(named)
            columns += named.keys()
            values += named.values()
        logits = torch.full((len(places), self.width), -torch.inf)
        logits[torch.tensor(rows), torch.tensor(columns)] = torch.tensor(values)
        return logits

    def _likeliest(self, place: Any, top_n: int) -> dict[int, float]:
        """Token -> log-probability of the ``top_n`` likeliest at a place."""
        named: dict[int, float] = {}
        for token_id, text, logprob in _entries(place):
            if not _is(logprob, (int, float)) or not logprob <= _ROUNDED:  # NaN is not, either
                raise RefusedError(f"a log-probability is {logprob!r:.40}")
            if token_id is not None and not 0 <= token_id < _IDS:
                raise RefusedError(f"a token's id is {token_id!r:.40}")
            found = self._matcher.id_of(token_id, text)
            if found is None:
                continue
            if found in named:
                raise RefusedError(f"token {found} is named twice at one place")
            named[found] = max(float(logprob), _LOWEST)
        total = math.fsum(map(math.exp, named.values()))
        if total > math.exp(_ROUNDED):
            raise RefusedError(f"the tokens of a place have a probability of {total:.3f}")
        # The token that stands there comes with the likeliest: what is known must not depend on it.
        kept = sorted(named, key=lambda i: (-named[i], i))
        kept = kept if top_n == -1 else kept[:top_n]
        return {i: named[i] for i in kept if i < self.width}

    def _find(self) -> tuple[str, int | None]:
        """The model's name, and the length of its context where the endpoint says it."""
        try:
            listed = self.endpoint.call("/models", read=lambda answer: list(answer["data"]))
        except RefusedError as error:
            if self.base.model is None or error.status in (401, 403):
                raise self._denied(error) from None
            return self.base.model, None
        names = [str(model.get("id")) for model in listed if isinstance(model, dict)]
        name = self.base.model
        if name is None:
            if len(names) != 1:
                shown = ", ".join(names[:5])
                raise RemoteError(f"model must be one of {self.base.url}, got None of {shown}")
            [name] = names
        said = [m.get("max_model_len") for m in listed if m.get("id") == name]
        context = next((n for n in said if _is(n, int) and n > 2), None)
        return name, context

    def _denied(self, error: RefusedError) -> RemoteError:
        if error.status not in (401, 403):
            return error
        return RemoteError(f"{error} (the key is read from {self.base.key_variable})")

    def _probe(self, longest: int) -> tuple[str, dict[str, Any]]:
        """The first protocol that works, and what it is asked beside; tokens are compared."""
        wanted = PROTOCOLS if self.base.protocol is None else (self.base.protocol,)
        # From the first to the last; evenly between them.
        sample = [i * (self.width - 1) // max(1, longest - 1) for i in range(longest)]
        refused: list[str] = []
        statuses: set[int] = set()
        for protocol in wanted:
            if protocol == "chat" and self.base.protocol is None and not statuses <= {404, 405}:
                continue  # it goes on from tokens, but not as it was asked
            self._matcher = TokenMatcher(self.tokenizer, strict=protocol != "chat")
            # Names by id are exact; not every endpoint knows them.
            by_id = protocol in ("echo", "step")
            for extra in [{"return_tokens_as_token_ids": True}] * by_id + [{}]:
                try:
                    if protocol in PROTOCOLS[:2]:
                        self._score([sample], longest, 1, protocol, extra)
                    text = sample if protocol == "step" else sample[:2]
                    self._score([text], 1, self.base.top_n, protocol, extra)
                except RefusedError as error:
                    if error.status in (401, 403):
                        raise self._denied(error) from None
                    statuses.add(error.status)
                    refused.append(f"{protocol}: {error}")
                else:
                    self._matcher.settle()
                    return protocol, extra
        raise RemoteError(
            f"{self.base.url} must give log-probabilities of {self.base.top_n} tokens, and did not "
            f"({'; '.join(refused)})"
        )


def _entries(place: Any) -> Iterator[tuple[int | None, str | None, Any]]:
    """(id, text, log-probability) of the tokens at one place, in any of the forms there are."""
    if isinstance(place, dict):
        for key, value in place.items():
            if isinstance(value, dict):  # vLLM's prompt_logprobs
                yield int(key), value.get("decoded_token"), value["logprob"]
            elif key.startswith("token_id:"):
                yield int(key[9:]), None, value
            else:
                yield None, key, value
    else:  # of chats; llama.cpp names ids as well
        for entry in place:
            token_id = entry.get("id")
            if token_id is not None and not _is(token_id, int):
                raise TypeError
            yield token_id, str(entry["token"]), entry["logprob"]


def _listed(logprobs: Any) -> list[Any]:
    """The places of generated tokens, each with its entries."""
    if not isinstance(logprobs, dict):
        raise RefusedError("the answer has no log-probabilities")
    if "content" in logprobs:
        return [token["top_logprobs"] for token in logprobs["content"]]
    return list(logprobs["top_logprobs"])


def _ask_prompt(texts: Sequence[Sequence[int]], top_n: int, count: int) -> dict[str, Any]:
    # Behind the text stands any token: so its next token's distribution is one of the prompt's.
    prompts = [[*text, text[-1]] for text in texts]
    return {"prompt": prompts, "prompt_logprobs": top_n, "prompt_logprobs_last": count}


def _read_prompt(choice: Any, length: int, count: int) -> list[Any]:
    places = choice.get("prompt_logprobs")
    if places is None:
        raise RefusedError("the answer has no prompt_logprobs")
    return _last(places, length + 1, count)


def _ask_echo(texts: Sequence[Sequence[int]], top_n: int, count: int) -> dict[str, Any]:
    return {"prompt": [list(text) for text in texts], "echo": True, "logprobs": top_n}


def _read_echo(choice: Any, length: int, count: int) -> list[Any]:
    return _last(_listed(choice.get("logprobs")), length + 1, count)


def _ask_step(texts: Sequence[Sequence[int]], top_n: int, count: int) -> dict[str, Any]:
    return {"prompt": [list(text) for text in texts], "logprobs": top_n}


def _read_step(choice: Any, length: int, count: int) -> list[Any]:
    return _last(_listed(choice.get("logprobs")), 1, 1)


def _last(places: Sequence[Any], wanted: int, count: int) -> list[Any]:
    if len(places) != wanted:
        raise RefusedError(f"{wanted} tokens have {len(places)} log-probabilities")
    return list(places[-count:])


_Body = Callable[[Sequence[Sequence[int]], int, int], dict[str, Any]]
_Read = Callable[[Any, int, int], list[Any]]
_PROTOCOLS: dict[str, tuple[_Body, _Read]] = {
    "prompt_logprobs": (_ask_prompt, _read_prompt),
    "echo": (_ask_echo, _read_echo),
    "step": (_ask_step, _read_step),
}
