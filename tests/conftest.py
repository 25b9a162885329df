"""One thread, here and in every program that a test starts: the models are tiny, and two threads collapse beside any other job.

And a Ctrl-C that works: whoever starts the tests in a shell's background has it ignored, here and in every program that a test starts.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
