"""Keys and values are taken when a decoder is made, all or none, and as many as fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Linear

from proxytune_kernels.decoder import Decoder, Speculation, memory
from proxytune_kernels.decoder.cache import Layer, Part, SlotCache
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import tiny_llama
from tests.decoder.tape import mutations
from tests.decoder.test_runner import ARCHITECTURES, assert_plain, make, prefill, random_ids, step

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def two_kinds() -> Any:
    """A model whose last layer has twice the heads of the others, for keys and values."""
    model = tiny_llama(0, 32, 3)
    attention = model.model.layers[2].self_attn
    attention.num_key_value_groups = 1
    attention.k_proj, attention.v_proj = (Linear(32, 32, bias=False).double() for _ in range(2))
    return model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "two-kinds"])
def test_layers_are_known_before_they_write(architecture):
    model = two_kinds() if architecture == "two-kinds" else make(architecture)
    noise = torch.get_rng_state()
    layers = memory.layers_of(model)
    assert layers is not None and torch.equal(noise, torch.get_rng_state())
    # What they do write, where nothing was taken before.
    lazy, planned = (
        Runner({"base": model}, 3, 32, layers=given) for given in ({}, {"base": layers})
    )
    caches = [runner.models["base",].cache for runner in (lazy, planned)]
    assert len(caches[1].slabs) == (2 if architecture == "two-kinds" else 1)
    taken = [slab.data_ptr() for slab in caches[1].slabs]
    prompt = random_ids(9, 0)
    for runner in (lazy, planned):
        assert_plain(prefill(runner, [1], [prompt])[0], model, prompt, architecture)
    assert [t.shape for t in caches[0].keys] == [t.shape for t in caches[1].keys]
    assert [t.shape for t in caches[0].values] == [t.shape for t in caches[1].values]
    assert lazy.cache_bytes() == planned.cache_bytes()
    assert taken == [slab.data_ptr() for slab in caches[1].slabs]


def test_memory_is_taken_when_a_decoder_is_made(trio):
    decoder = Decoder(trio, 3, 40, pair="separate")
    # fp64 keys and values, 3 slots of 40 tokens: 3 layers x 2 heads x 12, twice 2 layers x 2 x 8.
    wanted = 2 * 8 * 3 * 40 * (3 * 24 + 2 * 2 * 16)
    assert decoder.info()["cache_bytes"] == wanted
    places = [slab.data_ptr() for cache in decoder._runner._caches for slab in cache.slabs]
    assert len(places) == 3
    decoder.generate(["a", "hello"], PARAMS)
    assert decoder.info()["cache_bytes"] == wanted
    assert places == [s.data_ptr() for cache in decoder._runner._caches for s in cache.slabs]


def test_all_or_none(monkeypatch):
    """A slab that can't be taken leaves none of those before it."""
    cpu = torch.device("cpu")
    kinds = [Part(heads, 8, torch.float32, cpu) for heads in (1, 2, 3)]
    layers: list[Layer] = [(kinds[0], kinds[0]), (kinds[1], kinds[2])]
    zeros, left = torch.frombuffer, 0

    def frombuffer(*arguments: Any, **options: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("no memory for keys")
        return zeros(*arguments, **options)

    cache = SlotCache(2, 16, cpu)
    for allowed in range(3):
        left = allowed
        with monkeypatch.context() as patch:
            patch.setattr(torch, "frombuffer", frombuffer)
            with pytest.raises(torch.OutOfMemoryError):
                cache.reserve(layers)
        assert not (cache.slabs or cache.keys or cache.values or cache.nbytes())
    cache.reserve(layers)
    assert cache.nbytes() == 2 * 16 * 8 * 4 * (1 + 1 + 2 + 3)


@pytest.mark.parametrize("kernel", ["sdpa", "triton"])
@pytest.mark.parametrize("pair", ["separate", "batched"])
def test_a_slot_is_emptied_and_moved_by_one_launch(near, kernel, pair):
    """For each cache one over its slab, whatever the number of layers, and one for its lengths."""
    runner = Runner(near.models, 4, 32, pair=pair)
    for cache in runner._caches:
        cache.kernel = kernel
    prompts = {role: [random_ids(7, 0), random_ids(9, 1)] for role in near.models}
    runner.prefill([0, 1], prompts)
    caches = len(runner._caches)
    assert caches == (3 if pair == "separate" else 2)
    # sdpa reads what a request left, so it is zeroed.
    emptied = caches * (2 if kernel == "sdpa" else 1)
    assert len(mutations(lambda: runner.release(0))) == emptied
    assert len(mutations(lambda: runner.move(1, 0))) == 2 * caches + emptied
    assert runner.lengths("expert") == [9, 0, 0, 0]


def test_what_is_moved_is_all_there_is():
    model = two_kinds()
    runner = Runner({"base": model}, 3, 32)
    long, short = random_ids(20, 0), random_ids(5, 1)
    prefill(runner, [0], [long])
    prefill(runner, [2], [short])
    runner.release(0)
    runner.move(2, 0)
    cache = runner.models["base",].cache
    assert not any(layer[2].any() or layer[0, 5:].any() for layer in (*cache.keys, *cache.values))
    assert_plain(step(runner, [[7]])[0, 0], model, [*short, 7])


def free(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(count))


def test_what_does_not_fit_is_refused_with_numbers(monkeypatch, trio):
    """13B + 7B + 7B in bf16 with 16 slots of 4,096 tokens, on a device of 141 GB."""
    device = torch.device("cuda", 0)
    layers: dict[str, list[Layer]] = {
        role: [(Part(heads, 128, torch.bfloat16, device), Part(heads, 128, torch.bfloat16, device))]
        * count
        for role, heads, count in (("base", 40, 40), ("expert", 32, 32), ("anti", 32, 32))
    }
    free(monkeypatch, 141e9 - 53e9)
    message = (
        r"max_batch_size must be at most 10, got 16: keys and values of 16 slots of 4096 tokens "
        r"take 122 GB on cuda:0, beside 0.00\d+ GB of weights; of the 88 GB that are free there "
        r"they may take 79.2 GB \(None takes what fits; a shorter max_seq_len lets more fit\)"
    )

    def slots(wanted: int | None, max_seq_len: int) -> int:
        return memory.slots(trio.models, layers, wanted, max_seq_len, 0)

    with pytest.raises(ValueError, match=message):
        slots(16, 4096)
    assert slots(10, 4096) == slots(None, 4096) == 10
    monkeypatch.setattr(memory, "input_device", lambda model: device)
    assert slots(None, 16) == 256  # no more, however much fits
    with pytest.raises(ValueError, match="so short that a slot fits, got 65536: .* of 1 slot of"):
        slots(None, 65536)


def test_the_number_that_fits_does(monkeypatch, trio):
    one = Decoder(trio, 1, 40).info()["cache_bytes"]
    # Three slots and a half: of ten bytes that are free nine may be taken.
    free(monkeypatch, 3.5 * one / 0.9)
    with pytest.raises(ValueError, match=r"max_batch_size must be at most 3, got 4: .* on cpu"):
        Decoder(trio, 4, 40)
    for wanted in (3, None):
        decoder = Decoder(trio, wanted, 40)
        assert decoder.info()["max_batch_size"] == decoder.max_batch_size == 3
        assert len(decoder.generate(["a"] * 5, PARAMS)) == 5
    # Drafts need places behind a row's end, too.
    with pytest.raises(ValueError, match="max_batch_size must be at most 2, got 3"):
        Decoder(trio, 3, 40, speculation=Speculation(max_drafts=16))
    # Stacked weights are copies, which take room, too.
    pair = sum(p.nbytes for role in ("expert", "anti") for p in trio.models[role].parameters())
    free(monkeypatch, 3.5 * one / 0.9 + pair)
    assert Decoder(trio, None, 40, pair="batched").max_batch_size == 3
    free(monkeypatch, 1e15)
    assert Decoder(trio, None, 40).max_batch_size == 16


def test_models_that_hide_their_layers_take_memory_as_they_write(monkeypatch, tokenizer):
    monkeypatch.setattr(memory, "layers_of", lambda model: None)
    free(monkeypatch, 0)
    decoder = Decoder(Trio.from_models(tiny_llama(0), tokenizer=tokenizer), None, 40, check=False)
    assert decoder.info()["cache_bytes"] == 0 and decoder.max_batch_size == 16
    assert len(decoder.generate("a", PARAMS)[0].token_ids) == 5


def test_what_is_free(monkeypatch, tmp_path):
    cuda: Any = SimpleNamespace(
        memory_reserved=lambda device: 300, memory_allocated=lambda device: 100,
        mem_get_info=lambda device: (1000, 5000),
    )  # fmt: skip
    for name, function in vars(cuda).items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert memory.free_bytes(torch.device("cuda", 0)) == 1200
    assert memory.free_bytes(torch.device("meta")) is None
    here = memory.free_bytes(torch.device("cpu"))
    assert here is not None and here > 2**20

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    root: Path = tmp_path
    write("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    assert memory._free_memory(root) == 4000 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "900000\n")
    write("sys/fs/cgroup/memory.stat", "anon 500000\nfile 400000\n")
    assert memory._free_memory(root) == 4000 * 1024
    write("sys/fs/cgroup/memory.max", "1000000\n")
    assert memory._free_memory(root) == 500_000
