"""This project and three packages side by side on MNIST, at equal training time.

  pip install -r benchmarks/requirements.txt
  python benchmarks/classifier_mnist.py --train --model runs/classifier.pt
  python benchmarks/compare_mnist.py --data data/mnist     (about 40 minutes on two idle cores)

Every run is a process of its own with the same budget of minutes, and all compute in bfloat16 where
it is faster. All models are told the label and sample without guidance. The other packages train
with the published settings of their examples, which are meant for hours on a GPU; ours are made for
minutes on a CPU. So the table shows what a few minutes on a CPU give, not which package is best.
Changed for the others: warm-up of diffusers 5 % of the budget (500 steps there), batch of
smalldiffusion 32 (1024 there), labels for all, networks of about our size. Prints a table with
medians over the seeds and writes runs/compare_mnist.json.
"""

import argparse
import contextlib
import copy
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import stand_in  # noqa: E402
from classifier_mnist import Classifier, judge  # noqa: E402
from compare_2d import clock, code_lines  # noqa: E402
from scaling import bf16_is_faster  # noqa: E402

from ddpm_mnist import Diffusion, UNet, load_mnist  # noqa: E402
from ddpm_mnist import main as train_ours  # noqa: E402

bf16 = torch.autocast("cpu", torch.bfloat16, bf16_is_faster())


def ours(x, y, seconds, seed, folder, data):
    """ddpm_mnist.py as it is, with --minutes."""
    flags = ["--data", data, "--minutes", seconds / 60, "--seed", seed, "--out", folder]
    flags += ["--n", 10, "--test-images", 0, "--save-every", 10**6]
    metrics = train_ours([str(flag) for flag in flags])
    saved = torch.load(folder / "model.pt", weights_only=True)["ddpm_mnist"]
    diffusion = Diffusion(1000, "cosine")
    net = UNet(diffusion)
    average = {k[7:]: v for k, v in saved["ema"].items() if k.startswith("module.")}
    net.load_state_dict(average)

    def sample(labels):
        xT = torch.randn(len(labels), 1, 28, 28)
        with bf16:
            *_, x0 = diffusion.ddim_sample_loop(net, xT, 50, 1.0, y=labels)
        return x0

    return net, metrics["steps"], {"DDIM, 50 steps, eta 1": sample}


def smalldiffusion(x, y, seconds, *_):
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
    average, steps = copy.deepcopy(net).requires_grad_(False), 0
    optimizer = torch.optim.AdamW(net.parameters(), 7e-4)
    for _ in clock(seconds):
        pick = torch.randint(len(x), (32,))
        x0, sigma, eps, label = generate_train_sample((x[pick], y[pick]), schedule, True)
        with bf16:
            loss = net.get_loss(x0, sigma, eps, cond=label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        decay = min(0.999, (1 + steps) / (10 + steps))  # as torch-ema does
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)

    def sample(labels):
        options = {"gam": 1.6, "batchsize": len(labels), "cond": labels}
        with bf16:
            *_, x0 = samples(average, schedule.sample_sigmas(20), **options)
        return x0

    return net, steps, {"its own, 20 steps": sample}


def denoising_diffusion_pytorch(x, y, seconds, *_):
    """Its classifier_free_guidance: defaults (cosine, eps), Trainer's batch, lr, EMA."""
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = Unet(dim=32, num_classes=10, cond_drop_prob=0.1, dim_mults=(1, 2, 4), channels=1)
    diffusion = GaussianDiffusion(net, image_size=28, sampling_timesteps=50, ddim_sampling_eta=0.0)
    average, steps = EMA(diffusion, beta=0.995, update_every=10), 0
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, betas=(0.9, 0.99))
    for _ in clock(seconds):
        pick = torch.randint(len(x), (16,))
        with bf16:
            loss = diffusion(x[pick] / 2 + 0.5, classes=y[pick])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update()
        steps += 1
    model = average.ema_model
    # its sampler wants two outputs, but with guidance 1 its network gives one
    plain = model.model.forward
    both = lambda x, t, c, **_: (plain(x, t, c, cond_drop_prob=0.0).float(),) * 2
    model.model.forward_with_cond_scale = both

    def sample(labels):
        with bf16:
            return model.sample(classes=labels, cond_scale=1.0) * 2 - 1

    return net, steps, {"DDIM, 50 steps": sample}


