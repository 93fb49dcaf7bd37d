"""The picture at the top of README: samples of the three scripts side by side.

python benchmarks/strip.py runs/ddpm_2d runs/ddpm_swissroll_2015 runs/ddpm_mnist assets/strip.png
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def main(argv=None):
    """Draw the samples that three runs have left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs=3, type=Path, metavar="RUN", help="folders of the three runs, in this order")
    add("picture", metavar="PICTURE", help="PNG to write")
    args = parser.parse_args(argv)
    points, roll, digits = [np.load(run / "samples.npy") for run in args.runs]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, cloud, color in zip(axes, (points, roll), ("tab:blue", "tab:orange")):
        x, y = (cloud[:8000] - cloud.mean(0)).T / cloud.std()
        ax.scatter(x, y, s=1, lw=0, color=color)
        ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4))
    rows = digits[:100].reshape(10, 10, 28, 28)
    axes[2].imshow(rows.swapaxes(1, 2).reshape(280, 280), "gray_r")
    for ax, title in zip(axes, ("2-D points, 2020", "swiss roll, 2015", "MNIST")):
        ax.set(title=title, xticks=[], yticks=[], box_aspect=1)
    figure.savefig(args.picture, dpi=120)


if __name__ == "__main__":
    main()
