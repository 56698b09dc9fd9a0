"""The configuration of a trio as one transformers model, and what config.json says of it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from proxytune_kernels.integrations.hf.cache import CACHE
from proxytune_kernels.trio.roles import ROLES

SUB_CONFIGS = {role: f"{role}_config" for role in ROLES}
"""Role -> name of its model's configuration within the trio's."""

_OF_BASE = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
"""What code that knows nothing of three models reads of one: the base's."""


def _member() -> SubConfigSpec:
    # transformers wants a type to fall back to; a member's configuration always says its own.
    return SubConfigSpec(config_class=AutoConfig, model_type="llama", optional=True)


@strict
class ProxyTunedConfig(PreTrainedConfig):
    """Names three checkpoints, how strongly they steer and how they read prompts.

    Args:
        base_config, expert_config, anti_config: the models' own, once they are loaded. They are
            not written: the checkpoints have them.
        alpha: strength of the steering where a call names none.
        checkpoints: role -> directory (relative to the manifest's) or hub name.
        prompts: role -> ``"plain"`` or ``"chat"``, as in :func:`proxytune_kernels.load_trio`.
        merge_adapter: as in :func:`proxytune_kernels.load_trio`.
        quantize: role -> ``"int8"`` or ``"int4"``.
        vocab_size: width of the combined logits, the vocabulary that the three models share.
        max_position_embeddings: the shortest context of the three.
        use_cache: whether ``forward`` gives a cache back where a call does not say.
        hidden_size and the other sizes: the base's, None where it has none of that name.
    """

    model_type = "proxy_tuned"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012
    sub_configs_defaults = {name: _member() for name in SUB_CONFIGS.values()}  # noqa: RUF012

    base_config: dict[str, Any] | PreTrainedConfig | None = None
    expert_config: dict[str, Any] | PreTrainedConfig | None = None
    anti_config: dict[str, Any] | PreTrainedConfig | None = None
    alpha: float | int = 1.0
    checkpoints: dict[str, str] | None = None
    prompts: dict[str, str] | None = None
    merge_adapter: bool = True
    quantize: dict[str, str] | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    use_cache: bool = True
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def of_models(cls, models: dict[str, Any], vocab_size: int, **settings: Any) -> Any:
        """The configuration of three models in memory; theirs stay as they are."""
        configs = {role: model.config for role, model in models.items()}
        base = configs["base"].get_text_config(decoder=True)
        named: dict[str, Any] = {
            **{SUB_CONFIGS[role]: config for role, config in configs.items()},
            **{name: getattr(base, name, None) for name in _OF_BASE},
            "vocab_size": vocab_size,
            "max_position_embeddings": _shortest_context(configs),
            "dtype": models["base"].dtype,
            # Unless each is named, transformers writes None into the models' own configurations,
            # and attention without an implementation turns non-causal without an error.
            "attn_implementation": _kept(configs, "_attn_implementation"),
            # The trio itself has no experts, and refuses the base's way to run them.
            "experts_implementation": {**_kept(configs, "_experts_implementation"), "": None},
        }
        return cls(**named, **settings)

    def to_dict(self) -> dict[str, Any]:
        """What is written: everything but the models' own configurations."""
        return {k: v for k, v in super().to_dict().items() if k not in SUB_CONFIGS.values()}

    def to_diff_dict(self) -> dict[str, Any]:
        """As :meth:`to_dict`, without what has its default value."""
        return {k: v for k, v in super().to_diff_dict().items() if k not in SUB_CONFIGS.values()}


def _kept(configs: dict[str, Any], name: str) -> dict[str, Any]:
    values = {SUB_CONFIGS[role]: getattr(config, name, None) for role, config in configs.items()}
    return {"": values[SUB_CONFIGS["base"]], **values}


def _shortest_context(configs: dict[str, Any]) -> int | None:
    texts = (config.get_text_config(decoder=True) for config in configs.values())
    known = [n for t in texts if (n := getattr(t, "max_position_embeddings", None)) is not None]
    return min(known, default=None)


AutoConfig.register(ProxyTunedConfig.model_type, ProxyTunedConfig)
