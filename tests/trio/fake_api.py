"""An OpenAI-compatible API in this process: a table for a model, and faults where wanted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import torch

MODEL = "table"
# What a fault makes of an answer: (status, headers, body).
Reply = tuple[int, dict[str, str], bytes]
Fault = Callable[[Any], Reply]


class FakeApi:
    """Its next token's log-probabilities depend on the last token alone.

    Args:
        texts: how it writes each token.
        serves: protocols that it knows, see :data:`proxytune_kernels.trio.remote.PROTOCOLS`.
        ids: tokens go by id where a request asks for that, or the protocol has them.
        most: likeliest tokens that may be asked for.
    """

    def __init__(
        self, texts: Sequence[str], serves: Sequence[str], ids: bool = True, most: int = 1 << 20
    ) -> None:
        self.texts, self.serves, self.ids, self.most = list(texts), serves, ids, most
        size = len(texts)
        made = torch.randn(size, size, generator=torch.Generator().manual_seed(3)) * 3
        self.table = made.log_softmax(-1)
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.faults: list[Fault | None] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return _json({"data": [{"id": MODEL, "max_model_len": 512}]})
        if path == "/v1/chat/completions" and "chat" in self.serves:
            asked = body["top_logprobs"]
            last = len(body["messages"][0]["content"]) % len(self.texts)
            return _json({"choices": [{"index": 0, "logprobs": self._content(last, asked)}]})
        if path != "/v1/completions" or not set(self.serves) - {"chat"}:
            return _json({"error": {"message": "no such path"}}, 404)
        if body.get("prompt_logprobs", body.get("logprobs", 0)) > self.most:
            return _json({"error": {"message": f"more than {self.most} logprobs"}}, 400)
        if body.get("echo") and "echo" not in self.serves:
            return _json({"error": {"message": "echo is not supported"}}, 400)
        choices = [{"index": i, **self._choice(p, body)} for i, p in enumerate(body["prompt"])]
        return _json({"choices": choices[::-1]})  # the index counts, not the order

    def _choice(self, prompt: list[int], body: Any) -> dict[str, Any]:
        if "prompt_logprobs" in self.serves and "prompt_logprobs" in body:
            asked = body["prompt_logprobs"]
            places = [self._top(a, asked, b) for a, b in pairwise(prompt)]
            by_id = [
                {str(i): {"logprob": p, "decoded_token": self.texts[i]} for i, p in place.items()}
                for place in places
            ]
            return {"prompt_logprobs": [None, *by_id]}
        if "prompt_logprobs" in body:  # an unknown field, which it ignores
            return {"logprobs": None}
        asked, ids = body["logprobs"], self.ids and "return_tokens_as_token_ids" in body
        if "content" in self.serves:
            return {"logprobs": self._content(prompt[-1], asked)}
        following = [*prompt[1:], None] if body.get("echo") else [None]
        seen = prompt if body.get("echo") else prompt[-1:]
        places = [self._top(a, asked, b) for a, b in zip(seen, following, strict=True)]
        named = [
            {f"token_id:{i}" if ids else self.texts[i]: p for i, p in place.items()}
            for place in places
        ]
        return {"logprobs": {"top_logprobs": [None, *named] if body.get("echo") else named}}

    def _top(self, last: int, asked: int, also: int | None = None) -> dict[int, float]:
        row = self.table[last]
        top = row.topk(len(row) if asked == -1 else min(asked, len(row)))
        found = {} if also is None else {also: float(row[also])}
        return found | dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def _content(self, last: int, asked: int) -> dict[str, Any]:
        entries = [
            {**({"id": i} if self.ids else {}), "token": self.texts[i], "logprob": p}
            for i, p in self._top(last, asked).items()
        ]
        return {"content": [{**entries[-1], "top_logprobs": entries}]}


@contextmanager
def serving(api: FakeApi) -> Iterator[FakeApi]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            self._do(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _do(self, body: Any) -> None:
            api.requests.append((self.path, body, dict(self.headers)))
            fault = api.faults.pop(0) if api.faults and self.path != "/v1/models" else None
            reply = api.answer(self.path, body)
            status, headers, data = reply if fault is None else fault(json.loads(reply[2]))
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that waits no longer
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _json(value: Any, status: int = 200) -> Reply:
    return status, {"content-type": "application/json"}, json.dumps(value).encode()


def status(code: int, message: str = "later", **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: (code, named, json.dumps({"error": {"message": message}}).encode())


def changed(change: Callable[[Any], Any]) -> Fault:
    """The answer as it would be, changed in place, or what ``change`` gives for it."""

    def fault(answer: Any) -> Reply:
        made = change(answer)
        return _json(answer if made is None else made)

    return fault


def cut(answer: Any) -> Reply:
    data = json.dumps(answer).encode()
    return 200, {}, data[: len(data) // 2]


def slow(seconds: float) -> Fault:
    def fault(answer: Any) -> Reply:
        time.sleep(seconds)
        return _json(answer)

    return fault
