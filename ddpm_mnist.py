# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""DDPM (Ho et al. 2020, arXiv 2006.11239) with a U-Net on MNIST, judged in bits per dimension.

python ddpm_mnist.py                                        ten minutes, on two CPU cores
python ddpm_mnist.py --load weights/ddpm_mnist.pt --n 100   a hundred digits in seconds
torchrun --nproc-per-node 8 ddpm_mnist.py --minutes 2       eight GPUs, eight times the batch
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

FLAGS = {  # name: (default, (least, most) or the choices, what it is)
    "steps": (None, (1, 10**9), "training steps, instead of --minutes"),
    "minutes": (10.0, (0.001, 1e6), "training time"),
    "batch-size": (32, (1, 10**6), "images per training step, in each process"),
    "lr": (0.002, (1e-9, 1), "peak learning rate"),
    "T": (1000, (21, 10_000), "diffusion steps, 21 to 10000"),
    "schedule": ("cosine", ("linear", "cosine", "sigmoid"), "of the noise"),
    "n": (100, (10, 10**6), "samples to draw, the classes in turn"),
    "sample-steps": (50, (0, 10_000), "of DDIM, T at most; 0 for all T of Algorithm 2"),
    "guidance": (1.0, (-99, 99), "scale s; 0 is without labels"),
    "test-images": (128, (0, 10_000), "for the bits per dimension, 16 or more; 0 to skip them"),
    "save-every": (500, (1, 10**9), "steps between checkpoints"),
    "seed": (0, (0, 10**6), "of all randomness"),
    "amp": ("auto", ("auto", "on", "off"), "bfloat16 arithmetic; auto is where it is faster"),
    "device": ("auto", None, "auto, cpu, cuda or mps"),
    "data": ("data/mnist", None, "folder of the four IDX files, downloaded if missing"),
    "load": ("", None, "model.pt to sample from, without training"),
    "out": ("runs/ddpm_mnist", None, "folder for the results"),
}
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


def read_idx(file, *size):
    """The array [n, *size] of bytes in an IDX file, gzipped or not. ValueError names the file."""
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        magic, n, *found = np.frombuffer(raw[: 8 + 4 * len(size)], ">u4").tolist()
        if (magic, *found) != (0x801 + len(size), *size):
            raise ValueError(f"magic number {magic}, sizes {[n, *found]}")
        array = np.frombuffer(raw, np.uint8, offset=8 + 4 * len(size)).reshape(n, *size)
    except Exception as error:
        raise ValueError(f"{file} is not IDX data [n{', 28' * len(size)}]: {error}") from error
    return torch.tensor(array)


def download(name, file):
    """Fetch one file of MNIST from the first mirror that has it. OSError says what failed."""
    reasons = []
    for mirror in MIRRORS:
        try:
            with urlopen(f"{mirror}{name}.gz", timeout=15) as reply:
                size = int(reply.headers["Content-Length"] or 0)
                with tqdm.wrapattr(reply, "read", size, desc=name) as body:
                    packed = b"".join(iter(partial(body.read, 2**16), b""))
            if hashlib.sha256(gzip.decompress(packed)).hexdigest() != FILES[name]:
                raise ValueError("wrong SHA-256")
            return save(file, lambda path: path.write_bytes(packed))
        except Exception as error:  # whatever it is, the next mirror may do
            reasons.append(f"{mirror}: {error!r}")
    raise OSError("; ".join(reasons))


def load_mnist(path):
    """Images uint8 [n, 28, 28] and labels [n] to train on, the same two to test on, and the folder
    they came from: `path`, filled if need be, or data/mnist5k. OSError or ValueError."""
    folder, small = Path(path), Path(__file__).parent / "data" / "mnist5k"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in FILES:
            if not [*folder.glob(f"{name}*")]:
                download(name, folder / f"{name}.gz")
    except OSError as error:
        if not small.is_dir():
            raise OSError(f"put {', '.join(FILES)} there, gzipped or not; {error}") from error
        print(f"no MNIST in {path}, using the 5,000 digits of {small}: {error}", file=sys.stderr)
        folder = small
    files = [min(folder.glob(f"{name}*")) for name in FILES]
    x, y, test_x, test_y = (read_idx(f, *[28, 28] * ("images" in f.name)) for f in files)
    for file, images, labels in ((files[1], x, y), (files[3], test_x, test_y)):
        if not len(images) == len(labels) > 0:
            raise ValueError(f"{file} has {len(labels)} labels for {len(images)} images")
    return x, y.long(), test_x, test_y.long(), folder


def save(path, write):
    """Write to a temporary file beside path, then rename: a kill leaves the old file or the new."""
    temporary = path.with_name(f".{os.getpid()}{path.name}")
    write(temporary)
    temporary.replace(path)


