"""How a server is set up: its limits, and what it lets in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """A server's settings.

    Args:
        model: the name that clients ask for.
        api_key: what clients must send as a bearer token; None lets all in.
        hosts: names that the Host header may have; empty takes any.
        cors_origins: origins whose pages a browser lets read the answers.
        max_queue: outputs that may wait for a slot; more are refused (429).
        max_body_bytes: of a request.
        max_prompt_tokens: of a prompt, in the role where it is longest; None is by the context.
        max_tokens: output tokens that a request may ask for; None is by the context.
        max_prompt_logprobs: likeliest tokens that a request may ask for at each position of its
            prompt; -1 is all there are.
        max_n: outputs of one prompt.
        max_schema_bytes: of a grammar, such as a JSON schema.
        request_seconds: that a client may take to send a request.
        grammar_seconds: that compiling a grammar may take.
        shutdown_seconds: that running requests have to finish once the server is told to stop.
        log_prompts: write prompts and outputs into the log.
    """

    model: str
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 64
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_prompt_logprobs: int = 20
    max_n: int = 16
    max_schema_bytes: int = 1 << 16
    request_seconds: float = 30.0
    grammar_seconds: float = 5.0
    shutdown_seconds: float = 30.0
    log_prompts: bool = False
