"""The decoder inside ``generate()``: reads a prepared call as requests, runs them, gives rows back.

:class:`ProxyTunedForCausalLM` takes this way by itself where it can; ``custom_generate=`` takes it
or raises an error that says why it can't.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from proxytune_kernels.decoder import Decoder
from proxytune_kernels.decoder.pool import DecoderPool
from proxytune_kernels.integrations.hf.cache import CACHE
from proxytune_kernels.integrations.hf.configuration import ProxyTunedConfig
from proxytune_kernels.integrations.hf.inputs import (
    OWN_ARGUMENTS,
    checked_alpha,
    prompts_of,
    unpadded,
)
from proxytune_kernels.integrations.hf.sampling import (
    Block,
    NotInOp,
    OpSampling,
    draw_seeds,
    read_processors,
)
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.vocabulary import Agreement


class NotInDecoder(ValueError):
    """Something that the decoder does not do; ``reason`` names it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"custom_generate: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Call:
    """What a ``generate()`` call asks of the decoder.

    Args:
        trio: without tokenizers.
        input_ids: int64 [B, P], the prompts as they came, padded on the left.
        prompts: of each row, role -> token ids without padding.
        params: of all rows, but for alphas and seeds.
        alphas: of each row.
        criteria: stopping criteria beside lengths and end-of-sequence tokens.
        pad_token_id: what follows in a row that ended before the longest; None if nothing can.
    """

    trio: Trio
    input_ids: Tensor
    prompts: list[dict[str, list[int]]]
    params: SamplingParams
    alphas: list[float]
    criteria: tuple[Any, ...]
    pad_token_id: int | None

    @property
    def tokens(self) -> int:
        """Tokens that a slot must hold: the last output token is not run through the models."""
        longest = max(len(token_ids) for prompt in self.prompts for token_ids in prompt.values())
        return longest + self.params.max_tokens - 1

    def seeded(self) -> list[SamplingParams]:
        """Each row's parameters; its seed is drawn now, unless it is greedy."""
        rows = len(self.prompts)
        seeds = draw_seeds(rows).tolist() if self.params.temperature else [0] * rows
        pairs = zip(self.alphas, seeds, strict=True)
        return [replace(self.params, alpha=alpha, seed=seed) for alpha, seed in pairs]

    def ends(self, row: int, token_ids: list[int]) -> bool:
        """Whether one of the criteria ends a row after these output tokens."""
        text = torch.cat([self.input_ids[row], self.input_ids.new_tensor(token_ids)])[None]
        # Without scores, as transformers calls them unless these are asked for.
        return any([bool(torch.as_tensor(c(text, None)).all()) for c in self.criteria])

    def stream(
        self, streamers: list[Any], rows: list[list[int]], running: set[int], done: int
    ) -> int:
        """Give streamers the steps that all running rows have made, [B] each, padded behind ends.

        Args:
            rows: the output tokens of each row so far.
            running: the rows that go on.
            done: steps that the streamers have; what is returned are those that they have now.
        """
        complete = min((len(rows[i]) for i in running), default=max(map(len, rows)))
        pad = self.pad_token_id or 0
        for step in range(done, complete):
            column = torch.tensor([row[step] if step < len(row) else pad for row in rows])
            for streamer in streamers:
                streamer.put(column)
        return complete

    def joined(self, rows: list[list[int]]) -> Tensor:
        """Prompts and outputs, int64 [B, L], padded behind the rows that are not the longest."""
        longest = max(map(len, rows))
        if self.pad_token_id is None and min(map(len, rows)) < longest:
            raise ValueError(
                "pad_token_id must be given where rows end at different lengths, got None"
            )
        pad = self.pad_token_id or 0
        padded = [row + [pad] * (longest - len(row)) for row in rows]
        return torch.cat([self.input_ids, self.input_ids.new_tensor(padded)], dim=1)


