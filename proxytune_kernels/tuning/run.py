"""From examples to a directory that ``load_trio`` opens.

OUT/trio.json        base and anti by name, the expert in the directory beside it
OUT/training.json    settings, versions, the loss of each step
OUT/expert/          an adapter for the anti-expert, or a checkpoint
OUT/checkpoints/     while it runs
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from proxytune_kernels.trio.loading import TRIO_FILE
from proxytune_kernels.tuning.data import Example
from proxytune_kernels.tuning.held_out import expert_loss
from proxytune_kernels.tuning.sources import EXPERT, Untuned, lasting
from proxytune_kernels.tuning.training import (
    CHECKPOINTS,
    Advance,
    Settings,
    attach,
    begin,
    fit,
    read_settings,
    save_expert,
    write_record,
)


def claim(out: Path, settings: Settings, *, resume: bool) -> None:
    """Make a run's directory, or check that one that was begun can go on with these settings.

    Raises:
        ValueError: names what is in the way, or the setting that differs.
    """
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(
                f"--out must be new or empty, got {out} (--resume goes on with a run in it)"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_record(out, settings)
        return
    begun = read_settings(out)
    if (out / TRIO_FILE).exists():
        raise ValueError(f"--resume needs a run that has not ended, got {out} with a {TRIO_FILE}")
    for name, wanted in asdict(settings).items():
        if begun.get(name) != wanted:
            raise ValueError(
                f"--resume needs the settings of the run in {out}: {name} was "
                f"{begun.get(name)!r}, got {wanted!r}"
            )


def run(
    untuned: Untuned,
    examples: Sequence[Example],
    measured: Sequence[Example],
    settings: Settings,
    out: Path,
    styles: Mapping[str, str],
    *,
    advance: Advance,
    save_every: int,
    resume: bool = False,
) -> float | None:
    """Tune the anti-expert on examples and write the trio; its trio.json comes last.

    Args:
        untuned: base and anti-expert.
        examples: what is trained on.
        measured: what is not.
        settings: how it is trained.
        out: the trio's directory, of :func:`claim`.
        styles: role -> how it reads prompts.
        advance, save_every, resume: as :func:`~tuning.training.fit` takes them.

    Returns:
        The loss of the measured examples' answers in nats per token, of the expert as training
        ended with it; None without examples.
    """
    begin(settings)
    model = untuned.open_anti(settings.dtype, settings.device)
    if not settings.full:
        model = attach(model, settings.rank, settings.lora_alpha)
    losses = fit(
        *(model, examples, settings, out / CHECKPOINTS),
        advance=advance,
        save_every=save_every,
        resume=resume,
    )
    if settings.full and untuned.dtype is not None:
        # As they are stored; buffers, such as rotary frequencies, are not.
        for weight in model.parameters():
            weight.data = weight.data.to(untuned.dtype)
    causal_lm = model if settings.full else model.get_base_model()
    vocab_size = untuned.agreement.vocab_size
    final = expert_loss(causal_lm, measured, vocab_size) if measured else None
    shutil.rmtree(out / EXPERT, ignore_errors=True)
    named = lasting(untuned.references["anti"])
    save_expert(model, out / EXPERT, named, untuned.tokenizers["expert"])
    write_record(out, settings, losses=losses, held_out_loss=final)
    untuned.write_trio(out, styles, merged=settings.full)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return final
