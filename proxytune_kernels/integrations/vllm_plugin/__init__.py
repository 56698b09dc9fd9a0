"""A trio as one vLLM model: `vllm serve DIR`, per-request alpha, tensor parallel (docs/vllm.md).

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in
each of its processes. Written for, and tested on, vLLM 0.32.
"""

from __future__ import annotations

ARCHITECTURE = "ProxyTunedForCausalLM"
"""What a config.json names in ``architectures`` to be opened as a trio."""


def register() -> None:
    """Tell vLLM of the architecture and of its settings; a second call changes nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from proxytune_kernels.integrations.vllm_plugin.config import ProxyTunedConfig

    # By name: what the model imports waits until a trio is opened.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ProxyTunedConfig
