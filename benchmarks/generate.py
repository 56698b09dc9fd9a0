"""A trio through ``model.generate()``: tokens/s beside the loop one writes and beside the decoder.

``python -m benchmarks.generate --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import torch
import typer
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.harness import agreement, decoding, options, report, trios
from benchmarks.harness.decoding import GREEDY, Case, Generation, Prompts, Provider, Sampling
from benchmarks.harness.measure import in_turns, speed_over, summary, timed
from benchmarks.harness.samplers import ALPHA
from proxytune_kernels import Trio

COMPARED = ("naive", "decoder")

Record = dict[str, Any]


class _Nothing(LogitsProcessor):
    """Changes no score. The decoder does not know it, so transformers' own loop and warpers run."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


class GenerateProvider:
    """``generate()`` of the trio as one transformers model, with further arguments of it."""

    set_up_seconds = 0.0

    def __init__(self, name: str, trio: Trio, model: Any, sampling: Sampling, **given: Any) -> None:
        self.name, self.trio, self.roles = name, trio, trio.roles
        self.sampling, self._model, self._given = sampling, model, given
        self.path: Record = {}
        """How the last call ran, by the model's own account."""

    def generate(self, prompts: Prompts, max_tokens: int, *, greedy: bool = False) -> Generation:
        """See :class:`Provider`; all tokens come at the end."""
        input_ids = torch.tensor(prompts)
        given = {"attention_mask": torch.ones_like(input_ids), **self._given}
        if not greedy and self.sampling.temperature:
            given |= {"do_sample": True, "top_k": 0, **asdict(self.sampling)}
        start = time.perf_counter()
        # Without an end of the text there are exactly so many tokens.
        output = self._model.generate(
            input_ids, max_new_tokens=max_tokens, eos_token_id=None, **given
        )
        rows = output[:, input_ids.shape[1] :].tolist()
        seconds = time.perf_counter() - start
        self.path = dict(self._model.notes)
        return Generation(rows, [[seconds] * max_tokens] * len(rows))


def make_providers(trio: Trio, sampling: Sampling, rows: int, length: int) -> list[Provider]:
    """The naive loop, two ways through ``generate()``, and the decoder."""
    # Once the trio is open: what it brings in makes notes, which trios.open_trio quiets.
    from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM

    model = ProxyTunedForCausalLM.from_trio(trio, ALPHA)
    own_loop = {"logits_processor": LogitsProcessorList([_Nothing()])}
    return [
        decoding.NaiveLoop(trio, sampling=sampling),
        GenerateProvider("generate-warpers", trio, model, sampling, **own_loop),
        GenerateProvider("generate", trio, model, sampling),
        decoding.DecoderProvider(
            "decoder", trio, sampling, max_batch_size=rows, max_seq_len=length
        ),
    ]


def time_case(trio: Trio, providers: list[Provider], case: Case, repeats: int) -> list[Record]:
    """Warm every provider up, then time all of them in turn; ratios are paired by repeat."""
    assert case.prompt_length is not None
    prompts = trios.make_prompts(trio, case.batch_size, case.prompt_length)

    def run(provider: Provider, repeat: int) -> float:
        torch.manual_seed(repeat)
        return timed(lambda: provider.generate(prompts, case.output_length))[1]

    with report.progress_bar(len(providers) * (repeats + 1)) as tick:
        calls = {p.name: partial(run, p) for p in providers}
        seconds = in_turns(calls, repeats, lambda name: tick(f"{case}: {name}"), warm_up=True)
    tokens = case.batch_size * case.output_length
    return [
        {
            "provider": p.name,
            **asdict(case),
            "repeats": repeats,
            "tokens_per_second": summary(tokens / s for s in seconds[p.name]),
            "speed_over": speed_over(p.name, seconds, COMPARED),
            "path": getattr(p, "path", {}),
        }
        for p in providers
    ]


COLUMNS: tuple[report.Column, ...] = (
    ("provider", "provider", str),
    ("tok\n/s", "tokens_per_second/median", report.significant),
    *((f"x\n{o}", f"speed_over/{o}/median", report.fixed) for o in COMPARED),
)
CAPTION = "x: tokens/s over those of naive and of the decoder, paired by repeat. Medians."


def main(
    trio: options.TrioName = "shipped",
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4",
    lengths: Annotated[str, typer.Option(help="Comma-separated prompt:output pairs.")] = "8:128",
    greedy: Annotated[bool, typer.Option(help="Temperature 0, no top_p.")] = False,
    repeats: options.Repeats = 15,
    threads: options.Threads = None,
    dtype: options.Dtype = None,
    output: options.Output = None,
) -> None:
    """Time generate() of a trio as one transformers model, side by side with what it replaces."""
    options.set_threads(threads)
    cases = decoding.parse_cases(batch_sizes, lengths)
    sampling = GREEDY if greedy else Sampling()
    with options.user_errors():
        opened = trios.open_trio(trio, dtype)
    rows = max(agreement.CHECKED_ROWS, *(case.batch_size for case in cases))
    needed = [(case.prompt_length or 0) + case.output_length for case in cases]
    providers = make_providers(opened, sampling, rows, max(agreement.CHECKED_LENGTH, *needed))
    agreement.check_greedy(providers)
    records = [r for case in cases for r in time_case(opened, providers, case, repeats)]
    name = options.trio_label(trio)
    sampled = {"alpha": ALPHA, **asdict(sampling)}
    shared = {"trio": name, "dtype": trios.dtypes(opened), "sampling": sampled}
    names = [name, "greedy"] if greedy else [name]
    report.write_results(output, "generate", shared, records, *names)
    title = f"generate() of a trio, {name}, {trios.dtype_label(opened)}, {sampling}"
    report.print_records(title, CAPTION, records, COLUMNS, lambda r: f"B={r['batch_size']}")


if __name__ == "__main__":
    typer.run(main)
