"""Times of a recurrence's backward: what is measured, and what it must not disturb."""

import torch

from gtrans.analysis.recurrence_speed import RecurrenceSize, backward_seconds
from gtrans.runtime import watch


def _size(steps: int, batch: int, width: int, kind: str = "gru") -> RecurrenceSize:
    return RecurrenceSize(kind, steps, batch, width, torch.float32, "cpu")


def test_a_long_recurrence_of_a_small_cell_is_faster_in_one_sweep_than_unrolled() -> None:
    rules = ("autograd", 0), ("loop", 0), ("sweeps", 0)
    unrolled, _, swept = backward_seconds(_size(1024, 1, 8), rules)
    assert 0 < swept < unrolled / 3


def test_large_sizes_are_tried_with_fewer_steps() -> None:
    rules = (("sweeps", 1),)
    (short,), (long,) = (backward_seconds(_size(n, 512, 32, "lstm"), rules) for n in (64, 6400))
    assert 20 < long / short < 500


def test_the_measurement_draws_and_counts_nothing() -> None:
    watch.forget()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    backward_seconds(_size(20, 2, 3, "rnn_tanh"), (("sweeps", 1), ("autograd", 0)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not watch._calls
    with watch.unwatched():
        watch.watch_ratio(torch.ones(2), torch.zeros(2), "here", 1)
    assert not watch._calls
    watch.watch_ratio(torch.ones(2), torch.ones(2), "here", 1)
    assert watch._calls == {"here": 1}
    watch.forget()
