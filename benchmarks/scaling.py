"""How speed and memory scale, in one plot: assets/scaling.png, and runs/scaling.json.

  python benchmarks/scaling.py --data data/mnist      (about five minutes on two idle cores)

Training of ddpm_mnist.py in images per second over batch size and threads; seconds and peak memory
of whole runs of ddpm_2d.py over T and over samples; training steps per second over the width of its
network; and what torchrun makes of one and of two processes on this machine.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
import ddpm_2d  # noqa: E402
import ddpm_mnist  # noqa: E402


def per_second(step, seconds=4.0):
    """Calls of step per second, after five to warm up."""
    for _ in range(5):
        step()
    start, count = time.perf_counter(), 0
    while (used := time.perf_counter() - start) < seconds:
        step()
        count += 1
    return count / used


def bf16_is_faster():
    """Whether this CPU multiplies matrices faster in bfloat16, found out as by ddpm_mnist.py."""
    clock = lambda x: min(timeit.repeat(lambda: x @ x, number=1, repeat=9))
    return clock(torch.eye(256).bfloat16()) < clock(torch.eye(256))


def mnist_speed(batch, threads):
    """Images per second in training, with bfloat16 as the script chooses."""
    torch.set_num_threads(threads)
    diffusion = ddpm_mnist.Diffusion(1000, "cosine")
    net = ddpm_mnist.UNet(diffusion)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    x, y = torch.randn(batch, 1, 28, 28), torch.arange(batch) % 10
    amp = bf16_is_faster()

    def step():
        with torch.autocast("cpu", torch.bfloat16, amp):
            loss = diffusion.p_losses(net, x, y, gamma=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return batch * per_second(step)


def width_speed(width):
    """Training steps of 1024 points per second."""
    diffusion = ddpm_2d.Diffusion(1000, "cosine")
    net = ddpm_2d.NoisePredictor(diffusion, 8, width)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    x, y = torch.randn(1024, 2), torch.arange(1024) % 8

    def step():
        loss = diffusion.p_losses(net, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return per_second(step)


def whole_run(folder, *flags):
    """Seconds and peak memory in megabytes of one run of ddpm_2d.py as a program."""
    command = [sys.executable, ROOT / "ddpm_2d.py", "--steps", "50", "--out", folder, *flags]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:  # ru_maxrss would count the memory of this process, too
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *map(int, re.findall(r"VmHWM:\s*(\d+)", status))])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{command} failed")
    return time.perf_counter() - start, peak / 1024


def torchrun_speed(folder, data, processes):
    """Images per second that the script reports under torchrun, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [processes, "--", ROOT / "ddpm_mnist.py", "--data", data, "--out", folder]
    command += ["--steps", 150, "--n", 10, "--sample-steps", 2, "--test-images", 0]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), env=env, check=True, capture_output=True)
    return json.loads((folder / "metrics.json").read_text())["images_per_second"]


def draw(results, path):
    """Four panels, one for each question."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for color, (threads, line) in zip(ddpm_2d.COLORS, results["mnist"].items()):
        axes[0].plot(*zip(*line), "o-", color=color, label=f"{threads} threads")
    axes[0].set(title="MNIST training", xlabel="batch size", ylabel="images per second")
    for ax, key, label in ((axes[1], "T", "T"), (axes[2], "n", "samples")):
        x, seconds, memory = zip(*results[key])
        ax.plot(x, seconds, "o-", color=ddpm_2d.COLORS[0], label="seconds, whole run")
        ax.plot(x, [m / 100 for m in memory], "s--", color=ddpm_2d.COLORS[1], label="100 MB")
        ax.set(title=f"2-D script over {label}", xlabel=label)
    axes[3].plot(*zip(*results["width"]), "o-", color=ddpm_2d.COLORS[0], label="1024 points a step")
    axes[3].set(title="2-D training", xlabel="width of the network", ylabel="steps per second")
    for ax in axes:
        ax.set_xscale("log", base=2 if ax in (axes[0], axes[3]) else 10)
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.savefig(path, dpi=120)


def main(argv=None):
    """Measure everything, print and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="data/mnist", help="folder of the IDX files")
    args = parser.parse_args(argv)
    results = {"mnist": {}}
    for threads in (1, 2):
        sizes = (4, 8, 16, 32, 64, 128)
        results["mnist"][threads] = [(b, mnist_speed(b, threads)) for b in sizes]
        print(threads, "threads:", results["mnist"][threads], flush=True)
    results["width"] = [(w, width_speed(w)) for w in (32, 64, 128, 256, 512)]
    print("width:", results["width"], flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["T"] = [
            (T, *whole_run(folder, "--T", T, "--n", 2000)) for T in (100, 300, 1000, 3000)
        ]
        results["n"] = [
            (n, *whole_run(folder, "--T", 200, "--n", n)) for n in (1000, 4000, 16_000, 64_000)
        ]
        print("T, seconds, MB:", results["T"], "\nn, seconds, MB:", results["n"], flush=True)
        results["torchrun"] = {k: torchrun_speed(folder, args.data, k) for k in (1, 2)}
        print("torchrun, images per second:", results["torchrun"])
    (ROOT / "runs").mkdir(exist_ok=True)
    (ROOT / "runs" / "scaling.json").write_text(json.dumps(results, indent=1))
    draw(results, ROOT / "assets" / "scaling.png")


if __name__ == "__main__":
    main()
