"""DDPM (Ho et al. 2020, arXiv 2006.11239) with a U-Net: MNIST, or your own images.

python ddpm_mnist.py                                  trains: ten minutes on two CPU cores
python ddpm_mnist.py --load weights/ddpm_mnist.pt     a hundred digits in seconds
python ddpm_mnist.py --data mine.npz                  x_train uint8 [n, H, W(, C)], y_train [n]
torchrun --nproc-per-node 8 ddpm_mnist.py             eight GPUs, eight times the batch
"""

import argparse
import os
import zlib
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.image import imsave
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

MNIST = Path(__file__).resolve().parent / "data" / "mnist.npz"
URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
RANK = int(os.environ.get("RANK", 0))  # number of this process, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # number of processes
UNREADABLE = (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, RuntimeError)
UNREADABLE += (AssertionError, BadZipFile, UnpicklingError, zlib.error)  # of np.load, torch.load


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
        self.alpha_bar = alpha_bar.tolist()  # for one step at a time, in double precision
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


def denoiser(net, diffusion, y, guidance=1.0):
    """The model (x_t, t) -> eps for labels y [B]. Guidance is 1 + w of Ho & Salimans 2022, Eq. (6):
    1 is off, 0 ignores y. x_0 is clipped to [-1, 1] and eps adapted, unlike in Algorithm 2."""

    def model(xt, t):
        eps = net(xt, t, y)
        eps = eps if guidance == 1 else torch.lerp(net(xt, t), eps, guidance)  # > 1 extrapolates
        signal = diffusion.signal[t].view(-1, 1, 1, 1)
        noise = diffusion.noise[t].view(-1, 1, 1, 1)
        x0 = ((xt - noise * eps) / signal).clamp(-1, 1)  # DDPM Eq. (15)
        return (xt - signal * x0) / noise

    return model


