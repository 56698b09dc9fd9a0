"""``proxytune analyze``: what steering did to each token of texts, generated or given."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from proxytune_kernels.analysis.tokens import Analysed, Given, generated, scored
from proxytune_kernels.cli.analysis_view import View
from proxytune_kernels.cli.generate import read_requests
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
from proxytune_kernels.cli.output import CliRequest
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio


@dataclass(frozen=True)
class AnalysisOptions:
    """The options that say how texts are made; a .jsonl file may say more for each prompt."""

    alpha: Annotated[float, typer.Option(help="Strength of the steering.")] = 1.0
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Keep this share of the mass; 1 is off.")] = 1.0
    seed: Annotated[int | None, typer.Option(help="Repeats the draws; random if not given.")] = None
    n: Annotated[int, typer.Option("--n", help="Outputs for each prompt.")] = 1
    max_tokens: Annotated[int, typer.Option(help="Output tokens at most.")] = 128
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends the output; may be repeated.")
    ] = None

    def params(self) -> SamplingParams:
        """The same as parameters; leaves with the reason where one is out of its range."""
        with expected(ValueError, TypeError, code=USAGE):
            return SamplingParams(**{**asdict(self), "stop": self.stop or ()})


@with_options
def analyze(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="Prompts, one a line, blank lines skipped; a .jsonl file has objects with "
            '"prompt" and any sampling parameters, and "completion" where the text is given, or '
            '"text" where it has no prompt. "-" is standard input.',
        ),
    ] = None,
    given: Annotated[
        bool,
        typer.Option(
            "--given", help="The prompts are whole texts: score their tokens, generate nothing."
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page: figures and texts.")
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a text with its tokens a line."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Texts to show in the terminal.")] = 5,
    plain: Annotated[bool, typer.Option("--plain", help="No colours; as NO_COLOR=1.")] = False,
    *,
    trio: TrioOptions,
    decoder: DecoderOptions,
    analysis: AnalysisOptions,
) -> None:
    """Say what steering did: per token, and summed up with intervals over the prompts.

    Example: proxytune analyze --trio shipped --html page.html "Question: Tom has 3 pens and buys
    4 more. How many pens does Tom have now?
    Answer:"
    """
    if missing := [name for name in ("jinja2", "numpy", "scipy") if find_spec(name) is None]:
        install = "pip install 'proxytune_kernels[analysis]'"
        raise stop(f"analysis needs {', '.join(missing)}: {install}", FAILED)
    settings = decoder.settings()
    requests = read_requests(prompts or (), file, None, analysis.params(), completions=True)
    if given:
        requests = [_as_given(i, request) for i, request in enumerate(requests)]
    view = View(plain)
    with ExitStack() as files:
        with expected(OSError):  # before the work, not behind it
            page, lines = (
                None if path is None else files.enter_context(path.open("w", encoding="utf-8"))
                for path in (html, jsonl)
            )
        opened = trio.open()
        texts: list[Analysed] = []
        # RuntimeError: also what torch raises where memory runs out.
        with expected(ValueError, TypeError, RuntimeError):
            for text in _analysed(opened, requests, settings):
                if lines is not None:
                    write_line(lines, text)
                if len(texts) < show:
                    view.text(text)
                texts.append(text)
        texts.sort(key=lambda text: (text.index, text.sample))
        from proxytune_kernels.analysis.page import render  # seconds
        from proxytune_kernels.analysis.summaries import summarise

        summary = summarise(texts)
        view.summary(summary, left_out=max(0, len(texts) - show))
        if page is not None:
            page.write(render(texts, summary, Path(trio.trio or trio.base or "").name))


def _as_given(index: int, request: CliRequest) -> CliRequest:
    if request.completion is not None:
        return request
    if not isinstance(request.prompt, str):
        raise stop(f"--given: prompts[{index}] must be a text, got {request.prompt!r:.80}", USAGE)
    return replace(request, prompt=None, completion=request.prompt)


def _analysed(
    trio: Trio, requests: Sequence[CliRequest], settings: dict[str, Any]
) -> Iterator[Analysed]:
    """The texts that are generated, then those that are given, by their places among all."""
    new = [i for i, request in enumerate(requests) if request.completion is None]
    old = [i for i, request in enumerate(requests) if request.completion is not None]
    if new:
        decoder = open_decoder(trio, **settings)
        asked = [requests[i] for i in new]
        for text in generated(decoder, [r.prompt for r in asked], [r.params for r in asked]):
            yield replace(text, index=new[text.index])
    if old:
        texts = [Given(requests[i].prompt, requests[i].completion or "") for i in old]
        for text in scored(
            trio,
            texts,
            [requests[i].params.alphas[0] for i in old],
            batch_size=settings["max_batch_size"],
            backend=settings["backend"],
        ):
            yield replace(text, index=old[text.index])


def write_line(lines: TextIO, analysed: Analysed) -> None:
    """One text as a JSON object on a line; what its models did not say is null."""
    from proxytune_kernels.analysis.summaries import Kinds

    kinds = Kinds.of(analysed)
    tokens = []
    for token, part, side in zip(analysed.tokens, kinds.parts, kinds.sides, strict=True):
        said = token._asdict()
        steering = said.pop("steering")._asdict()
        for name, value in steering.items():
            said[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        tokens.append({**said, "part": part, "side": side})
    record = {
        "index": analysed.index,
        "sample": analysed.sample,
        "prompt": analysed.prompt,
        "text": analysed.text,
        "alpha": analysed.alpha,
        "finish_reason": analysed.finish_reason,
        "tokens": tokens,
    }
    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
