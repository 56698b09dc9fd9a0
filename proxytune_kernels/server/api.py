"""From a request's body to its answer: prompts to tokens, generations to JSON or a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from proxytune_kernels.decoder import Grammar, RequestOutput, StreamEvent
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.server import responses
from proxytune_kernels.server.engine import (
    Engine,
    Generation,
    GoneError,
    LostError,
    Prompt,
    Served,
    StoppingError,
)
from proxytune_kernels.server.metrics import Metrics
from proxytune_kernels.server.requests import (
    ChatRequest,
    CompletionRequest,
    asked_max_tokens,
    candidates,
    grammar_of,
    sampling_values,
    top_logprobs,
)
from proxytune_kernels.server.settings import Settings
from proxytune_kernels.trio.token_texts import Vocabulary

_log = logging.getLogger(__name__)

COMPLETION_TOKENS = 16
"""max_tokens of a completion that does not say; a chat may fill the context."""

STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class NoTokenError(ValueError):
    """Nothing is left to draw: what the request forbids and allows excludes every token."""


class Reply(NamedTuple):
    """What an answer says of its request."""

    body: CompletionRequest | ChatRequest
    head: dict[str, Any]

    @property
    def chat(self) -> bool:
        """Whether it is in the schema of ``/v1/chat/completions``."""
        return isinstance(self.body, ChatRequest)

    @property
    def n(self) -> int:
        """Outputs of each prompt."""
        return self.body.n or 1

    @property
    def top(self) -> int:
        """Likeliest tokens at each position; -1 for no logprobs at all."""
        return top_logprobs(self.body)

    @property
    def lists_prompt(self) -> bool:
        """Whether each choice has ``prompt_logprobs``."""
        return getattr(self.body, "prompt_logprobs", None) is not None

    def best(self, outputs: Sequence[RequestOutput]) -> list[RequestOutput]:
        """Of each prompt's outputs the n likeliest, by log-probability per token."""
        most = candidates(self.body)
        if most == self.n:
            return [*outputs]
        groups = [outputs[i : i + most] for i in range(0, len(outputs), most)]
        return [o for group in groups for o in sorted(group, key=_per_token)[: -self.n - 1 : -1]]

    @property
    def echo(self) -> bool:
        """Whether the prompt is part of the output."""
        return isinstance(self.body, CompletionRequest) and bool(self.body.echo)


