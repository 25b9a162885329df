"""How torch's threads wait for each other: spinning, or asleep while another process needs their cores.

A step of a small model is a hundred and more parallel regions of 10 to 100 us, each of which ends with its
last thread. The threads that are done spin, up to some milliseconds, which is by far the fastest way as
long as each has a core. Beside one other busy process it is the slowest: the spinning threads keep the last
one from running, and a training step on two cores took ten times as long (LOG.md).

OMP_WAIT_POLICY=passive, which must be set before the program starts, makes the loaded case six times as
fast, and the quiet one half as fast. But libgomp, torch's OpenMP, itself stops spinning while a process has
more OpenMP threads than cores. So when the process does not get its cores' time, a thread with a team of
its own is started: it computes nothing, sleeps for a while and ends, and the waiting is as it was. How work
is divided, and with it every bit of the results, stays the same. Under another OpenMP nothing changes.
"""

import threading
import time

import torch

# Seconds of work that are looked at together; the kernel counts CPU time in ticks of up to 0.004.
WINDOW = 0.1
# The share of one core's time that may be missing: alone 0.05 was, beside a busy process 0.5 to 1.3.
MISSING = 0.4
# Seconds of sleeping waits until spinning is tried again: the first time, and at most.
PAUSES = (1.0, 8.0)


class Patience:
    """begin() and end() stand around each step of some work on all of torch's threads. On a GPU, and where
    there is one thread, they do nothing."""

    def __init__(self, device):
        self.num_threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.pause, self.sleeper = PAUSES[0], None
        self.wall = self.cpu = 0.0                      # seconds of this window
        # The first window says nothing: libraries prepare code, on one thread.
        self.is_first = True

    def begin(self):
        if self.num_threads > 1:
            self.asleep = self.sleeper is not None and self.sleeper.is_alive()
            self.started = time.perf_counter(), time.process_time()

    def end(self):
        if self.num_threads == 1:
            return
        if self.asleep:                                 # sleeping threads use no time, and so show no load
            self.wall = self.cpu = 0.0
            return
        self.wall += time.perf_counter() - self.started[0]
        self.cpu += time.process_time() - self.started[1]
        if self.wall < WINDOW:
            return
        if self.is_first:
            self.is_first = False
        elif self.cpu < self.wall * (self.num_threads - MISSING):
            work = {"target": have_more_threads_than_cores, "args": (self.pause,)}
            self.sleeper = threading.Thread(**work, daemon=True)
            self.sleeper.start()
            self.pause = min(2 * self.pause, PAUSES[1])
        else:
            self.pause = PAUSES[0]
        self.wall = self.cpu = 0.0


def have_more_threads_than_cores(seconds):
    """Run in a thread of its own: its first parallel region gives it a team, which it keeps until it ends."""
    torch.zeros(1 << 20).add_(1)
    time.sleep(seconds)


def in_own_thread(work):
    """The result of work(), which runs in a thread that ends with it, and with the thread its team.

    A thread's team stays while it lives. So where one thread has loaded a model and another one runs it, the
    process has more OpenMP threads than cores, all waits are asleep, and the model takes twice as long.
    """
    made = {}

    def run():
        try:
            made["result"] = work()
        except BaseException as error:
            made["error"] = error
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if "error" in made:
        raise made["error"]
    return made["result"]
