"""The moving picture of README: points and digits come out of noise, side by side, on one clock.

python ddpm_2d.py --data spirals
python benchmarks/animation.py runs/ddpm_2d weights/ddpm_mnist.pt

Left: Algorithm 2. Right: ten digits of each label by DDIM with eta 1 and guidance 1.2. On both
sides t runs from T to 0; then the picture stands still for two seconds.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.judge_2d import read_run  # noqa: E402
from benchmarks.judge_mnist import load  # noqa: E402
from ddpm_mnist import denoiser  # noqa: E402

STEPS = 250  # of DDIM: the states of both sides are those of t = T, T (1 - 1 / STEPS), ..., 0
FPS = 12


def points(run, n=2000):
    """States x_t [n, 2] by Algorithm 2."""
    states = list(tqdm(run.diffusion.p_sample_loop(run.net, torch.randn(n, 2)), "points"))
    return [states[round(run.diffusion.T * k / STEPS)] for k in range(STEPS + 1)]


def digits(saved, diffusion, net):
    """Sheets [10 H, 10 W] of states x_t, a label a column, in eight shades 0 to 1."""
    _, height, width = saved["config"]["shape"]
    model = denoiser(net, diffusion, torch.arange(100) % 10 % net.classes, guidance=1.2)
    xT = torch.randn(100, 1, height, width)
    sheets = []
    for xt in tqdm(diffusion.ddim_sample_loop(model, xT, STEPS, eta=1.0), "digits", STEPS + 1):
        rows = xt.view(10, 10, height, width).transpose(1, 2)  # [10, H, 10, W]
        shade = (rows.reshape(10 * height, 10 * width).clamp(-1, 1) + 1) / 2
        sheets.append((shade * 7).round().numpy() / 7)  # 256 of them make a file of many megabytes
    return sheets


def draw(file, clouds, sheets, half, frames=40):
    """Write the film of states of points and of digits. The frames come closer near the data."""
    figure = Figure(figsize=(6, 3.2), dpi=100)
    boxes = np.array([[10, 10, 280, 280], [310, 10, 280, 280]])  # pixels, 280 as in ten digits
    left, right = [figure.add_axes(box / [600, 320, 600, 320]) for box in boxes]
    with PillowWriter(fps=FPS).saving(figure, file, dpi=100) as writer:
        for share in np.linspace(1, 0, frames) ** 2.5:
            k = round(STEPS * (1 - share))
            for ax, title in ((left, "ddpm_2d.py"), (right, "ddpm_mnist.py")):
                ax.clear()
                ax.set_axis_off()
                ax.set_title(title, fontsize=9)
            left.scatter(*clouds[k].T.numpy(), s=2, lw=0)
            left.set(xlim=(-half, half), ylim=(-half, half))
            right.imshow(sheets[k], "gray_r", vmin=0, vmax=1, interpolation="nearest")
            figure.suptitle(f"t = {1 - k / STEPS:.2f} T", y=0.963, fontsize=9)
            writer.grab_frame()
        for _ in range(2 * FPS):
            writer.grab_frame()


def main(argv=None):
    """Draw the film of a run of each script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of ddpm_2d.py")
    parser.add_argument("weights", type=Path, help="model.pt of ddpm_mnist.py, of grey images")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "diffusion.gif")
    args = parser.parse_args(argv)
    try:
        run = read_run(args.run)
        model = load(args.weights)
    except Exception as error:  # a damaged file can raise nearly anything
        parser.error(f"{error!r:.400}")
    torch.manual_seed(0)
    clouds = points(run)
    sheets = digits(*model)
    draw(args.out, clouds, sheets, half=1.1 * clouds[-1].abs().max().item())


if __name__ == "__main__":
    main()
