"""Prompts for the decoding benchmarks: running English of any length, sums in words, and code."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.code_prompts import CODE
from proxytune_kernels import Trio
from scripts.qwen import problems
from scripts.trio_training import arithmetic

KINDS = ("text", "arithmetic", "code")
"""English cut to length; held-out problems of the expert's task; function heads to complete."""

# Darwin, On the Origin of Species (1859), introduction; public domain.
TEXT = """\
When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the \
distribution of the inhabitants of South America, and in the geological relations of the present \
to the past inhabitants of that continent. These facts seemed to me to throw some light on the \
origin of species - that mystery of mysteries, as it has been called by one of our greatest \
philosophers. On my return home, it occurred to me, in 1837, that something might perhaps be made \
out on this question by patiently accumulating and reflecting on all sorts of facts which could \
possibly have any bearing on it. After five years' work I allowed myself to speculate on the \
subject, and drew up some short notes; these I enlarged in 1844 into a sketch of the conclusions, \
which then seemed to me probable: from that period to the present day I have steadily pursued the \
same object. I hope that I may be excused for entering on these personal details, as I give them \
to show that I have not been hasty in coming to a decision. My work is now nearly finished; but \
as it will take me two or three more years to complete it, and as my health is far from strong, I \
have been urged to publish this Abstract.
"""

_STRIDE = 17  # tokens between the starts of two rows' prompts


def make_prompts(trio: Trio, batch_size: int, length: int) -> list[list[int]]:
    """Token ids [batch_size][length] of running English, another passage for each row."""
    text = trio.tokenizer.encode(TEXT, add_special_tokens=False)
    return [
        [text[(row * _STRIDE + i) % len(text)] for i in range(length)] for row in range(batch_size)
    ]


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how a text of its kind goes on where that is known."""

    text: str
    solution: str | None = None


_PROBLEMS = 400
_SHIPPED_SEED = 4242


def task_prompts(kind: str, trio_name: str) -> list[Prompt]:
    """Prompts that have a length of their own.

    Args:
        kind: ``"arithmetic"``: problems that the expert of the trio was not tuned on (shipped: of
            ``scripts/trio_training``, any other: of ``scripts/qwen``); ``"code"``: those of
            :mod:`benchmarks.code_prompts`.
        trio_name: as the benchmarks' ``--trio``.

    Raises:
        ValueError: another kind.
    """
    if kind == "code":
        return [Prompt(head) for head in CODE]
    if kind != "arithmetic":
        raise ValueError(f"kind must be arithmetic or code, got {kind!r}")
    if trio_name == "shipped":
        drawn = arithmetic.problems(_PROBLEMS, _SHIPPED_SEED, held_out=True)
        return list(dict.fromkeys(Prompt(p.prompt, p.answer) for p in drawn))
    # scripts/qwen_trio.py tunes on fewer, drawn from the same seed.
    unseen = problems.held_out(_PROBLEMS, problems.training(_PROBLEMS))
    return [Prompt(p.prompt, p.completion) for p in unseen]


def task_tokens(trio_name: str) -> int:
    """Tokens of the median solution among the arithmetic prompts, by the trio's tokenizer.

    For any other than the shipped trio it is the Qwen tokenizer's number.
    """
    return 15 if trio_name == "shipped" else 32


def task_batches(
    trio: Trio, trio_name: str, kind: str, batch_size: int, output_length: int, count: int
) -> list[list[list[int]]]:
    """At most ``count`` batches of task prompts, token ids [batch_size][length].

    The prompts of a batch have one length, as a loop without an attention mask needs. Those whose
    solution is known to be shorter than ``output_length`` are left out: what follows the end of a
    solution is no text of the kind.

    Raises:
        ValueError: there is not one such batch.
    """
    found: list[list[list[int]]] = []
    by_length: dict[int, list[list[int]]] = {}
    for prompt in task_prompts(kind, trio_name):
        if prompt.solution is not None:
            solution = trio.tokenizer.encode(prompt.solution, add_special_tokens=False)
            if len(solution) < output_length:
                continue
        token_ids = trio.tokenize(prompt.text)["base"]
        same = by_length.setdefault(len(token_ids), [])
        same.append(token_ids)
        if len(same) == batch_size:
            found.append(by_length.pop(len(token_ids)))
        if len(found) == count:
            break
    if not found:
        raise ValueError(
            f"{kind} prompts must hold {batch_size} of one length whose text goes on for "
            f"{output_length} tokens, and these don't"
        )
    return found
