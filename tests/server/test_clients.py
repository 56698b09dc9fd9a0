"""The clients that people have: OpenAI's, whole and streaming, and what they send by habit."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

import proxytune_kernels as ptk
from proxytune_kernels.params import SAMPLING_FIELDS
from proxytune_kernels.server import requests
from proxytune_kernels.server.api import merged
from tests.server.serving import PROMPT

openai = pytest.importorskip("openai", reason="the package openai is not installed")

CHAT = [{"role": "system", "content": "Answer."}, {"role": "user", "content": PROMPT}]
FLAT = f"Answer.\n\n{PROMPT}"  # what a role of plain prompts reads of it
SAMPLED: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(reference):
    """The decoder's outputs for both prompts."""
    return reference.generate([PROMPT, FLAT], ptk.SamplingParams(**SAMPLED))


def test_a_completion_is_the_decoders(client, expected):
    made = client.completions.create(model="shipped", prompt=PROMPT, **SAMPLED)
    [choice], wanted = made.choices, expected[0]
    assert (choice.text, choice.finish_reason) == (wanted.text, wanted.finish_reason)
    assert choice.seed == 7
    assert made.usage.prompt_tokens == len(wanted.prompt_token_ids["base"])
    assert made.usage.completion_tokens == len(wanted.token_ids)
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_a_chat_is_the_decoders(client, expected):
    parts = [{"type": "text", "text": part} for part in (PROMPT[:9], PROMPT[9:])]
    for user in (PROMPT, parts):
        messages = [CHAT[0], {"role": "user", "content": user}]
        made = client.chat.completions.create(model="shipped", messages=messages, **SAMPLED)
        assert made.choices[0].message.content == expected[1].text
        assert made.choices[0].message.role == "assistant"


