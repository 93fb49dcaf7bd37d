"""The picture at the top of README: samples of the three scripts side by side.

python benchmarks/strip.py runs/ddpm_2d runs/ddpm_swissroll_2015 runs/ddpm_mnist assets/strip.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]
from ddpm_2d import COLORS  # noqa: E402


def main(argv=None):
    """Draw the samples that three runs have left."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs=3, type=Path, help="folders of the three runs, in order")
    parser.add_argument("picture", help="PNG to write")
    args = parser.parse_args(argv)
    points, roll, digits = (np.load(run / "samples.npy") for run in args.runs)
    labels = np.load(args.runs[0] / "labels.npy")
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    axes[0].scatter(*points[:8000].T, s=1, lw=0, c=COLORS[labels[:8000] % len(COLORS)])
    axes[1].scatter(*roll[:8000].T, s=1, lw=0, c=COLORS[0])
    axes[2].imshow(digits[:100].reshape(10, 10, 28, 28).swapaxes(1, 2).reshape(280, 280), "gray_r")
    for ax in axes[:2]:
        ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4))
    titles = ("2-D points, 2020", "swiss roll, 2015", "MNIST")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xticks=[], yticks=[], box_aspect=1)
    figure.savefig(args.picture, dpi=120)


if __name__ == "__main__":
    main()
