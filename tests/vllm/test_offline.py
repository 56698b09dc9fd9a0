"""What the export and its alternative give, opened in this process as the documentation says."""

from __future__ import annotations

import json
import runpy

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import proxytune_kernels as ptk
from proxytune_kernels.integrations.vllm_plugin.export import export, serve_command
from tests.documents import examples
from tests.vllm.conftest import close, kernels_registered
from tests.vllm.trios import generate, greedy

PROMPT = "Question: Ann has 2 pens and buys 5 more. How many pens does Ann have now?\nAnswer:"
ALPHAS = (0.0, 0.5, 1.0)


def test_the_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    [code] = [block for block in examples("docs/vllm.md", "python") if "import LLM" in block]
    script = tmp_path / "offline.py"
    script.write_text(code)
    monkeypatch.chdir(tmp_path)
    with kernels_registered():
        close(runpy.run_path(str(script), run_name="__main__")["llm"])
    assert "1.0  3 + 4 = 7" in capsys.readouterr().out


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    decoder = ptk.Decoder(ptk.load_trio("shipped", dtype="float32"))
    prompts = [PROMPT] * len(ALPHAS)
    return [output.token_ids for output in decoder.generate(prompts, greedy(ALPHAS, 16))]


def test_overrides_steer_a_base_where_it_lies(make_llm, expected):
    command = serve_command("shipped", alpha=0.5)
    options = dict(zip(command[3::2], command[4::2], strict=True))
    llm = make_llm(
        command[2],
        tokenizer=options["--tokenizer"],
        hf_overrides=json.loads(options["--hf-overrides"]),
    )
    asked, wanted = [*ALPHAS, None], [*expected, expected[ALPHAS.index(0.5)]]
    assert generate(llm, [PROMPT] * len(asked), asked, 16) == wanted


def test_a_directory_of_copies_opens_wherever_it_is(make_llm, expected, tmp_path, monkeypatch):
    export(tmp_path / "here", "shipped", copy=True)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    # Named by a relative path, as on a command line.
    assert generate(make_llm("there"), [PROMPT] * len(ALPHAS), ALPHAS, 16) == expected
