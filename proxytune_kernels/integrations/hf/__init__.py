"""Proxy-tuning inside transformers; importing this registers the Auto classes. See docs/transformers.md."""

from proxytune_kernels.integrations.hf.config import ProxyTunedConfig
from proxytune_kernels.integrations.hf.modeling import ProxyTunedForCausalLM

__all__ = ["ProxyTunedConfig", "ProxyTunedForCausalLM"]
