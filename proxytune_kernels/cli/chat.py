"""``proxytune chat``: talk to a server or a trio in the terminal, and see what steering moves."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.text import Text

from proxytune_kernels.analysis.tokens import MOVED_BITS, moved_bits
from proxytune_kernels.cli.options import (
    USAGE,
    DecoderOptions,
    TrioOptions,
    expected,
    open_decoder,
    printable,
    stop,
    with_options,
)
from proxytune_kernels.params import SamplingParams

_HELP = """\
/alpha NUMBER        strength of the steering; 0 is the base alone
/temperature NUMBER  0 is greedy
/max-tokens NUMBER   of a reply
/seed NUMBER         repeats the draws; /seed alone draws one
/clear               forget what was said
/quit                leave, as the end of input does
A line that ends with \\ goes on in the next one."""


class Piece(NamedTuple):
    """New text of a reply, and by how many bits steering moved its tokens: the most of them."""

    text: str
    moved: float
    changed: bool


@dataclass
class Settings:
    """What the commands change."""

    alpha: float
    temperature: float
    max_tokens: int
    seed: int | None

    def change(self, name: str, text: str) -> None:
        """Set one from text; ValueError says what is wrong."""
        if name == "seed" and not text:
            self.seed = None
            return
        try:
            value: Any = float(text) if name in ("alpha", "temperature") else int(text)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {text!r}") from None
        SamplingParams(**{name: value})  # its range
        setattr(self, name, value)


Reply = Callable[[list[dict[str, str]], Settings], Iterator[Piece]]
"""What answers messages."""


def piece(text: str, steering: Any) -> Piece:
    """A piece, of what is known of its tokens: mappings with base, proxy and changed."""
    moved, changed = 0.0, False
    for token in steering or ():
        moved = max(moved, moved_bits(token["base"], token["proxy"]), key=abs)
        changed = changed or token["changed"]
    return Piece(text, moved, changed)


def from_decoder(decoder: Any) -> Reply:
    """Replies of a decoder in this process."""

    def reply(messages: list[dict[str, str]], settings: Settings) -> Iterator[Piece]:
        params = SamplingParams(**vars(settings), steering=True)
        stream = decoder.stream([messages], params)
        try:
            for event in stream:
                yield piece(event.text, [s._asdict() for s in event.steering or ()])
        finally:
            stream.close()

    return reply


def from_server(url: str, key: str | None) -> Reply:
    """Replies of a server; a ValueError is what it says of a request that it refuses."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url must be such as http://127.0.0.1:8000, got {url!r}")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    headers = {"content-type": "application/json", "connection": "close"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"

    def ask(path: str, body: Any = None) -> Any:
        connection = kind(parts.hostname or "", parts.port)
        data = None if body is None else json.dumps(body)
        place = parts.path.rstrip("/").removesuffix("/v1") + path
        connection.request("GET" if data is None else "POST", place, data, headers)
        response = connection.getresponse()
        if response.status != 200:
            text = response.read().decode(errors="replace")
            connection.close()
            raise ValueError(_said(text) or f"the server answers {response.status}")
        return response

    with ask("/v1/models") as answer:
        model = json.loads(answer.read())["data"][0]["id"]

    def reply(messages: list[dict[str, str]], settings: Settings) -> Iterator[Piece]:
        body = {"model": model, "messages": messages, "stream": True, "steering": True}
        with ask("/v1/chat/completions", {**body, **vars(settings)}) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                choice = chunk["choices"][0]
                yield piece(choice["delta"].get("content", ""), choice.get("steering"))

    return reply


def _said(text: str) -> str | None:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return None


def style(said: Piece) -> str:
    """Green and underlined: steering made it likelier; red and struck: less likely."""
    styles = []
    if abs(said.moved) >= MOVED_BITS:
        styles.append("green underline" if said.moved > 0 else "red strike")
    if said.changed:
        styles.append("bold")
    return " ".join(styles)


class Chat:
    """A conversation in the terminal.

    Args:
        reply: answers messages.
        settings: what the commands change.
        plain: no colours.
    """

    def __init__(self, reply: Reply, settings: Settings, plain: bool) -> None:
        self._reply = reply
        self._settings = settings
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        # Colour is a help alone: what is no terminal gets plain text.
        self._plain = plain or not self._console.is_terminal or self._console.is_dumb_terminal
        self._messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Until the end of input, or /quit."""
        asks = sys.stdin.isatty()
        if asks:
            print("/help says what there is.", flush=True)
        while True:
            try:
                line = input("> " if asks else "").strip()
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + input("").rstrip()
            except EOFError:
                return
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                print(self.obey(line), flush=True)
            elif line:
                self.say(line)

    def obey(self, line: str) -> str:
        """Do what a command says; returns what to answer."""
        command, _, value = line[1:].partition(" ")
        name = command.replace("-", "_")
        if name == "clear":
            self._messages.clear()
            return "forgotten"
        if name not in vars(self._settings):
            return _HELP
        try:
            self._settings.change(name, value.strip())
        except ValueError as error:
            return f"Error: {error}"
        return f"{command} {getattr(self._settings, name)}"

    def say(self, line: str) -> None:
        """Send a turn and show the reply; an interrupt ends the reply alone."""
        messages = [*self._messages, {"role": "user", "content": line}]
        text = ""
        replies = self._reply(messages, self._settings)
        try:
            for said in replies:
                text += said.text
                self._show(said)
        except KeyboardInterrupt:
            pass
        except (ValueError, RuntimeError, OSError, HTTPException) as error:
            print(f"Error: {printable(str(error))}", flush=True)
            return
        finally:
            replies.close()  # type: ignore[attr-defined]
        print(flush=True)
        self._messages = [*messages, {"role": "assistant", "content": text}]

    def _show(self, said: Piece) -> None:
        text = printable(said.text)
        if self._plain:
            print(text, end="", flush=True)
        else:
            self._console.print(Text(text, style=style(said)), end="")


@with_options
def chat(
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of a server, such as http://127.0.0.1:8000."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Strength of the steering.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Of a reply.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Repeats the draws.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No colours; as NO_COLOR=1.")] = False,
    *,
    trio: TrioOptions,
    decoder: DecoderOptions,
) -> None:
    """Talk to a server (--url) or to a trio (--trio); colours show what steering moves.

    Green and underlined: steering made it likelier; red and struck: less likely; bold: the
    likeliest token is another than the base's. The key of a server is read from PROXYTUNE_API_KEY.
    """
    named = trio.trio is not None or trio.base is not None
    if (url is not None) == named:
        raise stop("give --url, or the models (--trio shipped), and not both", USAGE)
    settings = Settings(alpha, temperature, max_tokens, seed)
    with expected(ValueError, code=USAGE):
        SamplingParams(**vars(settings))
    if url is not None:
        with expected(ValueError, OSError, HTTPException):
            reply = from_server(url, os.environ.get("PROXYTUNE_API_KEY"))
    else:
        reply = from_decoder(open_decoder(trio.open(), **decoder.settings()))
    Chat(reply, settings, plain or bool(os.environ.get("NO_COLOR"))).run()
