"""The first diffusion model, Sohl-Dickstein et al. 2015 (arXiv 1503.03585), on a swiss roll.

Forward. In T = 40 steps q turns a point x_0 of the data into noise. Each step shrinks the point and
adds Gaussian noise, so x_t given x_0 is Gaussian:
    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                        Table App.1
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
    alpha_bar_t = (1 - beta_1) ... (1 - beta_t), the share of the variance of x_t due to the data

Reverse. p starts with x_T ~ N(0, I) and takes the steps back. For small beta_t a step back is
nearly Gaussian as well, so a network only has to give its mean and its covariance:
    p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t))                             Table App.1

Bound. Training maximises K, a lower bound on the mean of log p(x_0):
    K = - sum_{t=2..T} E KL[ q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ]
        + H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T)                                    Eq. (14)
If x_0 is known, the step back is Gaussian by Bayes' rule: q(x_{t-1} | x_t, x_0). So each KL and
each entropy H has a formula. Only the mean E over x_0 and x_t is sampled, with noise for each t.

The network and beta_2, ..., beta_T are learned. If the data are a curve, K has no limit as beta_1
-> 0, so beta_1 is fixed (Sec. 2.4.1). The last step back is fixed to a forward step (App. B.2). As
E[x_0^2] = 1 on each axis, -H_q(X_1 | X_0) is then its E log p(x_0 | x_1), and -H_p(X_T) is
E log p(x_T).

Result. K - L_null in bits per point. L_null is the K of an untrained p: all its steps are forward
steps, which are reversible under N(0, I), so K is E log N(x_0; 0, I). On average q(x_1 | x_0) and
p(x_0 | x_1) cancel, so K bounds E log p(x_1), which is at most -h(q(x_1)), as KL >= 0; h is the
entropy. This ceiling depends on roll and beta_1: K - L_null is at most 6.70 if beta_1 is 1e-5, and
5.03 if it is 1e-4. Compare K - L_null with this, not with the 6.45 of Table 1, for another roll.
Ours: roll, beta_1, schedule before training, guess of x_0 in f_mu, optimizer, all of --net mlp.
"""

import json
import math
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

L_NULL = -math.log2(2 * math.pi * math.e)  # minus the entropy of N(0, I) in the plane, in bits
DEFAULTS = {"rbf": {"steps": 10_000, "lr": 0.04}, "mlp": {"steps": 2500, "lr": 0.008}}


def roll_curve(u, noise=0.0):
    """scikit-learn's roll at u in [0, 1]: [..., 2]; mean 0 and variance 1, once noise is added."""
    angle = 1.5 * math.pi * (1 + 2 * u)
    spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], -1)
    mean = torch.tensor([2, 2 / (3 * math.pi)])  # E[x] over u, by integration
    square = torch.tensor([-0.25, 0.25]) + 4.875 * math.pi**2  # E[x^2]
    return (spiral - mean) / (square - mean**2).sqrt() * math.sqrt(1 - noise**2)


def make_swiss_roll(n, noise=0.0):
    """n random points [n, 2], one in each 1/n of 0 <= u <= 1, so that batches differ less."""
    return roll_curve((torch.arange(n) + torch.rand(n)) / n, noise) + noise * torch.randn(n, 2)


def ceiling_bits(noise, beta1):
    """-h(q(x_1)) of a thin roll: minus the entropies of x_1 along the curve and across it."""
    curve = math.sqrt(1 - beta1) * roll_curve(torch.linspace(0, 1, 2001), noise)
    speed = curve.diff(dim=0).norm(dim=1) * 2000  # length of curve per u; the density is 1 / speed
    across = (1 - beta1) * noise**2 + beta1  # variance of a Gaussian
    return -speed.log2().mean().item() - math.log2(2 * math.pi * math.e * across) / 2


def kl_bits(mean_q, var_q, mean_p, var_p, slope):
    """KL(q || p) in bits for points (a, b). q: a and b are independent. p: b given a has the mean
    mean_b + slope (a - mean_a), the variance var_p[1]. Chain rule: KL of a plus KL of b given a."""
    da, db = (mean_q - mean_p).unbind(-1)
    square = torch.stack([da**2, (db - slope * da) ** 2 + slope**2 * var_q[..., 0]], -1)
    nats = (torch.log(var_p / var_q) + (var_q + square) / var_p - 1) / 2  # [..., 2]
    return nats.sum(-1) / math.log(2)


