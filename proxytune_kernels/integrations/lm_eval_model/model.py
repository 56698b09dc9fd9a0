"""The registered model: lm_eval's requests to token ids, and scores and texts back.

Tasks under several alphas: lm_eval's own evaluation once for each, the forwards once for all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from tqdm import tqdm

from proxytune_kernels.decoder.arguments import rotary_limit, size
from proxytune_kernels.decoder.scoring import Score, Scorer
from proxytune_kernels.integrations.lm_eval_model.generation import (
    Generation,
    Generator,
    make_params,
    request_seed,
)
from proxytune_kernels.params import check_alpha
from proxytune_kernels.trio import Trio, load_trio

MODEL = "proxytune"
"""The model's name in lm_eval."""

_MAX_GEN_TOKS = 256  # lm_eval's own default
_LM_EVAL_DEVICE = "cuda:0"
"""What lm_eval's command line passes where it is given no device."""

_log = logging.getLogger(__name__)


@register_model(MODEL)
class ProxyTuneLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A trio as a model of lm_eval.

    Args:
        trio: ``"shipped"``, a directory with a trio.json, or a :class:`proxytune_kernels.Trio`; or
            name the roles instead.
        alpha: strength of the steering.
        batch_size: sequences that run at the same time.
        max_batch_size: as lm_eval passes it; not used.
        max_length: tokens that a model is given at most; None is the shortest context of the roles.
        max_gen_toks: output tokens where a task does not say.
        add_bos_token: whether the tokenizer adds its special tokens; None is its own default.
        prefix_token_id: what an empty context and the start of a text are; None is the tokenizer's
            BOS, or its EOS where it has none. Where it has neither, a request that needs one is an
            error.
        seed: of sampled generation; None is torch's initial seed, which lm_eval's ``--seed`` sets.
        device: as in :func:`proxytune_kernels.load_trio`; lm_eval's own default "cuda:0" is the CPU
            where torch has no CUDA device.
        backend: of the ops; None is the fastest usable one.
        loading: base, expert, anti, tokenizer, dtype, quantize and the other arguments of
            :func:`proxytune_kernels.load_trio`.

    Raises:
        ValueError: names the argument, what it got and what it wanted; also where a role has
            prompts of its own ("chat"), since lm_eval has one context for all.

    Example:
        >>> lm = ProxyTuneLM("shipped", alpha=0.5)
        >>> lm.max_length
        1024

    Source: docs/lm_eval.md.
    """

    def __init__(
        self,
        trio: str | Trio | None = None,
        *,
        alpha: float = 1.0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        backend: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        self.trio = _open_trio(trio, device, loading)
        self.trio.check_modules(type(self).__name__)
        self.tokenizer = self.trio.tokenizer
        self.batch_size = _positive("batch_size", batch_size)
        self.max_length = _shortest_context(self.trio, max_length)
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._seed = seed
        self._alphas: tuple[float, ...] = (check_alpha(alpha),)
        self._current = 0
        # Results for every alpha, kept while several are evaluated one after the other.
        self._kept: dict[bytes, Any] | None = None
        self._device = self.trio.base.device
        self._readable: int = min(
            model.get_input_embeddings().weight.shape[0] for model in self.trio.models.values()
        )
        self._scorer = Scorer(self.trio, backend)
        self._generator = Generator(self.trio, self.batch_size, self.max_length, backend)

    @property
    def alpha(self) -> float:
        """The strength that results are for."""
        return self._alphas[self._current]

    def each_alpha(self, alphas: Sequence[float]) -> Iterator[float]:
        """Set :attr:`alpha` to each of these in turn.

        What is asked for under one of them is computed for all, with the same forwards, and kept
        until the iterator ends.
        """
        before = self._alphas
        self._alphas = tuple(check_alpha(alpha) for alpha in alphas)
        self._kept = {}
        try:
            for i in range(len(self._alphas)):
                self._current = i
                yield self.alpha
        finally:
            self._alphas, self._current, self._kept = before, 0, None

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        token_id: int | None = self.tokenizer.eos_token_id
        return token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        token_id = self._prefix()
        if token_id is None:
            raise ValueError(
                "prefix_token_id must be given for an empty context or a rolling text, since the "
                "tokenizer has neither BOS nor EOS"
            )
        return token_id

    def _prefix(self) -> int | None:
        known = (self._prefix_token_id, self.tokenizer.bos_token_id, self.eot_token_id)
        return next((token_id for token_id in known if token_id is not None), None)

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of requests that lm_eval keeps where it is told to."""
        name: str = self.tokenizer.name_or_path
        return name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; no second BOS where it begins with one."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            prefix = self._prefix()
            if prefix is not None and has_bos_prefix(string, self.tokenizer.decode(prefix)):
                add_special_tokens = False
        keywords = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **keywords)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as one text for all roles, by the base's tokenizer."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "apply_chat_template needs a tokenizer with a chat template, and the base's has "
                "none: give tokenizer= the expert's directory if it has one"
            )
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside the results."""
        return {"alpha": self.alpha, "trio": self.trio.info(), "scoring": self._scorer.info()}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Score]:
        """Scores of (strings, context, continuation), in their order."""
        keys = [self._checked(context, continuation) for _, context, continuation in requests]
        kept: dict[bytes, tuple[Score, ...]] = {} if self._kept is None else self._kept
        new: dict[bytes, list[int]] = {}
        for i, key in enumerate(keys):
            if key not in kept:
                new.setdefault(key, []).append(i)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        bar.update(len(requests) - sum(map(len, new.values())))
        waiting = list(new.items())

        def scored(request: int, scores: tuple[Score, ...]) -> None:
            key, places = waiting[request]
            kept[key] = scores
            for place in places:
                if (strings := requests[place][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, scores[self._current])
            bar.update(len(places))

        with bar:
            self._scorer.score(
                [requests[places[0]][1:] for _, places in waiting],
                self._alphas,
                batch_size=self.batch_size,
                max_length=self.max_length,
                scored=scored,
            )
        return [kept[key][self._current] for key in keys]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts; those longer than the context in disjoint windows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [utils.make_disjoint_window(window) for window in rolling]
            windows += [(None, *window) for window in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        found = []
        for request, count in zip(requests, counts, strict=True):
            found.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to their stop strings."""
        seed = torch.initial_seed() if self._seed is None else self._seed
        repeats: dict[str, int] = {}
        kept: dict[bytes, list[str]] = {} if self._kept is None else self._kept
        keys, new = [], {}
        for i, (context, gen_kwargs) in enumerate(request.args for request in requests):
            named = json.dumps([context, gen_kwargs], sort_keys=True, default=str)
            repeats[named] = repeats.get(named, -1) + 1
            own_seed = request_seed(seed, context, gen_kwargs, repeats[named])
            keys.append(own_seed.to_bytes(8, "little"))
            if keys[-1] not in kept:
                new[i] = self._generation(context, gen_kwargs, own_seed)
        waiting = list(new)
        bar = tqdm(
            total=len(waiting) * len(self._alphas),
            disable=disable_tqdm,
            desc="Running generate_until requests",
        )

        def done(place: int, alpha: int, text: str) -> None:
            i = waiting[place]
            kept.setdefault(keys[i], [""] * len(self._alphas))[alpha] = text
            if alpha == self._current:
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
            bar.update()

        with bar:
            if waiting:
                self._generator.generate(list(new.values()), self._alphas, done)
        return [kept[key][self._current] for key in keys]

    def _generation(self, context: str, gen_kwargs: Mapping[str, Any], seed: int) -> Generation:
        eot = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        params, until = make_params(gen_kwargs, self.tokenizer, eot, self.max_gen_toks, seed)
        room = self.max_length - params.max_tokens
        if room < 1:
            raise ValueError(
                f"generate_until: max_gen_toks must be below max_length {self.max_length}, "
                f"got {params.max_tokens}"
            )
        prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return Generation(prompt, until, params)

    def _checked(self, context: Sequence[int], continuation: Sequence[int]) -> bytes:
        """A short name for a request that can be scored."""
        if not context or not continuation:
            part = "continuation" if context else "context"
            raise ValueError(f"loglikelihood: {part} must have at least one token, got none")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"loglikelihood: a continuation must have at most max_length {self.max_length} "
                f"tokens, got {len(continuation)}"
            )
        outside = [i for i in (*context, *continuation[:-1]) if not 0 <= i < self._readable]
        if outside:
            raise ValueError(
                f"loglikelihood: token ids must be in [0, {self._readable}), which all roles can "
                f"read, got {outside[0]}"
            )
        ids = array("q", (len(context), *context, *continuation))
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


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
        # lm_eval would only log, after all has run, that results can't be written.
        folder = Path(output_path)
        (folder.parent if folder.suffix == ".json" else folder).mkdir(parents=True, exist_ok=True)
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
        general.model_name_sanitized = utils.sanitize_model_name(general.model_name)
        _save(tracker, results)
        yield alpha, results


