"""One thread, here and in every program that a test starts: the models are tiny, and two threads collapse beside any other job."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported
