"""The examples of docs/transformers.md run as they stand."""

from __future__ import annotations

import pytest

from tests.documents import examples, run_example

pytestmark = pytest.mark.slow

EXAMPLES = examples("docs/transformers.md", "python")


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_documentation(code, tmp_path):
    assert run_example(tmp_path, code)


def test_there_is_an_example():
    assert "ProxyTunedForCausalLM.from_trio" in EXAMPLES[0]
