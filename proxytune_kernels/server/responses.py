"""What the API answers: the schemas of its bodies, and their contents from a decoder's outputs."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from proxytune_kernels.decoder import RequestOutput, StreamEvent
from proxytune_kernels.trio.token_texts import Vocabulary

FinishReason = Literal["stop", "length"] | None


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: Error


class Usage(BaseModel):
    """Tokens: those of the base's prompt, and of the output."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SteeringBody(BaseModel):
    """What steering changed at one token; null is what its role did not say."""

    token: str
    base: float | None
    expert: float | None
    anti: float | None
    proxy: float | None
    base_rank: int
    changed: bool
    kl: float | None


class CompletionLogprobs(BaseModel):
    """Logprobs in the schema of ``/v1/completions``."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A drawn token, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs in the schema of ``/v1/chat/completions``."""

    content: list[ChatLogprob]
    refusal: None


class PromptLogprob(BaseModel):
    """What stands by a token's id in vLLM's ``prompt_logprobs``."""

    logprob: float | None
    decoded_token: str


class Choice(BaseModel):
    """What both endpoints say of an output."""

    index: int
    finish_reason: FinishReason
    stop_reason: int | str | None
    seed: int
    steering: list[SteeringBody] | None = None
    coverage: list[float] | None = None


class CompletionChoice(Choice):
    """One output."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(BaseModel):
    """The body of an answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None
    annotations: list[Any]


class ChatChoice(Choice):
    """One output."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(BaseModel):
    """The body of an answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(BaseModel):
    """The body of an answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """The body of an answer of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    roles: dict[str, list[int]]


class Text(BaseModel):
    """The body of an answer of ``/detokenize``."""

    prompt: str


class Health(BaseModel):
    """The body of an answer of ``/health``."""

    status: Literal["ok"]


class Token(NamedTuple):
    """A token, and the logprobs at its place, its own among them; None where there are none."""

    token_id: int
    logprobs: Mapping[int, float] | None

    @property
    def logprob(self) -> float | None:
        """Its own."""
        return None if self.logprobs is None else self.logprobs[self.token_id]


def _drawn_tokens(made: RequestOutput | StreamEvent) -> list[Token]:
    known = made.top_logprobs or ()
    return [Token(*each) for each in zip(made.token_ids, known, strict=True)]


def _prompt_tokens(made: RequestOutput | StreamEvent, ids: Sequence[int]) -> list[Token]:
    known = made.prompt_logprobs or [None] * len(ids)
    return [Token(*each) for each in zip(ids, known, strict=True)]


class Writer:
    """Writes the tokens of one output in the schema of an endpoint.

    Args:
        vocabulary: of the base's tokenizer.
        chat: the schema of ``/v1/chat/completions``, not that of ``/v1/completions``.
        top: of the likeliest tokens at each place, how many to write; -1 for no logprobs at all.
        steering: write what steering changed.
        lists_prompt: write ``prompt_logprobs``.
    """

    def __init__(
        self, vocabulary: Vocabulary, chat: bool, top: int, steering: bool, lists_prompt: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._chat = chat
        self._top = top
        self._steers = steering
        self._lists_prompt = lists_prompt
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def fields(
        self, made: RequestOutput | StreamEvent, prompt: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """The fields of a choice that speak of (new) tokens, and of those of an echoed prompt."""
        fields: dict[str, Any] = {"logprobs": None}
        if self._top >= 0:
            tokens = _drawn_tokens(made)
            if prompt is not None:
                tokens = _prompt_tokens(made, prompt) + tokens
            fields["logprobs"] = self._of_chat(tokens) if self._chat else self._plain(tokens)
        if self._steers:
            pairs = zip(made.token_ids, made.steering or (), strict=True)
            fields["steering"] = [self._steering(*pair) for pair in pairs]
        if made.coverage is not None:
            fields["coverage"] = list(made.coverage)
        if self._lists_prompt and made.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._prompt_logprobs(made.prompt_logprobs)
        return fields

    def _prompt_logprobs(self, listed: Sequence[Mapping[int, float] | None]) -> list[Any]:
        """What is known of the prompt's tokens, by id, as vLLM writes it but for the ranks."""
        text_of = self._vocabulary.text_of
        return [
            known
            and {i: {"logprob": _finite(p), "decoded_token": text_of(i)} for i, p in known.items()}
            for known in listed
        ]

    def _plain(self, tokens: Sequence[Token]) -> dict[str, Any]:
        text_of = self._vocabulary.text_of
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._vocabulary.bytes_of(token.token_id)))
        return {
            "tokens": [text_of(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                None
                if t.logprobs is None
                else {text_of(i): _finite(p) for i, p in t.logprobs.items()}
                for t in tokens
            ],
            "text_offset": offsets,
        }

    def _of_chat(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            known = token.logprobs or {}
            likeliest = sorted(known.items(), key=lambda entry: -entry[1])[: self._top]
            top = [self._entry(*entry) for entry in likeliest]
            content.append({**self._entry(token.token_id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._vocabulary.text_of(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._vocabulary.bytes_of(token_id)),
        }

    def _steering(self, token_id: int, steering: Any) -> dict[str, Any]:
        numbers = {name: _finite(value) for name, value in steering._asdict().items()}
        return {"token": self._vocabulary.text_of(token_id), **numbers}


def _finite(value: Any) -> Any:
    """JSON has no infinity: -9999 is what OpenAI writes for a logprob of nothing."""
    if isinstance(value, float) and not abs(value) <= 3.5e38:
        return None if value != value else (9999.0 if value > 0 else -9999.0)
    return value


def usage(outputs: Iterable[RequestOutput], n: int) -> dict[str, int]:
    """The tokens of outputs, of which every ``n`` share a prompt."""
    listed = list(outputs)
    prompts = sum(len(output.prompt_token_ids["base"]) for output in listed[::n])
    drawn = sum(len(output.token_ids) for output in listed)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": drawn,
        "total_tokens": prompts + drawn,
    }
