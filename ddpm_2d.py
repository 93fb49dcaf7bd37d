# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.7", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""DDPM (Ho et al. 2020, arXiv 2006.11239) on 2-D points, judged against exact densities.

The toy sets are mixtures of Gaussians, so density, entropy and the best possible noise prediction
E[eps | x_t, y] are exact. Arrays over time have length T + 1: beta[0] = 0 and alpha_bar[0] = 1.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# colour-blind safe: Okabe & Ito
COLORS = np.array("#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999999".split())


def beta_schedule(name, T):
    """Forward variances as float64 [T + 1], beta[0] = 0: "linear" of Ho et al. times 1000 / T,
    "cosine" of Nichol & Dhariwal 2021, "sigmoid" of Jabri et al. 2022. Raises ValueError."""
    if name not in ("linear", "cosine", "sigmoid") or not 21 <= T <= 10_000:
        raise ValueError(f"schedule {name}, T = {T}: use linear, cosine or sigmoid, T 21 to 10000")
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    if name == "linear":
        return torch.cat([u[:1], torch.linspace(1e-4, 0.02, T, dtype=u.dtype) * 1000 / T])
    cosine, sigmoid = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, torch.sigmoid(3 - 6 * u)
    f = cosine if name == "cosine" else sigmoid - sigmoid[-1]  # alpha_bar = f / f[0]
    return torch.cat([u[:1], (1 - f[1:] / f[:-1]).clamp(max=0.999)])


class Diffusion(nn.Module):
    """Forward process q, and reverse process p of a model (xt, t [B], y=None) -> eps."""

    def __init__(self, T=1000, schedule="linear"):
        super().__init__()
        self.T, beta = T, beta_schedule(schedule, T)
        a = torch.cumprod(1 - beta, dim=0)
        self.beta, self.alpha = nn.Buffer(beta.float()), nn.Buffer((1 - beta).float())
        self.alpha_bar, self.signal = nn.Buffer(a.float()), nn.Buffer(a.sqrt().float())
        self.noise = nn.Buffer((1 - a).sqrt().float())  # subtracted in float64

    def q_sample(self, x0, t, eps):
        """x_t from x_0 and eps, both [B, ...], at steps t [B]: Eq. (4)."""
        t = t.view(-1, *[1] * (x0.ndim - 1))  # [B, 1, ...]
        return self.signal[t] * x0 + self.noise[t] * eps

    def q_posterior(self, x0, xt, t):
        """Mean [B, ...] and variance [B, 1, ...] of q(x_{t-1} | x_t, x_0): Eq. (6), (7)."""
        t = t.view(-1, *[1] * (x0.ndim - 1))
        keep = (self.noise[t - 1] / self.noise[t]) ** 2  # (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
        gain = self.signal[t - 1] * self.beta[t] / self.noise[t] ** 2
        return gain * x0 + self.alpha[t].sqrt() * keep * xt, keep * self.beta[t]

    def predict_x0(self, xt, t, eps):
        """Estimate of x_0 from x_t and predicted noise: Eq. (15)."""
        t = t.view(-1, *[1] * (xt.ndim - 1))
        return (xt - self.noise[t] * eps) / self.signal[t]

    def p_losses(self, model, x0, y=None, t=None, eps=None, gamma=0):
        """Loss of Algorithm 1, a mean over batch and axes. gamma = 0 is L_simple, Eq. (14), in eps;
        gamma = 2 measures the same error in v (Salimans & Ho 2022): more weight to noisy x_t."""
        t = torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        error = (eps - model(self.q_sample(x0, t, eps), t, y)).square().flatten(1).mean(1)  # [B]
        return (error / self.signal[t] ** gamma).mean()

    def guided_eps(self, model, xt, t, y, guidance):
        """eps_u + s (eps_c - eps_u): Ho & Salimans 2022 (arXiv 2207.12598) Eq. (6), s = 1 + w."""
        eps = model(xt, t.expand(len(xt)), y)
        return eps if guidance == 1 else torch.lerp(model(xt, t.expand(len(xt))), eps, guidance)

    @torch.no_grad()
    def p_sample_loop(self, model, xT, y=None, guidance=1.0, variance="small", generator=None):
        """Algorithm 2: yields x_T, ..., x_0. sigma_t^2 is "small" beta-tilde or "large" beta."""
        yield (xt := xT)
        for t in torch.arange(self.T, 0, -1, device=xT.device).split(1):  # t [1]
            eps = self.guided_eps(model, xt, t, y, guidance)
            mean, beta_tilde = self.q_posterior(self.predict_x0(xt, t, eps), xt, t)  # = Eq. (11)
            var = {"small": beta_tilde, "large": self.beta[t]}[variance]  # Sec. 3.2
            z = torch.empty_like(xt).normal_(generator=generator) if t > 1 else 0
            yield (xt := mean + var.sqrt() * z)

    @torch.no_grad()
    def ddim_sample_loop(self, model, xT, steps=50, eta=0.0, y=None, guidance=1.0, generator=None):
        """DDIM (arXiv 2010.02502) Eq. (12): yields x_T, ..., x_0, steps + 1 states. ValueError."""
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} DDIM steps, but T = {self.T}")
        times = [round(self.T * k / steps) for k in range(steps, -1, -1)]  # T first, 0 last
        yield (xt := xT)
        for t, s in zip(torch.tensor(times, device=xT.device).split(1), times[1:]):
            x0 = self.predict_x0(xt, t, self.guided_eps(model, xt, t, y, guidance))
            eps = (xt - self.signal[t] * x0) / self.noise[t]
            ratio = -torch.expm1(torch.log1p(-self.beta[s + 1 : t + 1]).sum())  # 1 - a_t / a_s
            sigma = self.noise[s] * (eta / self.noise[t] * ratio.sqrt()).clamp(max=1)  # Eq. (16)
            z = sigma * torch.empty_like(xt).normal_(generator=generator)  # eta = 1: as in DDPM
            yield (xt := self.signal[s] * x0 + (self.noise[s] ** 2 - sigma**2).sqrt() * eps + z)

    @torch.no_grad()
    def variational_bound(self, model, x0, y=None, generator=None):
        """L_0, ..., L_T of Eq. (5) as [T + 1], nats per data point, with sigma_t^2 = beta-tilde."""
        end = self.alpha_bar[-1]
        terms = [(end * x0**2 - end - torch.log1p(-end)).sum() / 2]  # L_T
        for t in torch.arange(self.T, 0, -1, device=x0.device).split(1):  # t [1]
            xt = self.q_sample(x0, t, torch.empty_like(x0).normal_(generator=generator))
            x0_hat = self.predict_x0(xt, t, self.guided_eps(model, xt, t, y, 1))
            (mean, var), (mean_hat, _) = (self.q_posterior(x, xt, t) for x in (x0, x0_hat))
            terms.append(((mean - mean_hat) ** 2 / (2 * var)).sum())  # L_{t-1}, Eq. (8)
        terms[-1] = self.decoder_nll(x0, x0_hat).sum()
        return torch.stack(terms[::-1]) / len(x0)

    def decoder_nll(self, x0, mean):
        """L_0 per axis in nats; points are continuous: -log N(x_0; mean, beta_1)."""
        return ((x0 - mean) ** 2 / self.beta[1] + torch.log(2 * math.pi * self.beta[1])) / 2


