"""No slot leaks, no request lost, and slots in use are the first ones, under random traffic."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxytune_kernels.decoder.loop import Scheduler


class _Job:
    """All of a request that the scheduler touches."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.slot: int | None = None
        self.reused = 0
        self.keeps_prompt = False


ACTIONS = st.lists(
    st.one_of(
        st.just(("add", 0)), st.tuples(st.just("remove"), st.integers(0, 50)), st.just(("step", 0))
    ),
    max_size=80,
)


@given(size=st.integers(1, 5), actions=ACTIONS)
def test_random_traffic(size, actions):
    scheduler = Scheduler(size)
    alive: list[Any] = []
    contents: dict[int, Any] = {}  # what a cache would hold by slot
    admitted: list[int] = []
    for count, (action, which) in enumerate(actions):
        if action == "add":
            job: Any = _Job(count)
            alive.append(job)
            scheduler.add(job)
        elif action == "remove" and alive:
            job = alive.pop(which % len(alive))
            slot = scheduler.remove(job)
            if slot is not None:
                assert contents.pop(slot) is job
        elif action == "step":
            step(scheduler, contents, admitted)
            running = scheduler.running
            assert [job.slot for job in running] == list(range(len(running)))
            assert all(contents[slot] is job for slot, job in enumerate(running))
            assert len(contents) == len(running) == min(size, len(alive))
        assert scheduler.unfinished == bool(alive)
        assert len(alive) == len(scheduler.waiting) + len(contents)
    assert admitted == sorted(admitted)  # first come, first served


def step(scheduler: Scheduler, contents: dict[int, Any], admitted: list[int]) -> None:
    new: list[Any] = list(scheduler.admit())
    for job in new:
        assert job.slot not in contents
        contents[job.slot] = job
        admitted.append(job.number)
    for source, target in scheduler.compact():
        assert target not in contents
        contents[target] = contents.pop(source)
