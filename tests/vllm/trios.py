"""Tiny random members, the directory that vLLM opens, and the reference they are held to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import proxytune_kernels as ptk
from tests.decoder.conftest import byte_tokenizer

VOCAB_SIZE = 262
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # Wide: logits far enough apart that rounding does not choose the token.
    "initializer_range": 0.25,
}
BASE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 32}
BASE |= {"num_attention_heads": 8, "num_key_value_heads": 4}
PAIR = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
PAIR |= {"num_attention_heads": 4, "num_key_value_heads": 2}

Model = tuple[str, dict[str, Any]]


def _model(family: str, sizes: dict[str, Any] = BASE, **changes: Any) -> Model:
    return family, sizes | changes


MODELS: dict[str, Model] = {
    "llama": _model("Llama"),
    "head-64": _model("Llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64),
    "three-kv-heads": _model(
        "Llama", hidden_size=192, num_attention_heads=6, num_key_value_heads=3
    ),
    "window": _model("Mistral", sliding_window=32),
    "tied": _model("Qwen3", tie_word_embeddings=True, initializer_range=0.1, num_hidden_layers=3),
    "softcap": _model(
        "Gemma2", num_hidden_layers=2, sliding_window=32, final_logit_softcapping=5.0,
        attn_logit_softcapping=4.0, query_pre_attn_scalar=32, tie_word_embeddings=True,
    ),
    "expert": _model("Llama", PAIR),
    "anti": _model("Llama", PAIR),
    "window-expert": _model("Mistral", PAIR, sliding_window=16),
    "softcap-expert": _model(
        "Gemma2", PAIR, sliding_window=16, final_logit_softcapping=3.0, query_pre_attn_scalar=32,
        tie_word_embeddings=True,
    ),
}  # fmt: skip


def save_model(root: Path, name: str, **changes: Any) -> Path:
    """A random model of a name in MODELS with its tokenizer, in a directory of that name."""
    family, settings = MODELS[name]
    directory = root / name
    if changes:
        directory = root / "-".join([name, *(f"{k}{v}" for k, v in changes.items())])
    if directory.exists():
        return directory
    torch.manual_seed(list(MODELS).index(name))
    config = getattr(transformers, f"{family}Config")(**(COMMON | settings | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_trio(
    root: Path, base: str, expert: str = "expert", anti: str = "anti", **more: Any
) -> Path:
    """A directory that vLLM opens as the trio; its members lie beside it."""
    members = {
        role: save_model(root, name)
        for role, name in {"base": base, "expert": expert, "anti": anti}.items()
    }
    directory = root / "_".join(["trio", base, expert, anti])
    return write_trio(directory, members, **more)


def write_trio(directory: Path, members: dict[str, Path], **more: Any) -> Path:
    directory.mkdir(exist_ok=True)
    config = json.loads((members["base"] / "config.json").read_text())
    config["proxy_tuning"] = {
        **{role: str(path) for role, path in members.items()},
        "alpha": 1.0,
        "vocab_size": VOCAB_SIZE,
        **more,
    }
    config["architectures"] = ["ProxyTunedForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))
    for path in members["base"].glob("*token*.json"):
        (directory / path.name).write_text(path.read_text())
    return directory


@cache
def load(directory: str, dtype: torch.dtype) -> Any:
    """The trio of an exported directory, by transformers."""
    said = json.loads((Path(directory) / "config.json").read_text())["proxy_tuning"]
    members = {role: said[role] for role in ("base", "expert", "anti")}
    trio = ptk.load_trio(**members, dtype=dtype)
    for model in trio.models.values():
        if getattr(model.config, "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # SDPA has no soft caps
    return trio


@torch.no_grad()
def logits(directory: Path, token_ids: Sequence[int], alpha: float, dtype: torch.dtype) -> Tensor:
    """Combined logits [T, vocab_size] after each of the tokens, fp64, by forwards in ``dtype``."""
    trio = load(str(directory), dtype)
    ids = torch.tensor([list(token_ids)])
    base, expert, anti = (
        model(ids, use_cache=False).logits[0, :, : trio.vocab_size].double()
        for model in trio.models.values()
    )
    return base + alpha * (expert - anti)


def rounding(directory: Path, token_ids: Sequence[int], alpha: float) -> tuple[Tensor, float]:
    """Combined logits by fp64 forwards, and how far fp32 ones may be from them.

    vLLM's fp32 sums run in another order than transformers': their errors are of one size. Eight
    times transformers' own worst one is allowed.
    """
    exact = logits(directory, token_ids, alpha, torch.float64)
    own = (logits(directory, token_ids, alpha, torch.float32) - exact).abs().max()
    return exact, 8 * float(own)


def greedy(alphas: Sequence[float], tokens: int) -> list[ptk.SamplingParams]:
    """Greedy decoding of so many tokens, for :func:`decode`."""
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return [ptk.SamplingParams(alpha=alpha, **settings) for alpha in alphas]


def ask(
    llm: Any, prompts: Sequence[Any], alphas: Sequence[float | None], tokens: int, **more: Any
) -> list[Any]:
    """vLLM's greedy outputs for prompts, texts or token ids; None is the directory's alpha."""
    from vllm import SamplingParams

    settings = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **more}
    extra = [None if alpha is None else {"alpha": alpha} for alpha in alphas]
    params = [SamplingParams(extra_args=own, **settings) for own in extra]
    given = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
    return [output.outputs[0] for output in llm.generate(given, params, use_tqdm=False)]


def generate(llm: Any, *arguments: Any, **more: Any) -> list[list[int]]:
    """The token ids of :func:`ask`."""
    return [list(output.token_ids) for output in ask(llm, *arguments, **more)]


def decode(directory: Path, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
    """Our decoder's tokens, fp32."""
    trio = load(str(directory), torch.float32)
    engine = ptk.Decoder(trio, max_batch_size=4, max_seq_len=256)
    outputs = engine.generate([list(p) for p in prompts], list(params))
    return [list(output.token_ids) for output in outputs]
