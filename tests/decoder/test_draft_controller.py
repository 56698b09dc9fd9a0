"""How many drafts: what is asked for, what is seen of acceptance, and what promises the most."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune_kernels.decoder import Speculation
from proxytune_kernels.decoder.speculation import Acceptance, DraftController, SpeculationStats


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drafter": "anti"}, "drafter must be one of expert, prompt_lookup, got 'anti'"),
        ({"mode": "greedy"}, "mode must be one of coupled, rejection, got 'greedy'"),
        ({"max_drafts": 0}, r"max_drafts must be an integer in \[1, 32\], got 0"),
        ({"max_drafts": 33}, r"max_drafts must be an integer in \[1, 32\], got 33"),
        ({"max_drafts": 2.0}, r"max_drafts must be an integer in \[1, 32\], got 2.0"),
        ({"max_drafts": True}, r"max_drafts must be an integer in \[1, 32\], got True"),
        ({"adaptive": 1}, "adaptive must be True or False, got 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Speculation(**settings)


def test_what_a_decoder_refuses(trio, make_decoder):
    with pytest.raises(TypeError, match="speculation must be a Speculation or None, got 'expert'"):
        make_decoder(trio, speculation="expert")
    with pytest.raises(ValueError, match="must have the expert among the roles, got base"):
        make_decoder(trio, roles=("base",), speculation=Speculation())
    make_decoder(trio, roles=("base",), speculation=Speculation(drafter="prompt_lookup"))


def test_stats_without_drafts_have_no_acceptance():
    assert SpeculationStats(4, 3, [4]).acceptance == 0.75
    assert SpeculationStats().acceptance != SpeculationStats().acceptance  # NaN


def kept(rng: random.Random, rate: float, drafts: int) -> int:
    """Of so many drafts those before the first refusal."""
    return next((j for j in range(drafts) if rng.random() >= rate), drafts)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_acceptance_finds_the_rate(rate):
    """On average: what lies behind a refusal tells nothing, and counts as nothing."""
    rng, acceptance, seen = random.Random(0), Acceptance(), []
    for _ in range(20_000):
        acceptance.observe(5, kept(rng, rate, 5))
        seen.append(acceptance.rate)
    # At least 20,000 drafts are tried: a standard error of at most 0.5 / sqrt(20,000) = 0.0035.
    assert sum(seen[100:]) / len(seen[100:]) == pytest.approx(rate, abs=0.015)


def test_acceptance_forgets():
    acceptance = Acceptance()
    for _ in range(1000):
        acceptance.observe(4, 4)
    assert acceptance.rate > 0.99
    for _ in range(200):
        acceptance.observe(4, 0)
    # 200 refusals at a memory of 64 drafts leave exp(-200 / 64) of what was, 4%.
    assert acceptance.rate < 0.06
    for _ in range(50):
        acceptance.observe(4, 4)
    assert acceptance.rate > 0.94


def test_acceptance_begins_with_its_prior():
    other = Acceptance()
    for _ in range(100):
        other.observe(8, 0)
    assert Acceptance(other).rate == pytest.approx(other.rate)
    fresh = Acceptance(other)
    for _ in range(3):
        fresh.observe(8, 8)
    assert fresh.rate > 0.5
    assert other.rate < 0.2


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 32))
def test_expected_tokens(yes, no, drafts):
    acceptance = Acceptance()
    for _ in range(yes):
        acceptance.observe(1, 1)
    for _ in range(no):
        acceptance.observe(1, 0)
    rate = acceptance.rate
    assert 0 < rate <= 1
    wanted = drafts + 1 if rate == 1 else (1 - rate ** (drafts + 1)) / (1 - rate)
    assert acceptance.tokens(drafts) == pytest.approx(wanted, rel=1e-9)


def settled(rate: float) -> Acceptance:
    """An estimate that has seen a hundred drafts."""
    acceptance = Acceptance()
    for i in range(100):
        acceptance.observe(1, int((i + 1) * rate) - int(i * rate))
    return acceptance


def speed(rows: list[tuple[Acceptance, int]], drafts: int, seconds: float) -> float:
    """Expected tokens a second: draft j counts with the probability that it and all before are
    kept, and only where a row can use it."""
    tokens = 0.0
    for acceptance, most in rows:
        reached = 1.0
        for j in range(drafts + 1):
            if j > most:
                break
            tokens += reached
            reached *= acceptance.rate
    return tokens / seconds


ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.9, 1.0]).map(settled), st.integers(0, 12)),
    min_size=1,
    max_size=5,
)
COSTS = st.lists(st.floats(0.001, 3.0), min_size=8, max_size=8)


@given(ROWS, COSTS)
def test_chooses_the_most_tokens_a_second(rows, costs):
    """Against every number of drafts, each with a time of its own; drafts that promise less than
    2% over plain decoding are not worth the risk."""
    controller = DraftController(Speculation(max_drafts=7))
    for drafts, seconds in enumerate(costs):
        for _ in range(3):
            controller.observe_time(len(rows), drafts, seconds)
        if drafts % 2:
            controller.observe_time(len(rows), drafts, 50 * seconds)  # something got in the way
    limit = min(7, max(most for _, most in rows))
    chosen = controller.choose(rows)
    speeds = [speed(rows, drafts, costs[drafts]) for drafts in range(limit + 1)]
    if max(speeds) < 1.019 * speeds[0]:
        assert chosen == 0
    elif max(speeds) > 1.021 * speeds[0]:
        assert speeds[chosen] == pytest.approx(max(speeds), rel=1e-9)


@given(
    st.sampled_from([0.3, 0.6, 0.9, 0.98]), st.floats(0.2, 3), st.floats(0.01, 2), st.integers(1, 9)
)
def test_times_lie_on_a_line(rate, fixed, each, measured):
    """Two measurements are enough where a draft more takes always the same."""
    rows = [(settled(rate), 20)]
    controller = DraftController(Speculation(max_drafts=12))
    controller.observe_time(1, 0, fixed)
    controller.observe_time(1, measured, fixed + measured * each)
    chosen = controller.choose(rows)
    speeds = [speed(rows, drafts, fixed + drafts * each) for drafts in range(13)]
    if max(speeds) < 1.019 * speeds[0]:
        assert chosen == 0
    elif max(speeds) > 1.021 * speeds[0]:
        assert speeds[chosen] == pytest.approx(max(speeds), rel=1e-6)


class World:
    """Steps of one row on an artificial clock.

    Args:
        seconds: what a step takes, by its number of drafts, 0 to 8.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.controller = DraftController(Speculation(max_drafts=8))
        self.acceptance = self.controller.new_request()
        self.seconds = seconds
        self.rng = random.Random(3)

    def run(self, steps: int, rate: float) -> tuple[list[int], float]:
        """The drafts of each step, and tokens a second over all of them."""
        chosen, tokens, time = [], 0, 0.0
        for _ in range(steps):
            drafts = self.controller.choose([(self.acceptance, 1000)])
            chosen.append(drafts)
            accepted = kept(self.rng, rate, drafts)
            tokens += accepted + 1
            time += self.seconds[drafts]
            self.controller.observe_time(1, drafts, self.seconds[drafts])
            if drafts:
                self.controller.observe(self.acceptance, drafts, accepted)
        return chosen, tokens / time


