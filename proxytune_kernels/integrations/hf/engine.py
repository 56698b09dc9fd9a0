"""Our decoder inside ``model.generate(..., custom_generate=...)``."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from proxytune_kernels.decoder import Decoder, arguments
from proxytune_kernels.decoder.graphs import power_of_two
from proxytune_kernels.integrations.hf.modeling import ProxyTunedForCausalLM
from proxytune_kernels.integrations.hf.requests import Call, Refused, read_call
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.vocabulary import Agreement

_FEWEST_TOKENS = 256


class EngineGenerate:
    """A ``custom_generate=`` that runs :class:`proxytune_kernels.Decoder`.

    What it honours of a ``generate()`` call: greedy decoding, temperature, top_k, top_p and min_p;
    min_new_tokens and max_new_tokens (or lengths), end-of-sequence tokens and all other stopping
    criteria, which see one row at a time; num_return_sequences; left-padded batches; a streamer for
    one row; ``return_dict_in_generate``; ``alpha`` and, per role, ``expert_input_ids`` and the
    like. Whatever else is asked for is refused by name. With the same ``set_seed`` its tokens are
    those of ``generate()`` without it.

    The decoder is kept from call to call, and made anew where a call needs more rows or tokens
    than it has room for: keep one EngineGenerate, not one a call.

    Args:
        source: a :class:`proxytune_kernels.Trio`, or a :class:`ProxyTunedForCausalLM`; None is the
            one of the latter that ``generate()`` is called on.
        max_batch_size: rows that run at the same time; others wait for their turn.
        max_seq_len: tokens of prompt and output at most, as in the decoder.
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
        source: Trio | ProxyTunedForCausalLM | None = None,
        *,
        max_batch_size: int = 16,
        max_seq_len: int | None = None,
        **options: Any,
    ) -> None:
        if source is not None and not isinstance(source, Trio | ProxyTunedForCausalLM):
            raise TypeError(
                f"source must be a Trio, a ProxyTunedForCausalLM or None, got {source!r:.80}"
            )
        self._source = source
        self._max_batch_size = arguments.size("max_batch_size", max_batch_size)
        self._max_seq_len = max_seq_len
        self._options = options
        self._decoder: Decoder | None = None
        self._of: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own decoder: its modules are of classes made as it was built.
        return {**vars(self), "_decoder": None, "_of": None}

    @property
    def decoder(self) -> Decoder | None:
        """The decoder of the last call; None before the first."""
        return self._decoder

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
            Refused: names what the decoder does not do.
        """
        if assistant_model is not None:
            raise Refused(
                "assistant_model: the decoder drafts with EngineGenerate(speculation=...)"
            )
        trio, own_alpha = self._trio_of(model)
        call = read_call(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            alpha=own_alpha if alpha is None else alpha,
            roles=trio.roles,
            vocab_size=trio.vocab_size,
            own_prompts={
                "expert_input_ids": expert_input_ids,
                "expert_attention_mask": expert_attention_mask,
                "anti_input_ids": anti_input_ids,
                "anti_attention_mask": anti_attention_mask,
            },
            model_kwargs=model_kwargs,
        )
        if stream_to is not None:
            stream_to.put(input_ids.cpu())
        if isinstance(model, ProxyTunedForCausalLM):
            model.notes["sampling"] = "proxytune_kernels.Decoder, by custom_generate"
        decoder = self._decoder_for(trio, call)
        rows = _run(decoder, call, input_ids, [s for s in (streamer, stream_to) if s is not None])
        sequences = _joined(input_ids, rows, call.pad_token_id)
        if not generation_config.return_dict_in_generate:
            return sequences
        result: Any = GenerateDecoderOnlyOutput
        return result(sequences=sequences)

    def _trio_of(self, model: Any) -> tuple[Trio, float]:
        """The trio to decode, and how strongly it steers where a call says nothing."""
        source = model if self._source is None else self._source
        if isinstance(source, Trio):
            if model is not source.base and getattr(model, "base", None) is not source.base:
                raise Refused("generate() must be called on the base of the trio that it is given")
            return source, 1.0
        if not isinstance(source, ProxyTunedForCausalLM):
            raise Refused(
                f"EngineGenerate() needs a trio to steer a {type(model).__name__}: give it one"
            )
        if model is not source and model is not source.base:
            raise Refused("generate() must be called on the model that it is given, or its base")
        agreement = Agreement(source.config.vocab_size, ())
        return Trio(source.models, {}, {}, agreement, ()), source.alpha

    def _decoder_for(self, trio: Trio, call: Call) -> Decoder:
        """The decoder that is kept, if it has room for the call; else one that has."""
        longest = max(
            len(ids) + params.max_tokens
            for prompt, params in zip(call.prompts, call.params, strict=True)
            for ids in prompt.values()
        )
        most = arguments.max_seq_len(trio.models, self._max_seq_len)
        rows = min(power_of_two(len(call.prompts), 1), self._max_batch_size)
        tokens = min(power_of_two(longest, _FEWEST_TOKENS), most)
        kept = self._decoder
        if kept is not None and self._of is trio.base:
            if rows <= kept.max_batch_size and tokens <= kept.max_seq_len:
                return kept
            rows, tokens = max(rows, kept.max_batch_size), max(tokens, kept.max_seq_len)
        # Before the next takes its memory.
        self._decoder = kept = None
        self._decoder = Decoder(_textless(trio), rows, tokens, **self._options)
        self._of = trio.base
        return self._decoder


def _run(decoder: Decoder, call: Call, input_ids: Tensor, streamers: list[Any]) -> list[list[int]]:
    """The output tokens of each row."""
    if streamers and len(call.prompts) > 1:
        raise Refused(
            "a streamer takes one row here: the decoder's rows do not move in step, got "
            f"{len(call.prompts)}"
        )
    rows: list[list[int]] = [[] for _ in call.prompts]
    cancelled: set[int] = set()
    for event in decoder.stream(call.prompts, call.params):
        if event.index in cancelled:
            continue
        row = rows[event.index]
        for token_id in event.token_ids:
            row.append(token_id)
            for streamer in streamers:
                streamer.put(torch.tensor([token_id]))
            if call.stops.others:
                text = torch.cat([input_ids[event.index], input_ids.new_tensor(row)])
                if call.stops.called(text[None])[0]:
                    cancelled.add(event.index)
                    decoder.cancel(event.request_id)
                    break
    for streamer in streamers:
        streamer.end()
    return rows


def _joined(input_ids: Tensor, rows: list[list[int]], pad_token_id: int | None) -> Tensor:
    """Prompts and outputs, int64 [B, L], padded behind those that ended before the longest."""
    longest = max(map(len, rows))
    if pad_token_id is None and min(map(len, rows)) < longest:
        raise ValueError("pad_token_id must be given where rows end at different lengths, got None")
    pad = 0 if pad_token_id is None else pad_token_id
    padded = [row + [pad] * (longest - len(row)) for row in rows]
    return torch.cat([input_ids, input_ids.new_tensor(padded)], dim=1)


class _NoText:
    """In place of tokenizers: nobody here asks for text."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Nothing."""
        return ""