class EngineGenerate:
    """A ``custom_generate=`` that runs :class:`proxytune_kernels.Decoder`.

    What it honours of a ``generate()`` call: greedy decoding, temperature, top_k, top_p and min_p;
    repetition_penalty, sequence_bias and bad_words_ids of single tokens, suppress_tokens;
    min_new_tokens and max_new_tokens (or lengths), end-of-sequence tokens and all other stopping
    criteria, which see one row at a time; num_return_sequences; left-padded batches; streamers;
    ``return_dict_in_generate``; ``alpha`` and, per role, ``expert_input_ids`` and the like.
    Whatever else is asked for is refused by name. With the same ``set_seed`` its tokens are those
    of ``ProxyTunedForCausalLM.generate()``.

    The decoder is kept from call to call (:class:`~proxytune_kernels.decoder.pool.DecoderPool`):
    keep one EngineGenerate, not one a call. Calls from several threads take turns.

    Args:
        source: a :class:`proxytune_kernels.Trio`, or a :class:`ProxyTunedForCausalLM`; None is the
            one of the latter that ``generate()`` is called on.
        max_batch_size: rows that run at the same time; others wait for their turn.
        max_seq_len: tokens of prompt and output at most; None is the shortest context of the roles.
        options: of :class:`proxytune_kernels.Decoder`: speculation, pair, compile and so on.

    Example:
        >>> import proxytune_kernels as ptk
        >>> trio = ptk.load_trio("shipped")
        >>> engine = EngineGenerate(trio, speculation=ptk.Speculation())
        >>> inputs = trio.tokenizer("2 + 2 =", return_tensors="pt")
        >>> trio.base.generate(**inputs, custom_generate=engine, max_new_tokens=4).shape[0]
        1
    """

    def __init__(
        self,
        source: Trio | PreTrainedModel | None = None,
        *,
        max_batch_size: int = 16,
        max_seq_len: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(source, Trio):
            source.check_one_pair(type(self).__name__)
        if source is not None and not isinstance(source, Trio) and not _is_ours(source):
            raise TypeError(
                f"source must be a Trio, a ProxyTunedForCausalLM or None, got {source!r:.80}"
            )
        self._source = source
        self._pool = DecoderPool(max_batch_size, max_seq_len, **options)
        self._turn = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=threading.RLock())

    @property
    def decoder(self) -> Decoder | None:
        """The decoder of the last call; None before the first."""
        return self._pool.decoder

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        streamer: Any = None,
        *,
        alpha: Any = None,
        expert_input_ids: Tensor | None = None,
        expert_attention_mask: Tensor | None = None,
        anti_input_ids: Tensor | None = None,
        anti_attention_mask: Tensor | None = None,
        stream_to: Any = None,
        tokenizer: Any = None,
        assistant_model: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What ``generate()`` calls.

        Args:
            alpha: a number or one per prompt; None is the model's own, 1 for a trio.
            expert_input_ids, expert_attention_mask, anti_input_ids, anti_attention_mask: int64
                [B, P], a role's own prompts.
            stream_to: a streamer; on a model that is not ours transformers keeps ``streamer=`` back
                from a ``custom_generate``, after giving it the prompt.

        Raises:
            NotInDecoder: names what the decoder does not do.
        """
        if assistant_model is not None:
            raise NotInDecoder(
                "assistant_model: the decoder drafts with EngineGenerate(speculation=...)"
            )
        # What generate() knows it has repeated for num_return_sequences; these it has not seen.
        repeats = generation_config.num_return_sequences
        own = {
            "expert_input_ids": expert_input_ids,
            "expert_attention_mask": expert_attention_mask,
            "anti_input_ids": anti_input_ids,
            "anti_attention_mask": anti_attention_mask,
            "alpha": None if alpha is None else checked_alpha(alpha, len(input_ids) // repeats),
        }
        for name, value in own.items():
            if isinstance(value, Tensor):
                own[name] = value.repeat_interleave(repeats, 0)
        call = self.read(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            **own,
            **model_kwargs,
        )
        if stream_to is not None:
            stream_to.put(input_ids.cpu())
        decoder = self.decoder_for(call)
        if _is_ours(model):
            model.notes |= notes(decoder, ", by custom_generate")
        return self.run(decoder, call, generation_config, streamer, stream_to)

    def read(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        *,
        alpha: Any = None,
        **model_kwargs: Any,
    ) -> Call:
        """Read what ``generate()`` prepared. Nothing runs, and nothing is drawn.

        Args:
            input_ids: int64 [B, P], padded on the left.
            alpha: a number, or one per row; None is the model's own.
            model_kwargs: what else the model would get; a role's own prompts, [B, ...], among it.

        Raises:
            NotInDecoder: names what the decoder does not do.
            ValueError, TypeError: alpha or a role's prompt is out of shape.
        """
        trio, own_alpha = self._trio_of(model)
        _check_config(generation_config)
        _check_model_kwargs(model_kwargs)
        rows, width = input_ids.shape
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
        _check_positions(model_kwargs.get("position_ids"), mask)
        token_ids = dict.fromkeys(trio.roles, _unpadded("attention_mask", input_ids, mask))
        for role, prompt in prompts_of(model_kwargs, rows).items():
            if role in token_ids:  # a base alone reads no others
                token_ids[role] = _unpadded(f"{role}_attention_mask", *prompt)
        strength = checked_alpha(own_alpha if alpha is None else alpha, rows)
        max_length, eos_token_ids, criteria = _sorted_criteria(stopping_criteria)
        sampling = _sampling(logits_processor, generation_config.do_sample)
        penalty_prompt = _counts_prompt(sampling, mask)
        never = {i for b in sampling.blocks if _always(b) for i in b.token_ids}
        min_lengths = [
            _min_length(block, eos_token_ids) for block in sampling.blocks if not _always(block)
        ]
        max_tokens = max(1, (max_length or generation_config.max_length) - width)
        params = SamplingParams(
            **sampling.filters,
            logit_bias=sampling.bias,
            # Those past the vocabulary are never drawn.
            bad_words=[[i] for i in sorted(never) if i < trio.vocab_size],
            repetition_penalty=sampling.repetition_penalty,
            penalty_prompt=penalty_prompt,
            max_tokens=max_tokens,
            min_tokens=min(max([width, *min_lengths]) - width, max_tokens),
            stop_token_ids=sorted(i for i in eos_token_ids if i < trio.vocab_size),
            ignore_eos=True,
        )
        pad = generation_config._pad_token_tensor
        return Call(
            trio,
            input_ids,
            [{role: each[i] for role, each in token_ids.items()} for i in range(rows)],
            params,
            strength.tolist() if isinstance(strength, Tensor) else [strength] * rows,
            criteria,
            None if pad is None else int(pad),
        )

    def decoder_for(self, call: Call) -> Decoder:
        """The decoder to run a call; errors as in :meth:`DecoderPool.decoder_for`."""
        with self._turn:
            return self._pool.decoder_for(call.trio, len(call.prompts), call.tokens)

    def run(self, decoder: Decoder, call: Call, generation_config: Any, *streamers: Any) -> Any:
        """Decode a call; what ``generate()`` gives back."""
        rows: list[list[int]] = [[] for _ in call.prompts]
        running = set(range(len(rows)))
        steps = 0
        given = [streamer for streamer in streamers if streamer is not None]
        with self._turn:
            events: Any = decoder.stream(call.prompts, call.seeded())
            with closing(events):
                for event in events:
                    i, row = event.index, rows[event.index]
                    if i not in running:
                        continue  # was on its way when one of the criteria ended the row
                    for token_id in event.token_ids:
                        row.append(token_id)
                        if call.criteria and call.ends(i, row):
                            decoder.cancel(event.request_id)
                            running.discard(i)
                            break
                    if event.output is not None:
                        running.discard(i)
                    if given:
                        steps = call.stream(given, rows, running, steps)
        for streamer in given:
            streamer.end()
        sequences = call.joined(rows)
        if not generation_config.return_dict_in_generate:
            return sequences
        result: Any = GenerateDecoderOnlyOutput
        return result(sequences=sequences)

    def _trio_of(self, model: Any) -> tuple[Trio, float]:
        """The trio to decode, and how strongly it steers where a call says nothing."""
        source: Any = model if self._source is None else self._source
        if isinstance(source, Trio):
            if model is not source.base and getattr(model, "base", None) is not source.base:
                raise NotInDecoder(
                    "generate() must be called on the base of the trio that it is given"
                )
            return _textless(source.models, source.vocab_size), 1.0
        if not _is_ours(source):
            raise NotInDecoder(
                f"EngineGenerate() needs a trio to steer a {type(model).__name__}: give it one"
            )
        if model is not source and model is not source.base:
            raise NotInDecoder(
                "generate() must be called on the model that it is given, or its base"
            )
        return _textless(source.models, source.config.vocab_size), source.alpha


def engine_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A ``custom_generate=`` for a model of ours: its own :class:`EngineGenerate`.

    ``generate()`` takes the same way by itself where it can; this one never takes another.

    Example:
        >>> import proxytune_kernels as ptk
        >>> from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
        >>> model = ProxyTunedForCausalLM.from_trio(ptk.load_trio("shipped"))
        >>> inputs = model.tokenize("2 + 2 =")
        >>> model.generate(**inputs, custom_generate=engine_generate, max_new_tokens=4).shape[0]
        1
    """
    if not _is_ours(model):
        raise NotInDecoder(
            f"engine_generate needs a ProxyTunedForCausalLM, got {type(model).__name__}: "
            "EngineGenerate(trio) steers any base"
        )
    return model.engine(model, *args, **kwargs)


