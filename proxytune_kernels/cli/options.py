"""The options that several commands share, each stated once, and how a user's mistake is said."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, Literal, get_type_hints

import typer

from proxytune_kernels.decoder import Decoder, Speculation
from proxytune_kernels.trio import RemoteBase, Trio, load_trio
from proxytune_kernels.trio.checkpoints import device_unusable
from proxytune_kernels.trio.roles import ROLES

FAILED = 1
USAGE = 2

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NAMED = "Directory or hub name of the {}."


def stop(message: object, code: int) -> typer.Exit:
    """Say what is wrong on one line of standard error; returns what to raise."""
    typer.echo(f"Error: {printable(' '.join(str(message).split()))}", err=True)
    return typer.Exit(code)


def printable(text: str) -> str:
    """Text whose control characters, but for tab and newline, are written as their codes.

    A terminal obeys them: text from a model or a file must not move its cursor or set its title.
    """
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


@contextmanager
def expected(*kinds: type[Exception], code: int = FAILED) -> Iterator[None]:
    """Leave with one sentence and ``code``, not a traceback, on an error of these kinds."""
    try:
        yield
    except typer.Exit:  # a RuntimeError, and already said
        raise
    except kinds as error:
        raise stop(error, code) from error


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: each of its parameters that is a dataclass of options becomes these."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        options = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            annotation = options[field.name]
            default = field.default
            parameters.append(
                Parameter(field.name, parameter.kind, default=default, annotation=annotation)
            )

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            own = {field.name: values.pop(field.name) for field in fields(group)}
            values[name] = group(**own)
        command(**values)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@dataclass(frozen=True)
class UntunedOptions:
    """The options that name the models of a trio that are not tuned."""

    trio: Annotated[
        str | None,
        typer.Option(
            metavar="shipped|DIR",
            help="The small trio that comes with the package, or a directory with a trio.json.",
        ),
    ] = None
    base: Annotated[str | None, typer.Option(metavar="MODEL", help=_NAMED.format("base"))] = None
    anti: Annotated[
        str | None, typer.Option(metavar="MODEL", help=_NAMED.format("anti-expert"))
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="One for all three; else each has its own.")
    ] = None


@dataclass(frozen=True)
class ModelOptions(UntunedOptions):
    """The options that name the models of a trio."""

    expert: Annotated[str | None, typer.Option(metavar="MODEL", help=_NAMED.format("expert"))] = (
        None
    )


@dataclass(frozen=True)
class TrioOptions(ModelOptions):
    """The options that name the models of a trio and say how they are opened."""

    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--further-pair",
            metavar="EXPERT,ANTI",
            help="Directories or hub names of a further pair, which steers as --pair-alpha says; "
            "may be repeated.",
        ),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16 or float64.")
    ] = "auto"
    device: Annotated[
        str | None,
        typer.Option(help="Where the models run, such as cuda:0; the CPU if not given."),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="[ROLE=]MAP,...",
            help="Spread the layers over devices: auto, balanced or sequential; one for all roles, "
            "or such as base=auto.",
        ),
    ] = None
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="[ROLE=]int8|int4,...",
            help="Weights of the linear layers; one for all roles, or such as "
            "base=int8,expert=int4.",
        ),
    ] = None
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="[ROLE=]RUNTIME,...",
            help="What runs the models: transformers, or llama.cpp, for paths of GGUF files; one "
            "for all roles, or such as base=llama.cpp.",
            show_default="transformers",
        ),
    ] = None
    keep_adapter: Annotated[
        bool,
        typer.Option(
            "--keep-adapter",
            help="An expert that is a LoRA adapter stays beside the anti-expert's weights, not "
            "merged.",
        ),
    ] = False
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run modelling code that a checkpoint brings."),
    ] = False
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A base behind an API, such as http://127.0.0.1:8000/v1, in the place of --base; "
            "its key is read from PROXYTUNE_BASE_KEY.",
        ),
    ] = None
    base_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the base there.", show_default="its only one"),
    ] = None
    base_top_n: Annotated[
        int, typer.Option(help="Likeliest tokens to ask for at each place; -1 is all.")
    ] = 20
    base_tail: Annotated[
        Literal["drop", "anti", "uniform"] | None,
        typer.Option(
            help="Where the mass of the others goes.", show_default="anti; without one drop"
        ),
    ] = None

    def open(self) -> Trio:
        """Open the trio; leaves with the reason where it does not open."""
        if self.trio is None and self.base is None and self.base_url is None:
            raise stop(
                "no models: give --trio shipped, --trio DIR, or --base (and the pair)", USAGE
            )
        if self.base is not None and self.base_url is not None:
            raise stop("give --base or --base-url, not both", USAGE)
        arguments = asdict(self)
        remote = {k: arguments.pop(f"base_{k}") for k in ("url", "model", "top_n", "tail")}
        if self.base_url is not None:
            with expected(ValueError, code=USAGE):
                arguments["base"] = RemoteBase(**remote)
        arguments["pairs"] = [_two(text) for text in self.pairs] if self.pairs else None
        source, keep_adapter = arguments.pop("trio"), arguments.pop("keep_adapter")
        arguments["device_map"] = _by_role("--device-map", self.device_map)
        arguments["quantize"] = _by_role("--quantize", self.quantize)
        arguments["runtime"] = _by_role("--runtime", self.runtime)
        arguments["merge_adapter"] = False if keep_adapter else None  # None: what trio.json says
        quiet()
        reason = None if self.device is None else device_unusable(self.device)
        if reason is not None:
            wanted = "device must be one that torch can use here"
            raise stop(f"{wanted}, got {self.device!r}: {reason}", FAILED)
        with expected(ValueError, OSError, RuntimeError):
            return load_trio(source, **arguments)


@dataclass(frozen=True)
class DecoderOptions:
    """The options that say how a trio is decoded."""

    max_batch_size: Annotated[int, typer.Option(help="Prompts decoded at the same time.")] = 16
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output together.")
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(help="Compile the models (torch.compile).", show_default="on CUDA only"),
    ] = None
    backend: Annotated[
        str | None, typer.Option(help="Of the sampling op; see `proxytune info`.")
    ] = None
    speculate: Annotated[
        Literal["expert", "prompt-lookup"] | None,
        typer.Option(
            help="Draft tokens and verify them, where that is faster; seeded tokens stay the same."
        ),
    ] = None
    max_drafts: Annotated[
        int, typer.Option(help="With --speculate: drafts of a round at most.")
    ] = 16
    pair: Annotated[
        Literal["shared", "batched", "separate"] | None,
        typer.Option(
            help="How expert and anti-expert run.", show_default="what is known to be fastest"
        ),
    ] = None
    pack_weights: Annotated[
        bool,
        typer.Option(
            "--pack-weights", help="On a CPU: bf16 weights once more, in a faster layout."
        ),
    ] = False
    prefill_chunk: Annotated[
        int, typer.Option(help="Prompt tokens run between two steps of the others, at most.")
    ] = 512

    def settings(self) -> dict[str, Any]:
        """Arguments of :func:`open_decoder`; leaves with the reason where they make no sense."""
        settings = asdict(self)
        drafter, max_drafts = settings.pop("speculate"), settings.pop("max_drafts")
        settings["speculation"] = None
        if drafter is not None:
            with expected(ValueError, code=USAGE):
                name = drafter.replace("-", "_")
                settings["speculation"] = Speculation(drafter=name, max_drafts=max_drafts)
        return settings


def open_decoder(trio: Trio, max_batch_size: int, **settings: Any) -> Decoder:
    """Set up a decoder; leaves with the reason where the settings can't run."""
    with expected(ValueError, code=USAGE), expected(RuntimeError):
        decoder = Decoder(trio, max_batch_size, **settings)
        if settings.get("compile"):
            decoder.warm_up()
        return decoder


