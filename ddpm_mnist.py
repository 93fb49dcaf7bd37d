"""What came after DDPM (Ho et al. 2020, arXiv 2006.11239), on MNIST or your own images.

python ddpm_mnist.py                                  trains: ten minutes on two CPU cores
python ddpm_mnist.py --load weights/ddpm_mnist.pt     a hundred digits in seconds
python ddpm_mnist.py --data mine.npz                  x_train uint8 [n, H, W(, C)], y_train [n]
torchrun --nproc-per-node 8 ddpm_mnist.py             eight GPUs, eight times the batch

As in the paper: Eq. (4), a U-Net, an average of its weights. New: a cosine schedule, v in place of
eps, DDIM, classifier-free guidance. Our own: t ~ p(t) = (2 t - 1) / T^2, as large t shape a digit.
"""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

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


def cosine_schedule(T):
    """beta_t [T], t = 1, ..., T, from the alpha_bar_t of Nichol & Dhariwal 2021, Eq. (17)."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)  # t / T
    f = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2  # alpha_bar_t = f_t / f_0
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)  # beta_T = 1 would leave alpha_bar_T = 0


class Diffusion(nn.Module):
    """q(x_t | x_0) and samples by a model (x_t, t [B]) -> eps: see denoiser. beta [T], t = 1..T."""

    def __init__(self, beta):
        super().__init__()
        self.T = len(beta)
        alpha_bar = F.pad(torch.cumprod(1 - beta, 0), (1, 0), value=1.0)  # [T + 1], from t = 0 on
        self.alpha_bar = alpha_bar.tolist()  # float64 numbers, for one step of all images
        self.signal = nn.Buffer(alpha_bar.sqrt().float(), persistent=False)  # for steps t [B]
        self.noise = nn.Buffer((1 - alpha_bar).sqrt().float(), persistent=False)

    def q_sample(self, x0, t, eps):
        """x_t from x_0 [B, ...], steps t [B] and noise eps [B, ...]: DDPM Eq. (4)."""
        t = t.view(-1, *[1] * (x0.ndim - 1))  # [B, 1, ...]
        return self.signal[t] * x0 + self.noise[t] * eps

    def velocity(self, x0, t, eps):
        """v of Salimans & Ho 2022. As signal^2 + noise^2 = 1, x_0 = signal x_t - noise v."""
        t = t.view(-1, *[1] * (x0.ndim - 1))  # [B, 1, ...]
        return self.signal[t] * eps - self.noise[t] * x0

    @torch.no_grad()  # in here, not in the loop over its states
    def ddim_sample_loop(self, model, xt, steps=50, eta=0.0):
        """DDIM (Song, Meng & Ermon 2020; their alpha is our alpha_bar): yields x_T, ..., x_0, which
        are steps + 1 states. eta = 1 with T steps is Algorithm 2 with sigma_t^2 = beta-tilde_t."""
        times = [round(self.T * k / steps) for k in range(steps, -1, -1)]  # T, ..., 0
        yield xt
        for t, s in zip(times, times[1:]):
            eps = model(xt, torch.full((len(xt),), t, device=xt.device))
            a_t = self.alpha_bar[t]
            a_s = self.alpha_bar[s]
            x0 = (xt - (1 - a_t) ** 0.5 * eps) / a_t**0.5  # the predicted x_0, DDPM Eq. (15)
            sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5  # DDIM Eq. (16)
            direction = max(0, 1 - a_s - sigma**2) ** 0.5 * eps  # max: rounding
            xt = a_s**0.5 * x0 + direction + sigma * torch.randn_like(xt)  # DDIM Eq. (12)
            yield xt


def denoiser(net, diffusion, y, guidance=1.0):
    """Turns a network of v and labels y [B] into the model (x_t, t) -> eps of a sampler. Guidance,
    1 + w in Ho & Salimans 2022, Eq. (6), is the same on v: at a given x_t, v is affine in eps. The
    sampler gets the clipped x_0 back from eps: no error of v is divided by signal, 5e-5 at T."""

    def model(xt, t):
        v = net(xt, t, y)
        v = v if guidance == 1 else torch.lerp(net(xt, t), v, guidance)  # 0 ignores y
        signal = diffusion.signal[t, None, None, None]  # [B, 1, 1, 1]
        noise = diffusion.noise[t, None, None, None]
        x0 = (signal * xt - noise * v).clamp(-1, 1)  # clipped, as in the code of DDPM
        return (xt - signal * x0) / noise  # Eq. (4) solved for eps

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
    """v_theta(x_t, t, y) of images [B, C, H, W]; y = self.classes, or None, means "no label"."""

    def __init__(self, channels=1, classes=10, width=32):
        super().__init__()
        self.classes = classes
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128))
        self.label = nn.Embedding(classes + 1, 128)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down1 = ResBlock(width, 2 * width)
        self.down2 = ResBlock(2 * width, 4 * width)
        self.middle1 = ResBlock(4 * width, 4 * width)
        self.norm = nn.GroupNorm(8, 4 * width)
        self.attention = nn.MultiheadAttention(4 * width, num_heads=4, batch_first=True)
        self.middle2 = ResBlock(4 * width, 4 * width)
        self.up2 = ResBlock(4 * width, 2 * width)
        self.up1 = ResBlock(2 * width, width)
        self.up0 = ResBlock(width, width)
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 1))
        nn.init.zeros_(self.head[-1].weight)  # v starts near 0

    def forward(self, xt, t, y=None):
        y = torch.full_like(t, self.classes) if y is None else y
        angle = t[:, None] * 10_000 ** (-torch.arange(32, device=t.device) / 32)  # [B, 32]
        emb = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(y))
        h1 = self.stem(xt)  # [B, width, H, W]
        h2 = self.down1(F.avg_pool2d(h1, 2), emb)  # [B, 2 width, H/2, W/2]
        h3 = self.down2(F.avg_pool2d(h2, 2), emb)  # [B, 4 width, H/4, W/4]
        h = self.middle1(h3, emb)
        pixels = self.norm(h).flatten(2).mT  # [B, H W / 16, 4 width]
        attended, _ = self.attention(pixels, pixels, pixels, need_weights=False)
        h = self.middle2(h + attended.mT.reshape(h.shape), emb)
        h = self.up2(h + h3, emb)  # [B, 2 width, H/4, W/4]; skips are added
        h = self.up1(F.interpolate(h, scale_factor=2) + h2, emb)  # [B, width, H/2, W/2]
        return self.head(self.up0(F.interpolate(h, scale_factor=2) + h1, emb))  # v [B, C, H, W]


def load_images(path):
    """From an .npz file: images uint8 [n, C, H, W], labels 0, 1, ... [n], and the labels' names."""
    if path == MNIST and not path.exists():
        print(f"{path} is missing: downloading {URL}")
        path.parent.mkdir(exist_ok=True)
        torch.hub.download_url_to_file(URL, path, SHA256)
    arrays = np.load(path)
    x = arrays["x_train"]
    y = arrays["y_train"] if "y_train" in arrays else np.zeros(x.shape[:1], int)
    x = x[..., None] if x.ndim == 3 else x  # [n, H, W, C]
    y = y[:, 0] if y.shape[1:] == (1,) else y  # [n]; Keras has [n, 1] for CIFAR
    fits = x.dtype == np.uint8 and x.ndim == 4 and y.shape == x.shape[:1] and y.dtype.kind in "iuU"
    if not fits or not x.size or x.shape[1] % 4 or x.shape[2] % 4 or x.shape[3] not in (1, 3):
        wanted = "uint8 [n, H, W] or [n, H, W, 3], H and W divisible by 4, and n integers or words"
        raise ValueError(f"x_train {x.dtype} {x.shape}, y_train {y.dtype} {y.shape}, not {wanted}")
    labels, y = np.unique(y, return_inverse=True)
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y), labels.tolist()


