"""Lane schedules: whatever lanes do between their waits, nothing is early and little is alive."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtrans.analysis.lanes import LaneSchedule, lane_schedule
from gtrans.errors import PlanError


def run(schedule: LaneSchedule, data: st.DataObject) -> tuple[list[str], int]:
    """Starts and ends work in any order the lanes and waits admit; returns it and the peak.

    A block counts as alive from the start of its recovery to the end of its gradients.
    """
    queues = [schedule.on_lane(lane) for lane in range(schedule.lanes)]
    running: dict[int, int] = {}
    ended: set[int] = set()
    log: list[str] = []
    alive: set[int] = set()
    peak = 0
    while any(queues) or running:
        startable = [
            lane
            for lane, queue in enumerate(queues)
            if queue and lane not in running and ended.issuperset(schedule.works[queue[0]].waits)
        ]
        steps = [("start", lane) for lane in startable] + [("end", lane) for lane in running]
        assert steps, "the lanes wait for each other"
        what, lane = data.draw(st.sampled_from(steps))
        if what == "start":
            number = queues[lane].pop(0)
            running[lane] = number
            work = schedule.works[number]
            for kind, block in needs(work.kind, work.block):
                assert f"end {kind}({block})" in log, f"{work.name} started too early"
            if work.kind == "recover":
                alive.add(work.block)
            else:
                assert work.block in alive, f"{work.name} reads what was freed"
        else:
            number = running.pop(lane)
            ended.add(number)
            alive -= {schedule.works[number].frees}
        peak = max(peak, len(alive))
        log.append(f"{what} {schedule.works[number].name}")
    assert not alive
    return log, peak


def needs(kind: str, block: int) -> list[tuple[str, int]]:
    """Written out again, and not taken from the schedule."""
    found = [("recover", block)] if kind == "grads" else []
    return found + ([(kind, block - 1)] if block else [])


@given(st.integers(0, 9), st.integers(0, 3), st.data())
def test_every_interleaving_is_sound(blocks: int, look_ahead: int, data: st.DataObject) -> None:
    schedule = lane_schedule(blocks, look_ahead)
    schedule.check()
    log, peak = run(schedule, data)
    assert len(log) == 4 * blocks
    assert peak <= look_ahead + 1


@pytest.mark.parametrize("blocks", [2, 3, 5, 8])
def test_recovery_runs_beside_gradients(blocks: int) -> None:
    """With equal times for recovery and half of them for gradients, 3n becomes 2n + 1."""
    works = lane_schedule(blocks, 1).works
    ends: list[int] = []
    free = [0, 0]
    for work in works:
        start = max([free[work.lane], *(ends[w] for w in work.waits)])
        ends.append(start + (1 if work.kind == "recover" else 2))
        free[work.lane] = ends[-1]
    assert max(ends) == 2 * blocks + 1
    assert sum(1 if w.kind == "recover" else 2 for w in works) == 3 * blocks


def test_one_lane_is_the_plain_backward() -> None:
    names = [w.name for w in lane_schedule(3, 0).works]
    assert names == [f"{kind}({i})" for i in range(3) for kind in ("recover", "grads")]


def test_look_ahead_as_published() -> None:
    schedule = lane_schedule(4, 1)
    assert [schedule.works[i].name for i in schedule.on_lane(0)] == [
        "recover(0)",
        "grads(0)",
        "recover(2)",
        "grads(2)",
    ]
    assert [schedule.works[i].name for i in schedule.on_lane(1)] == [
        "recover(1)",
        "grads(1)",
        "recover(3)",
        "grads(3)",
    ]


@given(st.integers(2, 7), st.integers(1, 3), st.data())
def test_a_missing_wait_is_found(blocks: int, look_ahead: int, data: st.DataObject) -> None:
    schedule = lane_schedule(blocks, look_ahead)
    waiting = [i for i, w in enumerate(schedule.works) if w.waits]
    chosen = data.draw(st.sampled_from(waiting))
    works = list(schedule.works)
    works[chosen] = replace(works[chosen], waits=())
    with pytest.raises(PlanError, match="may start before"):
        replace(schedule, works=tuple(works)).check()


def test_an_early_free_is_found() -> None:
    schedule = lane_schedule(2, 1)
    works = [replace(w, frees=1 if w.name == "grads(0)" else None) for w in schedule.works]
    with pytest.raises(PlanError, match=r"grads\(0\) frees what recover\(1\) may still read"):
        replace(schedule, works=tuple(works)).check()


def test_too_many_blocks_alive_are_found() -> None:
    schedule = replace(lane_schedule(4, 2), look_ahead=1)
    with pytest.raises(PlanError, match="while block 0 is alive: more than 2 blocks at once"):
        schedule.check()


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(PlanError, match="no schedule for -1 blocks with a look-ahead of 1"):
        lane_schedule(-1)