def to_bytes(x):
    """Images [n, 1, H, W] in [-1, 1] as uint8 [n, H, W]."""
    return (x[:, 0].clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu()


def show(path, *panels):
    """Draw panels (title, images [n, H, W]), ten images a row; returns the figure and a setter."""

    def tile(images):
        rows = images[: len(images) // 10 * 10].unflatten(0, (-1, 10))  # [rows, 10, H, W]
        return rows.transpose(1, 2).flatten(0, 1).flatten(1)  # [rows H, 10 W]

    figure, axes = plt.subplots(1, len(panels), squeeze=False, layout="constrained")
    for axis, (title, images) in zip(axes[0], panels):
        drawn = axis.imshow(tile(images), "gray")
        axis.set(title=title, xticks=[], yticks=[])
    save(path, partial(figure.savefig, dpi=150))
    return figure, lambda images: drawn.set_data(tile(images))


def main(argv=None):
    """Train, resume or load; then sample, evaluate and draw. Returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: {text.splitlines()[0]}\n")
    for flag, (default, limits, text) in FLAGS.items():
        kind = int if default is None else type(default)
        choices = limits if kind is str else None
        parser.add_argument(f"--{flag}", type=kind, default=default, choices=choices, help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the model.pt in --out")
    args = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
    out, saved = Path(args.out), {"config": {}, "log": []}
    mps, cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    try:
        for flag, (default, limits, _) in FLAGS.items():
            value = vars(args)[flag.replace("-", "_")]
            if value != default and not isinstance(value, str):
                if not limits[0] <= value <= limits[1]:
                    raise ValueError(f"use {limits[0]} to {limits[1]}")
        flag = "device"
        best = "cuda" if cuda else "mps" if mps else "cpu"
        device = torch.device(best if args.device == "auto" else args.device)
        if world > 1 and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device)
        flag, file = ("resume", out / "model.pt") if args.resume else ("load", args.load)
        if file:
            saved = torch.load(file, "cpu", weights_only=True)["ddpm_mnist"]
        for flag, value in saved["config"].items():
            if flag in ("T", "schedule") or args.resume:
                if vars(args)[flag] not in (value, parser.get_default(flag)):
                    raise ValueError(f"{file} has {value}; leave the flag out")
                setattr(args, flag, value)
        flag = "sample_steps"
        if args.sample_steps > args.T:
            raise ValueError(f"use at most T, which is {args.T}")
        flag = "data"
        *data, folder = load_mnist(args.data)
        x, y, test_x, test_y = (array.to(device) for array in data)
        x, test_x = (images[:, None] / 127.5 - 1 for images in (x, test_x))  # [n, 1, 28, 28]
        flag = "resume" if args.resume else "load"
        torch.manual_seed(args.seed)
        diffusion = Diffusion(args.T, args.schedule).to(device)
        net = UNet(diffusion, classes=int(y.max()) + 1).to(device)
        # a mean over the last twentieth or so of all steps (Karras et al. 2024, Sec. 3.1)
        ema = AveragedModel(net, avg_fn=lambda mean, new, n: mean.lerp(new, 20 / (20 + n)))
        optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99))
        parts = {"ema": ema, "net": net, "optimizer": optimizer}
        for name in list(parts)[: 3 if args.resume else 1] if file else ():
            parts[name].load_state_dict(saved[name])
        flag = "out"
        out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of the flag being checked; torch.load alone raises a dozen kinds
        value = vars(args)[flag.replace("-", "_")]
        parser.error(f"--{flag.replace('_', '-')} {value}: {str(error) or repr(error)}")
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    fast = {"cuda": cuda, "cpu": cpu.get("avx512_bf16") or cpu.get("amx_bf16")}.get(device.type)
    amp = bool(fast) if args.amp == "auto" else args.amp == "on"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, amp)
    log, learner, (model, *_) = saved["log"], net, ema.children()
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        learner = nn.parallel.DistributedDataParallel(net)
        x, y = x[rank::world], y[rank::world]  # each rank its own part

    def keep():
        config = {key: vars(args)[key] for key in ("T", "schedule", "batch_size", "lr", "seed")}
        state = {name: part.state_dict() for name, part in parts.items()}
        state = {"ddpm_mnist": state | {"config": config, "log": log}}
        save(out / "model.pt", lambda path: torch.save(state, path))

    start = time.time() - (log[-1][3] if log else 0)
    bar = tqdm(desc="train", total=args.steps, initial=len(log), disable=rank > 0)
    try:  # Algorithm 1, until the budget is used or Ctrl-C
        while not args.load:
            used = (time.time() - start) / 60 / args.minutes  # of the budget, from 0 to 1
            used = torch.tensor((len(log) + 0.5) / args.steps if args.steps else used)
            if world > 1:
                distributed.broadcast(used := used.to(device), 0)  # one clock for all
            if used >= 1:
                break
            lr = args.lr * min(1, 20 * used.item()) * (1 - used.item())  # warm-up, then decay
            optimizer.param_groups[0]["lr"] = lr
            # a seed for each step: a resumed run draws what an uninterrupted one would have
            torch.manual_seed((args.seed * world + rank) * 10**9 + len(log))
            pick = torch.randint(len(x), (args.batch_size,), device=device)
            hide = torch.rand(args.batch_size, device=device) < 0.1  # labels, for guidance
            with autocast():
                loss = diffusion.p_losses(learner, x[pick], y[pick].masked_fill(hide, net.classes))
            if not loss.isfinite():
                parser.error(f"--lr {args.lr}: loss {loss} at step {len(log) + 1}; use a lower one")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(net)  # after the step
            log.append([len(log) + 1, loss.item(), lr, time.time() - start])
            bar.update()
            if len(log) % args.save_every == 0 and rank == 0:
                bar.set_postfix(loss=np.mean(log[-args.save_every :], 0)[1])
                keep()
    except KeyboardInterrupt:
        print(f"\nstopped at step {len(log)}; going on with what was learned")
    bar.close()
    if world > 1:
        distributed.destroy_process_group()
    if rank > 0:
        return {}
    if not args.load:
        keep()

    torch.manual_seed(args.seed)
    xT = torch.randn(args.n, 1, 28, 28, device=device)
    label = torch.arange(args.n, device=device) % net.classes
    steps, loop = args.sample_steps or args.T, diffusion.p_sample_loop
    if args.sample_steps:
        loop = partial(diffusion.ddim_sample_loop, steps=steps)
    loop = partial(loop, model, guidance=args.guidance)
    film, bounds = [], []
    with autocast():
        loops = [loop(part, y=y) for part, y in zip(xT.split(250), label.split(250))]
        for parts in (bar := tqdm(zip(*loops), "sample", steps + 1)):  # x_T, ..., x_0
            samples = to_bytes(torch.cat(parts))
            film.append(samples[:100])
        # the bound, on random test images in 16 groups, whose spread gives the standard error
        pick = torch.randperm(len(test_x), device=device)[: args.test_images]
        for part in tqdm(pick.tensor_split(16) if args.test_images else (), "bound"):
            bounds.append(diffusion.variational_bound(model, test_x[part], test_y[part]))
    loss, seconds = np.array(log).reshape(-1, 4).T[[1, 3]]
    metrics = {"script": "ddpm_mnist", **vars(args), "device": str(device), "steps": len(log)}
    metrics |= {"amp": amp, "torch": torch.__version__, "dataset": folder.name}
    metrics |= {"train_images": len(data[0]), "train_seconds": seconds.max(initial=0)}
    metrics |= {"parameters": sum(p.numel() for p in net.parameters()), "loss": loss[-500:].mean()}
    metrics["images_per_second"] = len(log) * args.batch_size * world / seconds.max(initial=1)
    metrics["sample_seconds"] = bar.format_dict["elapsed"]
    if bounds:  # -log p(x) <= -log p(x | y) - log p(y), and p(y) = 1 / classes
        bits = (torch.stack(bounds).sum(1) + math.log(net.classes)) / math.log(2) / 784
        metrics |= {"bits_per_dim": bits.mean().item(), "bits_per_dim_error": bits.std().item() / 4}
    k = torch.linspace(0, steps, 10).round().int()  # ten states of the path
    times = (args.T * (steps - k) / steps).round().long()
    noised = diffusion.cpu().q_sample(test_x[:1].cpu().expand(10, -1, -1, -1), times, xT[:10].cpu())
    rows = torch.cat([to_bytes(noised), torch.stack([film[i][0] for i in k])])
    title = f"q(x_t | x_0) above, sampling below, t = {', '.join(map(str, times.tolist()))}"
    show(out / "diffusion_process.png", (title, rows))
    figure, move = show(
        out / "results.png", ("data", to_bytes(test_x[:100])), ("samples", samples[:100])
    )
    frames = film[:: max(1, steps // 50)] + [samples[:100]] * 15
    movie = FuncAnimation(figure, lambda i: move(frames[i]), len(frames))
    save(out / "sampling.gif", lambda path: movie.save(path, "pillow", fps=12))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    window = np.ones(min(100, len(log) or 1)) / min(100, len(log) or 1)
    axes[0].plot(np.convolve(loss, window, "valid") if log else loss)
    axes[1].semilogy(sum(bounds).cpu() / 16 if bounds else [])
    axes[2].plot(torch.stack([diffusion.signal, diffusion.noise], 1))
    for axis, title in zip(axes, ("loss, by step", "L_t in nats, by t", "signal and noise, by t")):
        axis.set_title(title)
    save(out / "training.png", figure.savefig)
    plt.close("all")
    for name, array in (("samples.npy", samples), ("labels.npy", label.cpu())):
        save(out / name, lambda path: np.save(path.open("wb"), array.numpy()))
    csv = "\n".join(["step,loss,lr,seconds", *[",".join(map(str, row)) for row in log], ""])
    save(out / "log.csv", lambda path: path.write_text(csv))
    text = json.dumps(metrics, indent=1)
    save(out / "metrics.json", lambda path: path.write_text(text))
    print(text, f"files in {out}", sep="\n")
    return metrics


if __name__ == "__main__":
    main()
