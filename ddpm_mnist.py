# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""DDPM (Ho et al. 2020, arXiv 2006.11239) with a U-Net on MNIST, judged in bits per dimension.

  python ddpm_mnist.py                                     ten minutes, on two CPU cores or a GPU
  python ddpm_mnist.py --load weights/ddpm_mnist.pt        one hundred digits in seconds
  torchrun --nproc-per-node 8 ddpm_mnist.py --minutes 2    eight GPUs; batches add up

Arrays over time have length T + 1: beta[0] = 0, alpha_bar[0] = 1. Images are in [-1, 1].
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import sys
import time
import zlib
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {  # SHA-256 of the unpacked bytes
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
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
        """Estimate of x_0 from x_t and predicted noise: Eq. (15). Algorithm 2 does not clip."""
        t = t.view(-1, *[1] * (xt.ndim - 1))
        return ((xt - self.noise[t] * eps) / self.signal[t]).clamp(-1, 1)

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
        terms[-1] = 2 * self.decoder_nll(x0, mean_hat, self.beta[1])
        return torch.stack([term.sum() / (2 * len(x0)) for term in reversed(terms)])

    def decoder_nll(self, x0, mean, var):
        """L_0: -log p(x_0 | x_1) of every pixel, in nats: Eq. (13), the mass of N(mean, var) on
        x_0 +- 1/255, open at -1 and 1; from the lower tail, where float does not cancel."""
        x0, mean, sigma = x0.cpu().double(), mean.cpu().double(), var.cpu().double().sqrt()
        low = torch.where(x0 < -0.999, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
        high = torch.where(x0 > 0.999, torch.inf, (x0 + 1 / 255 - mean) / sigma)
        low, high = torch.where(x0 > mean, torch.stack([-high, -low]), torch.stack([low, high]))
        log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        return -(log_high + torch.log(-torch.expm1(log_low - log_high))).to(self.beta)


class ResBlock(nn.Module):
    """x + two convolutions of x; the embedding scales and shifts between them."""

    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.embed = nn.Linear(width, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, emb):
        scale, shift = self.embed(emb)[..., None, None].chunk(2, dim=1)  # [B, outputs, 1, 1]
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """x + self-attention over all positions of x, four heads."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(8, width), nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).unflatten(1, (3, 4, -1)).flatten(4)  # [B, 3, 4, D, H W]
        h = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))  # [B, 4, H W, D]
        return x + self.out(h.transpose(2, 3).reshape(x.shape))


class UNet(nn.Module):
    """eps_theta(x_t, t, y) of images [B, channels, H, W], H and W divisible by 4; the last label,
    y = classes, means "not told". Works on 2 x 2 patches: a quarter of the cost of full size. The
    best linear guess of eps is noise * x_t (unit variance data); the network adds signal * net."""

    def __init__(self, diffusion, channels=1, classes=10, width=64):
        super().__init__()
        self.diffusion, self.classes, emb = diffusion, classes, 4 * width
        self.register_buffer("freq", 1000 / diffusion.T * 10_000 ** (-torch.arange(32) / 32))
        self.time = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(classes + 1, emb)
        self.stem = nn.Conv2d(4 * channels, width, 3, padding=1)
        self.down1 = ResBlock(width, width, emb)
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = ResBlock(2 * width, 2 * width, emb)
        self.middle1 = ResBlock(2 * width, 2 * width, emb)
        self.attention = Attention(2 * width)
        self.middle2 = ResBlock(2 * width, 2 * width, emb)
        self.up2 = ResBlock(4 * width, 2 * width, emb)
        self.grow = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up1 = ResBlock(2 * width, width, emb)
        self.head = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, xt, t, y=None):
        y = torch.full_like(t, self.classes) if y is None else y
        angle = t[:, None] * self.freq
        emb = self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(y)
        emb = F.silu(emb)  # [B, 4 width]
        h1 = self.down1(self.stem(F.pixel_unshuffle(xt, 2)), emb)  # [B, width, H/2, W/2]
        h2 = self.down2(self.shrink(h1), emb)  # [B, 2 width, H/4, W/4]
        h = self.middle2(self.attention(self.middle1(h2, emb)), emb)
        h = self.up2(torch.cat([h, h2], 1), emb)
        h = self.grow(F.interpolate(h, scale_factor=2))  # [B, width, H/2, W/2]
        h = self.up1(torch.cat([h, h1], 1), emb)
        net = F.pixel_shuffle(self.head(F.silu(h)), 2)  # [B, C, H, W], v of Salimans & Ho 2022
        return self.diffusion.q_sample(net.float(), t, xt)  # signal * net + noise * xt


def read_idx(file):
    """An IDX file of bytes, raw or gzipped, as uint8 [n] or [n, height, width]. ValueError."""
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: {error}; delete it to download it again") from error
    head = 4 + 4 * int.from_bytes(raw[3:4])
    shape = [int.from_bytes(raw[k : k + 4]) for k in range(4, head, 4)]
    if raw[:3] != b"\0\0\x08" or len(raw) != head + math.prod(shape):
        raise ValueError(f"{file}: not an IDX file of bytes, or cut off; delete it")
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=head).reshape(shape))


def download(name, file):
    """One MNIST file from the first mirror whose bytes are right. OSError says what failed."""
    reasons = []
    for mirror in MIRRORS:
        try:
            with urlopen(f"{mirror}{name}.gz", timeout=15) as reply:
                size = int(reply.headers.get("Content-Length", 0))
                with tqdm.wrapattr(reply, "read", size, desc=name) as body:
                    packed = body.read()
            if hashlib.sha256(gzip.decompress(packed)).hexdigest() != FILES[name]:
                raise ValueError("wrong SHA-256")
            return save(file, lambda path: path.write_bytes(packed))
        except (OSError, EOFError, zlib.error, HTTPException, ValueError) as error:
            reasons.append(f"{mirror}: {error!r}")
    raise OSError("; ".join(reasons))


def load_mnist(path):
    """Images uint8 [n, 28, 28] and labels [n] to train on, the same two to test on, and the folder
    they came from: `path`, downloaded if missing, or data/mnist5k. OSError or ValueError."""
    path, small = Path(path), Path(__file__).parent / "data" / "mnist5k"

    def find(folder, name):
        return next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)

    path.mkdir(parents=True, exist_ok=True)
    try:
        for name in FILES:
            if not find(path, name):
                download(name, path / f"{name}.gz")
    except OSError as error:
        if not all(find(small, name) for name in FILES):
            raise OSError(f"put {', '.join(FILES)} there, gzipped or not; {error}") from error
        print(f"no MNIST ({error}); going on with the 5,000 digits of {small}", file=sys.stderr)
        path = small
    files = [find(path, name) for name in FILES]
    arrays = [read_idx(file) for file in files]
    for k, shape in enumerate((arrays[0].shape, arrays[2].shape)):
        if shape[1:] != (28, 28) or not shape[0]:
            raise ValueError(f"{files[2 * k]}: shape {list(shape)} is not [n, 28, 28]")
        if arrays[2 * k + 1].shape != shape[:1]:
            raise ValueError(f"{files[2 * k + 1]}: not one label for each of {shape[0]} images")
    return arrays[0], arrays[1].long(), arrays[2], arrays[3].long(), path


def save(path, write):
    """Write to a temporary file beside path, then rename: a kill leaves the old file or the new."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    temporary.replace(path)


def to_bytes(x):
    """Images [n, 1, H, W] in [-1, 1] as uint8 [n, H, W]."""
    return ((x[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def train(args, net, ema, x, y, saved, fail):
    """Algorithm 1 until the budget is used, or Ctrl-C. Returns the log."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    x, y = x[rank::world], y[rank::world]  # each rank its own part
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99))
    parts, log = {"net": net, "ema": ema, "optimizer": optimizer}, saved["log"]
    if args.resume:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    start = time.time() - (log[-1][3] if log else 0)

    def keep():
        if rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"config": saved["config"], "log": log}
            save(args.out / "model.pt", lambda path: torch.save({"ddpm_mnist": state}, path))

    bar = tqdm(desc="train", total=args.steps, initial=len(log), disable=rank > 0)
    try:
        while True:
            used = (time.time() - start) / 60 / args.minutes  # the budget, from 0 to 1
            used = torch.tensor((len(log) + 0.5) / args.steps if args.steps else used)
            if world > 1:
                dist.broadcast(used := used.to(x.device), 0)  # one clock for all
            if used >= 1:
                break
            lr = args.lr * min(1, 20 * used.item()) * (1 - used.item())  # warm-up and decay
            optimizer.param_groups[0]["lr"] = lr
            # seeded by the step, so that a resumed run draws what an uninterrupted one would
            torch.manual_seed((args.seed * world + rank) * 10**8 + len(log))
            pick = torch.randint(len(x), (args.batch_size,), device=x.device)
            hide = torch.rand(pick.shape, device=x.device) < 0.1  # for guidance
            label = y[pick].masked_fill(hide, net.classes)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp == "on"):
                loss = net.diffusion.p_losses(model, x[pick], label)
            if not loss.isfinite():
                fail(f"--lr {args.lr}: loss {loss:g} at step {len(log) + 1}; use a lower one")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(net)  # after the step
            log.append([len(log) + 1, loss.item(), lr, time.time() - start])
            bar.update()
            if len(log) % args.save_every == 0:
                bar.set_postfix_str(f"loss {np.mean(np.array(log)[-500:, 1]):.4f}")
                keep()
    except KeyboardInterrupt:
        print(f"\nstopped at step {len(log)}; going on with what was learned")
    bar.close()
    keep()
    return log


def _tile(images, columns):
    """Images [n, H, W] as one picture of rows of `columns`."""
    rows = images.unflatten(0, (-1, columns))  # [rows, columns, H, W]
    return rows.transpose(1, 2).flatten(0, 1).flatten(1)


def draw(args, diffusion, real, film, log, terms):
    """The four pictures; real images [100], film: states of 100 samples, terms: L_t by t."""
    steps = len(film) - 1
    shown = [round(k * steps / 9) for k in range(10)]  # states x_T .. x_0
    times = [round(args.T * (steps - k) / steps) for k in shown]
    x0 = real[:1].cpu()
    forward = [
        diffusion.cpu().q_sample(x0, torch.tensor([t]), torch.randn(x0.shape)) for t in times
    ]
    pictures = [to_bytes(x)[0] for x in forward[::-1]] + [film[k][0] for k in shown]
    figure, axis = plt.subplots(figsize=(10, 2.3), layout="constrained")
    axis.imshow(_tile(torch.stack(pictures), 10), "gray")
    axis.set(yticks=[13, 41], yticklabels=["q(x_t | x_0)", "p, sampling"])
    axis.set_xticks(range(13, 280, 28), [f"t = {t}" for t in times])
    save(args.out / "diffusion_process.png", partial(figure.savefig, dpi=120))
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.3), layout="constrained")
    for axis, title, images in zip(axes, ("data", "samples"), (to_bytes(real), film[-1])):
        axis.imshow(_tile(images, 10), "gray")
        axis.set(title=title)
        axis.axis("off")
    save(args.out / "results.png", partial(figure.savefig, dpi=120))
    figure, axis = plt.subplots(figsize=(4, 4), layout="constrained")
    image = axis.imshow(_tile(film[0], 10), "gray")
    axis.axis("off")
    frames = film[:: max(1, steps // 50)] + [film[-1]] * 15
    movie = FuncAnimation(figure, lambda k: image.set_data(_tile(frames[k], 10)), len(frames))
    save(args.out / "sampling.gif", lambda path: movie.save(path, PillowWriter(fps=12)))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    loss = np.array(log).reshape(-1, 4)[:, 1]
    width = min(len(loss), 100)
    axes[0].semilogy(np.convolve(loss, np.ones(width) / width, "valid") if width else loss)
    axes[1].loglog(range(len(terms)), terms.tolist())
    axes[2].plot(torch.stack([diffusion.signal, diffusion.noise], 1).cpu())
    titles = ("loss, by step", "bits/dim, by t", "signal and noise, by t")
    for axis, title in zip(axes, titles):
        axis.set_title(title)
    save(args.out / "training.png", figure.savefig)
    plt.close("all")


def main(argv=None):
    """Train, go on or load; sample, evaluate and draw. Returns the metrics, on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message.splitlines()[0]}\n")
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="of training")
    add("--steps", type=int, help="of training, instead of --minutes")
    add("--batch-size", type=int, default=32, help="images per step on each GPU or process")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--width", type=int, default=64, help="channels at half size, a multiple of 8")
    add("--T", type=int, default=1000, help="steps of the diffusion, 21 to 10000")
    add("--schedule", default="cosine", help="linear, cosine or sigmoid")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--amp", choices=["auto", "on", "off"], default="auto", help="bfloat16 where it is faster")
    add("--data", default="data/mnist", help="folder of the four IDX files")
    add("--n", type=int, default=100, help="samples to draw, in turn of each class; 10 or more")
    add("--sample-steps", type=int, default=50, help="of DDIM; 0 for all T of Algorithm 2")
    add("--guidance", type=float, default=1.0, help="scale s; 0 ignores the label")
    add("--test-images", type=int, default=128, help="for bits per dimension; 0 to skip that")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--out", type=Path, default="runs/ddpm_mnist", help="folder for all files")
    add("--resume", action="store_true", help="go on with the model.pt in --out")
    add("--load", type=Path, help="a model.pt to sample from, without training")
    args = parser.parse_args(argv)
    ranges = {"minutes": (1e-3, 1e5), "steps": (1, 10**8), "batch_size": (1, 10**5)}
    ranges |= {"lr": (1e-9, 1), "width": (8, 4096), "seed": (0, 10**6), "n": (10, 10**6)}
    ranges |= {"sample_steps": (0, args.T), "guidance": (-100, 100), "test_images": (0, 10_000)}
    ranges |= {"save_every": (1, 10**8)}
    rank, local = int(os.environ.get("RANK", 0)), os.environ.get("LOCAL_RANK", "0")
    try:
        for flag, (low, high) in ranges.items():
            if vars(args)[flag] is not None and not low <= vars(args)[flag] <= high:
                raise ValueError(f"choose {low} to {high}")
        flag, cuda = "device", torch.cuda.is_available()
        auto = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
        args.device = auto if args.device == "auto" else args.device
        device = torch.device(f"cuda:{local}" if args.device == "cuda" else args.device)
        torch.zeros(1, device=device)
        if args.amp == "auto":
            cpu = getattr(torch.cpu, "get_capabilities", dict)()
            fast = cuda if device.type == "cuda" else cpu.get("avx512_bf16") or cpu.get("amx_bf16")
            args.amp = "on" if fast and device.type != "mps" else "off"
        flag = "resume" if args.resume else "load"
        file = args.out / "model.pt" if args.resume else args.load
        keys = ("T", "schedule", "width") + ("batch_size", "lr", "seed", "amp") * args.resume
        saved = {"config": {}, "log": []}
        if file:
            saved = torch.load(file, "cpu", weights_only=True)["ddpm_mnist"]
        for key in keys if file else ():
            if vars(args)[key] not in (saved["config"][key], parser.get_default(key)):
                flag = key
                raise ValueError(f"{file} has {saved['config'][key]}; leave the flag out")
            setattr(args, key, saved["config"][key])
        flag = "schedule"
        beta_schedule(args.schedule, 1000)
        flag = "T"
        diffusion = Diffusion(args.T, args.schedule).to(device)
        flag = "data"
        *data, args.data = load_mnist(args.data)
        x, y, test_x, test_y = (array.to(device) for array in data)
        x, test_x = (images[:, None] / 127.5 - 1 for images in (x, test_x))  # [n, 1, 28, 28]
        flag = "width"
        torch.manual_seed(args.seed)
        net = UNet(diffusion, classes=int(y.max()) + 1, width=args.width).to(device)
        # the mean over about the last twentieth of all steps: Karras et al. 2024, Eq. (1)
        ema = AveragedModel(net, avg_fn=lambda ema, new, n: ema.lerp(new, 20 / (20 + n)))
        flag = "load"
        if args.load:
            ema.load_state_dict(saved["ema"])
        flag = "out"
        args.out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of the flag being checked; torch.load alone raises a dozen kinds
        parser.error(f"--{flag.replace('_', '-')} {vars(args)[flag]}: {str(error) or repr(error)}")
    saved["config"] = {key: vars(args)[key] for key in ("T", "schedule", "width")}
    saved["config"] |= {key: vars(args)[key] for key in ("batch_size", "lr", "seed", "amp")}
    world = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    log = saved["log"] if args.load else train(args, net, ema, x, y, saved, parser.error)
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return {}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "on"):
        torch.manual_seed(args.seed)
        xT = torch.randn(args.n, 1, 28, 28, device=device)
        labels = torch.arange(args.n, device=device) % net.classes
        loop = partial(diffusion.p_sample_loop, ema.module, guidance=args.guidance)
        if args.sample_steps:
            ddim = partial(diffusion.ddim_sample_loop, steps=args.sample_steps)
            loop = partial(ddim, ema.module, guidance=args.guidance)
        loops = [loop(x, y=label) for x, label in zip(xT.split(250), labels.split(250))]
        film, bar = [], tqdm(zip(*loops), "sample", (args.sample_steps or args.T) + 1)
        for states in bar:  # x_T, ..., x_0
            film.append(to_bytes(torch.cat(states))[: args.n // 10 * 10][:100])
        samples = to_bytes(torch.cat(states))
        pick, bounds = torch.randperm(len(test_x), device=device)[: args.test_images], []
        for part in tqdm(pick.tensor_split(16) if args.test_images else [], "bound"):
            bounds.append(diffusion.variational_bound(ema.module, test_x[part], test_y[part]))
    metrics = {"script": "ddpm_mnist", "loss": np.mean(log[-500:], 0)[1] if log else None}
    if bounds:  # -log p(x) <= -log p(x | y) - log p(y)
        bits = (torch.stack(bounds).sum(1) + math.log(net.classes)) / (784 * math.log(2))
        metrics["bits_per_dim"] = bits.mean().item()
        metrics["bits_per_dim_error"] = bits.std().item() / 4
    seconds = log[-1][3] if log else 0
    metrics |= {"train_seconds": seconds, "sample_seconds": bar.format_dict["elapsed"]}
    speed = len(log) * args.batch_size * world / seconds if log else 0
    metrics |= {"images_per_second": speed, "dataset": args.data.name, "train_images": len(x)}
    metrics["parameters"] = sum(p.numel() for p in net.parameters())
    for key, value in metrics.items():
        print(f"{key:20} {value}")
    metrics |= {"torch": torch.__version__, **vars(args), "steps": len(log)}
    draw(
        args, diffusion, test_x[:100], film, log, sum(bounds).div(16) if bounds else torch.zeros(1)
    )
    save(args.out / "samples.npy", lambda path: np.save(path.open("wb"), samples.numpy()))
    save(args.out / "labels.npy", lambda path: np.save(path.open("wb"), labels.cpu().numpy()))
    text = json.dumps(metrics, indent=1, default=str)
    save(args.out / "metrics.json", lambda path: path.write_text(text))
    print(f"files are in {args.out}")
    return metrics


if __name__ == "__main__":
    main()
