"""Made ahead, in order of the steps, and nothing lost: neither items nor errors."""

import threading

import pytest

from redi.training.prefetch import Prefetch


def test_the_next_step_is_made_while_the_present_one_is_used():
    made = {step: threading.Event() for step in range(9)}
    prefetch = Prefetch(lambda step: made[step].set() or step * 10)
    for step in (0, 1, 5, 6):  # a jump, as after a resume
        assert prefetch.get(step) == step * 10
        assert made[step + 1].wait(5)
        assert not made[step + 2].is_set()
    prefetch.close()


def test_nobody_waits_for_a_step_before_asking_for_it():
    release = threading.Event()
    prefetch = Prefetch(lambda step: step if step == 0 else release.wait(5) and step)
    assert prefetch.get(0) == 0  # although step 1 is stuck
    release.set()
    assert prefetch.get(1) == 1
    prefetch.close()


def test_errors_come_out_where_the_item_is_asked_for():
    prefetch = Prefetch(lambda step: 1 // (3 - step))
    assert [prefetch.get(step) for step in (1, 2)] == [0, 1]  # step 3 has failed by now, or will
    with pytest.raises(ZeroDivisionError):
        prefetch.get(3)
    assert prefetch.get(4) == -1
    prefetch.close()


def test_close_ends_the_thread():
    before = threading.active_count()
    prefetch = Prefetch(lambda step: step)
    prefetch.get(0)
    assert threading.active_count() == before + 1
    prefetch.close()
    assert threading.active_count() == before
