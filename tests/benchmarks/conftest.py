"""A tiny random trio, in memory and on disk."""

import json

import pytest
import torch
import typer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks.harness.random_models import ModelShape, byte_tokenizer
from proxytune_kernels import Trio

VOCAB_SIZE = 259


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny_llama(seed: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = ModelShape(hidden, 2 * hidden, 2, 4, 2, VOCAB_SIZE, context=64).config()
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def trio() -> Trio:
    models = tiny_llama(0, 48), tiny_llama(1, 32), tiny_llama(2, 32)
    return Trio.from_models(*models, byte_tokenizer(VOCAB_SIZE))


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


@pytest.fixture
def records_of(run_command, tmp_path):
    """Run a command that has to succeed; gives its lines of results, and what it said."""

    def run(main, *arguments):
        output = tmp_path / "out.jsonl"
        result = run_command(main, *arguments, "--output", output)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in output.read_text().splitlines()], result.output

    return run
