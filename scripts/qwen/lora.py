"""Train the expert: a LoRA adapter on the small model, for arithmetic word problems.

LoRA: Hu et al. 2021, arXiv 2106.09685. The adapter is saved in PEFT's format; `merge` also makes
a full checkpoint of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from proxytune_kernels.tuning.training import attach as attach_adapters
from proxytune_kernels.tuning.training import quiet_peft
from scripts.evaluation import IGNORED, Pair, answer_logits, padded_batch
from scripts.qwen.download import TrioError, new_directory, save_checkpoint
from scripts.qwen.problems import TRAINING_SEED, Problem, training

RECORD = "training.json"


@dataclass(frozen=True)
class Settings:
    """How the adapter is trained; `steps * batch_size` problems are drawn."""

    steps: int = 24
    batch_size: int = 8
    learning_rate: float = 1e-3
    rank: int = 16
    lora_alpha: int = 32
    seed: int = 0
    data_seed: int = TRAINING_SEED

    @property
    def problems(self) -> list[Problem]:
        """The training problems, in order."""
        return training(self.steps * self.batch_size)

    def rate(self, step: int) -> float:
        """The learning rate of a step: up over 5 steps, then down a cosine to a tenth."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / 5) * (0.1 + 0.9 * cosine)


def answer_pair(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> Pair:
    """A problem's prompt, and its answer with the end-of-sequence token."""
    answer = [*tokenizer(problem.completion).input_ids, tokenizer.eos_token_id]
    return tokenizer(problem.prompt).input_ids, answer


def attach(model: torch.nn.Module, settings: Settings) -> PeftModel:
    """Put fresh adapters into every linear layer of `model` but the output layer, in place."""
    torch.manual_seed(settings.seed)
    attached: PeftModel = attach_adapters(model, settings.rank, settings.lora_alpha)
    return attached


def fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    advance: Callable[[float], None],
) -> list[float]:
    """Train the adapters of `model`, calling `advance(loss)` after each step; return the losses."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    problems, size = settings.problems, settings.batch_size
    losses: list[float] = []
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        drawn = [answer_pair(tokenizer, p) for p in problems[step * size : (step + 1) * size]]
        input_ids, labels = padded_batch(drawn, tokenizer.eos_token_id)
        logits = answer_logits(model.get_base_model(), input_ids, labels)
        loss = cross_entropy(logits, labels[labels != IGNORED])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        advance(losses[-1])
    model.eval()
    return losses


def check_settings(adapter: Path, settings: Settings) -> None:
    """Raise TrioError when the adapter in `adapter` was trained with other settings."""
    record = json.loads((adapter / RECORD).read_text())
    for name, wanted in asdict(settings).items():
        if record["settings"][name] != wanted:
            raise TrioError(
                f"{adapter} was trained with {name}={record['settings'][name]}, wanted {wanted}: "
                f"delete it to train again, or choose another --out"
            )


def train(
    small: Path, adapter: Path, settings: Settings, advance: Callable[[float], None]
) -> list[float]:
    """Train an adapter on the checkpoint `small`, write it to the directory `adapter`.

    Beside it goes training.json: settings, losses, torch version. Returns the losses.
    """
    tokenizer = AutoTokenizer.from_pretrained(small)
    model = attach(AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16), settings)
    losses = fit(model, tokenizer, settings, advance)
    # PEFT would record the path on this machine.
    model.peft_config["default"].base_model_name_or_path = f"../{small.name}"
    with new_directory(adapter) as partial:
        model.save_pretrained(str(partial), save_embedding_layers=False)
        record = {"settings": asdict(settings), "losses": losses, "torch": torch.__version__}
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return losses


def merge(small: Path, adapter: Path, expert: Path) -> None:
    """Write the checkpoint `small` with the adapter added to its weights to `expert`, in bf16."""
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    with quiet_peft():
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    with new_directory(expert) as partial:
        save_checkpoint(merged, AutoTokenizer.from_pretrained(small), partial)
        (partial / RECORD).write_text((adapter / RECORD).read_text())


def is_merged(adapter: Path, expert: Path) -> bool:
    """Whether `expert` was made of the adapter that is in `adapter` now."""
    record = expert / RECORD
    return record.exists() and record.read_text() == (adapter / RECORD).read_text()
