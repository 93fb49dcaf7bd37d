"""What a choice in ddpm_2d.py is worth: one table for each question that a reader may ask.

python benchmarks/ablations_2d.py               all of them, about ten minutes on two idle cores
python benchmarks/ablations_2d.py schedule T    some: schedule, T, skip, sigma

All on one toy set and one seed, with the defaults of the script in everything else.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm_2d  # noqa: E402
from benchmarks.compare_2d import scores, toy_data  # noqa: E402

NAMES = ["schedule", "T", "skip", "sigma"]


def sigmoid_schedule(T):
    """beta of Jabri et al. 2022 (arXiv 2212.11972), start -3, end 3, tau 1: float64 [T + 1]."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)  # t / T
    signal = torch.sigmoid(3 - 6 * u)
    alpha_bar = (signal - signal[-1]) / (signal[0] - signal[-1])
    beta = torch.zeros(T + 1, dtype=torch.float64)
    beta[1:] = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return beta


class NoSkip(nn.Module):
    """In place of the diffusion inside a network: leaves its output as it is."""

    def q_sample(self, v, t, eps):
        return v


class PlainPredictor(ddpm_2d.NoisePredictor):
    """The same network, but its output is eps itself: v and the skip from x_t are gone."""

    def __init__(self, diffusion):
        super().__init__(diffusion)
        self.diffusion = NoSkip()


def load(out):
    """Diffusion, network and standardised samples [n, 2] of the run in a folder."""
    saved = torch.load(out / "model.pt", map_location="cpu", weights_only=True)
    make_beta = getattr(ddpm_2d, saved["schedule"] + "_schedule")
    diffusion = ddpm_2d.Diffusion(make_beta(saved["T"]))
    net = ddpm_2d.NoisePredictor(diffusion)
    net.load_state_dict(saved["net"])
    samples = (torch.from_numpy(np.load(out / "samples.npy")) - saved["mean"]) / saved["std"]
    return diffusion, net, samples.float()


def run(args, *flags):
    """The metrics of one run of the script, and both sliced Wasserstein ratios."""
    flags = ["--data", args.data, "--steps", args.steps, "--samples", args.samples, *flags]
    flags += ["--out", args.out]
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = ddpm_2d.main([str(flag) for flag in flags])
    diffusion, net, samples = load(args.out)
    *_, fast = diffusion.ddim_sample_loop(net, torch.randn_like(samples), min(50, diffusion.T))
    metrics["swd_ratio"] = scores(samples, toy_data(args.data))["swd_ratio"]
    metrics["ddim_swd_ratio"] = scores(fast, toy_data(args.data))["swd_ratio"]
    return metrics


def table(title, rows):
    """Print one table; rows is {name: metrics}."""
    print(f"\n| {title} | excess loss | bound - entropy | swd ratio | DDIM-50 | off support |")
    print("|---|---|---|---|---|---|")
    for name, m in rows.items():
        gap = m["bound_nats"] - m["entropy_nats"]
        print(
            f"| {name} | {m['excess_loss']:.2%} | {gap:.3f} | {m['swd_ratio']:.2f} "
            f"| {m['ddim_swd_ratio']:.2f} | {m['off_support']:.2%} |",
            flush=True,
        )


@torch.no_grad()
def large_variance(diffusion, net, xt, steps):
    """DDIM's sampler with noise of variance beta of the steps taken, "sigma-hat" of its Sec. 5."""
    times = [round(diffusion.T * k / steps) for k in range(steps, -1, -1)]
    for t, s in zip(times, times[1:]):
        eps = net(xt, torch.full((len(xt),), t))
        a_t = diffusion.alpha_bar[t]
        a_s = diffusion.alpha_bar[s]
        x0 = (xt - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        beta = 1 - a_t / a_s
        beta_tilde = (1 - a_s) / (1 - a_t) * beta
        z = torch.randn_like(xt) if s > 0 else 0
        xt = a_s**0.5 * x0 + (1 - a_s - beta_tilde) ** 0.5 * eps + beta**0.5 * z
    return xt


def sigma(args):
    """Print the table for the variance of the sampler, at 1000, 50 and 10 steps. It needs a run of
    the defaults in --out."""
    diffusion, net, samples = load(args.out)
    data = toy_data(args.data)
    print("\n| steps | sigma^2 | swd ratio | off support |\n|---|---|---|---|")
    for steps in (1000, 50, 10):
        torch.manual_seed(0)
        xT = torch.randn_like(samples)
        *_, none = diffusion.ddim_sample_loop(net, xT, steps, eta=0.0)
        *_, small = diffusion.ddim_sample_loop(net, xT, steps, eta=1.0)
        large = large_variance(diffusion, net, xT, steps)
        for name, x in {"0 (DDIM)": none, "beta-tilde": small, "beta": large}.items():
            m = scores(x, data)
            row = f"| {steps} | {name} | {m['swd_ratio']:.2f} | {m['off_support']:.2%} |"
            print(row, flush=True)


def main(argv=None):
    """Print the chosen tables. Returns {question: {choice: metrics}} of all but sigma."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    add("--data", default="swissroll", choices=list(ddpm_2d.TOYS), help="a toy set of ddpm_2d.py")
    add("--steps", type=int, default=4000, help="of training, in each run")
    add("--samples", type=int, default=10_000, help="to judge, of each run")
    add("--out", type=Path, default=ROOT / "runs" / "ablations_2d", help="folder of the last run")
    args = parser.parse_args(argv)
    names = args.names or NAMES
    if not set(names) <= set(NAMES):
        parser.error(f"{' '.join(names)}: choose from {', '.join(NAMES)}")

    base = run(args)
    if "sigma" in names:
        sigma(args)
    results = {}
    if "schedule" in names:
        linear = run(args, "--schedule", "linear")
        with patch.object(ddpm_2d, "cosine_schedule", sigmoid_schedule):
            sigmoid = run(args)
        results["schedule"] = {"cosine": base, "linear": linear, "sigmoid": sigmoid}
    if "T" in names:
        results["T"] = {50: run(args, "--T", 50), 200: run(args, "--T", 200), 1000: base}
    if "skip" in names:
        with patch.object(ddpm_2d, "NoisePredictor", PlainPredictor):
            results["skip"] = {"with": base, "without": run(args)}
    for question, rows in results.items():
        table(question, rows)
    return results


if __name__ == "__main__":
    main()
