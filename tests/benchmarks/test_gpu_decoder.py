"""What `python -m benchmarks.gpu --decoder` computes, on a processor."""

import weakref
from itertools import product

import pytest
import torch
from torch.nn import Linear, Module
from transformers import LlamaForCausalLM

from benchmarks.gpu.decoder import build, random_models
from benchmarks.gpu.decoder.break_even import break_even, tokens_per_round
from benchmarks.gpu.decoder.random_models import (
    byte_tokenizer,
    empty_model,
    random_model,
    step_bytes,
    weight_bytes,
)
from benchmarks.gpu.decoder.shapes import LLAMA_7B, LLAMA_13B, LLAMA_70B, TRIOS, ModelShape
from proxytune_kernels import Trio

TINY = ModelShape(32, 48, 2, 4, 2, vocab_size=300, context=128)
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


class TestShapes:
    @pytest.mark.parametrize(
        ("shape", "published"),
        [(LLAMA_7B, 6_738_415_616), (LLAMA_13B, 13_015_864_320), (LLAMA_70B, 68_976_648_192)],
    )
    def test_as_many_parameters_as_published(self, shape, published):
        model = empty_model(shape)
        assert sum(p.numel() for p in model.parameters()) == published
        assert {p.device.type for p in model.parameters()} == {"meta"}

    def test_planned_bytes(self):
        assert build.planned_bytes(TRIOS["13b"]) == 2 * (13_015_864_320 + 2 * 6_738_415_616)
        layer = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28_672
        int8 = 2 * 68_976_648_192 - 80 * layer
        assert build.planned_bytes(TRIOS["70b"]) == int8 + 2 * 2 * 6_738_415_616

    def test_cache(self):
        # keys and values, 2 bytes, 80 layers, 8 heads of 128
        assert LLAMA_70B.cache_bytes_per_token() == 2 * 2 * 80 * 8 * 128
        assert LLAMA_13B.cache_bytes_per_token() == 2 * 2 * 40 * 5120


