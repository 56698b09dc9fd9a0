"""Structured output: what comes is of the grammar, and a seed's tokens are the same with drafts.

``GRAMMAR_SEEDS=500 python -m pytest tests/decoder/test_grammar.py -k schemas`` tries more seeds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from threading import Event
from typing import Any

import pytest
import torch

from proxytune_kernels.decoder import Decoder, Grammar, GrammarError, Speculation
from proxytune_kernels.decoder.grammar import GrammarCompiler
from proxytune_kernels.params import SamplingParams
from tests.decoder.conftest import word_tokenizer
from tests.decoder.tape import make_decoder

pytest.importorskip("llguidance", reason="llguidance is not installed (the extra grammar)")

SEEDS = int(os.environ.get("GRAMMAR_SEEDS", "2"))
DIGIT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 9}
SHORT: dict[str, Any] = {"type": "string", "maxLength": 4, "pattern": "^[a-z]*$"}


def an_object(**properties: Any) -> dict[str, Any]:
    closed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}


def array(items: Any, low: int, high: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


LEAVES: list[dict[str, Any]] = [
    DIGIT,
    {"type": "integer", "minimum": -20, "maximum": 120},
    {"type": "integer", "minimum": 1000, "maximum": 1009},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 3, None]},
    {"const": {"a": [1, "x"]}},
    SHORT,
    {"type": "string", "pattern": "^[A-F]{2}-[0-9]{3}$"},
    {"anyOf": [DIGIT, {"type": "null"}]},
]
SCHEMAS = [
    *LEAVES,
    *(an_object(a=leaf, b={"type": "boolean"}) for leaf in LEAVES),
    *(array(leaf, 1, 3) for leaf in LEAVES[:6]),
    an_object(x=an_object(y=array(an_object(z=DIGIT), 0, 2))),
    {**an_object(a=DIGIT, b=SHORT), "required": ["b"]},
    {"$defs": {"d": DIGIT}, **an_object(p={"$ref": "#/$defs/d"}, q={"$ref": "#/$defs/d"})},
    {"anyOf": [an_object(a=DIGIT), array(DIGIT, 2, 2)]},
]


def errors(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a value, by the keywords above."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    kinds: dict[str, Any] = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
        "integer": int,
    }  # fmt: skip
    if "type" in schema and type(value) is not kinds[schema["type"]]:
        yield f"{value!r} is no {schema['type']}"
        return
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{value!r} is another"
    if "anyOf" in schema and all(any(errors(value, s, root)) for s in schema["anyOf"]):
        yield f"{value!r} is none of them"
    if isinstance(value, dict) and "properties" in schema:
        if not set(schema["required"]) <= set(value) <= set(schema["properties"]):
            yield f"{value!r} has other keys"
        for name in set(value) & set(schema["properties"]):
            yield from errors(value[name], schema["properties"][name], root)
    if isinstance(value, list) and "items" in schema:
        if not schema["minItems"] <= len(value) <= schema["maxItems"]:
            yield f"{value!r} has another length"
        for item in value:
            yield from errors(item, schema["items"], root)
    if isinstance(value, str):
        if len(value) > schema.get("maxLength", len(value)):
            yield f"{value!r} is too long"
        if not re.search(schema.get("pattern", ""), value):
            yield f"{value!r} does not match"
    low, high = schema.get("minimum", value), schema.get("maximum", value)
    if type(value) is int and not low <= value <= high:
        yield f"{value!r} is out of its range"


def parts(schema: Any) -> list[Any]:
    """A schema, and the ones that its properties and items have."""
    if not isinstance(schema, dict):
        return []
    inner = [*schema.get("properties", {}).values(), schema.get("items")]
    return [schema, *(part for each in inner for part in parts(each))]


def params(grammar: Grammar | None, seed: int, **given: Any) -> SamplingParams:
    return SamplingParams(**{"grammar": grammar, "seed": seed, "max_tokens": 90, **given})


BACKENDS = ["llguidance", "xgrammar"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed (extra grammar)")
    return request.param


def test_schemas_of_bounded_length(near, backend):
    """30 of them, at temperatures that make unlikely tokens likely."""
    assert len(SCHEMAS) == 30
    # xgrammar does not bound the length beside a pattern.
    schemas = SCHEMAS if backend == "llguidance" else [s for s in SCHEMAS if SHORT not in parts(s)]
    decoder = Decoder(
        near, 16, 128, speculation=Speculation(max_drafts=3, adaptive=False),
        grammar_backend=backend,
    )  # fmt: skip
    asked = [
        params(Grammar.json_schema(schema), seed, temperature=1.0 + seed % 3)
        for seed in range(SEEDS)
        for schema in schemas
    ]
    for i, output in enumerate(decoder.generate([[5, 6, 7]] * len(asked), asked)):
        schema = schemas[i % len(schemas)]
        assert output.finish_reason == "stop", (schema, output.text)
        assert not list(errors(json.loads(output.text), schema, schema)), (schema, output.text)


GRAMMARS = [
    Grammar.json_schema(SCHEMAS[26]),
    Grammar.regex("([a-c]{2},){1,4}[0-9]"),
    Grammar.choice(["yes", "no", 'a "third"\n']),
    Grammar.lark('start: item ("+" item)*\nitem: /[0-9]{1,3}/ | "(" start ")"'),
]
SPECULATIONS: dict[str, Any] = {
    "coupled": {"speculation": Speculation(max_drafts=3, adaptive=False)},
    "lookup": {"speculation": Speculation(drafter="prompt_lookup", max_drafts=4, adaptive=False)},
    "captured": {"taped": True, "ahead": 1},
    "captured-drafts": {
        "taped": True, "ahead": 1, "speculation": Speculation(max_drafts=2, adaptive=False),
    },
}  # fmt: skip


@pytest.mark.parametrize("way", SPECULATIONS)
def test_tokens_equal_plain_decodings(near, monkeypatch, way):
    """Beside requests without a grammar, in slots that are refilled; min_tokens beside one."""
    asked = [
        params([*GRAMMARS, None][i % 5], i, temperature=i % 4 / 2, max_tokens=24, min_tokens=i % 2)
        for i in range(15)
    ]
    prompts = [[5 + i % 3, 6, 7, 5 + i % 3, 6] for i in range(15)]
    wanted = make_decoder(monkeypatch, near, 4).generate(prompts, asked)
    decoder = make_decoder(monkeypatch, near, 4, **SPECULATIONS[way])
    for output, other in zip(decoder.generate(prompts, asked), wanted, strict=True):
        assert output.token_ids == other.token_ids, output.index
        assert (output.text, output.finish_reason) == (other.text, other.finish_reason)
    if "speculation" in SPECULATIONS[way]:
        assert decoder.statistics()["accepted"] > 0
    if "taped" in SPECULATIONS[way]:
        # Rounds that a grammar follows are not tried.
        assert not decoder.info()["graphs"].startswith("none")
    if way == "captured":
        assert decoder.info()["graphs"].endswith("captured")


def test_a_drafter_draws_what_the_grammar_allows_there(trios):
    """Three equal models: each draft is the target's own draw, at each place of a round."""
    speculation = Speculation(max_drafts=4, adaptive=False)
    decoder = Decoder(trios["same"], 2, 128, speculation=speculation)
    decoder.generate([[5, 6, 7]] * 4, [params(GRAMMARS[i], i) for i in range(4)])
    assert decoder.statistics()["accepted"] == decoder.statistics()["drafted"] > 20


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_texts_are_of_their_grammar(near, mode, backend):
    speculation = Speculation(max_drafts=3, adaptive=False, mode=mode)
    asked = [params(GRAMMARS[i % 3], i, ignore_eos=i % 2 == 0) for i in range(12)]
    decoder = Decoder(near, 4, 128, speculation=speculation, grammar_backend=backend)
    for i, output in enumerate(decoder.generate([[5, 6, 7]] * 12, asked)):
        assert output.finish_reason == "stop"
        if i % 3 == 0:
            assert not list(errors(json.loads(output.text), SCHEMAS[26], SCHEMAS[26]))
        elif i % 3 == 1:
            assert re.fullmatch("([a-c]{2},){1,4}[0-9]", output.text)
        else:
            assert output.text in ("yes", "no", 'a "third"\n')


