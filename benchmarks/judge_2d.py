"""Judge a run of ddpm_2d.py against the exact density of its data, in numbers and in pictures.

python ddpm_2d.py --data spirals --out runs/spirals
python benchmarks/judge_2d.py runs/spirals

Writes training.png, score.png, density.png and sampling.gif into the folder, in standardised
coordinates. Points of your own have no known density: they get training.png and sampling.gif.

The model's density is that of the probability-flow ODE at t = 1, beside the exact density of x_1.
This is the data, blurred by sqrt(beta_1) (0.01 at T = 1000; the Gaussians of the data are 0.08
wide). The last step, from x_1 to x_0, is left out: it is a jump, no part of the flow.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm_2d  # noqa: E402
import ddpm_mnist  # noqa: E402
from ddpm_2d import TOYS, Diffusion, Mixture, NoisePredictor, linear_schedule  # noqa: E402

SAMPLES = """swd_ratio: {swd_ratio}
    is how far samples.npy is from true samples (sliced Wasserstein-1 distance), compared with
    how far two sets of as many true samples are from each other: these have 1 in the mean, and
    five pairs had {swd_low} to {swd_high}.
ddim_swd_ratio: {ddim_swd_ratio}
    is the same for fresh samples in {ddim_steps} steps of DDIM, eta 0."""
DENSITY = """off_support: {off_support}
    is the share of samples that are less likely than 99.9 % of the data: 0.001 is best.
coverage: {coverage}
    is how many centers of the data are the nearest one of some sample, compared with as many true
    points: 1 is best. It falls if a part of the data is never drawn; off_support does not see that.
excess_loss: {excess_loss}
    is how much the loss, a mean over t, is above the lowest possible one, as a share of it.
kl_nats: {kl_nats} +- {kl_error}
    is KL(exact || model) of the densities of x_1: what it costs, in nats a point, to believe the
    model. At best 0. The same, summed over the grid of density.png: {grid_kl_nats}.
solver_kl_nats: {solver_kl_nats} +- {solver_kl_error}
    is the same number for the exact score: the solver's own error.
model_mass: {model_mass}
    is the model's density, summed over that grid: 1 if the solver is right and all is inside."""
OWN_POINTS = "The density of {data} is not known: no score.png, no density.png, no kl_nats."


class Run(NamedTuple):
    """What is left of a run of ddpm_2d.py."""

    diffusion: Diffusion
    net: NoisePredictor
    data: Mixture  # sigma = 0: points of a user
    name: str  # of the data
    losses: list
    samples: torch.Tensor  # standardised, float64 [n, 2]


def read_run(folder):
    """The run in a folder. Raises ValueError with the name of the file that is at fault."""
    try:
        file = folder / "model.pt"
        saved = torch.load(file, map_location="cpu", weights_only=True)
        diffusion = Diffusion(linear_schedule(saved["T"]))
        net = NoisePredictor(saved["T"]).requires_grad_(False)
        net.load_state_dict(saved["net"])
        losses = saved["losses"]
        sigma = saved["sigma"]
        file = saved["data"]
        points = TOYS[file] if sigma else ddpm_2d.read_points(file)
        data = Mixture(((points - saved["mean"]) / saved["std"]).float(), sigma)
        file = folder / "samples.npy"
        samples = torch.from_numpy(np.load(file))
        if samples.shape != (len(samples), 2):
            raise ValueError(f"{list(samples.shape)} is not [n, 2]")
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{file}: {error!r:.400}") from error
    samples = (samples - saved["mean"]) / saved["std"]
    return Run(diffusion, net, data, saved["data"], losses, samples)


def toy_data(name):
    """A toy set of ddpm_2d.py, as that script makes it."""
    points = TOYS[name]
    std = points.std(0, correction=0) / (1 - 0.08**2) ** 0.5
    return Mixture(((points - points.mean(0)) / std).float(), 0.08)


