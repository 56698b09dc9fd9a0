"""Proxy-tuning inside transformers; importing it registers the Auto classes."""

from proxytune_kernels.integrations.hf.config import ProxyTunedConfig
from proxytune_kernels.integrations.hf.engine import EngineGenerate, engine_generate
from proxytune_kernels.integrations.hf.logits import LogitsSampler
from proxytune_kernels.integrations.hf.modeling import ProxyTunedForCausalLM

__all__ = [
    "EngineGenerate",
    "LogitsSampler",
    "ProxyTunedConfig",
    "ProxyTunedForCausalLM",
    "engine_generate",
]
