"""Imports point one way (CONTRIBUTING.md, Layout); what is heavy waits until it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import proxytune_kernels

ROOT = Path(proxytune_kernels.__file__).parent
PACKAGE = ROOT.name

# The lowest first; a module may import its own layer and those below. A package's modules share
# its place.
LAYERS = (
    {"params", "rng", "heads"},
    {"reference", "kernels", "_cpu", "_cuda"},
    {"ops"},
    {"trio"},
    {"", "decoder"},
    {"analysis"},
    {"integrations", "server", "tuning"},
    {"cli", "__main__"},
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}

# What may import them at a module's top: nothing that `import proxytune_kernels` reaches.
HEAVY = set(
    "accelerate fastapi lm_eval matplotlib peft prometheus_client pydantic rich scipy "
    "starlette torchao transformers triton typer uvicorn vllm".split()
)
HEAVY_AT_TOP = {
    "cli": {"typer", "rich"},
    "kernels": {"triton"},
    "integrations": HEAVY,
    "server": HEAVY,
    "tuning": {"transformers"},
}

MODULES = sorted(ROOT.rglob("*.py"))

# The compiled extensions have names of their own kind: private to the package, not to a module.
EXTENSIONS = (f"{PACKAGE}._cpu", f"{PACKAGE}._cuda")


def stem(path: Path) -> str:
    """First part of a module's name within the package; "" for the package itself."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if part == "__init__" else part


def imported(node: ast.AST, path: Path) -> list[str]:
    """Dotted names that an import statement reaches, a module or a name in one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level:
        parts = (PACKAGE, *path.relative_to(ROOT).parent.parts)
        package = ".".join(parts[: len(parts) - node.level + 1])
        module = f"{package}.{module}".rstrip(".")
    return [f"{module}.{alias.name}" for alias in node.names]


def within_package(name: str) -> str | None:
    """The stem that a dotted name in this package belongs to; None for other packages."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    known = len(parts) > 1 and parts[1] in LAYER
    return parts[1] if known else ""


def test_the_layers_name_every_module():
    assert {stem(path) for path in MODULES} <= set(LAYER)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_points_up(path):
    own = stem(path)
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported(node, path):
            target = within_package(name)
            if target is not None:
                assert LAYER[target] <= LAYER[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_name_is_imported_across_folders(path):
    folder = ".".join((PACKAGE, *path.relative_to(ROOT).parent.parts))
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported(node, path):
            if within_package(name) is not None and name not in EXTENSIONS:
                inside, _, private = name.partition("._")
                same = inside == folder or inside.rpartition(".")[0] == folder
                assert not private or same, name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    allowed = HEAVY_AT_TOP.get(stem(path), set())
    for node in ast.parse(path.read_text()).body:
        for name in imported(node, path):
            top = name.split(".")[0]
            assert top not in HEAVY - allowed, f"line {node.lineno}: {name} at the module's top"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages} or name in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def test_import_brings_in_nothing_heavy():
    # torch brings in some of its own accord; they are not ours to save.
    code = "import sys, torch; before = set(sys.modules); import proxytune_kernels; "
    loaded = run(code + "print(*{m.split('.')[0] for m in set(sys.modules) - before})").split()
    assert PACKAGE in loaded
    assert not HEAVY & set(loaded)


def test_the_cuda_extension_waits_until_it_is_asked_for():
    code = """
import sys, torch, proxytune_kernels as ptk
ptk.sample(torch.zeros(1, 4))
print(f"{ptk.__name__}._cuda" in sys.modules)
"""
    assert run(code).strip() == "False"


def test_import_and_operators_work_with_torch_alone():
    missing = WITHOUT.format(packages={*HEAVY, "numpy", f"{PACKAGE}._cpu"})
    code = """
import torch, proxytune_kernels as ptk
logits = torch.tensor([[0.0, 5.0, 1.0]])
print(int(ptk.sample(logits, logits, logits, temperature=0).token_ids), ptk.backends()["cpu"])
"""
    token, reason = run(missing + code).strip().split(" ", 1)
    assert token == "1"
    assert "C++ extension is not built" in reason


def test_what_is_missing_is_named_when_it_is_asked_for():
    code = """
import proxytune_kernels as ptk
try:
    ptk.load_trio("shipped")
except ImportError as error:
    print(error)
"""
    assert "transformers" in run(WITHOUT.format(packages={"transformers"}) + code)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = proxytune_kernels.no_such_thing