def sliced_wasserstein(a, b, directions=64):
    """Wasserstein-1 distance of two clouds [n, 2], the mean over directions around the circle."""
    angle = torch.arange(directions, dtype=torch.float64) * torch.pi / directions
    axes = torch.stack([angle.cos(), angle.sin()])  # [2, directions]
    gap = (a.double() @ axes).sort(0).values - (b.double() @ axes).sort(0).values
    return gap.abs().mean().item() if gap.isfinite().all() else math.nan


def centers_hit(data, samples):
    """How many centers are the nearest one of at least one of the first 10,000 samples."""
    samples = samples[:10_000].float()
    samples = samples[samples.isfinite().all(1)]
    return len(torch.cdist(samples, data.centers).argmin(1).unique())


def scores(data, samples):
    """Distance of samples [n, 2] to true ones, by that of true ones from each other, and its range;
    for toy sets off_support of ddpm_2d.py and coverage, too."""
    n = len(samples)
    true = [data.sample(n) for _ in range(5)]
    pairs = [sliced_wasserstein(x, data.sample(n)) for x in true]
    unit = np.mean(pairs).item() or math.nan  # 0 for a single point
    distance = np.mean([sliced_wasserstein(x, samples) for x in true]).item()
    numbers = {"swd_ratio": distance / unit}
    numbers |= {"swd_low": min(pairs) / unit, "swd_high": max(pairs) / unit}
    if data.sigma:
        rare = data.log_prob(data.sample(10_000)).quantile(0.001)
        log_p = torch.cat([data.log_prob(part) for part in samples.float().split(10_000)])
        numbers["off_support"] = 1 - (log_p >= rare).float().mean().item()  # NaN is off
        numbers["coverage"] = centers_hit(data, samples) / centers_hit(data, true[0])
    return numbers


def judge_samples(run):
    """scores of samples.npy and the first of them for as many fresh samples by DDIM."""
    T = run.diffusion.T
    n = len(run.samples)
    ddim = ddpm_mnist.Diffusion(linear_schedule(T))
    *_, fast = ddim.ddim_sample_loop(run.net, torch.randn(n, 2), min(50, T))
    numbers = scores(run.data, run.samples) | {"ddim_steps": min(50, T)}
    return numbers | {"ddim_swd_ratio": scores(run.data, fast)["swd_ratio"]}


def density_at(run, t):
    """The exact density of x_t, again a mixture of Gaussians."""
    signal = run.diffusion.signal[t].item()
    noise = run.diffusion.noise[t].item()
    return Mixture(signal * run.data.centers, math.hypot(signal * run.data.sigma, noise))


def errors_at(run, t, n=4000):
    """The lowest possible loss at t, and how much the network's is above it. This difference is
    E || eps_theta - E[eps | x_t] ||^2, which n points tell better than both losses do."""
    steps = torch.full((n,), t)
    eps = torch.randn(n, 2)
    xt = run.diffusion.q_sample(run.data.sample(n), steps, eps)
    ideal = run.data.ideal_eps(run.diffusion, xt, steps)
    excess = (run.net(xt, steps) - ideal).square().mean()
    return (eps - ideal).square().mean().item(), excess.item()


def velocity(diffusion, model, t, xt):
    """dx_t / dphi [n, 2] of the probability-flow ODE, where signal = cos(phi), noise = sin(phi):
    v = (eps_theta - noise x_t) / signal. It is finite at both ends for the best model; of another
    it is off by the error of eps_theta / signal, where 1 / signal is 157 at t = T."""
    signal = diffusion.alpha_bar[t] ** 0.5
    noise = (1 - diffusion.alpha_bar[t]) ** 0.5
    return (model(xt, torch.full((len(xt),), t)) - noise * xt) / signal


