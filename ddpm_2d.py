"""DDPM (Ho et al. 2020, arXiv 2006.11239) on 2-D points, judged against their exact density.

forward   q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)             Eq. (4)
train     E || eps - eps_theta(x_t, t) ||^2 over x_0, eps and t                    Algorithm 1
sample    x_{t-1} = mu_theta(x_t, t) + sigma_t z, from x_T ~ N(0, I) to x_0        Algorithm 2
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm


def linear_schedule(T):
    """beta of Ho et al. times 1000 / T, for T > 20, with beta[0] = 0: float64 [T + 1]."""
    return F.pad(torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T, (1, 0))


def cosine_schedule(T):
    """beta of Nichol & Dhariwal 2021, Eq. (17), with beta[0] = 0: float64 [T + 1]."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)  # t / T
    f = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2  # alpha_bar = f / f[0]
    return F.pad((1 - f[1:] / f[:-1]).clamp(max=0.999), (1, 0))


class Diffusion(nn.Module):
    """The forward process q, and the reverse process p of any model (x_t, t [B]) -> eps."""

    def __init__(self, beta):
        super().__init__()
        self.T = len(beta) - 1
        alpha_bar = torch.cumprod(1 - beta, 0)
        self.beta = beta.tolist()  # for one step at a time, in double precision
        self.alpha_bar = alpha_bar.tolist()
        self.signal = nn.Buffer(alpha_bar.sqrt().float(), persistent=False)  # for batches of t
        self.noise = nn.Buffer((1 - alpha_bar).sqrt().float(), persistent=False)

    def q_sample(self, x0, t, eps):
        """x_t from x_0 [B, ...], steps t [B] and noise eps [B, ...]: Eq. (4)."""
        t = t.view(-1, *[1] * (x0.ndim - 1))  # [B, 1, ...]
        return self.signal[t] * x0 + self.noise[t] * eps

    def p_losses(self, model, x0, t=None, eps=None):
        """Algorithm 1: squared error [B] of the predicted noise, a mean over coordinates."""
        t = torch.randint(1, self.T + 1, (len(x0),), device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        return (eps - model(self.q_sample(x0, t, eps), t)).square().flatten(1).mean(1)  # Eq. (14)

    @torch.no_grad()
    def p_sample_loop(self, model, xT, generator=None):
        """Algorithm 2: yields x_T, ..., x_0, T + 1 states in all. sigma_t^2 is beta-tilde_t."""
        yield (xt := xT)
        for t in range(self.T, 0, -1):
            eps = model(xt, torch.full((len(xt),), t, device=xt.device))
            beta = self.beta[t]
            alpha_bar = self.alpha_bar[t]
            mean = (xt - beta / (1 - alpha_bar) ** 0.5 * eps) / (1 - beta) ** 0.5  # Eq. (11)
            beta_tilde = (1 - self.alpha_bar[t - 1]) / (1 - alpha_bar) * beta  # Eq. (7)
            z = torch.empty_like(xt).normal_(generator=generator) if t > 1 else 0
            yield (xt := mean + beta_tilde**0.5 * z)

    @torch.no_grad()
    def ddim_sample_loop(self, model, xT, steps=50, eta=0.0, generator=None):
        """DDIM (Song et al. 2020): yields x_T, ..., x_0, steps + 1 states in all. T steps with
        eta = 1 are Algorithm 2 with beta-tilde; eta = 0 adds no noise. Raises ValueError."""
        if not (1 <= steps <= self.T and 0 <= eta <= 1):
            raise ValueError(f"{steps} steps, eta {eta}: take 1 to T = {self.T} and 0 to 1")
        times = [round(self.T * k / steps) for k in range(steps, -1, -1)]  # T, ..., 0
        yield (xt := xT)
        for t, s in zip(times, times[1:]):
            eps = model(xt, torch.full((len(xt),), t, device=xt.device))
            a_t = self.alpha_bar[t]
            a_s = self.alpha_bar[s]
            x0 = (xt - (1 - a_t) ** 0.5 * eps) / a_t**0.5
            sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5  # DDIM Eq. (16)
            z = torch.empty_like(xt).normal_(generator=generator)
            yield (xt := a_s**0.5 * x0 + (1 - a_s - sigma**2) ** 0.5 * eps + sigma * z)  # DDIM (12)

    @torch.no_grad()
    def variational_bound(self, model, x0, seed=0):
        """L_0..L_T of Eq. (5) [T + 1] in nats a point, and ||eps - eps_theta||^2 at t = 1..T [T].
        sigma_t^2 is beta-tilde_t, but beta_1 at t = 1, where that is 0. Same seed, same noise."""
        d = x0[0].numel()
        generator = torch.Generator(x0.device).manual_seed(seed)
        error = torch.zeros(self.T + 1, dtype=torch.float64)
        for t in range(1, self.T + 1):
            eps = torch.empty_like(x0).normal_(generator=generator)
            steps = torch.full((len(x0),), t, device=x0.device)
            error[t] = d * self.p_losses(model, x0, steps, eps).mean().item()  # d * mean = sum
        beta = torch.tensor(self.beta, dtype=torch.float64)
        alpha_bar = torch.tensor(self.alpha_bar, dtype=torch.float64)
        weight = beta[2:] / (2 * (1 - beta[2:]) * (1 - alpha_bar[1:-1]))  # Eq. (12) with Eq. (7)
        terms = torch.zeros_like(error)  # L_0 = -log N(x_0; mu_theta, beta_1), not Eq. (13)
        terms[0] = (error[1] / (1 - beta[1]) + d * (2 * torch.pi * beta[1]).log()) / 2
        terms[1:-1] = weight * error[2:]  # L_{t-1} from error[t], t = 2..T
        end = alpha_bar[-1]  # L_T is the divergence of N(sqrt(end) x_0, 1 - end) from N(0, 1)
        terms[-1] = (end * x0.square().sum().item() / len(x0) - d * (end + torch.log1p(-end))) / 2
        return terms, error[1:]


class NoisePredictor(nn.Module):
    """eps_theta(x_t, t): residual MLP; random Fourier features of x_t, sinusoids of 1000 t / T."""

    def __init__(self, diffusion, width=128, layers=3):
        super().__init__()
        self.diffusion = diffusion
        self.time_freq = nn.Buffer(1000 / diffusion.T * 10_000 ** (-torch.arange(16) / 16))
        self.point_freq = nn.Buffer(2 * torch.randn(2, 32))
        self.inp = nn.Linear(2 + 2 * (32 + 16), width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)
        nn.init.zeros_(self.out.weight)

    def forward(self, xt, t):
        angle = torch.cat([xt @ self.point_freq, t[:, None] * self.time_freq], 1)  # [B, 48]
        h = self.inp(torch.cat([xt, angle.sin(), angle.cos()], 1))  # [B, width]
        for layer in self.layers:
            h = h + layer(F.silu(h))
        v = self.out(F.silu(h))  # [B, 2]
        # v = signal eps - noise x_0 (Salimans & Ho 2022) and signal^2 + noise^2 = 1, so that
        return self.diffusion.q_sample(v, t, eps=xt)  # eps = signal v + noise x_t


class ToyData(NamedTuple):
    """An equal mixture of N(center, sigma^2 I): all is exact. sigma = 0: points of a file."""

    centers: torch.Tensor  # [m, 2]
    sigma: float

    def sample(self, n):
        """n points [n, 2]."""
        pick = torch.randint(len(self.centers), (n,), device=self.centers.device)
        return torch.normal(self.centers[pick], self.sigma)

    def log_prob(self, x):
        """Exact log-density [n] at points x [n, 2], in nats."""
        log_p = -(torch.cdist(x, self.centers) ** 2) / (2 * self.sigma**2)  # [n, m]
        return log_p.logsumexp(1) - np.log(2 * np.pi * self.sigma**2 * len(self.centers))

    def ideal_eps(self, diffusion, xt, t):
        """E[eps | x_t] [n, 2], which no network can beat; t [n] must be one step for all."""
        signal = diffusion.signal[t[0]]
        noise = diffusion.noise[t[0]]
        var = (signal * self.sigma) ** 2 + noise**2  # of x_t around signal * center
        log_p = -(torch.cdist(xt, signal * self.centers) ** 2) / (2 * var)  # [n, m]
        center = torch.softmax(log_p, 1) @ self.centers  # E[center | x_t]; eps is linear in it
        return noise / var * (xt - signal * center)  # Cov(eps, x_t) / Var(x_t), given the center


u = (torch.arange(600, dtype=torch.float64) + 0.5) / 600  # evenly spread over 0..1
arm = u.sqrt() * torch.exp(3j * torch.pi * u.sqrt())
tiles = torch.cartesian_prod(4 * u[::15], 4 * u[::15])  # [1600, 2]
TOYS = {  # the centers of the Gaussians, as x + iy
    "8gaussians": torch.exp(2j * torch.pi * torch.arange(8, dtype=torch.float64) / 8),
    "moons": torch.cat([torch.exp(1j * torch.pi * u), 1 + 0.5j - torch.exp(1j * torch.pi * u)]),
    "circles": torch.cat([torch.exp(2j * torch.pi * u), 0.5 * torch.exp(2j * torch.pi * u)]),
    "swissroll": (1 + 2 * u) * torch.exp(1j * torch.pi * (1.5 + 3 * u)),
    "spirals": torch.cat([arm, -arm]),
    "checkerboard": torch.view_as_complex(tiles[tiles.floor().sum(1) % 2 == 0]),
}


def read_points(path):
    """Rows x, y of a .npy or a text file: float64 [n, 2]. Raises OSError, ValueError."""
    if str(path).endswith(".npy"):
        points = rows = np.asarray(np.load(path))
    else:
        text = Path(path).read_text("utf-8-sig").replace('"', "")
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        rows = [line for line in lines if line] or ["no points"]  # empty file: a header alone
        mark = next((mark for mark in ";\t," if mark in rows[0]), None)  # None: blanks
        for number, row in enumerate(rows, 1):
            if len(row.split(mark)) != 2:
                raise ValueError(f"row {number} is {row!r}, not two columns: to_csv(index=False)?")
        table = np.genfromtxt(rows, delimiter=mark, ndmin=2)  # words become NaN
        letters = {cell.lower().strip("+-.e0123456789 ") for cell in rows[0].split(mark)}
        points = table if letters <= {"", "nan", "inf"} else table[1:]  # row 1 is a header
    if points.dtype.kind not in "iuf" or points.shape[1:] != (2,) or len(points) == 0:
        raise ValueError(f"{points.dtype} {list(points.shape)}, but should be numbers [n, 2]")
    bad = np.flatnonzero(~np.isfinite(points).all(1))
    if len(bad):
        row = len(rows) - len(points) + bad[0]  # with the header
        raise ValueError(f"row {row + 1} is {rows[row]!r}, not two finite numbers")
    return torch.from_numpy(points.astype(np.float64))


def train(diffusion, net, data, steps, batch_size, lr):
    """Algorithm 1. Returns the losses [steps]."""
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in tqdm(range(steps), "train"):
        loss = diffusion.p_losses(net, data.sample(batch_size)).mean()
        if not loss.isfinite():
            raise SystemExit(f"\nloss {loss:g} at step {step}: start again with a lower --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def evaluate(diffusion, net, data, samples):
    """The numbers that judge a model, beside those of the best possible one."""
    x0 = data.sample(512)
    terms, error = diffusion.variational_bound(net, x0)
    metrics = {"loss": error.mean() / 2, "bound_nats": terms.sum()}  # 2 axes: as in p_losses
    if data.sigma:  # a toy set: its density is known
        terms, error = diffusion.variational_bound(partial(data.ideal_eps, diffusion), x0)
        metrics |= {"ideal_loss": error.mean() / 2, "ideal_bound_nats": terms.sum()}
        metrics["excess_loss"] = metrics["loss"] / metrics["ideal_loss"] - 1
        metrics["entropy_nats"] = -data.log_prob(x0).mean()
        rare = data.log_prob(data.sample(10_000)).quantile(0.001)  # so true points score 0.001
        metrics["off_support"] = 1 - (data.log_prob(samples) >= rare).float().mean()  # NaN is off
    return {key: x.item() if x.isfinite() else None for key, x in metrics.items()}


def draw(file, diffusion, data, states, fast):
    """The forward process q above the reverse process, by DDPM and by DDIM."""
    x0 = data.sample(4000)
    figure = Figure(figsize=(13, 7), layout="constrained")
    for column, k in zip(figure.subplots(3, 6).T, (0, 0.04, 0.1, 0.2, 0.5, 1)):
        t = round(diffusion.T * k)
        xt = diffusion.q_sample(x0, torch.full((4000,), t, device=x0.device), torch.randn_like(x0))
        clouds = {"q": xt, "DDPM": states[-1 - t], "DDIM": fast[-1 - round((len(fast) - 1) * k)]}
        for ax, (name, points) in zip(column, clouds.items()):
            ax.scatter(*points.T.cpu().numpy(), s=3, lw=0)
            ax.set(title=f"{name}, t = {t}", xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
            ax.set_axis_off()
    figure.savefig(file, dpi=120)


def main(argv=None):
    """Train, sample, evaluate and draw. Returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default="8gaussians", help=f"{', '.join(TOYS)}, or a .csv or .npy file of points")
    add("--steps", type=int, default=4000, help="of training")
    add("--batch-size", type=int, default=1024, help="points per training step")
    add("--lr", type=float, default=5e-3, help="learning rate at the start")
    add("--T", type=int, default=1000, help="steps of the diffusion, 21 or more")
    add("--schedule", default="cosine", choices=["linear", "cosine"], help="of beta_t")
    add("--samples", type=int, default=10_000, help="samples to draw")
    add("--seed", type=int, default=0, help="of all randomness")
    add("--device", default=torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--out", type=Path, default="runs/ddpm_2d", help="folder for all files")
    args = parser.parse_args(argv)
    limits = {"steps": 1, "batch_size": 1, "lr": 0, "T": 21, "samples": 1, "seed": 0}
    for name, least in limits.items():
        if not least <= getattr(args, name) <= 1e9:
            parser.error(f"--{name.replace('_', '-')} must be {least} to 1e9")
    try:
        torch.empty(0, device=args.device)  # is there such a device?
        args.out.mkdir(parents=True, exist_ok=True)
        toy = args.data in TOYS
        points = torch.view_as_real(TOYS[args.data]) if toy else read_points(args.data)
    except UnicodeDecodeError as error:
        parser.error(f"{args.data} is not UTF-8 text, begins with {error.object[:8]}")
    except (OSError, ValueError, EOFError, RuntimeError, AssertionError) as error:
        parser.error(f"--data {args.data} --device {args.device} --out {args.out}: {error}")

    torch.manual_seed(args.seed)
    sigma = 0.08 if toy else 0.0  # of the Gaussians; points of a file stay as they are
    mean = points.mean(0)
    std = points.std(0, correction=0).masked_fill(points.amin(0) == points.amax(0), 1)
    centers = (points - mean) / std * (1 - sigma**2) ** 0.5  # + sigma^2: variance 1
    data = ToyData(centers.float().to(args.device), sigma)
    schedule = {"linear": linear_schedule, "cosine": cosine_schedule}[args.schedule]
    diffusion = Diffusion(schedule(args.T)).to(args.device)
    net = NoisePredictor(diffusion).to(args.device)
    losses = train(diffusion, net, data, args.steps, args.batch_size, args.lr)
    saved = {"net": net.state_dict(), "mean": mean, "std": std, "losses": losses}
    saved |= {"data": args.data, "T": args.T, "schedule": args.schedule}
    torch.save(saved, args.out / "model.pt")

    xT = torch.randn(args.samples, 2, device=args.device)
    states = []
    for xt in tqdm(diffusion.p_sample_loop(net, xT), "sample", args.T + 1):
        states.append(xt[:4000].clone())  # a view would keep all of xt
    np.save(args.out / "samples.npy", xt.cpu().double() * std + mean)  # x_0 in the file's units
    metrics = evaluate(diffusion, net, data, xt)
    text = json.dumps(metrics | vars(args), indent=1, default=str)
    (args.out / "metrics.json").write_text(text)
    fast = list(diffusion.ddim_sample_loop(net, xT[:4000], min(50, args.T)))
    draw(args.out / "process.png", diffusion, data, states, fast)
    print(text)
    return metrics


if __name__ == "__main__":
    main()
