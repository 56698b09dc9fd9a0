"""What a request to the API may hold, and the parameters that it gives the decoder.

A field of the API that is a field of SamplingParams has its name, and its range there; None is its
default. What neither knows is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from proxytune_kernels.decoder import Grammar
from proxytune_kernels.server.settings import Settings

SAME = (
    *("alpha", "alpha_schedule", "temperature", "top_k", "top_p", "min_p", "filter_order", "seed"),
    *("pair_alphas", "min_tokens"),
    *("stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_prompt"),
    *("allowed_token_ids", "bad_words", "logprobs_mode", "steering"),
)
"""Fields of the API that are fields of SamplingParams under the same name."""

NEUTRAL: Mapping[str, Any] = {
    "best_of": 1,
    "function_call": "none",
    "functions": [],
    "length_penalty": 1.0,
    "modalities": ["text"],
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "use_beam_search": False,
}
"""What is not supported is still taken with the value that asks for nothing."""

_STOPS = 64  # each is searched for at every token
_IDS = 4096
_ALL = (1 << 31) - 1


class Strict(BaseModel):
    """Takes no other types than those written here, and no unknown fields but None."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        unknown = values.keys() - cls.model_fields.keys()
        nothing = {k for k in unknown if values[k] is None or values[k] == NEUTRAL.get(k)}
        return {k: v for k, v in values.items() if k not in nothing}


