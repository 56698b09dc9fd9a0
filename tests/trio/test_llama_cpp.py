"""GGUF files that llama.cpp runs: what is refused, and whose logits they give."""

from __future__ import annotations

import gc
import math
import shutil
import subprocess
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxytune_kernels.trio import libllama, load_trio
from proxytune_kernels.trio.files import LoadError, Place
from proxytune_kernels.trio.libllama import Library, find_library
from proxytune_kernels.trio.llama_cpp import LlamaContext, LlamaModel
from proxytune_kernels.trio.vocabulary import VocabularyError
from tests.trio.checkpoints import make_tokenizer

PROMPT = [72, 104, 111, 40, 114, 35, 122, 103, 9]


def rounding(logits: torch.Tensor, layers: int) -> float:
    """What a difference of logits may be where products round activations to int8.

    A block of 32 is rounded to 1/127 of its largest value, which of normal values is about 2.4
    times their root mean square: by 2.4 / 127 / sqrt(12) = 0.55% of it. Seven products a layer and
    the head add up like a random walk; five standard deviations are seldom reached in a row of 260.
    """
    return 5 * 0.0055 * math.sqrt(7 * layers + 1) * float(logits.square().mean().sqrt())


def open_model(gguf_trio, role="base"):
    path = gguf_trio.files[role]
    return LlamaModel(role, Place(path.name, path.parent), path.name)


@pytest.fixture(scope="module")
def model(gguf_trio):
    return open_model(gguf_trio)


@torch.no_grad()
def expected(gguf_trio, token_ids, role="base"):
    return gguf_trio.models[role](torch.tensor([token_ids])).logits[0]


def test_a_files_logits_are_those_of_the_model_it_stands_for(gguf_trio):
    trio = gguf_trio.load()
    for role, model in gguf_trio.models.items():
        wanted = expected(gguf_trio, PROMPT, role)
        [logits] = trio.models[role](torch.tensor([PROMPT])).logits
        bound = rounding(wanted, model.config.num_hidden_layers)
        assert 0 < float((logits - wanted).abs().max()) <= bound < 0.5 * float(wanted.std())
    assert (trio.vocab_size, trio.eos_token_ids) == (260, (2,))
    assert trio.tokenize("xab")["anti"] == [*make_tokenizer().encode("x"), 259]
    info = trio.info()["roles"]["base"]
    assert info["parameters"] == sum(p.numel() for p in gguf_trio.models["base"].parameters())
    assert (info["logits"], info["device"]) == (260, "llama.cpp")


def test_a_context_holds_sequences_of_their_own(gguf_trio, model):
    context = LlamaContext(model, 3, 64)
    bound = rounding(expected(gguf_trio, PROMPT), 2)

    def check(logits, *texts):
        wanted = torch.stack([expected(gguf_trio, text)[-1] for text in texts])
        assert float((logits - wanted).abs().max()) <= bound

    first, second, third = PROMPT, PROMPT[3:6], PROMPT[2:4]
    check(context.run([(0, 0, first), (2, 0, second)], every=False), first, second)
    rows = [(0, 9, [17]), (1, 0, third), (2, 3, [18])]
    check(context.run(rows, every=False), [*first, 17], third, [*second, 18])
    # Rolled back, and behind it other tokens.
    check(context.run([(0, 4, [99])], every=False), [*first[:4], 99])
    context.copy(2, 1, 2)
    check(context.run([(1, 2, [50]), (2, 4, [51])], every=False), [*second[:2], 50],
          [*second, 18, 51])  # fmt: skip
    every = context.run([(0, 0, first)], every=True)
    assert float((every - expected(gguf_trio, first)).abs().max()) <= bound
    with pytest.raises(RuntimeError, match="sequence 1 of 3 tokens can't have 5 of them"):
        context.run([(1, 5, [1])], every=False)
    context.clear()
    check(context.run([(1, 0, third)], every=False), third)


def test_texts_longer_than_a_call_run_in_parts(gguf_trio, model, monkeypatch):
    context = LlamaContext(model, 1, 64)
    whole = context.run([(0, 0, PROMPT * 4)], every=True).clone()
    for size in ("_batch_size", "_outputs"):
        with monkeypatch.context() as patch:
            patch.setattr(context, size, 5)
            parts = context.run([(0, 0, PROMPT * 4)], every=True)
        assert float((parts - whole).abs().max()) <= rounding(whole, 2)
    last = context.run([(0, 0, PROMPT * 4)], every=False)
    assert last.shape == (1, 260)
    assert float((last - whole[-1:]).abs().max()) <= rounding(whole, 2)


