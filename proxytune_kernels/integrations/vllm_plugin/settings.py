"""What a trio's config.json says of its members, under ``proxy_tuning``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from proxytune_kernels.params import check_alpha
from proxytune_kernels.trio.checkpoints import resolve

_WHERE = "proxy_tuning in config.json (or in --hf-overrides)"
# In place of proxy_tuning in a member's own configuration: a trio has no trio among its members.
_MEMBER = "member"
_REMEDY = "`proxytune export-vllm` writes one"


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
