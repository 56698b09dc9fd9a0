"""The command line: what it prints, its exit codes, and one sentence for a user's mistake."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import proxytune_kernels as ptk
from proxytune_kernels.cli import output
from proxytune_kernels.cli.generate import SamplingOptions, read_requests
from proxytune_kernels.cli.options import printable
from proxytune_kernels.cli.output import CliRequest
from proxytune_kernels.decoder import StreamEvent
from proxytune_kernels.ops.backends import Choice
from proxytune_kernels.params import SamplingParams
from tests.cli import assert_fails, assert_one_sentence, invoke
from tests.trio.checkpoints import edit

PROMPTS = ["Question: Tom has 3 pens and buys 4 more.", "1 + 1 ="]
SHIPPED = ["generate", "--trio", "shipped", "--dtype", "float32"]
SAMPLED = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "7", "--max-tokens", "12"]
PARAMS = ptk.SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=12)
PROXYTUNE = [sys.executable, "-m", "proxytune_kernels"]


@pytest.fixture(scope="module")
def expected():
    """What the decoder gives for PROMPTS."""
    decoder = ptk.Decoder(ptk.load_trio("shipped", dtype="float32"))
    return decoder.generate(PROMPTS, PARAMS)


def test_speculation_gives_the_same_tokens_and_says_what_it_did(expected):
    for drafter in ("expert", "prompt-lookup"):
        options = ["--speculate", drafter, "--max-drafts", "3", "--prefill-chunk", "8"]
        result = invoke(*SHIPPED, *SAMPLED, *options, "--format", "jsonl", *PROMPTS)
        assert result.exit_code == 0, result.output
        for line, wanted in zip(result.stdout.splitlines(), expected, strict=True):
            record = json.loads(line)
            assert record["token_ids"] == wanted.token_ids
            assert set(record["speculation"]) == {"drafted", "accepted", "emitted_per_round"}


def test_jsonl_is_what_the_decoder_gives(expected):
    result = invoke(*SHIPPED, *SAMPLED, "--format", "jsonl", *PROMPTS)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    for i, (record, wanted) in enumerate(zip(records, expected, strict=True)):
        values = {
            "index": i, "prompt": PROMPTS[i], "text": wanted.text, "token_ids": wanted.token_ids,
            "logprobs": pytest.approx(wanted.logprobs, abs=1e-5),
            "finish_reason": wanted.finish_reason, "stop_reason": wanted.stop_reason, "seed": 7,
        }  # fmt: skip
        assert record == values and list(record) == list(values)


def test_one_prompt_prints_its_text_alone(expected):
    result = invoke(*SHIPPED, *SAMPLED, PROMPTS[0])
    assert result.stdout == expected[0].text + "\n"


def test_several_prompts_print_in_order_under_headings(expected):
    result = invoke(*SHIPPED, *SAMPLED, "--file", "-", stdin="\n".join(PROMPTS) + "\n\n")
    assert result.stdout == (
        f"==> {PROMPTS[0]} <==\n{expected[0].text}\n\n==> {PROMPTS[1]} <==\n{expected[1].text}\n"
    )


def test_standard_input_is_one_prompt():
    result = invoke(*SHIPPED, *SAMPLED, "--format", "jsonl", stdin="Question: 1\nAnswer:\n")
    assert json.loads(result.stdout)["prompt"] == "Question: 1\nAnswer:"


def test_a_jsonl_file_overrides_parameters(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPTS[0]}, {"prompt": [5, 6, 7], "max_tokens": 3, "seed": 9}]
    file.write_text("\n".join(map(json.dumps, lines)))
    result = invoke(*SHIPPED, *SAMPLED, "--ignore-eos", "--format", "jsonl", "--file", str(file))
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (len(first["token_ids"]), first["seed"]) == (12, 7)
    assert (len(second["token_ids"]), second["seed"]) == (3, 9)
    assert second["prompt"] == [5, 6, 7]


def test_every_option_reaches_the_sampling_parameters(monkeypatch):
    seen = []

    def read_requests(prompts, file, jsonl, params):
        seen.append(params)
        return []

    monkeypatch.setattr("proxytune_kernels.cli.generate.read_requests", read_requests)
    options: Any = {
        "alpha": 0.5, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1,
        "filter_order": "joint", "seed": 2**64 - 1, "max_tokens": 9, "min_tokens": 2,
    }  # fmt: skip
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments += ["--stop", "a", "--stop", "b", "--stop-token-id", "3", "--ignore-eos"]
    arguments += ["--show-special-tokens", "--no-add-special-tokens"]
    invoke(*SHIPPED, *arguments, "--include-stop-str-in-output", "x")
    assert seen == [
        ptk.SamplingParams(
            **options, stop=("a", "b"), stop_token_ids=(3,), ignore_eos=True,
            include_stop_str_in_output=True, skip_special_tokens=False, add_special_tokens=False,
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "grammar"),
    [
        (["--json-schema", '{"type": "null"}'], ptk.Grammar.json_schema({"type": "null"})),
        (["--json-schema", "schema.json"], ptk.Grammar.json_schema({"type": "null"})),
        (["--regex", "[0-9]+"], ptk.Grammar.regex("[0-9]+")),
        (["--choice", "yes", "--choice", "no"], ptk.Grammar.choice(["yes", "no"])),
        (["--grammar", "one.lark"], ptk.Grammar.lark('start: "1"')),
    ],
)
def test_grammars_reach_the_sampling_parameters(monkeypatch, tmp_path, arguments, grammar):
    seen = []

    def read_requests(prompts, file, jsonl, params):
        seen.append(params.grammar)
        return []

    monkeypatch.setattr("proxytune_kernels.cli.generate.read_requests", read_requests)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text('{"type": "null"}')
    (tmp_path / "one.lark").write_text('start: "1"')
    invoke(*SHIPPED, *arguments, "x")
    assert seen == [grammar]


def test_a_generation_config_goes_before_defaults_and_behind_options(monkeypatch, trio):
    seen = []

    def read_requests(prompts, file, jsonl, params):
        seen.append(params)
        return []

    monkeypatch.setattr("proxytune_kernels.cli.generate.read_requests", read_requests)
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 9}
    edit(trio / "base" / "generation_config.json", **config)
    arguments = ("--trio", trio, "--generation-config", "x")
    invoke("generate", *arguments)
    # An option that has its default's value was given, too.
    invoke("generate", *arguments, "--temperature", "1", "--top-p", "0.5", "--max-tokens", "128")
    said: Any = {"filter_order": "hf", "top_k": 20}
    assert seen == [
        ptk.SamplingParams(**said, temperature=0.6, top_p=0.9, max_tokens=9),
        ptk.SamplingParams(**said, temperature=1, top_p=0.5, max_tokens=128),
    ]
    edit(trio / "base" / "generation_config.json", no_repeat_ngram_size=2)
    assert_one_sentence(invoke("generate", *arguments), 1, "no_repeat_ngram_size", "2", logs=True)


@pytest.mark.parametrize("terminal", [False, True])
def test_side_by_side_shows_the_base_alone_and_the_proxy_tuned(terminal, expected):
    env = {"FORCE_COLOR": "1", "COLUMNS": "200", "TERM": "xterm"} if terminal else {}
    result = invoke(*SHIPPED, *SAMPLED, "--format", "side-by-side", *PROMPTS, **env)
    assert result.exit_code == 0, result.output
    assert ("\x1b[" in result.stdout) == terminal
    for text in ("base alone", "proxy-tuned", *PROMPTS):
        assert text in result.stdout
    trio = ptk.load_trio("shipped", dtype="float32")
    alone = ptk.Decoder(trio, roles=("base",)).generate(PROMPTS, PARAMS)
    for request in (*alone, *expected):
        for word in request.text.split():
            assert word in result.stdout


def event(index, text, *, last=False):
    done: Any = "anything but None" if last else None
    return StreamEvent(index, index, text, (1,), (0.0,), done)


def test_texts_stream_in_the_order_of_the_prompts(capsys):
    requests = [CliRequest(p, PARAMS) for p in ("p", "q", "r")]
    shown = []

    def events():
        yield event(1, "B", last=True)
        shown.append(capsys.readouterr().out)
        yield event(0, "a")
        shown.append(capsys.readouterr().out)
        yield event(0, "A", last=True)
        shown.append(capsys.readouterr().out)
        yield event(2, "C", last=True)

    output.write_text(events(), requests)
    shown.append(capsys.readouterr().out)
    assert shown == ["==> p <==\n", "a", "A\n\n==> q <==\nB\n\n==> r <==\n", "C\n"]


def test_demo_shows_four_prompts_and_ends_with_a_summary():
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Question:") == 4
    assert result.stdout.count("base alone:") == result.stdout.count("proxy-tuned:") == 4
    assert "proxytune generate --help" in result.stdout.splitlines()[-1]


def test_info_names_backends_versions_and_the_agreement():
    result = invoke("info", "--trio", "shipped")
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["proxytune_kernels"] == ptk.__version__
    assert lines["python"] == sys.version.split()[0]
    assert "transformers" in lines["integrations"].split(", ")
    assert ("vLLM" in lines["integrations"]) == (lines["vllm"] != "not installed")
    assert result.stdout.count("backend ") == len(ptk.backends())
    assert "LlamaForCausalLM" in lines["base"]
    assert lines["vocabulary"].startswith(str(ptk.load_trio("shipped").vocab_size))


def test_info_says_how_models_are_held():
    arguments = ["--quantize", "base=int4,expert=int8", "--device-map", "anti=auto"]
    result = invoke("info", "--trio", "shipped", *arguments)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert "int4 and bfloat16 on cpu" in lines["base"]
    assert "int8 and bfloat16 on cpu" in lines["expert"]
    assert "parameters, bfloat16 on cpu" in lines["anti"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], {}),
        (["--quantize", "int8"], {"quantize": "int8"}),
        (["--quantize", "base=int8, anti=int4"], {"quantize": {"base": "int8", "anti": "int4"}}),
        (["--device-map", "auto"], {"device_map": "auto"}),
        (
            ["--device", "cpu", "--device-map", "base=auto"],
            {"device": "cpu", "device_map": {"base": "auto"}},
        ),
        (["--keep-adapter"], {"merge_adapter": False}),
        (["--runtime", "base=llama.cpp"], {"runtime": {"base": "llama.cpp"}}),
    ],
)
@pytest.mark.parametrize("command", ["generate", "info"])
def test_options_reach_load_trio(monkeypatch, command, arguments, named):
    seen = []

    def load_trio(source, **options):
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr("proxytune_kernels.cli.options.load_trio", load_trio)
    invoke(command, "--trio", "shipped", *arguments, *(["x"] if command == "generate" else []))
    unset = dict.fromkeys(("device", "device_map", "quantize", "merge_adapter", "runtime"))
    assert {name: seen[0][name] for name in unset} == {**unset, **named}


def test_info_says_what_the_default_on_cuda_comes_from(monkeypatch):
    monkeypatch.setattr("proxytune_kernels.cli.info.CHOICES", ())
    assert "default on CUDA" in (plain := invoke("info").stdout)
    assert "triton: no device was measured" in plain
    line = Choice("NVIDIA H100", "sample", (1, 9), (1, 9), "cuda", "gpu-h100.jsonl")
    monkeypatch.setattr("proxytune_kernels.cli.info.CHOICES", (line, line))
    assert "as measured on NVIDIA H100; triton on others" in invoke("info").stdout


def test_info_gives_the_reason_of_an_unusable_backend(monkeypatch):
    reasons = {"cpu": "the C++ extension is not built", "reference": None}
    monkeypatch.setattr("proxytune_kernels.cli.info.backends", lambda: reasons)
    assert "not usable: the C++ extension is not built" in invoke("info").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-p", "2"], ["top_p must be in (0, 1]", "2.0"]),
        (["--alpha", "nan"], ["alpha", "finite"]),
        (["--filter-order", "best"], ["filter_order", "'best'", "joint"]),
        (["--max-tokens", "0"], ["max_tokens", "at least 1"]),
        (["--max-batch-size", "0"], ["max_batch_size"]),
        (["--speculate", "expert", "--max-drafts", "0"], ["max_drafts must be an integer in [1, "]),
        (["--pair", "shared"], ["pair='shared' takes an expert"]),
        (["--file", "prompts.txt"], ["not both"]),
        (["--regex", "a", "--choice", "b"], ["one of --json-schema, --regex, --choice and --gra"]),
        (["--json-schema", "{"], ["json_schema must be JSON", "column 2"]),
        (["--grammar", "nowhere.lark"], ["nowhere.lark"]),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(arguments, words):
    assert_one_sentence(invoke(*SHIPPED, *arguments, "prompt"), 2, *words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "JSON object"]),
        ("[1]", ["line 2", '"prompt"']),
        ('{"prompt": "a", "topp": 1}', ["line 2", "'topp'", "top_p"]),
        ('{"prompt": "a", "top_p": 2}', ["line 2", "top_p must be in (0, 1]"]),
        ('{"prompt": "a", "alpha": "1"}', ["line 2", "alpha", "'1'"]),
        ('{"prompt": "a", "grammar": "b"}', ["line 2", "one of json_schema, regex, lark"]),
    ],
)
def test_a_wrong_json_line_is_named(line, words):
    result = invoke(*SHIPPED, "--jsonl", stdin='{"prompt": "a"}\n' + line)
    assert_one_sentence(result, 2, "standard input", *words)


def test_usage_errors_have_exit_code_2():
    assert_one_sentence(invoke("generate", "prompt"), 2, "--trio shipped")
    assert_one_sentence(invoke(*SHIPPED, stdin=" \n"), 2, "standard input holds no prompt")
    assert_fails(invoke("generate", "--no-such-option"), 2, "--no-such-option")
    assert_fails(invoke("no-such-command"), 2, "no-such-command")
    assert_fails(invoke(*SHIPPED, "--format", "xml", "prompt"), 2, "xml", "jsonl")
    only_base = ["generate", "--base", shipped_role("base"), "--tokenizer", shipped_role("")]
    assert_one_sentence(
        invoke(*only_base, "--format", "side-by-side", "prompt"), 2, "--expert and --anti"
    )


def shipped_role(role):
    return os.path.join(os.path.dirname(ptk.__file__), "data", "trio", role)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trio", "nowhere"], ["nowhere", "trio.json"]),
        (["--base", "no-such-model-here"], ["base", "no-such-model-here"]),
        (["--trio", "shipped", "--dtype", "int8"], ["dtype", "int8"]),
        (["--trio", "shipped", "--expert", "nowhere"], ["expert", "nowhere"]),
        (["--trio", "shipped", "--device", "cuda:99"], ["device", "cuda:99"]),
        (["--trio", "shipped", "--backend", "abacus"], ["backend", "abacus"]),
        (["--trio", "shipped", "--quantize", "int3"], ["quantize of base", "int8, int4", "int3"]),
        (["--trio", "shipped", "--quantize", "bass=int8"], ["--quantize", "bass=int8", "anti"]),
        (["--trio", "shipped", "--quantize", "base=int8,int4"], ["--quantize", "ROLE=VALUE"]),
        (["--trio", "shipped", "--device-map", "cuda:99"], ["device_map of base", "cuda:99"]),
        (["--trio", "shipped", "--device", "cpu", "--device-map", "auto"], ["device_map of base"]),
        (["--trio", "shipped", "--keep-adapter"], ["expert", "directory with a LoRA adapter"]),
        (["--trio", "shipped", "--max-seq-len", "8"], ["prompts[0]", "max_tokens"]),
        (["--trio", "shipped", "--file", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_what_fails_while_running_is_one_sentence(arguments, words):
    prompt = [] if "--file" in arguments else ["prompt"]
    result = invoke("generate", *arguments, *prompt)
    assert result.exit_code in (1, 2)
    assert_one_sentence(result, result.exit_code, *words)


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe")
    assert_one_sentence(invoke(*SHIPPED, "--file", str(file)), 1, "prompts.txt", "UTF-8")


def test_help_and_version_go_to_standard_output():
    assert invoke("--version").stdout == f"proxytune {ptk.__version__}\n"
    for command in ("generate", "info", "demo"):
        assert invoke(command, "--help").exit_code == 0
    assert "--include-stop-str-in-output" in invoke("generate", "--help").stdout


def start(*arguments):
    return subprocess.Popen(
        [*PROXYTUNE, *SHIPPED, "--max-tokens", "900", "--ignore-eos", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores SIGINT, and what the tests start would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_reader_that_leaves_ends_it_quietly():
    with start("prompt") as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_an_interrupt_ends_it_quietly_with_130():
    with start("prompt") as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors == b""


INTERRUPTED = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
SCRIPT = """
import sys
sys.argv[0] = "/usr/bin/proxytune"
from proxytune_kernels.cli import main
main()
"""


@pytest.mark.parametrize("module", ["torch", "typer"])
@pytest.mark.parametrize("command", [["-m", "proxytune_kernels"], ["-c", SCRIPT]])
def test_an_interrupt_while_it_starts_is_as_quiet(tmp_path, module, command):
    """While the package imports torch, and while the command line imports what it needs."""
    (tmp_path / f"{module}.py").write_text(INTERRUPTED)
    assert run_with(tmp_path, *command, "info") == (130, b"", b"")


def test_an_interrupted_import_stays_the_programs_own(tmp_path):
    (tmp_path / "torch.py").write_text(INTERRUPTED)
    _, _, errors = run_with(tmp_path, "-c", "import proxytune_kernels")
    assert errors.rstrip().endswith(b"KeyboardInterrupt")


def run_with(directory, *arguments):
    """Exit code, output and errors of Python with a directory before all others."""
    path = os.pathsep.join([str(directory), *sys.path])
    process = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        timeout=60, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize(
    ("shell", "data", "code", "words"),
    [
        ("> /dev/full", b"", 1, "No space left on device"),
        (">&-", b"", 1, ""),
        ("<&-", b"", 2, "standard input is closed"),
        ("", b"a\xff", 1, "must be UTF-8 text"),
        ("--jsonl", b'{"prompt": "\\ud800"}', 1, "prompts[0]: prompt of base must be text"),
        ("--jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", 2, "line 1 must be a JSON object"),
        ("--jsonl", b"[" * 100_000, 2, "line 1 must be a JSON object"),
        ("--jsonl", b'\n{"prompt": "x", "seed": "a"}', 2, "line 2: seed must be"),
        ("--seed " + "1" * 5000, b"", 2, "--seed"),
        ("$'a\\xff'", b"", 1, "lone surrogate"),
    ],
)
@pytest.mark.slow
def test_no_input_or_output_makes_a_traceback(shell, data, code, words):
    command = [*PROXYTUNE, *SHIPPED, "--max-tokens", "2"]
    prompt = [] if data or "<&-" in shell or shell.startswith("$") else ["hi"]
    line = f"{shlex.join([*command, *prompt])} {shell}"
    done = subprocess.run(["bash", "-c", line], input=data, capture_output=True, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False)
    assert words in done.stderr.decode()


def test_what_requests_ask_of_their_tokens(capsys, monkeypatch):
    """Options and JSON lines give the same parameters; n outputs come in order."""
    options = SamplingOptions(
        n=2, logit_bias=["5=1.5", "7=-2"], allowed_token_ids=[5, 7], bad_words=["a b"],
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, penalty_prompt=False,
    )  # fmt: skip
    params = options.params()
    assert params == SamplingParams(
        n=2, logit_bias={5: 1.5, 7: -2.0}, allowed_token_ids=(5, 7), bad_words=("a b",),
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5,
        penalty_prompt=False, max_tokens=128,
    )  # fmt: skip
    line = '{"prompt": "p", "n": 2, "logit_bias": {"5": 1.5, "7": -2}, "alpha": [1, 0.5]}'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(line.encode())))
    [request] = read_requests((), "-", True, PARAMS)
    assert request.params.logit_bias == params.logit_bias
    assert request.params.alphas == (1.0, 0.5)
    with pytest.raises(typer.Exit):
        SamplingOptions(logit_bias=["5:1"]).params()
    assert "--logit-bias must be ID=NUMBER, got '5:1'" in capsys.readouterr().err


def test_n_outputs_in_order(expected, capsys):
    ends = [replace(expected[0], index=0, sample=i, text=text) for i, text in enumerate("xy")]
    events = [StreamEvent(i, 0, end.text, (1,), (0.0,), end, i) for i, end in enumerate(ends)]
    requests = [CliRequest("p", replace(PARAMS, n=2))]
    output.write_text(events[::-1], requests)
    assert capsys.readouterr().out == "==> p <==\nx\n\n==> p <==\ny\n"
    output.write_jsonl(events[::-1], requests)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r.get("sample", 0), r["text"]) for r in records] == [(0, "x"), (1, "y")]


def test_only_a_newline_ends_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\u2028b\x0cc\x85d\r\n\n\x1ce\n".encode())
    requests = read_requests((), str(file), None, PARAMS)
    assert [r.prompt for r in requests] == ["a\u2028b\x0cc\x85d", "\x1ce"]


def test_a_terminal_gets_no_control_characters(monkeypatch, capsys, expected):
    text = "a\x1b[2J\x9b\x07\r\tb\n"
    assert printable(text) == "a\\x1b[2J\\x9b\\x07\\x0d\tb\n"
    whole = replace(expected[0], index=0, prompt=text, text=text)
    events = [StreamEvent(0, 0, text, (1,), (0.0,), whole)]
    requests = [CliRequest(text, PARAMS)]
    output.write_text(events, requests)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.write_text(events, requests)
    assert capsys.readouterr().out == printable(text) + "\n"
    output.write_jsonl(events, requests)
    line = capsys.readouterr().out
    assert json.loads(line)["text"] == text
    assert printable(line) == line


def test_without_transformers_it_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None; "
        "from proxytune_kernels.cli import main; sys.argv = ['proxytune', 'generate', "
        "'--trio', 'shipped', 'prompt']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'proxytune_kernels[hf]'" in done.stderr
    assert "Traceback" not in done.stderr