class StreamOptions(Strict):
    """How a stream is written."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Taken, and means nothing here.")


class JsonSchema(Strict):
    """A schema, in the words of OpenAI's response_format."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = Field(None, description="Output always keeps to the schema.")
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    """How the output must look."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GrammarBody(Strict):
    """What the output must keep to: one of these."""

    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    lark: str | None = None

    @model_validator(mode="after")
    def _one(self) -> GrammarBody:
        if len(self.model_fields_set) != 1:
            raise ValueError("grammar must have exactly one of json_schema, regex, choice, lark")
        return self


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text that UTF-8 can write, got a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
_Ids = Annotated[list[int], Field(max_length=_IDS)]


class Common(Strict):
    """What both endpoints take. Beyond OpenAI's: alpha, and what says so."""

    model: str
    alpha: float | list[float] | None = Field(
        None, description="Strength of the steering; 0 is the base alone. An extension."
    )
    alpha_schedule: str | None = Field(
        None, description="An extension: constant, decay:R or entropy:H."
    )
    pair_alphas: Annotated[list[float], Field(max_length=_STOPS)] | None = Field(
        None, description="An extension: strength of each further pair of the trio."
    )
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="An extension; 0 or -1 is off.")
    min_p: float | None = Field(None, description="An extension; 0 is off.")
    filter_order: str | None = Field(None, description="An extension: vllm, hf or joint.")
    seed: int | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = None
    min_tokens: int | None = Field(None, description="An extension.")
    stop: str | Annotated[list[str], Field(max_length=_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=_STOPS)] | None = Field(
        None, description="An extension."
    )
    ignore_eos: bool | None = Field(None, description="An extension.")
    include_stop_str_in_output: bool | None = Field(None, description="An extension.")
    skip_special_tokens: bool | None = Field(None, description="An extension.")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = Field(None, description="An extension.")
    penalty_prompt: bool | None = Field(None, description="An extension.")
    logit_bias: Annotated[dict[str, float], Field(max_length=_IDS)] | None = None
    allowed_token_ids: _Ids | None = Field(None, description="An extension.")
    bad_words: Annotated[list[str], Field(max_length=_STOPS)] | None = Field(
        None, description="An extension."
    )
    logprobs_mode: Literal["raw", "drawn"] | None = Field(None, description="An extension.")
    steering: bool | None = Field(
        None, description="An extension: what steering changed at each token."
    )
    response_format: ResponseFormat | None = None
    grammar: GrammarBody | None = Field(None, description="An extension.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Taken since clients send them by habit; they mean nothing here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None


class CompletionRequest(Common):
    """The body of ``POST /v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    prompt_logprobs: int | None = Field(
        None, ge=-1, description="Likeliest tokens at each position of the prompt. An extension."
    )
    prompt_logprobs_last: int | None = Field(
        None, ge=0, description="Only at so many of the last positions. An extension."
    )
    add_special_tokens: bool | None = Field(None, description="An extension.")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a string or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Strict):
    """A part of a message; texts are the only ones."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn of a chat."""

    role: Literal["developer", "system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Any = None
    annotations: Any = None

    def plain(self) -> dict[str, str]:
        """The turn as chat templates know it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Common):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _asked(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must come with logprobs true")
        return self


class TokenizeRequest(Strict):
    """The body of ``POST /tokenize``: a prompt, or messages."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt must be given, or messages, and not both")
        return self


class DetokenizeRequest(Strict):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


def sampling_values(request: CompletionRequest | ChatRequest, settings: Settings) -> dict[str, Any]:
    """Fields of SamplingParams that a request sets, all but max_tokens and a grammar.

    Raises:
        ValueError: a parameter that is not supported, or beyond the server's limits; named.
    """
    values = {name: getattr(request, name, None) for name in SAME}
    for name in ("add_special_tokens", "prompt_logprobs_last"):
        values[name] = getattr(request, name, None)
    if (top := top_logprobs(request)) >= 0:
        values["logprobs"] = top
        if isinstance(request, CompletionRequest) and request.echo:
            values["prompt_logprobs"] = top
    if (asked := getattr(request, "prompt_logprobs", None)) is not None:
        most = settings.max_prompt_logprobs
        if most >= 0 and not 0 <= asked <= most:
            raise ValueError(f"prompt_logprobs must be in [0, {most}] on this server, got {asked}")
        values["prompt_logprobs"] = _ALL if asked < 0 else asked
    if request.logit_bias:
        values["logit_bias"] = {_id(key): bias for key, bias in request.logit_bias.items()}
    if (n := request.n or 1) > settings.max_n:
        raise ValueError(f"n must be at most {settings.max_n}, got {n}")
    if n > 1:
        values["n"] = n
    values = {name: value for name, value in values.items() if value is not None}
    return values


def top_logprobs(request: CompletionRequest | ChatRequest) -> int:
    """Likeliest tokens that are asked for at each position; -1 for no logprobs at all."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else -1
    return -1 if request.logprobs is None else request.logprobs


def _id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError(f"logit_bias must have token ids as its keys, got {text!r:.40}")
    return int(text)


def asked_max_tokens(request: CompletionRequest | ChatRequest, settings: Settings) -> int | None:
    """Output tokens that a request asks for; None where it does not say.

    Raises:
        ValueError: more than the server allows.
    """
    asked = request.max_tokens
    name = "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        asked, name = request.max_completion_tokens, "max_completion_tokens"
    if asked is not None and settings.max_tokens is not None and asked > settings.max_tokens:
        raise ValueError(f"{name} must be at most {settings.max_tokens}, got {asked}")
    return asked


def grammar_of(request: CompletionRequest | ChatRequest, settings: Settings) -> Grammar | None:
    """The grammar that a request's output must keep to; None where it asks for none.

    Raises:
        ValueError: two at once, one that is too large, or a type without its schema.
    """
    asked = request.grammar.model_dump(exclude_none=True) if request.grammar else {}
    form = request.response_format
    if form is not None and form.type != "text":
        if asked:
            raise ValueError("response_format must be left out where grammar is given")
        if form.type == "json_schema":
            if form.json_schema is None:
                raise ValueError("response_format must have json_schema for its type json_schema")
            asked = {"json_schema": form.json_schema.schema_}
        else:
            asked = {"json_schema": {"type": "object"}}
    if not asked:
        return None
    name = "grammar" if request.grammar else "response_format"
    size = len(json.dumps(asked))
    if size > settings.max_schema_bytes:
        raise ValueError(f"{name} must have at most {settings.max_schema_bytes} bytes, got {size}")
    return Grammar.of(asked)
