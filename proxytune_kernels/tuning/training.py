"""Tune an anti-expert into an expert: LoRA by PEFT, or all weights, in transformers' Trainer.

The same seed, threads and data give the same bytes, in one run or in one that was interrupted and
resumed. LoRA: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from proxytune_kernels.tuning.data import Example

RECORD = "training.json"
"""What was trained, how, and how it went; beside trio.json."""
CHECKPOINTS = "checkpoints"
_WRITTEN = "written"  # the file that is put into a checkpoint last
_IGNORED = -100  # the label of a position that does not count, as cross_entropy wants it
_VERSIONS = ("torch", "transformers", "peft", "accelerate")

Advance = Callable[[int, float], None]
"""Is told the number of the step that is done, and its loss."""


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of an expert, beside the anti-expert.

    Args:
        steps: of the optimizer.
        batch_size: examples of a step.
        learning_rate: the highest: it goes up over the first steps, then down a cosine to 0.
        rank, lora_alpha: of the adapter; nothing with ``full``.
        full: train all weights, not an adapter.
        seed: of the adapter's first weights and of the order of examples.
        threads: of torch.
        dtype: of the weights that are trained on; "auto" is the checkpoint's.
        device: where.
        data: SHA-256 of the examples.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    rank: int = 16
    lora_alpha: int = 32
    full: bool = False
    seed: int = 0
    threads: int = 1
    dtype: str = "auto"
    device: str = "cpu"
    data: str = ""


def attach(model: Any, rank: int, lora_alpha: int) -> Any:
    """Put fresh adapters into every linear layer of a model but the output layer, in place."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    with quiet_peft():
        adapted = get_peft_model(model, config)
    # PEFT writes a set, in the order of this process's hashes.
    own: Any = adapted.peft_config["default"]
    own.target_modules = sorted(own.target_modules)
    return adapted


def fit(
    model: Any,
    examples: Sequence[Example],
    settings: Settings,
    directory: Path,
    *,
    advance: Advance,
    save_every: int,
    resume: bool = False,
) -> list[float]:
    """Train a model in place on the answers of examples.

    Args:
        model: with its adapters, or without any to train all weights.
        examples: what the expert reads of them is trained on.
        settings: how.
        directory: of checkpoints.
        advance: is told of each step.
        save_every: steps between checkpoints.
        resume: go on from the last checkpoint in ``directory``, if there is one.

    Returns:
        The mean loss of each step, in nats per answer token.

    Raises:
        RuntimeError: the loss is no number.
    """
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, settings.steps // 4),
        weight_decay=0.0,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=settings.device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # DataParallel would split among devices what all rows of a batch share.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(examples),  # anything that has a length
        data_collator=_Collator(model),
        compute_loss_func=_loss,
        callbacks=[_Report(advance)],
    )
    trainer.remove_callback(PrinterCallback)
    last = _last_checkpoint(directory) if resume else None
    with quiet_peft(), _deterministic():
        trainer.train(resume_from_checkpoint=last)
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _Collator:
    """Examples as one batch: ``input_ids`` [B, L], and labels of the positions whose logits count.

    Padding stands on the right, where a causal model needs no mask for it.
    """

    def __init__(self, model: Any) -> None:
        inner = getattr(model, "get_base_model", lambda: model)()
        self._keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        pairs = [(example.prompts["expert"], example.answer) for example in examples]
        length = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
        input_ids = torch.zeros((len(pairs), length), dtype=torch.long)
        labels = torch.full_like(input_ids, _IGNORED)
        for row, (prompt, answer) in enumerate(pairs):
            last = len(prompt) + len(answer) - 1
            input_ids[row, :last] = torch.tensor([*prompt, *answer][:-1])
            labels[row, len(prompt) - 1 : last] = torch.tensor(answer)
        if not self._keeps:
            return {"input_ids": input_ids, "labels": labels}
        # The logits of all positions would be most of the memory and, of small models, the work.
        keep = (labels != _IGNORED).any(0).nonzero()[:, 0]
        return {"input_ids": input_ids, "logits_to_keep": keep, "labels": labels[:, keep]}


def _loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean over a batch's answer tokens; a step is one batch."""
    logits = outputs.logits.float()
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)


class _Report(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise RuntimeError(
                    f"the loss of step {state.global_step} is {logs['loss']}: lower --learning-rate"
                )
            self._advance(state.global_step, logs["loss"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (folder / _WRITTEN).touch()


def _last_checkpoint(directory: Path) -> str | None:
    """The last checkpoint that was written to its end, whatever ended the run."""
    written = [path.parent for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_WRITTEN}")]
    return str(max(written, key=lambda path: int(path.name.split("-")[-1]))) if written else None


def save_expert(model: Any, directory: Path, anti: str, tokenizer: Any) -> None:
    """Write an expert: its adapter, or the whole checkpoint with its tokenizer.

    Args:
        model: as :func:`fit` left it.
        directory: is made.
        anti: directory or hub name of the model that an adapter is for.
        tokenizer: of a whole checkpoint.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = anti
        with quiet_peft():
            model.save_pretrained(str(partial), save_embedding_layers=False)
    else:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    for file in partial.glob("*.safetensors"):
        # It is readable by its owner alone; whoever serves it may be another.
        shutil.copymode(next(partial.glob("*.json")), file)
    partial.rename(directory)


def write_record(directory: Path, settings: Settings, **results: Any) -> None:
    """Write how an expert is trained, and with results how it went."""
    versions = {name: version(name) for name in _VERSIONS}
    record = {"settings": asdict(settings), "versions": versions, **results}
    (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings of a run that was begun.

    Raises:
        ValueError: none was.
    """
    path = directory / RECORD
    if not path.is_file():
        raise ValueError(f"--resume needs a run that was begun, got {directory} without {RECORD}")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    return settings


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep notes on how transformers sorts checkpoints, and on what PEFT asks it for, to itself."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks for an attribute that transformers 5.23 renamed; both work until v6.
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
            yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Have torch choose algorithms that repeat bit for bit, where it has some."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)


def begin(settings: Settings) -> None:
    """Set torch's threads and seeds."""
    torch.set_num_threads(settings.threads)
    set_seed(settings.seed)
