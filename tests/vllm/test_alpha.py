"""Alpha's way to the model in the V1 runner, without an engine."""

from __future__ import annotations

from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import torch


def settings(default: float = 1.0) -> Any:
    """As much of an engine's configuration as the processor reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(proxy_tuning={"alpha": default}),
            architectures=["ProxyTunedForCausalLM"],
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=5),
        compilation_config=SimpleNamespace(static_forward_context={}),
        speculative_config=None,
        use_v2_model_runner=False,
    )


def params(alpha: Any) -> Any:
    return SimpleNamespace(extra_args=None if alpha is None else {"alpha": alpha})


def test_the_table_follows_the_batch():
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from proxytune_kernels.integrations.vllm_plugin.alpha import AlphaProcessor, table

    config = settings(0.25)
    processor = AlphaProcessor(config, torch.device("cpu"), False)
    rows = table(config)
    assert rows is not None

    def update(removed: Any = (), added: Any = (), moved: Any = ()) -> list[float]:
        added = [(row, params(alpha), None, []) for row, alpha in added]
        batch = BatchUpdate(batch_size=5, removed=removed, added=added, moved=moved)
        processor.update_state(batch)
        return rows.tolist()

    assert rows.tolist() == [0.25] * 5
    assert update(added=[(0, 1.0), (1, -2.0), (2, None), (3, 0.5)]) == [1, -2, 0.25, 0.5, 0.25]
    processor.update_state(None)
    assert update(moved=[(0, 3, MoveDirectionality.SWAP)]) == [0.5, -2, 0.25, 1, 0.25]
    # A request leaves, the last one takes its place, and another comes in.
    one_way = MoveDirectionality.UNIDIRECTIONAL
    assert update(removed=[1], moved=[(3, 1, one_way)]) == [0.5, 1, 0.25, 0.25, 0.25]
    assert update(removed=[0], added=[(0, 2)]) == [2, 1, 0.25, 0.25, 0.25]
    assert update(removed=[0]) == [0.25, 1, 0.25, 0.25, 0.25]
    logits = torch.randn(2, 3)
    assert processor.apply(logits) is logits


def test_an_engine_without_a_table_does_not_find_anothers():
    from proxytune_kernels.integrations.vllm_plugin.alpha import AlphaProcessor, table

    first, second = settings(), settings()
    AlphaProcessor(first, torch.device("cpu"), False)
    assert table(second) is None


@pytest.mark.parametrize("alpha", ["0.5", True, float("nan"), float("inf"), [1.0]])
def test_what_is_no_finite_number_is_refused(alpha):
    from vllm.exceptions import VLLMValidationError

    from proxytune_kernels.integrations.vllm_plugin.alpha import AlphaCheck, AlphaProcessor

    for processor in (AlphaProcessor, AlphaCheck):
        processor.validate_params(params(-1))
        with pytest.raises(VLLMValidationError, match="alpha must be a finite number"):
            processor.validate_params(params(alpha))


def test_prompts_per_role_are_refused():
    from vllm.exceptions import VLLMValidationError

    from proxytune_kernels.integrations.vllm_plugin.alpha import check_request

    with pytest.raises(VLLMValidationError, match="one prompt for all three models"):
        check_request(SimpleNamespace(extra_args={"prompts": {"expert": "Hello"}}))


def test_processors_of_no_other_model_are_registered():
    """The group is for all models, and the V2 runner refuses processors of the V1 kind in it."""
    assert not [e for e in entry_points(group="vllm.logits_processors") if "proxytune" in e.value]