class Schedule:
    """q at t = 0..T. Points are [B, 2] if t is a number, and [S, B, 2] if t holds S steps."""

    def __init__(self, beta1, logit_beta):
        beta = torch.cat([torch.tensor([0, beta1]).to(logit_beta), logit_beta.sigmoid()])
        self.beta = beta[:, None, None]  # [T + 1, 1, 1], so that index t is step t
        log_alpha_bar = torch.log1p(-self.beta).cumsum(0)
        self.alpha_bar = log_alpha_bar.exp()
        self.var = -log_alpha_bar.expm1()  # 1 - alpha_bar, precise even if it is 1e-5

    def q_sample(self, x0, t, eps):
        """x_t of q(x_t | x_0), made with noise eps."""
        return self.alpha_bar[t].sqrt() * x0 + self.var[t].sqrt() * eps

    def q_posterior(self, x0, xt, t):
        """Mean and variance of q(x_{t-1} | x_t, x_0), by Bayes' rule."""
        from_x0 = self.alpha_bar[t - 1].sqrt() * self.beta[t] * x0
        from_xt = (1 - self.beta[t]).sqrt() * self.var[t - 1] * xt
        return (from_x0 + from_xt) / self.var[t], self.beta[t] * self.var[t - 1] / self.var[t]


class DiffusionModel(nn.Module):
    """p and the learned schedule. All t share the network, but each has its own readout of it."""

    def __init__(self, net, full=False, T=40, beta1=1e-5, learn_schedule=True):
        super().__init__()
        self.net = net
        self.full = full  # for --net mlp: f_Sigma is a full matrix, out in units of std
        self.T = T
        self.beta1 = beta1
        log_snr = torch.linspace(math.log(1 / beta1 - 1), -1, T, dtype=torch.float64)
        alpha_bar = torch.sigmoid(log_snr)  # before training; alpha_bar_T = 0.27
        beta = 1 - alpha_bar[1:] / alpha_bar[:-1]  # beta_2, ..., beta_T
        self.logit_beta = nn.Parameter(beta.logit().float(), requires_grad=learn_schedule)
        units = net(torch.zeros(1, 2)).shape[-1]
        self.readout = nn.Parameter(torch.zeros(T + 1, units, 5 if full else 4))  # 0, 1 stay 0

    def reverse(self, xt, t, s):
        """Mean, variances and slope (see kl_bits) of p(x_{t-1} | x_t). If readout is 0, as before
        training and always at t = 1, the guess sqrt(alpha_bar_t) x_t makes p a forward step."""
        out = self.net(xt) @ self.readout[t]  # [S, B, 4 or 5]
        scale = s.var[t].sqrt() if self.full else 1  # std of x_0 - linear guess
        guess = s.alpha_bar[t].sqrt() * xt + scale * out[..., :2]  # of x_0
        mean, _ = s.q_posterior(guess, xt, t)  # [S, B, 2]
        var = torch.sigmoid(out[..., 2:4] + s.beta[t].logit())  # [S, B, 2], Eq. (64)
        slope = out[..., 4] if self.full else torch.zeros_like(out[..., 0])  # [S, B]
        return mean, var, slope

    def bound(self, x0):
        """K of Eq. (14) [B] and its KL terms [T - 1, B] in bits, for points x0 [B, 2]. As x_t is
        made of x_0 and noise eps ("frozen noise", Sec. 2.4.1), K has a gradient in beta."""
        s = Schedule(self.beta1, self.logit_beta)
        t = torch.arange(2, self.T + 1, device=x0.device)
        eps = torch.randn(self.T - 1, *x0.shape, device=x0.device)
        xt = s.q_sample(x0, t, eps)  # [T - 1, B, 2]
        mean_q, var_q = s.q_posterior(x0, xt, t)
        kl = kl_bits(mean_q, var_q, *self.reverse(xt, t, s))  # [T - 1, B]
        entropies = torch.log2(s.var[-1] / s.var[1]).squeeze()  # both H_q; two axes, so no 1/2
        return -kl.sum(0) + entropies + L_NULL, kl  # L_null is -H_p(X_T)

    @torch.no_grad()
    def p_sample_loop(self, xt):
        """All steps back from x_T [n, 2]: yields t and x_t for t = T, ..., 0."""
        s = Schedule(self.beta1, self.logit_beta)
        yield self.T, xt
        for t in range(self.T, 0, -1):
            mean, var, slope = self.reverse(xt, t, s)
            noise = var.sqrt() * torch.randn_like(xt)
            noise[:, 1] += slope * noise[:, 0]
            xt = mean + noise
            yield t - 1, xt


