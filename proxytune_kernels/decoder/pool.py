"""A decoder that is kept from call to call, and made larger when a call needs more room."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.nn import Parameter

from proxytune_kernels.decoder import Decoder, MemberError, arguments
from proxytune_kernels.decoder.graphs import power_of_two
from proxytune_kernels.trio import Trio

_TOKENS = 256
"""A slot's tokens are a multiple of this."""


class DecoderPool:
    """Keeps one decoder for callers that learn only call by call how much room they need.

    The decoder is made anew if a call has more requests or longer texts than it has room for, and
    if the models or their weights have changed, since a decoder may hold copies of them. The old
    one's memory is freed before the new one takes its own. A copy of a pool makes its own decoder.

    Args:
        max_batch_size: slots at most; further requests wait for their turn.
        max_seq_len: tokens of a slot at most; None is the shortest context of the roles.
        options: other arguments of :class:`proxytune_kernels.Decoder`.

    Example:
        >>> from proxytune_kernels import SamplingParams, load_trio
        >>> pool, trio = DecoderPool(), load_trio("shipped")
        >>> prompt, params = [1, 2, 3], SamplingParams(max_tokens=4)
        >>> decoder = pool.decoder_for(trio, requests=1, tokens=len(prompt) + params.max_tokens)
        >>> [output] = decoder.generate([prompt], params)
    """

    def __init__(
        self, max_batch_size: int = 16, max_seq_len: int | None = None, **options: Any
    ) -> None:
        self._max_batch_size = arguments.size("max_batch_size", max_batch_size)
        self._max_seq_len = max_seq_len
        self._options = options
        self._decoder: Decoder | None = None
        self._made_of: list[Any] = []
        self._unserved: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_decoder": None, "_made_of": []}

    @property
    def decoder(self) -> Decoder | None:
        """The decoder of the last call; None before the first."""
        return self._decoder

    def decoder_for(self, trio: Trio, requests: int, tokens: int) -> Decoder:
        """A decoder of this trio with room for a call.

        Args:
            trio: the models.
            requests: of the call.
            tokens: of the longest prompt and its output, in the role where they are longest.

        Raises:
            ValueError: too many tokens, a model that the decoder can't serve, or an option out of
                range.
            MemberError: a model that the decoder would not decode as its own forward says.
        """
        if self._made_of != (made_of := _made_of(trio)):
            self._decoder, self._unserved, self._made_of = None, None, made_of
        if self._unserved is not None:
            raise MemberError(self._unserved)
        context, _ = arguments.shortest_context(trio.members)
        limit = arguments.max_seq_len(trio.members, self._max_seq_len or context)
        if tokens > limit:
            raise ValueError(f"texts of {tokens} tokens must fit in max_seq_len {limit}")
        slots = min(power_of_two(requests, 1), self._max_batch_size)
        length = -(-tokens // _TOKENS) * _TOKENS
        if self._decoder is None:
            try:
                self._decoder = Decoder(trio, slots, min(length, limit), **self._options)
            except MemberError as error:
                self._unserved = str(error)
                raise
            self._made_of = _made_of(trio)  # a decoder may lay weights out anew
            return self._decoder
        most_slots, most_tokens = self._decoder.max_batch_size, self._decoder.max_seq_len
        if slots > most_slots or tokens > most_tokens:
            # Doubled, so that a text that grows from call to call makes few decoders.
            length = max(length, 2 * most_tokens) if tokens > most_tokens else most_tokens
            self._decoder = None
            self._decoder = Decoder(
                trio, max(slots, most_slots), min(length, limit), **self._options
            )
            self._made_of = _made_of(trio)
        return self._decoder


def _made_of(trio: Trio) -> list[Any]:
    """What a decoder's modules are made of; once any of it changes they are made anew."""
    return [trio.vocab_size, *(part for m in trio.members.values() for part in _parts(m))]


def _parts(model: Any) -> Iterator[Any]:
    yield id(model)  # all that can be seen of one that another runtime holds
    for parameter in model.parameters():
        version = 0 if parameter.is_inference() else parameter._version
        # A packed (quantised) weight has no memory of its own.
        place = parameter.data_ptr() if type(parameter) is Parameter else 0
        yield id(parameter), version, place, parameter.dtype, parameter.device
