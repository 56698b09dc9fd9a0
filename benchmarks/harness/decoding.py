"""What decodes a trio: the loop that a researcher writes, and our decoder, behind one protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

import torch
import typer
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.harness.options import parse_integers
from benchmarks.harness.samplers import ALPHA, TEMPERATURE, TOP_P
from proxytune_kernels import Decoder, SamplingParams, Trio

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sampling:
    """How the timed runs draw; temperature 0 is greedy."""

    temperature: float = TEMPERATURE
    top_p: float = TOP_P

    def __str__(self) -> str:
        if self.temperature == 0.0:
            return "greedy"
        top_p = "" if self.top_p == 1.0 else f", top_p {self.top_p:g}"
        return f"temperature {self.temperature:g}{top_p}"


GREEDY = Sampling(0.0, 1.0)


@dataclass(frozen=True)
class Case:
    """One shape of the work: rows, and tokens of prompt and output of each.

    ``prompt_length`` is None where prompts have lengths of their own.
    """

    batch_size: int
    prompt_length: int | None
    output_length: int

    def __str__(self) -> str:
        prompt = "own" if self.prompt_length is None else self.prompt_length
        return f"B={self.batch_size} ({prompt}, {self.output_length})"


def parse_cases(batch_sizes: str, lengths: str, prompts: str = "text") -> tuple[Case, ...]:
    """Cases of ``1,4`` and ``8:512,512:8``.

    Text is cut to any length. Other prompts are as long as they are: ``own:32``.
    """
    sizes = parse_integers("--batch-sizes", batch_sizes, 1)
    wanted = "prompt:output" if prompts == "text" else "own:output"
    pairs = []
    for pair in lengths.split(","):
        prompt, colon, output = pair.partition(":")
        if not colon or ":" in output or (prompt == "own") != (prompts != "text"):
            raise typer.BadParameter(
                f"--lengths must be {wanted} pairs with {prompts} prompts, got {pair!r}"
            )
        prompt_length = None if prompt == "own" else parse_integers("--lengths", prompt, 1)[0]
        [output_length] = parse_integers("--lengths", output, 2)  # one step to time
        pairs.append((prompt_length, output_length))
    return tuple(Case(size, *pair) for pair in pairs for size in sizes)


@dataclass(frozen=True)
class Generation:
    """A batch's output tokens, and seconds from the call until its caller had each.

    ``counts`` are of the steps behind the prompts, by the names of :meth:`Decoder.statistics`.
    """

    token_ids: list[list[int]]
    seconds: list[list[float]]
    counts: Mapping[str, int] = field(default_factory=dict)


class Provider(Protocol):
    """Decodes prompts of one length to exactly ``max_tokens`` tokens each.

    ``set_up_seconds`` is what it took to make, compilation included.
    """

    name: str
    trio: Trio
    roles: tuple[str, ...]
    set_up_seconds: float

    def generate(self, prompts: Prompts, max_tokens: int, *, greedy: bool = False) -> Generation:
        """Greedy, or as the provider was told to sample."""


class NaiveLoop:
    """Proxy-tuning as one writes it with transformers: three forwards in turn, then the warpers.

    Everything that could slow it without changing its tokens is left out: there is no attention
    mask (the prompts have one length), no stopping, no detokenising, and inference mode is on. All
    models are on the base's device. The base alone, by ``roles``, is not steered.
    """

    name = "naive"
    set_up_seconds = 0.0

    def __init__(
        self, trio: Trio, roles: Sequence[str] | None = None, sampling: Sampling | None = None
    ) -> None:
        self.trio, self.sampling = trio, sampling or Sampling()
        self.roles = trio.roles if roles is None else tuple(roles)
        self.models = {role: trio.models[role] for role in self.roles}
        self.device = next(trio.base.parameters()).device
        self.warpers = LogitsProcessorList()
        # As transformers' generate does: no warper for what is off.
        if self.sampling.temperature not in (0.0, 1.0):
            self.warpers.append(TemperatureLogitsWarper(self.sampling.temperature))
        if self.sampling.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(self.sampling.top_p))

    def caches(self) -> dict[str, DynamicCache]:
        """An empty cache for each role."""
        return {role: DynamicCache(config=model.config) for role, model in self.models.items()}

    @torch.inference_mode()
    def logits(self, new_ids: Tensor, caches: Mapping[str, DynamicCache]) -> dict[str, Tensor]:
        """Each role's logits behind the new tokens [B, n], fp32 [B, V]."""
        return {
            role: model(input_ids=new_ids, past_key_values=caches[role], use_cache=True)
            .logits[:, -1, : self.trio.vocab_size]
            .float()
            for role, model in self.models.items()
        }

    @torch.inference_mode()
    def generate(self, prompts: Prompts, max_tokens: int, *, greedy: bool = False) -> Generation:
        """See :class:`Provider`."""
        greedy = greedy or self.sampling.temperature == 0.0
        start = time.perf_counter()
        seconds: list[float] = []
        new_ids = input_ids = torch.tensor(prompts, device=self.device)
        caches = self.caches()
        for _ in range(max_tokens):
            scores = combined(self.logits(new_ids, caches))
            if greedy:
                new_ids = scores.argmax(-1, keepdim=True)
            else:
                warped: Any = self.warpers(cast(torch.LongTensor, input_ids), cast(Any, scores))
                new_ids = torch.multinomial(torch.softmax(warped, dim=-1), num_samples=1)
            input_ids = torch.cat([input_ids, new_ids], dim=-1)
            # A loop that streams or looks for the end of the text reads its tokens every step.
            new_ids.tolist()
            seconds.append(time.perf_counter() - start)
        output = input_ids[:, -max_tokens:].tolist()
        steps, given = max_tokens - 1, (max_tokens - 1) * len(output)
        counts = {"base_forwards": steps, "emitted": given, "useful_slot_steps": given}
        return Generation(output, [seconds] * len(output), counts)


