"""Settings for every test: CPU, one thread, repeatable examples, any order, nothing left behind."""

import os
import random
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

always = {"deadline": None, "max_examples": 100, "database": None}
settings.register_profile("same", derandomize=True, **always)
settings.register_profile("random", print_blob=True, **always)  # see @reproduce_failure
fast = (Phase.explicit, Phase.generate)  # for mutants.py: failures are not made smaller
settings.register_profile("quick", derandomize=True, phases=fast, **always)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
caches = tempfile.TemporaryDirectory()
set_hypothesis_home_dir(caches.name)
torch.set_num_threads(1)


def pytest_unconfigure():
    caches.cleanup()


def pytest_collection_modifyitems(items):
    """TEST_ORDER: no test may need another one."""
    order = os.environ.get("TEST_ORDER", "")
    if order == "reverse":
        items.reverse()
    elif order:
        random.Random(order).shuffle(items)


@pytest.fixture(autouse=True, scope="session")
def cpu():
    """The default device, also on a machine with a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
        yield


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


class Handler(SimpleHTTPRequestHandler):
    """Serves the working folder; /cut/FILE tells the right length, but breaks off halfway."""

    def do_GET(self):
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        content = Path(self.path.removeprefix("/cut/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", len(content))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])


@pytest.fixture
def server():
    """The address of a web server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
