"""This project and three packages side by side on MNIST, at equal minutes of training.

pip install -r benchmarks/requirements.txt
python benchmarks/compare_mnist.py                  about 75 minutes on two idle cores
python benchmarks/compare_mnist.py --samples 100    about 30 minutes, but no Frechet ratio

Every run is a process of its own with the same budget, and all compute in float32. All models are
told the label and sample without guidance. The other packages train with the published settings of
their examples, which are meant for hours on a GPU; ours are made for minutes on a CPU. So the table
shows what a few minutes on a CPU give, not which package is best. Changed for the others: warm-up
of diffusers 5 % of the budget (500 steps there), batch of smalldiffusion 32 (1024 there), labels
for all, networks of about our size. The judge is that of judge_mnist.py, trained once if it is
missing. Prints a table with medians over the seeds and writes compare_mnist.json into --out.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import judge_mnist, stand_in  # noqa: E402
from benchmarks.compare_2d import (  # noqa: E402
    clock,
    code_lines,
    in_a_process,
    medians,
    peak_megabytes,
)
from ddpm_mnist import Diffusion, UNet, cosine_schedule, denoiser  # noqa: E402

FILES = {  # what a reader of this method has to know
    "ours": ["ddpm_mnist.py"],
    "smalldiffusion": ["diffusion.py", "model.py", "model_unet.py"],
    "denoising_diffusion_pytorch": ["classifier_free_guidance.py"],
    "diffusers": [
        "schedulers/scheduling_ddpm.py",
        "schedulers/scheduling_ddim.py",
        "models/unets/unet_2d.py",
    ],
}


def descend(optimizer, loss, net, clip=math.inf):
    """One step of the optimizer, the norm of the gradient at most clip."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()


def ours(draw, seconds):
    """The training of ddpm_mnist.py line by line, with the used share of the seconds for step /
    steps, and its sampling."""
    diffusion = Diffusion(cosine_schedule(1000))
    net = UNet(diffusion)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.97))  # that of 650 steps
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99))
    for steps, used in enumerate(clock(seconds), 1):
        x0, y = draw(64)
        label = y.masked_fill(torch.rand(64) < 0.1, net.classes)
        u = (torch.arange(1, 65) - torch.rand(1)) / 64  # over (0, 1]
        t = (diffusion.T * u.sqrt()).ceil().long()
        error = diffusion.p_losses(partial(net, y=label), x0, t)
        loss = (error / diffusion.signal[t] ** 2).mean()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 20 * used) * (1 - used)
        descend(optimizer, loss, net, clip=1.0)
        average.update_parameters(net)

    def sample(labels):
        model = denoiser(average.module, diffusion, labels)
        xT = torch.randn(len(labels), 1, 28, 28)
        *_, x0 = diffusion.ddim_sample_loop(model, xT, steps=50, eta=1.0)
        return x0

    return net, steps, "DDIM, 50 steps, eta 1", sample


def smalldiffusion(draw, seconds):
    """Its example for Fashion-MNIST, with labels: Scaled(Unet), log-linear sigmas, lr 7e-4."""
    from smalldiffusion import (
        CondEmbedderLabel,
        Scaled,
        ScheduleLogLinear,
        Unet,
        generate_train_sample,
        samples,
    )

    schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    more = {"ch": 64, "ch_mult": (1, 1, 2), "attn_resolutions": (14,)}
    net = Scaled(Unet)(28, 1, 1, cond_embed=CondEmbedderLabel(256, 10), **more)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), 7e-4)
    for steps, _ in enumerate(clock(seconds), 1):
        x0, sigma, eps, label = generate_train_sample(draw(32), schedule, True)
        descend(optimizer, net.get_loss(x0, sigma, eps, cond=label), net)
        decay = min(0.999, (1 + steps) / (10 + steps))  # as torch-ema does
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)

    def sample(labels):
        sigmas = schedule.sample_sigmas(20)
        *_, x0 = samples(average, sigmas, gam=1.6, batchsize=len(labels), cond=labels)
        return x0

    return net, steps, "its own, 20 steps", sample


def denoising_diffusion_pytorch(draw, seconds):
    """Its classifier_free_guidance: defaults (cosine, eps), Trainer's batch, lr, EMA."""
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = Unet(dim=32, num_classes=10, cond_drop_prob=0.1, dim_mults=(1, 2, 4), channels=1)
    diffusion = GaussianDiffusion(net, image_size=28, sampling_timesteps=50, ddim_sampling_eta=0.0)
    average = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, betas=(0.9, 0.99))
    for steps, _ in enumerate(clock(seconds), 1):
        x0, y = draw(16)
        descend(optimizer, diffusion(x0 / 2 + 0.5, classes=y), net, clip=1.0)
        average.update()
    trained = average.ema_model.model
    plain = trained.forward

    def twice(x, t, classes, **_):  # its sampler wants two outputs; without guidance there is one
        eps = plain(x, t, classes, cond_drop_prob=0.0)
        return eps, eps

    trained.forward_with_cond_scale = twice

    def sample(labels):
        return average.ema_model.sample(classes=labels, cond_scale=1.0) * 2 - 1

    return net, steps, "DDIM, 50 steps", sample


