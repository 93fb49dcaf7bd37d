"""Samples of several runs side by side, three in a row: the pictures of README.

python benchmarks/strip.py assets/strip.png RUN RUN RUN --titles "2-D points" "swiss roll" MNIST
"""

import argparse
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def draw_points(ax, points, color):
    """A cloud [n, 2], moved to the middle and scaled."""
    x, y = (points[:8000] - points.mean(0)).T / points.std()
    ax.scatter(x, y, s=1, lw=0, color=color)
    ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4))


def draw_images(ax, images):
    """The first hundred of uint8 [n, 28, 28, 1], ten a row."""
    rows = images[:100].reshape(10, 10, 28, 28)
    ax.imshow(rows.swapaxes(1, 2).reshape(280, 280), "gray_r")


def main(argv=None):
    """Draw the samples that the runs have left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("picture", metavar="PICTURE", help="PNG to write")
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders with a samples.npy")
    add("--titles", nargs="+", default=[], help="one for each run")
    args = parser.parse_args(argv)
    height = math.ceil(len(args.runs) / 3)
    figure = Figure(figsize=(10, 3.6 * height), layout="constrained")
    axes = figure.subplots(height, 3, squeeze=False).flatten()
    for ax in axes[len(args.runs) :]:
        ax.set_axis_off()
    for number, (ax, run) in enumerate(zip(axes, args.runs)):
        samples = np.load(run / "samples.npy")
        if samples.ndim == 2:
            draw_points(ax, samples, f"C{number % 3}")
        else:
            draw_images(ax, samples)
        title = args.titles[number] if args.titles else run.name
        ax.set(title=title, xticks=[], yticks=[], box_aspect=1)
    figure.savefig(args.picture, dpi=120)


if __name__ == "__main__":
    main()