def train(args, diffusion, net, x, y, saved):
    """Algorithm 1 for v; a tenth of the labels is hidden. Returns an EMA (memory: steps / 20)."""
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / (1 + args.steps / 20)))
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99))
    parts = {"net": net, "ema": average.module, "optimizer": optimizer}
    file = args.out / "model.part"
    losses = saved["losses"]  # the same list: what is appended here is saved below
    if args.resume:
        average.n_averaged += len(losses)  # is not saved; at 0 the next update would copy net
        for name, part in parts.items():
            part.load_state_dict(saved.pop(name))  # frees memory
    learner = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    todo = range(len(losses), args.steps)
    with tqdm(todo, "train", args.steps, initial=len(losses), disable=RANK > 0) as bar:
        for step in bar:
            torch.manual_seed((args.seed * WORLD + RANK) * 10**7 + step)  # so --resume is exact
            pick = torch.randint(len(x), (args.batch_size,))
            x0 = x[pick].to(args.device) / 127.5 - 1  # [B, C, H, W]
            label = y[pick].masked_fill(torch.rand(len(pick)) < 0.1, net.classes).to(args.device)
            u = (torch.arange(1, len(x0) + 1) - torch.rand(1)) / len(x0)  # one in each 1/B of 0..1
            t = (diffusion.T * u.sqrt()).ceil().long().to(args.device)  # P(t <= k) = (k / T)^2
            eps = torch.randn_like(x0)
            v = learner(diffusion.q_sample(x0, t, eps), t, label)
            loss = F.mse_loss(v, diffusion.velocity(x0, t, eps))
            warmup = min(1, 20 * (step + 1) / args.steps)  # in the first twentieth
            optimizer.param_groups[0]["lr"] = args.lr * warmup * (1 - step / args.steps)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            if not (loss + norm).isfinite():
                raise SystemExit(f"loss {loss:g} at step {step}: start again with a lower --lr")
            optimizer.step()
            average.update_parameters(net)
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {np.mean(losses[-100:]):.3f}", refresh=False)
            if RANK == 0 and (len(losses) % 100 == 0 or len(losses) == args.steps):
                try:
                    torch.save(saved | {k: v.state_dict() for k, v in parts.items()}, file)
                    file.replace(args.out / "model.pt")  # if killed: the old or the new
                except (OSError, RuntimeError) as error:  # a full disk; on Windows, a file in use
                    if len(losses) == args.steps:
                        file.unlink(missing_ok=True)
                        raise SystemExit(f"{file} cannot be written: {error}") from error
                    bar.write(f"{file} cannot be written, next try in 100 steps: {error}")
    return average.module.state_dict()


