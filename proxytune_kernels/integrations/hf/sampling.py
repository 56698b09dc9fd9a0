"""Greedy decoding and sampling inside ``generate()`` through our op, where it gives the same law.

Greedy tokens are those of transformers' own loop. Sampled ones follow the same law and are others:
each row's noise is keyed by a seed and the token's position (docs/contracts.md, Randomness), and
the seeds are drawn from torch's global generator when ``generate()`` starts, so ``set_seed``
repeats a call, and a row draws the same tokens whatever rows come behind it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from proxytune_kernels import ops
from proxytune_kernels.decoder.loop import DecodeError
from proxytune_kernels.integrations.hf.logits import LogitsSampler
from proxytune_kernels.integrations.hf.processors import NotInOp, OpSampling, read_processors
from proxytune_kernels.integrations.hf.stops import Stops
from proxytune_kernels.reference import STATUS_BAD_PARAMS

_OP = "proxytune_kernels.sample on the three roles' logits"


# Its methods are typed for models that have no other parent.
_Generation: Any = GenerationMixin


class FusedSampling(_Generation):  # type: ignore[misc]
    """What :class:`ProxyTunedForCausalLM` does in place of transformers' decoding loops.

    Each of them leaves in ``notes["sampling"]`` how it drew its tokens.
    """

    notes: dict[str, Any]
    engine: Any = None
    """What :func:`engine_generate` keeps: an :class:`EngineGenerate` with its decoder."""

    def _sample(
        self,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding or sampling; arguments and result as in transformers."""
        model_kwargs = _for_forward(model_kwargs)
        try:
            if synced_gpus:
                raise NotInOp("synced_gpus is not in this package's loop")
            _check_loop(generation_config)
            # Last, as it sets up what torch.compile needs.
            if self._valid_auto_compile_criteria(model_kwargs, generation_config):
                raise NotInOp("a compiled forward of a static cache is not in this package's loop")
            sampling = read_processors(logits_processor, do_sample=generation_config.do_sample)
        except NotInOp as reason:
            self.notes["sampling"] = f"transformers' warpers: {reason}"
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        self.notes["sampling"] = _OP
        stops = Stops(stopping_criteria, generation_config._pad_token_tensor, len(input_ids))
        with self._optimize_model_for_decode():
            return _decode(
                self, input_ids, sampling, stops, generation_config, streamer, model_kwargs
            )

    def _extract_generation_mode_kwargs(
        self,
        custom_generate: Any,
        kwargs: dict[str, Any],
        synced_gpus: Any,
        assistant_model: Any,
        streamer: Any,
    ) -> dict[str, Any]:
        """As transformers, which keeps back from a callable what ``generate`` takes by name."""
        named = {
            "streamer": streamer,
            "assistant_model": assistant_model,
            "tokenizer": kwargs.get("tokenizer"),
        }
        found: dict[str, Any] = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        if callable(custom_generate):
            taken = inspect.signature(custom_generate).parameters
            found |= {k: v for k, v in named.items() if k in taken and v is not None}
        return found

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        self.notes["sampling"] = "transformers' warpers: beam search ranks whole rows of logits"
        return super()._beam_search(*args, **_for_forward(kwargs))

    def _assisted_decoding(
        self, input_ids: Any, *args: Any, inputs_tensor: Any = None, **kwargs: Any
    ) -> Any:
        self.notes["sampling"] = (
            "transformers' warpers: assisted decoding checks its drafts on whole rows of logits "
            "(custom_generate with speculation checks them through the op)"
        )
        return super()._assisted_decoding(input_ids, *args, inputs_tensor=inputs_tensor, **kwargs)


def _for_forward(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what is for stop strings, which transformers' loops hand on to the model."""
    return {k: v for k, v in kwargs.items() if k not in ("tokenizer", "assistant_tokenizer")}


def _check_loop(generation_config: Any) -> None:
    """NotInOp if transformers' loop can do what ours can't."""
    if not generation_config.use_cache:
        raise NotInOp("use_cache False is not in this package's loop")
    if generation_config.is_assistant:
        raise NotInOp("a drafter's loop is transformers'")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise NotInOp(f"{name} is not in this package's loop")
    if generation_config.return_dict_in_generate and generation_config.output_scores:
        raise NotInOp("output_scores asks for the rows that the op does not write")


def _decode(
    model: Any,
    input_ids: Tensor,
    sampling: OpSampling,
    stops: Stops,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    """The loop: one forward of each role and one op a token.

    Args:
        input_ids: int64 [B, P].
        model_kwargs: as transformers prepares them; alpha is a number or a tensor [B].
    """
    keep_logits = generation_config.return_dict_in_generate and generation_config.output_logits
    alpha = model_kwargs.get("alpha")
    forwards = _Forwards(model, input_ids, generation_config, model_kwargs)
    vocab_size: int = model.config.vocab_size
    sampler = LogitsSampler(
        sampling,
        input_ids.shape[0],
        vocab_size,
        alpha=model.alpha if alpha is None else alpha,
        prompt_length=input_ids.shape[1],
        device=forwards.device,
    )
    kept_logits: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = (forwards.prompt_logits,)
    while True:
        if keep_logits:
            base, *pair = logits
            expert, anti = pair or (None, None)
            logits = (ops.combine(base, expert, anti, sampler.alpha, vocab_size=vocab_size),)
            kept_logits += logits
        drawn = sampler.draw(*logits)
        tokens = stops.padded(drawn.token_ids.to(input_ids.device))
        listed = tokens.tolist()
        if min(listed) < 0:
            _raise_nothing_drawn(listed, drawn.status, sampler.position - 1)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        finished = stops.finished(input_ids, listed)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if finished:
            break
        logits = forwards.step(tokens)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    result: Any = GenerateDecoderOnlyOutput  # its types are narrower than what transformers puts in
    return result(
        sequences=input_ids,
        logits=kept_logits if keep_logits else None,
        past_key_values=forwards.cache,
    )


class _Forwards:
    """The models' forwards: of the prompts when it is made, then of a token a row.

    ``prompt_logits`` are the combined logits behind the prompts, fp32 [B, vocab_size].
    """

    def __init__(
        self, model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> None:
        self._model = model
        # Found by a walk over the parameters: once, not once a token.
        self.device: torch.device = model.device
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        after = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        self.prompt_logits: Tensor = outputs.logits[:, -1]
        self.cache = after["past_key_values"]
        self._mask: Tensor | None = after.get("attention_mask")
        self._positions: Tensor = after["position_ids"][:, -1:]

    def step(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Base, expert and anti logits [B, V_role] behind one more token int64 [B] in each row.

        The base's alone where alpha is the number 0 and the pair rests.
        """
        roles, self.cache = self._model.role_logits(
            tokens[:, None].to(self.device), self._mask, self._positions, self.cache, True, 1
        )
        self._positions = self._positions + 1
        if self._mask is not None:
            one = self._mask.new_ones((len(tokens), 1))
            self._mask = torch.cat([self._mask, one], dim=-1)
        return tuple(logits[:, -1] for logits in roles.values())


def _raise_nothing_drawn(token_ids: list[int], status: Tensor, position: int) -> None:
    row = next(i for i, token_id in enumerate(token_ids) if token_id < 0)
    if int(status[row]) & STATUS_BAD_PARAMS:
        raise ValueError(f"row {row}: alpha must be finite, and what it is drawn by in range")
    raise DecodeError(
        f"row {row}: no token can be drawn at position {position}: its combined logits are all "
        "NaN or masked"
    )
