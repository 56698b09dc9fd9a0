"""The endpoints, as a FastAPI application."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

import proxytune_kernels
from proxytune_kernels.decoder import Decoder
from proxytune_kernels.server import responses
from proxytune_kernels.server.api import Api, NoTokenError
from proxytune_kernels.server.engine import BusyError, DecoderThread, LostError, StoppingError
from proxytune_kernels.server.guard import Guard
from proxytune_kernels.server.process import DecoderProcess
from proxytune_kernels.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from proxytune_kernels.server.settings import Settings

_log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_KIND = re.compile(r"str|int|float|.*\[.*")  # what pydantic calls the kinds of a union
_MESSAGE = 1000  # characters
_MEANS = {
    400: "A parameter that is wrong or not supported; the error names it.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The server failed.",
    503: "The server is shutting down.",
}


def _documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {c: {"model": responses.ErrorBody, "description": _MEANS[c]} for c in codes}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer in OpenAI's form of errors."""
    kind = _TYPES.get(status, "invalid_request_error")
    error = {"message": message[:_MESSAGE], "type": kind, "param": param, "code": code}
    # In ASCII: a name of an unknown parameter may be no Unicode.
    return Response(json.dumps({"error": error}), status, headers, "application/json")


def create_app(decoder: Decoder | DecoderProcess, settings: Settings) -> FastAPI:
    """The application; its engine starts and stops with it, and is ``app.state.api.engine``.

    Args:
        decoder: belongs to the application from now on; it runs in a thread, or its own process.
        settings: names and limits.
    """
    served = DecoderThread(decoder) if isinstance(decoder, Decoder) else decoder
    api = Api(served, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        api.engine.start()
        yield
        api.engine.stop()

    app = FastAPI(
        title="proxytune",
        version=proxytune_kernels.__version__,
        description="OpenAI's endpoints over a trio of models (proxy-tuning).",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.api = api
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    _add_errors(app)
    _add_generation(app, api)
    _add_models(app, api)
    _add_tokens(app, api)
    _add_operation(app, api)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
        )
    app.add_middleware(Guard, settings=settings, refuse=error_response, count=api.metrics.response)
    return app


def _add_generation(app: FastAPI, api: Api) -> None:
    errors = _documented(400, 401, 404, 413, 429, 500, 503)

    def answers(model: Any) -> dict[int | str, dict[str, Any]]:
        event = {"type": "object", "properties": {"data": {"type": "string"}}}
        stream = {"text/event-stream": {"schema": event}}
        description = "The outputs; with stream, server-sent events."
        return {200: {"model": model, "content": stream, "description": description}, **errors}

    @app.post("/v1/completions", responses=answers(responses.Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        _check_model(api, body.model)
        return await api.answer(body, body.prompts, request)

    @app.post("/v1/chat/completions", responses=answers(responses.ChatCompletion))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat: the roles of the trio that are tuned for it get their template."""
        _check_model(api, body.model)
        return await api.answer(body, [[m.plain() for m in body.messages]], request)


def _add_models(app: FastAPI, api: Api) -> None:
    model = {
        "id": api.settings.model,
        "object": "model",
        "created": api.created,
        "owned_by": "proxytune",
        "max_model_len": api.max_seq_len,
    }

    @app.get("/v1/models", responses={200: {"model": responses.Models}, **_documented(401)})
    async def models() -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [model]})

    known = {200: {"model": responses.Model}, **_documented(401, 404)}

    @app.get("/v1/models/{name:path}", responses=known)
    async def retrieve(name: str) -> Response:
        """The model, if it has this name."""
        _check_model(api, name)
        return JSONResponse(model)


def _add_tokens(app: FastAPI, api: Api) -> None:
    errors = _documented(400, 401, 404, 413, 500)

    @app.post("/tokenize", responses={200: {"model": responses.Tokens}, **errors})
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a prompt; ``tokens`` are the base's."""
        _check_model(api, body.model)
        messages = None if body.messages is None else [m.plain() for m in body.messages]
        prompt = body.prompt if messages is None else messages
        roles = await api.tokenize(prompt, body.add_special_tokens)
        tokens = roles["base"]
        size = api.max_seq_len
        counts = {"count": len(tokens), "max_model_len": size}
        return JSONResponse({**counts, "tokens": tokens, "roles": roles})

    @app.post("/detokenize", responses={200: {"model": responses.Text}, **errors})
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        _check_model(api, body.model)
        return JSONResponse({"prompt": await api.text(body.tokens)})


def _add_operation(app: FastAPI, api: Api) -> None:
    page = (files("proxytune_kernels") / "server" / "page.html").read_text("utf-8")
    policy = {"content-security-policy": _policy(page), "cache-control": "no-cache"}
    text = "text/plain; version=0.0.4; charset=utf-8"

    @app.get("/", response_class=HTMLResponse)
    async def root() -> Response:
        """The page."""
        return HTMLResponse(page, headers=policy)

    @app.get("/health", responses={200: {"model": responses.Health}, **_documented(503)})
    async def health() -> Response:
        """Whether requests are taken."""
        if not api.engine.healthy:
            raise StoppingError
        return JSONResponse({"status": "ok"})

    described = {200: {"content": {text: {"schema": {"type": "string"}}}}, **_documented(401)}

    @app.get("/metrics", response_class=Response, responses=described)
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(api.metrics.text(), media_type=text)


def _policy(page: str) -> str:
    """Lets a browser run what stands in the page, talk to this server, and nothing else."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _check_model(api: Api, name: str | None) -> None:
    if name is not None and name != api.settings.model:
        message = f"there is no model of this name: the one here is {api.settings.model!r}"
        raise HTTPException(404, message)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        # Of what a value might have been, the kind in which most of it was right.
        same = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
        first = max(same, key=lambda each: len(each["loc"]))
        place = [str(part) for part in first["loc"][1:] if not _KIND.fullmatch(str(part))]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            return error_response(400, f"{'.'.join(place)} is not supported", place[0])
        if first["type"] == "json_invalid" or not place:
            return error_response(400, f"the body must be a JSON object: {message}")
        return error_response(400, f"{'.'.join(place)}: {message}", place[0])

    @app.exception_handler(ValueError)
    @app.exception_handler(TypeError)
    async def wrong(_: Request, error: Exception) -> Response:
        message = re.sub(r"^prompts\[\d+\]: ", "", str(error))
        word = re.match(r"\w+", message)
        known = CompletionRequest.model_fields | ChatRequest.model_fields
        param = word[0] if word is not None and word[0] in known else None
        code = "no_token_left" if isinstance(error, NoTokenError) else None
        return error_response(400, message, param, code)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> Response:
        retry = {"retry-after": str(error.retry_after)}
        return error_response(429, str(error), code="queue_full", headers=retry)

    @app.exception_handler(StoppingError)
    async def stopping(_: Request, error: StoppingError) -> Response:
        return error_response(503, str(error), headers={"retry-after": "10"})

    @app.exception_handler(LostError)
    async def lost(_: Request, error: LostError) -> Response:
        return error_response(500, str(error))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        code = "model_not_found" if error.status_code == 404 else None
        return error_response(error.status_code, str(error.detail), None, code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # Its message may hold a prompt.
        where = "".join(traceback.format_tb(error.__traceback__))
        _log.error("a request failed: %s\n%s", type(error).__name__, where)
        return error_response(500, "the server failed: its log says where")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema; invalid bodies are 400 here, where FastAPI writes 422."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for request in (CompletionRequest, ChatRequest):
            schemas[request.__name__]["properties"]["model"]["enum"] = [
                app.state.api.settings.model
            ]
        app.openapi_schema = schema
    return app.openapi_schema
