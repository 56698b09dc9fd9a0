"""What requests ask of their tokens beside filters: penalties, biases, masks, bad words, alphas.

All of it is a function of the tokens before a position, so speculation changes nothing: at a draft,
counts and matches are those after the drafts before it. Everything lies in tensors of all slots,
on the device; a request that needs more room makes them larger, which a captured step must not
outlive: see :meth:`SlotConstraints.sized`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from proxytune_kernels.params import MAX_LOGPROBS, Edits, SamplingParams, pack_mask

if TYPE_CHECKING:
    from proxytune_kernels.decoder.request import Request

_NO_PENALTIES = (1.0, 0.0, 0.0)
_FEW = 8  # likeliest tokens: most requests want five


class Needs(NamedTuple):
    """What some of a step's requests ask of its draw, known to the host: it decides what is run.

    Of a captured step they are the room that there is for each: :meth:`SlotConstraints.sized`.
    """

    masked: bool = False
    """Whether some tokens may not be drawn, or not yet."""
    edits: int = 0
    bad_words: tuple[int, ...] = ()
    alphas: int = 0
    scheduled: bool = False
    """Whether any of them has a rule for its alpha."""
    pairs: tuple[int, ...] = ()
    """Which further pairs steer any of them."""
    grammar: bool = False
    likeliest: int = 0
    """Room for the likeliest tokens that any of them reports: few sizes, for captured steps."""
    steering: bool = False
    """Whether any of them reports what steering did."""

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Needs:
        """Of the step that comes next."""
        each = [(request, request.constraints) for request in requests]
        needs = cls(
            grammar=any(request.grammar is not None for request, _ in each),
            likeliest=_room_for_likeliest(
                max((request.params.logprobs for request, _ in each), default=0)
            ),
            steering=any(request.params.steering for request, _ in each),
        )
        if not any(asked.any for _, asked in each):
            return needs
        return needs._replace(
            masked=any(
                asked.bad_words
                or asked.mask is not None
                or (asked.early_mask is not None and request.params.min_tokens > request.launched)
                for request, asked in each
            ),
            edits=max((asked.room for _, asked in each), default=0),
            bad_words=(1,) if any(asked.bad_words for _, asked in each) else (),
            alphas=int(any(len(request.params.alphas) > 1 for request, _ in each)),
            scheduled=any(request.params.alpha_schedule != "constant" for request, _ in each),
            pairs=tuple(sorted({i for request, _ in each for i in request.pairs})),
        )


def _room_for_likeliest(likeliest: int) -> int:
    if likeliest <= 0:
        return 0
    return _FEW if likeliest <= _FEW else MAX_LOGPROBS


@dataclass(frozen=True)
class Constraints:
    """What a request asks of its tokens, on the host.

    Args:
        mask: int32 [ceil(vocab_size / 32)], the tokens that may be drawn; None for all.
        early_mask: the same before ``min_tokens`` are out; None without min_tokens.
        bad_words: of two tokens and more; single ones are in the masks.
        entries: (id, count, in prompt, bias) of :class:`proxytune_kernels.Edits`, at first.
        room: entries that it may need.
        any: whether it asks anything of its draws.
    """

    mask: Tensor | None = None
    early_mask: Tensor | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    entries: tuple[tuple[int, int, int, float], ...] = ()
    room: int = 0
    any: bool = False

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        prompt: Sequence[int],
        stops: Iterable[int],
        vocab_size: int,
        tokenizer: Any,
    ) -> Constraints:
        """Those of a request.

        Args:
            params: its parameters.
            prompt: the base's.
            stops: tokens that end it.
            vocab_size: agreed width.
            tokenizer: of the trio, for bad words.

        Raises:
            ValueError: a token past the vocabulary, or no token is left to draw.
        """
        words = [ids for word in params.bad_words for ids in _spellings(word, tokenizer)]
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids),
            ("bad_words", [i for word in words for i in word]),
        ):
            outside = [i for i in ids if i >= vocab_size]
            if outside:
                raise ValueError(
                    f"{name} must be of tokens below the vocabulary's size {vocab_size}, got "
                    f"{outside[0]}"
                )
        mask, early = cls._masks(params, words, stops, vocab_size)
        seen = set[int]()
        if params.penalty_prompt and params.repetition_penalty != 1:
            seen = {i for i in prompt if i < vocab_size}
        bias = params.logit_bias
        entries = tuple((i, 0, int(i in seen), bias.get(i, 0.0)) for i in sorted(seen | {*bias}))
        room = len(entries) + params.max_tokens * (params.penalties != _NO_PENALTIES)
        longer = tuple(sorted({word for word in words if len(word) > 1}))
        asks = bool(longer or room) or mask is not None or early is not None
        asks |= len(params.alphas) > 1 or params.alpha_schedule != "constant"
        asks |= any(params.pair_alphas)
        return cls(mask, early, longer, entries, min(room, vocab_size), asks)

    @staticmethod
    def _masks(
        params: SamplingParams, words: Sequence[tuple[int, ...]], stops: Iterable[int],
        vocab_size: int,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        single = [word[0] for word in words if len(word) == 1]
        held = set(stops) if params.min_tokens else set[int]()
        if not (params.allowed_token_ids or single or held):
            return None, None
        allowed = torch.full((vocab_size,), not params.allowed_token_ids)
        allowed[list(params.allowed_token_ids)] = True
        allowed[single] = False
        early = allowed.clone()
        early[[i for i in held if i < vocab_size]] = False
        if not bool(early.any()):
            asked = [
                n for n in ("allowed_token_ids", "bad_words", "min_tokens") if getattr(params, n)
            ]
            raise ValueError(
                f"{', '.join(asked)} must leave a token to draw, got none that is left"
            )
        masked = params.allowed_token_ids or single
        return pack_mask(allowed) if masked else None, pack_mask(early) if held else None


def _spellings(word: str | Sequence[int], tokenizer: Any) -> list[tuple[int, ...]]:
    """The tokens of a bad word, alone and behind a space, as vLLM has it."""
    if not isinstance(word, str):
        return [tuple(word)]
    found: list[tuple[int, ...]] = []
    for text in (word.lstrip(), " " + word.lstrip()):
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        # Behind a space it counts where that makes another first token, and no longer a word.
        if ids and (not found or (ids[0] != found[0][0] and len(ids) == len(found[0]))):
            found.append(ids)
    return found


def _room(wanted: int) -> int:
    """A power of two: there are few sizes, and few captures."""
    return 1 << max(wanted - 1, 3).bit_length() if wanted else 0


class SlotConstraints:
    """What the requests of all slots ask, on the device.

    Args:
        slots: number of slots.
        vocab_size: agreed width.
        device: where the logits are.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._words = -(-vocab_size // 32)

        def table(*shape: int, fill: float = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((slots, *shape), fill, dtype=dtype, device=device)

        # They have no columns until a request asks for some.
        self._tables = {
            # Tokens that may be drawn before min_tokens are out, and from then on.
            "early": table(0, fill=-1),
            "masks": table(0, fill=-1),
            "entries": table(0, 4),
            "used": table(dtype=torch.int64),
            "penalties": table(3, dtype=torch.float32),
            # Of each word the last token first, -1 behind its first.
            "bad_words": table(0, 0),
            "same_end": table(0, dtype=torch.int64),
            # What came last is the first here, too.
            "recent": table(0, dtype=torch.int64),
            "alphas": table(0, dtype=torch.float32),
            "last_alpha": table(dtype=torch.int64),
            "pair_alphas": table(0, dtype=torch.float32),
            # What alpha is multiplied by at each position, and the entropy that steers no token.
            "schedule": table(2, dtype=torch.float32),
        }
        self._tables["penalties"][:, 0] = 1
        self._tables["schedule"].copy_(torch.tensor([1.0, -1.0]))
        self._in_use = False

    def reserve(self, requests: Sequence[Request]) -> None:
        """Make room for what these requests ask."""
        asked = [request.constraints for request in requests]
        if not any(each.any for each in asked):
            return
        self._in_use = True
        words = [word for each in asked for word in each.bad_words]
        number = max(len(each.bad_words) for each in asked)
        length = max(map(len, words), default=0)
        alphas = max(len(request.params.alphas) for request in requests)
        masked = any(each.mask is not None or each.early_mask is not None for each in asked)
        for name in ("early", "masks"):
            self._grow(name, self._words if masked or words else 0)
        self._grow("entries", _room(max(each.room for each in asked)))
        self._grow("bad_words", _room(number), _room(length))
        self._grow("same_end", _room(number))
        self._grow("recent", _room(max(length - 1, 0)))
        self._grow("alphas", _room(alphas) if alphas > 1 else 0)
        self._grow("pair_alphas", max(len(request.params.pair_alphas) for request in requests))

    def _grow(self, name: str, *wanted: int) -> None:
        old = self._tables[name]
        now = old.shape[1 : 1 + len(wanted)]
        if any(n > m for n, m in zip(wanted, now, strict=True)):
            sizes = [max(pair) for pair in zip(wanted, now, strict=True)]
            new = _empty_rows(name, len(old), (*sizes, *old.shape[1 + len(wanted) :]), old)
            new[tuple(slice(0, n) for n in old.shape)] = old
            self._tables[name] = new

    def sized(self, needs: Needs) -> Needs:
        """These needs with the room that there is: the tables that a captured step reads."""
        return needs._replace(
            edits=self._tables["entries"].shape[1] if needs.edits else 0,
            bad_words=tuple(self._tables["bad_words"].shape[1:]) if needs.bad_words else (),
            alphas=self._tables["alphas"].shape[1] if needs.alphas else 0,
        )

    def numbers(self, requests: Sequence[Request]) -> list[Tensor]:
        """What :meth:`start` wants of its device, on the host: a row of each table."""
        if not self._in_use:
            return []
        rows = {
            name: _empty_rows(name, len(requests), table.shape[1:], table, "cpu")
            for name, table in self._tables.items()
        }
        for i, request in enumerate(requests):
            asked, alphas = request.constraints, request.params.alphas
            early = asked.mask if asked.early_mask is None else asked.early_mask
            for name, mask in (("masks", asked.mask), ("early", early)):
                if mask is not None:
                    rows[name][i] = mask
            if asked.entries:
                ids, counts, in_prompt, bias = zip(*asked.entries, strict=True)
                numbers = torch.tensor([ids, counts, in_prompt], dtype=torch.int32)
                bits = torch.tensor(bias, dtype=torch.float32).view(torch.int32)
                rows["entries"][i, : len(ids)] = torch.stack([*numbers, bits], 1)
            rows["used"][i] = len(asked.entries)
            rows["penalties"][i] = torch.tensor(request.params.penalties)
            ends: dict[int, int] = {}
            for j, word in enumerate(asked.bad_words):
                rows["bad_words"][i, j, : len(word)] = torch.tensor(word[::-1])
                rows["same_end"][i, j] = ends.setdefault(word[-1], j)
            if len(alphas) > 1:
                rows["alphas"][i, : len(alphas)] = torch.tensor(alphas)
                rows["last_alpha"][i] = len(alphas) - 1
            rows["schedule"][i] = torch.tensor(request.params.schedule)
            if request.pairs:
                rows["pair_alphas"][i] = torch.tensor(request.params.pair_alphas)
        return list(rows.values())

    def start(self, slots: Tensor, numbers: Sequence[Tensor]) -> None:
        """Begin new requests in slots [n]: :meth:`numbers`."""
        for table, rows in zip(self._tables.values(), numbers, strict=False):
            if table.numel():
                table.index_copy_(0, slots, rows)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Move what a slot holds to another."""
        for table in self._tables.values() if self._in_use else ():
            table[target].copy_(table[source])

    def state(self) -> list[Tensor]:
        """What a step changes."""
        changed = ("entries", "used", "recent") if self._in_use else ()
        return [self._tables[name] for name in changed]

    def _rows(self, name: str, slots: int | Tensor) -> Tensor:
        table = self._tables[name]
        return table[:slots] if isinstance(slots, int) else table[slots]

    def alpha(
        self, slots: int | Tensor, positions: Tensor, alpha: Tensor, base: Tensor, needs: Needs
    ) -> Tensor:
        """fp32 alphas at positions int64 [B, T].

        Args:
            alpha: [B], that of rows without a list.
            base: its logits [B, T, V] there.
            needs: of the step.
        """
        alpha = alpha[:, None].expand(positions.shape)
        if needs.alphas:
            last, table = self._rows("last_alpha", slots)[:, None], self._rows("alphas", slots)
            alpha = torch.where(last > 0, table.gather(1, positions.minimum(last)), alpha)
        if needs.scheduled:
            decay, least = self._rows("schedule", slots).unsqueeze(1).unbind(-1)
            p = base[..., : self.vocab_size].float().softmax(-1)
            above = torch.special.entr(p).sum(-1) > least
            alpha = torch.where(above, alpha * decay.double() ** positions, 0.0).float()
        return alpha

    def pair_alpha(
        self, slots: int | Tensor, pair: int, positions: Tensor, base: Tensor, needs: Needs
    ) -> Tensor:
        """Of a further pair, as :meth:`alpha`."""
        own = self._rows("pair_alphas", slots)[:, pair]
        return self.alpha(slots, positions, own, base, needs._replace(alphas=0))

    def allowed(
        self, slots: int | Tensor, positions: Tensor, least: Tensor, drafts: Tensor | None,
        each: bool, needs: Needs,
    ) -> Tensor:  # fmt: skip
        """Packed masks int32 [B, T, words].

        Args:
            positions: int64 [B, T], of the tokens to draw.
            least: int64 [B], min_tokens.
            drafts: int64 [B, n]; None for none.
            each: n = T - 1, one between two positions; else T = 1, and all came before.
            needs: of the step.
        """
        early = (positions < least[:, None])[..., None]
        masks = self._rows("masks", slots)[:, None]
        allowed = torch.where(early, self._rows("early", slots)[:, None], masks)
        if not needs.bad_words:
            return allowed
        words = self._rows("bad_words", slots)[:, None]
        recent = self._rows("recent", slots)
        text = recent.flip(1) if drafts is None else torch.cat([recent.flip(1), drafts], 1)
        before = text.unfold(1, recent.shape[1], 1).flip(-1)[:, :, None]
        if not each:
            before = before[:, -1:]
        # [B, T, words, tokens but the last]
        before = before[..., : words.shape[-1] - 1]
        first = words[..., 1 : 1 + before.shape[-1]]
        complete = ((first == before) | (first == -1)).all(-1) & (words[..., 0] >= 0)
        # Words that end alike bar one token: its bit counts once.
        ends = self._rows("same_end", slots)[:, None].expand(complete.shape)
        barred = torch.zeros_like(complete, dtype=torch.int32)
        barred = barred.scatter_add_(2, ends, complete.int()) > 0
        last = words[..., 0].clamp(min=0).expand(barred.shape)
        bits = torch.where(barred, torch.ones_like(last) << (last & 31), 0)
        out = torch.zeros(allowed.shape, dtype=torch.int32, device=self.device)
        return allowed & ~out.scatter_add_(2, (last >> 5).long(), bits.int())

    def edits(self, slots: int | Tensor, drafts: Tensor | None, each: bool = True) -> Edits:
        """The entries [B, T, M + T - 1, 4] at T positions: after none, one, ... of the drafts.

        Args:
            slots: the first B, or which B.
            drafts: int64 [B, T - 1]; -1 for none. None: the entries [B, M, 4] as they are.
            each: at each position; else [B, M + T - 1, 4], after all drafts.
        """
        entries, penalties = self._rows("entries", slots), self._rows("penalties", slots)
        if drafts is None:
            return Edits(entries, penalties)
        ids = entries[..., 0]
        new, equal = _new_tokens(ids, drafts)
        extra = torch.zeros((*drafts.shape, 4), dtype=torch.int32, device=self.device)
        extra[..., 0] = torch.where(new, drafts, -1)
        listed = torch.cat([entries, extra], 1)
        times = torch.cat([equal, drafts[:, :, None] == listed[:, None, ids.shape[1] :, 0]], 2)
        times &= (drafts >= 0)[:, :, None]
        if not each:
            listed[..., 1] += times.sum(1)
            return Edits(listed, penalties)
        added = pad(times.int().cumsum(1), (0, 0, 1, 0))
        positions = listed[:, None].repeat(1, drafts.shape[1] + 1, 1, 1)
        positions[..., 1] += added
        return Edits(positions, penalties)

    def take(self, slots: int | Tensor, token_ids: Tensor, counts: Tensor, needs: Needs) -> None:
        """Add output tokens to some slots' texts.

        Args:
            slots: the first B, or which B.
            token_ids: int64 [B, T], -1 behind the last.
            counts: int64 [B], how many there are.
            needs: of the step.
        """
        if needs.edits:
            entries, used = self._rows("entries", slots), self._rows("used", slots)
            penalties = self._rows("penalties", slots)
            counted = (penalties[:, 0] != 1) | (penalties[:, 1:] != 0).any(1)
            ids, numbers = entries[..., 0], entries[..., 1]
            new, equal = _new_tokens(ids, token_ids)
            valid = ((token_ids >= 0) & counted[:, None])[..., None]
            new &= valid[..., 0]
            numbers += (equal & valid).sum(1)
            # In places that are empty: -1, and no count.
            places = (used[:, None] + new.cumsum(1) - 1).clamp(0, ids.shape[1] - 1)
            times = (token_ids[:, :, None] == token_ids[:, None]).sum(2)
            added = torch.stack([token_ids + 1, times], -1) * new[..., None]
            at = places[..., None].expand(-1, -1, 2)
            entries[..., :2] = entries[..., :2].scatter_add(1, at, added.int())
            used += new.sum(1)
            if not isinstance(slots, int):  # else they are views
                self._tables["entries"].index_copy_(0, slots, entries)
                self._tables["used"].index_copy_(0, slots, used)
        if needs.bad_words:
            recent = self._rows("recent", slots)
            text = torch.cat([recent.flip(1), token_ids], 1)
            width = torch.arange(recent.shape[1], device=self.device)
            last = text.gather(1, counts[:, None] + width).flip(1)
            if isinstance(slots, int):
                recent.copy_(last)
            else:
                self._tables["recent"].index_copy_(0, slots, last)


def _empty_rows(
    name: str, count: int, shape: Sequence[int], like: Tensor, device: str | None = None
) -> Tensor:
    """Rows of a table for requests that ask nothing of it."""
    fill = {"early": -1, "masks": -1, "bad_words": -1, "recent": -2}.get(name, 0)
    rows = torch.full((count, *shape), fill, dtype=like.dtype, device=device or like.device)
    if name in ("entries", "penalties"):  # no token, and no repetition penalty
        rows[..., 0] = -1 if name == "entries" else 1
    return rows


def _new_tokens(ids: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens [B, T] are not among ids [B, M], nor before among themselves; where they are.

    Returns:
        bool [B, T], and bool [B, T, M].
    """
    equal = token_ids[:, :, None] == ids[:, None]
    repeated = (token_ids[:, :, None] == token_ids[:, None]).tril(-1).any(2)
    return (token_ids >= 0) & ~equal.any(2) & ~repeated, equal
