"""Pictures of a run of ddpm_mnist.py, or of its weights: how digits come about, and the loss.

python benchmarks/draw_mnist.py runs/ddpm_mnist

Writes process.png (ten images on their way from noise to x_0, one a row, in ten states) and, if the
checkpoint holds the losses, training.png into the folder. Any images and labels will do.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ddpm_mnist import Diffusion, UNet, cosine_schedule, denoiser  # noqa: E402


def load(path):
    """What is in a model.pt, its diffusion and its network."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    config = saved["config"]
    net = UNet(config["shape"][0], len(config["labels"]), config["width"])
    net.load_state_dict(saved["ema"])
    return saved, Diffusion(cosine_schedule(1000)), net


def draw_process(path, saved, diffusion, net, steps=50):
    """Ten samples, the labels in turn: x_T at the left, x_0 at the right."""
    model = denoiser(net, diffusion, torch.arange(10) % net.classes)
    xT = torch.randn(10, *saved["config"]["shape"])
    states = list(diffusion.ddim_sample_loop(model, xT, steps, eta=1.0))
    ten = [states[k] for k in np.linspace(0, steps, 10).round().astype(int)]
    picture = torch.cat(ten, 3).permute(0, 2, 3, 1).flatten(0, 1)  # [10 H, 10 W, C]
    imsave(path, ((picture.clamp(-1, 1) + 1) / 2).expand(-1, -1, 3).numpy())


def draw_losses(path, losses):
    """The loss of each step, and its mean over the last hundred."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(range(1, len(losses) + 1), losses, lw=0.3, color="tab:blue")
    window = min(100, len(losses))
    means = np.convolve(losses, np.ones(window) / window, "valid")
    axes.loglog(range(window, len(losses) + 1), means, color="tab:orange")
    axes.set(xlabel="training step", ylabel="loss")
    figure.savefig(path, dpi=120)


def main(argv=None):
    """Draw the pictures of one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with a model.pt of ddpm_mnist.py")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args(argv)
    try:
        saved, diffusion, net = load(args.run / "model.pt")
    except Exception as error:  # a damaged file can raise nearly anything
        parser.error(f"{args.run / 'model.pt'}: {error!r:.400}")
    torch.manual_seed(args.seed)
    draw_process(args.run / "process.png", saved, diffusion, net)
    if "losses" in saved:
        draw_losses(args.run / "training.png", saved["losses"])


if __name__ == "__main__":
    main()
