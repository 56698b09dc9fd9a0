"""Install the pinned torch, without CUDA packages where there is no CUDA device.

    python scripts/install_torch.py

Where the package index's torch comes with CUDA (gigabytes) and the machine has no NVIDIA driver,
PyTorch's own CPU build of the same version is installed instead. Standard library only: it runs
in a new environment.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_CUDA_PACKAGE = re.compile(r"nvidia-|cuda-|triton$")

_PIP = (sys.executable, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS))


def pinned(name: str) -> str:
    """The version that constraints.txt pins."""
    match = re.search(rf"^{name}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"{CONSTRAINTS} must pin {name}")
    return match[1]


def cuda_packages(requirement: str) -> list[str]:
    """What pip would install for CUDA along with a requirement; downloads metadata only."""
    report = subprocess.run(
        [*_PIP, "--dry-run", "--ignore-installed", "--report", "-", requirement],
        check=True,
        stdout=subprocess.PIPE,
    )
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    return [name for name in names if _CUDA_PACKAGE.match(name)]


def arguments() -> list[str]:
    """What to tell ``pip install``."""
    version = pinned("torch")
    if shutil.which("nvidia-smi") is None and cuda_packages(f"torch=={version}"):
        return ["--extra-index-url", CPU_INDEX, f"torch=={version}+cpu"]
    return [f"torch=={version}"]


if __name__ == "__main__":
    try:
        subprocess.run([*_PIP, *arguments()], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # pip has said why
