"""Tasks under several alphas: lm_eval's own evaluation once for each, the forwards once for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import sanitize_model_name

from proxytune_kernels.integrations.lm_eval_model.model import ProxyTuneLM

MODEL = "proxytune"


def evaluate_alphas(
    lm: ProxyTuneLM,
    alphas: Sequence[float],
    *,
    name: str | None = None,
    output_path: str | None = None,
    log_samples: bool = False,
    model_args: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Evaluate tasks for each alpha in turn.

    Args:
        lm: the model; its own alpha is not used.
        alphas: each once. The forwards run for the first of them, for all.
        name: of the results' folders, ``NAME-alpha-0.5``; None is the base's.
        output_path: where lm_eval writes results, and samples with ``log_samples``; None is
            nowhere.
        model_args: what the results say that the model was made with.
        arguments: of ``lm_eval.simple_evaluate``: tasks, num_fewshot, limit, task_manager, ...

    Returns:
        (alpha, what ``simple_evaluate`` returned, with ``samples`` if logged).

    Raises:
        ValueError, OSError: as ``simple_evaluate``; a folder that can't be made.

    Example:
        >>> lm = ProxyTuneLM("shipped")
        >>> list(evaluate_alphas(lm, [], tasks=[]))
        []
    """
    if name is None:
        name = Path(lm.trio.base.config._name_or_path).name or MODEL
    if output_path is not None:
        _make_folder(Path(output_path))
    for alpha in lm.each_alpha(alphas):
        tracker = EvaluationTracker(output_path=output_path)
        results = simple_evaluate(
            model=lm,
            model_args={**(model_args or {}), "alpha": alpha},
            batch_size=lm.batch_size,
            device=str(lm.device),
            evaluation_tracker=tracker,
            log_samples=log_samples,
            **arguments,
        )
        # lm_eval knows a model that it did not make itself by its class alone.
        results["config"]["model"] = MODEL
        general = tracker.general_config_tracker
        general.model_source = MODEL
        general.model_name = f"{name}-alpha-{alpha:g}"
        general.model_name_sanitized = sanitize_model_name(general.model_name)
        _save(tracker, results)
        yield alpha, results


def _make_folder(path: Path) -> None:
    """Find out before anything runs that results can't be written: lm_eval would only log it."""
    (path.parent if path.suffix == ".json" else path).mkdir(parents=True, exist_ok=True)


def _save(tracker: EvaluationTracker, results: dict[str, Any]) -> None:
    samples = results.get("samples")
    summary = {key: value for key, value in results.items() if key != "samples"}
    tracker.save_results_aggregated(results=summary, samples=samples)
    for task, own in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=own)
