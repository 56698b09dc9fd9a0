"""What vLLM asks of a trio's settings before it makes an engine; refusals, each a sentence."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from proxytune_kernels.integrations.vllm_plugin.settings import ProxyTuning

_ALPHA = "proxytune_kernels.integrations.vllm_plugin.alpha"


class ProxyTunedConfig(VerifyAndUpdateConfig):
    """vLLM's hooks for the settings of an architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        settings = ProxyTuning.read(model_config)
        if settings.base != model_config.model:
            model_config.hf_config_path = model_config.hf_config_path or model_config.model
            model_config.model = settings.base

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        processors = list(vllm_config.model_config.logits_processors or [])
        if vllm_config.speculative_config is None:
            vllm_config.model_config.logits_processors = [*processors, f"{_ALPHA}:AlphaProcessor"]
