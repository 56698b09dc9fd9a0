"""What decodes a trio: the loop a researcher writes, our decoder, and the bare forwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.trios import TrioForms
from proxytune_kernels import Decoder, SamplingParams, Speculation, Trio

ALPHA, TEMPERATURE, TOP_P = 1.0, 0.7, 0.9
"""Parameters of the timed runs, unless told."""

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sampling:
    """How the timed runs draw; temperature 0 is greedy."""

    temperature: float = TEMPERATURE
    top_p: float = TOP_P


GREEDY = Sampling(0.0, 1.0)


@dataclass(frozen=True)
class Generation:
    """A batch's output tokens, and when its caller had each.

    Args:
        token_ids: of each row.
        seconds: from the call, of each row and token; tokens that came together have the same.
        counts: of the steps behind the prompts, by the names that :meth:`Decoder.statistics` has;
            empty where nobody counted.
    """

    token_ids: list[list[int]]
    seconds: list[list[float]]
    counts: Mapping[str, int] = field(default_factory=dict)


class Provider(Protocol):
    """Decodes prompts of one length to exactly ``max_tokens`` tokens each.

    ``trio`` is what it decodes, ``set_up_seconds`` what it took to make, compilation included.
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
    models are on the base's device.

    Args:
        trio: the models.
        roles: those to run; the base alone is not steered.
        sampling: temperature and top_p.
    """

    name = "naive"
    set_up_seconds = 0.0

    def __init__(
        self, trio: Trio, roles: Sequence[str] | None = None, sampling: Sampling | None = None
    ) -> None:
        self.trio = trio
        self.sampling = sampling or Sampling()
        self.roles = trio.roles if roles is None else tuple(roles)
        self.models = {role: trio.models[role] for role in self.roles}
        self.device = next(trio.base.parameters()).device
        self.vocab_size = trio.vocab_size
        self.warpers = LogitsProcessorList()
        # As transformers' generate does: no warper for what is off.
        if self.sampling.temperature not in (0.0, 1.0):
            self.warpers.append(TemperatureLogitsWarper(self.sampling.temperature))
        if self.sampling.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(self.sampling.top_p))

    @torch.inference_mode()
    def generate(self, prompts: Prompts, max_tokens: int, *, greedy: bool = False) -> Generation:
        """See :class:`Provider`."""
        greedy = greedy or self.sampling.temperature == 0.0
        start = time.perf_counter()
        seconds: list[float] = []
        input_ids = torch.tensor(prompts, device=self.device)
        caches = {role: DynamicCache(config=m.config) for role, m in self.models.items()}
        new_ids = input_ids
        for _ in range(max_tokens):
            logits = {
                role: model(input_ids=new_ids, past_key_values=caches[role], use_cache=True)
                .logits[:, -1, : self.vocab_size]
                .float()
                for role, model in self.models.items()
            }
            scores = combined(logits)
            if greedy:
                new_ids = scores.argmax(-1, keepdim=True)
            else:
                warped: Any = self.warpers(cast(torch.LongTensor, input_ids), cast(Any, scores))
                probabilities = torch.softmax(warped, dim=-1)
                new_ids = torch.multinomial(probabilities, num_samples=1)
            input_ids = torch.cat([input_ids, new_ids], dim=-1)
            # A loop that streams or looks for the end of the text reads its tokens every step.
            new_ids.tolist()
            seconds.append(time.perf_counter() - start)
        output = input_ids[:, -max_tokens:].tolist()
        steps, rows = max_tokens - 1, len(output)
        counts = dict.fromkeys(_COUNTS, 0) | {
            "base_forwards": steps,
            "emitted": steps * rows,
            "useful_slot_steps": steps * rows,
        }
        return Generation(output, [seconds] * rows, counts)


_COUNTS = ("base_forwards", "emitted", "useful_slot_steps", "drafted", "accepted")


def combined(logits: Mapping[str, Tensor]) -> Tensor:
    """Combined logits as the paper's code writes them; the base's where it is alone."""
    if "expert" not in logits:
        return logits["base"]
    return logits["base"] + ALPHA * (logits["expert"] - logits["anti"])


class DecoderProvider:
    """Our decoder, timed at its stream: a token counts when the caller has it.

    Args:
        name: as in the results.
        trio: the models.
        sampling: temperature and top_p.
        options: of :class:`proxytune_kernels.Decoder`.
    """

    def __init__(
        self, name: str, trio: Trio, sampling: Sampling | None = None, **options: Any
    ) -> None:
        self.name = name
        self.trio = trio
        self.sampling = sampling or Sampling()
        start = time.perf_counter()
        self.decoder = Decoder(trio, **options)
        self.decoder.warm_up()
        self.set_up_seconds = time.perf_counter() - start
        self.roles = self.decoder.roles

    def generate(self, prompts: Prompts, max_tokens: int, *, greedy: bool = False) -> Generation:
        """See :class:`Provider`."""
        sampling = GREEDY if greedy else self.sampling
        before = self.decoder.statistics()
        params = [
            SamplingParams(
                alpha=ALPHA,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=row,
                max_tokens=max_tokens,
                ignore_eos=True,
            )
            for row in range(len(prompts))
        ]
        token_ids: list[list[int]] = [[] for _ in prompts]
        seconds: list[list[float]] = [[] for _ in prompts]
        start = time.perf_counter()
        for event in self.decoder.stream([list(prompt) for prompt in prompts], params):
            token_ids[event.index].extend(event.token_ids)
            seconds[event.index].extend([time.perf_counter() - start] * len(event.token_ids))
        after = self.decoder.statistics()
        return Generation(token_ids, seconds, {key: after[key] - before[key] for key in _COUNTS})


@torch.inference_mode()
def bare_forwards(
    models: Mapping[str, Any], prompts: Prompts, steps: int
) -> dict[str, list[float]]:
    """Seconds of each of ``steps`` one-token forwards, role by role, each role's run alone.

    The floor of a step: ``model(one token, past_key_values=DynamicCache, use_cache=True)`` on a
    cache that holds the prompt, growing by one each step as in decoding. Prefill is not timed.
    """
    input_ids = torch.tensor(prompts)
    one = input_ids[:, -1:]
    seconds: dict[str, list[float]] = {}
    for role, model in models.items():
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        seconds[role] = []
        for _ in range(steps):
            start = time.perf_counter()
            model(input_ids=one, past_key_values=cache, use_cache=True)
            seconds[role].append(time.perf_counter() - start)
    return seconds


Factory = Callable[[TrioForms, int, int, Sampling], Provider]
"""Makes a provider from a trio, max_batch_size, max_seq_len and how to draw."""


def _naive(forms: TrioForms, max_batch_size: int, max_seq_len: int, sampling: Sampling) -> Provider:
    return NaiveLoop(forms.trio, sampling=sampling)


def _decoder(name: str, *, unmerged: bool = False, **options: Any) -> tuple[str, Factory]:
    """A provider's name, and what makes it: a decoder with these options.

    ``unmerged`` takes the expert as the anti-expert and an adapter: the maker raises
    AdapterMissing where there is none.
    """

    def make(
        forms: TrioForms, max_batch_size: int, max_seq_len: int, sampling: Sampling
    ) -> Provider:
        return DecoderProvider(
            name,
            forms.unmerged if unmerged else forms.trio,
            sampling,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            **options,
        )

    return name, make


PROVIDERS: dict[str, Factory] = dict(
    [
        ("naive", _naive),
        _decoder("base-only", roles=("base",)),
        _decoder("ours"),
        _decoder("ours-shared-pair", unmerged=True, pair="shared"),
        _decoder("ours-batched-pair", pair="batched"),
        _decoder("ours-speculative", speculation=Speculation()),
        _decoder(
            "ours-shared-speculative", unmerged=True, pair="shared", speculation=Speculation()
        ),
        _decoder("ours-lookup", speculation=Speculation(drafter="prompt_lookup")),
        _decoder("ours-compiled", compile=True),
        _decoder("base-only-packed", roles=("base",), pack_weights=True),
        _decoder("ours-packed", pack_weights=True),
        _decoder("ours-packed-speculative", pack_weights=True, speculation=Speculation()),
    ]
)
"""Providers by name, in the order of tables and plots; ``naive`` is what ratios are taken to."""
