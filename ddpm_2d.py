# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""DDPM (Ho et al. 2020, arXiv 2006.11239) on 2-D points, judged against exact densities.

The toy sets are mixtures of Gaussians, so density, entropy and the best possible noise prediction
E[eps | x_t] are exact. Arrays over time have length T + 1: beta[0] = 0 and alpha_bar[0] = 1.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# colour-blind safe: Okabe & Ito
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999999".split()
FLAGS = {  # name: (default, what it takes)
    "data": (
        "8gaussians",
        "8gaussians moons circles swissroll spirals checkerboard, or .npy, .csv",
    ),
    "steps": (5000, "training steps, 1 or more"),
    "batch-size": (1024, "points per training step, 1 or more"),
    "lr": (0.005, "learning rate at the start, above 0"),
    "T": (1000, "diffusion steps, 21 to 10000"),
    "schedule": ("linear", "linear, cosine or sigmoid"),
    "n": (10_000, "samples to draw, 2 or more"),
    "seed": (0, "seed of all randomness, a whole number"),
    "device": ("auto", "auto, cpu, cuda or mps"),
    "out": ("runs/ddpm_2d", "folder for the results"),
    "load": ("", "model.pt of an earlier run, to skip training"),
}


def beta_schedule(name, T):
    """Forward variances as float64 [T + 1], beta[0] = 0: "linear" of Ho et al. times 1000 / T,
    "cosine" of Nichol & Dhariwal 2021, "sigmoid" of Jabri et al. 2022. Raises ValueError."""
    if name not in ("linear", "cosine", "sigmoid") or not 21 <= T <= 10_000:
        raise ValueError(f"schedule {name} with T = {T}: linear, cosine or sigmoid; T 21 to 10000")
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
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        self.register_buffer("beta", beta.float())
        self.register_buffer("alpha", (1 - beta).float())
        self.register_buffer("alpha_bar", alpha_bar.float())
        self.register_buffer("signal", alpha_bar.sqrt().float())
        self.register_buffer("noise", (1 - alpha_bar).sqrt().float())  # subtracted in float64

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

    def p_losses(self, model, x0, y=None, t=None, eps=None):
        """L_simple, Eq. (14), the loss of Algorithm 1: mean over batch and axes."""
        t = torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        return (eps - model(self.q_sample(x0, t, eps), t, y)).square().mean()

    def guided_eps(self, model, xt, t, y, guidance):
        """eps_u + s (eps_c - eps_u): Ho & Salimans 2022 (arXiv 2207.12598) Eq. (6), s = 1 + w."""
        eps = model(xt, t, y)
        return eps if guidance == 1 else torch.lerp(model(xt, t), eps, guidance)

    @torch.no_grad()
    def p_sample_loop(self, model, xT, y=None, guidance=1.0, variance="small", generator=None):
        """Algorithm 2: yields x_T, ..., x_0. sigma_t^2 is "small" beta-tilde or "large" beta."""
        yield (xt := xT)
        for step in range(self.T, 0, -1):
            t = torch.full(xt.shape[:1], step, device=xt.device)
            eps = self.guided_eps(model, xt, t, y, guidance)
            mean, beta_tilde = self.q_posterior(self.predict_x0(xt, t, eps), xt, t)  # = Eq. (11)
            var = {"small": beta_tilde, "large": self.beta[step]}[variance]  # Sec. 3.2
            z = torch.empty_like(xt).normal_(generator=generator) if step > 1 else 0
            yield (xt := mean + var.sqrt() * z)

    @torch.no_grad()
    def ddim_sample_loop(self, model, xT, steps=50, eta=0.0, y=None, guidance=1.0, generator=None):
        """DDIM (arXiv 2010.02502) Eq. (12): yields x_T, ..., x_0, steps + 1 states. ValueError."""
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} DDIM steps, but T = {self.T}")
        times = [round(self.T * k / steps) for k in range(steps, -1, -1)]  # T first, 0 last
        yield (xt := xT)
        for step, s in zip(times, times[1:]):
            t = torch.full(xt.shape[:1], step, device=xt.device)
            x0 = self.predict_x0(xt, t, self.guided_eps(model, xt, t, y, guidance))
            eps = (xt - self.signal[step] * x0) / self.noise[step]
            ratio = -torch.expm1(torch.log1p(-self.beta[s + 1 : step + 1]).sum())  # 1 - a_t / a_s
            sigma = eta * self.noise[s] / self.noise[step] * ratio.sqrt()  # Eq. (16)
            z = sigma * torch.empty_like(xt).normal_(generator=generator)
            yield (xt := self.signal[s] * x0 + (self.noise[s] ** 2 - sigma**2).sqrt() * eps + z)

    @torch.no_grad()
    def variational_bound(self, model, x0, y=None, generator=None):
        """L_0, ..., L_T of Eq. (5) as [T + 1], nats per data point, with sigma_t^2 = beta-tilde."""
        end = self.alpha_bar[-1]
        terms = [end * x0**2 - end - torch.log1p(-end)]  # 2 L_T per axis
        for step in range(self.T, 0, -1):  # one noise draw per point and step
            t = torch.full(x0.shape[:1], step, device=x0.device)
            xt = self.q_sample(x0, t, torch.empty_like(x0).normal_(generator=generator))
            mean, var = self.q_posterior(x0, xt, t)
            mean_hat, _ = self.q_posterior(self.predict_x0(xt, t, model(xt, t, y)), xt, t)
            terms.append((mean - mean_hat) ** 2 / var)  # 2 L_{t-1} per axis, Eq. (8)
        var = self.beta[1]  # L_0 = -log N(x_0; mean_hat, beta_1): points are continuous
        terms[-1] = (x0 - mean_hat) ** 2 / var + torch.log(2 * math.pi * var)
        return torch.stack([term.sum() / (2 * len(x0)) for term in reversed(terms)])


