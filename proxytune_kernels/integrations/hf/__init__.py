"""Proxy-tuning inside transformers; importing it registers the Auto classes."""

from proxytune_kernels.integrations.hf.config import ProxyTunedConfig
from proxytune_kernels.integrations.hf.modeling import ProxyTunedForCausalLM

__all__ = ["ProxyTunedConfig", "ProxyTunedForCausalLM"]
