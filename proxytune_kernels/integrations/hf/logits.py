"""Draws tokens for code that holds the three roles' logits itself, as a generation config says."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig

from proxytune_kernels import ops
from proxytune_kernels.integrations.hf.processors import NotInOp, OpSampling, read_processors
from proxytune_kernels.params import RowParams, mask_without, signed_seed
from proxytune_kernels.reference import SampleOutput


class LogitsSampler:
    """Draws the next tokens of B rows, step by step, by one op on their three rows of logits.

    For a decoding loop of one's own. A ``LogitsProcessor`` that runs the small models is the usual
    way to proxy-tune inside ``generate``, and is wrong in two ways that this is not: it holds the
    small models' caches, which no one rolls back when assisted decoding refuses drafts, or reorders
    for beams; and the warpers behind it read the vocabulary again, several times.

    Args:
        sampling: what to draw by; :meth:`from_config` reads it off a generation config.
        batch_size: B.
        vocab_size: agreed width; what lies past it is never read.
        alpha: a number or a tensor [B].
        seeds: int64 [B], key of each row's noise; :func:`draw_seeds` unless told.
        prompt_length: tokens of the prompts, padding included.
        device: of the logits.

    Raises:
        ValueError: names the argument, what it got and what it wanted.

    Example:
        >>> options = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=0)
        >>> sampler = LogitsSampler.from_config(**options, vocab_size=1000, alpha=0.5, seed=7)
        >>> base, expert, anti = torch.randn(3, 1, 1000)
        >>> sampler.draw(base, expert, anti).token_ids.shape
        torch.Size([1])
    """

    def __init__(
        self,
        sampling: OpSampling,
        batch_size: int,
        vocab_size: int,
        *,
        alpha: float | Tensor = 1.0,
        seeds: Tensor | None = None,
        prompt_length: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        outside = [i for i in sampling.bias if i >= vocab_size]
        if outside:
            raise ValueError(
                f"sequence_bias must be of tokens below the vocabulary's size {vocab_size}, "
                f"got {outside[0]}"
            )
        greedy = sampling.temperature == 0
        if seeds is None:
            seeds = torch.zeros(batch_size, dtype=torch.int64) if greedy else draw_seeds(batch_size)
        self.sampling = sampling
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.prompt_length = prompt_length
        self._params = RowParams.make(
            batch_size,
            device=device,
            alpha=alpha,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            filter_order="hf",
            seed=seeds,
        )
        self._position = 0
        self._bias = self._make_bias(device)
        self._masks: dict[tuple[bool, ...], Tensor | None] = {}

    @classmethod
    def from_config(
        cls,
        generation_config: GenerationConfig | None = None,
        *,
        vocab_size: int,
        batch_size: int = 1,
        alpha: float | Tensor = 1.0,
        seed: int | None = None,
        prompt_length: int = 0,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> LogitsSampler:
        """A sampler for a generation config, or for options in its words, as ``generate`` reads it.

        What is not said has transformers' defaults: do_sample False, and top_k 50 where it is True.

        Args:
            generation_config: not changed.
            seed: one key for all rows; None draws one for each. Other arguments: see the class.
            options: of :class:`transformers.GenerationConfig`; they go before generation_config.

        Raises:
            NotInOp: names an option that the op does not have.
            ValueError: names the argument, what it got and what it wanted.
        """
        config = copy.deepcopy(generation_config or GenerationConfig())
        unknown = config.update(**options)
        if unknown:
            raise ValueError(
                f"options must be fields of GenerationConfig, got {', '.join(sorted(unknown))}"
            )
        config.update(**config._get_default_generation_params(), defaults_only=True)
        if config.num_beams > 1:
            raise NotInOp(f"num_beams {config.num_beams} is not in the op")
        builder: Any = _ProcessorBuilder(vocab_size)
        builder._prepare_special_tokens(config, device=device)
        processors = builder._get_logits_processor(
            config, input_ids_seq_length=prompt_length, device=device, model_kwargs={}
        )
        seeds = None
        if seed is not None:
            seeds = torch.full((batch_size,), signed_seed(seed), dtype=torch.int64)
        return cls(
            read_processors(processors, do_sample=config.do_sample),
            batch_size,
            vocab_size,
            alpha=alpha,
            seeds=seeds,
            prompt_length=prompt_length,
            device=device,
        )

    @property
    def alpha(self) -> Tensor:
        """Strength of the steering, fp32 [B]."""
        return self._params.alpha

    @property
    def position(self) -> int:
        """Index of the next output token; set it back to draw again what was rolled back."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self._position = value
        self._params.position.fill_(value)

    def draw(
        self, base: Tensor, expert: Tensor | None = None, anti: Tensor | None = None
    ) -> SampleOutput:
        """Draw each row's next token, and move on by one position.

        Args:
            base, expert, anti: logits [B, V_role], as in :func:`proxytune_kernels.sample`; base
                alone may also be the combined logits.

        Returns:
            :class:`~proxytune_kernels.reference.SampleOutput`: a token of -1 where nothing was left
            to draw, and a status bit that says why.
        """
        drawn = ops.sample(
            base,
            expert,
            anti,
            self._params,
            bias=self._bias,
            allowed_mask=self._allowed() if self.sampling.blocks else None,
            vocab_size=self.vocab_size,
        )
        self._position += 1
        self._params.position.add_(1)
        return drawn

    def _make_bias(self, device: torch.device | str) -> Tensor | None:
        if not self.sampling.bias:
            return None
        row = torch.zeros(self.vocab_size, device=device)
        for token_id, value in self.sampling.bias.items():
            row[token_id] = value
        return row.repeat(self.batch_size, 1)

    def _allowed(self) -> Tensor | None:
        """Packed mask int32 [B, words] of the tokens that no block has at this length, or None."""
        length = self.prompt_length + self._position
        active = tuple(block.start <= length < block.stop for block in self.sampling.blocks)
        if active not in self._masks:
            pairs = zip(self.sampling.blocks, active, strict=True)
            blocked = frozenset[int]().union(*(block.token_ids for block, on in pairs if on))
            self._masks[active] = self._pack(blocked) if blocked else None
        return self._masks[active]

    def _pack(self, blocked: frozenset[int]) -> Tensor:
        mask = mask_without(blocked, self.vocab_size)
        return mask.to(self._params.alpha.device).repeat(self.batch_size, 1)


def draw_seeds(batch_size: int) -> Tensor:
    """int64 [batch_size]: a seed for each row, from torch's global generator of the CPU.

    ``transformers.set_seed`` and ``torch.manual_seed`` repeat them. The first seeds of a larger
    batch are those of a smaller one, so a row draws the same whatever comes behind it.
    """
    return torch.randint(-(2**63), 2**63 - 1, (batch_size,), dtype=torch.int64)


class _ProcessorBuilder(GenerationMixin):
    """As much of a model as ``_get_logits_processor`` reads."""

    def __init__(self, vocab_size: int) -> None:
        self.config: Any = PreTrainedConfig()
        self.config.vocab_size = vocab_size
