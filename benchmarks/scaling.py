"""How speed and memory scale, in one plot: scaling.png and scaling.json in the folder --out.

python benchmarks/scaling.py              about five minutes on two idle cores; Linux only

Training of ddpm_mnist.py in images per second over batch size and threads; seconds and peak memory
of whole runs of ddpm_2d.py over T and over samples; and images per second that torchrun makes with
one and with two processes of one thread each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm_mnist  # noqa: E402
from benchmarks.compare_2d import clock, peak_megabytes  # noqa: E402

BATCH = 64  # of each process under torchrun


def mnist_speed(batch, threads, seconds):
    """Images per second in training: forward, backward and AdamW."""
    torch.set_num_threads(threads)
    net = ddpm_mnist.UNet()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    xt = torch.randn(batch, 1, 28, 28)
    v = torch.randn(batch, 1, 28, 28)
    y = torch.arange(batch) % 10

    def step():
        loss = F.mse_loss(net(xt, torch.randint(1, 1001, (batch,)), y), v)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()  # the first one is slower
    start = time.perf_counter()
    for steps, _ in enumerate(clock(seconds), 1):
        step()
    return batch * steps / (time.perf_counter() - start)


def run_2d(folder, *flags):
    """Seconds and peak memory in megabytes of one run of ddpm_2d.py as a program."""
    command = [sys.executable, ROOT / "ddpm_2d.py", "--steps", 50, "--out", folder, *flags]
    start = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), **quiet)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_megabytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, peak


def torchrun_seconds(folder, processes, steps):
    """Seconds of a run of ddpm_mnist.py under torchrun, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", processes, "--", ROOT / "ddpm_mnist.py", "--device", "cpu"]
    command += ["--out", folder, "--steps", steps, "--samples", 1, "--sample-steps", 1]
    command += ["--batch-size", BATCH]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), env=env, check=True, capture_output=True)
    return time.perf_counter() - start


def torchrun_speed(folder, processes, steps):
    """Images per second, from a longer and a shorter run, so that the start does not count."""
    short = torchrun_seconds(folder, processes, 10)
    long = torchrun_seconds(folder, processes, 10 + steps)
    return BATCH * processes * steps / (long - short)


def draw(results, path):
    """Three panels, one for each question."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for threads, points in results["mnist"].items():
        left.plot(*zip(*points), "o-", label=f"threads: {threads}")
    left.set(title="MNIST training", xlabel="batch size", ylabel="images per second")
    left.set_xscale("log", base=2)
    for ax, name in ((middle, "T"), (right, "samples")):
        x, seconds, memory = zip(*results[name])
        ax.plot(x, seconds, "o-", label="seconds")
        ax.plot(x, [megabytes / 100 for megabytes in memory], "s--", label="peak memory, in 100 MB")
        ax.set(title=f"a run of the 2-D script over {name}", xlabel=name, xscale="log")
    for ax in (left, middle, right):
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.savefig(path, dpi=120)


def main(argv=None):
    """Measure everything, print and draw it. Returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=4, help="for each batch size and number of threads")
    add("--steps", type=int, default=100, help="of training under torchrun")
    add("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--T", type=int, nargs="+", default=[100, 300, 1000, 3000])
    add("--samples", type=int, nargs="+", default=[1000, 4000, 16_000, 64_000])
    add("--out", type=Path, default=ROOT / "runs" / "scaling", help="folder for both files")
    args = parser.parse_args(argv)
    results = {"mnist": {}, "torchrun": {}}
    for threads in args.threads:
        speeds = [(batch, mnist_speed(batch, threads, args.seconds)) for batch in args.batch_sizes]
        results["mnist"][threads] = speeds
        print(f"threads: {threads}; (batch, images per second):", speeds, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results["T"] = [(T, *run_2d(folder, "--T", T, "--samples", 2000)) for T in args.T]
        print("(T, seconds, MB):", results["T"], flush=True)
        results["samples"] = [
            (n, *run_2d(folder, "--T", 200, "--samples", n)) for n in args.samples
        ]
        print("(samples, seconds, MB):", results["samples"], flush=True)
        for processes in (1, 2):
            speed = torchrun_speed(folder, processes, args.steps)
            results["torchrun"][processes] = speed
            print(f"torchrun, processes: {processes}; images per second: {speed:.0f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps(results, indent=1))
    draw(results, args.out / "scaling.png")
    return results


if __name__ == "__main__":
    main()
