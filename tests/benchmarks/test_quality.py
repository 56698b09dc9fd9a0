"""benchmarks.quality: what each task's scorer says, the share of a gap, and a run that goes on."""

from typing import Any

import numpy as np
import pytest

from benchmarks import quality
from proxytune_kernels import Trio, load_trio
from proxytune_kernels.analysis.scorers import GivenScorer
from proxytune_kernels.analysis.sweep import likelihoods
from scripts.qwen import problems

SUM = (lambda row: row["choices"], lambda found, row: sum(one.logprob for one in found))
ROW = {
    "prompt": "def twice(x):\n", "entry_point": "twice",
    "test": "def check(f):\n    assert f(2) == 4 and f('a') == 'aa'",
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "python", "passed"),
    [
        ("    return x * 2\n", True, True),
        ("    return x + 1\n", True, False),
        ("    return x * 2\nraise SystemExit(0)", True, False),
        ("    return x * 2\nprint('0' * 32)\nimport os; os._exit(0)", True, False),
        ("    return x *\n", False, False),
        ("    return open('/tmp/x', 'w').write('1' * 9)\n", True, False),
        ("    return bytearray(2**31)\n", True, False),
        ("    while True: pass\n", True, False),
        ("    return '\0'\n", False, False),
    ],
)
def test_code_counts_where_its_tests_ran_to_their_end(body, python, passed):
    assert quality.is_python(body, ROW) == python
    assert quality.passes(body, ROW, cpu=1) == passed


@pytest.mark.parametrize(
    ("kind", "text", "followed"),
    [
        ("list", "1. a\n2. b c\n3. d\n", True), ("list", "1. a\n2. b", False),
        ("list", "1. a\n3. b\n2. c", False), ("list", "Here:\n1. a\n2. b", False),
        ("capitals", " DOG", True), ("capitals", "Dog", False), ("capitals", "A DOG IS IT", False),
        ("json", ' {"birds": ["a", "b", "c"]}', True), ("json", '{"birds": ["a"]}', False),
        ("json", '["birds"]', False), ("json", "birds: a, b, c", False),
    ],
)  # fmt: skip
def test_the_form_of_an_answer(kind, text, followed):
    assert quality.follows(text, {"kind": kind, "n": 3, "things": "birds"}) == followed


def test_the_share_of_a_gap():
    base, proxy, direct = np.array([[0, 0, 1, 0.0]]), np.array([[1, 0, 1, 0.0]]), np.ones((1, 4))
    assert quality.gap_closed(base, proxy, direct) == pytest.approx([1 / 3])
    assert np.isnan(quality.gap_closed(base, proxy, base)).all()

    def lines_of(**scores):
        answered = [{"task": "t", "system": name, "scores": {"s": own.repeat(50).tolist()}}
                    for name, own in scores.items()]  # fmt: skip
        return {line["system"]: line for line in quality.figures(answered)}

    lines = lines_of(base=base, proxy=proxy, direct=direct)
    low, high = lines["proxy"]["gap_closed"][1:]
    assert low < 1 / 3 < high
    assert lines_of(base=direct, proxy=proxy, direct=base)["proxy"]["gap_closed"] is None
    assert lines["proxy"]["over_base"].value == 0.25 and "gap_closed" not in lines["base"]


def test_a_run_that_was_cut_short_goes_on(records_of, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.trios._PROBLEMS", 8)
    arguments = ("--quick", "--tasks", "arithmetic", "--schedules", "entropy:2")
    generated, asked = quality.generated, []

    def counted(system, *settings):
        asked.append(system.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generated(system, *settings)

    monkeypatch.setattr(quality, "generated", counted)
    with pytest.raises(AssertionError):
        records_of(quality.main, *arguments)
    records, said = records_of(quality.main, *arguments)
    names = ["base", "expert", "anti", "proxy", "proxy entropy:2"]
    assert [r["system"] for r in records] == names
    assert asked == [*names[:3], *names[2:]]
    steered = [r["steered"] for r in records]
    assert steered[:4] == [0, 0, 0, 1] and 0 < steered[4] < 1
    right = {r["system"]: sum(r["scores"]["right"]) for r in records}
    assert right["proxy"] > right["base"] and "over base" in said


def test_systems_that_choose_share_a_trios_forwards():
    trio = load_trio("shipped")
    rows: list[dict[str, Any]] = [{"prompt": f"Question: {a} + 2 = ?\nAnswer:", "answer": 1,
             "choices": [" three", " four apples", " four"]} for a in (1, 2)]  # fmt: skip
    task = quality.Task("choice", rows, (GivenScorer("sum", *SUM),))
    told: list[str] = []
    systems = quality.systems(trio, None, ["entropy:1"])
    asked = [system for system in systems if task.answered_by(system)]
    assert [system.name for system in systems if system not in asked] == ["proxy entropy:1"]
    found = {
        system.name: scores["sum"]
        for system, scores, _ in quality.answers(asked, task, 8, True, told.append)
    }
    assert told == ["choice: base, expert, anti, proxy"] * 8
    expert_alone, anti_alone = (
        Trio.from_models(member, tokenizer=trio.tokenizer) for member in (trio.expert, trio.anti)
    )
    for i, row in enumerate(rows):
        base, proxy = likelihoods(trio, row["prompt"], row["choices"], [0.0, 1.0])
        [expert] = likelihoods(expert_alone, row["prompt"], row["choices"], [0.0])
        [anti] = likelihoods(anti_alone, row["prompt"], row["choices"], [0.0])
        # Forwards of other shapes: sums of 64 to 512 products in fp32, through six layers.
        texts = {"base": base, "proxy": proxy, "expert": expert, "anti": anti}
        for name, wanted in texts.items():
            assert found[name][i] == pytest.approx(sum(w.logprob for w in wanted), abs=1e-3)


@pytest.mark.parametrize("trio", ["shipped", "qwen"])
def test_a_seed_has_problems_of_its_own(trio):
    first, same, other = (
        {row["prompt"] for row in quality.arithmetic(trio, 100, seed).rows} for seed in (0, 0, 1)
    )
    assert first == same and len(other - first) > 50
    if trio == "qwen":
        trained_on = {problem.prompt for problem in problems.training(400)}
        assert not trained_on & (first | other)
    prompts = [[row["prompt"] for row in quality.instructions(9, seed).rows] for seed in (0, 1)]
    assert prompts[0] != prompts[1]


def test_the_tuned_base_is_opened_once(monkeypatch):
    trio = load_trio("shipped")
    opened = []

    def load(**given):
        opened.append(given)
        return trio

    monkeypatch.setattr(quality, "load_trio", load)
    direct = quality.systems(trio, "there", [], "int8")[-1]
    assert direct.alone() is direct.alone() is trio
    assert opened == [{"base": "there", "quantize": "int8"}]
