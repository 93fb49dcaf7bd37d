# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.7", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""DDPM (Ho et al. 2020, arXiv 2006.11239) with a U-Net on MNIST, judged in bits per dimension.

python ddpm_mnist.py                                     ten minutes of training, two CPU cores
python ddpm_mnist.py --load weights/ddpm_mnist.pt        a hundred digits in seconds
torchrun --nproc-per-node 8 ddpm_mnist.py --minutes 2    eight GPUs, eight times the batch
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import sys
import timeit
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
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
        """Estimate of x_0 from x_t and predicted noise: Eq. (15). Algorithm 2 does not clip."""
        t = t.view(-1, *[1] * (xt.ndim - 1))
        return ((xt - self.noise[t] * eps) / self.signal[t]).clamp(-1, 1)

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
        """L_0 per pixel in nats: Eq. (13), the mass of N(mean, beta-tilde_2) on x_0 +- 1/255, open
        at -1 and 1 (their code's variance; beta-tilde_1 = 0)."""
        sigma = self.noise[1] / self.noise[2] * self.beta[2].sqrt()
        low = torch.where(x0 < -0.999, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
        high = torch.where(x0 > 0.999, torch.inf, (x0 + 1 / 255 - mean) / sigma)
        low, high = torch.where(x0 > mean, -high, low), torch.where(x0 > mean, -low, high)
        low, high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)  # of the near tail
        return -high - torch.log(-torch.expm1(low - high))


class ResBlock(nn.Module):
    """skip(x) + two convolutions of x; the embedding scales and shifts between them."""

    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.embed = nn.Linear(width, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, emb):
        scale, shift = self.embed(emb)[..., None, None].chunk(2, dim=1)  # [B, outputs, 1, 1]
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """eps_theta(x_t, t, y) of images [B, channels, H, W], H and W divisible by 4; the last label,
    y = classes, means "not told". The best linear guess of eps is noise * x_t if E[x_0^2] = 1 (here
    0.93); the network adds signal * v to it (Salimans & Ho 2022). Skips are added: cheaper."""

    def __init__(self, diffusion, channels=1, classes=10, widths=(32, 64, 128)):
        super().__init__()
        self.diffusion, self.classes, (a, b, c), emb = diffusion, classes, widths, 4 * widths[0]
        self.freq = nn.Buffer(1000 / diffusion.T * 10_000 ** (-torch.arange(32) / 32))
        self.time = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(classes + 1, emb)
        self.waves = nn.Buffer(math.pi * torch.tensor([4, 16, 64])[:, None, None, None])
        self.stem = nn.Conv2d(7 * channels, a, 3, padding=1)  # of x_t, 3 sines and 3 cosines
        self.down = nn.ModuleList(ResBlock(*io, emb) for io in ((a, b), (b, c)))
        self.middle = nn.ModuleList(ResBlock(c, c, emb) for _ in range(2))
        self.norm = nn.GroupNorm(8, c)
        self.qkv, self.mix = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        self.up = nn.ModuleList(ResBlock(*io, emb) for io in ((c, b), (b, a), (a, a)))
        self.head = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, channels, 3, 1, 1))
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)

    def attend(self, h):
        """h + self-attention over all its positions, four heads."""
        qkv = self.qkv(self.norm(h)).unflatten(1, (3, 4, -1)).flatten(4).transpose(3, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(1))  # [B, 4, H W, width / 4]
        return h + self.mix(mixed.transpose(2, 3).reshape(h.shape))

    def forward(self, xt, t, y=None):
        y = torch.full_like(t, self.classes) if y is None else y
        angle = t[:, None] * self.freq
        emb = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(y))
        wave = self.waves * xt[:, None]  # Kingma et al. 2021, faded by E[cos(waves noise eps)]
        fade = torch.exp(-((self.waves * self.diffusion.noise[t].view(-1, 1, 1, 1, 1)) ** 2) / 2)
        wave = torch.cat([fade * wave.sin(), fade * wave.cos()], 1).flatten(1, 2)
        h1 = self.stem(torch.cat([xt, wave], 1))  # [B, 32, H, W]
        h2 = self.down[0](F.avg_pool2d(h1, 2), emb)  # [B, 64, H/2, W/2]
        h3 = self.down[1](F.avg_pool2d(h2, 2), emb)  # [B, 128, H/4, W/4]
        h = self.middle[1](self.attend(self.middle[0](h3, emb)), emb)
        h = self.up[0](h + h3, emb)  # [B, 64, H/4, W/4]
        h = self.up[1](F.interpolate(h, scale_factor=2) + h2, emb)  # [B, 32, H/2, W/2]
        h = self.up[2](F.interpolate(h, scale_factor=2) + h1, emb)  # [B, 32, H, W]
        return self.diffusion.q_sample(self.head(h), t, xt)  # signal * v + noise * xt


