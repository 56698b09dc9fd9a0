"""What the export and its alternative give, opened in this process as the documentation says."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import proxytune_kernels as ptk
from proxytune_kernels.integrations.vllm_plugin.export import export, serve_command
from tests.documents import examples
from tests.vllm.conftest import close, kernels_registered

PROMPT = "Question: Ann has 2 pens and buys 5 more. How many pens does Ann have now?\nAnswer:"
ALPHAS = (0.0, 0.5, 1.0)


def test_the_example_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = [block for block in examples("docs/vllm.md", "python") if "import LLM" in block]
    script = tmp_path / "offline.py"
    script.write_text(code)
    monkeypatch.chdir(tmp_path)
    with kernels_registered():
        close(runpy.run_path(str(script), run_name="__main__")["llm"])
    assert "1.0  3 + 4 = 7" in capsys.readouterr().out


def ask(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args={"alpha": alpha})
        for alpha in ALPHAS
    ]
    outputs = llm.generate([PROMPT] * len(ALPHAS), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    decoder = ptk.Decoder(ptk.load_trio("shipped", dtype="float32"))
    params = [
        ptk.SamplingParams(alpha=alpha, temperature=0, max_tokens=16, ignore_eos=True)
        for alpha in ALPHAS
    ]
    return [output.token_ids for output in decoder.generate([PROMPT] * len(ALPHAS), params)]


def test_overrides_steer_a_base_where_it_lies(
    make_llm: Callable[..., Any], expected: list[list[int]]
) -> None:
    from vllm import SamplingParams

    command = serve_command("shipped", alpha=0.5)
    options = dict(zip(command[3::2], command[4::2], strict=True))
    llm = make_llm(
        command[2],
        tokenizer=options["--tokenizer"],
        hf_overrides=json.loads(options["--hf-overrides"]),
    )
    assert ask(llm) == expected
    [plain] = llm.generate(
        [PROMPT], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False
    )
    assert list(plain.outputs[0].token_ids) == expected[ALPHAS.index(0.5)]


def test_a_directory_of_copies_opens_wherever_it_is(
    make_llm: Callable[..., Any],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export(tmp_path / "here", "shipped", copy=True)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    # Named by a relative path, as on a command line.
    assert ask(make_llm("there")) == expected
