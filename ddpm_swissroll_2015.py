# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""The first diffusion model, Sohl-Dickstein et al. 2015, arXiv 1503.03585, on its swiss roll.

  forward  q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I), beta_2..T learned  Sec. 2.4.1
  reverse  p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t)) for t = 40..1            Eq. (4), (5)
  train    maximise K, a bound on the log-likelihood whose KL terms have a closed form  Eq. (14)

From the paper: T, RBF layer shared by all steps, a readout for each (App. D.1.1), sigmoid on a
diagonal f_Sigma, x_0 given x_1 as in q (App. B.1), beta_1 fixed, the others learned. Chosen, where
it is silent: roll, beta_1, f_mu through an estimate of x_0, readout 0 = forward kernel (as in Eq.
(64), (65) for images), Adam for SFO, new noise each step. --net mlp has a full f_Sigma: with the
schedule of the start 40 diagonal steps cannot reach 6.45 bits on this roll, whatever the network.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import nn
from tqdm import tqdm

BITS = 1 / math.log(2)  # nats to bits
L_NULL = -(math.log(2 * math.pi) + 1) * BITS  # the bound of N(0, I): minus its entropy, two axes


def roll_curve(u, noise=0.0):
    """Points [..., 2] of scikit-learn's swiss roll in the plane, u in [0, 1]; float64."""
    angle = 1.5 * math.pi * (1 + 2 * u.double())
    mean = torch.tensor([2, 2 / (3 * math.pi)]).double()  # of angle * (cos, sin), exactly
    var = 4.875 * math.pi**2 + torch.tensor([-0.25, 0.25]) - mean**2
    raw = torch.stack([angle * angle.cos(), angle * angle.sin()], -1)
    return (raw - mean) / var.sqrt() * math.sqrt(1 - noise**2)


def make_swiss_roll(n, noise=0.0, generator=None):
    """n points float32 [n, 2] in order, one from each n-th of the angle; E[x_0^2] = 1 per axis."""
    u = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return (roll_curve(u, noise) + noise * z).float()


def ceiling_bits(noise, beta1):
    """-h(q(x_1)), which K cannot exceed: minus the entropies along the curve and across it."""
    curve = math.sqrt(1 - beta1) * roll_curve(torch.linspace(0, 1, 10_001).double(), noise)
    along = (curve.diff(dim=0).norm(dim=1) * 10_000).log().mean().item()  # speed dc/du
    var = (1 - beta1) * noise**2 + beta1
    return -(along + math.log(2 * math.pi * math.e * var) / 2) * BITS


def kl_normal(mu1, var1, mu2, var2):
    """KL( N(mu1, var1) || N(mu2, var2) ) of every entry, in nats."""
    return (torch.log(var2 / var1) + (var1 + (mu1 - mu2) ** 2) / var2 - 1) / 2


