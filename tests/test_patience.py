"""When torch's threads are made to sleep while they wait, and when they spin again; the clock is a fake."""

import threading
from types import SimpleNamespace

import pytest
import torch

from aya_min import patience as module
from aya_min.patience import PAUSES, Patience, have_more_threads_than_cores, in_own_thread


@pytest.fixture
def clock(monkeypatch):
    """Seconds by the wall and of the CPU, and the pauses so far. `alive`: whether the last one lasts."""
    clock = SimpleNamespace(wall=0.0, cpu=0.0, pauses=[], alive=False)

    class Thread:
        def __init__(self, target, args, daemon):
            clock.pauses.append(*args)

        def start(self):
            clock.alive = True

        def is_alive(self):
            return clock.alive
    times = SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu)
    monkeypatch.setattr(module, "time", times)
    monkeypatch.setattr(module, "threading", SimpleNamespace(Thread=Thread))
    return clock


def patient(num_threads=2, device="cpu"):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return Patience(torch.device(device))
    finally:
        torch.set_num_threads(before)


def work(clock, patience, cores, steps=6, seconds=0.04):
    """Steps in which the process got the time of so many cores."""
    for _ in range(steps):
        patience.begin()
        clock.wall += seconds
        clock.cpu += seconds * cores
        patience.end()


def test_threads_that_get_their_cores_spin_and_what_is_between_the_steps_does_not_count(clock):
    patience = patient()
    for _ in range(20):
        work(clock, patience, 1.95, steps=1)
        clock.wall += 5                                                 # a file is written
    assert clock.pauses == []


def test_beside_a_busy_process_threads_sleep_for_longer_and_longer_until_spinning_pays_again(clock):
    patience = patient()
    work(clock, patience, 1.0, steps=3)                 # the first window
    assert clock.pauses == []
    for _ in range(6):
        work(clock, patience, 1.5)
        assert clock.alive
        work(clock, patience, 0.9)                      # asleep they use no time: that says nothing
        clock.alive = False
    assert clock.pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0] and PAUSES == (1.0, 8.0)
    work(clock, patience, 1.95)
    work(clock, patience, 1.5)
    assert clock.pauses[6:] == [1.0]


def test_one_thread_and_a_gpu_need_no_patience(clock):
    for patience in (patient(1), patient(2, "cuda")):
        work(clock, patience, 0.1)
    assert clock.pauses == []


def test_the_sleeper_computes_nothing_that_anyone_sees_and_ends():
    state = torch.get_rng_state()
    have_more_threads_than_cores(0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_thread_of_its_own_ends_with_its_work_and_its_errors_are_raised():
    before, ran = threading.active_count(), []

    def fail():
        raise ValueError("no such model")
    assert in_own_thread(lambda: ran.append(threading.current_thread()) or 7) == 7
    assert ran[0] is not threading.main_thread() and not ran[0].is_alive()
    with pytest.raises(ValueError, match="no such model"):
        in_own_thread(fail)
    assert threading.active_count() == before