class ResBlock(nn.Module):
    """skip(x) + two convolutions of x; the embedding [B, 128] scales and shifts between them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.embed = nn.Linear(128, 2 * outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # so that the block starts near skip(x)

    def forward(self, x, emb):
        scale, shift = self.embed(emb)[..., None, None].chunk(2, dim=1)  # [B, outputs, 1, 1]
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """eps_theta(x_t, t, y) of images [B, channels, H, W]; y = classes stands for "not told"."""

    def __init__(self, diffusion, channels=1, classes=10):
        super().__init__()
        self.diffusion = diffusion
        self.classes = classes
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128))
        self.label = nn.Embedding(classes + 1, 128)
        self.stem = nn.Conv2d(channels, 32, 3, padding=1)
        self.down1 = ResBlock(32, 64)
        self.down2 = ResBlock(64, 128)
        self.middle1 = ResBlock(128, 128)
        self.norm = nn.GroupNorm(8, 128)
        self.attention = nn.MultiheadAttention(128, num_heads=4, batch_first=True)
        self.middle2 = ResBlock(128, 128)
        self.up2 = ResBlock(128, 64)
        self.up1 = ResBlock(64, 32)
        self.up0 = ResBlock(32, 32)
        self.head = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, channels, 1))
        nn.init.zeros_(self.head[-1].weight)

    def forward(self, xt, t, y=None):
        y = torch.full_like(t, self.classes) if y is None else y
        angle = t[:, None] * 10_000 ** (-torch.arange(32, device=t.device) / 32)  # [B, 32]
        emb = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(y))
        h1 = self.stem(xt)  # [B, 32, H, W]
        h2 = self.down1(F.avg_pool2d(h1, 2), emb)  # [B, 64, H/2, W/2]
        h3 = self.down2(F.avg_pool2d(h2, 2), emb)  # [B, 128, H/4, W/4]
        h = self.middle1(h3, emb)
        pixels = self.norm(h).flatten(2).mT  # [B, H W / 16, 128]
        attended, _ = self.attention(pixels, pixels, pixels, need_weights=False)
        h = self.middle2(h + attended.mT.reshape(h.shape), emb)
        h = self.up2(h + h3, emb)  # [B, 64, H/4, W/4]; skips are added
        h = self.up1(F.interpolate(h, scale_factor=2) + h2, emb)  # [B, 32, H/2, W/2]
        v = self.head(self.up0(F.interpolate(h, scale_factor=2) + h1, emb))  # [B, channels, H, W]
        # v = signal eps - noise x_0 (Salimans & Ho 2022) and signal^2 + noise^2 = 1, so that
        return self.diffusion.q_sample(v, t, eps=xt)  # eps = signal v + noise x_t


def load_images(path):
    """Images uint8 [n, C, H, W], labels 0, 1, ... [n] and {"shape", "labels"} of an .npz file."""
    if path == MNIST and not path.exists():
        print(f"{path} is missing: downloading {URL}")
        path.parent.mkdir(exist_ok=True)
        torch.hub.download_url_to_file(URL, path, SHA256)
    arrays = np.load(path)
    if "x_train" not in getattr(arrays, "files", []):
        raise ValueError(f"should be an .npz file with an array x_train, but is {arrays!r:.200}")
    x = arrays["x_train"]
    y = arrays.get("y_train", np.zeros(x.shape[:1], int))
    found = f"x_train {x.dtype} {list(x.shape)} and y_train {y.dtype} {list(y.shape)}"
    x = x[..., None] if x.ndim == 3 else x  # [n, H, W, C]
    fits = (x.dtype, x.ndim, y.shape) == (np.uint8, 4, x.shape[:1]) and y.dtype.kind in "iu"
    if not fits or not len(x) or x.shape[1] % 4 or x.shape[2] % 4 or x.shape[3] not in (1, 3):
        wanted = "uint8 [n, H, W] or [n, H, W, 1 or 3], H and W divisible by 4, and n integers"
        raise ValueError(f"{path} holds {found}, but should hold {wanted}")
    labels, y = np.unique(y, return_inverse=True)
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    return x, torch.from_numpy(y), {"shape": list(x.shape[1:]), "labels": labels.tolist()}


def train(args, net, x, y, saved):
    """Algorithm 1, but p(t) = (2 t - 1) / T^2, as noisy steps decide the shape of a digit, and the
    error is that of v. One label in ten is hidden, for guidance. Returns net's moving average."""
    decay = min(0.995, args.steps / (args.steps + 20))  # shorter runs need a shorter memory
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99))
    parts = {"net": net, "ema": average.module, "optimizer": optimizer}
    losses = saved["losses"]  # the same list: what is appended here is saved below
    average.n_averaged += len(losses)  # not saved; at 0 the next update copies net
    for name, part in parts.items() if args.resume else ():
        part.load_state_dict(saved[name])
    learner = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    todo = range(len(losses), args.steps)
    for step in tqdm(todo, "train" if todo else "nothing left to train", disable=RANK > 0):
        torch.manual_seed((args.seed * WORLD + RANK) * 10**7 + step)  # so that --resume is exact
        pick = torch.randint(len(x), (args.batch_size,))
        x0 = x[pick].to(args.device) / 127.5 - 1  # [B, C, H, W]
        label = y[pick].masked_fill(torch.rand(len(pick)) < 0.1, net.classes).to(args.device)
        u = (torch.arange(1, args.batch_size + 1) - torch.rand(1)) / args.batch_size  # stratified
        t = (net.diffusion.T * u.sqrt()).ceil().long().to(args.device)  # P(t <= k) = (k / T)^2
        error = net.diffusion.p_losses(lambda xt, t: learner(xt, t, label), x0, t)
        loss = (error / net.diffusion.signal[t] ** 2).mean()  # of v: eps - eps' = signal (v - v')

        warmup = min(1, 20 * (step + 1) / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * warmup * (1 - step / args.steps)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if not (loss + norm).isfinite():
            raise SystemExit(f"\nloss {loss:g} at step {step}: start again with a lower --lr")
        optimizer.step()
        average.update_parameters(net)
        losses.append(loss.item())
        if RANK == 0 and (len(losses) % 100 == 0 or len(losses) == args.steps):
            file = args.out / "model.part"
            try:
                torch.save(saved | {name: part.state_dict() for name, part in parts.items()}, file)
                file.replace(args.out / "model.pt")  # at once: a kill leaves the old one whole
            except (OSError, RuntimeError) as error:
                file.unlink(missing_ok=True)
                raise SystemExit(f"\n{file} could not be written: {error}") from error
    return average.module


def sample(args, net, y, shape):
    """Images uint8 [B, H, W, C] for labels y [B]."""
    model = denoiser(net, net.diffusion, y, args.guidance)
    xT = torch.randn(len(y), *shape, device=y.device)
    loop = net.diffusion.ddim_sample_loop(model, xT, args.sample_steps, args.eta)
    for xt in tqdm(loop, f"sample {len(y)}", args.sample_steps + 1):
        pass  # the last one is x_0
    return ((xt.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def main(argv=None):
    """Train or load, then sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=MNIST, help=".npz with x_train and, if labelled, y_train")
    add("--steps", type=int, default=4000, help="of training")
    add("--batch-size", type=int, default=64, help="images per step, in each process")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--samples", type=int, default=100, help="to draw, the labels in turn")
    add("--label", type=int, help="draw only this one")
    add("--sample-steps", type=int, default=50, help="of DDIM, 1 to 1000")
    add("--eta", type=float, default=1.0, help="noise of DDIM, 0 (none) to 1 (that of DDPM)")
    add("--guidance", type=float, default=1.0, help="more makes labels clearer; 1 is without")
    add("--seed", type=int, default=0, help="of all randomness")
    add("--device", default=torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--out", type=Path, default="runs/ddpm_mnist", help="folder for all files")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--load", type=Path, help="sample from this model.pt, do not train")
    group.add_argument("--resume", action="store_true", help="go on with the model.pt in --out")
    args = parser.parse_args(argv)
    limits = {"steps": (1, 1e7), "batch_size": (1, 1e7), "lr": (0, 1e3), "samples": (1, 1e9)}
    limits |= {"sample_steps": (1, 1e3), "eta": (0, 1), "guidance": (0, 1e3), "seed": (0, 1e9)}
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must be {least:g} to {most:g}")
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group()
    checkpoint = args.out / "model.pt"
    file = args.load or (checkpoint if args.resume else args.data)  # data: a new training
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        saved = {"losses": []} if file == args.data else torch.load(file, "cpu", weights_only=True)
        if not args.load:
            x, y, config = load_images(args.data)
            if saved.setdefault("config", config) != config:  # stores it if new
                raise ValueError(f"{file} has {saved['config']}, but {args.data} {config}")
        shape, labels = saved["config"].values()
        if args.label not in (None, *labels):
            raise ValueError(f"--label {args.label}: there are {labels}")
        torch.manual_seed(args.seed)
        net = UNet(Diffusion(cosine_schedule(1000)), shape[0], len(labels)).to(args.device)
        if args.load or args.resume:
            net.load_state_dict(saved["net" if args.resume else "ema"])
        elif checkpoint.exists() and RANK == 0:
            print(f"{checkpoint} becomes {checkpoint.replace(args.out / 'model.old.pt')}")
    except UNREADABLE as error:
        parser.error(f"cannot start with {file} on {args.device} in {args.out}: {error!r:.400}")

    if not args.load:
        net = train(args, net, x, y, saved)
    if WORLD > 1:
        distributed.destroy_process_group()
    if RANK > 0:
        return

    asked = np.resize(labels if args.label is None else args.label, args.samples)  # resize repeats
    y = torch.from_numpy(np.searchsorted(labels, asked)).to(args.device)
    torch.manual_seed(args.seed)
    images = np.concatenate([sample(args, net, part, shape) for part in y.split(500)])
    np.save(args.out / "samples.npy", images)
    np.save(args.out / "labels.npy", asked)
    full = np.pad(images[:100], [(0, -len(images[:100]) % 10), (0, 0), (0, 0), (0, 0)])
    sheet = np.vstack([np.hstack(full[k : k + 10]) for k in range(0, len(full), 10)])
    imsave(args.out / "samples.png", np.broadcast_to(sheet, (*sheet.shape[:2], 3)))
    print(f"files in {args.out}")


if __name__ == "__main__":
    main()
