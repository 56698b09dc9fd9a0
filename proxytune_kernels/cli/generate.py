"""``proxytune generate``: continue prompts."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from proxytune_kernels.cli import decoding, models, output
from proxytune_kernels.cli.errors import USAGE, expected, stop
from proxytune_kernels.cli.requests import CliRequest, read_requests
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio

MAX_TOKENS = 128


class Format(StrEnum):
    """What is written to standard output."""

    TEXT = "text"
    JSONL = "jsonl"
    SIDE_BY_SIDE = "side-by-side"


def generate(
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
        Format,
        typer.Option("--format", help="side-by-side: the base alone beside the proxy-tuned."),
    ] = Format.TEXT,
    trio: models.Source = None,
    base: models.Base = None,
    expert: models.Expert = None,
    anti: models.Anti = None,
    tokenizer: models.TokenizerName = None,
    dtype: models.Dtype = "auto",
    device: models.Device = None,
    device_map: models.DeviceMap = None,
    quantize: models.Quantize = None,
    keep_adapter: models.KeepAdapter = False,
    trust_remote_code: models.TrustRemoteCode = False,
    max_batch_size: Annotated[int, typer.Option(help="Prompts decoded at the same time.")] = 16,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output together.")
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the models first (torch.compile).")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="Of the sampling op; see `proxytune info`.")
    ] = None,
    speculate: decoding.SpeculateOption = None,
    max_drafts: decoding.MaxDrafts = 16,
    pair: decoding.PairOption = None,
    pack_weights: decoding.PackWeights = False,
    prefill_chunk: decoding.PrefillChunk = 512,
    alpha: Annotated[
        float, typer.Option(help="Strength of the steering; 0 is the base alone.")
    ] = 1.0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 or -1 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this share of the mass; 1 is off.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens of this share of the likeliest's; 0 is off.")
    ] = 0.0,
    filter_order: Annotated[
        str, typer.Option(help="Of what top-p takes its share: vllm, hf or joint.")
    ] = "vllm",
    seed: Annotated[
        int | None, typer.Option(help="Repeats the draws; random if not given.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Output tokens at most.")] = MAX_TOKENS,
    min_tokens: Annotated[int, typer.Option(help="Output tokens before anything may end it.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends the output; may be repeated.")
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option("--stop-token-id", metavar="ID", help="The same for a token."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")
    ] = False,
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Keep the stop string.")
    ] = False,
) -> None:
    """Continue prompts from the arguments, a file, or standard input (which is one prompt).

    Example: proxytune generate --trio shipped --temperature 0 "Question: Tom has 3 pens and buys
    4 more. How many pens does Tom have now?
    Answer:"
    """
    with expected(ValueError, code=USAGE):
        params = SamplingParams(
            alpha=alpha,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            filter_order=filter_order,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop or (),
            stop_token_ids=stop_token_ids or (),
            ignore_eos=ignore_eos,
            include_stop_str_in_output=include_stop_str_in_output,
        )
    speculation = decoding.speculation(speculate, max_drafts)
    requests = read_requests(prompts or (), file, jsonl, params)
    opened = models.open_trio(
        trio,
        base=base,
        expert=expert,
        anti=anti,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        device_map=device_map,
        quantize=quantize,
        keep_adapter=keep_adapter,
        trust_remote_code=trust_remote_code,
    )
    settings = {
        "max_seq_len": max_seq_len,
        "compile": compile_,
        "backend": backend,
        "speculation": speculation,
        "pair": None if pair is None else pair.value,
        "pack_weights": pack_weights,
        "prefill_chunk": prefill_chunk,
    }
    # RuntimeError: also what torch raises where memory runs out.
    with expected(ValueError, TypeError, RuntimeError):
        _write(opened, requests, output_format, max_batch_size, settings)


def _write(
    trio: Trio,
    requests: list[CliRequest],
    output_format: Format,
    max_batch_size: int,
    settings: dict[str, Any],
) -> None:
    if output_format is Format.SIDE_BY_SIDE and len(trio.roles) == 1:
        raise stop("--format side-by-side needs --expert and --anti", USAGE)
    tuned = models.open_decoder(trio, max_batch_size, **settings)
    if output_format is Format.SIDE_BY_SIDE:
        alone = {**settings, "roles": ("base",), "speculation": None, "pair": None}
        base = models.open_decoder(trio, max_batch_size, **alone)
        output.side_by_side(base, tuned, requests)
        return
    events = tuned.stream([r.prompt for r in requests], [r.params for r in requests])
    if output_format is Format.JSONL:
        output.write_jsonl(events)
    else:
        output.write_text(events, requests)