def draw(args, diffusion, net, shape, labels, picks):
    """Draws args.samples images, of labels[k] for each k of picks in turn, into args.out."""
    torch.manual_seed(args.seed)
    y = np.resize(picks, args.samples)  # repeats them
    images = []  # uint8 [B, C, H, W]
    for label in tqdm(torch.from_numpy(y).to(args.device).split(args.batch_size), "sample"):
        model = denoiser(net, diffusion, label, args.guidance)
        xT = torch.randn(len(label), *shape, device=args.device)
        for xt in diffusion.ddim_sample_loop(model, xT, args.sample_steps, args.eta):
            pass  # only the last one, x_0, is needed
        images.append(((xt.clamp(-1, 1) + 1) * 127.5).round().byte())
    images = torch.cat(images).permute(0, 2, 3, 1).cpu().numpy()  # [n, H, W, C]
    np.save(args.out / "samples.npy", images)
    np.save(args.out / "labels.npy", np.array(labels)[y])
    full = np.pad(images[:100], [(0, -len(images[:100]) % 10), (0, 0), (0, 0), (0, 0)])
    sheet = np.vstack([np.hstack(full[k : k + 10]) for k in range(0, len(full), 10)])
    imsave(args.out / "samples.png", np.broadcast_to(sheet, (*sheet.shape[:2], 3)))