class NoisePredictor(nn.Module):
    """eps_theta(x_t, t, y), a residual MLP; y = classes means "not told". The best linear guess of
    eps from x_t of unit variance is noise * x_t: the network adds signal * net to it."""

    def __init__(self, diffusion, classes, width=128, layers=3):
        super().__init__()
        self.diffusion, self.classes = diffusion, classes
        self.freq = nn.Buffer(1000 / diffusion.T * 10_000 ** (-torch.arange(16) / 16))
        self.waves = nn.Buffer(2 * torch.randn(2, 32))  # random Fourier features of x_t
        self.inp, self.label = nn.Linear(2 + 2 * 48, width), nn.Embedding(classes + 1, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)
        nn.init.zeros_(self.out.weight)

    def forward(self, xt, t, y=None):
        y = torch.full_like(t, self.classes) if y is None else y
        angle = torch.cat([xt @ self.waves, t[:, None] * self.freq], 1)  # [B, 32 + 16]
        h = self.inp(torch.cat([xt, angle.sin(), angle.cos()], 1)) + self.label(y)  # [B, width]
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return self.diffusion.q_sample(self.out(nn.functional.silu(h)), t, xt)


class ToyData:
    """Equal mixture of Gaussians N(center, sigma^2 I), centers [m, 2], labels [m]: all is exact."""

    def __init__(self, centers, sigma, labels=None):
        self.centers, self.sigma = centers, sigma
        self.labels = torch.zeros(len(centers), dtype=torch.long) if labels is None else labels

    def sample(self, n):
        """n points [n, 2] and the labels [n] of their centers."""
        pick = torch.randint(len(self.centers), (n,), device=self.centers.device)
        return torch.normal(self.centers[pick], self.sigma), self.labels[pick]

    def log_prob(self, x, y=None, signal=1.0, noise=0.0):
        """Exact log-density [n], in nats, of signal * x_0 + noise * eps at x [n, 2], given y."""
        var = torch.as_tensor((signal * self.sigma) ** 2 + noise**2)
        square = x.square().sum(1, True) + signal**2 * self.centers.square().sum(1)
        logit = (signal * x @ self.centers.T - square / 2) / var  # -|x - center|^2 / 2 var, [n, m]
        fits = self.labels[None] >= 0 if y is None else self.labels == y[:, None]  # [1 or n, m]
        norm = torch.log(2 * math.pi * var.view(-1) * fits.sum(1))
        return logit.masked_fill(~fits, -math.inf).logsumexp(1) - norm

    def entropy(self, y=None):
        """Exact entropy in nats, given a label y [1]: -p log p summed over a grid."""
        axis = torch.arange(-4, 4, self.sigma, device=self.centers.device)
        log_p = self.log_prob(torch.cartesian_prod(axis, axis), y)
        return -(log_p.exp() * log_p).sum() * self.sigma**2

    @torch.enable_grad()
    def ideal_eps(self, diffusion, xt, t, y=None):
        """The Bayes-optimal E[eps | x_t, y] = -noise * gradient of log q(x_t | y) (Tweedie)."""
        xt, noise = xt.detach().requires_grad_(), diffusion.noise[t, None]
        log_q = self.log_prob(xt, y, diffusion.signal[t, None], noise)
        return -noise * torch.autograd.grad(log_q.sum(), xt)[0]


