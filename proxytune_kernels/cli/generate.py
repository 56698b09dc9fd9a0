"""``proxytune generate``: continue prompts from arguments, a file or standard input."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import typer

from proxytune_kernels.analysis.rows import decoded, json_value, lines_of
from proxytune_kernels.cli import output
from proxytune_kernels.cli.options import (
    USAGE,
    DecoderOptions,
    TrioOptions,
    expected,
    open_decoder,
    stop,
    with_options,
)
from proxytune_kernels.cli.output import CliRequest
from proxytune_kernels.params import SAMPLING_FIELDS, SamplingParams, generation_settings
from proxytune_kernels.trio import Trio


@dataclass(frozen=True)
class SamplingOptions:
    """The options that say how tokens are drawn, and when a text ends."""

    alpha: Annotated[float, typer.Option(help="Strength of the steering; 0 is the base alone.")] = (
        1.0
    )
    pair_alphas: Annotated[
        list[float] | None,
        typer.Option(
            "--pair-alpha",
            metavar="X",
            help="Strength of the trio's second pair; repeated, of its third, ...",
            show_default="further pairs rest",
        ),
    ] = None
    alpha_schedule: Annotated[
        str,
        typer.Option(
            help="constant; decay:R: times R at each token; entropy:H: where the base's exceeds H."
        ),
    ] = "constant"
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 or -1 is off.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep this share of the mass; 1 is off.")] = 1.0
    min_p: Annotated[
        float, typer.Option(help="Keep tokens of this share of the likeliest's; 0 is off.")
    ] = 0.0
    filter_order: Annotated[
        str, typer.Option(help="Of what top-p takes its share: vllm, hf or joint.")
    ] = "vllm"
    seed: Annotated[int | None, typer.Option(help="Repeats the draws; random if not given.")] = None
    n: Annotated[int, typer.Option("--n", help="Outputs for each prompt.")] = 1
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=NUMBER", help="Added to a token's logit; may be repeated."),
    ] = None
    allowed_token_ids: Annotated[
        list[int] | None,
        typer.Option("--allowed-token-id", metavar="ID", help="Draw no others; may be repeated."),
    ] = None
    bad_words: Annotated[
        list[str] | None,
        typer.Option("--bad-word", metavar="TEXT", help="Never drawn; may be repeated."),
    ] = None
    repetition_penalty: Annotated[
        float, typer.Option(help="Of tokens in prompt and output; 1 is off.")
    ] = 1.0
    presence_penalty: Annotated[float, typer.Option(help="Of tokens in the output.")] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option(help="Of tokens in the output, each time they are.")
    ] = 0.0
    penalty_prompt: Annotated[
        bool, typer.Option(help="Whether the prompt counts for --repetition-penalty.")
    ] = True
    max_tokens: Annotated[int, typer.Option(help="Output tokens at most.")] = 128
    min_tokens: Annotated[int, typer.Option(help="Output tokens before anything may end it.")] = 0
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends the output; may be repeated.")
    ] = None
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option("--stop-token-id", metavar="ID", help="The same for a token."),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")
    ] = False
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Keep the stop string.")
    ] = False
    skip_special_tokens: Annotated[
        bool,
        typer.Option(
            "--skip-special-tokens/--show-special-tokens",
            help="Whether tokens such as the end of a turn have a text.",
        ),
    ] = True
    add_special_tokens: Annotated[
        bool, typer.Option(help="Whether a prompt begins as its tokenizer does, with BOS for most.")
    ] = True

    json_schema: Annotated[
        str | None,
        typer.Option(metavar="JSON|FILE", help="The output is JSON of this schema."),
    ] = None
    regex: Annotated[
        str | None, typer.Option(metavar="REGEX", help="This expression matches the output.")
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="The output is one of these; is repeated."),
    ] = None
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The output is of this Lark grammar.")
    ] = None
    logprobs: Annotated[
        int,
        typer.Option(help="Report this many of the likeliest tokens at each; -1 is none."),
    ] = -1
    logprobs_mode: Annotated[
        str, typer.Option(help="raw: before temperature and filters; drawn: behind them.")
    ] = "raw"
    prompt_logprobs: Annotated[
        int, typer.Option(help="The same at each position of the prompt.")
    ] = -1
    prompt_logprobs_last: Annotated[
        int, typer.Option(help="Only at so many of its last positions; 0 is all.")
    ] = 0

    steering: Annotated[
        bool, typer.Option("--steering", help="Report what steering did to each token.")
    ] = False

    def params(self, recommended: Mapping[str, Any] = MappingProxyType({})) -> SamplingParams:
        """The same as parameters; leaves with the reason where one is out of its range.

        ``recommended`` goes before them.
        """
        values = asdict(self)
        names = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "pair_alphas")
        lists = {name: values[name] or () for name in names}
        lists["logit_bias"] = dict(map(_pair, values["logit_bias"] or ()))
        grammars = {name: values.pop(name) for name in ("json_schema", "regex", "choice")}
        with expected(ValueError, TypeError, OSError, code=USAGE):
            values["grammar"] = _grammar(values["grammar"], **grammars)
            return SamplingParams(**{**values, **lists, **recommended})


def _grammar(file: Path | None, json_schema: str | None, **given: Any) -> Any:
    if json_schema is not None:
        is_json = json_schema.lstrip()[:1] in ("{", "t", "f")
        given["json_schema"] = json_schema if is_json else Path(json_schema).read_text("utf-8")
    if file is not None:
        given["lark"] = file.read_text("utf-8")
    given = {kind: value for kind, value in given.items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError("give one of --json-schema, --regex, --choice and --grammar")
    from proxytune_kernels.decoder import Grammar

    return Grammar.of(given)


def _pair(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    with suppress(ValueError):
        return int(token_id), float(value)
    raise stop(f"--logit-bias must be ID=NUMBER, got {text!r}", USAGE)


@with_options
def generate(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="Prompts, one a line, blank lines skipped; a .jsonl file has objects with "
            '"prompt" and any sampling parameters. "-" is standard input.',
        ),
    ] = None,
    jsonl: Annotated[
        bool | None,
        typer.Option("--jsonl/--lines", help="How to read FILE, or standard input as prompts."),
    ] = None,
    output_format: Annotated[
        Literal["text", "jsonl", "side-by-side"],
        typer.Option("--format", help="side-by-side: the base alone beside the proxy-tuned."),
    ] = "text",
    from_config: Annotated[
        bool,
        typer.Option(
            "--generation-config",
            help="Sample as the base's generation_config.json says, as transformers reads it; "
            "options that are given go before it.",
        ),
    ] = False,
    *,
    trio: TrioOptions,
    decoder: DecoderOptions,
    sampling: SamplingOptions,
) -> None:
    """Continue prompts from the arguments, a file, or standard input (which is one prompt).

    Example: proxytune generate --trio shipped --temperature 0 "Question: Tom has 3 pens and buys
    4 more. How many pens does Tom have now?
    Answer:"
    """
    params, settings = sampling.params(), decoder.settings()
    opened = trio.open() if from_config else None
    if opened is not None:
        with expected(ValueError):
            said = generation_settings(opened)
        given = context.get_parameter_source
        own = {k: v for k, v in said.items() if getattr(given(k), "name", None) == "DEFAULT"}
        params = sampling.params(own)
    requests = read_requests(prompts or (), file, jsonl, params)
    opened = opened or trio.open()
    # RuntimeError: also what torch raises where memory runs out.
    with expected(ValueError, TypeError, RuntimeError):
        _write(opened, requests, output_format, settings)


def _write(
    trio: Trio, requests: list[CliRequest], output_format: str, settings: dict[str, Any]
) -> None:
    if output_format == "side-by-side" and len(trio.roles) == 1:
        raise stop("--format side-by-side needs --expert and --anti", USAGE)
    tuned = open_decoder(trio, **settings)
    if output_format == "side-by-side":
        if any(r.params.n > 1 for r in requests):
            raise stop("--format side-by-side shows one output of a prompt: n must be 1", USAGE)
        alone = {**settings, "roles": ("base",), "speculation": None, "pair": None}
        base = open_decoder(trio, **alone)
        output.side_by_side(base, tuned, requests)
        return
    events = tuned.stream([r.prompt for r in requests], [r.params for r in requests])
    if output_format == "jsonl":
        output.write_jsonl(events, requests)
    else:
        output.write_text(events, requests)


def read_requests(
    prompts: Sequence[str],
    file: str | None,
    jsonl: bool | None,
    params: SamplingParams,
    completions: bool = False,
) -> list[CliRequest]:
    """Requests from the arguments, else from a file, else from standard input.

    Args:
        prompts: from the arguments.
        file: one prompt a line, blank lines skipped, or JSON lines; "-" is standard input.
        jsonl: whether lines are JSON objects with "prompt" and any sampling parameters. None is by
            the file's name (.jsonl); without a file, all of standard input is one prompt.
        params: what a line does not say.
        completions: objects may also have "completion", a given text behind the prompt, or "text"
            in place of both.
    """
    if prompts and file is not None:
        raise stop("give prompts as arguments or with --file, not both", USAGE)
    if prompts:
        return [CliRequest(prompt, params) for prompt in prompts]
    if file in (None, "-") and sys.stdin is None:
        raise stop("standard input is closed: give prompts as arguments or with --file", USAGE)
    if file is None and sys.stdin.isatty():
        raise stop("no prompt: give one as an argument, with --file, or on standard input", USAGE)
    name = "standard input" if file in (None, "-") else str(file)
    as_jsonl = name.endswith(".jsonl") if jsonl is None else jsonl
    text = _read(file, name)
    if file is None and jsonl is None:
        lines = [(1, text.removesuffix("\n"))] if text.strip() else []
    else:
        lines = lines_of(text)
    if as_jsonl:
        requests = [_from_json(f"{name}, line {i}", line, params, completions) for i, line in lines]
    else:
        requests = [CliRequest(line, params) for _, line in lines]
    if not requests:
        raise stop(f"{name} holds no prompt", USAGE)
    return requests


def _read(file: str | None, name: str) -> str:
    with expected(OSError, ValueError):
        data = sys.stdin.buffer.read() if file in (None, "-") else Path(name).read_bytes()
        return decoded(name, data)


def _from_json(where: str, line: str, params: SamplingParams, completions: bool) -> CliRequest:
    with expected(ValueError, code=USAGE):
        value = json_value(where, line)
    whole = completions and isinstance(value, dict) and "text" in value
    if not isinstance(value, dict) or ("prompt" in value) == whole:
        wanted = '"prompt", or "text" alone' if completions else '"prompt"'
        raise stop(f"{where} must be a JSON object with {wanted}, got {line:.80}", USAGE)
    prompt = value.pop("prompt", None)
    completion = value.pop("text" if whole else "completion", None) if completions else None
    if not isinstance(completion, str | None) or (whole and completion is None):
        raise stop(f"{where}: a given text must be a string, got {completion!r:.80}", USAGE)
    unknown = sorted(set(value) - set(SAMPLING_FIELDS))
    if unknown:
        known = ", ".join(SAMPLING_FIELDS)
        raise stop(f"{where} has unknown key {unknown[0]!r}; known are prompt, {known}", USAGE)
    try:
        if value.get("grammar") is not None:
            from proxytune_kernels.decoder import Grammar

            value["grammar"] = Grammar.of(value["grammar"])
        if isinstance(value.get("logit_bias"), dict):  # JSON has no other keys than strings
            value["logit_bias"] = {int(i): bias for i, bias in value["logit_bias"].items()}
        return CliRequest(prompt, replace(params, **value), completion)
    except (ValueError, TypeError) as error:
        raise stop(f"{where}: {error}", USAGE) from error
