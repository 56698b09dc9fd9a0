"""What vLLM asks of a trio's settings before it makes an engine; refusals, each a sentence.

Two hooks: one for the ModelConfig, in every process that makes one, and one for the whole
VllmConfig. Both run before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from proxytune_kernels.integrations.vllm_plugin import admission
from proxytune_kernels.integrations.vllm_plugin.members import member_configs
from proxytune_kernels.integrations.vllm_plugin.settings import ProxyTuning
from proxytune_kernels.trio.checkpoints import load_tokenizer
from proxytune_kernels.trio.vocabulary import RoleVocabulary, VocabularyError, agree

logger = init_logger(f"vllm.{__name__}")

_ALPHA = "proxytune_kernels.integrations.vllm_plugin.alpha"
# Drafters that read token ids alone. The others read the hidden states of the model they draft for.
_DRAFTERS = ("ngram", "ngram_gpu", "suffix", "draft_model")
# Formats that one loader reads, whatever the model.
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "pt", "dummy")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class ProxyTunedConfig(VerifyAndUpdateConfig):  # type: ignore[misc]  # vllm is Any here
    """vLLM's hooks for the settings of our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the members and what they share; set the width, the length and the base's place.

        Raises:
            ValueError: a sentence on what does not go, and what to do.
        """
        settings = ProxyTuning.read(model_config)
        _check_model(model_config)
        members = member_configs(model_config, settings, max_model_len=None)
        for role, config in members.items():
            check_member(role, config)
        _set_length(model_config, members)
        proxy_tuning = {
            **model_config.hf_config.proxy_tuning,
            "vocab_size": _width(settings, members),
        }
        model_config.hf_config.proxy_tuning = proxy_tuning
        if settings.base != model_config.model:
            # The weights and what is asked of the checkpoint later are the base's.
            model_config.hf_config_path = model_config.hf_config_path or model_config.model
            model_config.model = settings.base

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check how the engine runs; see that alpha gets to the model, or is refused.

        Raises:
            ValueError: a sentence on what does not go, and what to do.
        """
        _check_engine(vllm_config)
        if vllm_config.use_v2_model_runner:
            _add_processor(vllm_config.model_config, f"{_ALPHA}:AlphaCheck")
        elif vllm_config.speculative_config is None:
            _add_processor(vllm_config.model_config, f"{_ALPHA}:AlphaProcessor")
        else:
            admission.refuse_alpha()


def _add_processor(model_config: Any, name: str) -> None:
    # Not through the entry point group vllm.logits_processors: that would load it for every model,
    # and the V2 runner refuses processors of the V1 kind.
    processors = list(model_config.logits_processors or [])
    model_config.logits_processors = [*processors, *([] if name in processors else [name])]


def _check_model(model_config: Any) -> None:
    if model_config.runner_type != "generate":
        raise ValueError(
            f"a trio generates text: runner must be 'generate', got {model_config.runner_type!r}; "
            "to draft for another model or to embed, serve a member alone"
        )
    if model_config.enable_prompt_embeds:
        raise ValueError(
            "enable_prompt_embeds does not work for a trio: one embedding can't feed three models "
            "with embeddings of their own; send token ids"
        )
    own = getattr(model_config.hf_config, "quantization_config", None)
    if model_config.quantization_config is not None or (model_config.quantization and not own):
        raise ValueError(
            f"quantization must be left out for a trio, got {model_config.quantization!r}: it "
            "would be unclear of which member; name quantised checkpoints, each with its own "
            "quantization_config"
        )


def check_member(role: str, config: Any) -> None:
    """Check that a member is a decoder with ordinary attention that vLLM has a model for."""
    where = f"{role} ({config.model})"
    if config.using_transformers_backend():
        raise ValueError(
            f"{where} must be of an architecture that vLLM itself has, got "
            f"{', '.join(config.architectures)}"
        )
    if config.is_multimodal_model:
        raise ValueError(
            f"{where} must be a language model, got the multimodal {config.architecture}: "
            "name a text-only checkpoint"
        )
    kinds = {
        "an encoder and a decoder": config.is_encoder_decoder,
        "state space layers": config.has_inner_state or config.is_attention_free,
        "latent attention (MLA)": config.use_mla,
    }
    for kind, found in kinds.items():
        if found:
            raise ValueError(
                f"{where} must be a decoder with ordinary attention, got {config.architecture} "
                f"with {kind}"
            )
    hook = MODELS_CONFIG_MAP.get(config.architecture, VerifyAndUpdateConfig)
    if hook.verify_and_update_config is not VerifyAndUpdateConfig.verify_and_update_config:
        raise ValueError(
            f"{where} must be of an architecture that runs with vLLM's common settings, got "
            f"{config.architecture}, which sets the engine's for itself ({hook.__name__})"
        )


