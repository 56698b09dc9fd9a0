"""What the server refuses, and that nobody can take it from the others."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import time
from contextlib import suppress
from typing import Any

import pytest

import proxytune_kernels as ptk
from proxytune_kernels.server.engine import DecoderThread, Engine
from proxytune_kernels.server.guard import loopback_names
from proxytune_kernels.server.metrics import Metrics
from tests.server.serving import PROMPT, serving, wait_for

BODY = {"model": "shipped", "prompt": PROMPT, "max_tokens": 1}
LONG = {**BODY, "max_tokens": 900, "ignore_eos": True, "temperature": 1.5}


@pytest.fixture(scope="module")
def strict(trio32):
    """A server of two slots with narrow limits and a key."""
    with serving(
        ptk.Decoder(trio32, max_batch_size=2), api_key="right", hosts=loopback_names("127.0.0.1"),
        cors_origins=("https://page.test",), max_queue=2, max_body_bytes=5000,
        max_prompt_tokens=100, max_tokens=900, max_n=2,
    ) as running:  # fmt: skip
        yield running


KEY = {"authorization": "Bearer right"}


def test_a_key_is_asked_for(strict):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
        for path, body in (("/v1/completions", BODY), ("/metrics", None), ("/tokenize", {})):
            response, data = strict.ask(path, body, **headers)
            assert response.status == 401
            assert json.loads(data)["error"]["type"] == "authentication_error"
    assert strict.ask("/v1/completions", BODY, **KEY)[0].status == 200
    assert {strict.ask(path)[0].status for path in ("/", "/health", "/openapi.json")} == {200}


def test_a_name_that_points_here_from_elsewhere_is_refused(strict):
    for host, status in (("evil.test", 400), ("localhost:8000", 200), ("[::1]:80", 200)):
        assert strict.ask("/v1/models", host=host, **KEY)[0].status == status


def test_browsers_of_named_origins_alone_may_read(strict):
    for origin, allowed in (("https://page.test", "https://page.test"), ("https://x.test", None)):
        response, _ = strict.ask("/v1/models", origin=origin, **KEY)
        assert response.headers["access-control-allow-origin"] == allowed
    # Without a preflight a browser sends no JSON.
    response, _ = strict.ask("/v1/completions", BODY, content_type="text/plain", **KEY)
    assert response.status == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(strict, chunked):
    data = json.dumps({**BODY, "prompt": "a" * 6000}).encode()
    size = f"Content-Length: {len(data)}"
    if chunked:
        size = "Transfer-Encoding: chunked"
        data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{size}\r\nConnection: close\r\n"
    head += "Authorization: Bearer right\r\nContent-Type: application/json\r\n\r\n"
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as connection:
        connection.sendall(head.encode() + data)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 3}, "n must be at most 2, got 3"),
        ({"max_tokens": 901}, "max_tokens must be at most 900, got 901"),
        ({"prompt": "1 " * 200}, "prompt must have at most 100 tokens"),
        ({"prompt": ["a"] * 5}, "at most 4 outputs"),
        ({"stop": ["a"] * 65}, "stop"),
    ],
)
def test_limits_are_named(strict, given, words):
    response, data = strict.ask("/v1/completions", {**BODY, **given}, **KEY)
    assert response.status == 400
    assert words in json.loads(data)["error"]["message"]


HOSTILE: list[dict[str, Any]] = [
    {"temperature": math.nan}, {"alpha": [1.0, math.inf]}, {"top_p": True}, {"seed": 2**64},
    {"seed": -(2**63) - 1}, {"n": 1.0}, {"max_tokens": True}, {"logprobs": 10**30},
    {"stop": ["a", ""]}, {"logit_bias": {"1.5": 1}}, {"logit_bias": {"\u0663": 1}},
    {"logit_bias": {"1": -math.inf}}, {"allowed_token_ids": [True]}, {"stop_token_ids": [2**63]},
    {"bad_words": ["a " * 200]}, {"bad_words": ["\ud800"]}, {"prompt": "a " * 100_000},
    {"prompt": [[]]}, {"grammar": {"regex": "\ud800"}}, {"grammar": {"lark": "\ud800"}},
    {"grammar": {"json_schema": {"const": math.nan}}}, {"allowed_at": {"0": [1]}},
]  # fmt: skip


@pytest.mark.parametrize("given", HOSTILE, ids=lambda given: f"{given}"[:40])
def test_what_no_client_would_send_is_a_400_that_names_it(server, given):
    error = server.error({**BODY, **given})
    [name] = given
    assert error["param"] == name and error["message"].startswith(name), error


def test_a_request_that_comes_in_slowly_or_has_no_end_is_dropped(trio32):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"

    def whole(body):
        data = json.dumps(body).encode()
        return head + b"Content-Length: %d\r\n\r\n" % len(data) + data

    endless = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000
    late = (b"", head, head + b"Content-Length: 9\r\n\r\n{", whole(BODY)[:-1], endless)
    with serving(ptk.Decoder(trio32, max_batch_size=1), request_seconds=0.3) as strict:

        def connected():
            return socket.create_connection(("127.0.0.1", strict.port), timeout=20)

        for sent in late:
            with connected() as connection, suppress(ConnectionError):
                connection.sendall(sent)
                assert connection.recv(100) == b"", sent[-20:]
        # An answer may take longer, and so may the request behind it meanwhile.
        with connected() as connection:
            connection.sendall(whole({**LONG, "max_tokens": 500, "stream": True}) + head)
            assert b"200 OK" in connection.recv(100)
            time.sleep(0.5)
            connection.sendall(whole(BODY).removeprefix(head))
            answers = b""
            while b"200 OK" not in answers[-500:]:
                answers += (part := connection.recv(1 << 16))
                assert part, answers[-100:]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"[" * 4000, b'{"model": 1' + b"0" * 4500 + b"}", b"\xff"]
)
def test_what_is_no_json_object_is_a_400(strict, body):
    assert strict.ask("/v1/completions", body, **KEY)[0].status == 400


def test_a_full_queue_is_a_429_that_says_when(strict):
    streams = [strict.open("/v1/completions", {**LONG, "stream": True}, **KEY) for _ in range(2)]
    waiting = [post(strict.port, LONG, "Authorization: Bearer right\r\n") for _ in range(2)]

    def refused():
        response, data = strict.ask("/v1/completions", BODY, **KEY)
        return response.status == 429 and (response, data)

    try:
        wait_for(lambda: bool(refused()))
        response, data = refused()
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert json.loads(data)["error"]["type"] == "rate_limit_error"
    finally:
        for opened in (*streams, *waiting):
            opened.close()
    # All have gone away: there is room again.
    wait_for(lambda: strict.ask("/v1/completions", BODY, **KEY)[0].status == 200)


def test_a_client_that_goes_away_frees_its_slot_whole_or_streaming(server):
    for stream in (True, False):
        before = server.metric("proxytune_decoder_emitted_total")
        if stream:
            response = server.open("/v1/completions", {**LONG, "stream": True})
            assert response.readline().startswith(b"data: ")
            response.close()
        else:
            raw = post(server.port, LONG)
            wait_for(lambda: server.metric("proxytune_slots_in_use") > 0)
            raw.close()
        server.wait_idle()
        assert server.metric("proxytune_decoder_emitted_total") - before < 800


def test_a_cancelled_request_is_out_of_its_slot_within_two_steps(trio32):
    decoder = ptk.Decoder(trio32, max_batch_size=2)

    async def cancelled():
        engine = Engine(DecoderThread(decoder), 0, Metrics(2, decoder.statistics))
        engine.start()
        prompt = trio32.tokenize(PROMPT)
        params = ptk.SamplingParams(max_tokens=900, ignore_eos=True)
        engine.reserve(1)
        generation = engine.submit([(prompt, params)], whole=False)
        await generation.accepted()
        taken = 0
        async for events in generation:
            taken += len(events)
            if taken > 5:
                break
        generation.close()
        steps = decoder.statistics()["plain_steps"]
        while decoder.unfinished:
            await asyncio.sleep(0)
        more = decoder.statistics()["plain_steps"] - steps
        engine.reserve(0)
        engine.stop()
        return more

    assert asyncio.run(cancelled()) <= 2


def test_a_client_that_reads_nothing_holds_nobody_up(server):
    with post(server.port, {**LONG, "stream": True, "n": 8}) as slow:
        wait_for(lambda: server.metric("proxytune_slots_in_use") >= 8)
        assert server.ask("/v1/completions", BODY)[0].status == 200
        slow.close()
    server.wait_idle()


def test_a_grammar_that_takes_long_is_refused(trio32, monkeypatch):
    decoder = ptk.Decoder(trio32, max_batch_size=1)
    monkeypatch.setattr(decoder, "compile_grammar", lambda grammar: time.sleep(0.5))
    with serving(decoder, grammar_seconds=0.05) as busy:
        error = busy.error({**BODY, "grammar": {"regex": "a"}})
        assert error["message"] == "grammar must compile within 0.05 seconds"
        assert busy.ask("/v1/completions", BODY)[0].status == 200


def test_prompts_are_in_no_log_and_no_error(server, caplog):
    secret = "xyzzy-plugh"
    bodies: list[dict[str, Any]] = [
        {"prompt": secret}, {"prompt": secret, "top_p": 3}, {"prompt": [secret, 1]},
        {"prompt": {"a": secret}}, {"prompt": secret + "\ud800"}, {"prompt": secret * 2000},
    ]  # fmt: skip
    with caplog.at_level(logging.DEBUG, "proxytune_kernels"):
        said = [server.ask("/v1/completions", {**BODY, **body})[1].decode() for body in bodies]
        chat = {"model": "shipped", "messages": [{"role": secret, "content": secret}]}
        said.append(server.ask("/v1/chat/completions", chat)[1].decode())
    assert secret not in caplog.text and "1 output tokens" in caplog.text
    assert all(secret not in text for text in said[1:])


def test_prompts_are_logged_where_asked(trio32, caplog):
    caplog.set_level(logging.INFO, "proxytune_kernels")
    with serving(ptk.Decoder(trio32, max_batch_size=1), log_prompts=True) as talkative:
        talkative.ask("/v1/completions", {**BODY, "prompt": "xyzzy"})
    assert "xyzzy" in caplog.text


def test_a_server_that_is_told_to_stop_finishes_what_runs(trio32):
    with serving(ptk.Decoder(trio32, max_batch_size=1)) as stopping:
        streams = [
            stopping.open("/v1/completions", {**LONG, "max_tokens": 60, "stream": True})
            for _ in range(2)
        ]
        stopping.server.handle_exit(15, None)
        wait_for(lambda: _refuses(stopping.port))
        for stream in streams:  # one of them waited for the other's slot
            assert stream.read().endswith(b"data: [DONE]\n\n")
            stream.close()
        stopping.thread.join(20)
        assert not stopping.thread.is_alive()


def test_what_is_not_done_by_the_deadline_is_told_so(trio32):
    with serving(ptk.Decoder(trio32, max_batch_size=1), shutdown_seconds=0.3) as stopping:
        stream = stopping.open("/v1/completions", {**LONG, "stream": True})
        stopping.server.handle_exit(15, None)
        last = stream.read().strip().split(b"\n")[-1]
        assert "shutting down" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
        stream.close()
        stopping.thread.join(20)
        assert not stopping.thread.is_alive()


def test_a_step_that_fails_is_a_500_and_the_server_goes_on(trio32, monkeypatch, caplog):
    decoder = ptk.Decoder(trio32, max_batch_size=2)
    with serving(decoder) as failing:
        step, calls = decoder.step, iter([1])

        def once():
            if next(calls, None):
                with decoder._turn():
                    raise MemoryError
            return step()

        monkeypatch.setattr(decoder, "step", once)
        assert failing.error(BODY, 500)["type"] == "server_error"
        assert failing.ask("/v1/completions", BODY)[0].status == 200
    assert "MemoryError" in caplog.text


def post(port, body, headers=""):
    """A connection on which a completion is asked for, to be read or not."""
    data = json.dumps(body)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    head += f"{headers}Content-Type: application/json\r\n\r\n"
    connection.sendall(f"{head}{data}".encode())
    return connection


def _refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False
