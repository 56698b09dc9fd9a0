"""Proxy-tuning inside transformers; importing it registers the Auto classes."""

from proxytune_kernels.integrations.hf.configuration import ProxyTunedConfig
from proxytune_kernels.integrations.hf.custom_generate import EngineGenerate, engine_generate
from proxytune_kernels.integrations.hf.modeling import ProxyTunedForCausalLM
from proxytune_kernels.integrations.hf.sampling import LogitsSampler

__all__ = [
    "EngineGenerate",
    "LogitsSampler",
    "ProxyTunedConfig",
    "ProxyTunedForCausalLM",
    "engine_generate",
]