def test_backends_allow_the_same_tokens_behind_drafts_that_are_taken_back(near):
    for grammar in GRAMMARS:
        states = []
        for name in BACKENDS:
            pytest.importorskip(name, reason=f"{name} is not installed (extra grammar)")
            ids = near.tokenizer, near.vocab_size, near.eos_token_ids
            states.append(GrammarCompiler(*ids, name).state(grammar))
        rng, rows = Random(3), torch.zeros(2, -(-near.vocab_size // 32), dtype=torch.int32)
        for _ in range(40):
            for place in range(3):
                for state, row in zip(states, rows, strict=True):
                    state.fill(row)
                assert torch.equal(*rows) and states[0].ended == states[1].ended
                can = [i for i in range(near.vocab_size) if rows[0, i >> 5] >> (i & 31) & 1]
                # A draft that can come, one that can't, and one behind it.
                draft = rng.choice(can) if can and place < 1 else rng.randrange(near.vocab_size)
                for state in states:
                    state.follow(draft)
            for state in states:
                state.rewind()
            states[0].fill(rows[0])
            can = [i for i in range(near.vocab_size) if rows[0, i >> 5] >> (i & 31) & 1]
            if states[0].ended or not can:
                break
            token_id = rng.choice(can)
            for state in states:
                state.take(token_id)
        assert states[0].ended and states[1].ended


def test_what_xgrammar_would_ignore_is_refused(near):
    pytest.importorskip("xgrammar", reason="xgrammar is not installed (the extra grammar)")
    compiler = GrammarCompiler(near.tokenizer, near.vocab_size, near.eos_token_ids, "xgrammar")
    for grammar, said in (
        (Grammar.json_schema(an_object(a=SHORT)), "at #/properties/a: a pattern beside minL"),
        (Grammar.json_schema({"items": {"not": DIGIT}}), "at #/items: the keyword not is not in"),
        (Grammar.json_schema(an_object(a={"type": "strin"})), "at #/properties/a: .*strin"),
        (Grammar.regex("a(?=b)"), r"\(\?= within an expression"),
        (Grammar.regex("(a"), r"\(regex\): "),
        (Grammar.lark("start: other"), r"\(lark\): .*other"),
    ):
        with pytest.raises(GrammarError, match=said):
            compiler.state(grammar)
    with pytest.raises(ValueError, match="grammar_backend must be one of llguidance, xgrammar"):
        GrammarCompiler(near.tokenizer, near.vocab_size, [], "outlines")


def test_an_optional_end_is_an_end_of_sequence(near, backend):
    """Where more may come, the end is drawn, not before min_tokens; it counts if ignored, too."""
    most = Grammar.regex("a{0,60}")
    lengths = []
    for least in (0, 6):
        asked = [
            params(most, i, ignore_eos=i % 2 == 1, temperature=99.0, min_tokens=least)
            for i in range(8)
        ]
        decoder = Decoder(near, 4, grammar_backend=backend)
        for output in decoder.generate([[5, 6]] * 8, asked):
            assert output.finish_reason == "stop" and set(output.text) <= {"a"}
            assert len(output.text) == 60 or output.token_ids[-1] == near.tokenizer.eos_token_id
            lengths.append(len(output.text))
    # An end that is ignored is one token of the least.
    assert min(lengths[:8]) < 3 and min(lengths[8::2]) >= 6


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar.json_schema(an_object(a={"type": "strin"})), "at #/properties/a: .*strin"),
        (
            Grammar.json_schema({"anyOf": [DIGIT, array(an_object(b={"not": {}}), 0, 1)]}),
            r"at #/anyOf/1/items/properties/b: .*\bnot\b",
        ),
        (Grammar.json_schema({**DIGIT, "minimum": 10}), "at #: .*10.* is greater"),
        (Grammar.regex("(a"), r"\(regex\): .*unclosed group"),
        (Grammar.lark("start: other"), r"\(lark\): at 1\(8\): unknown name"),
    ],
    ids=["type", "deep", "range", "regex", "lark"],
)
def test_an_error_names_the_place(near, grammar, said):
    with pytest.raises(GrammarError, match=rf"prompts\[0\]: grammar .*{said}"):
        Decoder(near, 1, check=False).generate([[5]], params(grammar, 0))