class NoisePredictor(nn.Module):
    """eps_theta(x_t, t, y), a residual MLP; the last label, y = classes, means "not told". The best
    linear guess of eps is noise * x_t (unit variance data); the network adds signal * net to it."""

    def __init__(self, diffusion, classes, width=128, layers=3):
        super().__init__()
        self.diffusion, self.classes = diffusion, classes
        self.register_buffer("freq", 1000 / diffusion.T * 10_000 ** (-torch.arange(16) / 16))
        self.register_buffer("waves", 2 * torch.randn(2, 32))  # random Fourier features of x_t
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
        net = self.out(nn.functional.silu(h))  # [B, 2], the v of Salimans & Ho 2022
        return self.diffusion.q_sample(net, t, xt)  # signal * net + noise * xt


class ToyData:
    """Equal mixture of Gaussians N(center, sigma^2 I), centers [m, 2], labels [m]: all is exact."""

    def __init__(self, centers, sigma, labels=None):
        self.centers, self.sigma, self.labels = centers, sigma, labels

    def sample(self, n):
        """n points [n, 2] and the labels [n] of their centers."""
        pick = torch.randint(len(self.centers), (n,), device=self.centers.device)
        return torch.normal(self.centers[pick], self.sigma), self.labels[pick]

    def log_prob(self, x, signal=1.0, noise=0.0):
        """Exact log-density [n], in nats, of signal * x_0 + noise * eps at points x [n, 2]."""
        var = torch.as_tensor((signal * self.sigma) ** 2 + noise**2)
        square = x.square().sum(1, True) + signal**2 * self.centers.square().sum(1)
        logit = (signal * x @ self.centers.T - square / 2) / var  # -|x - center|^2 / 2 var, [n, m]
        return logit.logsumexp(1) - (2 * math.pi * len(self.centers) * var).log().view(-1)

    def entropy(self):
        """Exact entropy in nats: -p log p summed over a grid of spacing sigma."""
        axis = torch.arange(-4, 4, self.sigma, device=self.centers.device)
        log_p = self.log_prob(torch.cartesian_prod(axis, axis))
        return -(log_p.exp() * log_p).sum() * self.sigma**2

    @torch.enable_grad()
    def ideal_eps(self, diffusion, xt, t, y=None):
        """The Bayes-optimal E[eps | x_t] = -noise * gradient of log q(x_t) (Tweedie's formula)."""
        xt, noise = xt.detach().requires_grad_(), diffusion.noise[t, None]
        log_q = self.log_prob(xt, diffusion.signal[t, None], noise)
        return -noise * torch.autograd.grad(log_q.sum(), xt)[0]