def combined(logits: Mapping[str, Tensor]) -> Tensor:
    """Combined logits as the paper's code writes them; the base's where it is alone."""
    if "expert" not in logits:
        return logits["base"]
    return logits["base"] + ALPHA * (logits["expert"] - logits["anti"])


def decode(decoder: Decoder, prompts: Prompts, params: Sequence[SamplingParams]) -> Generation:
    """Decode to the end, timed at the decoder's stream: a token counts when the caller has it."""
    token_ids: list[list[int]] = [[] for _ in prompts]
    seconds: list[list[float]] = [[] for _ in prompts]
    before, start = decoder.statistics(), time.perf_counter()
    for event in decoder.stream([list(prompt) for prompt in prompts], list(params)):
        token_ids[event.index].extend(event.token_ids)
        seconds[event.index].extend([time.perf_counter() - start] * len(event.token_ids))
    after = decoder.statistics()
    return Generation(token_ids, seconds, {key: after[key] - before[key] for key in after})


class DecoderProvider:
    """Our decoder."""

    def __init__(
        self, name: str, trio: Trio, sampling: Sampling | None = None, **options: Any
    ) -> None:
        self.name, self.trio, self.sampling = name, trio, sampling or Sampling()
        self._options = options
        self.set_up()
        self.roles = self.decoder.roles

    def set_up(self) -> None:
        """Make the decoder; anew, where what it saw so far is not to tell how much it drafts."""
        start = time.perf_counter()
        self.decoder = Decoder(self.trio, **self._options)
        self.decoder.warm_up()
        self.set_up_seconds = time.perf_counter() - start

    def generate(self, prompts: Prompts, max_tokens: int, *, greedy: bool = False) -> Generation:
        """See :class:`Provider`; row i has seed i."""
        drawn = asdict(GREEDY if greedy else self.sampling)
        own = {"alpha": ALPHA, "max_tokens": max_tokens, "ignore_eos": True, **drawn}
        params = [SamplingParams(seed=row, **own) for row in range(len(prompts))]
        return decode(self.decoder, prompts, params)
