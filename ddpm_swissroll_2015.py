"""The first diffusion model (Sohl-Dickstein et al. 2015, arXiv 1503.03585) on its swiss roll.

Forward. q turns a point x_0 of the data into noise in T = 40 steps. Each step shrinks the point a
little and adds a little Gaussian noise, until x_T looks like a draw from N(0, I):
    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                             Sec. 2.1

Reverse. p starts with x_T ~ N(0, I) and takes the steps back. If the beta_t are small, these are
nearly Gaussian too, so a network only has to give the mean and the covariance of each:
    p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t))                                  Eq. (5)

Bound. Training raises K, a lower bound on the mean of log p(x_0). If x_0 is known, Bayes' rule
gives the true step back. K compares p with it, and the KL divergence of two Gaussians is a formula:
    K = - sum_{t=2..T} E KL[ q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ]
        + H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T)                                    Eq. (14)

Learned are the network and beta_2, ..., beta_T. Beta_1 and p(x_0 | x_1), a forward step, are fixed
(App. B.1). That adds 0 to K, so K bounds the mean of log p(x_1) <= -h(q(x_1)), h the entropy.
The paper's number is K - L_null in bits, where L_null is the K of a p that knows only N(0, I).
"""

import argparse
import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

L_NULL = -math.log2(2 * math.pi * math.e)  # minus the entropy of N(0, I) in the plane
PAPER = 6.45  # K - L_null of the swiss roll in Table 1
Schedule = namedtuple("Schedule", ["beta", "alpha_bar", "var"])  # at t = 0..T: [T + 1, 1, 1]


def roll_curve(u, noise=0.0):
    """scikit-learn's roll at u in [0, 1]: [..., 2]. Shrunk, so that with the noise E[x_0^2] = 1."""
    angle = 1.5 * math.pi * (1 + 2 * u)
    spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], -1)
    mean = torch.tensor([2, 2 / (3 * math.pi)])  # over u, exactly
    square = torch.tensor([-0.25, 0.25]) + 4.875 * math.pi**2
    return (spiral - mean) / (square - mean**2).sqrt() * math.sqrt(1 - noise**2)


def make_swiss_roll(n, noise=0.0):
    """n random points [n, 2], one from each n-th of 0 <= u <= 1."""
    u = (torch.arange(n) + torch.rand(n)) / n
    return roll_curve(u, noise) + noise * torch.randn(n, 2)


def ceiling_bits(noise, beta1):
    """-h(q(x_1)) of a thin roll: minus the entropies of x_1 along the curve and across it."""
    curve = math.sqrt(1 - beta1) * roll_curve(torch.linspace(0, 1, 2001), noise)
    speed = curve.diff(dim=0).norm(dim=1) * 2000  # length of curve per u
    across = (1 - beta1) * noise**2 + beta1  # variance
    return -speed.log2().mean().item() - math.log2(2 * math.pi * math.e * across) / 2