def test_a_streamed_completion_is_the_whole_one(client, expected):
    stream = client.completions.create(model="shipped", prompt=PROMPT, stream=True, **SAMPLED)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0].text
    assert [c.choices[0].finish_reason for c in chunks[-2:]] == [None, expected[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 2
    assert all(chunk.usage is None for chunk in chunks)


def test_a_streamed_chat_is_the_whole_one_with_usage(client, expected):
    stream = client.chat.completions.create(
        model="shipped", messages=CHAT, stream=True, stream_options={"include_usage": True},
        **SAMPLED,
    )  # fmt: skip
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected[1].text
    assert last.choices == [] and last.usage.completion_tokens == len(expected[1].token_ids)
    assert all(chunk.usage is None for chunk in chunks)


def test_more_clients_than_slots_get_each_what_it_would_get_alone(server, reference):
    count = 40
    params = [ptk.SamplingParams(**{**SAMPLED, "seed": i}) for i in range(count)]
    wanted = [output.text for output in reference.generate([PROMPT] * count, params)]

    async def one(client, seed):
        asked = {**SAMPLED, "seed": seed}
        stream = await client.completions.create(
            model="shipped", prompt=PROMPT, stream=True, **asked
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(count)))

    assert asyncio.run(all_of_them()) == wanted


def test_a_stream_that_is_read_late_gets_several_tokens_at_once(reference):
    params = ptk.SamplingParams(**SAMPLED, prompt_logprobs=0)
    listed = [*reference.stream([PROMPT] * 2, params)]
    events = [(event.index, event) for event in listed]
    for index, event in merged(events):
        of_one = [each for each in listed if each.index == index]
        assert event.output is of_one[-1].output is not None
        assert event.text == "".join(each.text for each in of_one)
        assert event.token_ids == sum((each.token_ids for each in of_one), ())
        assert event.logprobs == sum((each.logprobs for each in of_one), ())
        assert event.prompt_logprobs is of_one[0].prompt_logprobs is not None


def test_alpha_0_is_the_base_alone(client, reference):
    params = ptk.SamplingParams(alpha=0.0, **SAMPLED)
    made = client.completions.create(
        model="shipped", prompt=PROMPT, extra_body={"alpha": 0.0, "top_k": 0}, **SAMPLED
    )
    [alone] = reference.generate(PROMPT, params)
    assert made.choices[0].text == alone.text


@pytest.mark.parametrize(
    "asked",
    [
        {"logit_bias": {"221": 9.0, "3": -100}},
        {"presence_penalty": 1.5, "alpha": 0.0},
        {"frequency_penalty": 1.5, "alpha": 0.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 1.8, "penalty_prompt": False},
        {"allowed_token_ids": list(range(20, 60))},
        {"bad_words": [" 3", " +"]},
        {"alpha": [0.0, 2.0, 1.0]},
        {"min_tokens": 20, "top_k": 5, "min_p": 0.01, "filter_order": "hf"},
        {"stop_token_ids": [19, 20, 21]},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_a_parameter_does_what_it_does_in_the_decoder(server, reference, asked):
    body = {"model": "shipped", "prompt": PROMPT, **SAMPLED, **asked}
    response, data = server.ask("/v1/completions", body)
    assert response.status == 200, data
    given = dict(asked)
    if bias := asked.get("logit_bias"):
        given["logit_bias"] = {int(i): value for i, value in bias.items()}
    [output] = reference.generate(PROMPT, ptk.SamplingParams(**{**SAMPLED, **given}))
    assert json.loads(data)["choices"][0]["text"] == output.text
    given.pop(next(iter(given)))
    [without] = reference.generate(PROMPT, ptk.SamplingParams(**{**SAMPLED, **given}))
    assert output.token_ids != without.token_ids


SCHEMA = {
    "type": "object", "required": ["count"], "additionalProperties": False,
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
}  # fmt: skip


def test_output_keeps_to_a_schema_or_a_grammar(server, client):
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": SCHEMA}}
    made = client.chat.completions.create(
        model="shipped", messages=CHAT, response_format=form, n=4, max_tokens=40, seed=1
    )
    for choice in made.choices:
        assert 0 <= json.loads(choice.message.content)["count"] <= 99
        assert choice.finish_reason == "stop"
    for grammar, wanted in (
        ({"regex": "[0-9]{3}-[0-9]{2}"}, r"\d{3}-\d{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"lark": 'start: "a" "b"+ "c"'}, "ab+c"),
        ({"json_schema": SCHEMA}, r'{"count": \d+}'),
    ):
        body = {"model": "shipped", "prompt": PROMPT, "grammar": grammar, "max_tokens": 40}
        response, data = server.ask("/v1/completions", body)
        assert response.status == 200, data
        assert re.fullmatch(wanted, json.loads(data)["choices"][0]["text"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"grammar": {"regex": "("}}, "grammar (regex)"),
        ({"grammar": {"json_schema": {"properties": {"a": {"type": "x"}}}}}, "#/properties/a"),
        ({"grammar": {"lark": "a" * 70_000}}, "at most 65536 bytes"),
        ({"grammar": {"regex": "a"}, "response_format": {"type": "json_object"}}, "left out"),
        ({"response_format": {"type": "json_schema"}}, "must have json_schema"),
    ],
)
def test_a_wrong_grammar_is_named(server, given, words):
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    error = server.error({"model": "shipped", "prompt": PROMPT, **given})
    assert words in error["message"] and error["param"] in ("grammar", "response_format")


def test_several_prompts_as_texts_and_as_tokens(client, reference, expected):
    token_ids = [output.prompt_token_ids["base"] for output in expected]
    for prompts in ([PROMPT, FLAT], token_ids):
        made = client.completions.create(model="shipped", prompt=prompts, **SAMPLED)
        assert [c.text for c in made.choices] == [output.text for output in expected]
        assert [c.index for c in made.choices] == [0, 1]
        assert made.usage.prompt_tokens == sum(map(len, token_ids))


def test_n_outputs_have_seeds_that_differ_and_one_prompt(client, reference):
    made = client.completions.create(model="shipped", prompt=PROMPT, n=3, **SAMPLED)
    assert len({choice.seed for choice in made.choices}) == 3
    for choice in made.choices:
        params = ptk.SamplingParams(**{**SAMPLED, "seed": choice.seed})
        assert reference.generate(PROMPT, params)[0].text == choice.text
    tokens = len(reference.trio.tokenize(PROMPT)["base"])
    assert made.usage.prompt_tokens == tokens


def test_the_likeliest_of_several_outputs_are_answered(client, reference):
    made = client.completions.create(
        model="shipped", prompt=[PROMPT, FLAT], best_of=4, n=2, echo=True, **SAMPLED
    )
    outputs = reference.generate([PROMPT, FLAT], ptk.SamplingParams(**SAMPLED, n=4))
    for i, prompt in enumerate((PROMPT, FLAT)):
        own = [output for output in outputs if output.index == i]
        own.sort(key=lambda output: -sum(output.raw_logprobs) / len(output.token_ids))
        texts = [choice.text for choice in made.choices if choice.index // 2 == i]
        assert texts == [prompt + output.text for output in own[:2]]
    assert made.usage.completion_tokens == sum(len(output.token_ids) for output in outputs)
    assert made.usage.prompt_tokens == sum(len(o.prompt_token_ids["base"]) for o in outputs[::4])


def test_echo_and_stop(client, expected):
    text = expected[0].text
    stop = text[4:6]
    made = client.completions.create(
        model="shipped", prompt=PROMPT, echo=True, stop=stop, **SAMPLED
    )
    assert made.choices[0].text == PROMPT + text[: text.index(stop)]
    assert (made.choices[0].finish_reason, made.choices[0].stop_reason) == ("stop", stop)


def test_a_completion_has_16_tokens_unless_told_and_a_chat_what_fits(server):
    body = {"model": "shipped", "ignore_eos": True, "temperature": 0}
    asked: Any = (
        ("/v1/completions", {"prompt": PROMPT}, 16),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 1000}]}, None),
    )
    for path, prompt, count in asked:
        response, data = server.ask(path, {**body, **prompt})
        assert response.status == 200, data
        usage = json.loads(data)["usage"]
        wanted = count or server.decoder.max_seq_len + 1 - usage["prompt_tokens"]
        assert usage["completion_tokens"] == wanted


