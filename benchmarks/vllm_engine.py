"""A vLLM engine in a process of its own, which decodes on request; and what its steps took.

Several can be open at a time, so that what is compared alternates. One that is not asked waits on a
pipe and takes no time of the others.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Read as vLLM is imported. The engine runs in the process that times it; nothing is compiled.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
_STOP_SECONDS = 30
_LOG_CHARACTERS = 4000


@dataclass(frozen=True)
class Load:
    """Requests that start together and run for the same number of steps.

    Args:
        prompts: token ids of each, of one length.
        output_length: tokens of each, at least 2.
        temperature: 0 is greedy.
        alphas: of each, or None where the engine is not a trio.
    """

    prompts: Sequence[Sequence[int]]
    output_length: int
    temperature: float = 0.0
    alphas: Sequence[float] | None = None


@dataclass(frozen=True)
class Run:
    """What came out, and what each step took: wall seconds, and seconds of the process's CPU time.

    The first step runs the prompts.
    """

    token_ids: list[list[int]]
    seconds: list[float]
    cpu_seconds: list[float]


class Engine:
    """A directory opened by vLLM.

    Args:
        directory: a checkpoint, or an exported trio.
        threads: of OpenMP.
        log: file for what the process says.
        settings: what ``vllm.LLM`` takes.

    Raises:
        RuntimeError: from :meth:`wait` and :meth:`decode`, what failed in the process.
    """

    def __init__(self, directory: Path, threads: int, log: Path, **settings: Any) -> None:
        # Before the process starts: it imports torch, and with it OpenMP, before anything of ours.
        os.environ.update(_ENVIRONMENT, OMP_NUM_THREADS=str(threads))
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._log = log
        arguments = (str(directory), settings, there, log)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        there.close()

    def wait(self) -> None:
        """Wait until it is open."""
        self._receive()

    def decode(self, load: Load) -> Run:
        """Run requests to their end."""
        self._pipe.send(load)
        run: Run = self._receive()
        return run

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_STOP_SECONDS)
        self._process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            answer = RuntimeError(f"the process ended: {self._process.exitcode}")
        if isinstance(answer, Exception):
            said = self._log.read_text(errors="replace")[-_LOG_CHARACTERS:]
            raise RuntimeError(f"vLLM: {answer}\n{said}") from answer
        return answer


def _serve(directory: str, settings: dict[str, Any], pipe: Connection, log: Path) -> None:
    # What libraries say would tear up the progress bar; it is shown where something fails.
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    try:
        from vllm import LLM

        llm = LLM(directory, enforce_eager=True, **settings)
        pipe.send(None)
        while True:
            pipe.send(_decode(llm.llm_engine, pipe.recv()))
    except EOFError:
        pass  # closed
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _decode(engine: Any, load: Load) -> Run:
    from vllm import SamplingParams

    for row, prompt in enumerate(load.prompts):
        params = SamplingParams(
            temperature=load.temperature,
            seed=row,
            max_tokens=load.output_length,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if load.alphas is None else {"alpha": load.alphas[row]},
        )
        engine.add_request(str(row), {"prompt_token_ids": list(prompt)}, params)
    finished: dict[int, list[int]] = {}
    seconds, cpu_seconds = [], []
    while engine.has_unfinished_requests():
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = engine.step()
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
        for output in outputs:
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
    return Run([finished[row] for row in sorted(finished)], seconds, cpu_seconds)
