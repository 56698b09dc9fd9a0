"""The trios that benchmarks decode with, by name, and the prompts that they are given."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from benchmarks.harness.report import REPOSITORY
from proxytune_kernels import Trio, load_trio
from proxytune_kernels.trio.adapters import beside
from scripts.qwen import gguf_files, problems
from scripts.trio_training import arithmetic

PROMPTS = ("text", "arithmetic", "code")
"""English cut to length; held-out problems of the expert's task; function heads to complete."""

_TEXTS = Path(__file__).parent / "texts"
ENGLISH = (_TEXTS / "darwin.txt").read_text()
"""Darwin, On the Origin of Species (1859), introduction; public domain."""
CODE = tuple(f"{head.rstrip()}\n" for head in (_TEXTS / "code.txt").read_text().split("\n\n\n"))
"""Heads of Python functions: a signature, a docstring, an example. Written for these benchmarks,
in the manner of HumanEval (Chen et al. 2021, arXiv 2107.03374)."""

SHIPPED = REPOSITORY / "proxytune_kernels" / "data" / "trio"
_QWEN = Path("trios") / "qwen"
_ADAPTER = "expert-lora"
"""Where scripts/qwen_trio.py leaves the expert's adapter, beside the merged expert."""
_STRIDE = 17  # tokens between the starts of two rows' prompts
_PROBLEMS = 400
_SHIPPED_SEED = 4242


class TrioMissing(ValueError):
    """The trio asked for is not there; says which command makes it."""


def find_trio(name: str) -> str:
    """What ``load_trio`` opens for ``shipped``, ``qwen`` or a directory."""
    places = {
        "shipped": [SHIPPED],
        "qwen": [_QWEN, REPOSITORY / _QWEN],
    }.get(name, [Path(name)])
    for directory in places:
        if (directory / "trio.json").is_file():
            return name if name == "shipped" else str(directory)
    reasons = {
        "shipped": "no shipped trio: make it with python scripts/train_trio.py",
        "qwen": f"no trio in {_QWEN}: make it with python scripts/qwen_trio.py",
    }
    wrong = f"trio must be shipped, qwen or a directory with a trio.json, got {name!r}"
    raise TrioMissing(reasons.get(name, wrong))


def quiet_loading() -> None:
    """Keep off the terminal what loading models says."""
    disable_progress_bar()  # it would tear up ours
    # transformers imports torchao, which notes the kernels that this build of torch lacks.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def open_trio(name: str, dtype: str | None, **others: Any) -> Trio:
    """Load a trio; without a dtype the shipped one in fp32, others in their checkpoints' dtype.

    ``others`` are of :func:`load_trio`.
    """
    quiet_loading()
    if dtype is None:
        dtype = "float32" if name == "shipped" else "auto"
    return load_trio(find_trio(name), dtype=dtype, **others)


def dtypes(trio: Trio) -> dict[str, str]:
    """Role -> dtype of its weights, for results."""
    return {role: info["dtype"] for role, info in trio.info()["roles"].items()}


def dtype_label(trio: Trio) -> str:
    """The dtypes of a trio's weights, for titles."""
    return "/".join(dict.fromkeys(dtypes(trio).values()))


class AdapterMissing(TrioMissing):
    """The trio's expert has no adapter that could stay apart from the anti-expert's weights."""


class TrioForms:
    """A trio, as :func:`open_trio` has it, and the same in other forms, made when asked for."""

    def __init__(self, trio: Trio, directory: str | Path) -> None:
        self.trio, self.directory = trio, directory
        self._quantized: dict[str, Trio] = {}

    @classmethod
    def open(cls, name: str, dtype: str | None) -> TrioForms:
        """Of a trio by name."""
        return cls(open_trio(name, dtype), find_trio(name))

    def quantized(self, quantization: str) -> Trio:
        """All three members quantised."""
        if quantization not in self._quantized:
            self._quantized[quantization] = load_trio(self.directory, quantize=quantization)
        return self._quantized[quantization]

    @cached_property
    def gguf(self) -> Trio:
        """The GGUF files beside it, run by llama.cpp."""
        directory = Path(self.directory) / gguf_files.DIRECTORY
        if not (directory / "trio.json").is_file():
            raise TrioMissing(f"there is no {directory} (python scripts/qwen_trio.py gguf)")
        return load_trio(directory)

    @cached_property
    def unmerged(self) -> Trio:
        """The expert is the anti-expert's tensors and the adapter.

        Its weights are the merged expert's but for rounding to their dtype after the merge.
        """
        trio, adapter = self.trio, Path(self.directory) / _ADAPTER
        if not (adapter / "adapter_config.json").is_file():
            raise AdapterMissing(
                f"the expert has no adapter beside it ({adapter.name}/adapter_config.json)"
            )
        expert = beside("expert", trio.anti, adapter)
        return Trio.from_models(trio.base, expert, trio.anti, trio.tokenizers, prompts=trio.prompts)


def make_prompts(trio: Trio, batch_size: int, length: int) -> list[list[int]]:
    """Token ids [batch_size][length] of running English, another passage for each row."""
    text = trio.tokenizer.encode(ENGLISH, add_special_tokens=False)
    return [
        [text[(row * _STRIDE + i) % len(text)] for i in range(length)] for row in range(batch_size)
    ]


def task_prompts(kind: str, trio_name: str, seed: int = 0) -> list[tuple[str, str | None]]:
    """Prompts that have a length of their own, each with how it goes on where that is known.

    ``"arithmetic"`` is problems that the expert of the trio was not tuned on (shipped: of
    ``scripts/trio_training``, any other: of ``scripts/qwen``), others for each seed; ``"code"`` is
    :data:`CODE`.
    """
    if kind == "code":
        return [(head, None) for head in CODE]
    if kind != "arithmetic":
        raise ValueError(f"kind must be arithmetic or code, got {kind!r}")
    if trio_name == "shipped":
        drawn = arithmetic.problems(_PROBLEMS, _SHIPPED_SEED + seed, held_out=True)
        return list(dict.fromkeys((p.prompt, p.answer) for p in drawn))
    # scripts/qwen_trio.py tunes on fewer, drawn from the same seed.
    trained_on = problems.training(_PROBLEMS)
    unseen = problems.held_out(_PROBLEMS, trained_on, problems.HELD_OUT_SEED + seed)
    return [(p.prompt, p.completion) for p in unseen]


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
    """
    found: list[list[list[int]]] = []
    by_length: dict[int, list[list[int]]] = {}
    for text, solution in task_prompts(kind, trio_name):
        solved = solution and trio.tokenizer.encode(solution, add_special_tokens=False)
        if solved and len(solved) < output_length:
            continue
        token_ids = trio.tokenize(text)["base"]
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