def test_a_tokenizer_that_has_no_bytes():
    with pytest.raises(GrammarError, match="grammar can't be had with TokenizersBackend: "):
        GrammarCompiler(word_tokenizer(64), 64, []).state(GRAMMARS[1])


def test_what_is_no_grammar():
    with pytest.raises(GrammarError, match="must be JSON: .* line 1 column 2"):
        Grammar.json_schema("{")
    for options in ("ab", [], [1]):
        with pytest.raises(ValueError, match="options must be a sequence of strings"):
            Grammar.choice(options)  # type: ignore[arg-type]


def test_a_grammar_is_compiled_once(near, monkeypatch):
    """And where the request is made: no step of others waits for it."""
    decoder = Decoder(near, 2, check=False)
    compiled = []
    compile_ = GrammarCompiler._compile

    def counted(compiler: GrammarCompiler, grammar: Grammar) -> Any:
        assert decoder._turns.free
        compiled.append(grammar)
        return compile_(compiler, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", counted)
    for grammar in (GRAMMARS[1], Grammar.regex(GRAMMARS[1].text), GRAMMARS[2], GRAMMARS[1]):
        decoder.generate([[5, 6]], params(grammar, 1))
    assert compiled == [GRAMMARS[1], GRAMMARS[2]]


def test_a_slow_compile_holds_up_no_other(near, monkeypatch):
    begun, free = Event(), Event()
    compile_ = GrammarCompiler._compile
    slow, other = Grammar.regex("slow[0-9]"), Grammar.regex("other[0-9]")

    def held(compiler: GrammarCompiler, grammar: Grammar) -> Any:
        if grammar == slow:
            begun.set()
            assert free.wait(60)
        return compile_(compiler, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", held)
    decoder = Decoder(near, max_batch_size=1)
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(decoder.compile_grammar, slow)
        assert begun.wait(60)
        try:
            pool.submit(decoder.compile_grammar, other).result(20)
        finally:
            free.set()
        waits.result(60)
