"""What the choices in ddpm_2d.py are worth: schedule, output of the network, T, steps.

OMP_NUM_THREADS=1 python benchmarks/ablations_2d.py      about 40 minutes on one core
python benchmarks/ablations_2d.py --seeds 1 --steps 500  a glance

Each row of the first table changes the default in one place, or output and schedule together; the
second table takes the nets of the default and samples by DDIM. A cell is the median over the seeds,
with the lowest and the highest: rows whose ranges overlap are not told apart. All networks are
trained on Eq. (14), whatever their output is. It is a mean over t, and other schedules have other
levels of noise: compare these by bound - entropy (0 is best) and by swd (1 is best) instead.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm_mnist  # noqa: E402
from benchmarks.judge_2d import scores, toy_data  # noqa: E402
from ddpm_2d import TOYS, Diffusion, NoisePredictor, evaluate, linear_schedule, train  # noqa: E402

SCHEDULES = {"linear": linear_schedule, "cosine": ddpm_mnist.cosine_schedule}
OUTPUTS = ("eps = x_t + network", "eps = network", "v = network")
DEFAULT = {"schedule": "linear", "output": OUTPUTS[0], "T": 1000}
COLUMNS = {  # and what a cell is multiplied by
    "excess loss, %": 100,
    "bound - ideal": 1,
    "bound - entropy": 1,
    "swd, DDPM": 1,
    "swd, DDIM-50": 1,
    "off support, %": 100,
}


class Network(NoisePredictor):
    """The network of ddpm_2d.py, whose output is eps - x_t, eps or v of Salimans & Ho 2022."""

    def __init__(self, diffusion, output):
        super().__init__(diffusion.T)
        self.diffusion = diffusion
        self.output = output

    def forward(self, xt, t):
        eps = super().forward(xt, t)  # x_t + network
        if self.output == "eps = network":
            return eps - xt
        if self.output == "v = network":  # eps = signal v + noise x_t
            signal = self.diffusion.signal[t, None]
            return signal * (eps - xt) + self.diffusion.noise[t, None] * xt
        return eps


def last(states):
    """x_0 of a sampler that yields x_T, ..., x_0."""
    for xt in states:
        pass
    return xt


def one_run(args, data, seed, schedule, output, T, steps):
    """Train, sample and judge once. Returns the numbers of a row, and how to sample by DDIM."""
    torch.manual_seed(seed)
    beta = SCHEDULES[schedule](T)
    diffusion = Diffusion(beta)
    net = Network(diffusion, output)
    train(diffusion, net, data, steps, 1024, 5e-3)  # the defaults of ddpm_2d.py
    xT = torch.randn(args.samples, 2)
    x0 = last(diffusion.p_sample_loop(net, xT))
    metrics = evaluate(diffusion, net, data, x0)

    def ddim(steps, eta):
        sampler = ddpm_mnist.Diffusion(beta).ddim_sample_loop(net, xT, min(steps, T), eta)
        return scores(data, last(sampler))

    gap = metrics["bound_nats"] - metrics["ideal_bound_nats"]
    whole = metrics["bound_nats"] - metrics["entropy_nats"]
    swd = [scores(data, x0)["swd_ratio"], ddim(50, 0)["swd_ratio"]]
    return [metrics["excess_loss"], gap, whole, *swd, metrics["off_support"]], ddim


def cells(rows, factors):
    """Median (lowest to highest) of each column of the rows, one for each seed."""
    table = np.array(rows) * factors
    spread = zip(np.median(table, 0), table.min(0), table.max(0))
    return " | ".join(f"{middle:.3g} ({low:.3g} to {high:.3g})" for middle, low, high in spread)


def ablate(args, name):
    """Print both tables for one data set. Returns {choice: rows}."""
    data = toy_data(name)
    choices = [{"schedule": s, "output": o} for s in SCHEDULES for o in OUTPUTS]
    choices += [{"T": 50}, {"T": 200}, {"steps": args.steps // 4}, {"steps": args.steps * 2}]
    print(f"\n{name}, medians of {args.seeds} seeds (lowest to highest)\n")
    print("| schedule | output | T | steps |", " | ".join(COLUMNS), "|")
    print("|---|---|---|---" + "|---" * len(COLUMNS) + "|")
    results = {}
    nets = []
    for choice in choices:
        setting = DEFAULT | {"steps": args.steps} | choice
        runs = [one_run(args, data, seed, **setting) for seed in range(args.seeds)]
        rows, samplers = zip(*runs)
        nets = nets or samplers  # those of the default, the first of the choices
        key = " | ".join(str(value) for value in setting.values())
        results[key] = rows
        print(f"| {key} | {cells(rows, list(COLUMNS.values()))} |", flush=True)
    print("\n| steps of DDIM | eta | swd | off support, % |\n|---|---|---|---|")
    for steps in (10, 50, 250):
        for eta in (0, 1):
            judged = [ddim(steps, eta) for ddim in nets]
            rows = [[row["swd_ratio"], row["off_support"]] for row in judged]
            print(f"| {steps} | {eta} | {cells(rows, [1, 100])} |", flush=True)
    return results


def main(argv=None):
    """Print the tables. Returns {data: {choice: rows}}, a row a seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ["8gaussians", "spirals"]
    add("--data", nargs="+", default=names, choices=list(TOYS), help="toy sets of ddpm_2d.py")
    add("--steps", type=int, default=4000, help="of training, of the default")
    add("--seeds", type=int, default=3, help="runs of each row")
    add("--samples", type=int, default=4000, help="to judge, of each run")
    args = parser.parse_args(argv)
    if min(args.steps // 4, args.seeds, args.samples) < 1:
        parser.error("--steps must be 4 or more, --seeds and --samples 1 or more")
    return {name: ablate(args, name) for name in args.data}


if __name__ == "__main__":
    main()