def strengths(given: Any) -> list[float]:
    """Strengths of ``--alpha 0 --alpha 0.5:0.25:1``, each once, in that order; 1 if none."""
    parts = given if isinstance(given, list) else [1.0 if given is None else given]
    alphas: dict[float, None] = {}
    for part in parts:
        try:
            alphas |= dict.fromkeys(_range(*map(float, str(part).split(":"))))
        except (TypeError, ValueError, OverflowError) as error:
            raise stop(
                f"--alpha must be a finite number or FIRST:STEP:LAST with a step that leads from "
                f"first to last, got {part!r}",
                USAGE,
            ) from error
    return list(alphas)


def _range(first: float, step: float | None = None, last: float | None = None) -> list[float]:
    """``first``, or from first to last, both in it; ValueError where that leads nowhere."""
    if step is None or last is None:
        if step is not None or not math.isfinite(first):
            raise ValueError
        return [first]
    # Half a billionth of a step: the last one counts however its quotient is rounded.
    steps = math.floor((last - first) / step + 5e-10) if step else -1
    if steps < 0:
        raise ValueError
    return [round(first + i * step, 10) for i in range(steps + 1)]


def quiet() -> None:
    """Keep transformers' progress bars, one for each small file, off the terminal.

    And torchao's notes, as transformers imports it, of the kernels that this build of torch lacks.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        install = "pip install 'proxytune_kernels[hf]'"
        raise stop(f"models need transformers ({error}): {install}", FAILED) from error
    disable_progress_bar()


def _two(text: str) -> tuple[str, str]:
    expert, _, anti = map(str.strip, text.partition(","))
    if not expert or not anti or "," in anti:
        raise stop(f"--further-pair must be EXPERT,ANTI, got {text!r}", USAGE)
    return expert, anti


def _by_role(option: str, text: str | None) -> str | dict[str, str] | None:
    """One value for all roles, or role -> value from ``ROLE=VALUE,...``."""
    if text is None or ("=" not in text and "," not in text):
        return text
    values: dict[str, str] = {}
    for part in text.split(","):
        role, equals, value = part.strip().partition("=")
        if not equals or role not in ROLES or not value or role in values:
            raise stop(
                f"{option} must be one value, or ROLE=VALUE for roles among {', '.join(ROLES)}, "
                f"each once, got {text!r}",
                USAGE,
            )
        values[role] = value
    return values