def load_data(name):
    """A toy set or the rows x,y[,label] of a file as ToyData of mean 0 and variance 1 per axis, and
    the mean [2] and std [2] that undo that. Raises OSError or ValueError."""
    u = torch.linspace(0, 1, 300, dtype=torch.float64)
    half, full = torch.exp(1j * math.pi * u), torch.exp(2j * math.pi * u)  # points as x + iy
    roll, arm = (a * torch.exp(1j * a) for a in (math.pi * (1.5 + 3 * u), 3 * math.pi * u.sqrt()))
    x, y = torch.meshgrid(torch.arange(40) / 10, torch.arange(40) / 10, indexing="xy")
    toys = {  # points in the order of their labels, number of labels, sigma
        "8gaussians": (torch.exp(2j * math.pi * torch.arange(8) / 8), 8, 0.15),
        "moons": (torch.cat([half, 1 + 0.5j - half]), 2, 0.08),
        "circles": (torch.cat([full, full / 2]), 2, 0.06),
        "swissroll": (roll, 4, 0.06),
        "spirals": (torch.cat([arm, -arm]), 2, 0.06),
        "checkerboard": (torch.complex(x, y)[(x.floor() + y.floor()) % 2 == 0], 4, 0.06),
    }
    if name in toys:
        z, classes, sigma = toys[name]
        rows = torch.stack([z.real, z.imag, torch.arange(len(z)) * classes // len(z)], 1).double()
    else:
        lines = [] if name.endswith(".npy") else Path(name).read_text().strip().splitlines()
        rows = np.load(name) if not lines else [[float(v) for v in k.split(",")] for k in lines]
        rows, sigma = torch.as_tensor(np.array(rows, dtype=np.float64)), 0.0
    if rows.ndim != 2 or rows.shape[1] not in (2, 3) or not rows.isfinite().all():
        raise ValueError(f"shape {tuple(rows.shape)} is not finite rows x,y or x,y,label")
    mean, std, label = rows[:, :2].mean(0), rows[:, :2].std(0, correction=0), rows[:, 2:].sum(1)
    if not (std > 0).all() or (label != label.long().abs()).any():
        raise ValueError("points on one line along an axis, or labels that are not 0, 1, 2, ...")
    centers = (rows[:, :2] - mean) / std * math.sqrt(1 - sigma**2)
    return ToyData(centers.float(), sigma, label.long()), mean, std


def main(argv=None):
    """Train (or load), sample, evaluate and draw; returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    for flag, (default, text) in FLAGS.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)

    def check(flag, build):  # or exit with the flag, its value, the reason and what it takes
        try:
            return build()
        except Exception as error:
            reason = str(error).partition("\n")[0]
            parser.error(f"--{flag} {vars(args)[flag]}: {reason}; use {FLAGS[flag][1]}")

    for flag, low in (("steps", 1), ("batch-size", 1), ("lr", 1e-9), ("n", 2)):
        value = vars(args)[flag.replace("-", "_")]
        if not low <= value < math.inf:
            parser.error(f"--{flag} {value}: use {FLAGS[flag][1]}")
    saved = {"config": {}, "log": []}
    if args.load:
        saved = check("load", lambda: torch.load(args.load, "cpu", weights_only=True)["ddpm_2d"])
    for key, value in saved["config"].items():
        if vars(args)[key] not in (value, FLAGS[key][0]):
            parser.error(f"--{key} {vars(args)[key]}: {args.load} has {value}; leave the flag out")
        vars(args)[key] = value
    mps = torch.backends.mps.is_available()
    best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = best if args.device == "auto" else args.device
    check("device", lambda: torch.zeros(1, device=device))
    T, out, part = args.T, Path(args.out), Path(args.out, ".part")
    check("schedule", lambda: beta_schedule(args.schedule, 1000))
    diffusion = check("T", lambda: Diffusion(T, args.schedule).to(device))
    data, mean, std = check("data", lambda: load_data(args.data))
    check("out", lambda: part.mkdir(parents=True, exist_ok=True))

    # train
    torch.manual_seed(args.seed)
    data.centers, data.labels = data.centers.to(device), data.labels.to(device)
    net = NoisePredictor(diffusion, int(data.labels.max()) + 1).to(device)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    if args.load:
        check("load", lambda: ema.module.load_state_dict(saved["ema"]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    log, bar = saved["log"], tqdm(range(1, 1 if args.load else args.steps + 1), desc="train")
    try:  # Algorithm 1, until done or Ctrl-C
        for step in bar:
            x0, y = data.sample(args.batch_size)
            y = y.masked_fill(torch.rand(y.shape, device=device) < 0.5, net.classes)  # hide labels
            loss = diffusion.p_losses(net, x0, y)
            log.append([step, loss.item(), scheduler.get_last_lr()[0], bar.format_dict["elapsed"]])
            if not loss.isfinite():
                bar.close()
                parser.error(f"--lr {args.lr}: loss {loss:g} at step {step}; use a lower one")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ema.update_parameters(net)  # after the step
    except KeyboardInterrupt:
        if not log:
            raise
        print(f"\nstopped at step {len(log)}; going on with what was learned")
    model, ideal = ema.module, partial(data.ideal_eps, diffusion)
    if not args.load:
        config = {key: vars(args)[key] for key in ("data", "T", "schedule")}
        state = {"config": config, "log": log, "net": net.state_dict(), "ema": model.state_dict()}
        torch.save({"ddpm_2d": state | {"mean": mean, "std": std}}, part / "model.pt")
        (part / "model.pt").replace(out / "model.pt")

    # sample
    xT, (x0, y) = torch.randn(args.n, 2, device=device), data.sample(args.n)
    loops = [diffusion.p_sample_loop(model, part) for part in xT.split(2500)]  # fits the cache
    bar = tqdm(zip(*loops), desc="sample", total=T + 1)
    path = [torch.cat(parts) for parts in bar]  # x_T, ..., x_0
    train_seconds, sample_seconds = log[-1][3], bar.format_dict["elapsed"]
    ddim = partial(diffusion.ddim_sample_loop, model, xT, min(50, T), y=y)
    fast, guided = list(ddim(guidance=0))[-1], list(ddim(guidance=2))[-1]

    # evaluate, on fresh points and noise
    draws, generator = data.sample(9 * args.n)[0].split(args.n), torch.Generator(device)
    models = (model, ideal) if data.sigma else (model,)  # the ideal one needs the truth
    bound = partial(diffusion.variational_bound, x0=x0[:512])
    bounds = torch.stack([bound(f, generator=generator.manual_seed(0)) for f in models])
    weight = diffusion.beta[2:] / diffusion.alpha[2:] / diffusion.noise[1:-1] ** 2  # Eq. (12)
    losses = bounds[:, 1:-1] / weight  # per axis, t = 2..T
    metrics = {"loss": losses[0].mean(), "bound_nats": bounds[0].sum()}
    lines = nn.functional.normalize(torch.randn(2, 64, device=device), dim=0)  # to project on
    clouds = torch.stack([(x @ lines).sort(0).values for x in (path[-1], fast, *draws)])
    for name, cloud in zip(("swd_ratio", "ddim_swd_ratio"), clouds):
        metrics[name] = (clouds[2:] - cloud).abs().mean() / clouds[2:].diff(dim=0).abs().mean()
    if data.sigma:  # the truth is known
        metrics |= {"ideal_bound_nats": bounds[1].sum(), "entropy_nats": data.entropy()}
        low = torch.cat([data.log_prob(x) for x in torch.cat(draws).split(1000)]).quantile(0.001)
        metrics["off_support"] = (data.log_prob(path[-1]) < low).float().mean()
        metrics["excess_loss"] = losses[0].mean() / losses[1].mean() - 1
    metrics = {key: value.item() for key, value in metrics.items()}
    metrics |= {"script": "ddpm_2d", **vars(args), "device": str(device), "steps": len(log)}
    metrics |= {"parameters": sum(p.numel() for p in net.parameters()), "torch": torch.__version__}
    metrics |= {"train_seconds": train_seconds, "sample_seconds": sample_seconds}

    def sheet(name, *rows):  # rows of clouds; a cell is (title, points, labels[, arrows])
        fig = Figure(figsize=(2.4 * len(rows[0]), 2.5 * len(rows)), layout="constrained")
        axes = fig.subplots(len(rows), len(rows[0]), squeeze=False)
        for ax, (title, x, y, *arrows) in zip(axes.flat, sum(rows, [])):
            ax.scatter(*x.cpu().T, s=1, c=np.array(COLORS)[y.cpu() % len(COLORS)], alpha=0.5, lw=0)
            ax.set(title=title, xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), xticks=[], yticks=[])
            for v in arrows:
                v = v.detach() / (1 + v.norm(dim=1, keepdim=True)).detach()  # long ones shortened
                ax.quiver(*grid.cpu().T, *v.cpu().T, scale=18)
        fig.savefig(part / name, dpi=120)
        return fig, axes[0, 0].collections[0].set_offsets

    one, grid = 0 * y, torch.cartesian_prod(*[torch.linspace(-2.5, 2.5, 18, device=device)] * 2)
    q = {t: diffusion.q_sample(x0, one + t, xT) for t in (0, T // 20, T // 10, T // 5, T // 2, T)}
    forward = [(f"t = {t}", x, one) for t, x in q.items()]
    sheet("diffusion_process.png", forward, [("", path[T - t], one) for t in q])
    panels = [("data", x0, y), (f"DDPM, {T} steps", path[-1], one)]
    panels += [(f"DDIM, {min(50, T)} steps", fast, one), ("DDIM, guidance 2", guided, y)]
    sheet("results.png", panels)
    if data.sigma:
        at = {t: torch.full(grid.shape[:1], t, device=device) for t in list(q)[1:4]}
        fields = ("exact score", ideal), ("learned score", model)
        cloud = 5 + one  # pale, under the arrows
        sheet(
            "score.png",
            *[[(f"{k}, t = {t}", q[t], cloud, -f(grid, at[t])) for t in at] for k, f in fields],
        )
    fig, move = sheet("sampling.gif", [("from noise to data", xT, one)])
    film = FuncAnimation(fig, lambda k: move(path[k].cpu()), range(0, T + 1, T // 20))
    film.save(part / "sampling.gif", writer="pillow")
    fig = Figure(figsize=(10, 3), layout="constrained")
    snr = (diffusion.signal / diffusion.noise) ** 2
    left, middle, right = fig.subplots(1, 3)
    left.plot(np.convolve(np.array(log)[:, 1], np.ones(50) / 50, "valid"), label="loss, by step")
    middle.plot(losses.T.cpu(), label=["loss, by t", "best possible"][: len(losses)])
    curves = torch.stack([diffusion.beta, diffusion.alpha_bar, snr], 1)[1:].cpu()
    right.semilogy(curves, label=["beta, by t", "alpha_bar", "SNR"])
    for ax in (left, middle, right):
        ax.legend()
    fig.savefig(part / "training.png", dpi=120)
    samples = path[-1].cpu() if data.sigma else path[-1].cpu() * std + mean  # in the file's units
    np.save(part / "samples.npy", samples.float())
    np.savetxt(part / "log.csv", log, header="step,loss,lr,seconds", delimiter=",", comments="")
    (part / "metrics.json").write_text(json.dumps(metrics, indent=1))
    for file in part.iterdir():
        file.replace(out / file.name)
    part.rmdir()
    print((out / "metrics.json").read_text(), f"files in {out}", sep="\n")
    return metrics


if __name__ == "__main__":
    main()