class RBFNetwork(nn.Module):
    """The paper's network: 16 radial basis functions, normalised so that their sum is 1."""

    def __init__(self):
        super().__init__()
        curve = roll_curve((torch.arange(8) + 0.5) / 8)
        self.center = nn.Parameter(torch.cat([0.85 * curve, 1.15 * curve]))  # our start: both sides
        self.log_width = nn.Parameter(torch.full((16,), math.log(0.5)))

    def forward(self, x):
        square = (x[..., :1] - self.center[:, 0]) ** 2 + (x[..., 1:] - self.center[:, 1]) ** 2
        return torch.softmax(-square / (2 * self.log_width.exp() ** 2), -1)  # [S, B, 16]


class MLP(nn.Module):
    """A stronger network: random Fourier features and three layers."""

    def __init__(self):
        super().__init__()
        self.frequency = nn.Buffer(torch.randn(2, 32))
        silu = nn.SiLU()
        layers = [nn.Linear(66, 128), silu, nn.Linear(128, 128), silu, nn.Linear(128, 128), silu]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        angle = x @ self.frequency
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], -1))  # [S, B, 128]


def train(model, noise, steps, batch_size, lr):
    """Maximises K. Returns K - L_null of each step. OneCycleLR cycles Adam's 0.95, too."""
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.95, 0.99), maximize=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.15)
    history = []
    with tqdm(range(1, steps + 1), "train") as bar:
        for step in bar:
            x0 = make_swiss_roll(batch_size, noise).to(model.logit_beta)
            K = model.bound(x0)[0].mean()
            if not K.isfinite():
                raise SystemExit(f"K is {K:g} at step {step}: choose --lr below {lr}")
            optimizer.zero_grad()
            K.backward()
            optimizer.step()
            scheduler.step()
            history.append(K.item() - L_NULL)
            bar.set_postfix_str(f"K - L_null {np.mean(history[-100:]):.3f}", refresh=False)
    return history


def evaluate(model, noise, samples):
    """K on 65,536 fresh points (standard error 0.01), and the share of samples off the curve."""
    batches = [make_swiss_roll(1024, noise) for _ in range(64)]
    K = torch.cat([model.bound(x0)[0] for x0 in tqdm(batches, "evaluate")]).mean().item()
    curve = roll_curve(torch.linspace(0, 1, 5000), noise)
    tolerance = 0.1 + 3 * math.sqrt(noise**2 + 2 * model.beta1)  # ours; x_1, x_0 each add beta_1
    off = 0
    for part in samples.split(1000):  # [1000, 5000] distances at a time
        off += (torch.cdist(part, curve).amin(1) > tolerance).sum().item()
    return {
        "K_minus_null_bits": K - L_NULL,
        "ceiling_minus_null_bits": ceiling_bits(noise, model.beta1) - L_NULL,
        "off_curve": off / len(samples),
        "alpha_bar_T": Schedule(model.beta1, model.logit_beta).alpha_bar[-1].item(),
    }


