"""What a trio's config.json says of its members, and what vLLM asks before it makes an engine.

vLLM has two hooks: one for the ModelConfig, in every process that makes one, and one for the whole
VllmConfig. Both run before any weight is read. What can't work is refused with a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from proxytune_kernels.integrations.vllm_plugin.alpha import refuse_alpha
from proxytune_kernels.params import check_alpha
from proxytune_kernels.trio.checkpoints import load_tokenizer, resolve
from proxytune_kernels.trio.files import find
from proxytune_kernels.trio.roles import ROLES
from proxytune_kernels.trio.vocabulary import RoleVocabulary, VocabularyError, agree

logger = init_logger(f"vllm.{__name__}")

_WHERE = "proxy_tuning in config.json (or in --hf-overrides)"
# In place of proxy_tuning in a member's own configuration: a trio has no trio among its members.
_MEMBER = "member"
_REMEDY = "`proxytune export-vllm` writes one"
_ALPHA = "proxytune_kernels.integrations.vllm_plugin.alpha"
# Drafters that read token ids alone. The others read the hidden states of the model they draft for.
_DRAFTERS = ("ngram", "ngram_gpu", "suffix", "draft_model")
# Formats that one loader reads, whatever the model.
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "pt", "dummy")
# What all members take from the trio's ModelConfig.
_COMMON = (
    *("tokenizer", "tokenizer_mode", "skip_tokenizer_init", "trust_remote_code", "dtype", "seed"),
    *("max_model_len", "enforce_eager", "config_format", "disable_sliding_window", "model_impl"),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class ProxyTuning:
    """Where the members are, and what they share.

    Args:
        expert, anti: directory or hub name.
        base: the same of the base where the trio's own directory does not hold its weights.
        alpha: of requests that name none.
        base_architectures: the base's own ``architectures``, where the config.json that names the
            trio's is the base's.
        vocab_size: agreed width; found from the tokenizers where it is not given.
    """

    expert: str
    anti: str
    base: str
    alpha: float = 1.0
    base_architectures: tuple[str, ...] | None = None
    vocab_size: int | None = None

    @classmethod
    def read(cls, model_config: Any) -> ProxyTuning:
        """Read and check what the trio's ModelConfig holds.

        Raises:
            ValueError: what is missing or wrong, and what to do.
        """
        given = getattr(model_config.hf_config, "proxy_tuning", None)
        if given == _MEMBER:
            raise ValueError(
                f"a member must be one model, got the trio {model_config.model}: where config.json "
                "is the base's own, base_architectures in proxy_tuning must name the base's"
            )
        if not isinstance(given, Mapping):
            raise ValueError(f"{_WHERE} must be an object, got {given!r}: {_REMEDY}")
        if "prompts" in given:
            raise ValueError(
                f"{_WHERE} must not have prompts: vLLM reads one prompt for all three models; "
                "prompts per role need proxytune_kernels.Decoder"
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"{_WHERE} must have keys among {', '.join(known)}, got {unknown[0]!r}"
            )
        directory = Path(model_config.hf_config_path or model_config.model)
        base = given.get("base")
        return cls(
            expert=_path("expert", given, directory),
            anti=_path("anti", given, directory),
            base=model_config.model if base is None else _path("base", given, directory),
            alpha=check_alpha(given.get("alpha", 1.0)),
            base_architectures=_architectures(given.get("base_architectures")),
            vocab_size=_vocab_size(given.get("vocab_size")),
        )

    def overrides(self, role: str, trio_overrides: Any) -> dict[str, Any]:
        """``hf_overrides`` of a role's own configuration, of those that the trio got."""
        if role != "base":
            return {"proxy_tuning": _MEMBER}
        if not isinstance(trio_overrides, Mapping):
            raise ValueError(
                f"hf_overrides must be a mapping for a trio, got {type(trio_overrides).__name__}"
            )
        own = {
            k: v for k, v in trio_overrides.items() if k not in ("architectures", "proxy_tuning")
        }
        own["proxy_tuning"] = _MEMBER
        if self.base_architectures is not None:
            own["architectures"] = list(self.base_architectures)
        return own


def _path(role: str, given: Mapping[str, Any], directory: Path) -> str:
    path = given.get(role)
    if not isinstance(path, str) or not path:
        raise ValueError(f"{_WHERE} must name {role}, got {path!r}: {_REMEDY}")
    return resolve(path, directory if directory.is_dir() else None)


def _architectures(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(name, str) for name in given) or not given:
        raise ValueError(f"{_WHERE} must list names in base_architectures, got {given!r}")
    return tuple(given)


def _vocab_size(given: Any) -> int | None:
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ValueError(f"{_WHERE} must have a positive integer vocab_size, got {given!r}")
    return given


def member_configs(model_config: Any, settings: ProxyTuning, **changes: Any) -> dict[str, Any]:
    """Role -> its own ModelConfig, of what is common to all from the trio's.

    A member's quantisation, layers and tokenizer are those of its checkpoint. Overrides of the
    trio's config.json, such as rope settings, are the base's.

    Args:
        model_config: the trio's ModelConfig.
        settings: what it says of the members.
        changes: other arguments of ModelConfig.
    """
    common = {name: getattr(model_config, name) for name in _COMMON} | {"runner": "generate"}
    own: dict[str, dict[str, Any]] = {role: {} for role in ROLES}
    own["base"] = {name: getattr(model_config, name) for name in ("revision", "code_revision")}
    return {
        role: ModelConfig(
            model=getattr(settings, role),
            hf_overrides=settings.overrides(role, model_config.hf_overrides),
            **{**common, **own[role], **changes},
        )
        for role in ROLES
    }


class ProxyTunedConfig(VerifyAndUpdateConfig):  # type: ignore[misc]  # vllm is Any here
    """vLLM's hooks for the settings of our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the members and what they share; set the width, the length and the base's place."""
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
        """Check how the engine runs; see that alpha gets to the model, or is refused."""
        _check_engine(vllm_config)
        if vllm_config.use_v2_model_runner:
            _add_processor(vllm_config.model_config, f"{_ALPHA}:AlphaCheck")
        elif vllm_config.speculative_config is None:
            _add_processor(vllm_config.model_config, f"{_ALPHA}:AlphaProcessor")
        else:
            refuse_alpha()


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
            whose, trusted = f"tokenizer of {role}", config.trust_remote_code
            found_at = find(whose, place, *(["*.py"] if trusted else []))
            tokenizer = load_tokenizer(whose, found_at, trust_remote_code=trusted)
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
