"""Structured output: which tokens a grammar allows next (the extra ``grammar``).

A grammar is compiled where a request is made, in the caller's thread, and kept. What it allows
depends on the tokens before: the host must have read them. Behind drafts it is what the grammar
allows after these drafts, so that a request's tokens do not depend on whether there were any.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

from torch import Tensor

from proxytune_kernels.params import mask_without

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
        matcher: of its own.
    """

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self._drafts = 0
        self._lost = False

    @property
    def ended(self) -> bool:
        """Whether no more can come, or a token that ends the text has."""
        return self._matcher.stopped

    def take(self, token_id: int) -> None:
        """Go on by a token of the output."""
        if not self.ended:
            self._matcher.accept(token_id)

    def follow(self, token_id: int) -> None:
        """Go on by a draft, until :meth:`rewind`. Behind one that is not allowed all is."""
        self._lost = (
            self._lost
            or token_id < 0  # no draft
            or self.ended
            or not self._matcher.accept(token_id)
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
        else:
            self._matcher.fill(row)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last of them.

    Args:
        tokenizer: a fast one of transformers.
        vocab_size: agreed width.
        eos_token_ids: what may end a text.
        backend: one of :data:`BACKENDS`.

    Raises:
        ValueError: another backend.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int],
        backend: str = "llguidance",
    ) -> None:  # fmt: skip
        if backend not in BACKENDS:
            raise ValueError(
                f"grammar_backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        self._backend = backend
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos = [i for i in eos_token_ids if i < vocab_size]
        self._lock = Lock()
        self._opened: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def state(self, grammar: Grammar) -> GrammarState:
        """The state before a text.

        Raises:
            GrammarError: the backend is missing, or can't compile it; says where and why.
        """
        with self._lock:
            known = self._compiled.get(grammar)
        # Outside the lock: one that takes long holds up no other, nor the decoder.
        compiled = self._compile(grammar) if known is None else known
        with self._lock:
            self._compiled.setdefault(grammar, compiled)
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
            return GrammarState(self._opened.matcher(self._compiled[grammar]))

    def _compile(self, grammar: Grammar) -> Any:
        compiled, error = self._try(grammar)
        if not error:
            return compiled
        where = ""
        if grammar.kind == "json_schema":
            place, error = self._place(json.loads(grammar.text), "#", error)
            where = f" at {place}"
        raise GrammarError(f"grammar ({grammar.kind}){where}: {' '.join(error.split())}")

    def _try(self, grammar: Grammar) -> tuple[Any, str]:
        """What the backend makes of it, and what it says is wrong."""
        if self._opened is None:
            width = max(self._vocab_size, len(self._tokenizer))
            try:
                self._opened = BACKENDS[self._backend](self._tokenizer, width, self._eos)
            except ImportError as error:
                raise GrammarError(
                    f"grammar needs {self._backend} ({error}): "
                    "pip install 'proxytune_kernels[grammar]'"
                ) from error
            except ValueError as error:
                kind = type(self._tokenizer).__name__
                raise GrammarError(f"grammar can't be had with {kind}: {error}") from error
        try:
            compiled: tuple[Any, str] = self._opened.compile(grammar)
        except (RuntimeError, ValueError) as error:
            return None, str(error) or type(error).__name__
        return compiled

    def _place(self, schema: Any, path: str, error: str) -> tuple[str, str]:
        """The innermost part of a schema that can't be compiled by itself, and why."""
        shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        for name, part in _parts(schema):
            given = {**shared, **part} if isinstance(part, Mapping) else part
            _, inner = self._try(Grammar("json_schema", json.dumps(given)))
            if inner:
                return self._place(given, f"{path}/{name}", inner)
        return path, error


class Matcher(Protocol):
    """A text within a grammar, as a backend follows it."""

    @property
    def stopped(self) -> bool:
        """Whether no more can come, or a token that ends the text has."""

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False, and nothing else, where it is not allowed."""

    def rollback(self, count: int) -> None:
        """Take the last tokens back."""

    def fill(self, row: Tensor) -> None:
        """Write what may come next: :meth:`GrammarState.fill`."""


class _LLGuidance:
    def __init__(self, tokenizer: Any, width: int, eos: Sequence[int]) -> None:
        import llguidance
        from llguidance.hf import from_tokenizer

        self._kinds = llguidance.LLMatcher
        # Without an end of its own, what the tokenizer says.
        self._tokens = from_tokenizer(tokenizer, n_vocab=width, eos_token=[*eos] or None)

    def compile(self, grammar: Grammar) -> tuple[Any, str]:
        if grammar.kind == "json_schema":
            options: Any = {"whitespace_flexible": False}
            options |= {"item_separator": ", ", "key_separator": ": "}
            made = self._kinds.grammar_from_json_schema(grammar.text, defaults=options)
        elif grammar.kind == "regex":
            made = self._kinds.grammar_from_regex(grammar.text)
        else:
            made = self._kinds.grammar_from_lark(grammar.text)
        matcher = self._kinds(self._tokens, made, log_level=0)
        return matcher, matcher.get_error()

    def matcher(self, compiled: Any) -> Matcher:
        return _LLMatcher(compiled.deep_copy())


class _LLMatcher:
    def __init__(self, own: Any) -> None:
        self._own = own
        self.rollback = own.rollback

    @property
    def stopped(self) -> bool:
        return bool(self._own.is_stopped())

    def accept(self, token_id: int) -> bool:
        return bool(self._own.try_consume_tokens([token_id]))

    def fill(self, row: Tensor) -> None:
        if self._own.is_error():
            row.zero_()
        else:
            self._own.unsafe_compute_mask_ptr(row.data_ptr(), row.nbytes)


class _XGrammar:
    def __init__(self, tokenizer: Any, width: int, eos: Sequence[int]) -> None:
        import xgrammar

        self._new = xgrammar.GrammarMatcher
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=width, stop_token_ids=[*eos] or None
        )
        self._row = xgrammar.allocate_token_bitmask(1, width)
        self._others = mask_without(info.stop_token_ids, width)
        self._ends = mask_without((), width) & ~self._others
        # One thread, beside the steps of others; what is kept is kept by GrammarCompiler.
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, grammar: Grammar) -> tuple[Any, str]:
        ignored = _ignored(grammar.text) if grammar.kind == "regex" else ""
        if grammar.kind == "json_schema":
            ignored = _ignored_in(json.loads(grammar.text))
        if ignored:
            return None, f"{ignored} is not in xgrammar"
        if grammar.kind == "json_schema":
            options: Any = {"any_whitespace": False, "strict_mode": False}
            return self._compiler.compile_json_schema(grammar.text, **options), ""
        return getattr(self._compiler, f"compile_{grammar.kind}")(grammar.text), ""

    def matcher(self, compiled: Any) -> Matcher:
        return _XMatcher(self._new(compiled), self._row.clone(), self._ends, self._others)


_KEYWORDS = frozenset(
    "$schema $id $ref $defs definitions $comment title description default examples deprecated "
    "type enum const anyOf properties required additionalProperties items prefixItems minItems "
    "maxItems minimum maximum exclusiveMinimum exclusiveMaximum minLength maxLength pattern".split()
)
"""What xgrammar sees in a schema; others it passes over in silence."""

_ANCHOR = re.compile(r"\(\?[=!<]|(?<![\\\[])[\^$]")


def _ignored(pattern: str) -> str:
    """What xgrammar would pass over in an expression; empty if nothing."""
    found = _ANCHOR.search(pattern.removeprefix("^").removesuffix("$"))
    return f"{found[0]} within an expression" if found else ""


def _ignored_in(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return ""
    for keyword in schema.keys() - _KEYWORDS:
        return f"the keyword {keyword}"
    if "pattern" in schema and schema.keys() & {"minLength", "maxLength"}:
        return "a pattern beside minLength or maxLength"
    parts = (_ignored_in(part) for _, part in _parts(schema))
    return _ignored(str(schema.get("pattern", ""))) or next(filter(None, parts), "")


class _XMatcher:
    def __init__(self, own: Any, row: Tensor, ends: Tensor, others: Tensor) -> None:
        self._own, self._row, self._ends, self._others = own, row, ends, others
        self.accept, self.rollback = own.accept_token, own.rollback

    @property
    def stopped(self) -> bool:
        if self._own.is_terminated() or not self._own.is_completed():
            return bool(self._own.is_terminated())
        self._own.fill_next_token_bitmask(self._row)
        return not bool((self._row[0] & self._others).any())

    def fill(self, row: Tensor) -> None:
        if self._own.is_terminated():
            row.copy_(self._ends[: len(row)])
        else:
            self._own.fill_next_token_bitmask(self._row)
            row.copy_(self._row[0, : len(row)])


BACKENDS: Mapping[str, Any] = {"llguidance": _LLGuidance, "xgrammar": _XGrammar}
"""What compiles and follows grammars, by name."""


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