def draw(out, model, noise, states, history):
    """Figure 1 of the paper: q, p and the drift at the t of states {t: x_t}. Then the training."""
    s = Schedule(model.beta1, model.logit_beta)
    x0 = make_swiss_roll(5000, noise)
    grid = torch.cartesian_prod(*[torch.linspace(-2.7, 2.7, 25)] * 2)
    axes = Figure((7.5, 7.8), layout="constrained").subplots(3, 3, sharex=True, sharey=True)
    axes[0, 0].set(xlim=(-3, 3), ylim=(-3, 3), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    for (q, p, drift), t in zip(axes.T, sorted(states)):
        xt = s.q_sample(x0, t, torch.randn_like(x0))
        q.scatter(*xt.numpy().T, s=2, lw=0, color="tab:blue")
        q.set_title(f"$q(x_t)$, $t$ = {t}")
        p.scatter(*states[t][:5000].numpy().T, s=2, lw=0, color="tab:orange")
        p.set_title(f"$p(x_t)$, $t$ = {t}")
        near = grid[torch.cdist(grid, xt).amin(1) < 0.3]  # elsewhere the network saw no x_t
        mean, _, _ = model.reverse(near, max(t, 2), s)  # learned for t >= 2
        drift.scatter(*xt.numpy().T, s=2, lw=0, color="lightblue")
        drift.quiver(*near.numpy().T, *(mean - near).numpy().T, angles="xy", width=0.004)
        drift.set_title(rf"$f_\mu(x_t, t) - x_t$, $t$ = {max(t, 2)}")
    axes[0, 0].figure.savefig(f"{out}/process.png", dpi=150)

    bound, beta, terms = Figure((11, 3.2), layout="constrained").subplots(1, 3)
    bound.plot(history, lw=0.3)
    bound.axhline(ceiling_bits(noise, model.beta1) - L_NULL, color="black")
    bound.set(title="$K - L_{null}$ and ceiling [bits]", xlabel="step", ylim=(0, None))
    beta.semilogy(range(1, model.T + 1), s.beta[1:].flatten().numpy())
    beta.set(title=r"$\beta_t$", xlabel="$t$")
    terms.bar(range(2, model.T + 1), model.bound(x0[::5])[1].mean(1).numpy())
    terms.set(title="KL terms of Eq. (14) [bits]", xlabel="$t$")
    bound.figure.savefig(f"{out}/training.png", dpi=150)


def main(argv=()):
    """Train, sample, evaluate and draw. Returns the metrics."""
    about = __doc__.splitlines()[0]
    parser = ArgumentParser(description=about, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--net", default="rbf", choices=["rbf", "mlp"], help="mlp: stronger, a full covariance")
    add("--noise", type=float, default=0.0, help="standard deviation around the roll, 0 to 0.1")
    add("--beta1", type=float, default=1e-5, help="variance of the first step, 1e-7 to 0.01")
    fixed = "do not learn beta: alpha_bar_T stays 0.27, although p starts at N(0, I), with 0"
    add("--fixed-schedule", action="store_true", help=fixed)
    add("--steps", type=int, default=SUPPRESS, help="training steps (default: 10000, mlp: 2500)")
    add("--batch-size", type=int, default=256, help="points per training step")
    add("--lr", type=float, default=SUPPRESS, help="highest rate (default: 0.04, mlp: 0.008)")
    add("--T", type=int, default=40, help="steps of the diffusion, 2 to 1000")
    add("--samples", type=int, default=10_000, help="samples to draw")
    add("--seed", type=int, default=0, help="of the random numbers")
    add("--device", default=device, choices=sorted({"cpu", device}), help="where to compute")
    add("--out", default="runs/ddpm_swissroll_2015", help="folder for all files")
    args = parser.parse_args(argv)
    args = Namespace(**DEFAULTS[args.net] | vars(args))
    limits = {"noise": (0, 0.1), "beta1": (1e-7, 0.01), "lr": (1e-9, 10), "T": (2, 1000)}
    limits |= {"steps": (1, 1e6), "batch_size": (1, 1e6), "samples": (1, 1e6), "seed": (0, 1e9)}
    for name, (lo, hi) in limits.items():
        if not lo <= vars(args)[name] <= hi:
            parser.error(f"--{name.replace('_', '-')} {vars(args)[name]}: choose {lo:g} to {hi:g}")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error}")

    torch.manual_seed(args.seed)
    net = MLP() if args.net == "mlp" else RBFNetwork()
    model = DiffusionModel(net, args.net == "mlp", args.T, args.beta1, not args.fixed_schedule)
    history = train(model.to(args.device), args.noise, args.steps, args.batch_size, args.lr)
    model.cpu().requires_grad_(False)
    torch.save({"model": model.state_dict(), "flags": vars(args)}, f"{args.out}/model.pt")

    loop = tqdm(model.p_sample_loop(torch.randn(args.samples, 2)), "sample", args.T + 1)
    states = {t: xt for t, xt in loop if t in (args.T, args.T // 2, 0)}  # those that are drawn
    np.save(f"{args.out}/samples.npy", states[0].numpy())
    metrics = evaluate(model, args.noise, states[0])
    Path(args.out, "metrics.json").write_text(json.dumps(metrics | vars(args), indent=1))

    draw(args.out, model, args.noise, states, history)
    print("\n".join(f"{name:24}{value:8.3f}" for name, value in metrics.items()))
    print(f"Table 1 has 6.45 bits, for a roll that is not described. All files are in {args.out}")
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
