"""The trios that benchmarks decode with, by name."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from benchmarks.environment import REPOSITORY
from proxytune_kernels import Trio, load_trio
from proxytune_kernels.trio.adapters import beside

_QWEN = Path("trios") / "qwen"
_ADAPTER = "expert-lora"
"""Where scripts/qwen_trio.py leaves the expert's adapter, beside the merged expert."""


class TrioMissing(ValueError):
    """The trio asked for is not there; says which command makes it."""


def find_trio(name: str) -> str:
    """What ``load_trio`` opens for ``shipped``, ``qwen`` or a directory.

    Raises:
        TrioMissing: it is not there.
    """
    if name == "shipped":
        shipped = REPOSITORY / "proxytune_kernels" / "data" / "trio" / "trio.json"
        if not shipped.is_file():
            raise TrioMissing("no shipped trio: make it with python scripts/train_trio.py")
        return "shipped"
    if name == "qwen":
        for directory in (_QWEN, REPOSITORY / _QWEN):
            if (directory / "trio.json").is_file():
                return str(directory)
        raise TrioMissing(f"no trio in {_QWEN}: make it with python scripts/qwen_trio.py")
    if not (Path(name) / "trio.json").is_file():
        raise TrioMissing(
            f"trio must be shipped, qwen or a directory with a trio.json, got {name!r}"
        )
    return name


def quiet_loading() -> None:
    """Keep off the terminal what loading models says."""
    disable_progress_bar()  # it would tear up ours
    # transformers imports torchao, which notes the kernels that this build of torch lacks.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def open_trio(name: str, dtype: str | None) -> Trio:
    """Load a trio; without a dtype the shipped one in fp32, others in their checkpoints' dtype."""
    quiet_loading()
    if dtype is None:
        dtype = "float32" if name == "shipped" else "auto"
    return load_trio(find_trio(name), dtype=dtype)


class AdapterMissing(ValueError):
    """The trio's expert has no adapter that could stay apart from the anti-expert's weights."""


class TrioForms:
    """A trio as it is loaded, and with the expert's adapter apart from the weights.

    Args:
        trio: its expert has weights of its own.
        adapter: directory of a LoRA adapter (PEFT) that makes the anti-expert the expert.
    """

    def __init__(self, trio: Trio, adapter: Path) -> None:
        self.trio = trio
        self._adapter = adapter

    @classmethod
    def open(cls, name: str, dtype: str | None) -> TrioForms:
        """As :func:`open_trio`."""
        return cls(open_trio(name, dtype), Path(find_trio(name)) / _ADAPTER)

    @cached_property
    def unmerged(self) -> Trio:
        """The same base and anti-expert; the expert is the anti-expert's tensors and the adapter.

        Its weights are the merged expert's but for rounding: the merged ones were rounded to their
        dtype after the adapter was added.

        Raises:
            AdapterMissing: there is no adapter.
        """
        if not (self._adapter / "adapter_config.json").is_file():
            raise AdapterMissing(
                f"the expert has no adapter beside it ({self._adapter.name}/adapter_config.json)"
            )
        expert = beside("expert", self.trio.anti, self._adapter)
        tokenizers, prompts = self.trio.tokenizers, self.trio.prompts
        return Trio.from_models(self.trio.base, expert, self.trio.anti, tokenizers, prompts=prompts)
