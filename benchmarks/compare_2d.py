"""This project and three packages side by side on 2-D points, at equal seconds of training.

pip install -r benchmarks/requirements.txt
OMP_NUM_THREADS=1 python benchmarks/compare_2d.py      about 30 minutes on one idle core

Every run is a process of its own with the same budget of seconds; training points are drawn afresh.
smalldiffusion has its own example for points and its settings are used. The other two have none:
both train one and the same plain residual MLP, with their own schedule, loss, average of weights
and sampler. So does this project in its second row: these rows compare diffusion code, not
networks. Prints a table with medians over the seeds, and the lowest and the highest; writes
compare_2d.json and compare_2d.png into the folder --out.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm_mnist  # noqa: E402
from benchmarks import stand_in  # noqa: E402
from benchmarks.judge_2d import scores, toy_data  # noqa: E402
from ddpm_2d import TOYS, Diffusion, NoisePredictor, linear_schedule  # noqa: E402

TITLES = {"swd_ratio": "sliced Wasserstein ratio", "off_support": "share off support"}


def clock(seconds):
    """Yields the used share of a budget of time until it is used up."""
    start = time.perf_counter()
    used = 0.0
    while used < 1:
        yield used
        used = (time.perf_counter() - start) / seconds


class PlainMLP(nn.Module):
    """eps of points [B, 2]: residual MLP with a sinusoidal embedding of t, and no further help."""

    def __init__(self, width=128, layers=3):
        super().__init__()
        self.freq = nn.Buffer(10_000 ** (-torch.arange(64) / 64))
        self.inp = nn.Linear(2, width)
        self.time = nn.Linear(128, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)

    def forward(self, x, t):
        angle = t.view(-1, 1) * self.freq
        h = self.inp(x) + self.time(torch.cat([angle.sin(), angle.cos()], 1))
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return self.out(nn.functional.silu(h))


def fit(net, loss_of, seconds, lr):
    """AdamW with cosine decay over the budget; yields the number of steps so far, after each."""
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    for steps, used in enumerate(clock(seconds), 1):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * used)) / 2
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield steps


def ours(draw, seconds, net=None, lr=5e-3):
    """ddpm_2d.py: its network, schedule, loss, optimizer, batch and learning rate."""
    beta = linear_schedule(1000)
    diffusion = Diffusion(beta)
    net = net or NoisePredictor(1000)

    def loss():
        return diffusion.p_losses(net, draw(1024)).mean()

    *_, steps = fit(net, loss, seconds, lr)

    def ddpm(n):
        *_, x0 = diffusion.p_sample_loop(net, torch.randn(n, 2))
        return x0

    def ddim(n):
        *_, x0 = ddpm_mnist.Diffusion(beta).ddim_sample_loop(net, torch.randn(n, 2))
        return x0

    return net, steps, {"DDPM, 1000 steps": ddpm, "DDIM, 50 steps": ddim}


def ours_plain(draw, seconds):
    """ddpm_2d.py with the network and the learning rate of the two packages below."""
    return ours(draw, seconds, PlainMLP(), 1e-3)


def smalldiffusion(draw, seconds):
    """Its toy example: TimeInputMLP, 200 log-linear sigmas, batch 2048, lr 1e-3, 20 steps."""
    from smalldiffusion import ScheduleLogLinear, TimeInputMLP, samples, training_loop

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield draw(2048)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    schedule = ScheduleLogLinear(N=200, sigma_min=0.005, sigma_max=10)
    net = TimeInputMLP(hidden_dims=(16, 128, 128, 128, 128, 16))
    loop = training_loop(loader, net, schedule, epochs=1, lr=1e-3)
    steps = sum(1 for _ in zip(clock(seconds), loop))

    def fast(n):
        *_, x0 = samples(net, schedule.sample_sigmas(20), batchsize=n, gam=2)
        return x0

    def ddpm(n):  # of 200 steps the last would be nan
        *_, x0 = samples(net, schedule.sample_sigmas(100), batchsize=n, gam=1, mu=0.5)
        return x0

    return net, steps, {"its own, 20 steps": fast, "DDPM, 100 steps": ddpm}


def denoising_diffusion_pytorch(draw, seconds):
    """GaussianDiffusion1D with its defaults (cosine, eps, clipping) and ema-pytorch's average."""
    from denoising_diffusion_pytorch import GaussianDiffusion1D
    from ema_pytorch import EMA

    class Adapter(nn.Module):  # sequences of two values, as the package has no points
        channels = 1
        self_condition = False

        def __init__(self):
            super().__init__()
            self.mlp = PlainMLP()

        def forward(self, x, t, x_self_cond=None):
            return self.mlp(x[:, 0], t)[:, None]

    net = Adapter()
    diffusion = GaussianDiffusion1D(net, seq_length=2)
    fast = GaussianDiffusion1D(net, seq_length=2, sampling_timesteps=50)
    average = EMA(diffusion, beta=0.995, update_every=1)
    scale = 3.0  # it wants data in [0, 1]

    def loss():
        return diffusion(draw(1024)[:, None] / (2 * scale) + 0.5)

    for steps in fit(net, loss, seconds, 1e-3):
        average.update()
    fast.model = average.ema_model.model

    def ddpm(n):
        return (average.ema_model.sample(batch_size=n)[:, 0] - 0.5) * 2 * scale

    def ddim(n):
        return (fast.sample(batch_size=n)[:, 0] - 0.5) * 2 * scale

    return net, steps, {"DDPM, 1000 steps": ddpm, "DDIM, 50 steps": ddim}