def document_scores(
    lm: ProxyTuneLM,
    alphas: Sequence[float],
    task: str,
    metric: str | None = None,
    **arguments: Any,
) -> tuple[str, list[list[float]]]:
    """A task's scores document by document, for comparisons that are paired.

    Args:
        lm: the model; its own alpha is not used.
        alphas: each once.
        task: one task, no group.
        metric: one that the task gives each document; None is its first.
        arguments: as in :func:`evaluate_alphas`, but for tasks.

    Returns:
        (metric, scores [A][N]), higher is better: those of a metric that should be low have their
        sign turned, and a minus before the metric's name.

    Raises:
        ValueError: a group, a metric that the task does not have, or one that is no number for a
            document alone, as perplexities are.
    """
    scores: list[list[float]] = []
    lower = False
    # lm_eval's own bootstrap is of the means, which are not used.
    given = {"tasks": [task], "log_samples": True, "bootstrap_iters": 0, **arguments}
    for _, results in evaluate_alphas(lm, alphas, **given):
        samples = results["samples"].get(task)
        if not samples:
            raise ValueError(f"{task} must be one task of lm_eval, not a group of them")
        metric = metric or samples[0]["metrics"][0]
        if metric not in samples[0]["metrics"]:
            known = ", ".join(samples[0]["metrics"])
            raise ValueError(f"{task} must have the metric {metric!r}, it has {known}")
        lower = results["higher_is_better"][task].get(metric) is False
        # The first of a task's filters.
        own = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        try:
            found = [float(s[metric]) for s in sorted(own, key=lambda s: s["doc_id"])]
        except TypeError as error:
            raise ValueError(
                f"{metric} of {task} must be a number for each document, got {own[0][metric]!r:.80}"
            ) from error
        scores.append([-x for x in found] if lower else found)
    return f"{'-' if lower else ''}{metric}", scores