def test_is_near_the_best_there_is():
    """On worlds of several acceptances and costs: at least 90% of the best fixed number's speed,
    plain decoding among them."""
    for rate in (0.1, 0.5, 0.8, 0.95, 1.0):
        for each in (0.02, 0.2, 0.6, 1.5):
            costs = [1 + each * drafts for drafts in range(9)]
            _, found = World(costs).run(3000, rate)
            best = max(
                sum(rate**j for j in range(drafts + 1)) / costs[drafts] for drafts in range(9)
            )
            assert found > 0.9 * best, (rate, each)
            # It costs next to nothing where drafts don't pay.
            assert found > 0.95


def test_turns_itself_off_and_asks_again():
    world = World([1 + 2.0 * n for n in range(9)])
    chosen, speed_when_dear = world.run(2000, 0.9)
    late = chosen[200:]
    assert 5 < sum(n > 0 for n in late) < 0.03 * len(late)
    assert speed_when_dear > 0.95
    # A draft never comes with less than a long rest between.
    asked = [i for i, n in enumerate(late) if n]
    assert min(b - a for a, b in itertools.pairwise(asked)) > 50
    # Drafts have become cheap.
    world.seconds = [1 + 0.05 * n for n in range(9)]
    chosen, speed_when_cheap = world.run(1000, 0.9)
    assert min(chosen[600:]) > 0
    assert speed_when_cheap > 2


