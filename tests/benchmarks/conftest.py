"""A tiny random trio, in memory and on disk."""

import json

import pytest
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from proxytune_kernels import Trio

VOCAB_SIZE = 259


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny_llama(seed: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def trio() -> Trio:
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return Trio.from_models(tiny_llama(0, 48), tiny_llama(1, 32), tiny_llama(2, 32), tokenizer)


@pytest.fixture(scope="session")
def trio_directory(trio, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny-trio")
    for role in trio.roles:
        trio.models[role].save_pretrained(directory / role)
    trio.tokenizer.save_pretrained(directory)
    roles = {role: role for role in trio.roles}
    (directory / "trio.json").write_text(json.dumps({"format": 1, **roles, "tokenizer": "."}))
    return directory


@pytest.fixture
def run_command():
    """Run a command's ``main`` with arguments; gives what typer's runner gives."""

    def run(main, *arguments):
        app = typer.Typer()
        app.command()(main)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run
