"""DDPM (Ho et al. 2020, arXiv 2006.11239) on 2-D points, toy sets of known density or your own.

forward   q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)             Eq. (4)
train     E || eps - eps_theta(x_t, t) ||^2 over x_0, eps and t                    Algorithm 1
sample    x_{t-1} = mu_theta(x_t, t) + sigma_t z, from x_T ~ N(0, I) to x_0        Algorithm 2

Not as in the paper: a mean over coordinates in the loss; L_0 is a Gaussian density, in place of the
decoder for pixels of Eq. (13); a small MLP; AdamW with a decaying learning rate; no EMA of weights.
"""

import json
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
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
    """The beta_t [T] of Ho et al., times 1000 / T so that any T ends in noise. T > 20: beta < 1."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T


class Diffusion(nn.Module):
    """q(x_t | x_0), and the way back p by a model (x_t, t [B]) -> eps. beta [T] of steps 1..T."""

    def __init__(self, beta):
        super().__init__()
        self.T = len(beta)
        beta = F.pad(beta, (1, 0))  # [T + 1]: index t is step t, beta_0 = 0
        alpha_bar = torch.cumprod(1 - beta, 0)  # alpha_bar_0 = 1
        self.beta = beta.tolist()  # float64 numbers, for one step of all points
        self.alpha_bar = alpha_bar.tolist()
        self.signal = nn.Buffer(alpha_bar.sqrt().float(), persistent=False)  # for steps t [B]
        self.noise = nn.Buffer((1 - alpha_bar).sqrt().float(), persistent=False)

    def q_sample(self, x0, t, eps):
        """x_t from x_0 [B, ...], steps t [B] and noise eps [B, ...]: Eq. (4)."""
        t = t.view(-1, *[1] * (x0.ndim - 1))  # [B, 1, ...]
        return self.signal[t] * x0 + self.noise[t] * eps

    def p_losses(self, model, x0, t=None, eps=None):
        """Eq. (14) for each point [B], averaged over its coordinates. Random t and eps if None."""
        t = torch.randint(1, self.T + 1, (len(x0),), device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        return (eps - model(self.q_sample(x0, t, eps), t)).square().flatten(1).mean(1)

    @torch.no_grad()  # in here, not in the loop over its states
    def p_sample_loop(self, model, xt):
        """Algorithm 2: yields x_T, ..., x_0. sigma_t^2 is beta-tilde_t (Sec. 3.2: or beta_t)."""
        yield xt
        for t in range(self.T, 0, -1):
            eps = model(xt, torch.full((len(xt),), t, device=xt.device))
            beta = self.beta[t]
            alpha_bar = self.alpha_bar[t]
            mean = (xt - beta / (1 - alpha_bar) ** 0.5 * eps) / (1 - beta) ** 0.5  # Eq. (11)
            beta_tilde = (1 - self.alpha_bar[t - 1]) / (1 - alpha_bar) * beta  # Eq. (7)
            z = torch.randn_like(xt) if t > 1 else 0  # beta-tilde_1 is 0 anyway
            xt = mean + beta_tilde**0.5 * z
            yield xt

    @torch.no_grad()
    def variational_bound(self, model, x0, seed=0):
        """L_0, ..., L_T of Eq. (5) [T + 1], nats per point, and Eq. (14) at t = 1, ..., T [T] for
        points x0 [B, d]. sigma_t^2 is beta-tilde_t. At t = 1 that is 0, which has no density: there
        it is beta_1. Two models with the same seed get the same noise."""
        d = x0.shape[1]
        generator = torch.Generator(x0.device).manual_seed(seed)
        loss = torch.zeros(self.T + 1, dtype=torch.float64)
        for t in tqdm(range(1, self.T + 1), "evaluate"):
            eps = torch.empty_like(x0).normal_(generator=generator)
            steps = torch.full((len(x0),), t, device=x0.device)
            loss[t] = self.p_losses(model, x0, steps, eps).mean().item()
        error = d * loss  # E || eps - eps_theta ||^2
        beta = torch.tensor(self.beta, dtype=torch.float64)
        alpha = 1 - beta
        alpha_bar = torch.tensor(self.alpha_bar, dtype=torch.float64)
        # L_{t-1} of t = 2..T, Eq. (12). Equal variances in q and p: the constant of Eq. (8) is 0
        sigma2 = (1 - alpha_bar[1:-1]) / (1 - alpha_bar[2:]) * beta[2:]
        weight = beta[2:] ** 2 / (2 * sigma2 * alpha[2:] * (1 - alpha_bar[2:]))
        # L_0 = -log N(x_0; mu, beta_1 I) with x_0 - mu = sqrt(beta_1 / alpha_1) (eps_theta - eps)
        L_0 = (error[1] / alpha[1] + d * torch.log(2 * torch.pi * beta[1])) / 2
        # L_T = KL( N(sqrt(a) x_0, (1 - a) I) || N(0, I) ) = (a |x_0|^2 - d a - d log(1 - a)) / 2
        a = alpha_bar[-1]
        L_T = (a * x0.square().sum(1).mean().item() - d * (a + torch.log(1 - a))) / 2
        return torch.cat([L_0[None], weight * error[2:], L_T[None]]), loss[1:]


class NoisePredictor(nn.Module):
    """eps_theta(x_t, t): residual MLP on random Fourier features of x_t and sinusoids of t."""

    def __init__(self, T, width=128, layers=3):
        super().__init__()
        self.time_freq = nn.Buffer(1000 / T * 10_000 ** (-torch.arange(16) / 16))  # t as 0..1000
        self.point_freq = nn.Buffer(2 * torch.randn(2, 32))  # 2: how fine; more is finer
        self.inp = nn.Linear(2 + 2 * (32 + 16), width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)
        nn.init.zeros_(self.out.weight)  # training starts near eps = x_t

    def forward(self, xt, t):
        angle = torch.cat([xt @ self.point_freq, t[:, None] * self.time_freq], 1)  # [B, 48]
        h = self.inp(torch.cat([xt, angle.sin(), angle.cos()], 1))  # [B, width]
        for layer in self.layers:
            h = h + layer(F.silu(h))
        return xt + self.out(F.silu(h))  # [B, 2]; for large t, x_t is nearly eps


class Mixture(NamedTuple):
    """An equal mixture of N(center, sigma^2 I), of known density; with sigma = 0, just points."""

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
        """E[eps | x_t] [n, 2] at steps t [n], the prediction with the least expected error."""
        signal = diffusion.signal[t, None]  # [n, 1]; cdist has one set of centers, so x_t is scaled
        noise = diffusion.noise[t, None]
        var = (signal * self.sigma) ** 2 + noise**2  # of x_t around signal * center
        distance = signal * torch.cdist(xt / signal, self.centers)  # |x_t - signal * center| [n, m]
        center = torch.softmax(-(distance**2) / (2 * var), 1) @ self.centers  # E[center | x_t]
        return noise / var * (xt - signal * center)  # E[eps | x_t, center] is linear in center


def polar(radius, turns):
    """Points [m, 2] at a radius and an angle in turns [m]."""
    angle = 2 * torch.pi * turns
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


u = (torch.arange(600, dtype=torch.float64) + 0.5) / 600  # evenly spread over 0..1
arm = polar(u.sqrt(), 1.5 * u.sqrt())  # arc length ~ angle^2: the root spaces evenly
grid = (torch.arange(40, dtype=torch.float64) + 0.5) / 10  # evenly spread over 0..4
board = torch.cartesian_prod(grid, grid)  # [1600, 2]
TOYS = {  # the centers of the Gaussians [m, 2]
    "8gaussians": polar(1, torch.arange(8, dtype=torch.float64) / 8),
    "moons": torch.cat([polar(1, u / 2), torch.tensor([1, 0.5]) - polar(1, u / 2)]),
    "circles": torch.cat([polar(1, u), polar(0.5, u)]),
    "swissroll": polar(1 + 2 * u, 0.75 + 1.5 * u),
    "spirals": torch.cat([arm, -arm]),
    "checkerboard": board[board.floor().sum(1) % 2 == 0],
}


def read_points(path):
    """Two columns of numbers in a text or .npy file: float64 [n, 2]. Raises OSError, ValueError."""
    if str(path).endswith(".npy"):
        points = np.lib.format.open_memmap(path, mode="r")  # no pickle, no zip
    else:
        points = []
        for number, line in enumerate(Path(path).read_text("utf-8-sig").splitlines(), 1):
            row = line.replace('"', "").partition("#")[0]
            cells = re.split("[,;\t]", row)
            cells = cells if len(cells) > 1 else row.split()  # [] if blank
            try:
                point = [float(cell) for cell in cells]
            except ValueError:
                point = []
            # words alone, above all points; nan and inf are numbers, and refused below
            header = not points and not point and all(any(map(str.isalpha, cell)) for cell in cells)
            if len(point) == 2 and all(abs(value) < np.inf for value in point):
                points.append(point)
            elif cells and not header:
                raise ValueError(f"line {number} is {line!r:.80}, not two finite numbers")
        points = np.array(points)
    if points.size == 0:
        raise ValueError(f"no points in {path}")
    if points.dtype.kind not in "iuf" or points.shape[1:] != (2,) or not np.isfinite(points).all():
        raise ValueError(f"{points.dtype} {points.shape}, not finite numbers [n, 2]")
    return torch.from_numpy(points.astype(np.float64))


def train(diffusion, net, data, steps, batch_size, lr):
    """Algorithm 1. Returns the losses [steps]."""
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    with tqdm(range(steps), "train") as bar:
        for step in bar:
            loss = diffusion.p_losses(net, data.sample(batch_size)).mean()
            if not loss.isfinite():
                raise SystemExit(f"loss {loss:g} at step {step}: start again with a lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {np.mean(losses[-100:]):.3f}", refresh=False)
    return losses


def evaluate(diffusion, net, data, samples):
    """loss          Eq. (14), a mean over t = 1, ..., T; predicting 0 costs 1
    bound_nats    Eq. (5), an upper bound on the mean of -log p(x_0) for standardised points
    and for toy sets, whose density is known:
    ideal_...     the same for the best possible prediction, on the same x_0 and noise
    excess_loss   loss / ideal_loss - 1: at least 0, up to the chance of 512 points
    entropy_nats  the mean of -log q(x_0): a floor of both bounds, up to the same chance
    off_support   share of samples less likely than 99.9 % of the data; true points get 0.001"""
    x0 = data.sample(512)  # of a file: points that were trained on
    terms, loss = diffusion.variational_bound(net, x0)
    metrics = {"loss": loss.mean(), "bound_nats": terms.sum()}
    if data.sigma:
        terms, loss = diffusion.variational_bound(partial(data.ideal_eps, diffusion), x0)
        metrics |= {"ideal_loss": loss.mean(), "ideal_bound_nats": terms.sum()}
        metrics["excess_loss"] = metrics["loss"] / metrics["ideal_loss"] - 1
        metrics["entropy_nats"] = -data.log_prob(x0).mean()
        rare = data.log_prob(data.sample(10_000)).quantile(0.001)
        log_p = torch.cat([data.log_prob(part) for part in samples.split(10_000)])
        metrics["off_support"] = 1 - (log_p >= rare).float().mean()  # NaN is off
    return {key: round(x.item(), 4) if x.isfinite() else None for key, x in metrics.items()}


def draw(file, diffusion, data, states):
    """q above, p below, whose states are x_T, ..., x_0. The axes, and so the points, end at 2.7."""
    x0 = data.sample(4000)
    figure = Figure(figsize=(13, 5), layout="constrained")
    for column, share in zip(figure.subplots(2, 6).T, (0, 0.04, 0.1, 0.2, 0.5, 1)):
        t = round(diffusion.T * share)
        xt = diffusion.q_sample(x0, torch.full((4000,), t, device=x0.device), torch.randn_like(x0))
        for ax, name, points in zip(column, "qp", (xt, states[diffusion.T - t])):
            ax.scatter(*points.T.cpu().numpy(), s=3, lw=0)
            ax.set(title=f"{name}, t = {t}", xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
            ax.set_axis_off()
    figure.savefig(file, dpi=120)


def main(argv=()):
    """Train, sample, evaluate and draw. Returns the metrics."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--data", default="8gaussians", help=f"{', '.join(TOYS)}, or a .csv or .npy file of points")
    add("--steps", type=int, default=4000, help="training steps")
    add("--batch-size", type=int, default=1024, help="points per training step")
    add("--lr", type=float, default=5e-3, help="learning rate at the start")
    add("--T", type=int, default=1000, help="steps of the diffusion, 21 or more")
    add("--samples", type=int, default=10_000, help="samples to draw")
    add("--seed", type=int, default=0, help="of the random numbers")
    add("--device", default=device, choices=sorted({"cpu", device}), help="where to compute")
    add("--out", type=Path, default="runs/ddpm_2d", help="folder for all files")
    args = parser.parse_args(argv)
    limits = {"steps": 1, "batch_size": 1, "lr": 0, "T": 21, "samples": 1, "seed": 0}
    for name, least in limits.items():
        if not least <= getattr(args, name) <= 1e9:
            parser.error(f"--{name.replace('_', '-')} {vars(args)[name]}: choose {least} to 1e9")
    sigma = 0.08 if args.data in TOYS else 0.0  # when the data have variance 1
    checked = f"--data {args.data} (toy sets: {', '.join(TOYS)})"  # what an error is about
    try:
        points = TOYS[args.data] if sigma else read_points(args.data)
        checked = f"--out {args.out}"
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(f"{checked}: {error}")

    torch.manual_seed(args.seed)
    mean = points.mean(0)
    std = points.std(0, correction=0).masked_fill(points.amin(0) == points.amax(0), 1)  # constant
    std = std / (1 - sigma**2) ** 0.5  # centers get variance 1 - sigma^2, data 1
    data = Mixture(((points - mean) / std).float().to(args.device), sigma)
    diffusion = Diffusion(linear_schedule(args.T)).to(args.device)
    net = NoisePredictor(args.T).to(args.device)
    losses = train(diffusion, net, data, args.steps, args.batch_size, args.lr)
    saved = {"net": net.state_dict(), "T": args.T, "mean": mean, "std": std, "losses": losses}
    saved |= {"data": args.data, "sigma": sigma}
    torch.save(saved, args.out / "model.pt")

    xT = torch.randn(args.samples, 2, device=args.device)
    states = torch.empty(args.T + 1, min(args.samples, 4000), 2)  # for the picture
    for k, xt in enumerate(tqdm(diffusion.p_sample_loop(net, xT), "sample", args.T + 1)):
        states[k] = xt[:4000]
    np.save(args.out / "samples.npy", xt.cpu().double() * std + mean)  # x_0 in the data's units
    metrics = evaluate(diffusion, net, data, xt)
    text = json.dumps(metrics | vars(args), indent=1, default=str)
    (args.out / "metrics.json").write_text(text)
    draw(args.out / "process.png", diffusion, data, states)
    print(text)
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