def _set_length(model_config: Any, members: Mapping[str, Any]) -> None:
    """Hold max_model_len to what all members read; told so, or found."""
    role = min(members, key=lambda r: members[r].max_model_len)
    longest = members[role].max_model_len
    if model_config.max_model_len <= longest:
        return
    if model_config.original_max_model_len not in (None, -1):
        raise ValueError(
            f"max_model_len must be at most {longest}, the length of {role} "
            f"({members[role].model}), got {model_config.max_model_len}"
        )
    logger.info("max_model_len is %d, the length of %s", longest, role)
    model_config.max_model_len = longest


def _width(settings: ProxyTuning, members: Mapping[str, Any]) -> int:
    """Number of ids that mean the same to all, checked where tokenizers lie beside the members.

    An export compared them, and keeps the base's alone.
    """
    widths = {role: config.get_vocab_size() for role, config in members.items()}
    vocabularies = {}
    for role, config in members.items():
        # The base's may have been named apart from it.
        place = config.tokenizer if role == "base" else config.model
        if _has_tokenizer(place):
            tokenizer = load_tokenizer(
                f"tokenizer of {role}",
                place,
                gguf_file=None,
                trust_remote_code=config.trust_remote_code,
            )
            vocabularies[role] = RoleVocabulary.of(tokenizer, widths[role])
    missing = [role for role in members if role not in vocabularies]
    if settings.vocab_size is None and missing:
        raise VocabularyError(
            f"proxy_tuning must say vocab_size, since there is no tokenizer beside {missing[0]} "
            f"({members[missing[0]].model}) to compare: `proxytune export-vllm` finds it"
        )
    found = agree(vocabularies).vocab_size if vocabularies else min(widths.values())
    said = found if settings.vocab_size is None else settings.vocab_size
    narrowest = min(widths, key=lambda role: widths[role])
    if said > widths[narrowest]:
        raise VocabularyError(
            f"vocab_size of proxy_tuning must be at most {widths[narrowest]}, the logits of "
            f"{narrowest} ({members[narrowest].model}), got {said}: export the trio again"
        )
    if said > found:
        raise VocabularyError(
            f"vocab_size of proxy_tuning must be at most {found}, the ids that the tokenizers of "
            f"{', '.join(vocabularies)} share, got {said}: export the trio again"
        )
    return said


def _has_tokenizer(place: str) -> bool:
    directory = Path(place)
    # A hub name's is fetched.
    return not directory.is_dir() or any((directory / name).is_file() for name in _TOKENIZER_FILES)


def _check_engine(vllm_config: Any) -> None:
    if vllm_config.lora_config is not None:
        raise ValueError(
            "enable_lora does not work for a trio: vLLM would not say which member an adapter is "
            "for; merge it into the expert (`proxytune export-vllm` does)"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTERS:
        raise ValueError(
            f"speculative method must be one of {', '.join(_DRAFTERS)} for a trio, got "
            f"{speculative.method!r}, which reads the hidden states of one model: use 'ngram', or "
            "'draft_model' with the expert as the draft"
        )
    load_format = vllm_config.load_config.load_format
    if load_format not in _LOAD_FORMATS:
        raise ValueError(
            f"load_format must be one of {', '.join(_LOAD_FORMATS)} for a trio, whose weights are "
            f"three checkpoints, got {load_format!r}"
        )
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            "context parallelism does not work for a trio, whose rows carry their alpha by "
            "request: use tensor_parallel_size"
        )
    if parallel.use_ubatching:
        raise ValueError(
            "micro-batches (enable_dbo, ubatch_size) do not work for a trio, whose rows carry "
            "their alpha by request: leave them out"
        )