class TestRandomModel:
    def test_computes_what_an_ordinary_model_with_its_weights_computes(self):
        """Angles included: they are buffers, which no weights are loaded for."""
        model = random_model(TINY, "cpu", 0, dtype=torch.float32)
        ordinary = LlamaForCausalLM(TINY.config()).eval()
        ordinary.load_state_dict(model.state_dict())
        assert torch.equal(logits(model), logits(ordinary))
        assert not model.training

    def test_weights(self):
        model = random_model(ModelShape(256, 512, 2, 4, 2, 1000), "cpu", 0)
        spread = {name: float(p.float().std()) for name, p in model.named_parameters()}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        for name, std in spread.items():
            if "norm" in name:
                assert torch.equal(model.get_parameter(name), torch.ones(256).bfloat16())
            elif "lm_head" not in name:
                # 65,536 or more normal samples: the error of their deviation is 0.3% of it
                assert std == pytest.approx(0.02, rel=0.02)
        # The head's input has norms' root mean square of 1, so logits deviate by 1.5; 40,000 of
        # them, in rows that are alike.
        assert float(logits(model).float().std()) == pytest.approx(1.5, rel=0.1)

    def test_seeds(self):
        one, again, other = (random_model(TINY, "cpu", seed) for seed in (0, 0, 1))
        assert torch.equal(logits(one), logits(again))
        assert not torch.equal(logits(one), logits(other))

    def test_a_quantised_layer_is_gone_before_the_next_has_weights(self):
        alive: list[weakref.ref[Module]] = []
        most = 0

        class Instead(Module):
            pass

        def quantize(layer):
            nonlocal most
            assert layer.weight.device.type == "cpu"
            assert layer.weight.std() > 0
            alive.append(weakref.ref(layer))
            most = max(most, sum(ref() is not None for ref in alive))
            return Instead()

        model = random_model(TINY, "cpu", 0, quantize=quantize)
        assert len(alive) == 2 * 7
        # The loop's own name still holds the one before.
        assert most <= 2
        assert [type(m) for m in model.modules()].count(Instead) == 2 * 7
        assert isinstance(model.get_output_embeddings(), Linear)
        assert [name for name, m in model.named_modules() if isinstance(m, Linear)] == ["lm_head"]

    def test_all_weights_are_there(self, monkeypatch):
        monkeypatch.setattr(random_models, "_fill", lambda *arguments: None)
        with pytest.raises(RuntimeError, match="must have all its weights, .* has none"):
            random_model(TINY, "cpu", 0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
class TestAdaptedModel:
    def test_shares_weights_and_leaves_the_other_alone(self):
        pytest.importorskip("peft")
        anti = random_model(TINY, "cpu", 0, dtype=torch.float32)
        before = logits(anti)
        expert = random_models.adapted_model(anti, 1)
        assert torch.equal(logits(anti), before)
        assert [name for name, _ in anti.named_parameters() if "lora" in name] == []
        own = {id(p) for p in anti.parameters()}
        added = [p for p in expert.parameters() if id(p) not in own]
        assert {id(p) for p in expert.parameters()} >= own
        assert len(added) == 2 * 7 * 2
        assert {min(p.shape) for p in added} == {16}
        assert {p.dtype for p in added} == {torch.float32}
        assert not any(p.requires_grad for p in expert.parameters())
        # B is not 0: the expert is another model
        assert (logits(expert) - before).std() > 0.01 * before.std()

    def test_random_state_is_left_alone(self):
        pytest.importorskip("peft")
        anti = random_model(TINY, "cpu", 0)
        torch.manual_seed(5)
        wanted = torch.rand(1)
        torch.manual_seed(5)
        one, other, again = (random_models.adapted_model(anti, seed) for seed in (1, 2, 1))
        assert torch.equal(torch.rand(1), wanted)
        assert torch.equal(logits(one), logits(again))
        assert not torch.equal(logits(one), logits(other))


class TestBytes:
    # Two layers of q, k, v, o (16 of 32 columns for k and v), gate, up, down and two norms; the
    # last norm; embedding and head.
    LAYERS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    ANGLES = 2 * 4 * 4  # two buffers of 4 fp32

    def test_a_step_reads_all_but_the_embedding(self):
        model = random_model(TINY, "cpu", 0)
        assert weight_bytes([model]) == 2 * (self.LAYERS + 2 * 300 * 32) + self.ANGLES
        assert step_bytes([model]) == 2 * (self.LAYERS + 300 * 32) + self.ANGLES

    def test_a_head_that_is_the_embedding_is_read(self):
        model = random_model(TINY, "cpu", 0)
        model.lm_head.weight = model.model.embed_tokens.weight
        assert step_bytes([model]) == 2 * (self.LAYERS + 300 * 32) + self.ANGLES

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
    def test_shared_weights_count_once(self):
        pytest.importorskip("peft")
        base, anti = (random_model(TINY, "cpu", seed) for seed in (0, 1))
        expert = random_models.adapted_model(anti, 2)
        adapter = 2 * 16 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
        assert step_bytes([base, anti]) == 2 * step_bytes([anti])
        assert step_bytes([base, expert, anti]) == 2 * step_bytes([anti]) + adapter
        assert weight_bytes([expert, anti]) == weight_bytes([anti]) + adapter

    def test_parts_of_a_quantised_tensor(self):
        class Quantised:
            values, scales = torch.zeros(10, dtype=torch.int8), torch.zeros(2)

            def __tensor_flatten__(self):
                return ["values", "scales"], None

        assert random_models._bytes(Quantised()) == 10 + 8


class TestTokenizer:
    def test_every_id_has_a_name_and_text_comes_back(self):
        tokenizer = byte_tokenizer(32_000)
        assert sorted(tokenizer.get_vocab().values()) == list(range(32_000))
        text = "Äh, 2 + 2 = 4\n"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([31_999]) == "<31999>"

    def test_the_whole_vocabulary_is_shared(self):
        model = random_model(TINY, "cpu", 0)
        trio = Trio.from_models(model, model, model, byte_tokenizer(300))
        assert trio.vocab_size == 300

    def test_too_small(self):
        with pytest.raises(ValueError, match="vocab_size must be at least 259, got 258"):
            byte_tokenizer(258)


class TestBreakEven:
    @pytest.mark.parametrize("drafts", [1, 2, 5])
    @pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
    def test_tokens_of_every_pattern(self, drafts, acceptance):
        """Drafts before the first wrong one count, and one token more."""
        expected = 0.0
        for pattern in product((True, False), repeat=drafts):
            chance = 1.0
            for right in pattern:
                chance *= acceptance if right else 1 - acceptance
            accepted = pattern.index(False) if False in pattern else drafts
            expected += chance * (accepted + 1)
        # a sum of at most 32 terms near 1: its rounding is under 32 ulps
        assert tokens_per_round(acceptance, drafts) == pytest.approx(expected, rel=1e-14)

    @pytest.mark.parametrize("drafts", [1, 4, 8])
    @pytest.mark.parametrize("cost", [1.01, 1.5, 1.99])
    def test_first_that_pays_on_a_grid(self, drafts, cost):
        grid = [i / 20_000 for i in range(20_001)]
        first = next(a for a in grid if sum(a**n for n in range(drafts + 1)) >= cost)
        found = break_even(cost * 0.02, 0.02, drafts)
        assert found is not None
        assert first - 1 / 20_000 < found <= first + 1e-12

    def test_edges(self):
        assert break_even(0.9, 1.0, 4) == 0.0
        assert break_even(1.0, 1.0, 4) == 0.0
        assert break_even(5.0, 1.0, 4) == pytest.approx(1.0, abs=1e-12)
        assert break_even(5.001, 1.0, 4) is None

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: tokens_per_round(1.1, 4), r"acceptance must be in \[0, 1\], got 1.1"),
            (lambda: tokens_per_round(float("nan"), 4), "acceptance must be in"),
            (lambda: tokens_per_round(0.5, 0), "drafts must be at least 1, got 0"),
            (lambda: break_even(0.0, 1.0, 4), "round_seconds must be positive, got 0.0"),
            (lambda: break_even(1.0, float("nan"), 4), "step_seconds must be positive, got nan"),
        ],
    )
    def test_arguments(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()
