"""Schedules, q_sample, posterior, DDPM steps and DDIM steps against the schedulers of diffusers.

  pip install -r benchmarks/requirements.txt
  python benchmarks/parity_diffusers.py

Both sides get the same x_t, the same predicted noise and the same random numbers at every single t.
diffusers forms 1 - alpha_bar_t in float32, where it has a relative error of up to 6e-8 / (1 -
alpha_bar_t): 3e-4 at t = 2. The limit for each t is 1e-5 plus that. Exit code 1 if one is exceeded.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import stand_in  # noqa: E402

from ddpm_2d import Diffusion, beta_schedule  # noqa: E402

T, NAMES = 1000, {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def model(x, t, y=None):
    """Any smooth function of x and t will do for the predicted noise."""
    return torch.tanh(x) * (0.5 + t.view(-1, 1) / 2000)


def relative(a, b):
    """Largest difference of two arrays, over the largest entry or 1."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def differences(name):
    """Rows (what, t, largest difference, allowed difference) for one schedule."""
    from diffusers import DDIMScheduler, DDPMScheduler

    ours, kind = Diffusion(T, name), NAMES[name]
    theirs = DDPMScheduler(T, beta_schedule=kind, clip_sample=False)
    noise = ours.noise.double() ** 2
    allowed = lambda t: 1e-5 + 6e-8 / noise[t].item()
    beta = beta_schedule(name, T)[1:]
    yield "beta", None, (theirs.betas - beta).abs().max().item(), 1e-6
    x0, eps = torch.randn(2, 64, 2, generator=torch.Generator().manual_seed(0))
    for t in range(1, T + 1):
        here, there = torch.full((64,), t), torch.full((64,), t - 1)
        gap = (ours.q_sample(x0, here, eps) - theirs.add_noise(x0, eps, there)).abs().max()
        yield "q_sample", t, gap.item(), allowed(t)
        if t > 1:
            var = ours.q_posterior(x0[:1], x0[:1], torch.tensor([t]))[1].item()
            gap = abs(theirs._get_variance(t - 1).item() - var)
            yield "posterior variance", t, gap, allowed(t)
    fast = DDIMScheduler(
        T, beta_schedule=kind, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    fast.set_timesteps(50)
    seeded = lambda: torch.Generator().manual_seed(1)
    mine, same = seeded(), seeded()
    states = list(ours.p_sample_loop(model, eps, generator=mine))
    for t, x, after in zip(range(T, 0, -1), states, states[1:]):
        step = theirs.step(model(x, torch.tensor([t])), t - 1, x, generator=same).prev_sample
        yield "DDPM step", t, relative(step, after), allowed(t)
    for eta in (0.0, 1.0):
        mine, same = seeded(), seeded()
        states = list(ours.ddim_sample_loop(model, eps, 50, eta, generator=mine))
        for i, x, after in zip(fast.timesteps.tolist(), states, states[1:]):
            out = model(x, torch.tensor([i + 1]))
            step = fast.step(out, i, x, eta=eta, generator=same).prev_sample
            yield f"DDIM step, eta {eta:g}", i + 1, relative(step, after), allowed(i + 1)


def main(argv=None):
    """Print the largest difference of each kind and where it is; 1 if a limit is exceeded."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args(argv)
    stand_in.install()
    failed = False
    print("| schedule | what | largest difference | at t | where t > 100 |\n|---|---|---|---|---|")
    for name in NAMES:
        groups = {}
        for what, t, gap, limit in differences(name):
            groups.setdefault(what, []).append((gap, t))
            if not gap <= limit:
                print(f"{name}: {what} at t = {t} differs by {gap:.1e}, allowed {limit:.1e}")
                failed = True
        for what, rows in groups.items():
            gap, t = max(rows)
            late = max((g for g, t in rows if t and t > 100), default=gap)
            print(f"| {name} | {what} | {gap:.1e} | {t or ''} | {late:.1e} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
