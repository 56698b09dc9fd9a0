"""The trio as one vLLM model: three forwards, one combination on the sharded logits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_gather,
)
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.sequence import IntermediateTensors

from proxytune_kernels import ops
from proxytune_kernels.integrations.vllm_plugin import alpha as alphas
from proxytune_kernels.integrations.vllm_plugin.config import ProxyTuning, member_configs
from proxytune_kernels.ops.sharded import Shard
from proxytune_kernels.trio.roles import PAIR

logger = init_logger(f"vllm.{__name__}")


class ProxyTunedForCausalLM(nn.Module):
    """Base, expert and anti as vLLM's own models, side by side in one engine.

    What ``forward`` gives for each token is the members' hidden states side by side, and alpha's
    four bytes behind them: the runner picks rows (of a prompt its last, of drafts all, for prompt
    logprobs any), and each keeps its alpha whatever is picked.
    """

    supports_pp = True
    members: Any

    @classmethod
    def get_model_state_cls(cls) -> type:
        """What keeps alpha by request in the V2 runner."""
        # Only that runner asks, which needs Triton.
        from proxytune_kernels.integrations.vllm_plugin.v2_runner import ProxyTunedState

        return ProxyTunedState

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        self.vllm_config = vllm_config
        settings = ProxyTuning.read(model_config)
        self.alpha = settings.alpha
        configs = member_configs(model_config, settings)
        self.members = nn.ModuleDict(
            {
                role: _make_member(vllm_config, config, role, prefix)
                for role, config in configs.items()
            }
        )
        self.vocab_size = model_config.get_vocab_size()
        self.agreed = settings.vocab_size
        self.dtype = model_config.dtype
        # True: a rank may keep its part of the logits, for a sampler that draws from parts; the
        # ranks agree on the parts once.
        self.in_parts = False
        self.shard: Shard | None = None
        # Of what forward gives: the members' columns, then those that hold alpha's fp32 bits.
        self.widths = [config.get_hidden_size() for config in configs.values()]
        self.widths.append(4 // self.dtype.itemsize)
        # A member's logits stay on their rank, with all that the member does to them (soft caps,
        # scales): the trio gathers.
        for module in self.modules():
            if isinstance(module, LogitsProcessor):
                module._gather_logits = _leave
        # vLLM loads the checkpoint of ModelConfig.model, the base's, then these.
        self.secondary_weights = [
            DefaultModelLoader.Source(getattr(settings, role), None, prefix=_prefix(role))
            for role in PAIR
        ]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's embeddings; a member embeds its own in ``forward``."""
        return self.members["base"].embed_input_ids(input_ids)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a later stage of the pipeline gets from the one before."""
        return _merge(
            {
                role: member.make_empty_intermediate_tensors(batch_size, dtype, device)
                for role, member in self.members.items()
            }
        )

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Hidden states [tokens, sum of the members' widths + alpha's columns].

        Args:
            input_ids, positions: [tokens].
            intermediate_tensors: of all members, on a later stage of a pipeline.
            inputs_embeds: always None: one embedding can't feed three models.
            alpha: fp32 [tokens], from the V2 runner; the V1 runner's is looked up.
        """
        if inputs_embeds is not None:
            raise ValueError("a trio reads token ids: each member has embeddings of its own")
        outputs = {}
        for role, member in self.members.items():
            own = None if intermediate_tensors is None else _of_role(intermediate_tensors, role)
            outputs[role] = member(input_ids, positions, intermediate_tensors=own)
        if not get_pp_group().is_last_rank:
            return _merge(outputs)
        hidden = list(outputs.values())
        if any(h.dtype != self.dtype for h in hidden):
            # cat would convert alpha's bits as if they were numbers.
            raise TypeError(
                f"members must give hidden states in {self.dtype}, got "
                f"{', '.join(str(h.dtype) for h in hidden)}"
            )
        if alpha is None:
            alpha = self._alpha_by_token(hidden[0].shape[0], hidden[0].device)
        return torch.cat([*hidden, alpha.view(-1, 1).view(self.dtype)], dim=-1)

    def _alpha_by_token(self, tokens: int, device: torch.device) -> Tensor:
        """Alpha by token, fp32 [tokens]: the V1 runner's table by row, spread over their tokens."""
        table = alphas.table(self.vllm_config)
        metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
        if table is None or not metadata:  # no request has its own; a run for profiling
            return torch.full((tokens,), self.alpha, dtype=torch.float32, device=device)
        starts = next(iter(metadata.values())).query_start_loc  # [rows + 1]
        index = torch.arange(tokens, device=device, dtype=starts.dtype)
        rows = torch.bucketize(index, starts[1:], right=True)
        # Padding past the last row's tokens, which nobody reads, stays within the table.
        return table[rows.clamp_(max=table.shape[0] - 1)]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Combined logits, fp32 [rows, vocab_size], -inf past the agreed width.

        Each rank combines its shard of the vocabulary, and one gather joins them. A sampler that
        draws ``in_parts`` gets this rank's alone, [rows, this rank's width]. Where the members'
        shards hold other ids, since their vocabularies are padded to other widths, each member's
        are gathered first, whatever the sampler does, and ``in_parts`` becomes False.
        """
        *hidden, bits = hidden_states.split(self.widths, dim=-1)
        alpha = bits.contiguous().view(torch.float32).view(-1)
        members = zip(self.members.values(), hidden, strict=True)
        logits = [member.compute_logits(h) for member, h in members]
        gather = tensor_model_parallel_all_gather
        sharded = get_tensor_model_parallel_world_size() > 1
        if sharded and len({shard.shape[-1] for shard in logits}) > 1:
            logger.info_once("the members' vocabularies are padded differently: three gathers")
            logits, sharded = [gather(shard) for shard in logits], False
        self.in_parts &= sharded
        base, expert, anti = logits
        x = ops.combine(base, expert, anti, alpha)
        if self.in_parts:
            self.shard = self.shard or self._agree(x)
            return x
        if sharded:
            x = gather(x)
        # Ids that not every member has. The sampler's tables are as wide as the base's logits.
        x[:, self.agreed :] = -torch.inf
        if x.shape[-1] < self.vocab_size:
            return pad(x, (0, self.vocab_size - x.shape[-1]), value=-torch.inf)
        return x[:, : self.vocab_size]

    def _agree(self, x: Tensor) -> Shard:
        """The ranks' parts of the agreed ids, each with logits as wide as these; a collective."""
        start = min(get_tensor_model_parallel_rank() * x.shape[-1], self.agreed)
        size = min(x.shape[-1], self.agreed - start)
        group = get_tp_group().device_group
        shard = Shard.agree(start, size, group=group, device=x.device)
        logger.info("tokens are drawn from %d ranks' parts of the logits", shard.world_size)
        return shard

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Hand each member its checkpoint; names what was loaded."""
        loaded: set[str] = set()
        for role, named in itertools.groupby(weights, key=lambda item: _role_of(item[0])):
            cut = 0 if role == "base" else len(_prefix(role))
            names = self.members[role].load_weights((name[cut:], w) for name, w in named)
            loaded |= {f"members.{role}.{name}" for name in names}
        return loaded


def _make_member(vllm_config: Any, config: Any, role: str, prefix: str) -> nn.Module:
    """Make a role's model, without weights; its layers are named after the role."""
    # The tag keeps what is compiled for one member apart from another's.
    with set_model_tag(f"proxytune_{role}"):
        return initialize_model(
            _member_vllm_config(vllm_config, config), prefix=f"{prefix}.{role}" if prefix else role
        )


def _member_vllm_config(vllm_config: Any, config: Any) -> Any:
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


def _leave(logits: Tensor) -> Tensor:
    return logits


def _prefix(role: str) -> str:
    return f"__{role}__."


def _role_of(name: str) -> str:
    return next((role for role in PAIR if name.startswith(_prefix(role))), "base")


def _merge(outputs: dict[str, IntermediateTensors]) -> IntermediateTensors:
    return IntermediateTensors(
        {f"{role}.{name}": t for role, own in outputs.items() for name, t in own.items()}
    )


def _of_role(tensors: IntermediateTensors, role: str) -> IntermediateTensors:
    start = f"{role}."
    return IntermediateTensors(
        {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}
    )