def diffusers(x, y, seconds, *_):
    """train_unconditional.py with labels and a UNet2DModel of this size: AdamW 1e-4, EMAModel."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    net = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=10,
    )
    schedule, steps = DDPMScheduler(1000), 0
    average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    for used in clock(seconds):
        optimizer.param_groups[0]["lr"] = 1e-4 * min(1, 20 * used) * (1 + np.cos(np.pi * used)) / 2
        pick, t = torch.randint(len(x), (16,)), torch.randint(1000, (16,))
        eps = torch.randn(16, 1, 28, 28)
        with bf16:
            out = net(schedule.add_noise(x[pick], eps, t), t, class_labels=y[pick]).sample
        loss = nn.functional.mse_loss(out.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.step(net.parameters())
        steps += 1
    model = copy.deepcopy(net)
    average.copy_to(model.parameters())

    @torch.no_grad()
    def sample(labels):
        schedule = DDIMScheduler(1000, timestep_spacing="trailing")
        xt = torch.randn(len(labels), 1, 28, 28)
        schedule.set_timesteps(50)
        for t in schedule.timesteps:
            with bf16:
                eps = model(xt, t, class_labels=labels).sample.float()
            xt = schedule.step(eps, t, xt).prev_sample
        return xt

    return net, steps, {"DDIM, 50 steps": sample}


FILES = {  # what a reader of this method has to know
    "ours": ["ddpm_mnist.py"],
    "smalldiffusion": ["diffusion.py", "model.py", "model_unet.py"],
    "denoising_diffusion_pytorch": ["classifier_free_guidance.py"],
    "diffusers": [f"schedulers/scheduling_{k}.py" for k in ("ddpm", "ddim")]
    + ["models/unets/unet_2d.py"],
}
PACKAGES = {f.__name__: f for f in (ours, smalldiffusion, denoising_diffusion_pytorch, diffusers)}


def one_run(name, seconds, seed, n, data, classifier):
    """Train one package, draw n samples of each of its samplers and judge them: rows."""
    stand_in.install()
    torch.manual_seed(seed)
    x, y, *_, used = load_mnist(data)
    if used != Path(data):
        sys.exit(f"no MNIST in {data}")
    x = x[:, None] / 127.5 - 1
    folder = ROOT / "runs" / f"compare_mnist_{seed}"
    with contextlib.redirect_stdout(io.StringIO()):
        net, steps, samplers = PACKAGES[name](x, y, seconds, seed, folder, data)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    saved, rows = torch.load(classifier, weights_only=True), []
    model = Classifier()
    model.load_state_dict(saved["classifier"])
    labels = torch.arange(n) % 10
    for sampler, sample in samplers.items():
        start = time.perf_counter()
        with torch.no_grad():
            images = torch.cat([sample(part) for part in labels.split(125)])
        cost = (time.perf_counter() - start) / n * 1e3
        pixels = (images[:, 0].float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
        verdict = judge(model.eval(), pixels, labels, saved["real"].double())
        row = {"package": name, "sampler": sampler, "seed": seed, "seconds": seconds}
        row |= {"steps": steps, "parameters": sum(p.numel() for p in net.parameters())}
        row |= {"milliseconds_per_sample": cost, "train_megabytes": memory}
        rows.append(row | {k: verdict[k] for k in ("recognised", "frechet_ratio")})
    return rows


def main(argv=None):
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="data/mnist", help="folder of the IDX files")
    parser.add_argument("--classifier", default="runs/classifier.pt", help="of classifier_mnist.py")
    parser.add_argument("--minutes", type=float, default=2, help="of training, for each run")
    parser.add_argument("--n", type=int, default=500, help="samples to judge")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # package, seed
    args = parser.parse_args(argv)
    if args.one:
        name, seed = args.one
        options = (args.n, args.data, args.classifier)
        print(json.dumps(one_run(name, args.minutes * 60, int(seed), *options)))
        return
    rows, out = [], ROOT / "runs" / "compare_mnist.json"
    for job in tqdm([(p, s) for s in range(args.seeds) for p in PACKAGES], "compare"):
        command = [sys.executable, __file__, "--data", args.data, "--classifier", args.classifier]
        command += ["--minutes", str(args.minutes), "--n", str(args.n), "--one", *map(str, job)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{job}: {done.stderr[-2000:]}")
        rows += json.loads(done.stdout.splitlines()[-1])
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(rows, indent=1))
    print(
        f"medians of {args.seeds} seeds, {args.minutes:g} minutes of training, {args.n} samples\n"
    )
    heads = "package, parameters, steps, recognised, Frechet, sampler, a sample, memory, lines"
    print(f"| {heads.replace(', ', ' | ')} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in PACKAGES:
        group = [row for row in rows if row["package"] == name]
        spread = statistics.stdev(r["recognised"] for r in group) if len(group) > 1 else 0
        m = {k: statistics.median(row[k] for row in group) for k in group[0] if k not in TEXT}
        print(
            f"| {name.replace('_', '-')} | {m['parameters'] / 1e6:.2f} M | {m['steps']:.0f} "
            f"| {m['recognised']:.1%} +- {spread:.1%} | {m['frechet_ratio']:.1f} "
            f"| {group[0]['sampler']} | {m['milliseconds_per_sample']:.0f} ms "
            f"| {m['train_megabytes']:.0f} MB | {code_lines(name, FILES[name])} |"
        )


TEXT = ("package", "sampler")

if __name__ == "__main__":
    main()
