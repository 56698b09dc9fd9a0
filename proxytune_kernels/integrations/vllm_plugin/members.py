"""The three members: a full vLLM model each, with its own configuration."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace
from vllm.model_executor.model_loader.utils import initialize_model

from proxytune_kernels.integrations.vllm_plugin.settings import ProxyTuning
from proxytune_kernels.trio.roles import ROLES


def member_config(model_config: Any, settings: ProxyTuning, role: str, **changes: Any) -> Any:
    """A role's own ModelConfig, of what is common to all from the trio's.

    Its quantisation, layers and tokenizer are those of its checkpoint. Overrides of the trio's
    config.json, such as rope settings, are the base's.

    Args:
        model_config: the trio's ModelConfig.
        settings: what it says of the members.
        role: base, expert or anti.
        changes: other arguments of ModelConfig.
    """
    arguments = {
        "model": getattr(settings, role),
        "runner": "generate",
        "tokenizer": model_config.tokenizer,
        "tokenizer_mode": model_config.tokenizer_mode,
        "skip_tokenizer_init": model_config.skip_tokenizer_init,
        "trust_remote_code": model_config.trust_remote_code,
        "dtype": model_config.dtype,
        "seed": model_config.seed,
        "max_model_len": model_config.max_model_len,
        "enforce_eager": model_config.enforce_eager,
        "config_format": model_config.config_format,
        "disable_sliding_window": model_config.disable_sliding_window,
        "model_impl": model_config.model_impl,
        "hf_overrides": settings.overrides(role, model_config.hf_overrides),
    }
    if role == "base":
        arguments["revision"] = model_config.revision
        arguments["code_revision"] = model_config.code_revision
    return ModelConfig(**{**arguments, **changes})


def member_vllm_config(vllm_config: Any, config: Any) -> Any:
    """The engine's configuration as a member sees it.

    What layers register themselves in (``compilation_config``) stays shared: the engine allocates
    and runs the attention of all members as one model's.
    """
    # The flag keeps VllmConfig from checking the deployment and compiling settings anew.
    config.is_submodel_config = True
    # Attention layers take their window from the cache's settings. The trio's is the base's.
    cache_config = copy.copy(vllm_config.cache_config)
    # Models that mix windows and full attention give each layer its own, as here vLLM's EngineArgs.
    kinds = getattr(config.hf_text_config, "layer_types", None) or ["sliding_attention"]
    mixed = any(kind != "sliding_attention" for kind in kinds)
    cache_config.sliding_window = None if mixed else config.get_sliding_window()
    member = replace(vllm_config, model_config=config, quant_config=None, cache_config=cache_config)
    member.quant_config = VllmConfig.get_quantization_config(config, vllm_config.load_config)
    return member


def member_configs(model_config: Any, settings: ProxyTuning, **changes: Any) -> dict[str, Any]:
    """Role -> its own ModelConfig; see :func:`member_config`."""
    return {role: member_config(model_config, settings, role, **changes) for role in ROLES}


def make_member(vllm_config: Any, config: Any, role: str, prefix: str) -> nn.Module:
    """Make a role's model, without weights; its layers are named after the role."""
    # The tag keeps what is compiled for one member apart from another's.
    with set_model_tag(f"proxytune_{role}"):
        return initialize_model(
            member_vllm_config(vllm_config, config), prefix=f"{prefix}.{role}" if prefix else role
        )
