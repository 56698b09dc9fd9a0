"""Triton's launcher hands over every parameter as the machine gets it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="for machines whose processes have not loaded a libcuda"
)


@pytest.mark.slow
def test_every_parameter_of_every_launch():
    command = [sys.executable, "-m", "tests.ptx.launcher"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = re.fullmatch(r"(\d+) launches\n", done.stdout)
    assert launches is not None and int(launches[1]) == 72