def test_logits_are_the_librarys_memory(model):
    context = LlamaContext(model, 2, 64)
    logits = context.run([(0, 0, PROMPT), (1, 0, PROMPT[:2])], every=False)
    assert logits.data_ptr() == model.library.get_logits(context._pointer)
    assert logits.is_contiguous() and logits.dtype == torch.float32
    context.run([(0, 9, [5]), (1, 2, [6])], every=False)
    assert logits.data_ptr() == model.library.get_logits(context._pointer)
    # It lives as long as the tensor does.
    alive = weakref.ref(context)
    del context
    assert alive() is not None
    del logits
    gc.collect()
    assert alive() is None


STUB = """
#include <stddef.h>
struct params {{ int fields[128]; }};
{functions}
struct params llama_model_default_params(void)
{{ struct params p = {{{{0}}}}; p.fields[4] = -1; return p; }}
const char *llama_version(void) {{ return "9.9.9"; }}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_library_with_other_structures_is_refused(tmp_path, monkeypatch):
    names = set(libllama._FUNCTIONS) - {"model_default_params", "version"}
    stubs = "\n".join(f"void llama_{name}(void) {{}}" for name in sorted(names))
    (tmp_path / "llama.c").write_text(STUB.format(functions=stubs))
    path = tmp_path / "libllama.so"
    subprocess.run(
        ["gcc", "-w", "-shared", "-fPIC", "llama.c", "-o", path.name], cwd=tmp_path, check=True
    )
    monkeypatch.setenv(libllama.VARIABLE, str(path))
    assert find_library() == path
    message = (
        r"runtime 'llama.cpp' needs a libllama whose API is that of llama.cpp .*, got 9.9.9 \(.*"
        r"libllama.so'\), where split_mode of llama_model_params is 0 in place of 1"
    )
    with pytest.raises(LoadError, match=message):
        libllama.library()


def test_what_is_no_libllama_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(LoadError, match=r"got '.*text.so': .*"):
        Library(tmp_path / "text.so")
    [extension] = Path(torch.__file__).parent.glob("_C.*so")
    with pytest.raises(LoadError, match=r"got '.*_C.*so' without llama_version"):
        Library(extension)
    monkeypatch.setenv(libllama.VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(
        LoadError, match=r"PROXYTUNE_LIBLLAMA must name libllama's file, got '.*none"
    ):
        find_library()
    monkeypatch.delenv(libllama.VARIABLE)
    monkeypatch.setattr(libllama, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"pip install 'proxytune_kernels\[llama\]', or name one's"):
        find_library()


def test_hostile_files_are_refused(gguf_trio, tmp_path):
    whole = gguf_trio.files["base"].read_bytes()
    for name, held, message in (
        ("text.gguf", b"no GGUF", "have a GGUF file, got .* with other contents"),
        ("cut.gguf", whole[: len(whole) // 2], "can run, got .*cut.gguf': .*"),
        ("head.gguf", whole[:100], "can run, got .*head.gguf': .*"),
    ):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(LoadError, match=f"base must .*{message}"):
            LlamaModel("base", Place("x", tmp_path), name)
    with pytest.raises(LoadError, match="must name files by their plain names"):
        LlamaModel("base", Place("x", tmp_path), "../base.gguf")


def test_a_tokenizer_of_another_vocabulary_is_refused(model):
    with pytest.raises(VocabularyError, match=r"tokenizer of anti, file must .* 2 ids that differ"):
        model.check_tokenizer("anti", make_tokenizer(swap=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"runtime": "llama"},
            "runtime of base must be one of transformers, llama.cpp, got 'llama'",
        ),
        ({"dtype": "bfloat16"}, "dtype of base must be 'auto' with runtime 'llama.cpp', got torch"),
        ({"device": "meta"}, "device of base must be 'cpu' with runtime"),
        ({"quantize": {"base": "int8"}}, "quantize of base must be None with runtime"),
        ({"expert": "x"}, "gguf_file of expert must name a file with runtime"),
    ],
)
def test_options_that_do_not_go_with_it(gguf_trio, options, message):
    arguments: dict[str, Any] = {**gguf_trio.files, "runtime": "llama.cpp", **options}
    with pytest.raises(ValueError, match=message):
        load_trio(**arguments)


def test_models_that_cannot_be_steered(model, monkeypatch):
    for name, words in (("has_encoder", "an encoder"), ("is_recurrent", "a recurrent model")):
        stand_in = {f"model_{n}": lambda p, held=n == name: held for n in (
            "has_encoder", "is_diffusion", "is_recurrent", "is_hybrid")}  # fmt: skip
        library = SimpleNamespace(**stand_in, model_has_decoder=lambda p: True)
        with monkeypatch.context() as patch:
            patch.setattr(model, "library", library)
            assert str(model._unserved()).startswith(words)
    assert model._unserved() is None