@torch.enable_grad()
def with_divergence(function, x):
    """function(x) [n, 2] and its divergence [n], exact: a backward pass for each coordinate."""
    x = x.detach().requires_grad_()
    y = function(x)
    row0 = torch.autograd.grad(y[:, 0].sum(), x, retain_graph=True)[0]  # of the Jacobian
    row1 = torch.autograd.grad(y[:, 1].sum(), x)[0]
    return y.detach(), row0[:, 0] + row1[:, 1]


@torch.no_grad()
def log_density(diffusion, model, x1, steps=200):
    """The model's log-density [n] at points x_1 [n, 2], from x_T ~ N(0, I) and the instantaneous
    change of variables, d log p(x_t) / dphi = -div v. Heun's method for x_t, trapezoids for
    log p, on a grid of phi that is finer near the data, rounded to whole t: the network has
    learned no others."""
    phi = np.arccos(np.sqrt(diffusion.alpha_bar))  # 0..pi / 2, [T + 1]
    wanted = phi[1] + (phi[-1] - phi[1]) * np.linspace(0, 1, steps + 1) ** 2
    times = np.unique(np.abs(phi[1:, None] - wanted).argmin(0) + 1).tolist()  # 1, ..., T
    log_p = []
    for xt in tqdm(x1.split(2048), f"density at {len(x1):,} points"):
        v, div = with_divergence(partial(velocity, diffusion, model, 1), xt)
        integral = 0  # of div v
        for s, t in zip(times, times[1:]):
            h = phi[t] - phi[s]
            ahead = velocity(diffusion, model, t, xt + h * v)
            xt = xt + h * (v + ahead) / 2
            integral = integral + h * div / 2
            v, div = with_divergence(partial(velocity, diffusion, model, t), xt)
            integral = integral + h * div / 2
        log_p.append(integral - xt.square().sum(1) / 2 - math.log(2 * math.pi))
    return torch.cat(log_p)


def kl_nats(run, model, n):
    """KL(exact || model) of x_1 in nats and its standard error, from n points."""
    x1 = run.diffusion.q_sample(run.data.sample(n), torch.ones(n, dtype=int), torch.randn(n, 2))
    gap = (density_at(run, 1).log_prob(x1) - log_density(run.diffusion, model, x1)).double()
    return gap.mean().item(), gap.std().item() / n**0.5


def plane(half, n):
    """Points [n * n, 2] of a square grid over -half..half, row by row from below."""
    line = torch.linspace(-half, half, n)
    return torch.cartesian_prod(line, line).flip(1)


def depth(log_p):
    """How many standard deviations from its top a point would be, if p were a Gaussian."""
    return (2 * (log_p.max() - log_p)).sqrt()


def frame(ax, half, title):
    """Axes of the square -half..half of the plane."""
    ax.set_title(title, fontsize=10)
    ax.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])


def heat(ax, half, values, level=None, limit=3, extend="max", **style):
    """An image of values on a grid; with a level, a colour bar, and white where it is too high."""
    n = math.isqrt(len(values))
    style |= {"origin": "lower", "interpolation": "bilinear"}
    image = ax.imshow(values.view(n, n).numpy(), extent=(-half, half, -half, half), **style)
    if level is not None:
        line = np.linspace(-half, half, n)
        ax.contourf(line, line, level.view(n, n).numpy(), [limit, 1e9], colors="white")
        ax.figure.colorbar(image, ax=ax, extend=extend)