def _textless(trio: Trio) -> Trio:
    """The same models; prompts are token ids, and a call names its end-of-sequence tokens."""
    return replace(
        trio,
        tokenizers=dict.fromkeys(trio.roles, _NoText()),
        prompts=dict.fromkeys(trio.roles, "plain"),
        eos_token_ids=(),
    )


def engine_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A ``custom_generate=`` for a model of ours: :class:`EngineGenerate`, kept by the model.

    Example:
        >>> import proxytune_kernels as ptk
        >>> model = ProxyTunedForCausalLM.from_trio(ptk.load_trio("shipped"))
        >>> inputs = model.tokenize("2 + 2 =")
        >>> model.generate(**inputs, custom_generate=engine_generate, max_new_tokens=4).shape[0]
        1
    """
    if not isinstance(model, ProxyTunedForCausalLM):
        raise Refused(
            f"engine_generate needs a ProxyTunedForCausalLM, got {type(model).__name__}: "
            "EngineGenerate(trio) steers any base"
        )
    if model.engine is None:
        model.engine = EngineGenerate()
    generate: Any = model.engine
    return generate(model, *args, **kwargs)


# By its names generate() finds out what to pass on.
engine_generate.__signature__ = inspect.signature(EngineGenerate())  # type: ignore[attr-defined]
