"""Schedules, q_sample, velocity, Algorithm 2 and DDIM against the schedulers of diffusers.

pip install -r benchmarks/requirements.txt
python benchmarks/parity_diffusers.py               under a minute

Both sides get the same x_t, the same predicted noise and the same random numbers at every single t.
diffusers forms 1 - alpha_bar_t in float32, where it has a relative error of up to 6e-8 / (1 -
alpha_bar_t): 3e-4 at t = 2. The limit for each t is 1e-5 plus that; for beta itself it is 1e-6.
Exit code 1 if one is exceeded.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm_2d  # noqa: E402
import ddpm_mnist  # noqa: E402

T = 1000
SCHEDULES = {  # by their names in diffusers
    "linear": ddpm_2d.linear_schedule(T),
    "squaredcos_cap_v2": ddpm_mnist.cosine_schedule(T),
}


def model(x, t):
    """Any smooth function of x and t will do for the predicted noise."""
    return torch.tanh(x) * (0.5 + t.view(-1, 1) / 2000)


def largest(a, b):
    """Largest difference of two arrays, relative to the largest entry of b if that is above 1."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def forward_process(ddpm, ddim, theirs, x0, eps):
    """Rows (what, t, largest difference) for beta, q_sample, velocity, the posterior variance."""
    for t in range(1, T + 1):
        beta = ddpm.beta[t]
        yield "beta", t, abs(theirs.betas[t - 1].item() - beta)
        times = torch.full((len(x0),), t)
        xt = theirs.add_noise(x0, eps, times - 1)  # their t counts from 0
        yield "q_sample", t, largest(xt, ddpm.q_sample(x0, times, eps))
        v = theirs.get_velocity(x0, eps, times - 1)
        yield "velocity", t, largest(v, ddim.velocity(x0, times, eps))
        if t > 1:  # at t = 1 it is 0, and 1e-20 in diffusers
            beta_tilde = (1 - ddpm.alpha_bar[t - 1]) / (1 - ddpm.alpha_bar[t]) * beta  # Eq. (7)
            variance = theirs._get_variance(t - 1).item()
            yield "posterior variance", t, abs(variance - beta_tilde)


def steps(what, sampler, times, scheduler, **options):
    """Rows (what, t, largest difference) for every step of our sampler, from the same x_t."""
    torch.manual_seed(1)
    states = list(sampler)
    torch.manual_seed(1)
    for t, xt, after in zip(times, states, states[1:]):
        eps = model(xt, torch.tensor([t]))
        step = scheduler.step(eps, t - 1, xt, **options).prev_sample
        yield what, t, largest(step, after)


def differences(name, beta):
    """Rows (what, t, largest difference) for one schedule."""
    from diffusers import DDIMScheduler, DDPMScheduler

    torch.manual_seed(0)
    x0, eps = torch.randn(2, 64, 2)
    ddpm = ddpm_2d.Diffusion(beta)
    ddim = ddpm_mnist.Diffusion(beta)
    theirs = DDPMScheduler(T, beta_schedule=name, clip_sample=False)
    yield from forward_process(ddpm, ddim, theirs, x0, eps)
    yield from steps("DDPM step", ddpm.p_sample_loop(model, eps), range(T, 0, -1), theirs)
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    theirs = DDIMScheduler(T, beta_schedule=name, clip_sample=False, **options)
    theirs.set_timesteps(50)
    times = [t + 1 for t in theirs.timesteps.tolist()]
    for eta in (0.0, 1.0):
        sampler = ddim.ddim_sample_loop(model, eps, 50, eta)
        yield from steps(f"DDIM step, eta {eta:g}", sampler, times, theirs, eta=eta)


def main(argv=None):
    """Print the largest difference of each kind and where it is; 1 if a limit is exceeded."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    failed = False
    print("| schedule | what | largest difference | at t | where t > 100 |\n|---|---|---|---|---|")
    for name, beta in SCHEDULES.items():
        alpha_bar = torch.cumprod(1 - beta, 0).tolist()
        groups = {}
        for what, t, gap in differences(name, beta):
            groups.setdefault(what, []).append((gap, t))
            limit = 1e-6 if what == "beta" else 1e-5 + 6e-8 / (1 - alpha_bar[t - 1])
            if not gap <= limit:  # so NaN is a failure, too
                print(f"{name}: {what} at t = {t} differs by {gap:.1e}, allowed {limit:.1e}")
                failed = True
        for what, rows in groups.items():
            gap, t = max(rows)
            late = max(gap for gap, t in rows if t > 100)
            print(f"| {name} | {what} | {gap:.1e} | {t} | {late:.1e} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