def kl_normal(mean1, var1, mean2, var2):
    """KL( N(mean1, var1) || N(mean2, var2) ) of each coordinate, in bits."""
    nats = (torch.log(var2 / var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1) / 2
    return nats / math.log(2)


def shear(x, slope):
    """(a, b) to (a, b + slope a): correlates independent coordinates; -slope takes it back."""
    return torch.stack([x[..., 0], x[..., 1] + slope * x[..., 0]], -1)


class DiffusionModel(nn.Module):
    """q and p. Points are [B, 2] at one step t, or [S, B, 2] at the S steps of a tensor t."""

    def __init__(self, net, full=False, T=40, beta1=1e-5, learn_schedule=True):
        super().__init__()
        self.net = net
        self.full = full  # is f_Sigma a full matrix? In the paper it is diagonal
        self.T = T
        self.beta1 = beta1
        log_snr = torch.linspace(math.log(1 / beta1 - 1), -1, T, dtype=torch.float64)
        alpha_bar = torch.sigmoid(log_snr)  # at first; alpha_bar_T is 0.27, then learned
        beta = 1 - alpha_bar[1:] / alpha_bar[:-1]  # beta_2, ..., beta_T
        self.logit_beta = nn.Parameter(beta.logit().float(), learn_schedule)
        units = net(torch.zeros(1, 2)).shape[-1]
        self.readout = nn.Parameter(torch.zeros(T - 1, units, 5 if full else 4))  # one for each t

    def schedule(self):
        """beta, alpha_bar and var = 1 - alpha_bar at 0..T; float64 first, or var_1 is inexact."""
        fixed = torch.tensor([0, self.beta1], dtype=torch.float64)
        beta = torch.cat([fixed, self.logit_beta.cpu().double().sigmoid()])  # MPS has no float64
        alpha_bar = torch.cumprod(1 - beta, 0)
        table = torch.stack([beta, alpha_bar, 1 - alpha_bar]).to(self.logit_beta.dtype)
        return Schedule(*table[:, :, None, None].to(self.logit_beta.device))

    def q_sample(self, x0, t, eps, s):
        """x_t of q(x_t | x_0), made with noise eps."""
        return s.alpha_bar[t].sqrt() * x0 + s.var[t].sqrt() * eps

    def q_posterior(self, x0, xt, t, s):
        """Mean and variance of q(x_{t-1} | x_t, x_0), for t >= 2, by Bayes' rule."""
        from_x0 = s.alpha_bar[t - 1].sqrt() * s.beta[t] * x0
        from_xt = (1 - s.beta[t]).sqrt() * s.var[t - 1] * xt
        return (from_x0 + from_xt) / s.var[t], s.beta[t] * s.var[t - 1] / s.var[t]

    def reverse(self, xt, t, s):
        """Mean, variances and slope of p(x_{t-1} | x_t), for t >= 2. With a readout of zeros, as
        before training, p = N(sqrt(1 - beta_t) x_t, beta_t I), which keeps N(0, I): K = L_null."""
        out = self.net(xt) @ self.readout[t - 2]  # [S, B, 4 or 5]: x_0, var, slope
        scale = s.var[t].sqrt() if self.full else 1  # out is then -v: trains better
        x0 = s.alpha_bar[t].sqrt() * xt + scale * out[..., :2]  # best linear guess + net
        mean, _ = self.q_posterior(x0, xt, t, s)
        var = torch.sigmoid(out[..., 2:4] + s.beta[t].logit())  # [S, B, 2], Eq. (64)
        slope = out[..., 4] if self.full else 0  # [S, B]; more than the paper
        return mean, var, slope

    def bound(self, x0, eps=None):
        """K of Eq. (14) [B] and its KL terms [T - 1, B] in bits, for points x0 [B, 2]. The noise
        eps does not depend on beta ("frozen noise", Sec. 2.4.1), so K has a gradient in beta."""
        s = self.schedule()
        t = torch.arange(2, self.T + 1, device=x0.device)
        eps = torch.randn(self.T - 1, *x0.shape, device=x0.device) if eps is None else eps
        xt = self.q_sample(x0, t, eps, s)  # [T - 1, B, 2]
        mean_q, var_q = self.q_posterior(x0, xt, t, s)
        mean_p, var_p, slope = self.reverse(xt, t, s)
        if self.full:  # unshear (same KL and dets): p is diagonal, b of q has var_q (1 + slope^2)
            kl = kl_normal(shear(mean_q - mean_p, -slope), var_q, 0, var_p).sum(-1)
            kl = kl + slope**2 * var_q[..., 0] / var_p[..., 1] / (2 * math.log(2))
        else:
            kl = kl_normal(mean_q, var_q, mean_p, var_p).sum(-1)
        entropies = torch.log2(s.var[-1] / s.var[1]).squeeze()  # H_q(X_T | X_0) - H_q(X_1 | X_0)
        return -kl.sum(0) + entropies + L_NULL, kl  # L_null is -H_p(X_T)

    @torch.no_grad()
    def p_sample_loop(self, n):
        """Yields x_T, ..., x_0, each [n, 2]; the last step is not learned, it is a forward step."""
        s = self.schedule()
        yield (xt := torch.randn(n, 2, device=s.beta.device))
        for t in range(self.T, 1, -1):
            mean, var, slope = self.reverse(xt, t, s)
            z = torch.randn_like(xt)
            yield (xt := mean + shear(var.sqrt() * z, slope))
        yield (1 - s.beta[1]).sqrt() * xt + s.beta[1].sqrt() * torch.randn_like(xt)


class RBFNetwork(nn.Module):
    """The paper's network: 16 radial basis functions, normalised so that their sum is 1."""

    def __init__(self):
        super().__init__()
        curve = roll_curve((torch.arange(8) + 0.5) / 8)
        self.center = nn.Parameter(torch.cat([0.85 * curve, 1.15 * curve]))  # on both sides of it
        self.log_width = nn.Parameter(torch.full((16,), math.log(0.5)))

    def forward(self, x):
        square = (x[..., :1] - self.center[:, 0]) ** 2 + (x[..., 1:] - self.center[:, 1]) ** 2
        return torch.softmax(-square / (2 * self.log_width.exp() ** 2), -1)  # [S, B, 16]


class MLP(nn.Module):
    """A stronger network: random Fourier features and three layers."""

    def __init__(self):
        super().__init__()
        self.frequency = nn.Buffer(torch.randn(2, 32))
        self.layers = nn.ModuleList(nn.Linear(n, 128) for n in (66, 128, 128))

    def forward(self, x):
        angle = x @ self.frequency
        h = torch.cat([x, angle.sin(), angle.cos()], -1)  # [S, B, 66]
        for layer in self.layers:
            h = nn.functional.silu(layer(h))
        return h  # [S, B, 128]


def train(model, args):
    """Raises K; OneCycleLR moves lr and Adam's 0.95 (to 0.85 and back). Returns all K - L_null."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.95, 0.99), maximize=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.15)
    history = []
    with tqdm(range(1, args.steps + 1), "train") as bar:
        for step in bar:
            x0 = make_swiss_roll(args.batch_size, args.noise).to(args.device)
            K = model.bound(x0)[0].mean()
            if not K.isfinite():
                raise SystemExit(f"K is {K:g} at step {step}: choose --lr below {args.lr}")
            optimizer.zero_grad()
            K.backward()
            optimizer.step()
            scheduler.step()
            history.append(K.item() - L_NULL)
    return history


def evaluate(model, args, samples):
    """The metrics, from 64 x 1024 fresh points and from the samples [n, 2]."""
    data = [make_swiss_roll(1024, args.noise).to(args.device) for _ in range(64)]
    bounds = torch.cat([model.bound(x0)[0] for x0 in data])
    K = bounds.mean().item()
    error = bounds.std().item() / len(bounds) ** 0.5
    ceiling = ceiling_bits(args.noise, args.beta1)
    curve = roll_curve(torch.linspace(0, 1, 5000), args.noise)
    distance = torch.cat([torch.cdist(part, curve).amin(1) for part in samples.split(1000)])
    off = (~(distance <= 0.1 + 3 * args.noise)).double().mean().item()  # so NaN is off, too
    metrics = dict(K_bits=K, K_error_bits=error, K_minus_null_bits=K - L_NULL, off_curve=off)
    return metrics | dict(ceiling_minus_null_bits=ceiling - L_NULL, gap_bits=ceiling - K)


def draw(args, model, states, history):
    """Figure 1 of the paper: q, p and the drift at t = 0, T/2 and T. Then what was learned."""
    s = model.schedule()
    x0 = make_swiss_roll(5000, args.noise)
    grid = torch.cartesian_prod(*[torch.linspace(-2.7, 2.7, 25)] * 2)
    figure = Figure(figsize=(7.5, 7.8), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True, sharey=True)
    axes[0, 0].set(xlim=(-3, 3), ylim=(-3, 3), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    for (q, p, drift), t in zip(axes.T, (0, args.T // 2, args.T)):
        xt = model.q_sample(x0, t, torch.randn_like(x0), s)
        q.scatter(*xt.numpy().T, s=2, lw=0, color="tab:blue")
        q.set_title(f"$q(x_t)$, $t$ = {t}")
        p.scatter(*states[args.T - t][:5000].numpy().T, s=2, lw=0, color="tab:orange")
        p.set_title(f"$p(x_t)$, $t$ = {t}")
        near = grid[torch.cdist(grid, xt).amin(1) < 0.3]  # elsewhere the network saw no x_t
        mean, _, _ = model.reverse(near, max(t, 2), s)  # none is learned below 2
        drift.scatter(*xt.numpy().T, s=2, lw=0, color="lightblue")
        if mean.isfinite().all():
            drift.quiver(*near.numpy().T, *(mean - near).numpy().T, angles="xy", width=0.004)
        drift.set_title(rf"$f_\mu(x_t, t) - x_t$, $t$ = {max(t, 2)}")
    figure.savefig(f"{args.out}/process.png", dpi=150)

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    bound, beta, terms = figure.subplots(1, 3)
    bound.plot(history, lw=0.3)
    bound.axhline(ceiling_bits(args.noise, args.beta1) - L_NULL, color="black", label="ceiling")
    bound.axhline(PAPER, color="black", ls=":", label="Table 1 of the paper")
    bound.set(title="$K - L_{null}$ [bits]", xlabel="step of training", ylim=(0, None))
    bound.legend()
    beta.semilogy(range(1, args.T + 1), s.beta[1:].flatten().numpy())
    beta.set(title=r"learned $\beta_t$", xlabel="$t$")
    terms.bar(range(2, args.T + 1), model.bound(x0[::5])[1].mean(1).numpy())
    terms.set(title="KL terms of Eq. (14) [bits]", xlabel="$t$")
    figure.savefig(f"{args.out}/training.png", dpi=150)


def main(argv=None):
    """Train, sample, evaluate and draw. Returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    add("--net", default="rbf", choices=["rbf", "mlp"], help="the paper's, or an MLP")
    add("--noise", type=float, default=0.0, help="noise of the roll itself, 0 to 0.1")
    add("--beta1", type=float, default=1e-5, help="variance of the first step, 1e-7 to 0.01")
    add("--fixed-schedule", action="store_true", help="do not learn beta_2, ..., beta_T")
    add("--steps", type=int, help="of training (rbf: 10000, mlp: 2500)")
    add("--batch-size", type=int, default=256, help="points of a training step")
    add("--lr", type=float, help="highest learning rate (rbf: 0.04, mlp: 0.008)")
    add("--T", type=int, default=40, help="steps of the diffusion, 2 to 1000")
    add("--samples", type=int, default=10_000, help="samples to draw")
    add("--seed", type=int, default=0, help="of all randomness")
    add("--device", default=str(device), help="cpu, cuda, mps, ...")
    add("--out", default="runs/ddpm_swissroll_2015", help="folder for all files")
    args = parser.parse_args(argv)
    steps, lr = {"rbf": (10_000, 0.04), "mlp": (2500, 0.008)}[args.net]
    args.steps = steps if args.steps is None else args.steps
    args.lr = lr if args.lr is None else args.lr
    limits = dict(noise=(0, 0.1), beta1=(1e-7, 0.01), lr=(1e-9, 10), T=(2, 1000), seed=(0, 1e9))
    limits |= dict.fromkeys(["steps", "batch_size", "samples"], (1, 1e6))
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} {getattr(args, name)}: choose {low:g} to {high:g}")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        torch.empty(1, device=args.device)
    except (OSError, RuntimeError, AssertionError) as error:
        flag = "out" if isinstance(error, OSError) else "device"
        parser.error(f"--{flag} {vars(args)[flag]}: {str(error).splitlines()[0]}")

    torch.manual_seed(args.seed)
    net = RBFNetwork() if args.net == "rbf" else MLP()
    model = DiffusionModel(net, args.net == "mlp", args.T, args.beta1, not args.fixed_schedule)
    history = train(model.to(args.device), args)
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    torch.save({"model": weights, "flags": vars(args)}, f"{args.out}/model.pt")
    model.requires_grad_(False)

    states = [xt.cpu() for xt in tqdm(model.p_sample_loop(args.samples), "sample", args.T + 1)]
    np.save(f"{args.out}/samples.npy", states[-1].numpy())
    metrics = evaluate(model, args, states[-1])
    valid = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    Path(args.out, "metrics.json").write_text(json.dumps(valid | vars(args), indent=1))

    draw(args, model.cpu(), states, history)
    print("\n".join(f"{key:24}{value:8.3f}" for key, value in metrics.items()))
    print(f"The paper has K - L_null = {PAPER} bits. All files are in {args.out}")
    return metrics


if __name__ == "__main__":
    main()