class DiffusionModel(nn.Module):
    """Learned schedule s and reverse process. Points are [S, B, 2]: B at each of the S steps t."""

    def __init__(self, net, units, outputs, T=40, beta1=1e-5, learn_schedule=True):
        super().__init__()
        self.net, self.T, self.beta1 = net, T, beta1
        log_snr = torch.linspace(math.log(1 / beta1 - 1), -1, T, dtype=torch.float64)
        beta = -torch.expm1(F.logsigmoid(log_snr).diff())  # equal steps in log(signal / noise)
        self.logit_beta = nn.Parameter(beta.logit().float(), learn_schedule)
        self.readout = nn.Parameter(torch.zeros(T - 1, units, outputs))

    def schedule(self):
        """beta_t, alpha_bar_t and 1 - alpha_bar_t as [3, T + 1]; float64, for they may be tiny."""
        logit_1 = -math.log(1 / self.beta1 - 1)
        logit = F.pad(self.logit_beta.cpu().double(), (1, 0), value=logit_1)  # t = 1..T
        log_alpha_bar = F.pad(F.logsigmoid(-logit).cumsum(0), (1, 0))  # t = 0..T
        beta = F.pad(logit.sigmoid(), (1, 0))
        return torch.stack([beta, log_alpha_bar.exp(), -log_alpha_bar.expm1()]).to(self.logit_beta)

    def q_sample(self, x0, t, eps, s):
        """x_t given x_0 [B, 2] and noise eps [S, B, 2]."""
        _, alpha_bar, var = s[:, t, None, None]  # [S, 1, 1]
        return alpha_bar.sqrt() * x0 + var.sqrt() * eps

    def q_posterior(self, x0, xt, t, s):
        """Mean [S, B, 2] and variance [S, 1, 1] of q(x_{t-1} | x_t, x_0), by Bayes' rule."""
        beta, _, var = s[:, t, None, None]
        _, alpha_bar, var_before = s[:, t - 1, None, None]
        mean = alpha_bar.sqrt() * beta * x0 + (1 - beta).sqrt() * var_before * xt
        return mean / var, beta * var_before / var

    def reverse(self, xt, t, s):
        """f_mu and diagonal of f_Sigma [S, B, 2], slope c [S, B] of p(x_{t-1} | x_t), for t >= 2.
        Given x_1, the mean of x_2 is mu_2 + c (x_1 - mu_1); in the paper c = 0. A readout of zeros
        makes x0 = sqrt(alpha_bar_t) x_t, so mu = sqrt(1 - beta_t) x_t, var = beta_t: as in q."""
        beta, alpha_bar, var = s[:, t, None, None]
        out = self.net(xt) @ self.readout[t - 2]  # [S, B, 4], or 5 with c
        shift, c = out[..., :2] * (var.sqrt() if out.shape[-1] == 5 else 1), out[..., 4:].sum(-1)
        mu, _ = self.q_posterior(alpha_bar.sqrt() * xt + shift, xt, t, s)
        return mu, torch.sigmoid(out[..., 2:4] + beta.logit()), c  # Eq. (64)

    def bound(self, x0, eps):
        """K of Eq. (14) [B] and its KL terms [T - 1, B], in bits, from noise eps [T - 1, B, 2]."""
        t, s = torch.arange(2, self.T + 1, device=x0.device), self.schedule()
        xt = self.q_sample(x0, t, eps, s)
        (mean, var_q), (mu, var, c) = self.q_posterior(x0, xt, t, s), self.reverse(xt, t, s)
        (d1, d2), (var1, var2), var_q = (mean - mu).unbind(-1), var.unbind(-1), var_q.squeeze(-1)
        # p is diagonal in (x_1, x_2 - c x_1), where q has the variances var_q and (1 + c^2) var_q
        kl = kl_normal(d1, var_q, 0, var1) + kl_normal(d2 - c * d1, (1 + c**2) * var_q, 0, var2)
        kl = BITS * (kl + torch.log1p(c**2) / 2)
        return BITS * (s[2, -1] / s[2, 1]).log() + L_NULL - kl.sum(0), kl  # H_T - H_1 - H_p - KLs

    @torch.no_grad()
    def sample(self, n, generator=None):
        """Yields x_T, ..., x_0, T + 1 tensors [n, 2]; the last step is the forward kernel."""
        s = self.schedule()
        x, *z = torch.randn(self.T + 1, 1, n, 2, generator=generator).to(s)
        yield x[0]
        for step in range(self.T, 1, -1):
            mu, var, c = self.reverse(x, torch.tensor([step], device=s.device), s)
            z1, z2 = (var.sqrt() * z[step - 1]).unbind(-1)
            x = mu + torch.stack([z1, z2 + c * z1], -1)
            yield x[0]
        yield (math.sqrt(1 - self.beta1) * x + math.sqrt(self.beta1) * z[0])[0]


class RBFNetwork(nn.Module):
    """The paper's: 16 normalised Gaussian bumps, in pairs on both sides of the curve."""

    def __init__(self):
        super().__init__()
        curve = roll_curve((torch.arange(8) + 0.5) / 8).float()
        self.center = nn.Parameter(torch.cat([0.85 * curve, 1.15 * curve]))
        self.log_width = nn.Parameter(torch.full((16,), math.log(0.5)))

    def forward(self, x):
        d2 = (x**2).sum(-1, keepdim=True) - 2 * x @ self.center.T + (self.center**2).sum(1)
        return torch.softmax(d2 * (-torch.exp(-2 * self.log_width) / 2), -1)  # [S, B, 16]


