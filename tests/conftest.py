"""One thread, here and in every program that a test starts: the models are tiny, and two threads
collapse beside any other job. And a Ctrl-C that works: whoever starts the tests in a shell's background
has it ignored, here and in every program that a test starts.

A test marked `long` runs with --long only: python -m pytest --long for all tests, -m long for these alone.
"""

import os
import signal
import sys

import pytest

os.environ["OMP_NUM_THREADS"] = "1"     # before torch is imported
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests that are marked long, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes long, or shows once more what a shorter test shows")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: python -m pytest --long"))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    if num_long := sum("long" in getattr(report, "keywords", ()) for report in skipped):
        terminalreporter.write_line(f"{num_long} long tests were skipped; --long runs them")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The files of small.write_world; no test may change them."""
    from small import write_world           # here, since it imports torch
    folder = write_world(tmp_path_factory.mktemp("world"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def in_process(monkeypatch, capfd):
    """in_process(program, *words) runs a command's main in this process, which saves its start."""
    def in_process(program, *words):
        """(exit code, standard output, lines of standard error)"""
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
        capfd.readouterr()
        try:
            program.main()
            code = 0
        except SystemExit as error:
            code = error.code
        out, err = capfd.readouterr()
        return code, out, err.splitlines()
    return in_process


@pytest.fixture(scope="module")
def every_stage():
    """small.STAGES with pretraining too, for the tests of one module."""
    from small import EVERY, STAGES         # torch, which must see the number of threads above
    STAGES.update(EVERY)
    yield
    STAGES.pop("pretrain")
