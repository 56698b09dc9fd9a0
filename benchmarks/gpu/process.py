"""Programs run beside or before the measurements, each with a limit."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

from benchmarks.environment import REPOSITORY


def run_process(
    command: Sequence[str], limit_seconds: float, extra: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a program in the repository.

    Args:
        command: program and arguments.
        limit_seconds: after which it is killed, with all that it started.
        extra: variables added to the environment.

    Returns:
        Its exit code, None where it was killed, and all it said on both streams.
    """
    # TRITON_INTERPRET=1 would run the kernels on the processor.
    environ = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environ, **(extra or {})},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read().decode(errors="replace")


def tail(output: str, lines: int = 15) -> str:
    """The last lines of what a program said."""
    return "\n".join(output.strip().splitlines()[-lines:])