def main(argv=()):
    """Train or load a network, then draw images with it."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--data", type=Path, default=MNIST, help=".npz with x_train and, if labelled, y_train")
    add("--steps", type=int, default=4000, help="training steps")
    add("--batch-size", type=int, default=64, help="images at a time, in each process")
    add("--width", type=int, default=32, choices=(16, 32, 64, 128), help="channels, 64 for photos")
    add("--lr", type=float, default=2e-3, help="learning rate, before warm-up and decay")
    add("--samples", type=int, default=100, help="images to draw, one label after another")
    add("--label", help="draw only this label; None means all")
    add("--sample-steps", type=int, default=50, help="steps of DDIM, 1 to 1000")
    add("--eta", type=float, default=1.0, help="noise of DDIM: 0 is none, 1 as in DDPM")
    add("--guidance", type=float, default=1.0, help="1 is off; more makes labels, if any, clearer")
    add("--seed", type=int, default=0, help="of the random numbers")
    add("--device", default=device, choices=sorted({"cpu", device}), help="where to compute")
    add("--out", type=Path, default="runs/ddpm_mnist", help="folder for all files")
    add("--load", type=Path, help="draw with this model.pt, no training: --data, --width not used")
    add("--resume", action="store_true", help="go on with the training of the model.pt in --out")
    args = parser.parse_args(argv)
    limits = {"steps": (1, 1e7), "batch_size": (1, 1e7), "lr": (0, 1e3), "samples": (1, 1e9)}
    limits |= {"sample_steps": (1, 1e3), "eta": (0, 1), "guidance": (0, 1e3), "seed": (0, 1e9)}
    for name, (lo, hi) in limits.items():
        if not lo <= vars(args)[name] <= hi:
            parser.error(f"--{name.replace('_', '-')} {vars(args)[name]}: choose {lo:g} to {hi:g}")
    if WORLD > 1:  # under torchrun; device -1 is none
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if torch.cuda.is_available() else -1)
        distributed.init_process_group()
    checked = f"--data {args.data}, an .npz file"  # what an error is about
    try:
        if args.load:
            checked = f"--load {args.load}, a model.pt with config and ema"
            saved = torch.load(args.load, map_location="cpu")
            config = saved["config"]
            weights = saved["ema"]  # in place of training
        else:
            x, y, labels = load_images(args.data)
            config = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
            config |= dict(shape=[*x.shape[1:]], labels=labels, width=args.width, processes=WORLD)
            saved = {"config": config, "losses": []}
            if args.resume:
                checked = f"--resume {args.out / 'model.pt'}"
                saved = torch.load(args.out / "model.pt", map_location="cpu")
                changed = [name for name in config if saved["config"][name] != config[name]]
                if changed or "optimizer" not in saved:
                    raise ValueError(f"not the same run: {', '.join(changed) or 'only weights'}")
        shape, labels, width = [config[name] for name in ("shape", "labels", "width")]
        checked = f"--label {args.label}, of {labels}"
        picks = [[*map(str, labels)].index(args.label)] if args.label else range(len(labels))
        checked = f"--out {args.out}"
        args.out.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        parser.error(f"{checked}: {error!r:.400}")

    torch.manual_seed(args.seed)
    diffusion = Diffusion(cosine_schedule(1000)).to(args.device)
    net = UNet(shape[0], len(labels), width).to(args.device)
    net.load_state_dict(weights if args.load else train(args, diffusion, net, x, y, saved))
    if WORLD > 1:
        distributed.destroy_process_group()
    if RANK == 0:
        draw(args, diffusion, net, shape, labels, picks)


if __name__ == "__main__":
    main(sys.argv[1:])
