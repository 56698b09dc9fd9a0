"""``proxytune serve``: an OpenAI-compatible server, and a page that shows what steering changes."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune_kernels.cli.options import (
    FAILED,
    USAGE,
    DecoderOptions,
    TrioOptions,
    expected,
    open_decoder,
    stop,
    with_options,
)

if TYPE_CHECKING:
    from proxytune_kernels.decoder import Decoder
    from proxytune_kernels.server.settings import Settings

_KEY = "PROXYTUNE_API_KEY"


@dataclass(frozen=True)
class ServerOptions:
    """The options that say what the server lets in."""

    api_key: Annotated[
        str | None,
        typer.Option(help=f"What clients must send as a bearer token; better in {_KEY}."),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file that holds the key.")
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Whose pages may call the server; may be repeated."),
    ] = None
    max_queue: Annotated[
        int, typer.Option(min=0, help="Outputs that may wait for a slot; more get status 429.")
    ] = 64
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 1 << 20
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a prompt.", show_default="what the context holds")
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="That a request may ask for.", show_default="the context's"),
    ] = None
    max_prompt_logprobs: Annotated[
        int,
        typer.Option(min=-1, help="Likeliest tokens at a position of the prompt; -1 is all."),
    ] = 20
    max_n: Annotated[int, typer.Option(min=1, help="Outputs of one prompt.")] = 16
    max_schema_bytes: Annotated[int, typer.Option(min=1, help="Of a grammar.")] = 1 << 16
    request_seconds: Annotated[
        float, typer.Option(min=0.1, help="That a client may take to send a request.")
    ] = 30.0
    grammar_seconds: Annotated[float, typer.Option(min=0.1, help="To compile a grammar.")] = 5.0
    shutdown_seconds: Annotated[
        float, typer.Option(min=0, help="That requests have to finish after SIGTERM.")
    ] = 30.0
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts and outputs into the log.")
    ] = False

    def settings(self, model: str, hosts: tuple[str, ...]) -> Settings:
        """The same for the server; leaves with the reason where they make no sense."""
        from dataclasses import asdict

        from proxytune_kernels.server.settings import Settings

        values = asdict(self)
        file = values.pop("api_key_file")
        if file is not None and self.api_key is not None:
            raise stop("give --api-key or --api-key-file, not both", USAGE)
        if file is not None:
            with expected(OSError, UnicodeDecodeError):
                values["api_key"] = file.read_text("utf-8").strip()
        elif self.api_key is None:
            values["api_key"] = os.environ.get(_KEY)
        key = values["api_key"]
        if key is not None and (not key or not key.isascii() or not key.isprintable()):
            raise stop("the API key must be printable ASCII characters, at least one", USAGE)
        origins = tuple(values.pop("cors_origin") or ())
        return Settings(model=model, hosts=hosts, cors_origins=origins, **values)


@with_options
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="Of the model, for clients.", show_default="the trio's or base's"),
    ] = None,
    *,
    trio: TrioOptions,
    decoder: DecoderOptions,
    server: ServerOptions,
) -> None:
    """Serve a trio at OpenAI's endpoints, and a page at / that shows what steering changes.

    Example: proxytune serve --trio shipped
    """
    settings = decoder.settings()
    trio.check()
    try:
        from proxytune_kernels.server import app, guard, process, run
    except ImportError as error:
        install = "pip install 'proxytune_kernels[serve]'"
        raise stop(f"the server needs {error.name}: {install}", FAILED) from error
    hosts = guard.loopback_names(host)
    model = name or Path(trio.trio or trio.base or "").name or trio.base_model or "remote"
    limits = server.settings(model, hosts)
    with expected(OSError):
        bound = run.listen(host, port)
    with bound:
        if not hosts and limits.api_key is None:
            typer.echo(f"Warning: {host} lets other machines in, and there is no API key", err=True)
        with process.DecoderProcess(partial(_open, trio, settings)) as opened:
            if (status := opened.wait()) is not None:
                raise typer.Exit(status)
            _log()
            address = f"[{host}]" if ":" in host else host
            typer.echo(f"http://{address}:{bound.getsockname()[1]} serves {model}", err=True)
            served = run.server_of(app.create_app(opened, limits), limits)
            process.freeze()
            served.run([bound])
            if (status := opened.wait()) is not None and status:
                raise stop(f"the decoder's process ended with status {status}", FAILED)


def _open(trio: TrioOptions, settings: dict[str, Any]) -> Decoder:
    """In the decoder's process: what is wrong is said here, and its exit status passed on."""
    _log()
    try:
        return open_decoder(trio.open(), **settings)
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from error


def _log() -> None:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("proxytune_kernels.server").setLevel(logging.INFO)
