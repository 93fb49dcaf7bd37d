"""This project and three packages side by side on 2-D points, at equal training time.

  pip install -r benchmarks/requirements.txt
  python benchmarks/compare_2d.py               (about 15 minutes on two idle cores)

Every run is a process of its own with the same budget of seconds; training data are drawn afresh,
without labels. smalldiffusion has its own example for points and its settings are used. The other
two have none: both train the same plain residual MLP, with their own schedule, loss, average of
weights and sampler; so their rows show what a usual network gives, not a limit of the package. Ours
samples in parts of 2,500 points, the others all at once. Prints a table with medians over the seeds
and writes assets/compare_2d.png and runs/compare_2d.json.
"""

import argparse
import copy
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import stand_in  # noqa: E402

from ddpm_2d import COLORS, Diffusion, NoisePredictor, load_data  # noqa: E402


def clock(seconds):
    """Yields the used share of a budget of time until it is used up."""
    start = time.perf_counter()
    while (used := (time.perf_counter() - start) / seconds) < 1:
        yield used


class PlainMLP(nn.Module):
    """eps of points [B, 2]: residual MLP with a sinusoidal embedding of t, and no further help."""

    def __init__(self, width=128, layers=3):
        super().__init__()
        self.freq = nn.Buffer(10_000 ** (-torch.arange(64) / 64))
        self.inp, self.time = nn.Linear(2, width), nn.Linear(128, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)

    def forward(self, x, t):
        angle = t.view(-1, 1) * self.freq
        h = self.inp(x) + self.time(torch.cat([angle.sin(), angle.cos()], 1))
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return self.out(nn.functional.silu(h))


def fit(parameters, loss_of, after, seconds, lr):
    """AdamW with cosine decay over the budget; returns the number of steps."""
    optimizer, steps = torch.optim.AdamW(parameters, lr, fused=True), 0
    for used in clock(seconds):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * used)) / 2
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        steps += 1
    return steps


def ours(draw, seconds):
    """ddpm_2d.py: its network, schedule, loss, learning rate and average of weights."""
    diffusion = Diffusion(1000, "cosine")
    net = NoisePredictor(diffusion, 1)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    loss = lambda: diffusion.p_losses(net, draw(1024))
    steps = fit(net.parameters(), loss, lambda: ema.update_parameters(net), seconds, 5e-3)

    def sample(loop):
        def chunks(n):
            for part in torch.randn(n, 2).split(2500):
                *_, x0 = loop(ema.module, part)
                yield x0

        return lambda n: torch.cat(list(chunks(n)))

    samplers = {"DDPM, 1000 steps": sample(diffusion.p_sample_loop)}
    return net, steps, samplers | {"DDIM, 50 steps": sample(diffusion.ddim_sample_loop)}


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

    def sample(count, **options):
        def run(n):
            *_, x0 = samples(net, schedule.sample_sigmas(count), batchsize=n, **options)
            return x0

        return run

    fast, ddpm = sample(20, gam=2), sample(100, gam=1, mu=0.5)  # at 200 steps its last is nan
    return net, steps, {"its own, 20 steps": fast, "DDPM, 100 steps": ddpm}


def denoising_diffusion_pytorch(draw, seconds):
    """GaussianDiffusion1D with its defaults (cosine, eps, clipping) and ema-pytorch's average."""
    from denoising_diffusion_pytorch import GaussianDiffusion1D
    from ema_pytorch import EMA

    class Adapter(nn.Module):  # sequences of two values, as the package has no points
        channels, self_condition = 1, False

        def __init__(self):
            super().__init__()
            self.mlp = PlainMLP()

        def forward(self, x, t, x_self_cond=None):
            return self.mlp(x[:, 0], t)[:, None]

    net = Adapter()
    diffusion = GaussianDiffusion1D(net, seq_length=2)
    fast = GaussianDiffusion1D(net, seq_length=2, sampling_timesteps=50)
    ema = EMA(diffusion, beta=0.995, update_every=1)
    scale = 3.0  # it wants data in [0, 1]
    loss = lambda: diffusion(draw(1024)[:, None] / (2 * scale) + 0.5)
    steps = fit(net.parameters(), loss, ema.update, seconds, 1e-3)
    fast.model = ema.ema_model.model

    def sample(model):
        return lambda n: (model.sample(batch_size=n)[:, 0] - 0.5) * 2 * scale

    samplers = {"DDPM, 1000 steps": sample(ema.ema_model), "DDIM, 50 steps": sample(fast)}
    return net, steps, samplers


def diffusers(draw, seconds):
    """DDPMScheduler with its defaults but clipping, and EMAModel, as in its training example."""
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.training_utils import EMAModel

    net, schedule = PlainMLP(), DDPMScheduler(1000, clip_sample=False)
    average = EMAModel(net.parameters(), decay=0.995, use_ema_warmup=True)

    def loss():
        x0, t = draw(1024), torch.randint(1000, (1024,))
        eps = torch.randn_like(x0)
        return nn.functional.mse_loss(net(schedule.add_noise(x0, eps, t), t), eps)

    steps = fit(net.parameters(), loss, lambda: average.step(net.parameters()), seconds, 1e-3)
    model = copy.deepcopy(net)
    average.copy_to(model.parameters())

    def sample(kind, count):
        @torch.no_grad()
        def run(n):
            schedule = kind(1000, clip_sample=False)
            schedule.set_timesteps(count)
            x = torch.randn(n, 2)
            for t in schedule.timesteps:
                x = schedule.step(model(x, t.expand(n)), t, x).prev_sample
            return x

        return run

    samplers = {"DDPM, 1000 steps": sample(DDPMScheduler, 1000)}
    return net, steps, samplers | {"DDIM, 50 steps": sample(DDIMScheduler, 50)}