def test_what_clients_send_by_habit_is_taken(client):
    habits = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": True,
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {},
        "reasoning_effort": None, "audio": None,
    }  # fmt: skip
    made = client.chat.completions.create(
        model="shipped", messages=CHAT, max_tokens=1, extra_body=habits
    )
    assert len(made.choices) == 1


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"temprature": 0.5}, "temprature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"best_of": 17}, "best_of"),
        ({"best_of": 1, "n": 2}, None),
        ({"best_of": 2, "stream": True}, None),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 10**30]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a " * 4000}, None),
        ({"grammar": {"regex": "a", "choice": ["b"]}}, "grammar"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_parameter_is_named(server, given, param):
    error = server.error({"model": "shipped", "prompt": PROMPT, **given})
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert (error["param"], error["message"].startswith(param)) == (param, True), error


def test_the_message_of_a_chat_must_be_text(server):
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    body = {"model": "shipped", "messages": [{"role": "user", "content": image}]}
    error = server.error(body, path="/v1/chat/completions")
    assert (error["param"], "Input should be 'text'" in error["message"]) == ("messages", True)
    body["messages"] = []
    assert server.error(body, path="/v1/chat/completions")["param"] == "messages"


def test_errors_are_the_clients_exceptions(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="top_p must be in"):
        client.completions.create(model="shipped", prompt="a", top_p=2)


def test_every_parameter_of_the_decoder_can_be_asked_for():
    # All but allowed_at: masks of many positions would take room for every slot.
    special = {"max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "grammar", "n"}
    special |= {"allowed_at", "add_special_tokens", "prompt_logprobs_last"}
    assert set(SAMPLING_FIELDS) <= special | set(requests.SAME)
    assert set(requests.SAME) <= set(requests.Common.model_fields)


def test_models_tokens_and_health(server, client, reference):
    assert [model.id for model in client.models.list()] == ["shipped"]
    assert client.models.retrieve("shipped").max_model_len == server.decoder.max_seq_len
    _, data = server.ask("/tokenize", {"prompt": PROMPT})
    tokens = json.loads(data)
    assert tokens["roles"] == reference.trio.tokenize(PROMPT)
    assert tokens["tokens"] == tokens["roles"]["base"] and tokens["count"] == len(tokens["tokens"])
    _, data = server.ask("/detokenize", {"tokens": tokens["tokens"]})
    assert json.loads(data) == {"prompt": PROMPT}
    _, data = server.ask("/tokenize", {"messages": CHAT})
    assert json.loads(data)["tokens"] == reference.trio.tokenize(FLAT)["base"]
    assert server.error({"tokens": [10**6]}, path="/detokenize")
    assert server.ask("/health")[0].status == 200