def unet_of_diffusers():
    """A UNet2DModel of about our size, told the label."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=10,
    )


def diffusers(draw, seconds):
    """train_unconditional.py with labels and a UNet2DModel of this size: AdamW 1e-4, EMAModel."""
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.training_utils import EMAModel

    net = unet_of_diffusers()
    schedule = DDPMScheduler(1000)
    average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    for steps, used in enumerate(clock(seconds), 1):
        optimizer.param_groups[0]["lr"] = (
            1e-4 * min(1, 20 * used) * (1 + math.cos(math.pi * used)) / 2
        )
        x0, y = draw(16)
        t = torch.randint(1000, (16,))
        eps = torch.randn(16, 1, 28, 28)
        out = net(schedule.add_noise(x0, eps, t), t, class_labels=y).sample
        descend(optimizer, nn.functional.mse_loss(out, eps), net, clip=1.0)
        average.step(net.parameters())
    model = copy.deepcopy(net)
    average.copy_to(model.parameters())

    def sample(labels):
        schedule = DDIMScheduler(1000, timestep_spacing="trailing")
        schedule.set_timesteps(50)
        xt = torch.randn(len(labels), 1, 28, 28)
        for t in schedule.timesteps:
            eps = model(xt, t, class_labels=labels).sample
            xt = schedule.step(eps, t, xt).prev_sample
        return xt

    return net, steps, "DDIM, 50 steps", sample


PACKAGES = {f.__name__: f for f in (ours, smalldiffusion, denoising_diffusion_pytorch, diffusers)}


def one_run(args, name, seed):
    """Train one package, draw samples and judge them: a row."""
    stand_in.install()
    torch.manual_seed(seed)
    x, y, *_ = judge_mnist.read_data(args.data)

    def draw(n):
        pick = torch.randint(len(x), (n,))
        return judge_mnist.to_input(x[pick]), y[pick]

    net, steps, sampler, sample = PACKAGES[name](draw, args.minutes * 60)
    row = {"package": name, "sampler": sampler, "seed": seed, "seconds": args.minutes * 60}
    row |= {"steps": steps, "parameters": sum(p.numel() for p in net.parameters())}
    row["train_megabytes"] = peak_megabytes()
    labels = torch.arange(args.samples) % 10
    start = time.perf_counter()
    with torch.no_grad():
        images = torch.cat([sample(part)[:, 0] for part in labels.split(125)])
    row["milliseconds_per_sample"] = (time.perf_counter() - start) / args.samples * 1e3
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    saved = torch.load(args.classifier, weights_only=True)
    classifier = judge_mnist.Classifier().eval()
    classifier.load_state_dict(saved["classifier"])
    return row | judge_mnist.judge(classifier, pixels, labels, saved)


def table(rows):
    """Print medians over the seeds, and the spread of what is recognised."""
    heads = "package, parameters, steps, recognised, Frechet, sampler, a sample, memory, lines"
    print(f"| {heads.replace(', ', ' | ')} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in medians(rows):
        name = row["package"]
        shares = [r["recognised"] for r in rows if r["package"] == name]
        spread = f" +- {statistics.stdev(shares):.1%}" if len(shares) > 1 else ""
        frechet = f"{row['frechet_ratio']:.1f}" if "frechet_ratio" in row else "none"
        print(
            f"| {name.replace('_', '-')} | {row['parameters'] / 1e6:.2f} M | {row['steps']:.0f} "
            f"| {row['recognised']:.1%}{spread} | {frechet} "
            f"| {row['sampler']} | {row['milliseconds_per_sample']:.0f} ms "
            f"| {row['train_megabytes']:.0f} MB | {code_lines(name, FILES[name])} |"
        )


def main(argv=None):
    """Run everything and print the table. Returns the rows of all runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=ROOT / "data" / "mnist.npz", help="real digits")
    add("--classifier", type=Path, default=ROOT / "runs" / "judge_mnist.pt", help="is kept here")
    add("--minutes", type=float, default=2, help="of training, for each run")
    add("--samples", type=int, default=1000, help="to judge; from 1000 on with a Frechet ratio")
    add("--seeds", type=int, default=3, help="runs of each")
    add("--out", type=Path, default=ROOT / "runs" / "compare_mnist", help="folder for the rows")
    add("--one", nargs=2, help=argparse.SUPPRESS)  # package, seed
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one_run(args, args.one[0], int(args.one[1]))))
        return None
    if not args.classifier.exists():
        judge_mnist.make_classifier(args.classifier, *judge_mnist.read_data(args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    flags = ["--data", args.data, "--classifier", args.classifier]
    flags += ["--minutes", args.minutes, "--samples", args.samples]
    rows = []
    for seed, name in tqdm(list(product(range(args.seeds), PACKAGES))):
        rows.append(in_a_process(__file__, [*flags, "--one", name, seed]))
        (args.out / "compare_mnist.json").write_text(json.dumps(rows, indent=1))
    what = f"{args.minutes:g} minutes of training, {args.samples} samples"
    print(f"medians of {args.seeds} seeds, {what}\n")
    table(rows)
    return rows


if __name__ == "__main__":
    main()
