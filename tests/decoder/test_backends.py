"""Each operator of a decoder has the backend that can run it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from proxytune_kernels.decoder import Decoder, Speculation
from proxytune_kernels.params import SamplingParams

# The package has a function of that name, too.
backends: Any = importlib.import_module("proxytune_kernels.ops.backends")
PARAMS = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)


def lacks(monkeypatch: pytest.MonkeyPatch, name: str, op: str, rejection: bool = False) -> None:
    """Let a backend have no kernel for an operator, or, with ``rejection``, in that mode alone."""
    backend = backends.BY_NAME[name]
    if rejection:
        narrow: Any = {"max_vocab_size": lambda self, index, rejection: 100 if rejection else None}
    else:
        narrow = {"operators": [o for o in backend.operators if o != op]}
    monkeypatch.setitem(backends.BY_NAME, name, type("Lacking", (type(backend),), narrow)())
    monkeypatch.setattr(backends, "_CPU_RUNS", False)


@pytest.mark.skipif(backends.backends()["cpu"] is not None, reason="the extension is not built")
@pytest.mark.parametrize("lacking", ["verify", "rejection"])
def test_each_operator_resolves_for_itself(near, monkeypatch, lacking):
    """As CUDA C++ has no kernel for wide rows in rejection mode: verify runs elsewhere."""
    mode = "rejection" if lacking == "rejection" else "coupled"
    drafts = Speculation(max_drafts=2, adaptive=False, mode=mode)
    wanted = Decoder(near, 2, speculation=drafts).generate("hello", PARAMS)
    lacks(monkeypatch, "cpu", "verify", rejection=lacking == "rejection")
    with pytest.warns(RuntimeWarning, match="runs its slow reference backend"):
        decoder = Decoder(near, 2, speculation=drafts)
    assert decoder.info()["backend"] == "cpu"
    assert decoder.info()["verify_backend"] == "reference"
    assert decoder.generate("hello", PARAMS)[0].token_ids == wanted[0].token_ids
    # Asked for by name it is refused as the decoder is made, not in its first round.
    with pytest.raises(RuntimeError, match="verify: backend 'cpu' can't run"):
        Decoder(near, 2, speculation=drafts, backend="cpu")
    plain = Decoder(near, 2, backend="cpu")
    assert plain.info()["verify_backend"] is None
    assert plain.generate("hello", PARAMS)[0].token_ids
