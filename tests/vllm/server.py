"""vLLM's OpenAI server as a process of its own, on a free port of the loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

START_SECONDS = 400  # 35 to 50 on two idle cores
STOP_SECONDS = 30
_LOG_CHARACTERS = 8000


class Server:
    """A server that is ready to answer.

    Args:
        model: directory to serve.
        log: file for what it says.
        options: of the command line.

    Raises:
        RuntimeError: it ended or was not ready in time; with the end of its log.
    """

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.model, self.log = str(model), log
        self.port = _free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        # `vllm serve` is this module; the CPU build's own `vllm` looks for a package called vllm.
        module = "vllm.entrypoints.openai.api_server"
        command = [sys.executable, "-m", module, "--model", self.model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *options]
        with log.open("w") as file:
            # A session of its own: its engine is another process, and ends with it.
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=_environment(), start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def read(self, path: str) -> str:
        """What a GET answers."""
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return str(answer.read().decode())

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-_LOG_CHARACTERS:]

    def stop(self) -> None:
        """End it, and whatever it started."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # it left nobody
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.process.returncode}\n{self.tail()}")
            try:
                self.read("/health")
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
            else:
                return
        raise RuntimeError(f"the server was not ready in {START_SECONDS} s\n{self.tail()}")


def _environment() -> dict[str, str]:
    # The engine is a process of its own, as in production, unlike in the other tests.
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