def _save(tracker: EvaluationTracker, results: dict[str, Any]) -> None:
    samples = results.get("samples")
    summary = {key: value for key, value in results.items() if key != "samples"}
    tracker.save_results_aggregated(results=summary, samples=samples)
    for task, own in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=own)


def _open_trio(trio: Any, device: str | None, loading: Mapping[str, Any]) -> Trio:
    """The trio itself, or loaded; with one prompt for all roles."""
    if isinstance(trio, Trio):
        if loading:
            raise ValueError(f"{next(iter(loading))} must not be given with a Trio")
        opened = trio
    else:
        if device == _LM_EVAL_DEVICE and not torch.cuda.is_available():
            _log.warning(
                "device is the CPU: torch has no CUDA device here, and cuda:0 is what "
                "lm_eval asks for where --device is not given"
            )
            device = "cpu"
        opened = load_trio(trio, device=device, **loading)
    chat = [role for role, style in opened.prompts.items() if style == "chat"]
    if chat:
        raise ValueError(
            f"prompts of {', '.join(chat)} must be 'plain', got 'chat': lm_eval gives one context "
            "for all roles (--apply-chat-template makes it a chat for all of them)"
        )
    return opened


def _positive(name: str, value: Any) -> int:
    """A count of at least 1, perhaps written out."""
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    return size(name, value)


def _shortest_context(trio: Trio, value: int | None) -> int:
    """``max_length``: as asked for, or the shortest context of the roles."""
    contexts: dict[str, int] = {}
    for role, model in trio.models.items():
        config = model.config.get_text_config(decoder=True)
        limit = rotary_limit(config)  # padded to a longer text, a shorter one has its factors
        length = resolve_max_length(config, trio.tokenizer)
        contexts[role] = length if limit is None else min(length, limit)
    shortest = min(contexts, key=contexts.__getitem__)
    if value is None:
        return contexts[shortest]
    if _positive("max_length", value) > contexts[shortest]:
        raise ValueError(
            f"max_length must be at most {contexts[shortest]}, the context of {shortest}, "
            f"got {value}"
        )
    return value
