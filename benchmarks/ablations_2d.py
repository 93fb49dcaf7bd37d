"""What a choice in ddpm_2d.py is worth: one table for each question that a reader may ask.

  python benchmarks/ablations_2d.py                  all of them, about ten minutes on two cores
  python benchmarks/ablations_2d.py schedule T       some: schedule, T, skip, ema, sigma, guidance

All on one toy set and one seed, with the defaults of the script in everything else.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from compare_2d import scores  # noqa: E402

import ddpm_2d  # noqa: E402

OUT = ROOT / "runs" / "ablations_2d"


def run(data, *flags):
    """The metrics of one run of the script."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return ddpm_2d.main(["--data", data, "--out", str(OUT), *map(str, flags)])


def table(title, rows):
    """Print one table of metrics; rows are (name, metrics)."""
    print(f"\n| {title} | excess loss | bound - entropy | swd ratio | DDIM-50 | off support |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, m in rows:
        gap = m["bound_nats"] - m["entropy_nats"]
        print(
            f"| {name} | {m['excess_loss']:.2%} | {gap:.3f} | {m['swd_ratio']:.2f} "
            f"| {m['ddim_swd_ratio']:.2f} | {m['off_support']:.2%} |",
            flush=True,
        )


class Raw(torch.nn.Module):
    """In place of the diffusion inside a network: its output is eps, not a correction."""

    def q_sample(self, net, t, xt):
        return net


def without_skip():
    """Networks made inside give eps itself, and not a correction of the best linear guess."""
    make = ddpm_2d.NoisePredictor.__init__

    def init(self, *args):
        make(self, *args)
        self.diffusion = Raw()

    return patch.object(ddpm_2d.NoisePredictor, "__init__", init)


def without_ema():
    """The average of the weights is the last weights."""
    average = ddpm_2d.get_ema_multi_avg_fn
    return patch.object(ddpm_2d, "get_ema_multi_avg_fn", lambda decay: average(0.0))


def trained(data_name):
    """Toy data, diffusion and the network of a default run."""
    run(data_name)
    data, diffusion = ddpm_2d.load_data(data_name)[0], ddpm_2d.Diffusion(1000, "cosine")
    net = ddpm_2d.NoisePredictor(diffusion, int(data.labels.max()) + 1)
    net.load_state_dict(torch.load(OUT / "model.pt", weights_only=True)["ema"])
    return data, diffusion, net


@torch.no_grad()
def large(diffusion, net, x, y, steps):
    """The sampler with sigma^2 = beta of the steps taken, "sigma-hat" of DDIM, Sec. 5."""
    times = [round(diffusion.T * k / steps) for k in range(steps, -1, -1)]
    for t, s in zip(torch.tensor(times).split(1), times[1:]):
        x0 = diffusion.predict_x0(x, t, eps := net(x, t.expand(len(x)), y))
        beta = -torch.expm1(torch.log1p(-diffusion.beta[s + 1 : t + 1]).sum())
        tilde = beta * (diffusion.noise[s] / diffusion.noise[t]) ** 2
        x = diffusion.signal[s] * x0 + (diffusion.noise[s] ** 2 - tilde).sqrt() * eps
        x = x + beta.sqrt() * torch.randn_like(x) * (s > 0)
    return x


def sigma(data, diffusion, net, n=10_000):
    """Variance of the sampler at 1000, 50 and 10 steps, with labels drawn as in the data."""
    torch.manual_seed(0)
    y, xT = data.sample(n)[1], torch.randn(n, 2)
    print("\n| steps | sigma^2 | swd ratio | off support |\n|---|---|---|---|")
    for steps in (1000, 50, 10):
        ways = {"0 (DDIM)": 0.0, "beta-tilde": 1.0, "beta": None}
        for name, eta in ways.items():
            if eta is None:
                x = large(diffusion, net, xT, y, steps)
            else:
                *_, x = diffusion.ddim_sample_loop(net, xT, steps, eta, y)
            m = scores(x, data)
            row = f"| {steps} | {name} | {m['swd_ratio']:.2f} | {m['off_support']:.2%} |"
            print(row, flush=True)


def guidance(data, diffusion, net, n=10_000):
    """Guidance scale: how sure the exact classifier is of the label, and what it costs."""
    torch.manual_seed(0)
    y, xT = data.sample(n)[1], torch.randn(n, 2)
    classes = range(net.classes)
    print(
        "\n| guidance | label by the exact density | swd ratio | off support |\n|---|---|---|---|"
    )
    for scale in (0.0, 1.0, 2.0, 4.0):
        *_, x = diffusion.ddim_sample_loop(net, xT, 50, y=y, guidance=scale)
        log_p = torch.stack([data.log_prob(x, torch.full_like(y, k)) for k in classes], 1)
        right, m = (log_p.argmax(1) == y).float().mean().item(), scores(x, data)
        print(
            f"| {scale:g} | {right:.1%} | {m['swd_ratio']:.2f} | {m['off_support']:.2%} |",
            flush=True,
        )


def main(argv=None):
    """Print the chosen tables."""
    names = ["schedule", "T", "skip", "ema", "sigma", "guidance"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--data", default="swissroll", help="a toy set of ddpm_2d.py")
    args = parser.parse_args(argv)
    base = run(args.data)
    if "schedule" in args.names:
        others = [(s, run(args.data, "--schedule", s)) for s in ("linear", "sigmoid")]
        table("schedule", [("cosine", base), *others])
    if "T" in args.names:
        table("T", [*((T, run(args.data, "--T", T)) for T in (50, 200)), (1000, base)])
    if "skip" in args.names:
        with without_skip():
            table("skip", [("with", base), ("without", run(args.data))])
    if "ema" in args.names:
        with without_ema():
            table("EMA", [("0.995", base), ("none", run(args.data))])
    if {"sigma", "guidance"} & {*args.names}:
        parts = trained(args.data)
        if "sigma" in args.names:
            sigma(*parts)
        if "guidance" in args.names:
            guidance(*parts)


if __name__ == "__main__":
    main()