def draw_training(file, run, n):
    """Loss by step, error by t. Returns excess_loss, if the lowest possible loss is known."""
    T = run.diffusion.T
    x0 = run.data.sample(n)
    edges = np.unique(np.geomspace(1, T + 1, 41).round().astype(int))  # of bins of t
    models = {"network": run.net}
    if run.data.sigma:
        models["best possible"] = partial(run.data.ideal_eps, run.diffusion)
    figure = Figure(figsize=(4 + 4 * len(models), 3.6), layout="constrained")
    left, middle, *right = figure.subplots(1, 1 + len(models))
    left.semilogx(np.arange(len(run.losses)) + 1, run.losses, alpha=0.3)
    width = math.ceil(len(run.losses) / 100)
    smooth = np.convolve(run.losses, np.ones(width) / width, "valid")
    left.plot(np.arange(len(smooth)) + (width + 1) / 2, smooth, color="C0", label="network")
    left.set(xlabel="training step", title="loss", xlim=(1, None))
    for (name, model), style in zip(models.items(), ({"lw": 4, "alpha": 0.5}, {"color": "k"})):
        error = run.diffusion.variational_bound(model, x0)[1].numpy()
        means = np.add.reduceat(error, edges[:-1] - 1) / np.diff(edges)
        middle.stairs(means, edges, baseline=None, label=name, **style)
    middle.set(xlabel="t", title="squared error of eps", xscale="log", xlim=(1, T + 1))
    numbers = {}
    if right:
        times = (edges[:-1] + edges[1:] - 1) // 2
        best, excess = np.transpose([errors_at(run, t) for t in times.tolist()])
        left.axhline(np.average(best, weights=np.diff(edges)), color="k", label="best possible")
        left.legend(frameon=False)
        middle.legend(frameon=False)
        right[0].loglog(times, excess, "o-", ms=3)
        right[0].set(xlabel="t", title="network's error less the best possible")
        numbers["excess_loss"] = np.diff(edges) @ excess / (np.diff(edges) @ best)
    figure.savefig(file, dpi=150)
    return numbers


