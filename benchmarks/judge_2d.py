"""Judge a run of ddpm_2d.py against the exact density of its data, in numbers and in pictures.

python ddpm_2d.py --data spirals --out runs/spirals
python benchmarks/judge_2d.py runs/spirals

Writes training.png, score.png, density.png and sampling.gif into the folder, in standardised
coordinates. Points of your own have no known density: they get training.png and sampling.gif.

The model's density is that of the probability-flow ODE from T down to t = 1, beside the exact
density of x_1. So the data end is x_1, not x_0: a known density, blurred by sqrt(beta_1) only (0.006
at T = 1000, where the Gaussians of the data are 0.08 wide), which no last, noiseless step has changed.
"""

import argparse
import io
import math
import pickle
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm_2d  # noqa: E402
from ddpm_2d import TOYS, Diffusion, NoisePredictor, ToyData  # noqa: E402

BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError)
BROKEN += (pickle.UnpicklingError, zipfile.BadZipFile)  # of a file

SWD = """swd_ratio: {swd_ratio}
    is how far samples.npy is from true samples (sliced Wasserstein-1 distance), compared with how
    far sets of as many true samples are from each other: these have 1, in the mean, and single
    sets {swd_low} to {swd_high}.
ddim_swd_ratio: {ddim_swd_ratio}
    is the same for fresh samples in {ddim_steps} steps of DDIM, eta 0."""
DENSITY = """excess_loss: {excess_loss}
    is how much the loss, a mean over t, is above that of the best possible network: at best 0.
kl_nats: {kl_nats} +- {kl_error}
    is the KL divergence from the exact density of x_1 to the model's, by the probability-flow ODE:
    what the model costs per point, in nats, beside the truth. At best 0.
solver_kl_nats: {solver_kl_nats} +- {solver_kl_error}
    is the same number for the exact score: what the solver adds by itself.
model_mass: {model_mass}
    is the model's density summed over density.png: 1, if nothing lies outside and the solver is
    right."""
OWN_POINTS = "No density is known of {data}: no score.png, no density.png, no kl_nats."


class Run(NamedTuple):
    """What is left of a run of ddpm_2d.py."""

    diffusion: Diffusion
    net: NoisePredictor
    data: ToyData
    name: str  # of the data
    losses: list
    samples: torch.Tensor  # standardised, float64 [n, 2]


def read_run(folder):
    """The run in a folder. Raises one of BROKEN, with the name of the file."""
    file = folder / "model.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        make_beta = getattr(ddpm_2d, saved["schedule"] + "_schedule")
        diffusion = Diffusion(make_beta(saved["T"]))
        net = NoisePredictor(diffusion).requires_grad_(False)
        net.load_state_dict(saved["net"])
        mean = saved["mean"]
        std = saved["std"]
        losses = saved["losses"]
        name = file = saved["data"]
        toy = name in TOYS
        points = torch.view_as_real(TOYS[name]) if toy else ddpm_2d.read_points(name)
        file = folder / "samples.npy"
        samples = (torch.from_numpy(np.load(file)) - mean) / std
        if samples.shape != (len(samples), 2):
            raise ValueError(f"{list(samples.shape)} is not [n, 2]")
    except BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: {type(error).__name__} {reason}") from error
    sigma = 0.08 if toy else 0.0  # as in ddpm_2d.py
    centers = (points - mean) / std * (1 - sigma**2) ** 0.5
    return Run(diffusion, net, ToyData(centers.float(), sigma), name, losses, samples)


def sliced_wasserstein(a, b, directions=64):
    """Wasserstein-1 distance of two clouds [n, 2], a mean over directions evenly in the plane."""
    angle = torch.arange(directions, dtype=torch.float64) * torch.pi / directions
    axes = torch.stack([angle.cos(), angle.sin()])  # [2, directions]
    gap = (a.double() @ axes).sort(0).values - (b.double() @ axes).sort(0).values
    return gap.abs().mean().item() if gap.isfinite().all() else math.nan