PACKAGES = {f.__name__: f for f in (ours, smalldiffusion, denoising_diffusion_pytorch, diffusers)}


def scores(samples, data):
    """swd_ratio and off_support as in ddpm_2d.py, for samples [n, 2] without labels."""
    n = len(samples)
    draws = torch.stack([samples, *data.sample(10 * n)[0].split(n)])
    lines = (draws @ torch.randn(2, 64)).sort(1).values
    distance = (lines[1:] - lines[0]).abs().mean()
    swd = distance / lines[1:].diff(dim=0).abs().mean()
    rare = data.log_prob(draws[1]).quantile(0.001)
    return {
        "swd_ratio": swd.item(),
        "off_support": (data.log_prob(samples) < rare).float().mean().item(),
    }


def one_run(name, data_name, seconds, seed, n=10_000):
    """Train, sample and judge one package; a list with one row for each of its samplers."""
    stand_in.install()
    torch.manual_seed(seed)
    data = load_data(data_name)[0]
    net, steps, samplers = PACKAGES[name](lambda n: data.sample(n)[0], seconds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = []
    for sampler, sample in samplers.items():
        start = time.perf_counter()
        x = sample(n).detach()
        cost = (time.perf_counter() - start) / n * 1e6
        row = {"package": name, "sampler": sampler, "seconds": seconds, "seed": seed}
        row |= {"steps": steps, "parameters": sum(p.numel() for p in net.parameters())}
        row |= {"microseconds_per_sample": cost, "train_megabytes": memory}
        rows.append(row | scores(x, data))
    return rows


FILES = {  # what a reader of this method has to know
    "ours": ["ddpm_2d.py"],
    "smalldiffusion": ["diffusion.py", "model.py"],
    "denoising_diffusion_pytorch": ["denoising_diffusion_pytorch_1d.py"],
    "diffusers": ["schedulers/scheduling_ddpm.py", "schedulers/scheduling_ddim.py"],
}


def code_lines(package, files):
    """Lines of these files of a package, or of this project, that are not blank."""
    stand_in.install()
    root = ROOT if package == "ours" else Path(__import__(package).__file__).parent
    text = "\n".join((root / file).read_text() for file in files)
    return sum(1 for line in text.splitlines() if line.strip())


def draw(rows, path):
    """Quality over seconds of training; each package with the sampler that ends best."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    last = max(r["seconds"] for r in rows)
    for color, name in zip(COLORS, PACKAGES):
        mine = [r for r in rows if r["package"] == name]
        ends = [r for r in mine if r["seconds"] == last]
        best = min(ends, key=lambda r: r["swd_ratio"])["sampler"]
        for (key, title), ax in zip(TITLES.items(), axes, strict=True):
            points = sorted((r["seconds"], r[key]) for r in mine if r["sampler"] == best)
            x, y = np.array(points).T
            ax.plot(x, y, "o-", color=color, label=f"{name.replace('_', '-')} ({best})")
            ax.set(xscale="log", yscale="log", xlabel="seconds of training", title=title)
            ax.set_xticks(x, [f"{k:g}" for k in x])
            ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main(argv=None):
    """Run everything, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="swissroll", help="a toy set of ddpm_2d.py")
    parser.add_argument("--seconds", type=float, nargs="+", default=[5, 10, 20], help="budgets")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # package, seconds, seed
    args = parser.parse_args(argv)
    if args.one:
        name, seconds, seed = args.one
        print(json.dumps(one_run(name, args.data, float(seconds), int(seed))))
        return
    jobs = [(p, t, s) for t in args.seconds for s in range(args.seeds) for p in PACKAGES]
    rows = []
    for job in tqdm(jobs, "compare"):
        command = [sys.executable, __file__, "--data", args.data, "--one", *map(str, job)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{job}: {done.stderr}")
        rows += json.loads(done.stdout.splitlines()[-1])
    medians, groups = [], {}
    for row in rows:
        groups.setdefault((row["package"], row["sampler"], row["seconds"]), []).append(row)
    for (name, sampler, seconds), group in groups.items():
        numbers = {k: statistics.median(r[k] for r in group) for k in group[0] if k not in ROW}
        medians.append({"package": name, "sampler": sampler, "seconds": seconds} | numbers)
    out = ROOT / "runs" / "compare_2d.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"data": args.data, "rows": rows, "medians": medians}, indent=1))
    draw(medians, ROOT / "assets" / "compare_2d.png")
    print(
        f"{args.data}, medians of {args.seeds} seeds, trained for {max(args.seconds):g} seconds\n"
    )
    print("| package | sampler | swd ratio | off support | per sample | steps | memory | lines |")
    print("|---|---|---|---|---|---|---|---|")
    for r in medians:
        if r["seconds"] == max(args.seconds):
            lines = code_lines(r["package"], FILES[r["package"]])
            print(
                f"| {r['package'].replace('_', '-')} | {r['sampler']} | {r['swd_ratio']:.2f} "
                f"| {r['off_support']:.2%} | {r['microseconds_per_sample']:.0f} us "
                f"| {r['steps']:.0f} | {r['train_megabytes']:.0f} MB | {lines} |"
            )


TITLES = {"swd_ratio": "sliced Wasserstein ratio", "off_support": "share off support"}
ROW = ("package", "sampler", "seconds", "seed")

if __name__ == "__main__":
    main()