# By its names generate() finds out what to pass on.
engine_generate.__signature__ = inspect.signature(EngineGenerate())  # type: ignore[attr-defined]


def notes(decoder: Decoder, how: str = "") -> dict[str, str]:
    """What a model says of a call that the decoder ran, for its ``info()``."""
    return {
        "cache": f"the decoder's, the pair {decoder.info()['pair']}",
        "sampling": f"proxytune_kernels.Decoder{how}",
    }


class _NoText:
    """In place of tokenizers: nobody here asks for text."""

    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def convert_ids_to_tokens(self, token_id: int) -> str:
        """Nothing."""
        return ""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Nothing."""
        return ""


def _textless(models: Mapping[str, Any], vocab_size: int) -> Trio:
    """A trio whose prompts are token ids; each call names its end-of-sequence tokens."""
    return Trio(
        models,
        dict.fromkeys(models, _NoText()),
        dict.fromkeys(models, "plain"),
        Agreement(vocab_size, ()),
        (),
    )


def _is_ours(model: Any) -> bool:
    """Whether it is a :class:`ProxyTunedForCausalLM`, whose module imports this one."""
    return isinstance(getattr(model, "config", None), ProxyTunedConfig)


def _sorted_criteria(criteria: Iterable[Any]) -> tuple[int | None, set[int], tuple[Any, ...]]:
    """Of stopping criteria the least length, all end-of-sequence tokens, and the other ones."""
    lengths, eos_token_ids, others = [], set[int](), []
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            eos_token_ids.update(criterion.eos_token_id.tolist())
        elif type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        else:
            others.append(criterion)
    return min(lengths, default=None), eos_token_ids, tuple(others)


def _sampling(logits_processor: Any, do_sample: bool) -> OpSampling:
    try:
        return read_processors(logits_processor, do_sample=do_sample, knows_text=True)
    except NotInOp as reason:
        raise NotInDecoder(str(reason)) from reason


def _counts_prompt(sampling: OpSampling, mask: Tensor) -> bool:
    """Whether prompts [B, P] count for the repetition penalty: without padding, or not at all."""
    rows, width = mask.shape
    ignored = sampling.ignored if sampling.ignored is not None else 0
    start = torch.as_tensor(ignored, device=mask.device).expand(rows)
    if sampling.repetition_penalty == 1 or torch.equal(start, (mask == 0).sum(1)):
        return True
    if not bool((start == width).all()):
        raise NotInDecoder("repetition_penalty of a part of the prompt is not in the decoder")
    return False


def _always(block: Block) -> bool:
    """Whether its tokens can't be drawn at any length."""
    return block == Block(block.option, block.token_ids)


