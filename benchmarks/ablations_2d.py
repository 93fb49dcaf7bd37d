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


@contextlib.contextmanager
def without_skip():
    """The network gives eps itself, and not a correction of the best linear guess."""
    forward = ddpm_2d.NoisePredictor.forward

    def plain(self, xt, t, y=None):
        linear = self.diffusion.noise[t, None] * xt
        return (forward(self, xt, t, y) - linear) / self.diffusion.signal[t, None]

    ddpm_2d.NoisePredictor.forward = plain
    yield
    ddpm_2d.NoisePredictor.forward = forward


@contextlib.contextmanager
def without_ema():
    """The average of the weights is the last weights."""
    average = ddpm_2d.get_ema_multi_avg_fn
    ddpm_2d.get_ema_multi_avg_fn = lambda decay: average(0.0)
    yield
    ddpm_2d.get_ema_multi_avg_fn = average


def trained(data_name):
    """Toy data, diffusion and the network of a default run."""
    run(data_name)
    data, diffusion = ddpm_2d.load_data(data_name)[0], ddpm_2d.Diffusion(1000, "cosine")
    net = ddpm_2d.NoisePredictor(diffusion, int(data.labels.max()) + 1)
    net.load_state_dict(torch.load(OUT / "model.pt", weights_only=True)["ema"])
    return data, diffusion, net


def sigma(data, diffusion, net, n=10_000):
    """Variance of the sampler at 1000, 50 and 10 steps, with labels drawn as in the data."""
    torch.manual_seed(0)
    y, xT = data.sample(n)[1], torch.randn(n, 2)
    print("\n| steps | sigma | swd ratio | off support |\n|---|---|---|---|")
    for steps in (1000, 50, 10):
        for eta, name in ((0.0, "0 (DDIM)"), (1.0, "beta-tilde (DDPM)")):
            *_, x = diffusion.ddim_sample_loop(net, xT, steps, eta, y)
            m = scores(x, data)
            print(
                f"| {steps} | {name} | {m['swd_ratio']:.2f} | {m['off_support']:.2%} |", flush=True
            )
    *_, x = diffusion.p_sample_loop(net, xT, y, variance="large")
    m = scores(x, data)
    print(f"| 1000 | beta (DDPM) | {m['swd_ratio']:.2f} | {m['off_support']:.2%} |", flush=True)


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