class MLP(nn.Sequential):
    """The strong one: random Fourier features and three layers."""

    def __init__(self):
        layers = (nn.Linear(66, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        super().__init__(*layers, nn.Linear(128, 128), nn.SiLU())
        self.register_buffer("waves", torch.randn(2, 32))

    def forward(self, x):
        return super().forward(torch.cat([x, (x @ self.waves).sin(), (x @ self.waves).cos()], -1))


def save(path, write):
    """Write to a temporary file beside path, then rename: a kill leaves the old file or the new."""
    temporary = path.with_name("." + path.name)
    write(temporary)
    temporary.replace(path)


def train(args, model, config, fail):
    """Gradient ascent on K with Adam, until done or Ctrl-C. Returns a log."""
    rng = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    state = {"config": config, "model": model.state_dict()}  # by reference
    log, bar = [], tqdm(range(1, args.steps + 1), desc="train")
    try:
        for step in bar:
            x0 = make_swiss_roll(args.batch_size, args.noise, rng).to(args.device)
            eps = torch.randn(args.T - 1, args.batch_size, 2, generator=rng).to(args.device)
            loss = -model.bound(x0, eps)[0].mean()
            log.append([step, loss.item(), scheduler.get_last_lr()[0], bar.format_dict["elapsed"]])
            if not loss.isfinite():
                fail(f"--lr {args.lr}: loss is {loss:g} at step {step}; use a lower one")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if step % 100 == 0:
                bar.set_postfix_str(f"K - L_null = {-loss.item() - L_NULL:.2f} bits")
                save(args.out / "model.pt", lambda path: torch.save(state, path))
    except KeyboardInterrupt:
        print(f"\nstopped after step {len(log)}; going on with what was learned")
    save(args.out / "model.pt", lambda path: torch.save(state, path))
    head = "step,loss,lr,seconds"
    save(args.out / "log.csv", lambda f: np.savetxt(f, log, "%.6g", ",", header=head, comments=""))
    return log


def _scatter(axis, points, title, colour="#D55E00"):
    axis.set(title=title, xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), xticks=[], yticks=[], aspect="equal")
    return axis.scatter(*points.T, s=3, linewidths=0, color=colour)


def draw(args, model, log, kl, ceiling, states):
    """Figure 1 of the paper, data beside samples, what was learned, and the sampling film."""
    x0, s = make_swiss_roll(len(states[0]), args.noise), model.schedule()
    grid = torch.cartesian_prod(*[torch.linspace(-2.5, 2.5, 19)] * 2)
    figure, axes = plt.subplots(3, 3, figsize=(8, 8.3), layout="constrained")
    for (q, p, drift), t in zip(axes.T, (0, args.T // 2, args.T), strict=True):
        xt = model.q_sample(x0, [t], torch.randn(1, *x0.shape), s.cpu())[0]
        _scatter(q, xt, f"q(x), t = {t}", "#0072B2")
        _scatter(p, states[args.T - t], f"p(x), t = {t}")
        mu = model.reverse(grid[None].to(s), torch.tensor([max(t, 2)]), s)[0][0].cpu()
        _scatter(drift, grid[:0], f"f_mu(x, t) - x, t = {max(t, 2)}")  # none is learned below 2
        drift.quiver(*grid.T, *(mu - grid).T, angles="xy", color="0.2")
    save(args.out / "diffusion_process.png", figure.savefig)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.7), layout="constrained")
    _scatter(axes[0], x0, "data", "#0072B2")
    _scatter(axes[1], states[-1], "samples")
    save(args.out / "results.png", figure.savefig)
    figure = plt.figure(figsize=(11, 3.2), layout="constrained")
    bound = figure.add_subplot(131, title="K - L_null [bits]", ylim=(0, 7))
    bound.plot(*np.array(log).reshape(-1, 4)[:, :2].T * [[1], [-1]] - [[0], [L_NULL]], lw=0.3)
    bound.hlines([ceiling - L_NULL, 6.45], 0, args.steps, "k", ["-", ":"])
    bound.set_xlabel("step (solid line: ceiling, dotted: Table 1 of the paper)")
    figure.add_subplot(132, title="learned beta_t", xlabel="t", yscale="log").plot(s[0].cpu())
    terms = figure.add_subplot(133, title="KL terms of Eq. (14) [bits]", xlabel="t")
    terms.bar(range(2, args.T + 1), kl.tolist())
    save(args.out / "training.png", figure.savefig)
    figure, axis = plt.subplots(figsize=(4, 4))
    move = _scatter(axis, states[0], "x_T, ..., x_0").set_offsets
    film = FuncAnimation(figure, move, states + [states[-1]] * 15, init_func=list)
    save(args.out / "sampling.gif", lambda path: film.save(path, PillowWriter(fps=12)))
    plt.close("all")


def main(argv=None):
    """Train or load, evaluate, sample, draw. Returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message.splitlines()[0]}\n")
    add = parser.add_argument
    add("--net", choices=["rbf", "mlp"], default="rbf", help="the paper's, or strong")
    add("--noise", type=float, default=0.0, help="noise of the roll itself, 0 to 0.1")
    add("--beta1", type=float, default=1e-5, help="fixed variance of the first step, 1e-7 to 0.01")
    add("--fixed-schedule", action="store_true", help="do not learn beta_2..T")
    add("--steps", type=int, help="of training (rbf 10000, mlp 2500)")
    add("--batch-size", type=int, default=256, help="points, each at all T - 1 steps")
    add("--lr", type=float, help="peak learning rate (rbf 0.04, mlp 0.008)")
    add("--T", type=int, default=40, help="steps of the diffusion, 2 to 1000")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or mps")
    add("--out", type=Path, default="runs/ddpm_swissroll_2015", help="folder for all files")
    add("--load", type=Path, help="a model.pt made with these flags: evaluate it, do not train")
    rbf = parser.parse_args(argv).net == "rbf"
    parser.set_defaults(steps=10_000 if rbf else 2500, lr=0.04 if rbf else 0.008)
    args = parser.parse_args(argv)
    config = {flag: vars(args)[flag] for flag in ("net", "noise", "beta1", "T", "fixed_schedule")}
    ranges = {"noise": (0, 0.1), "beta1": (1e-7, 0.01), "T": (2, 1000), "seed": (0, 2**32)}
    ranges |= {"steps": (1, 10**8), "batch_size": (1, 10**6), "lr": (1e-6, 10)}
    try:
        for flag, (low, high) in ranges.items():
            if not low <= vars(args)[flag] <= high:
                raise ValueError(f"choose {low} to {high}")
        flag, mps = "device", torch.backends.mps.is_available()
        auto = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        args.device = auto if args.device == "auto" else args.device
        torch.manual_seed(args.seed)
        net = (RBFNetwork(), 16, 4) if rbf else (MLP(), 128, 5)
        model = DiffusionModel(*net, args.T, args.beta1, not args.fixed_schedule).to(args.device)
        flag = "load"
        saved = torch.load(args.load, args.device, weights_only=True) if args.load else None
        if saved and saved["config"] != config:
            raise ValueError(f"it was made with {saved['config']}; give the same flags")
        model.load_state_dict(saved["model"] if saved else model.state_dict())
        flag = "out"
        args.out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of the flag being checked; torch.load alone raises a dozen kinds
        parser.error(f"--{flag.replace('_', '-')} {vars(args)[flag]}: {str(error) or repr(error)}")
    log = [] if args.load else train(args, model, config, parser.error)
    g, ceiling = torch.Generator().manual_seed(args.seed + 1), ceiling_bits(args.noise, args.beta1)
    with torch.no_grad():
        data = [make_swiss_roll(1024, args.noise, g).to(args.device) for _ in range(64)]  # fresh
        eps = (torch.randn(args.T - 1, 1024, 2, generator=g).to(args.device) for _ in data)
        K, kl = zip(*map(model.bound, data, eps), strict=True)
        K, kl = torch.cat(K), sum(kl).mean(1).cpu() / len(kl)
        bar = tqdm(model.sample(5000, g), "sample", args.T + 1)
        states, seconds = [x.cpu() for x in bar], bar.format_dict["elapsed"]
        draw(args, model, log, kl, ceiling, states)
    curve = roll_curve((torch.arange(5000) + 0.5) / 5000, args.noise).float()
    far = (torch.cdist(states[-1], curve).amin(1) > 0.1).float().mean().item()
    K, error, train_seconds = K.mean().item(), K.std().item() / 256, log[-1][3] if log else 0.0
    metrics = {"K_bits": K, "K_error_bits": error, "K_minus_null_bits": K - L_NULL, "loss": -K}
    metrics |= {"ceiling_minus_null_bits": ceiling - L_NULL, "gap_bits": ceiling - K}
    metrics |= {"off_curve": far, "train_seconds": train_seconds, "sample_seconds": seconds}
    print("\n".join(f"{key:26} {value:8.3f}" for key, value in metrics.items()))
    print(f"paper, Table 1: K = 2.35, K - L_null = 6.45 bits. Files are in {args.out}")
    metrics |= {"script": "ddpm_swissroll_2015", "torch": torch.__version__, **vars(args)}
    metrics |= {"steps": len(log), "parameters": sum(p.numel() for p in model.parameters())}
    text = json.dumps(metrics, indent=2, default=str)
    save(args.out / "metrics.json", lambda path: path.write_text(text))
    save(args.out / "samples.npy", lambda path: np.save(path, states[-1].numpy()))
    return metrics


if __name__ == "__main__":
    main()
