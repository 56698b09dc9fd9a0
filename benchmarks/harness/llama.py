"""llama.cpp beside ours: the base alone, from a GGUF file, through the server in its wheel."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from benchmarks.harness.decoding import GREEDY, Generation, Prompts, Sampling
from benchmarks.harness.trios import TrioMissing
from proxytune_kernels import Trio
from proxytune_kernels.trio import libllama
from proxytune_kernels.trio.llama_cpp import RUNTIME
from scripts.qwen.download import LARGE

NAME, FILE = RUNTIME, LARGE.name


class LlamaProvider:
    """llama.cpp's server in this process: a slot for each row, as many threads as torch has.

    Args:
        trio: the tokens of its prompts are those of the file's vocabulary.
        directory: of the trio; the file is what scripts/qwen_trio.py made its base of.
        sampling: of the timed runs.
        rows, length: room for as many requests of as many tokens.
    """

    name = NAME
    roles: tuple[str, ...] = ("base",)

    def __init__(
        self, trio: Trio, directory: str | Path, sampling: Sampling, rows: int, length: int
    ) -> None:
        self.trio, self.sampling = trio, sampling
        path = Path(directory) / ".cache" / FILE
        if not path.is_file():
            raise TrioMissing(f"there is no {path} (python scripts/qwen_trio.py leaves it there)")
        try:
            xllamacpp: Any = import_module(libllama.WHEEL)
        except ImportError:
            raise TrioMissing(f"it is not installed (pip install '{libllama.EXTRA}')") from None
        given = xllamacpp.CommonParams()
        given.model.path = str(path)
        given.n_parallel, given.n_ctx = rows, rows * (length + 8)
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = torch.get_num_threads()
        given.verbosity, given.fit_params = -1, False
        # Each prompt runs anew, as it does in the others.
        given.cache_prompt, given.cache_ram_mib = False, 0
        start = time.perf_counter()
        self._server = xllamacpp.Server(given)
        self.set_up_seconds = time.perf_counter() - start

    def generate(self, prompts: Prompts, max_tokens: int, *, greedy: bool = False) -> Generation:
        """See :class:`~benchmarks.harness.decoding.Provider`; it gives text, and no token ids."""
        seconds: list[list[float]] = [[] for _ in prompts]
        start = time.perf_counter()

        def run(row: int) -> None:
            def take(chunk: dict[str, Any]) -> None:
                # A token that ends within a character has no text: it comes with the next.
                given = chunk.get("usage", {}).get("completion_tokens", len(seconds[row]) + 1)
                seconds[row] += [time.perf_counter() - start] * (given - len(seconds[row]))

            asked = asdict(GREEDY if greedy else self.sampling)
            asked |= {"prompt": list(prompts[row]), "max_tokens": max_tokens, "seed": row}
            # Its own defaults would filter by top_k and min_p, too.
            asked |= {"top_k": 0, "min_p": 0.0, "ignore_eos": True, "stream": True}
            self._server.handle_completions(asked, take)

        threads = [Thread(target=run, args=(row,)) for row in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if any(len(row) != max_tokens for row in seconds):
            raise RuntimeError(f"llama.cpp gave {[*map(len, seconds)]} tokens, not {max_tokens}")
        return Generation([[] for _ in prompts], seconds)
