"""Checks of what a caller gives the decoder: each error names the argument, got and wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxytune_kernels.decoder.speculation import Speculation
from proxytune_kernels.decoder.states import is_recurrent
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.prompts import is_messages
from proxytune_kernels.trio.remote import RemoteModel

DEFAULT_MAX_SEQ_LEN = 4096
_REMOTE_DRAFTS = 8
_ENDLESS = 2**31 - 1


def roles(trio: Trio, value: Sequence[str] | None) -> tuple[str, ...]:
    """The roles to run: all of the trio's, or the base alone."""
    wanted = trio.roles if value is None else tuple(value)
    if wanted not in (trio.roles, ("base",)):
        raise ValueError(f"roles must be {trio.roles} or ('base',), got {wanted}")
    return wanted


def size(name: str, value: Any) -> int:
    """A count of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def streams(value: Any) -> int:
    """CUDA streams for three roles."""
    if isinstance(value, bool) or value not in (1, 2, 3):
        raise ValueError(f"streams must be 1, 2 or 3, got {value!r}")
    return int(value)


def shortest_context(models: Mapping[str, Any]) -> tuple[int, str]:
    """Tokens that all roles can read, and what ends there, as words."""
    contexts = []
    for role, model in models.items():
        config = model.config.get_text_config(decoder=True)
        if getattr(config, "max_position_embeddings", None) is None:
            if is_recurrent(model):
                continue  # a state has no length
            raise ValueError(
                f"{role} must say its context's length (max_position_embeddings), "
                f"got {type(model).__name__} without one"
            )
        contexts.append((config.max_position_embeddings, f"the context of {role}"))
        if (limit := rotary_limit(config)) is not None:
            contexts.append((limit, f"behind which the rotary factors of {role} change (longrope)"))
    return min(contexts, key=lambda context: context[0], default=(_ENDLESS, "the most there are"))


def rotary_limit(config: Any) -> int | None:
    """Tokens up to which a text model's rotary factors are the same for all texts; None: all.

    The factors of a longer text hold for its first tokens, too, whose keys are in the cache by
    then, and a row's would depend on the longest of its batch. Dynamic scaling starts at the end of
    the context.
    """
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    # By kind of layer, or of all layers.
    for rope in (given, *given.values()):
        if isinstance(rope, Mapping) and "longrope" in (rope.get("rope_type"), rope.get("type")):
            limits.append(
                rope.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
    return min(limits, default=None)


def max_seq_len(models: Mapping[str, Any], value: Any) -> int:
    """Tokens that a slot holds: as asked for, or the shortest context, within bounds."""
    context, what = shortest_context(models)
    if value is None:
        return min(context, DEFAULT_MAX_SEQ_LEN)
    if size("max_seq_len", value) > context:
        raise ValueError(f"max_seq_len must be at most {context}, {what}, got {value}")
    return int(value)


def speculation(value: Any, models: Mapping[str, Any]) -> Speculation | None:
    """How to draft; the expert can only where it runs, and a remote base must score drafts."""
    recurrent = [role for role, model in models.items() if is_recurrent(model)]
    base = models["base"]
    if isinstance(base, RemoteModel):
        if value is None and base.scores_drafts and "expert" in models and not recurrent:
            # Calls are what costs, whatever the clock says of them.
            return Speculation(max_drafts=_REMOTE_DRAFTS, adaptive=False)
        if value is not None and not base.scores_drafts:
            raise ValueError(
                f"speculation must be None where the base gives one token's log-probabilities a "
                f"call ({base.protocol}), got {value!r:.80}"
            )
    if value is None:
        return None
    if not isinstance(value, Speculation):
        raise TypeError(f"speculation must be a Speculation or None, got {value!r:.80}")
    if recurrent:
        raise ValueError(
            f"speculation must be None where layers are recurrent, as some of {recurrent[0]} are "
            f"(a draft that is refused can't be taken back), got {value!r:.80}"
        )
    if value.drafter == "expert" and "expert" not in models:
        raise ValueError(
            f"speculation with the expert's drafts must have the expert among the roles, "
            f"got {', '.join(models)} (drafter='prompt_lookup' needs none)"
        )
    return value


def prompts(value: Any) -> Sequence[Any]:
    """A list of prompts; a string is a list of one, and so are the messages of one chat."""
    if isinstance(value, str) or is_messages(value):
        return [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise TypeError(
            f"prompts must be a string or a list of prompts, got {type(value).__name__}"
        )
    return value


def params_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """One :class:`SamplingParams` per prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError(f"params must be SamplingParams or a list of them, got {params!r:.80}")
    if len(params) != count:
        raise ValueError(f"params must have one entry per prompt ({count}), got {len(params)}")
    return params


def check_pair_alphas(trio: Trio, params: SamplingParams) -> None:
    """Refuse strengths of other pairs than the trio has."""
    given = params.pair_alphas
    if given and len(given) != len(trio.pairs):
        raise ValueError(
            f"pair_alphas must have a number for each further pair of the trio, which has "
            f"{len(trio.pairs)}, or be (), got {given}"
        )


def scored_prompt(prompt_token_ids: Mapping[str, Sequence[int]], roles: Sequence[str]) -> None:
    """Refuse to score a prompt that is another for another role."""
    for role in roles:
        if prompt_token_ids[role] != prompt_token_ids["base"]:
            raise ValueError(
                "prompt_logprobs must be -1 where a role has a prompt of its own: its positions "
                f"are not the base's; got another prompt for {role}"
            )


def served(base: Any, params: SamplingParams) -> None:
    """Refuse what a remote base's endpoint can't do."""
    if not isinstance(base, RemoteModel):
        return
    if not base.goes_on and params.max_tokens > 1:
        raise ValueError(
            f"max_tokens must be 1 where the base takes chats alone, which give one token's "
            f"log-probabilities and can't go on from it, got {params.max_tokens}"
        )
    if not base.scores_drafts and params.prompt_logprobs >= 0:
        raise ValueError(
            f"prompt_logprobs must be -1 where the base does not score prompts ({base.protocol}), "
            f"got {params.prompt_logprobs}"
        )


def fits(prompt_token_ids: Mapping[str, Sequence[int]], max_tokens: int, max_seq_len: int) -> None:
    """Refuse a request that a slot can't hold."""
    for role, token_ids in prompt_token_ids.items():
        # The last output token is not run through the models.
        if len(token_ids) + max_tokens - 1 > max_seq_len:
            raise ValueError(
                f"{role}'s prompt of {len(token_ids)} tokens with max_tokens {max_tokens} must fit "
                f"in max_seq_len {max_seq_len}"
            )
