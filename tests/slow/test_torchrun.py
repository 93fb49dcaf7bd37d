"""Slow tests of ddpm_mnist.py: several processes, Ctrl-C, kill -9, a full disk, colour."""

import os
import signal
import socket
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_mnist

# a shell starts what it puts in the background with Ctrl-C ignored; these tests press it
signal.signal(signal.SIGINT, signal.default_int_handler)

FILES = ["labels.npy", "model.pt", "samples.npy", "samples.png"]
TINY = "--batch-size 4 --samples 3 --sample-steps 1 --device cpu --data ../mine.npz --out out"
PROCESS = Path(__file__).parents[1] / "mnist_process.py"
MINUTES = 300  # seconds, for machines that do something else, too


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, with 601 images in the one above it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (601, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=np.arange(601) % 10)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def launch(command, flags=""):
    """Python in the background, in a group of its own as in a terminal."""
    words = [sys.executable, *command, *TINY.split(), *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, start_new_session=True, **pipes)


def start(fault, flags, processes=1):
    """mnist_process.py with a fault."""
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    return launch([*torchrun[: 5 * (processes > 1)], PROCESS, fault], flags)


def wait_until(done):
    deadline = time.monotonic() + MINUTES
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(job):
    """Exit code and what was said, once every process of the job has ended."""
    said = "".join(job.communicate(timeout=MINUTES))
    pids = [int(path.read_text()) for path in Path().glob("pid*")]
    wait_until(lambda: not any(map(runs, pids)))
    return job.returncode, said


def runs(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def names():
    return sorted(path.name for path in Path("out").iterdir())


def steps_done():
    return len(torch.load("out/model.pt", weights_only=True)["losses"])


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_all_processes_and_leaves_a_checkpoint(processes, folder):
    job = start("none", "--steps 1000", processes)
    wait_until(Path("out/model.pt").exists)
    os.killpg(job.pid, signal.SIGINT)
    assert finish(job)[0] != 0
    steps = steps_done()
    assert 0 < steps < 1000 and steps % 100 == 0


def test_disk_that_stays_full_ends_the_run_and_keeps_the_old_model(folder):
    assert finish(start("none", "--steps 1"))[0] == 0
    before = Path("out/model.pt").read_bytes()
    code, said = finish(start("full", "--steps 102"))
    assert code == 1 and said.count("out/model.part cannot be written") == 2
    assert "Traceback" not in said.split("cannot be written")[1]
    assert Path("out/model.pt").read_bytes() == before and names() == FILES


def test_one_process_that_fails_ends_all(folder):
    job = start("none", "--steps 1000000", 2)
    wait_until(Path("out/model.pt").exists)
    os.kill(int(Path("pid1").read_text()), signal.SIGKILL)
    assert finish(job)[0] == 1


def test_four_processes_on_601_images(folder):
    """They end with the same weights, though each is trained on images and steps of its own. The
    first alone writes, also with --load."""
    code, said = finish(start("none", "--steps 3 --out outRANK", 4))
    assert code == 0, said
    assert [len(list(Path(f"out{k}").iterdir())) for k in range(4)] == [4, 0, 0, 0]
    nets, seen = zip(*[torch.load(f"rank{k}.pt") for k in range(4)])
    ema = torch.load("out0/model.pt")["ema"]
    assert all(torch.equal(net[name], ema[name]) for net in nets for name in ema)
    for steps, others in combinations(seen, 2):
        for (xi, ti, *_), (xk, tk, *_) in zip(steps, others, strict=True):
            assert not torch.equal(xi, xk) and not torch.equal(ti, tk)
    code, said = finish(start("none", "--load out0/model.pt --out newRANK", 2))
    assert code == 0 and not list(Path("new1").iterdir()), said
    assert Path("new0/samples.npy").read_bytes() == Path("out0/samples.npy").read_bytes()


@pytest.mark.parametrize(("processes", "code"), [(1, -signal.SIGKILL), (2, 1)])
def test_resume_after_kill_9_while_saving_equals_an_uninterrupted_run(processes, code, folder):
    assert finish(start("none", "--steps 102 --out whole", processes))[0] == 0
    assert finish(start("kill", "--steps 102", processes))[0] == code
    assert steps_done() == 100 and names() == ["model.part", "model.pt"]
    assert finish(start("none", "--steps 102 --resume", processes))[0] == 0
    assert steps_done() == 102 and names() == FILES
    for name in ("model.pt", "samples.npy"):
        assert Path("whole", name).read_bytes() == Path("out", name).read_bytes()


@pytest.mark.parametrize("machines", [1, 2])
def test_recipe_several_gpus_and_machines(machines, folder):
    """The lines of docs/recipes.md, both machines being this one."""
    page = (PROCESS.parents[1] / "docs" / "recipes.md").read_text()
    lines = page.split("## Several GPUs and machines")[1].split("```")[1::2]
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    command = lines[machines - 1].removeprefix("sh\ntorchrun").replace("node 8", "node 2")
    *words, script = command.replace("HOST:29500", f"localhost:{port}").split()
    words = ["-m", "torch.distributed.run", *words, PROCESS.parents[1] / script]
    jobs = [launch(words, "--steps 1") for _ in range(machines)]
    for job in jobs:
        assert "Traceback" not in job.communicate(timeout=MINUTES)[1] and job.returncode == 0
    assert names() == FILES
    assert len(np.load("out/samples.npy")) == 3 and steps_done() == 1


def test_classes_of_photos_are_drawn_in_their_colours(tmp_path):
    """Red and blue squares on grey, 32 x 32, whose labels are words [n, 1]; 300 steps."""
    rng = np.random.default_rng(0)
    images = np.full((200, 32, 32, 3), 128, np.uint8)
    for k, image in enumerate(images):
        x, y = rng.integers(3, 15, 2)
        image[y : y + 14, x : x + 14] = (20, 40, 230) if k % 2 else (230, 40, 20)
    np.savez(tmp_path / "photos.npz", x_train=images, y_train=[["red"], ["blue"]] * 100)
    flags = f"--steps 300 --batch-size 16 --width 16 --device cpu --data {tmp_path}/photos.npz"
    ddpm_mnist.main([*flags.split(), "--samples", "20", "--out", str(tmp_path)])
    images = np.load(tmp_path / "samples.npy").astype(float)
    redder = images[..., 0] - images[..., 2]  # [n, 32, 32]
    red = (redder > 100).mean((1, 2))  # a fifth of the image
    blue = (redder < -100).mean((1, 2))
    told_red = np.load(tmp_path / "labels.npy") == "red"
    right, wrong = np.where(told_red, (red, blue), (blue, red))
    assert right.min() > 0.05 and right.max() < 0.4 and wrong.max() < 0.02