def _min_length(block: Block, eos_token_ids: set[int]) -> int:
    """The length up to which a block holds back just the tokens that end a row."""
    if block.option not in ("min_length", "min_new_tokens"):
        raise NotInDecoder(f"{block.option} is not in the decoder")
    if block.token_ids != eos_token_ids:
        raise NotInDecoder(
            f"{block.option} of other tokens than those that end a row is not in the decoder"
        )
    return block.stop


def _unpadded(name: str, input_ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Token ids of each row, int64 [B, P], without the padding on its left."""
    if mask.shape != input_ids.shape or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise NotInDecoder(f"{name} must be {list(input_ids.shape)} with padding on the left alone")
    return unpadded(input_ids, mask)


def _check_positions(position_ids: Tensor | None, mask: Tensor) -> None:
    if position_ids is None:
        return
    counted = mask.long().cumsum(-1) - 1
    given = position_ids.to(mask.device)
    if given.shape[-1] != mask.shape[-1] or bool((given != counted)[mask != 0].any()):
        raise NotInDecoder(
            "position_ids other than the attention mask counts are not in the decoder"
        )


def _check_config(config: Any) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotInDecoder(
            f"generation mode {mode.value} is not in the decoder"
            + (" (it drafts with EngineGenerate(speculation=...))" if "assisted" in mode else "")
        )
    if not config.use_cache:
        raise NotInDecoder("use_cache False is not in the decoder")
    if config.cache_implementation not in (None, "dynamic"):
        raise NotInDecoder(
            f"cache_implementation {config.cache_implementation!r}: the decoder has a cache of its "
            "own"
        )
    kept = ["output_scores", "output_logits"] if config.return_dict_in_generate else []
    for name in (*kept, "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise NotInDecoder(f"{name} is not in the decoder")
    for name, instead in (("prefill_chunk_size", "prefill_chunk"), ("compile_config", "compile")):
        if getattr(config, name) is not None:
            raise NotInDecoder(f"{name}: give {instead} to EngineGenerate")


_READ = ("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep",
         "output_attentions", "output_hidden_states", *OWN_ARGUMENTS)  # fmt: skip


def _check_model_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    cache = model_kwargs.get(CACHE)
    if cache is not None and cache.get_seq_length():
        raise NotInDecoder("past_key_values with tokens in it: the decoder has a cache of its own")
    for name, value in model_kwargs.items():
        if name not in _READ and value is not None:
            raise NotInDecoder(f"{name} is not in the decoder")
