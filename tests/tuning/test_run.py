"""Tuning: what the loss counts, the same bytes whatever happens, and what is written opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="tuning needs the extra tune: peft is not there")
pytest.importorskip("accelerate", reason="tuning needs the extra tune: accelerate is not there")
pytest.importorskip("scipy", reason="tuning needs the extra tune: scipy is not there")

from proxytune_kernels.trio import load_trio
from proxytune_kernels.tuning.data import Encoding, Example, check_rows, prompt_styles
from proxytune_kernels.tuning.held_out import held_out_losses
from proxytune_kernels.tuning.run import claim, run
from proxytune_kernels.tuning.sources import Untuned, open_untuned
from proxytune_kernels.tuning.training import Settings
from scripts.trio_training import arithmetic

# In bf16, as the shipped trio is stored, so that what is opened is what was trained.
SETTINGS = Settings(steps=5, batch_size=4, learning_rate=1e-2, rank=4, lora_alpha=8)
STYLES = dict.fromkeys(("base", "expert", "anti"), "plain")


@pytest.fixture(scope="module")
def untuned() -> Untuned:
    torch.set_num_threads(1)
    return open_untuned("shipped")


@pytest.fixture(scope="module")
def examples(untuned: Untuned) -> list[Example]:
    problems = arithmetic.problems(13, seed=5)
    rows = [(i, {"prompt": p.prompt, "completion": p.answer}) for i, p in enumerate(problems)]
    styles = prompt_styles(rows, None, {})
    encoding = Encoding(untuned.tokenizers, styles, untuned.widths, untuned.agreement.vocab_size)
    return [example for row in check_rows(rows, encoding, 256) for example in row.examples]


def tuned(untuned: Untuned, examples: list[Example], out: Path, **options: Any) -> float:
    """Run on the first ten examples, in steps of four: an epoch ends within a batch."""
    settings = options.pop("settings", SETTINGS)
    given: dict[str, Any] = {"advance": lambda step, loss: None, "save_every": 2, **options}
    claim(out, settings, resume=given.get("resume", False))
    loss = run(untuned, examples[:10], examples[10:], settings, out, STYLES, **given)
    assert loss is not None
    return loss


@pytest.fixture(scope="module")
def whole(
    untuned: Untuned, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A run that nothing interrupted, and the loss that it ended with."""
    out = tmp_path_factory.mktemp("tuned") / "trio"
    return out, tuned(untuned, examples, out)


def contents(out: Path) -> dict[str, bytes]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_the_loss_is_that_of_the_answers_alone(untuned, examples, tmp_path):
    settings = replace(SETTINGS, steps=1, batch_size=10)
    tuned(untuned, examples, tmp_path / "trio", settings=settings)
    [loss] = json.loads((tmp_path / "trio" / "training.json").read_text())["losses"]
    # An adapter begins at zero: the first loss is the anti-expert's.
    anti = load_trio("shipped").anti
    logprobs: list[float] = []
    for example in examples[:10]:
        ids = [*example.prompts["expert"], *example.answer]
        with torch.no_grad():
            rows = anti(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        logprobs += [
            float(rows[i - 1, ids[i]]) for i in range(len(ids) - len(example.answer), len(ids))
        ]
    # Logits below 32 are rounded to bf16, by 2^-4 at most; so is a logprob, and a mean of them.
    assert loss == pytest.approx(-sum(logprobs) / len(logprobs), abs=2**-4)


def test_an_interrupted_run_that_is_resumed_gives_the_same_bytes(
    untuned, examples, whole, tmp_path
):
    seen: list[int] = []

    def interrupt(step: int, loss: float) -> None:
        seen.append(step)
        if len(seen) == 3:
            raise KeyboardInterrupt

    out = tmp_path / "trio"
    with pytest.raises(KeyboardInterrupt):
        tuned(untuned, examples, out, advance=interrupt)
    assert not (out / "trio.json").exists()
    # A checkpoint that a kill cut off is passed over.
    (out / "checkpoints" / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="new or empty"):
        claim(out, SETTINGS, resume=False)
    with pytest.raises(ValueError, match="seed was 0, got 1"):
        claim(out, replace(SETTINGS, seed=1), resume=True)
    tuned(untuned, examples, out, advance=interrupt, resume=True)
    assert seen == [1, 2, 3, 3, 4, 5]  # from the checkpoint of step 2
    assert contents(out) == contents(whole[0])
    with pytest.raises(ValueError, match="has not ended"):
        claim(out, SETTINGS, resume=True)


def test_what_is_loaded_has_the_loss_that_training_ended_with(examples, whole):
    out, ended = whole
    # No order of a set, which another process would have otherwise.
    targets = json.loads((out / "expert" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    trio = load_trio(out)
    # The pair is shared: the expert is the anti's tensors and the adapter.
    theirs = {p.data_ptr() for p in trio.anti.parameters()}
    assert theirs < {p.data_ptr() for p in trio.expert.parameters()}
    found = {each.name: each for each in held_out_losses(trio, examples[10:], (0, 1))}
    assert found["expert"].loss.value == pytest.approx(ended, abs=1e-12)
    assert ended < found["anti"].loss.value - 0.5
    assert found["proxy, alpha 0"].sums == found["base"].sums
    assert found["proxy, alpha 1"].loss.high < found["base"].loss.low


def test_all_weights(untuned, examples, tmp_path):
    settings = replace(SETTINGS, steps=2, learning_rate=1e-3, full=True, dtype="float32")
    ended = tuned(untuned, examples, tmp_path / "trio", settings=settings)
    trio = load_trio(tmp_path / "trio")
    assert trio.expert.dtype == torch.bfloat16
    expert = next(e for e in held_out_losses(trio, examples[10:]) if e.name == "expert")
    assert expert.loss.value == pytest.approx(ended, abs=1e-12)


def test_lm_eval_opens_it(whole):
    out, _ = whole
    pytest.importorskip("lm_eval", reason="lm_eval needs the extra eval")
    from proxytune_kernels.integrations.lm_eval_model import ProxyTuneLM

    assert ProxyTuneLM(str(out)).max_length == 1024


def test_a_loss_that_is_no_number_ends_it(untuned, examples, tmp_path):
    settings = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(RuntimeError, match=r"the loss of step \d is nan: lower --learning-rate"):
        tuned(untuned, examples, tmp_path / "trio", settings=settings)
