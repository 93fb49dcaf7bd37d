"""Settings for every test: one thread, repeatable hypothesis, any order, nothing left behind."""

import os
import random
import tempfile

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("ci")
caches = tempfile.TemporaryDirectory()
set_hypothesis_home_dir(caches.name)
torch.set_num_threads(1)


def pytest_unconfigure():
    caches.cleanup()


def pytest_collection_modifyitems(items):
    """TEST_ORDER=reverse, or a seed for a random order: no test may need another one."""
    order = os.environ.get("TEST_ORDER", "")
    if order == "reverse":
        items.reverse()
    elif order:
        random.Random(order).shuffle(items)


@pytest.fixture
def refuses(capsys):
    """refuses(main, argv, *words): main exits with 2; its last line of stderr holds all words."""

    def check(main, argv, *words):
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in argv])
        *usage, line = capsys.readouterr().err.rstrip().splitlines()
        assert exit.value.code == 2, exit.value.code
        assert "error: " in line and all(row.startswith(("usage:", " ")) for row in usage), line
        for word in words:
            assert str(word) in line, line
        return line

    return check
