"""``python -m benchmarks.static`` in a process of its own."""

import os
import subprocess
import sys

from benchmarks.harness.report import REPOSITORY


def static(*arguments, **variables):
    environ = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.static", *arguments],
        cwd=REPOSITORY,
        env={**environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