def judge_samples(run):
    """Ratios of the distances to true samples, and the range of this ratio among true samples."""
    n = len(run.samples)
    steps = min(50, run.diffusion.T)
    for fast in run.diffusion.ddim_sample_loop(run.net, torch.randn(n, 2), steps):
        pass  # to the last, x_0
    true = [run.data.sample(n) for _ in range(5)]
    pairs = [sliced_wasserstein(x, run.data.sample(n)) for x in true]
    unit = np.mean(pairs)
    numbers = {"swd_low": min(pairs) / unit, "swd_high": max(pairs) / unit, "ddim_steps": steps}
    for name, cloud in {"swd_ratio": run.samples, "ddim_swd_ratio": fast}.items():
        numbers[name] = np.mean([sliced_wasserstein(cloud, x) for x in true]) / unit
    return numbers


def density_at(run, t):
    """The exact density of x_t, again a mixture of Gaussians."""
    signal = run.diffusion.signal[t].item()
    noise = run.diffusion.noise[t].item()
    return ToyData(signal * run.data.centers, math.hypot(signal * run.data.sigma, noise))


def excess(run, t, n=2000):
    """Loss at t above the best possible one, as a share of it. The errors of both differ by
    E || eps_theta - E[eps | x_t] ||^2, which is less noisy than their difference."""
    steps = torch.full((n,), t)
    eps = torch.randn(n, 2)
    xt = run.diffusion.q_sample(run.data.sample(n), steps, eps)
    ideal = run.data.ideal_eps(run.diffusion, xt, steps)
    gap = (run.net(xt, steps) - ideal).square().mean()
    return (gap / (eps - ideal).square().mean()).item()


def velocity(diffusion, model, xt, t):
    """dx_t / dphi and its divergence. With signal = cos(phi) and noise = sin(phi) the
    probability-flow ODE is dx_t / dphi = v, here v = (eps_theta - noise x_t) / signal."""
    signal = diffusion.alpha_bar[t] ** 0.5
    noise = (1 - diffusion.alpha_bar[t]) ** 0.5
    xt = xt.detach().requires_grad_()
    with torch.enable_grad():
        eps = model(xt, torch.full((len(xt),), t))
        row0 = torch.autograd.grad(eps[:, 0].sum(), xt, retain_graph=True)[0]  # of the Jacobian
        row1 = torch.autograd.grad(eps[:, 1].sum(), xt)[0]
    divergence = (row0[:, 0] + row1[:, 1] - 2 * noise) / signal
    return (eps.detach() - noise * xt.detach()) / signal, divergence


def solver_times(diffusion, steps):
    """Integers t from 1 to T, the nearest to a grid of phi that is finer near the data."""
    phi = np.arccos(np.sqrt(diffusion.alpha_bar))  # 0..pi / 2, [T + 1]
    wanted = phi[1] + (phi[-1] - phi[1]) * np.linspace(0, 1, steps + 1) ** 2
    times = np.unique(np.abs(phi[1:, None] - wanted).argmin(0) + 1)
    return times.tolist(), phi[times].tolist()


def log_density(diffusion, model, x1, steps=100):
    """Log-density [n] of the model at points x_1 [n, 2]: Heun's method for x_t, the trapezoidal
    rule for d log p(x_t) / dphi = -divergence, only at integers t, as the network knows no others."""
    times, phi = solver_times(diffusion, steps)
    xt = x1
    total = torch.zeros(len(x1))  # integral of the divergence
    slope, divergence = velocity(diffusion, model, xt, times[0])
    for k in range(1, len(times)):
        h = phi[k] - phi[k - 1]
        with torch.no_grad():
            ahead = euler_slope(diffusion, model, xt + h * slope, times[k])
        xt = xt + h * (slope + ahead) / 2
        total += h / 2 * divergence
        slope, divergence = velocity(diffusion, model, xt, times[k])
        total += h / 2 * divergence
    return total - xt.square().sum(1) / 2 - math.log(2 * math.pi)  # x_T ~ N(0, I)
