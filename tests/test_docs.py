"""The examples of README and docs/ run; commands that are only shown exist, options and all.

A page whose examples need more than a folder (a server, ranks, another environment) has its test
beside what it is about. A block that can't run has its reason in a comment before it:
``<!-- not run here: ... -->``.
"""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from typing import Any

import pytest
from typer.main import get_command

import proxytune_kernels as ptk
from proxytune_kernels.cli.app import app
from tests.cli import invoke
from tests.documents import ROOT

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
BLOCK = re.compile(
    r"^(?:<!-- not run here: (?P<reason>.+?) -->\n+)?```(?P<language>python|sh)\n(?P<code>.*?)^```",
    re.S | re.M,
)
# Page -> the test that runs its blocks.
ELSEWHERE = {
    "docs/analyze.md": "tests/analysis/test_command.py",
    "docs/engine_step.md": "tests/capi/test_engine_step.py",
    "docs/llama_cpp.md": "tests/decoder/test_llama_cpp.py",
    "docs/lm_eval.md": "tests/integrations/lm_eval/test_docs.py",
    "docs/pairs.md": "tests/decoder/test_pairs.py",
    "docs/remote.md": "tests/server/test_remote.py",
    "docs/serving.md": "tests/server/test_process.py",
    "docs/sharded.md": "tests/ops/sharded/test_docs.py",
    "docs/sweep.md": "tests/analysis/test_sweep.py",
    "docs/transformers.md": "tests/integrations/hf/test_docs.py",
    "docs/tune.md": "tests/tuning/test_tune.py",
    "docs/vllm.md": "tests/vllm/test_server.py",
}
HERE = [
    page
    for page in ("README.md", *PAGES)
    if page not in ELSEWHERE and BLOCK.search((ROOT / page).read_text())
]
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "proxytune_kernels").rglob("*.py")
    if ">>>" in path.read_text()
)


def blocks(page: str) -> list[re.Match[str]]:
    return list(BLOCK.finditer((ROOT / page).read_text()))


@pytest.fixture(scope="module")
def made():
    """What a page may take as made before."""
    trio = ptk.load_trio("shipped")
    decoder = ptk.Decoder(trio, max_batch_size=1, max_seq_len=64)
    params = ptk.SamplingParams(max_tokens=2)
    return {"ptk": ptk, "trio": trio, "decoder": decoder, "prompt": "a", "params": params}


@pytest.mark.parametrize("page", HERE)
def test_the_examples_run(page, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = dict(made)
    for block in blocks(page):
        if block["reason"]:
            continue
        if block["language"] == "python":
            exec(compile(block["code"], page, "exec"), known)
            continue
        for words in commands(block["code"]):
            result = invoke(*words)
            assert result.exit_code == 0, result.output
    if page == "README.md":
        assert "3 + 4 = 7" in capsys.readouterr().out


def commands(text: str) -> list[list[str]]:
    """The arguments of each ``proxytune`` of a shell's text."""
    words = shlex.split(text)
    starts = [i for i, word in enumerate(words) if word == "proxytune"] + [len(words)]
    assert starts[0] == 0, "another command than proxytune: give the page a test of its own"
    return [words[start + 1 : end] for start, end in pairwise(starts)]


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_a_page_with_a_test_of_its_own_is_named_there(page, test):
    assert blocks(page) and page in (ROOT / test).read_text()


# Indented lines show what may need models, a GPU or a network; a backslash goes on with the next.
SHOWN = re.compile(r"^ {4,}(?:\w+=\S+ )*((?:proxytune|python -m|make|pip install) .*)$", re.M)
LINES = [
    (page, re.sub(r"\s+# .*", "", line))
    for page in ("README.md", "CONTRIBUTING.md", *PAGES)
    for line in SHOWN.findall((ROOT / page).read_text().replace("\\\n", " "))
]


def test_commands_are_shown():
    assert len(LINES) > 80
    assert {line.split()[0] for _, line in LINES} == {"proxytune", "python", "make", "pip"}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_that_is_shown_exists(page, line):
    name, *words = line.split()
    if name == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif name == "python":
        place = ROOT / words[1].replace(".", "/")
        known = place.with_suffix(".py").exists() or (place / "__main__.py").exists()
        assert known or words[1] in ("pytest",), f"no module {words[1]}"
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for named in re.findall(r"\[([\w,]+)\]", line):
            assert set(named.split(",")) <= set(extras["optional-dependencies"])
    else:
        group: Any = get_command(app)
        command = group.commands[words[0]]
        options = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)}
        used = {word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        assert used <= options | {"--help"}


@pytest.mark.parametrize("name", MODULES)
def test_the_docstrings_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


ROW = re.compile(
    r"^\| ([\w. ]+B) \| ([\d,]+) \| ([\d,]+) \| (\d+), (\d+), (\d+) \| ([\d,]+) \| ([\d,]+) "
    r"\| (yes|no) \| ([\d.]+) \|$", re.M,
)  # fmt: skip
TRIO = re.compile(
    r"^\| ([\w. ]+B)(?:-Base)? \| [^|]+ \| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| no \|$",
    re.M,
)


def test_the_weights_of_trios_are_those_of_their_shapes():
    text = (ROOT / "docs/models.md").read_text()
    gigabytes = {}
    for name, *numbers, tied, said in ROW.findall(text):
        layers, width, heads, key_heads, size, mlp, rows = (
            int(number.replace(",", "")) for number in numbers
        )
        layer = 2 * width * size * (heads + key_heads) + 3 * width * mlp
        parameters = layers * layer + rows * width * (1 if tied == "yes" else 2)
        assert said == f"{parameters / 1e9:.2f}", name
        gigabytes[name] = 2 * parameters / 1e9
    trios = TRIO.findall(text)
    assert len(gigabytes) > 20 and len(trios) > 10
    for base, *said in trios:
        own = gigabytes[base]
        pairs = [2 * each for name, each in gigabytes.items() if name.split()[0] == base.split()[0]]
        assert said in [[f"{own:.1f}", f"{two:.1f}", f"{own + two:.1f}"] for two in pairs], base


def test_the_drawings_are_those_of_their_script():
    path = ROOT / "docs/drawings/draw.py"
    spec = spec_from_file_location("draw", path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, draw in module.DRAWINGS.items():
        assert path.with_name(f"{name}.svg").read_text("utf-8") == str(draw()), name
