"""Where the bits of ddpm_mnist.py are: by t, and by black, white and grey pixels.

python benchmarks/bits_mnist.py weights/ddpm_mnist.pt

Each row is L_t to L_{2t-1} in bits per dimension, the share of the bound from L_0 on, and the mean
squared error of x_0 at t over noise^2 / signal^2, what each pixel's own noisy value gives.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from ddpm_mnist import Diffusion, UNet, load_mnist  # noqa: E402


@torch.no_grad()
def main(argv=None):
    """Print the table of one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a model.pt of ddpm_mnist.py")
    parser.add_argument("--data", default="data/mnist", help="folder of the IDX files")
    parser.add_argument("--images", type=int, default=32, help="of the test set")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    saved = torch.load(args.model, "cpu", weights_only=True)["ddpm_mnist"]
    diffusion = Diffusion(saved["config"]["T"], saved["config"]["schedule"])
    average = AveragedModel(UNet(diffusion))
    average.load_state_dict(saved["ema"])
    *_, x, y, _ = load_mnist(args.data)
    pick = torch.randperm(len(x))[: args.images]
    x, y = x[pick, None], y[pick]
    x0, kinds = x / 127.5 - 1, {"black": x == 0, "grey": (x > 0) & (x < 252), "white": x >= 252}
    bits = diffusion.variational_bound(average.module, x0, y) / math.log(2) / x0[0].numel()
    shares = (f"{kind} {of.float().mean():.1%}" for kind, of in kinds.items())
    print(", ".join(shares), "of the pixels")
    print(f"{bits.sum() + math.log2(10) / x0[0].numel():.3f} bits with those of the label")
    print("   t  noise in grey levels    bits  so far " + "".join(f"{kind:>8}" for kind in kinds))
    for t in (2**k for k in range(int(math.log2(diffusion.T)) + 1)):
        times, over = torch.full(y.shape, t), diffusion.noise[t] / diffusion.signal[t]
        error = torch.zeros_like(x0)
        for _ in range(8):
            xt = diffusion.q_sample(x0, times, torch.randn_like(x0))
            x0_hat = diffusion.predict_x0(xt, times, average.module(xt, times, y))
            error += ((x0_hat - x0) / over) ** 2 / 8
        errors = "".join(f"{error[of].mean():8.3f}" for of in kinds.values())
        here, share = bits[t : 2 * t].sum(), bits[: 2 * t].sum() / bits.sum()
        print(f"{t:4} {127.5 * over:21.2f} {here:7.3f} {share:7.0%} {errors}")


if __name__ == "__main__":
    main()