def diffusers(draw, seconds):
    """DDPMScheduler with its defaults but clipping, and EMAModel, as in its training example."""
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.training_utils import EMAModel

    net = PlainMLP()
    schedule = DDPMScheduler(1000, clip_sample=False)
    average = EMAModel(net.parameters(), decay=0.995, use_ema_warmup=True)

    def loss():
        x0 = draw(1024)
        t = torch.randint(1000, (1024,))
        eps = torch.randn_like(x0)
        return nn.functional.mse_loss(net(schedule.add_noise(x0, eps, t), t), eps)

    for steps in fit(net, loss, seconds, 1e-3):
        average.step(net.parameters())
    model = copy.deepcopy(net).requires_grad_(False)
    average.copy_to(model.parameters())

    def sample(schedule, count, n):
        schedule.set_timesteps(count)
        x = torch.randn(n, 2)
        for t in schedule.timesteps:
            x = schedule.step(model(x, t.expand(n)), t, x).prev_sample
        return x

    def ddpm(n):
        return sample(DDPMScheduler(1000, clip_sample=False), 1000, n)

    def ddim(n):
        return sample(DDIMScheduler(1000, clip_sample=False), 50, n)

    return net, steps, {"DDPM, 1000 steps": ddpm, "DDIM, 50 steps": ddim}


PACKAGES = {
    f.__name__: f
    for f in (ours, ours_plain, smalldiffusion, denoising_diffusion_pytorch, diffusers)
}
PLAIN = ("ours_plain", "denoising_diffusion_pytorch", "diffusers")


def one_run(name, data, seconds, seed, n):
    """Train one package, draw n samples of each of its samplers and judge them: a row for each."""
    stand_in.install()
    torch.manual_seed(seed)
    net, steps, samplers = PACKAGES[name](data.sample, seconds)
    row = {"package": name, "seconds": seconds, "seed": seed, "steps": steps}
    row["parameters"] = sum(p.numel() for p in net.parameters())
    rows = []
    for sampler, sample in samplers.items():
        rows.append(row | {"sampler": sampler} | scores(data, sample(n).detach()))
    return rows


def in_a_process(file, flags):
    """What a Python program prints on its last line, as JSON."""
    command = [sys.executable, file, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median(rows):
    """One row with the medians of the numbers, and the texts, of several."""
    return {
        key: value if isinstance(value, str) else np.median([row[key] for row in rows]).item()
        for key, value in rows[0].items()
    }


def groups(rows):
    """Lists of the rows of one package, sampler and budget, whatever the seed."""
    found = {}
    for row in rows:
        found.setdefault((row["package"], row["sampler"], row["seconds"]), []).append(row)
    return list(found.values())


def draw(rows, path):
    """Quality over seconds of training; each package with the sampler that ends best."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    last = max(row["seconds"] for row in rows)
    for name in PACKAGES:
        mine = [row for row in rows if row["package"] == name]
        ends = {row["swd_ratio"]: row["sampler"] for row in mine if row["seconds"] == last}
        best = ends[min(ends)]
        mine = [row for row in mine if row["sampler"] == best]
        seconds = [row["seconds"] for row in mine]
        for (key, title), ax in zip(TITLES.items(), axes):
            label = f"{name.replace('_', '-')} ({best})"
            ax.plot(seconds, [row[key] for row in mine], "o-", label=label)
            ax.set(xscale="log", yscale="log", xlabel="seconds of training", title=title)
            ax.set_xticks(seconds, [f"{k:g}" for k in seconds])
            ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def spread(rows, key, form):
    """The median of several rows, and in brackets the lowest and the highest."""
    low, middle, high = np.quantile([row[key] for row in rows], [0, 0.5, 1])
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def table(rows):
    """Print the rows of the longest budget."""
    print("Rows with one and the same plain MLP compare diffusion code; the others do not.\n")
    print("| package | network | sampler | swd | off support | steps of training |")
    print("|---|---|---|---|---|---|")
    last = max(row["seconds"] for row in rows)
    for group in groups([row for row in rows if row["seconds"] == last]):
        row = median(group)
        network = "plain MLP" if row["package"] in PLAIN else "its own"
        print(
            f"| {row['package'].replace('_', '-')} | {network} | {row['sampler']} "
            f"| {spread(group, 'swd_ratio', '.2f')} | {spread(group, 'off_support', '.2%')} "
            f"| {row['steps']:,.0f} |"
        )


def main(argv=None):
    """Run everything, print the table, draw the plot. Returns the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default="swissroll", choices=list(TOYS), help="a toy set of ddpm_2d.py")
    add("--seconds", type=float, nargs="+", default=[5, 10, 20], help="budgets of training")
    add("--seeds", type=int, default=3, help="runs of each")
    add("--samples", type=int, default=10_000, help="to judge, of each run")
    add("--out", type=Path, default=ROOT / "runs" / "compare_2d", help="folder for both files")
    add("--one", nargs=3, help=argparse.SUPPRESS)  # package, seconds, seed
    args = parser.parse_args(argv)
    if args.one:
        name, seconds, seed = args.one
        data = toy_data(args.data)
        print(json.dumps(one_run(name, data, float(seconds), int(seed), args.samples)))
        return None
    flags = ["--data", args.data, "--samples", args.samples, "--one"]
    rows = []
    for seconds, seed, name in tqdm(list(product(args.seconds, range(args.seeds), PACKAGES))):
        rows += in_a_process(__file__, [*flags, name, seconds, seed])
    middle = [median(group) for group in groups(rows)]
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"data": args.data, "rows": rows, "medians": middle}, indent=1)
    (args.out / "compare_2d.json").write_text(text)
    draw(middle, args.out / "compare_2d.png")
    budget = f"trained for {max(args.seconds):g} seconds"
    print(f"{args.data}, medians of {args.seeds} seeds, {budget}\n")
    table(rows)
    return middle


if __name__ == "__main__":
    main()
