"""Members that llama.cpp runs: slots, rollback, what is drawn, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import proxytune_kernels as ptk
from proxytune_kernels.decoder import Decoder, MemberError
from proxytune_kernels.decoder.pool import DecoderPool
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.llama_cpp import LlamaContext
from tests.documents import examples

PROMPTS = ["hello you", "x", "what is more", "abc", "1 2 3", "of the many"]


@pytest.fixture(scope="module")
def trio(gguf_trio) -> Any:
    return gguf_trio.load()


@pytest.fixture(scope="module")
def decoder(trio):
    return Decoder(trio, 3, 64, prefill_chunk=5)


def alone(trio: Any, prompt: str, params: SamplingParams) -> list[int]:
    """One request, token by token: a context for each role, and the operator on their logits."""
    contexts = [LlamaContext(model, 1, 64) for model in trio.models.values()]
    how = {name: getattr(params, name) for name in ("alpha", "temperature", "top_p", "seed")}
    new = [*trio.tokenize(prompt).values()]
    output: list[int] = []
    length = 0
    while len(output) < params.max_tokens:
        pairs = zip(contexts, new, strict=True)
        rows: Any = [context.run([(0, length, ids)], every=False) for context, ids in pairs]
        length += len(new[0])
        drawn = ptk.sample(*rows, position=len(output), vocab_size=trio.vocab_size, **how)
        output.append(int(drawn.token_ids))
        new = [[output[-1]]] * 3
    return output


def test_requests_share_slots_and_get_the_tokens_of_each_alone(trio, decoder):
    """More requests than slots, which end at different steps: slots are refilled and moved."""
    params = [
        SamplingParams(
            max_tokens=4 + 3 * (i % 3), temperature=0.8, top_p=0.9, seed=i, ignore_eos=True,
            alpha=0.5 * (i % 3),
        )
        for i in range(len(PROMPTS))
    ]  # fmt: skip
    outputs = decoder.generate(PROMPTS, params)
    assert [o.token_ids for o in outputs] == [
        alone(trio, prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)
    ]
    assert decoder.info()["attention"] == dict.fromkeys(("base", "expert", "anti"), "llama.cpp")
    # 2 + 1 + 2 layers, one head of 32 fp16 numbers each for key and value, 3 rows of 64 tokens.
    assert decoder.info()["cache_bytes"] == (2 + 1 + 2) * 2 * 32 * 2 * 3 * 64


def test_greedy_tokens_are_those_of_whole_forwards(trio, decoder, plain_greedy):
    [output] = decoder.generate("hello you", SamplingParams(max_tokens=6, temperature=0))
    assert output.token_ids == plain_greedy(trio, "hello you", 6)


def test_outputs_of_one_prompt_copy_its_slot(decoder):
    params = SamplingParams(max_tokens=5, seed=3, n=3, ignore_eos=True)
    outputs = decoder.generate("hello you", params)
    for i, output in enumerate(outputs):
        [one] = decoder.generate(
            "hello you", SamplingParams(max_tokens=5, seed=3 + i, ignore_eos=True)
        )
        assert output.token_ids == one.token_ids


def test_prompt_logprobs_are_those_of_whole_forwards(trio, decoder):
    [output] = decoder.generate("what is more", SamplingParams(max_tokens=1, prompt_logprobs=1))
    ids = torch.tensor([trio.tokenize("what is more")["base"]])
    base, expert, anti = (model(ids).logits[:, :-1] for model in trio.models.values())
    wanted = ptk.score(base, expert, anti, ids[:, 1:])
    entries = zip(output.prompt_logprobs[1:], ids[0, 1:].tolist(), strict=True)
    found = torch.tensor([[entry[token_id] for entry, token_id in entries]])
    assert torch.allclose(found, wanted, atol=0.02)


def test_steps_read_logits_where_the_library_left_them(trio):
    runner = Runner(trio.models, 2, 64)
    runner.prefill([0, 1], {role: [[5, 6, 7], [8]] for role in trio.models})
    logits = runner.forward(("base", "expert", "anti"), torch.tensor([[9], [10]]))
    for role, x in logits.items():
        member: Any = runner.models[role,]
        assert x.data_ptr() == trio.models[role].library.get_logits(member.cache.context._pointer)
    # A drafter's are kept for the round.
    drafting = Runner(trio.models, 2, 64, drafts=True)
    first = drafting.forward(("expert",), torch.tensor([[9], [10]]))["expert"]
    kept = first.clone()
    drafting.forward(("expert",), torch.tensor([[11], [12]]), 1)
    assert torch.equal(first, kept)


def test_slots_move_and_new_tokens_go_behind_their_lengths(trio):
    runner = Runner({"base": trio.base}, 3, 64)
    roles = ("base",)
    runner.prefill([0, 1, 2], {"base": [[5, 6, 7], [8], [20, 21]]})
    runner.release(1)
    runner.move(2, 1)
    texts = [[5, 6, 7], [20, 21]]

    def check(new: list[list[int]], offset: int = 0, before: list[list[int]] | None = None) -> None:
        """The logits are those of whole texts: int8 rounding is far below 0.1 of their spread."""
        found = runner.forward(roles, torch.tensor(new), offset)["base"]
        for row, text in enumerate(texts):
            whole = [*text, *(before[row] if before else []), *new[row]]
            wanted = trio.base(torch.tensor([whole])).logits[0, -len(new[row]) :]
            assert (found[row] - wanted).abs().max() < 0.1 * wanted.std()

    check([[9], [10]])
    check([[11, 12], [13, 14]])  # in the place of those: no length has moved
    check([[15], [16]], 2, [[11, 12], [13, 14]])
    with pytest.raises(RuntimeError, match="can't have 9 of them"):
        runner.forward(roles, torch.tensor([[1], [1]]), 6)


def test_it_drafts_if_asked_to(trio):
    decoder = Decoder(trio, 2, 64, speculation=ptk.Speculation(max_drafts=2))
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    outputs = decoder.generate(PROMPTS[:3], params)
    assert [len(output.token_ids) for output in outputs] == [8, 8, 8]
    assert decoder.statistics()["drafted"] > 0


def test_a_role_may_run_in_transformers(gguf_trio, trio):
    models = {**gguf_trio.models, "base": trio.base}
    mixed = Decoder(Trio.from_models(**models, tokenizer=trio.tokenizers), 2, 64)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    assert mixed.info()["attention"]["base"] == "llama.cpp"
    assert mixed.info()["pair"] == "separate"
    assert [len(o.token_ids) for o in mixed.generate(PROMPTS[:3], params)] == [4, 4, 4]


def test_a_member_that_forgets_is_refused(gguf_trio, monkeypatch):
    run = LlamaContext.run

    def forgetful(self, rows, *, every):
        for row, start, _ in rows:
            if start:
                self.cut(row, 0)
        return run(self, [(row, 0, tokens) for row, _, tokens in rows], every=every)

    monkeypatch.setattr(LlamaContext, "run", forgetful)
    with pytest.raises(MemberError, match="base must give over the decoder's cache the logits of"):
        Decoder(gguf_trio.load(), 3, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "compile must be False where llama.cpp runs base, got True"),
        ({"pack_weights": True}, "pack_weights must be False where llama.cpp runs base, got True"),
        ({"pair": "batched"}, "pair must be 'separate' where llama.cpp runs expert, got 'batched'"),
        ({"max_batch_size": 300}, "llama.cpp can't make 300 sequences"),
    ],
)
def test_what_does_not_go_with_it_is_refused(trio, options, message):
    with pytest.raises((ValueError, MemoryError), match=message):
        Decoder(trio, **{"max_batch_size": 2, "max_seq_len": 32, **options})


def test_a_fault_leaves_a_decoder_as_new(trio, monkeypatch):
    decoder = Decoder(trio, 3, 64, check=False)
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    [before] = decoder.generate("abc", params)
    library = trio.base.library
    copy = library.memory_seq_cp

    def interrupted(*arguments: Any) -> None:
        copy(*arguments)
        raise KeyboardInterrupt

    for name, faulty, error in (
        ("memory_seq_cp", interrupted, KeyboardInterrupt),
        ("decode", lambda context, batch: -3, RuntimeError),
    ):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(library, name, faulty)
            decoder.generate("what is more", SamplingParams(max_tokens=5, n=3))
        for after in decoder.generate(["abc"] * 3, params):
            assert after.token_ids == before.token_ids


def test_what_needs_modules_refuses_it(trio):
    with pytest.raises(
        ValueError, match="the scorer needs models that transformers runs, got base"
    ):
        trio.check_modules("the scorer")
    with pytest.raises(
        ValueError, match="ProxyTunedForCausalLM needs models that transformers runs"
    ):
        ProxyTunedForCausalLM.from_trio(trio)


def test_further_pairs_cancel(gguf_trio, trio, decoder):
    """The opposite pair is two files more; both speculation and plain steps run them."""
    files = gguf_trio.files
    several = gguf_trio.load(pairs=[(files["anti"], files["expert"])])
    assert several.pairs == (("expert_2", "anti_2"),)
    params = SamplingParams(max_tokens=8, temperature=0, alpha=1.0, pair_alphas=(1.0,))
    [wanted] = decoder.generate("abc", SamplingParams(max_tokens=8, temperature=0, alpha=0.0))
    [output] = Decoder(several, 1, 64).generate("abc", params)
    assert output.token_ids == wanted.token_ids


def test_a_pool_knows_one_file_from_another(gguf_trio, trio):
    pool = DecoderPool()
    first = pool.decoder_for(trio, 1, 20)
    assert pool.decoder_for(trio, 1, 20) is first
    assert pool.decoder_for(gguf_trio.load(), 1, 20) is not first


def test_the_example_of_the_documentation(gguf_trio, tmp_path, monkeypatch, capsys):
    for role, path in gguf_trio.files.items():
        (tmp_path / f"{role}.gguf").hardlink_to(path)
    monkeypatch.chdir(tmp_path)
    [code] = examples("docs/llama_cpp.md", "python")
    exec(compile(code, "docs/llama_cpp.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