def test_one_slow_round_is_forgiven():
    """The first round of all may be slow: code and weights are cold."""
    world = World([1 + 0.1 * n for n in range(9)])
    quick, world.seconds = world.seconds, [1.0, *[50.0] * 8]
    chosen, _ = world.run(2, 0.95)
    assert max(chosen) > 0
    world.seconds = quick
    chosen, _ = world.run(40, 0.95)
    assert min(chosen[20:]) > 2


def test_a_new_request_asks_again_soon():
    """Its text may be of a kind that the drafter knows."""
    world = World([1 + 0.3 * n for n in range(9)])
    world.run(1000, 0.0)
    world.acceptance = world.controller.new_request()
    chosen, _ = world.run(60, 0.99)
    assert min(chosen[40:]) > 2


def test_drafts_follow_acceptance():
    world = World([1 + 0.1 * n for n in range(9)])
    means = []
    for rate in (0.97, 0.5, 0.0, 0.97):
        chosen, _ = world.run(1500, rate)
        late = chosen[1000:]
        means.append(sum(late) / len(late))
    # The best are 8, 2 or 3, none, and 8 again.
    assert means[0] > 6.5
    assert 1.5 < means[1] < 4
    assert means[2] < 0.1
    assert means[3] > 6.5


def test_fixed_number_of_drafts():
    controller = DraftController(Speculation(max_drafts=5, adaptive=False))
    controller.observe_time(1, 0, 1.0)
    controller.observe_time(1, 5, 1000.0)
    never = settled(0.0)
    assert controller.choose([(never, 100)]) == 5
    # No more than any row can use before its end.
    assert controller.choose([(never, 3), (never, 1)]) == 3
    assert controller.choose([(never, 0), (never, 0)]) == 0
    assert controller.choose([]) == 0


def test_rows_that_cannot_draft_do_not_count_for_drafts():
    """Among many unsteered rows one that drafts must pay for the time of all."""
    controller = DraftController(Speculation(max_drafts=4))
    for rows in (1, 8):
        for drafts in range(5):
            controller.observe_time(rows, drafts, 1 + 0.3 * drafts)
    good = settled(1.0)
    assert controller.choose([(good, 9)]) == 4
    assert controller.choose([(good, 9), *[(good, 0)] * 7]) == 0


def test_other_numbers_of_rows_take_the_shape_of_the_nearest():
    """A batch shrinks as requests end: what drafts cost is not asked anew for each size."""
    controller = DraftController(Speculation(max_drafts=4))
    controller.observe_time(8, 0, 1.0)
    controller.observe_time(8, 4, 1.2)
    controller.observe_time(7, 0, 0.9)
    rows = [(settled(0.9), 9)] * 7
    assert controller.choose(rows) == 4
    assert controller.choose(rows[:5]) == 4


def test_a_text_without_drafts_counts_as_refused():
    """prompt_lookup: a round that had nothing to verify must not look like a good one."""
    controller = DraftController(Speculation(drafter="prompt_lookup"))
    acceptance = controller.new_request()
    for _ in range(100):
        controller.observe(acceptance, 0, 0)
    assert acceptance.rate < 0.2
    expert = DraftController(Speculation())
    near_its_end = expert.new_request()
    before = near_its_end.rate
    expert.observe(near_its_end, 0, 0)
    assert near_its_end.rate == before
    assert controller.new_request().rate < 0.2 < expert.new_request().rate