def load_data(name, device="cpu"):
    """A toy set, or the rows x,y[,label] of a .npy or .csv file, as ToyData of mean 0 and variance
    1 per axis; and the mean [2] and std [2] that undo it. Raises OSError or ValueError."""
    turn = lambda a: torch.exp(1j * math.pi * a)  # on the unit circle, a = 2 is all around
    u = torch.linspace(0, 1, 300).double()
    arm = u.sqrt() * turn(3 * u.sqrt())
    x = torch.arange(40).repeat(40, 1) / 10  # [40, 40]
    toys = {  # points x + iy in the order of their labels, number of labels, sigma
        "8gaussians": (turn(torch.arange(8) / 4), 8, 0.15),
        "moons": (torch.cat([turn(u), 1 + 0.5j - turn(u)]), 2, 0.08),
        "circles": (torch.cat([turn(2 * u), turn(2 * u) / 2]), 2, 0.06),
        "swissroll": ((1.5 + 3 * u) * turn(1.5 + 3 * u), 4, 0.06),
        "spirals": (torch.cat([arm, -arm]), 2, 0.06),
        "checkerboard": (torch.complex(x, x.T)[(x.floor() + x.T.floor()) % 2 == 0], 4, 0.06),
    }
    if name in toys:
        z, classes, sigma = toys[name]
        rows = torch.stack([z.real, z.imag, torch.arange(len(z)) * classes // len(z)], 1).double()
    else:
        text = "" if name.endswith(".npy") else Path(name).read_text().strip()
        rows = [line.split(",") for line in text.splitlines()] or np.load(name)
        rows, sigma = torch.from_numpy(np.array(rows, np.float64)), 0.0
    good = rows.shape[1:] in ((2,), (3,)) and len(rows) and rows.isfinite().all()
    if not good or (rows[:, 2:] != rows[:, 2:].long().abs()).any():
        raise ValueError("use finite rows x,y or x,y,label; labels are 0, 1, 2, ...")
    mean, std = rows[:, :2].mean(0), rows[:, :2].std(0, correction=0).clamp(min=1e-9)
    centers = (rows[:, :2] - mean) / std * math.sqrt(1 - sigma**2)
    labels = rows[:, 2:].sum(1).long()  # 0 where the file has none
    return ToyData(centers.float().to(device), sigma, labels.to(device)), mean, std


def main(argv=None):
    """Train or load, sample, evaluate and draw; returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: {text}\n")
    add = parser.add_argument
    toys = "8gaussians, moons, circles, swissroll, spirals, checkerboard"
    add("--data", default="8gaussians", help=toys + ", or a .npy or .csv file of rows x,y[,label]")
    add("--steps", type=int, default=4000, help="of training")
    add("--batch-size", type=int, default=1024, help="points per training step")
    add("--lr", type=float, default=5e-3, help="learning rate at the start")
    add("--T", type=int, default=1000, help="steps of the diffusion, 21 to 10000")
    add("--schedule", default="cosine", choices=["linear", "cosine", "sigmoid"], help="of beta_t")
    add("--n", type=int, default=10_000, help="samples to draw")
    add("--seed", type=int, default=0, help="of all randomness")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", type=Path, default="runs/ddpm_2d", help="folder for all files")
    add("--load", help="a model.pt to use instead of training, with the flags that made it")
    args = parser.parse_args(argv)
    T, part, config = args.T, args.out / ".part", [args.data, args.T, args.schedule]
    try:
        for flag, low in {"steps": 1, "batch_size": 1, "lr": 1e-9, "n": 2, "seed": 0}.items():
            if not low <= vars(args)[flag] < 2**63:
                raise ValueError(f"use {low} or more")
        flag, auto = "device", torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.zeros(1, device=auto if args.device == "auto" else args.device).device
        args.device = str(device)
        flag = "data"
        data, mean, std = load_data(args.data, device)
        flag = "T"
        torch.manual_seed(args.seed)
        diffusion = Diffusion(T, args.schedule).to(device)
        net = NoisePredictor(diffusion, int(data.labels.max()) + 1).to(device)
        flag = "load"
        saved = torch.load(args.load, device, weights_only=True) if args.load else {}
        if args.load and saved.get("config") != config:
            raise ValueError(f"it was made with {saved.get('config')}; give the same flags")
        net.load_state_dict(saved["ema"] if args.load else net.state_dict())
        flag = "out"
        part.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of the flag being checked; torch.load alone raises a dozen kinds
        reason = (str(error) or repr(error)).splitlines()[0]
        parser.error(f"--{flag.replace('_', '-')} {vars(args)[flag]}: {reason}; see --help")

    # train: Algorithm 1, until done or Ctrl-C
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    log, bar = saved.get("log", []), tqdm(range(1, 1 if args.load else args.steps + 1), "train")
    try:
        for step in bar:
            x0, y = data.sample(args.batch_size)
            y = y.masked_fill(torch.rand(len(y), device=device) < 0.1, net.classes)  # for guidance
            loss = diffusion.p_losses(net, x0, y)
            log.append([step, loss.item(), scheduler.get_last_lr()[0], bar.format_dict["elapsed"]])
            if not loss.isfinite():
                bar.close()
                parser.error(f"--lr {args.lr}: loss is {loss:g} at step {step}; use a lower one")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ema.update_parameters(net)  # after the step
    except KeyboardInterrupt:
        print("\nstopped early; going on with what was learned")
    model, ideal = ema.module, partial(data.ideal_eps, diffusion)
    torch.save({"config": config, "log": log, "ema": model.state_dict()}, part / "model.pt")
    (part / "model.pt").replace(args.out / "model.pt")

    # sample
    pick = torch.randperm(args.n, device=device) * len(data.labels) // args.n  # in even shares
    x0, y = torch.normal(data.centers[pick], data.sigma), data.labels[pick]
    xT = torch.randn(args.n, 2, device=device)
    chunks = zip(xT.split(2500), y.split(2500))  # that fit the cache
    bar = tqdm(zip(*[diffusion.p_sample_loop(model, *chunk) for chunk in chunks]), "sample", T + 1)
    path, sample_seconds = [torch.cat(x) for x in bar], bar.format_dict["elapsed"]  # x_T, ..., x_0
    ddim = partial(diffusion.ddim_sample_loop, model, xT, min(50, T), y=y)
    fast, guided = list(ddim())[-1], list(ddim(guidance=3))[-1]

    # evaluate on fresh points
    draws = torch.stack([path[-1], fast, *data.sample(9 * args.n)[0].split(args.n)])
    lines = (draws @ torch.randn(2, 64, device=device)).sort(1).values  # projected: [11, n, 64]
    swd = (lines[2:] - lines[:2, None]).abs().mean((1, 2, 3)) / lines[2:].diff(dim=0).abs().mean()
    models = (model, ideal) if data.sigma else (model,)  # the ideal one needs the truth
    rng, bound = torch.Generator(device), diffusion.variational_bound
    bounds = torch.stack([bound(f, x0[:512], y[:512], rng.manual_seed(0)) for f in models])
    weight = diffusion.beta[2:] / diffusion.alpha[2:] / diffusion.noise[1:-1] ** 2  # Eq. (12) x 2
    losses = bounds[:, 1:-1] / weight  # error of eps, mean of both axes, t = 2..T
    metrics = dict(zip(("bound_nats", "ideal_bound_nats"), bounds.sum(1)), loss=losses[0].mean())
    metrics |= {"swd_ratio": swd[0], "ddim_swd_ratio": swd[1]}
    if data.sigma:
        entropies = [data.entropy(label) for label in data.labels.unique().split(1)]
        metrics["entropy_nats"] = sum(entropies) / len(entropies)  # given the label, as the bound
        metrics["excess_loss"] = losses[0].mean() / losses[1].mean() - 1
        rare = data.log_prob(draws[2]).quantile(0.001)
        metrics["off_support"] = (data.log_prob(path[-1]) < rare).float().mean()
    metrics = {key: value.item() for key, value in metrics.items()}
    metrics |= {"script": "ddpm_2d", **vars(args), "steps": len(log), "torch": torch.__version__}
    metrics |= {"train_seconds": log[-1][3] if log else 0.0, "sample_seconds": sample_seconds}
    metrics["parameters"] = sum(p.numel() for p in net.parameters())

    def clouds(name, *rows):  # of points; a cell is (title, points [n, 2])
        size = {"figsize": (2.4 * len(rows[0]), 2.6 * len(rows)), "layout": "constrained"}
        fig, axes = plt.subplots(len(rows), len(rows[0]), squeeze=False, **size)
        for ax, (title, x) in zip(axes.flat, sum(rows, [])):
            dots = ax.scatter(*x[:4000].T.cpu(), s=3, lw=0, c=COLORS[y[:4000].cpu() % len(COLORS)])
            ax.set(title=title, xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), xticks=[], yticks=[])
        fig.savefig(part / name, dpi=120)
        return fig, axes, dots

    # draw
    times = (0, T // 20, T // 10, T // 5, T // 2, T)
    forward = [(f"t = {t}", diffusion.q_sample(x0, 0 * y + t, xT)) for t in times]
    clouds("diffusion_process.png", forward, [("", path[T - t]) for t in times])
    reverse = [(f"DDPM, {T} steps", path[-1]), (f"DDIM, {min(50, T)} steps", fast)]
    clouds("results.png", [("data", x0), *reverse, ("DDIM, guidance 3", guided)])
    if data.sigma:
        kinds = ("exact", "learned")
        rows = [[(f"{kind} score, {title}", x) for title, x in forward[1:4]] for kind in kinds]
        fig, axes, _ = clouds("score.png", *rows)
        for row, f in zip(axes, (ideal, model)):
            for ax, t, (_, x) in zip(row, times[1:4], forward[1:4]):  # at some of the points
                score = -f(x[:300], 0 * y[:300] + t).detach()
                ax.quiver(*x[:300].T.cpu(), *score.T.cpu(), scale=25)
        fig.savefig(part / "score.png", dpi=120)
    fig, _, dots = clouds("sampling.gif", [("from noise to data", xT)])
    move = lambda x: dots.set_offsets(x[:4000].cpu())
    film = FuncAnimation(fig, move, path[:: T // 20] + path[-1:] * 9)
    film.save(part / "sampling.gif", writer="pillow")
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    left.semilogy(*np.array(log).reshape(-1, 4)[:, :2].T, lw=0.3)
    left.set(title="loss", xlabel="training step")
    middle.plot(range(2, T + 1), losses.T.cpu(), label=["network", "best possible"][: len(losses)])
    middle.set(title="loss by t", xlabel="t")
    snr = (diffusion.signal / diffusion.noise) ** 2
    curves = torch.stack([diffusion.beta, diffusion.alpha_bar, snr], 1)[1:].cpu()
    right.semilogy(range(1, T + 1), curves, label=["beta", "alpha_bar", "SNR"])
    right.set(title=f"{args.schedule} schedule", xlabel="t")
    for ax in (middle, right):
        ax.legend()
    fig.savefig(part / "training.png", dpi=120)
    plt.close("all")

    # save
    samples = path[-1].cpu() if data.sigma else path[-1].cpu() * std + mean  # in the file's units
    np.save(part / "samples.npy", samples.float())
    np.save(part / "labels.npy", y.cpu())
    np.savetxt(part / "log.csv", log, delimiter=",", header="step,loss,lr,seconds", comments="")
    (part / "metrics.json").write_text(json.dumps(metrics, indent=1, default=str))
    for file in part.iterdir():
        file.replace(args.out / file.name)
    part.rmdir()
    print((args.out / "metrics.json").read_text(), f"files in {args.out}", sep="\n")
    return metrics


if __name__ == "__main__":
    main()
