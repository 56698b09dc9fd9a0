"""Structured output: which tokens a grammar allows next, by llguidance (the extra ``grammar``).

A grammar is compiled where a request is made, in the caller's thread, and kept. What it allows
depends on the tokens before: the host must have read them. Behind drafts it is what the grammar
allows after these drafts, so that a request's tokens do not depend on whether there were any.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import Tensor

_KINDS = ("json_schema", "regex", "lark")
_COMPILED = 64
"""Grammars that a decoder keeps compiled."""


class GrammarError(ValueError):
    """A grammar that can't be compiled here; says where and why."""


@dataclass(frozen=True)
class Grammar:
    """What the whole output of a request must be; made by the methods below.

    Args:
        kind: ``"json_schema"``, ``"regex"`` or ``"lark"``.
        text: the schema as JSON, the expression, or the grammar.

    Example:
        >>> Grammar.choice(["yes", "no"]).text
        'start: "yes" | "no"'
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {self.kind!r}")
        if not isinstance(self.text, str):
            raise TypeError(f"text must be a string, got {type(self.text).__name__}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Grammar:
        """By its kind and what the method of that name takes: ``{"regex": "[0-9]+"}``."""
        kinds = (*_KINDS, "choice")
        if not isinstance(given, Mapping) or len(given) != 1 or not set(given) <= set(kinds):
            raise ValueError(f"grammar must be an object with one of {', '.join(kinds)}")
        [(kind, value)] = given.items()
        made: Grammar = getattr(cls, kind)(value)
        return made

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any] | bool) -> Grammar:
        """A JSON value that a schema allows, written with ``", "`` and ``": "``, on one line.

        An output is sure to be whole only where the schema bounds its length, by ``maxLength``,
        ``maxItems``, ``maximum`` and ``additionalProperties``, and ``max_tokens`` leaves room.

        Args:
            schema: as JSON or as what it stands for; ``True`` is any JSON value.

        Raises:
            GrammarError: it is not JSON; says at which line and column.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except json.JSONDecodeError as error:
                raise GrammarError(f"json_schema must be JSON: {error}") from error
        if not isinstance(schema, Mapping | bool):
            raise TypeError(f"json_schema must be an object or a bool, got {schema!r:.80}")
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that a regular expression matches from its begin to its end."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Grammar:
        """One of some texts."""
        if isinstance(options, str) or not options or not all(isinstance(o, str) for o in options):
            raise ValueError(f"options must be a sequence of strings, got {options!r:.80}")
        return cls("lark", "start: " + " | ".join(json.dumps(option) for option in options))

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """A text of a grammar in Lark's EBNF, as llguidance reads it: rule ``start`` is the whole.

        Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
        """
        return cls("lark", grammar)


class GrammarState:
    """How far a request's text is in its grammar.

    Args:
        matcher: llguidance's, which nobody else moves.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._drafts = 0
        self._lost = False

    @property
    def ended(self) -> bool:
        """Whether no more can come, or a token that ends the text has."""
        return bool(self._matcher.is_stopped())

    def take(self, token_id: int) -> None:
        """Go on by a token of the output."""
        if not self._matcher.is_stopped():
            self._matcher.try_consume_tokens([token_id])

    def follow(self, token_id: int) -> None:
        """Go on by a draft, until :meth:`rewind`. Behind one that is not allowed all is."""
        self._lost = (
            self._lost
            or token_id < 0  # no draft
            or self.ended
            or not self._matcher.try_consume_tokens([token_id])
        )
        self._drafts += not self._lost

    def rewind(self) -> None:
        """Take the drafts back."""
        if self._drafts:
            self._matcher.rollback(self._drafts)
        self._drafts, self._lost = 0, False

    def fill(self, row: Tensor) -> None:
        """Write what may come next, packed, into int32 [ceil(V / 32)] on the CPU.

        None may where the text is whole, but its end; where a draft was not allowed, all may: it
        will be refused.
        """
        if self._lost:
            row.fill_(-1)
        elif self._matcher.is_error():
            row.zero_()
        else:
            self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.nbytes)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last of them.

    Args:
        tokenizer: a fast one of transformers.
        vocab_size: agreed width.
        eos_token_ids: what may end a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos = [i for i in eos_token_ids if i < vocab_size]
        self._lock = Lock()
        self._opened: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def state(self, grammar: Grammar) -> GrammarState:
        """The state before a text.

        Raises:
            GrammarError: llguidance is missing, or can't compile it; says where and why.
        """
        with self._lock:
            known = self._compiled.get(grammar)
        # Outside the lock: one that takes long holds up no other, nor the decoder.
        matcher = self._compile(grammar) if known is None else known
        with self._lock:
            self._compiled.setdefault(grammar, matcher)
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
            return GrammarState(self._compiled[grammar].deep_copy())

    def _compile(self, grammar: Grammar) -> Any:
        matcher, error = self._try(grammar)
        if not error:
            return matcher
        where = ""
        if grammar.kind == "json_schema":
            place, error = self._place(json.loads(grammar.text), "#", error)
            where = f" at {place}"
        raise GrammarError(f"grammar ({grammar.kind}){where}: {' '.join(error.split())}")

    def _try(self, grammar: Grammar) -> tuple[Any, str]:
        """What llguidance makes of it, and what it says is wrong."""
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise GrammarError(
                f"grammar needs llguidance ({error}): pip install 'proxytune_kernels[grammar]'"
            ) from error
        if self._opened is None:
            width = max(self._vocab_size, len(self._tokenizer))
            try:
                # Without an end of its own, what the tokenizer says.
                eos = self._eos or None
                self._opened = from_tokenizer(self._tokenizer, n_vocab=width, eos_token=eos)
            except ValueError as error:
                kind = type(self._tokenizer).__name__
                raise GrammarError(f"grammar can't be had with {kind}: {error}") from error
        kinds = llguidance.LLMatcher
        if grammar.kind == "json_schema":
            options: Any = {"whitespace_flexible": False}
            options |= {"item_separator": ", ", "key_separator": ": "}
            made = kinds.grammar_from_json_schema(grammar.text, defaults=options)
        elif grammar.kind == "regex":
            made = kinds.grammar_from_regex(grammar.text)
        else:
            made = kinds.grammar_from_lark(grammar.text)
        matcher = kinds(self._opened, made, log_level=0)
        return matcher, matcher.get_error()

    def _place(self, schema: Any, path: str, error: str) -> tuple[str, str]:
        """The innermost part of a schema that can't be compiled by itself, and why."""
        shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        for name, part in _parts(schema):
            given = {**shared, **part} if isinstance(part, Mapping) else part
            _, inner = self._try(Grammar("json_schema", json.dumps(given)))
            if inner:
                return self._place(given, f"{path}/{name}", inner)
        return path, error


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas that a schema is made of, by their places in it."""
    if not isinstance(schema, Mapping):
        return
    inside: Any
    for name, value in schema.items():
        if name in ("properties", "patternProperties", "$defs", "definitions"):
            inside = value.items() if isinstance(value, Mapping) else ()
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            inside = enumerate(value) if isinstance(value, list) else ()
        elif name in ("items", "additionalProperties", "additionalItems", "contains"):
            yield name, value
            continue
        else:
            continue
        yield from ((f"{name}/{key}", part) for key, part in inside)