def save_atomic(path, write):
    """Write to a temporary file beside path, then rename: a kill leaves the old file or the new."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    temporary.replace(path)


def download(name, file):
    """Fetch one file of MNIST from the first mirror that has it. OSError says what failed."""
    reasons = []
    for mirror in MIRRORS:
        try:
            with urlopen(f"{mirror}{name}.gz", timeout=15) as reply:
                with tqdm.wrapattr(reply, "read", reply.length, desc=name) as body:
                    packed = b"".join(iter(partial(body.read, 2**16), b""))
            if hashlib.sha256(gzip.decompress(packed)).hexdigest() != FILES[name]:
                raise ValueError("wrong SHA-256")
            return save_atomic(file, lambda path: path.write_bytes(packed))
        except Exception as error:  # whatever it is, the next mirror may do
            reasons.append(f"{mirror}: {error!r}")
    raise OSError("; ".join(reasons))


def read_idx(file, *size):
    """The bytes [n, *size] of an IDX file, gzipped or not. ValueError names the file."""
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        magic, n, *found = np.frombuffer(raw[: 8 + 4 * len(size)], ">u4").tolist()
        if (magic, *found) != (0x801 + len(size), *size):
            raise ValueError(f"magic number {magic}, sizes {[n, *found]}")
        return torch.tensor(np.frombuffer(raw, np.uint8, -1, 8 + 4 * len(size)).reshape(n, *size))
    except Exception as error:
        raise ValueError(f"{file} is not IDX data [n{', 28' * len(size)}]: {error}") from error


def load_mnist(path):
    """Images uint8 [n, 28, 28] and labels [n] to train on, the same two to test on, and the folder
    they came from: `path`, filled if need be, or data/mnist5k. OSError or ValueError."""
    folder, small = Path(path), Path(__file__).parent / "data" / "mnist5k"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in FILES:
            if not any(folder.glob(f"{name}*")):
                download(name, folder / f"{name}.gz")
    except OSError as error:
        if not small.is_dir():
            raise OSError(f"put {', '.join(FILES)} there, gzipped or not; {error}") from error
        print(f"no MNIST in {path}, so using the 5,000 digits of {small}: {error}", file=sys.stderr)
        folder = small
    files = [min(folder.glob(f"{name}*")) for name in FILES]
    x, y, test_x, test_y = (read_idx(f, *[28, 28] * ("images" in f.name)) for f in files)
    for file, images, labels in ((files[1], x, y), (files[3], test_x, test_y)):
        if not len(images) == len(labels) > 0:
            raise ValueError(f"{file} has {len(labels)} labels for {len(images)} images")
    return x, y.long(), test_x, test_y.long(), folder


def to_bytes(x):
    """Images [n, 1, H, W] in [-1, 1] as uint8 [n, H, W]."""
    return (x[:, 0].clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu()


def main(argv=None):
    """Train, resume or load; then sample, evaluate and draw. Returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: {text}\n")
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="of training")
    add("--steps", type=int, help="of training, instead of --minutes")
    add("--batch-size", type=int, default=64, help="images per training step, in each process")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--T", type=int, default=1000, help="steps of the diffusion, 21 to 10000")
    add("--schedule", default="cosine", choices=["linear", "cosine", "sigmoid"], help="of beta_t")
    add("--n", type=int, default=100, help="samples to draw, the classes in turn")
    add("--sample-steps", type=int, default=50, help="of DDIM; 0 for all T of Algorithm 2")
    add("--eta", type=float, default=2.0, help="noise of DDIM: 0 is none, 1 that of DDPM")
    add("--guidance", type=float, default=1.0, help="scale s; 0 is without labels")
    add("--test-images", type=int, help="for bits per dimension, by 8 (64; with --load 0)")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of all randomness")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--amp", default="auto", choices=["auto", "on", "off"], help="bfloat16; auto: if faster")
    add("--data", default="data/mnist", help="folder of the four IDX files")
    add("--out", type=Path, default="runs/ddpm_mnist", help="folder for all files")
    add("--load", type=Path, help="a model.pt to sample from, with its own T and schedule")
    add("--resume", action="store_true", help="go on with the model.pt in --out")
    args = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
    kept = ("T", "schedule", "batch_size", "lr", "seed", "amp")  # --resume: all; --load: first two
    least = dict(minutes=1e-3, steps=1, batch_size=1, lr=1e-9, n=10, guidance=-99, save_every=1)
    try:
        for flag, value in vars(args).items():
            if type(value) in (int, float) and not least.get(flag, 0) <= value <= 10**9:
                raise ValueError(f"use {least.get(flag, 0)} or more")
        flag, auto = "device", torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.zeros(1, device=auto if args.device == "auto" else args.device).device
        if world > 1 and device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        flag, file = ("resume", args.out / "model.pt") if args.resume else ("load", args.load)
        saved = torch.load(file, device, weights_only=True) if file else {"ddpm_mnist": {}}
        if "ddpm_mnist" not in saved:
            raise ValueError("it is not a checkpoint of this script")
        saved = saved["ddpm_mnist"]
        made = {key: saved["config"][key] for key in kept[: 6 if args.resume else 2] if file}
        parser.set_defaults(test_images=0 if args.load else 64, **made)
        args = parser.parse_args(argv)
        for flag, value in made.items():
            if vars(args)[flag] != value:
                raise ValueError(f"{file} was made with {value}; leave it out")
        flag = "T"
        torch.manual_seed(args.seed)
        diffusion = Diffusion(args.T, args.schedule).to(device)
        flag = "sample_steps"
        if args.sample_steps > args.T:
            raise ValueError(f"use {args.T} at most, which is T")
        flag = "data"
        *data, folder = load_mnist(args.data)
        x, y, test_x, test_y = (array.to(device) for array in data)
        x, test_x = (images[:, None] / 127.5 - 1 for images in (x, test_x))  # [n, 1, 28, 28]
        flag = "resume" if args.resume else "load"
        net = UNet(diffusion, classes=int(y.max()) + 1).to(device)
        # a mean over the last twentieth or so of all steps (Karras et al. 2024, Sec. 3.1)
        mix = lambda old, new, n: get_ema_multi_avg_fn(float(n / (20 + n)))(old, new, n)
        ema = AveragedModel(net, multi_avg_fn=mix)
        optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), fused=True)
        if file:
            ema.load_state_dict(saved["ema"])
        if args.resume:
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
        flag = "out"
        args.out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of the flag being checked; torch.load alone raises a dozen kinds
        reason = (str(error) or repr(error)).splitlines()[0]
        parser.error(f"--{flag.replace('_', '-')} {vars(args)[flag]}: {reason}; see --help")
    clock = lambda x: min(timeit.repeat(lambda: x @ x, number=1, repeat=9))  # seconds
    fast = {"cuda": True, "cpu": clock(torch.eye(256).bfloat16()) < clock(torch.eye(256))}
    amp = args.amp == "on" or args.amp == "auto" and fast.get(device.type, False)
    amp = saved.get("amp", amp) if args.resume else amp  # whatever is faster on this machine
    autocast = partial(torch.autocast, device.type, torch.bfloat16, amp)
    learner, model, log = net, ema.module, saved.get("log", [])
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        learner = nn.parallel.DistributedDataParallel(net)
        x, y = x[rank::world], y[rank::world]  # each rank its own part

    def keep():
        state = {"ema": ema.state_dict(), "net": net.state_dict(), "log": log, "amp": amp}
        state |= {"optimizer": optimizer.state_dict(), "config": {k: vars(args)[k] for k in kept}}
        save_atomic(args.out / "model.pt", partial(torch.save, {"ddpm_mnist": state}))

    start = timeit.default_timer() - (log[-1][3] if log else 0)
    bar = tqdm(None, f"batch {args.batch_size * world}", args.steps, initial=len(log), disable=rank)
    try:  # Algorithm 1, until the budget is used or Ctrl-C
        while not args.load:
            used = (timeit.default_timer() - start) / 60 / args.minutes  # share of the budget
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
            # label dropout for guidance; t evenly spread (Kingma et al. 2021), every second raised
            label = torch.where(torch.rand(len(pick), device=device) < 0.1, net.classes, y[pick])
            spread = torch.arange(args.batch_size, device=device) * args.T // args.batch_size
            t = (spread + torch.randint(args.T, (1,), device=device)) % args.T + 1
            t[1::2] = (args.T * (t[1::2] / args.T) ** (1 / 3)).ceil().long()  # p = 3t^2/T^3
            t[8::16] = (args.T ** (t[8::16] / args.T)).floor().long()  # p ~ 1/t, as the bits
            with autocast():
                loss = diffusion.p_losses(learner, x[pick], label, t, gamma=2)
            if not loss.isfinite():
                bar.close()
                parser.error(f"--lr {args.lr}: loss {loss} at step {len(log) + 1}; use a lower one")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(net)  # after the step
            log.append([len(log) + 1, loss.item(), lr, timeit.default_timer() - start])
            bar.update()
            if len(log) % args.save_every == 0 and rank == 0:
                bar.set_postfix(loss=np.mean(log[-args.save_every :], 0)[1])
                keep()
    except KeyboardInterrupt:
        print(f"\nstopped at step {len(log)}; going on with what was learned")
    bar.close()
    if world > 1:
        distributed.barrier()  # nobody hangs up on a slower one
        del learner  # DDP that outlives its group deadlocks now and then (over the GIL)
        distributed.destroy_process_group()
    if rank > 0:
        return {}
    if not args.load:
        keep()

    torch.manual_seed(args.seed)  # sample
    xT = torch.randn(args.n, 1, 28, 28, device=device)
    label = torch.arange(args.n, device=device) % net.classes
    ddim = partial(diffusion.ddim_sample_loop, steps=args.sample_steps, eta=args.eta)
    loop = ddim if args.sample_steps else diffusion.p_sample_loop
    chunks = zip(xT.split(250), label.split(250))
    with autocast():
        loops = [loop(model, part, y=y, guidance=args.guidance) for part, y in chunks]
        bar = tqdm(zip(*loops), "sample", (args.sample_steps or args.T) + 1)  # x_T, ..., x_0
        film, took = [to_bytes(x0 := torch.cat(x))[:100] for x in bar], bar.format_dict["elapsed"]
        # evaluate on random test images, in 8 groups: their spread gives the standard error
        pick, bounds = torch.randperm(len(test_x), device=device)[: args.test_images // 8 * 8], []
        for part in tqdm(pick.view(8, -1) if len(pick) else (), "bound"):
            bounds.append(diffusion.variational_bound(model, test_x[part], test_y[part]))
    loss, seconds = np.array(log).reshape(-1, 4).T[[1, 3]]
    metrics = {"script": "ddpm_mnist", **vars(args), "device": str(device), "steps": len(log)}
    metrics |= {"amp": amp, "torch": torch.__version__, "dataset": folder.name}
    metrics |= {"train_images": len(data[0]), "sample_seconds": took}
    metrics["parameters"] = sum(p.numel() for p in net.parameters())
    if log:
        metrics |= {"loss": loss[-500:].mean(), "train_seconds": seconds[-1]}
        metrics["images_per_second"] = len(log) * args.batch_size * world / seconds[-1]
    if bounds:  # -log p(x) <= -log p(x | y) - log p(y), and p(y) = 1 / classes
        bits = (torch.stack(bounds).sum(1) + math.log(net.classes)) / math.log(2) / 784
        metrics["bits_per_dim"] = bits.mean().item()
        metrics["bits_per_dim_error"] = bits.std().item() / 8**0.5

    def tile(x):  # ten a row
        x = x[: len(x) // 10 * 10].unflatten(0, (-1, 10))  # [rows, 10, H, W]
        return x.transpose(1, 2).flatten(0, 1).flatten(1).numpy()

    k = torch.linspace(0, len(film) - 1, 10).round()  # draw ten states of the path
    times = (args.T * (1 - k / k[-1])).round().long()
    noised = diffusion.cpu().q_sample(test_x[:1].cpu().expand(10, -1, -1, -1), times, xT[:1].cpu())
    figure, axis = plt.subplots(figsize=(10, 2.4), layout="constrained")
    axis.imshow(tile(torch.cat([to_bytes(noised), *(film[i][:1] for i in k.int())])), "gray")
    axis.set_xticks(range(14, 280, 28), [f"t = {t}" for t in times])
    axis.set_yticks([14, 42], ["q(x_t | x_0)", "sampling"])
    save_atomic(args.out / "diffusion_process.png", figure.savefig)
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for axis, x, title in zip(axes, (to_bytes(test_x[:100]), film[-1]), ("test set", "samples")):
        axis.imshow(tile(x), "gray")
        axis.set(title=title, xticks=[], yticks=[])
    save_atomic(args.out / "results.png", figure.savefig)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    axes[0].plot(loss, lw=0.1)
    if bounds:
        axes[1].semilogy(sum(bounds).cpu().numpy() / 8)
    axes[2].plot(torch.stack([diffusion.signal, diffusion.noise], 1).numpy())
    for axis, title in zip(axes, ("loss, by step", "L_t in nats, by t", "signal and noise, by t")):
        axis.set_title(title)
    save_atomic(args.out / "training.png", figure.savefig)
    plt.close("all")
    for name, array in (("samples", to_bytes(x0)), ("labels", label.cpu())):
        save_atomic(args.out / f"{name}.npy", lambda path: np.save(path, array.numpy()))
    form = {"fmt": "%.6g", "delimiter": ",", "header": "step,loss,lr,seconds", "comments": ""}
    save_atomic(args.out / "log.csv", lambda path: np.savetxt(path, log, **form))
    text = json.dumps(metrics, indent=1, default=str)
    save_atomic(args.out / "metrics.json", lambda path: path.write_text(text))
    print(text, f"files in {args.out}", sep="\n")
    return metrics


if __name__ == "__main__":
    main()
