"""An independent judge of generated digits: a small CNN trained on MNIST.

  python benchmarks/classifier_mnist.py --train --model runs/classifier.pt     (about 3 minutes)
  python benchmarks/classifier_mnist.py --model runs/classifier.pt runs/ddpm_mnist

For every run folder it prints the share of samples.npy that is recognised as labels.npy says, and
the Frechet distance of the samples to the training set in the features before the last layer,
divided by the distance of as many real training digits (averaged over ten draws).
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddpm_mnist import load_mnist  # noqa: E402


class Classifier(nn.Module):
    """28 x 28 pixels in [-1, 1] -> 128 features -> 10 logits."""

    def __init__(self):
        super().__init__()
        layers, wide = [], 1
        for width, pool in ((32, False), (32, True), (64, False), (64, True), (128, True)):
            layers += [nn.Conv2d(wide, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
            wide = width
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 128), nn.ReLU())
        self.last = nn.Linear(128, 10)

    def forward(self, x):
        return self.last(self.features(x))


def to_pixels(images):
    """uint8 [n, 28, 28] as float32 [n, 1, 28, 28] in [-1, 1]."""
    return torch.as_tensor(images)[:, None].float() / 127.5 - 1


def augment(x):
    """Random rotation (12 degrees), scale (10 %), shear and shift (2 pixels) of every image."""
    n = len(x)
    angle, shear = (torch.rand(2, n) * 2 - 1) * math.radians(12)
    scale = 1 + 0.1 * (torch.rand(n) * 2 - 1)
    shift = (torch.rand(2, n) * 2 - 1) * 2 / 14
    rows = [scale * angle.cos(), shear - angle.sin(), shift[0]]
    rows += [angle.sin(), scale * angle.cos(), shift[1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def predict(model, images):
    """Features [n, 128] and predicted labels [n] of uint8 images."""
    parts = [model.features(to_pixels(part)) for part in torch.as_tensor(images).split(500)]
    features = torch.cat(parts)
    return features.double(), model.last(features).argmax(1)


def train(model, x, y, epochs, batch=128):
    """AdamW with one cycle of the learning rate."""
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, steps)
    model.train()
    with tqdm(total=steps, desc="classifier") as bar:
        for _ in range(epochs):
            for pick in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits = model(augment(to_pixels(x[pick])))
                optimizer.zero_grad()
                F.cross_entropy(logits.float(), y[pick], label_smoothing=0.05).backward()
                optimizer.step()
                scheduler.step()
                bar.update()
    return model.eval()


def frechet(a, b):
    """Squared Frechet distance of the Gaussians fitted to the rows of a and of b, each [n, d]."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # tr sqrt(A B) = sum of sqrt of the eigenvalues of A^(1/2) B A^(1/2), a symmetric matrix
    value, vector = torch.linalg.eigh(cov_a)
    root = vector * value.clamp(min=0).sqrt() @ vector.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def judge(model, samples, labels, real, seed=0):
    """Share recognised as asked and the Frechet ratio; `real` are the features of training data."""
    features, guess = predict(model, samples)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randperm(len(real), generator=generator)[: len(samples)] for _ in range(10)]
    floor = torch.stack([frechet(real[draw], real) for draw in draws]).mean()
    distance = frechet(features, real)
    return {
        "n": len(samples),
        "recognised": (guess == torch.as_tensor(labels)).double().mean().item(),
        "frechet": distance.item(),
        "frechet_real": floor.item(),
        "frechet_ratio": (distance / floor).item(),
    }


def main(argv=None):
    """Train the classifier, or judge the samples of runs with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders with samples.npy, labels.npy")
    parser.add_argument("--model", type=Path, default="runs/classifier.pt", help="the classifier")
    parser.add_argument("--data", type=Path, default="data/mnist", help="folder of the IDX files")
    parser.add_argument("--train", action="store_true", help="train and save it first")
    parser.add_argument("--epochs", type=int, default=4, help="of --train")
    args = parser.parse_args(argv)
    train_x, train_y, test_x, test_y, _ = load_mnist(args.data)
    torch.manual_seed(0)
    model, results = Classifier(), {}
    if args.train:
        train(model, train_x, train_y, args.epochs)
        real, _ = predict(model, train_x)
        args.model.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"classifier": model.state_dict(), "real": real.float()}, args.model)
    saved = torch.load(args.model, weights_only=True)
    model.load_state_dict(saved["classifier"])
    model.eval()
    if args.train:
        accuracy = (predict(model, test_x)[1] == test_y).double().mean().item()
        print(f"test accuracy {accuracy:.4f}")
    for run in args.runs:
        arrays = (np.load(run / name) for name in ("samples.npy", "labels.npy"))
        results[str(run)] = judge(model, *arrays, saved["real"].double())
    print(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
