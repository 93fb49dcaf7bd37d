"""Settings for every test: small thread count, a derandomised hypothesis profile, no leftovers."""

import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
# a shell starts what it puts in the background with Ctrl-C ignored; our tests press it
signal.signal(signal.SIGINT, signal.default_int_handler)
caches = tempfile.TemporaryDirectory()  # of hypothesis and torch
set_hypothesis_home_dir(caches.name)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches.name
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))


def pytest_unconfigure():
    caches.cleanup()


def programs(item):
    """The names of the programs of its module that a test needs the result of."""
    return [name for name in getattr(item.module, "PROGRAMS", ()) if name in item.fixturenames]


def pytest_collection_modifyitems(items):
    """TEST_ORDER=reverse, or a seed for a random order: no test may need another one. After a run
    with --junitxml=FILE.xml, TEST_ORDER=FILE.xml takes the quickest first, for mutants.py."""
    order = os.environ.get("TEST_ORDER", "")
    if order.endswith(".xml"):
        cases = ElementTree.parse(order).iter("testcase")
        seconds = {case.get("name"): float(case.get("time")) for case in cases}
        items.sort(key=lambda item: (len(programs(item)), seconds[item.name]))
    elif order == "reverse":
        items.reverse()
    elif order:
        random.Random(order).shuffle(items)


@pytest.fixture(scope="session", autouse=True)
def program(request, tmp_path_factory):
    """program(module, name): a script as a user runs it, PROGRAMS[name] of the module, once, from
    an empty folder: that folder and what subprocess.run returns. All are started with the session,
    one after another, and run beside the tests; where the quickest tests come first they wait until
    they are asked for."""
    runs = {}
    alone = {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path_factory.mktemp("tmp"))}
    more = {"env": os.environ | alone, "capture_output": True, "text": True}

    def start(module, name):
        if (module, name) not in runs:
            folder = tmp_path_factory.mktemp(name)
            command = [sys.executable, *module.PROGRAMS[name]]
            runs[module, name] = folder, pool.submit(subprocess.run, command, cwd=folder, **more)
        return runs[module, name]

    with ThreadPoolExecutor(1) as pool:
        if not os.environ.get("TEST_ORDER", "").endswith(".xml"):
            for item in request.session.items:
                for name in programs(item):
                    start(item.module, name)

        def result(module, name):
            folder, job = start(module, name)
            done = job.result()
            assert done.returncode == 0, done.stderr
            return folder, done

        yield result


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """main plots its figures but does not render them; where it runs as a program, it does."""

    def touch(self, path, *args, **more):
        self._draw_was_started = True  # or an animation complains that nobody looked at it
        Path(path).touch()

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", touch)
    monkeypatch.setattr("matplotlib.animation.Animation.save", touch)


@pytest.fixture
def ctrl_c(monkeypatch):
    """ctrl_c(owner, name, n): the n-th call of that method begins with a press of Ctrl-C."""

    def arm(owner, name, n):
        method, calls = getattr(owner, name), []

        def interrupted(*args, **more):
            calls.append(1)
            if len(calls) == n:
                signal.raise_signal(signal.SIGINT)
            return method(*args, **more)

        monkeypatch.setattr(owner, name, interrupted)

    return arm


@pytest.fixture
def fails(request, capsys):
    """Check that main of the script under test exits with 2 and one line that holds all words."""
    main = importlib.import_module(request.module.__name__.removeprefix("test_")).main

    def check(argv, *words):
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in argv])
        lines = [k for k in capsys.readouterr().err.splitlines() if "it/s" not in k and k.strip()]
        assert exit.value.code == 2 and len(lines) == 1, lines
        for word in words:
            assert str(word) in lines[0], lines[0]

    return check