class Api:
    """Answers requests with a decoder.

    Args:
        served: the decoder, which nobody else may use.
        settings: names and limits.
    """

    def __init__(self, served: Served, settings: Settings) -> None:
        self.trio = served.trio
        self.max_seq_len = served.max_seq_len
        self.settings = settings
        self.created = int(time.time())
        self.metrics = Metrics(
            served.max_batch_size, served.statistics, getattr(served, "pid", None)
        )
        self.engine = Engine(served, settings.max_queue, self.metrics)
        self.vocabulary = Vocabulary(served.trio.tokenizer)
        longest = max(map(len, served.trio.tokenizer.get_vocab()), default=1)
        # No text of more is as short as it must be; its tokens would be counted for long.
        self._most_characters = longest * (settings.max_prompt_tokens or served.max_seq_len)
        # One thread: texts become tokens in the order in which they come, and beside the steps.
        self._preparing = ThreadPoolExecutor(1, "proxytune-prompts")

    async def tokenize(self, prompt: Any, add_special_tokens: bool = True) -> Prompt:
        """Token ids of a prompt, for each role."""
        self._check_length(prompt)
        return await self._aside(self.trio.tokenize, prompt, add_special_tokens)

    async def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; ValueError names one that there is not."""
        outside = [i for i in token_ids if not 0 <= i < self.trio.vocab_size]
        if outside:
            size = self.trio.vocab_size
            raise ValueError(f"tokens must be in [0, {size}), got {outside[0]}")
        return await self._aside(self.trio.tokenizer.decode, token_ids)

    async def answer(
        self, body: CompletionRequest | ChatRequest, prompts: Sequence[Any], request: Request
    ) -> Response:
        """Run a request to its end, or open its stream.

        Raises:
            ValueError, TypeError: the request can't run; names the parameter.
            BusyError, StoppingError, LostError: the server can't run it now.
        """
        values = sampling_values(body, self.settings)
        most = asked_max_tokens(body, self.settings)
        count = len(prompts) * candidates(body)
        self.engine.reserve(count)
        try:
            if (grammar := await self._grammar(body)) is not None:
                values["grammar"] = grammar
            prepared = await self._aside(self._prepare, prompts, values, most)
            generation = self.engine.submit(prepared, whole=not body.stream)
        except BaseException:
            self.engine.release(count)
            raise
        reply = Reply(body, self._head(isinstance(body, ChatRequest)))
        watch = asyncio.ensure_future(_watch(request, generation))
        try:
            await generation.accepted()
            if not body.stream:
                return await self._whole(reply, generation)
        except GoneError:
            return Response(status_code=499)
        except BaseException:
            generation.close()
            raise
        finally:
            if not body.stream:
                watch.cancel()
        return StreamingResponse(
            self._stream(
                reply, generation, watch, [token_ids["base"] for token_ids, _ in prepared]
            ),
            media_type="text/event-stream",
            headers=STREAM_HEADERS,
        )

    def _head(self, chat: bool) -> dict[str, Any]:
        kind = "chatcmpl" if chat else "cmpl"
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.settings.model,
        }

    async def _aside(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._preparing, function, *arguments
        )

    async def _grammar(self, body: CompletionRequest | ChatRequest) -> Grammar | None:
        """The request's grammar, compiled in a thread that is left behind where it takes long."""
        grammar = grammar_of(body, self.settings)
        if grammar is None:
            return None
        seconds = self.settings.grammar_seconds
        try:
            await asyncio.wait_for(self.engine.compile(grammar), seconds)
        except TimeoutError as error:
            raise ValueError(f"grammar must compile within {seconds} seconds") from error
        except RecursionError as error:
            raise ValueError("grammar must not be nested as deeply") from error
        return grammar

    def _prepare(
        self, prompts: Sequence[Any], values: Mapping[str, Any], most: int | None
    ) -> list[tuple[Prompt, SamplingParams]]:
        """Tokens and parameters of each prompt; ``most`` is the max_tokens that is asked for."""
        prepared: list[tuple[Prompt, SamplingParams]] = []
        add_special_tokens = values.get("add_special_tokens", True)
        for prompt in prompts:
            self._check_length(prompt)
            token_ids = self.trio.tokenize(prompt, add_special_tokens)
            longest = max(map(len, token_ids.values()))
            limit = self.settings.max_prompt_tokens
            if limit is not None and longest > limit:
                raise ValueError(f"prompt must have at most {limit} tokens, got {longest}")
            chat = not isinstance(prompt, str) and not isinstance(prompt[0], int)
            room = max(self.max_seq_len - longest + 1, 1)
            rest = min(room, self.settings.max_tokens or room) if chat else COMPLETION_TOKENS
            params = SamplingParams(**values, max_tokens=rest if most is None else most)
            prepared.append((token_ids, params))
        return prepared

    def _check_length(self, prompt: Any) -> None:
        parts = [prompt] if isinstance(prompt, str) else prompt
        texts = [part["content"] if isinstance(part, Mapping) else part for part in parts]
        size = sum(len(text) for text in texts if isinstance(text, str))
        if size > self._most_characters:
            raise ValueError(
                f"prompt must have at most {self._most_characters} characters, got {size}"
            )

    async def _whole(self, reply: Reply, generation: Generation) -> Response:
        outputs: dict[int, RequestOutput] = {}
        async for events in generation:
            outputs |= {i: event.output for i, event in events if event.output is not None}
        listed = [_checked(outputs[i]) for i in range(generation.count)]
        total = responses.usage(listed, candidates(reply.body))
        self._report(reply, listed, total)
        return JSONResponse(
            {
                **reply.head,
                "object": "chat.completion" if reply.chat else "text_completion",
                "choices": [self._choice(reply, i, o) for i, o in enumerate(reply.best(listed))],
                "usage": total,
            }
        )

    def _choice(self, reply: Reply, index: int, output: RequestOutput) -> dict[str, Any]:
        text = output.text
        if reply.echo:
            text = self._prompt_text(reply, index) + text
        writer = self._writer(reply)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "annotations": [],
        }
        prompt = output.prompt_token_ids["base"] if reply.echo else None
        return {
            "index": index,
            **({"message": message} if reply.chat else {"text": text}),
            **writer.fields(output, prompt),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "seed": output.seed,
        }

    def _writer(self, reply: Reply) -> responses.Writer:
        return responses.Writer(
            self.vocabulary, reply.chat, reply.top, bool(reply.body.steering), reply.lists_prompt
        )

    def _prompt_text(self, reply: Reply, index: int) -> str:
        assert isinstance(reply.body, CompletionRequest)
        prompt = reply.body.prompts[index // reply.n]
        return prompt if isinstance(prompt, str) else self.trio.tokenizer.decode(prompt)

    async def _stream(
        self,
        reply: Reply,
        generation: Generation,
        watch: asyncio.Future[None],
        prompts: Sequence[Sequence[int]],
    ) -> AsyncIterator[bytes]:
        kind = "chat.completion.chunk" if reply.chat else "text_completion"
        options = reply.body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        head = {**reply.head, "object": kind, **({"usage": None} if with_usage else {})}
        begun = _data({**head, "choices": []}).removesuffix(_END)
        outputs: dict[int, RequestOutput] = {}
        writers = [self._writer(reply) for _ in range(generation.count)]
        try:
            for choice in self._openings(reply, generation.count):
                yield _chunk(begun, choice)
            async for events in generation:
                for index, event in merged(events):
                    if event.output is not None:
                        outputs[index] = _checked(event.output)
                    # An echoed prompt comes with its logprobs, which the first token brings.
                    prompt = prompts[index // reply.n] if event.prompt_logprobs else None
                    fields = writers[index].fields(event, prompt if reply.echo else None)
                    yield _chunk(begun, self._delta(reply, index, event, fields))
            listed = [outputs[i] for i in range(generation.count)]
            total = responses.usage(listed, reply.n)
            self._report(reply, listed, total)
            if with_usage:
                yield _data({**head, "choices": [], "usage": total})
            yield b"data: [DONE]\n\n"
        except GoneError:
            pass
        except (LostError, StoppingError, NoTokenError) as error:
            wrong = {"message": str(error), "type": "server_error", "param": None, "code": None}
            yield _data({"error": wrong})
        finally:
            watch.cancel()
            generation.close()

    def _openings(self, reply: Reply, count: int) -> list[dict[str, Any]]:
        """What a stream begins with: the assistant's role, or the prompts that are echoed."""
        shared = {"logprobs": None, "finish_reason": None}
        if reply.chat:
            delta = {"role": "assistant", "content": ""}
            return [{"index": i, "delta": delta, **shared} for i in range(count)]
        if reply.echo:
            texts = [self._prompt_text(reply, i) for i in range(count)]
            return [{"index": i, "text": text, **shared} for i, text in enumerate(texts)]
        return []

    def _delta(
        self, reply: Reply, index: int, event: StreamEvent, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            **({"delta": {"content": event.text}} if reply.chat else {"text": event.text}),
            **fields,
            "finish_reason": event.finish_reason,
        }
        if event.output is not None:
            choice |= {"stop_reason": event.output.stop_reason, "seed": event.output.seed}
        return choice

    def _report(
        self, reply: Reply, outputs: Sequence[RequestOutput], total: Mapping[str, int]
    ) -> None:
        reasons = ",".join(output.finish_reason for output in outputs)
        seconds = max(output.metrics.total for output in outputs)
        _log.info(
            "%s: %d prompt tokens, %d output tokens, %.3f s, %s",
            *(reply.head["id"], total["prompt_tokens"], total["completion_tokens"], seconds),
            reasons,
        )
        if self.settings.log_prompts:
            body = reply.body
            prompt = body.prompt if isinstance(body, CompletionRequest) else body.messages
            texts = [output.text for output in outputs]
            _log.info("%s: %r -> %r", reply.head["id"], prompt, texts)


async def _watch(request: Request, generation: Generation) -> None:
    """Free the slots of a client that goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.leave()


def merged(events: Sequence[tuple[int, StreamEvent]]) -> list[tuple[int, StreamEvent]]:
    """One event for each output: a stream that is read slowly gets several tokens at once."""
    if len(events) == 1:
        return [*events]
    merged: dict[int, StreamEvent] = {}
    for index, event in events:
        merged[index] = event if index not in merged else _joined(merged[index], event)
    return list(merged.items())


def _joined(first: StreamEvent, second: StreamEvent) -> StreamEvent:
    """Two events of an output as one: what both list is appended, the rest is the second's."""
    values = {name: (getattr(first, name), value) for name, value in vars(second).items()}
    listed = {k: a + b for k, (a, b) in values.items() if isinstance(b, (str, tuple))}
    return replace(second, **listed, prompt_logprobs=first.prompt_logprobs)


def _per_token(output: RequestOutput) -> float:
    return sum(output.raw_logprobs) / len(output.raw_logprobs)


def _checked(output: RequestOutput) -> RequestOutput:
    if output.finish_reason == "error":
        raise NoTokenError("no token is left to draw: too much is forbidden, or the models' "
                           "logits are not numbers")  # fmt: skip
    return output


_encode = json.JSONEncoder(ensure_ascii=False).encode
_END = b"]}\n\n"


def _data(value: Mapping[str, Any]) -> bytes:
    return b"data: " + _encode(value).encode() + b"\n\n"


def _chunk(begun: bytes, choice: Mapping[str, Any]) -> bytes:
    """One choice's: all but that is written once for a stream."""
    return begun + _encode(choice).encode() + _END