def draw_score(file, run, grid):
    """Rows t = T / 20, T / 10, T / 5: sqrt(1 - alpha_bar_t) * score = -eps, exact and learned."""
    ideal = partial(run.data.ideal_eps, run.diffusion)
    blues = ["#a6cbe3", "#cde0f1", "#e9f2fa"]
    figure = Figure(figsize=(10, 9.6), layout="constrained")
    for row, share in zip(figure.subplots(3, 3), (20, 10, 5)):
        t = max(1, run.diffusion.T // share)
        exact = density_at(run, t)
        half = (exact.centers.abs().max() + 3.2 * exact.sigma).item()
        fine = plane(half, grid)
        level = depth(exact.log_prob(fine))
        line = fine[:grid, 0].numpy()
        coarse = plane(half * 19 / 20, 20)
        coarse = coarse[exact.log_prob(coarse) > exact.log_prob(fine).max() - 3**2 / 2]
        for ax, model, name in zip(row, (ideal, run.net), ("exact", "learned")):
            ax.contourf(line, line, level.view(grid, grid).numpy(), [0, 1, 2, 3], colors=blues)
            arrows = -model(coarse, torch.full((len(coarse),), t))
            style = {"scale_units": "width", "scale": 36, "width": 0.005, "minlength": 0.5}
            ax.quiver(*coarse.T.numpy(), *arrows.T.numpy(), color="#08306b", **style)
            frame(ax, half, f"{name}, t = {t}")
        steps = torch.full((len(fine),), t)
        gap = (run.net(fine, steps) - ideal(fine, steps)).norm(dim=1)
        top = gap[level < 3].quantile(0.99).item()
        heat(row[2], half, gap, level, cmap="magma_r", vmin=0, vmax=top)
        best, excess = errors_at(run, t)
        frame(row[2], half, f"norm of the difference; excess loss {excess / best:.2%}")
    figure.supxlabel(r"arrows: $-\epsilon = \sqrt{1 - \bar\alpha_t}\,\nabla\log p(x_t)$")
    figure.savefig(file, dpi=150)


def draw_density(file, run, grid, kl, error):
    """The exact density of x_1, the model's, their log-ratio; returns two sums over the grid."""
    exact = density_at(run, 1)
    half = (exact.centers.abs().max() + 4.3 * exact.sigma).item()
    points = plane(half, grid)
    log_q = exact.log_prob(points)
    log_p = log_density(run.diffusion, run.net, points)
    figure = Figure(figsize=(12, 3.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for ax, values in ((left, log_q), (middle, log_p)):
        heat(ax, half, values.exp(), cmap="Blues", vmin=0, vmax=log_q.max().exp().item())
    figure.colorbar(middle.images[0], ax=middle, extend="max")
    ratio = log_p - log_q
    heat(right, half, ratio, depth(log_q), 4, "both", cmap="RdBu_r", vmin=-1, vmax=1)
    frame(left, half, "exact density of $x_1$")
    frame(middle, half, "the model's, by the probability-flow ODE")
    frame(right, half, f"log(model / exact), KL = {kl:.3f} $\\pm$ {error:.3f} nats")
    figure.savefig(file, dpi=150)
    area = (2 * half / (grid - 1)) ** 2
    grid_kl = -(log_q.exp() * ratio).sum().item() * area
    return {"grid_kl_nats": grid_kl, "model_mass": log_p.exp().sum().item() * area}


def draw_sampling(file, run, n):
    """Algorithm 2 in some 40 frames, which come faster near the data; the last one is held."""
    T = run.diffusion.T
    wanted = {round(T * (k / 40) ** 2) for k in range(41)}
    half = 1.3 * run.data.sample(1000).abs().max().clamp(min=1).item()
    states = run.diffusion.p_sample_loop(run.net, torch.randn(n, 2))
    figure = Figure(figsize=(4, 4.2))
    ax = figure.add_axes([0.02, 0.02, 0.96, 0.92])
    writer = PillowWriter(fps=12)
    with writer.saving(figure, file, dpi=100):
        for k, xt in enumerate(tqdm(states, file.name, T + 1)):
            if T - k in wanted:
                ax.clear()
                ax.scatter(*xt.T.numpy(), s=4, lw=0)
                frame(ax, half, f"t = {T - k}")
                writer.grab_frame()
        for _ in range(36):  # three seconds
            writer.grab_frame()


def judge(folder, run, grid, points):
    """The numbers of a run; draws its pictures into the folder."""
    numbers = judge_samples(run) | draw_training(folder / "training.png", run, points // 8)
    if run.data.sigma:
        kl, error = kl_nats(run, run.net, points)
        numbers |= {"kl_nats": kl, "kl_error": error}
        draw_score(folder / "score.png", run, grid)
        numbers |= draw_density(folder / "density.png", run, grid, kl, error)
        kl, error = kl_nats(run, partial(run.data.ideal_eps, run.diffusion), points // 8)
        numbers |= {"solver_kl_nats": kl, "solver_kl_error": error}
    draw_sampling(folder / "sampling.gif", run, points // 4)
    return numbers


def main(argv=None):
    """Judge the runs. Returns {folder: {name: number}}; a number that is not finite is None."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folder of model.pt and samples.npy")
    add("--grid", type=int, default=120, help="densities are drawn on grid x grid points")
    add("--points", type=int, default=8000, help="that estimate kl_nats; fewer for the rest")
    args = parser.parse_args(argv)
    if args.grid < 4 or args.points < 16:
        parser.error("--grid must be 4 or more, --points 16 or more")
    try:
        runs = {str(folder): read_run(folder) for folder in args.runs}
    except ValueError as error:
        parser.error(str(error))
    results = {}
    for folder, run in runs.items():
        torch.manual_seed(0)
        numbers = judge(Path(folder), run, args.grid, args.points)
        words = {name: f"{x:.4g}" for name, x in numbers.items()} | {"data": run.name}
        print(f"\n{folder}: {run.name}, {len(run.samples):,} samples")
        print(SAMPLES.format(**words))
        print((DENSITY if run.data.sigma else OWN_POINTS).format(**words))
        finite = {name: float(x) for name, x in numbers.items() if math.isfinite(x)}
        results[folder] = dict.fromkeys(numbers) | finite
    return results


if __name__ == "__main__":
    main()
