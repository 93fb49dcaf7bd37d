"""ddpm_2d.py as a specification: each closed form stands against an oracle that is not our code.

Statistical checks allow six standard errors: a false alarm has a chance below 1e-8 each, so below
1e-6 a run, were there no seed. Means and variances come from 200,000 draws: 2 % would show.
"""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import ddpm_2d
from ddpm_2d import Diffusion, NoisePredictor, ToyData, beta_schedule, load_data

SCRIPT = Path(ddpm_2d.__file__)
SETS = ("8gaussians", "moons", "circles", "swissroll", "spirals", "checkerboard")
SCHEDULES = ("linear", "cosine", "sigmoid")
steps_of = st.integers(21, 10_000)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_eps(diffusion, m, s):
    """E[eps | x_t] for data N(m, s^2), from the joint Gaussian of (eps, x_t)."""

    def model(xt, t, y=None):
        a = diffusion.alpha_bar.double()[t][:, None]
        return ((1 - a).sqrt() * (xt - a.sqrt() * m) / (a * s**2 + 1 - a)).to(xt.dtype)

    return model


# ------------------------------------------------------------------------------ the schedule


@given(name=st.sampled_from(SCHEDULES), T=steps_of)
def test_every_schedule_turns_data_into_noise(name, T):
    beta = beta_schedule(name, T)
    alpha_bar = torch.cumprod(1 - beta, 0)
    assert beta.dtype == torch.float64 and beta.shape == (T + 1,)
    assert beta[0] == 0 and (beta[1:] > 0).all() and (beta < 1).all()
    assert alpha_bar[0] == 1 and (alpha_bar.diff() < 0).all()
    assert alpha_bar[-1].sqrt() < 0.01


def test_linear_schedule_has_the_values_of_the_paper():
    alpha_bar = torch.cumprod(1 - beta_schedule("linear", 1000), 0)
    want = {1: 0.9999, 2: 0.99978009, 500: 0.0785872, 1000: 4.0358e-5}
    for t, value in want.items():
        assert alpha_bar[t].item() == pytest.approx(value, rel=1e-4 if t > 2 else 1e-7)


@pytest.mark.parametrize(("T", "end"), [(1000, 2.43e-9), (200, 6.1e-8), (50, 9.7e-7)])
def test_cosine_schedule_has_the_values_of_its_authors(T, end):
    beta = beta_schedule("cosine", T)
    assert torch.cumprod(1 - beta, 0)[-1].item() == pytest.approx(end, rel=0.01)
    assert (beta == 0.999).sum() == 1 and beta[-1] == 0.999
    if T == 1000:
        assert beta[1].item() == pytest.approx(4.128e-5, rel=1e-3)


def test_sigmoid_schedule_is_a_sigmoid():
    alpha_bar = torch.cumprod(1 - beta_schedule("sigmoid", 1000), 0).numpy()
    u = np.arange(1, 999) / 1000
    sigmoid = 1 / (1 + np.exp(6 * u - 3))
    low, high = 1 / (1 + np.exp(3)), 1 / (1 + np.exp(-3))
    np.testing.assert_allclose(alpha_bar[1:999], (sigmoid - low) / (high - low), rtol=1e-9)


@pytest.mark.parametrize(("name", "T"), [("linear", 20), ("cosine", 10_001), ("tanh", 100)])
def test_impossible_schedules_are_refused(name, T):
    with pytest.raises(ValueError, match=str(T)):
        beta_schedule(name, T)


@pytest.mark.parametrize("name", SCHEDULES)
def test_buffers_are_float32_of_float64_differences(name):
    diffusion, beta = Diffusion(1000, name), beta_schedule(name, 1000)
    assert diffusion.noise[1].item() ** 2 == pytest.approx(beta[1].item(), rel=1e-6)
    exact = torch.cumprod(1 - beta, 0)
    for buffer, want in (("beta", beta), ("alpha", 1 - beta), ("alpha_bar", exact)):
        assert getattr(diffusion, buffer).dtype == torch.float32
        torch.testing.assert_close(getattr(diffusion, buffer), want.float(), rtol=0, atol=0)
    torch.testing.assert_close(diffusion.signal.double() ** 2, exact, rtol=3e-7, atol=0)


# --------------------------------------------------------------------------- the forward process


def test_q_sample_has_the_mean_and_variance_of_eq_4():
    diffusion, n = Diffusion(100), 200_000
    eps = torch.randn(n, 1, generator=seeded())
    for t in (1, 10, 50, 100):
        xt = diffusion.q_sample(torch.full((n, 1), 1.7), torch.full((n,), t), eps).double()
        a = torch.cumprod(1 - beta_schedule("linear", 100), 0)[t].item()
        assert abs(xt.mean().item() - a**0.5 * 1.7) < 6 * math.sqrt((1 - a) / n)
        assert abs(xt.var().item() / (1 - a) - 1) < 6 * math.sqrt(2 / n)


@given(name=st.sampled_from(SCHEDULES), T=st.integers(21, 2000))
def test_q_sample_is_T_one_step_kernels_in_a_row(name, T):
    beta, diffusion = beta_schedule(name, T).tolist(), Diffusion(T, name)
    mean, var = 1.0, 0.0  # of x_t given x_0 = 1
    for t in range(1, T + 1):
        mean, var = math.sqrt(1 - beta[t]) * mean, (1 - beta[t]) * var + beta[t]
        assert diffusion.signal[t].item() == pytest.approx(mean, rel=1e-5)
        assert diffusion.noise[t].item() ** 2 == pytest.approx(var, rel=1e-5)
    one = torch.ones(1, 1)
    got = diffusion.q_sample(one, torch.tensor([T]), 2 * one).item()
    assert got == pytest.approx(mean + 2 * math.sqrt(var), rel=1e-5)


@given(
    name=st.sampled_from(SCHEDULES),
    t=st.integers(2, 100),
    x0=st.floats(-2, 2),
    z=st.floats(-2, 2),
)
def test_posterior_is_bayes_rule(name, t, x0, z):
    beta = beta_schedule(name, 100)
    a, b = torch.cumprod(1 - beta, 0)[t - 1].item(), beta[t].item()
    xt = math.sqrt(a * (1 - b)) * x0 + math.sqrt(1 - a * (1 - b)) * z
    mean, var = Diffusion(100, name).q_posterior(
        torch.tensor([[x0]]), torch.tensor([[xt]]), torch.tensor([t])
    )
    center, width = mean.item(), 12 * math.sqrt(var.item())
    x = torch.linspace(center - width, center + width, 4001, dtype=torch.float64)
    log_p = Normal(math.sqrt(a) * x0, math.sqrt(1 - a)).log_prob(x)
    log_p = log_p + Normal(math.sqrt(1 - b) * x, math.sqrt(b)).log_prob(torch.tensor(xt))
    p = torch.softmax(log_p, 0)
    grid_mean = (p * x).sum()
    assert mean.item() == pytest.approx(grid_mean.item(), abs=2e-5)
    assert var.item() == pytest.approx((p * (x - grid_mean) ** 2).sum().item(), rel=1e-4)


def test_posterior_at_the_first_step_is_x0():
    x0, xt = torch.randn(5, 2), torch.randn(5, 2)
    mean, var = Diffusion().q_posterior(x0, xt, torch.ones(5, dtype=torch.long))
    torch.testing.assert_close(mean, x0)
    assert (var == 0).all()


def test_beta_tilde_has_its_golden_value():
    _, var = Diffusion().q_posterior(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([2]))
    assert var.item() == pytest.approx(5.45319e-5, rel=1e-5)


@given(t=st.integers(1, 1000), name=st.sampled_from(("linear", "sigmoid")))
def test_eq_11_is_eq_7_at_the_predicted_x0(t, name):
    diffusion, beta = Diffusion(1000, name), beta_schedule(name, 1000)
    a = torch.cumprod(1 - beta, 0)
    xt, eps = torch.randn(2, 4, 2, generator=seeded(t))
    steps = torch.full((4,), t)
    mean, _ = diffusion.q_posterior(diffusion.predict_x0(xt, steps, eps), xt, steps)
    want = (xt - beta[t] / (1 - a[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
    torch.testing.assert_close(mean, want.float(), rtol=1e-3, atol=1e-3)


@given(t=st.integers(1, 100), name=st.sampled_from(SCHEDULES))
def test_predict_x0_undoes_q_sample(t, name):
    diffusion = Diffusion(100, name)
    x0, eps = torch.randn(2, 8, 2, generator=seeded(t))
    steps = torch.full((8,), t)
    got = diffusion.predict_x0(diffusion.q_sample(x0, steps, eps), steps, eps)
    torch.testing.assert_close(got, x0, rtol=1e-3, atol=2e-3)


def test_every_formula_takes_images_and_a_different_t_per_image():
    diffusion, t = Diffusion(), torch.tensor([3, 500, 1000])
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    xt = diffusion.q_sample(x0, t, eps)
    mean, var = diffusion.q_posterior(x0, xt, t)
    for i in range(3):
        one = diffusion.q_sample(x0[i : i + 1].reshape(1, -1), t[i : i + 1], eps[i].reshape(1, -1))
        torch.testing.assert_close(xt[i].reshape(1, -1), one)
        alone, _ = diffusion.q_posterior(x0[i : i + 1], xt[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(mean[i], alone[0])
    assert mean.shape == (3, 1, 4, 4) and var.shape == (3, 1, 1, 1)


# ---------------------------------------------------------------------------------- the loss


def test_training_draws_every_t_from_1_to_T_equally_often():
    seen, n = [], 200_000

    def spy(xt, t, y=None):
        seen.append(t)
        return xt

    torch.manual_seed(0)
    Diffusion(50).p_losses(spy, torch.zeros(n, 2))
    counts = torch.bincount(seen[0], minlength=51)
    assert counts[0] == 0 and len(counts) == 51
    assert (counts[1:] - n / 50).abs().max() < 6 * math.sqrt(n / 50)


def test_loss_is_the_mean_squared_error_of_the_noise():
    diffusion, t = Diffusion(), torch.tensor([1, 400, 1000])
    x0, eps, out = torch.randn(3, 3, 2, generator=seeded())
    inputs = []

    def model(xt, t, y=None):
        inputs.append((xt, t, y))
        return out

    y = torch.tensor([2, 0, 1])
    loss = diffusion.p_losses(model, x0, y, t, eps)
    assert loss.item() == pytest.approx(((eps - out) ** 2).sum().item() / 6, rel=1e-6)
    torch.testing.assert_close(inputs[0][0], diffusion.q_sample(x0, t, eps))
    assert inputs[0][1] is t and inputs[0][2] is y


def test_gamma_2_measures_the_error_in_v():
    """v = sqrt(a) eps - sqrt(1 - a) x_0, and eps = sqrt(a) v + sqrt(1 - a) x_t (Salimans & Ho)."""
    diffusion, t = Diffusion(100, "cosine"), torch.tensor([1, 30, 60, 95])
    x0, eps, v_hat = torch.randn(3, 4, 2, generator=seeded())
    a = torch.cumprod(1 - beta_schedule("cosine", 100), 0)[t][:, None]
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    model = lambda xt, t, y=None: a.sqrt() * v_hat + (1 - a).sqrt() * xt
    loss = diffusion.p_losses(model, x0, None, t, eps, gamma=2)
    assert loss.item() == pytest.approx(((v - v_hat) ** 2).mean().item(), rel=1e-4)


def test_fresh_noise_has_unit_variance_and_is_the_target():
    """A model that returns what q_sample adds has no loss; one that returns 0 has loss 1."""
    diffusion, x0 = Diffusion(), torch.zeros(200_000, 2)
    torch.manual_seed(0)
    loss = diffusion.p_losses(lambda xt, t, y=None: xt / diffusion.noise[t, None], x0)
    assert loss.item() < 1e-9
    loss = diffusion.p_losses(lambda xt, t, y=None: 0 * xt, x0)
    assert abs(loss.item() - 1) < 6 * math.sqrt(2 / 400_000)


# ---------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_p_sample_loop_is_algorithm_2(variance, schedule):
    """Against Algorithm 2 written out with Eq. (11) in float64 and the same draws of z."""
    T, model = 60, lambda xt, t, y=None: 0.9 * torch.tanh(xt) * (t[:, None] / 60) ** 0.3
    x = torch.randn(7, 2, generator=seeded(1))
    states = list(Diffusion(T, schedule).p_sample_loop(model, x, None, 1.0, variance, seeded(2)))
    beta, draws = beta_schedule(schedule, T), seeded(2)
    a, x = torch.cumprod(1 - beta, 0), x.double()
    assert len(states) == T + 1
    for t in range(T, 0, -1):
        eps = 0.9 * torch.tanh(x) * (t / 60) ** 0.3
        x = (x - beta[t] / (1 - a[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
        if t > 1:
            var = beta[t] * (1 - a[t - 1]) / (1 - a[t]) if variance == "small" else beta[t]
            x = x + var.sqrt() * torch.empty(7, 2).normal_(generator=draws)
        torch.testing.assert_close(states[T - t + 1].double(), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ideal_model_of_a_gaussian_gives_the_law_of_the_closed_recursion(variance):
    T, m, s, n = 50, 0.7, 0.5, 200_000
    beta = beta_schedule("linear", T).tolist()
    a = np.cumprod(1 - np.array(beta))
    mean, var = 0.0, 1.0  # of x_T
    for t in range(T, 0, -1):
        gain = (1 - a[t]) ** 0.5 / (a[t] * s**2 + 1 - a[t])  # eps* = gain (x - sqrt(a) m)
        c = beta[t] / (1 - a[t]) ** 0.5
        slope = (1 - c * gain) / (1 - beta[t]) ** 0.5
        mean = slope * mean + c * gain * a[t] ** 0.5 * m / (1 - beta[t]) ** 0.5
        noise = beta[t] * (1 - a[t - 1]) / (1 - a[t]) if variance == "small" else beta[t]
        var = slope**2 * var + (noise if t > 1 else 0)
    diffusion = Diffusion(T)
    xT = torch.randn(n, 1, generator=seeded(3))
    loop = diffusion.p_sample_loop(
        gaussian_eps(diffusion, m, s), xT, variance=variance, generator=seeded(4)
    )
    *_, x0 = loop
    assert abs(x0.mean().item() - mean) < 6 * math.sqrt(var / n)
    assert abs(x0.var().item() / var - 1) < 6 * math.sqrt(2 / n)


@pytest.mark.parametrize(("s", "variance", "want"), [(1.0, "large", 0.9999), (0.0, "small", 0.0)])
def test_the_two_variances_are_exact_for_the_two_extremes_of_section_3_2(s, variance, want):
    """N(0, I) data with beta end at variance 1 - beta_1 (the last step adds no noise), and a
    single point with beta-tilde ends at that point."""
    diffusion = Diffusion()
    xT = torch.randn(4000, 1, generator=seeded(5))
    model = gaussian_eps(diffusion, 0.3 if s == 0 else 0.0, s)
    *_, x0 = diffusion.p_sample_loop(model, xT, variance=variance, generator=seeded(6))
    assert abs(x0.var().item() - want) < (6 * math.sqrt(2 / 4000) if s else 1e-9)
    if s == 0:
        torch.testing.assert_close(x0, torch.full_like(x0, 0.3), rtol=0, atol=1e-4)


def test_unknown_variance_is_refused():
    with pytest.raises(KeyError):
        list(Diffusion(21).p_sample_loop(lambda xt, t, y=None: xt, torch.zeros(1, 2), variance="x"))


@given(T=st.integers(21, 300), data=st.data())
def test_ddim_visits_T_first_and_ends_at_x0_for_every_number_of_steps(T, data):
    steps, seen = data.draw(st.integers(1, T)), []

    def spy(xt, t, y=None):
        assert t.shape == (3,) and t.dtype == torch.long and (t == t[0]).all()
        seen.append(t[0].item())
        return 0 * xt

    diffusion, xT = Diffusion(T), torch.randn(3, 2)
    states = list(diffusion.ddim_sample_loop(spy, xT, steps))
    assert seen == [round(T * k / steps) for k in range(steps, 0, -1)]
    assert seen[0] == T and len(set(seen)) == steps and len(states) == steps + 1
    assert states[0] is xT and all(x.shape == xT.shape for x in states)
    want = xT / diffusion.signal[T]  # with eps = 0 the whole path has one x0_hat
    torch.testing.assert_close(states[-1], want, rtol=1e-3, atol=0)


@given(T=st.integers(21, 80))
def test_ddpm_visits_T_to_1_once_each(T):
    seen = []

    def spy(xt, t, y=None):
        seen.append(t[0].item())
        return 0 * xt

    states = list(Diffusion(T).p_sample_loop(spy, torch.zeros(2, 3, 4)))
    assert seen == list(range(T, 0, -1)) and len(states) == T + 1
    assert all(x.shape == (2, 3, 4) for x in states)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_last_step_adds_no_noise(loop):
    """x_0 is exactly the x0_hat that the model's last output implies."""
    diffusion, calls = Diffusion(30), []

    def spy(xt, t, y=None):
        calls.append((xt, t, torch.tanh(xt)))
        return calls[-1][2]

    more = {"eta": 1.0, "steps": 30} if loop == "ddim_sample_loop" else {"variance": "large"}
    *_, x0 = getattr(diffusion, loop)(spy, torch.randn(50, 2, generator=seeded()), **more)
    xt, t, eps = calls[-1]
    torch.testing.assert_close(x0, diffusion.predict_x0(xt, t, eps))


def test_ddim_with_eta_1_and_T_steps_is_algorithm_2():
    diffusion = Diffusion(80)
    model = gaussian_eps(diffusion, 0.5, 0.4)
    xT = torch.randn(20, 2, generator=seeded(7))
    ddpm = diffusion.p_sample_loop(model, xT, generator=seeded(8))
    ddim = diffusion.ddim_sample_loop(model, xT, 80, 1.0, generator=seeded(8))
    for a, b in zip(ddpm, ddim, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@given(steps=st.integers(2, 60), eta=st.floats(0, 1) | st.floats(1, 9))
def test_ddim_step_is_eq_12_and_16(steps, eta):
    """Whole path against Eq. (12), (16) in float64 with a_0 = 1; sigma^2 is 1 - a_s at most."""
    T, model = 60, lambda xt, t, y=None: torch.cos(xt) * 0.3
    x = torch.randn(5, 2, generator=seeded(steps))
    states = list(Diffusion(T).ddim_sample_loop(model, x, steps, eta, generator=seeded(9)))
    a, draws, x = torch.cumprod(1 - beta_schedule("linear", T), 0), seeded(9), x.double()
    times = [round(T * k / steps) for k in range(steps, -1, -1)]
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        eps = torch.cos(x) * 0.3
        x0 = (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt()
        sigma = eta * ((1 - a[s]) / (1 - a[t])).sqrt() * (1 - a[t] / a[s]).sqrt()
        sigma = torch.minimum(sigma, (1 - a[s]).sqrt())
        z = torch.empty(5, 2).normal_(generator=draws)
        x = a[s].sqrt() * x0 + (1 - a[s] - sigma**2).clamp(min=0).sqrt() * eps + sigma * z
        torch.testing.assert_close(states[i + 1].double(), x, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.75, math.inf])
def test_ddim_keeps_the_marginals_for_every_eta(eta):
    """Song et al. Lemma 1: if the model knows x_0, every x_s is N(sqrt(a_s) x_0, 1 - a_s)."""
    diffusion, x0, n = Diffusion(100), torch.tensor([0.5, -0.8]), 20_000

    def model(xt, t, y=None):
        return (xt - diffusion.signal[t, None] * x0) / diffusion.noise[t, None]

    t = torch.full((n,), 100)
    xT = diffusion.q_sample(x0.expand(n, 2), t, torch.randn(n, 2, generator=seeded(4)))
    loop = diffusion.ddim_sample_loop(model, xT, 10, eta, generator=seeded(5))
    for s, xs in zip(range(100, -1, -10), loop, strict=True):
        want, noise = diffusion.signal[s] * x0, diffusion.noise[s]
        torch.testing.assert_close(xs.mean(0), want, rtol=0, atol=6 * noise / n**0.5 + 1e-5)
        spread = 6 * noise / (2 * n) ** 0.5 + 1e-5
        torch.testing.assert_close(xs.std(0), noise.expand(2), rtol=0, atol=spread)


def test_ddim_without_noise_is_deterministic_and_follows_the_flow():
    """For N(m, s^2) the probability flow is affine: x_0 = m + s (x_T - a m) / sd(x_T)."""
    diffusion, m, s = Diffusion(), -0.4, 0.6
    xT = torch.randn(100, 2, generator=seeded(10))
    runs = []
    for seed in (1, 2):
        loop = diffusion.ddim_sample_loop(gaussian_eps(diffusion, m, s), xT, 1000)
        torch.manual_seed(seed)
        runs.append(list(loop)[-1])
    assert torch.equal(*runs)
    a = diffusion.alpha_bar[-1]
    want = m + s * (xT - a.sqrt() * m) / (a * s**2 + 1 - a).sqrt()
    torch.testing.assert_close(runs[0], want, rtol=0, atol=0.02)


@pytest.mark.parametrize("steps", [0, 22])
def test_impossible_ddim_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} DDIM steps, but T = 21"):
        list(Diffusion(21).ddim_sample_loop(lambda xt, t, y=None: xt, torch.zeros(1, 2), steps))


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_eps_u_plus_s_times_the_difference(loop, scale):
    """Guiding a model equals sampling plainly from the explicit combination of its outputs."""

    def model(xt, t, y=None):
        return 0.3 * torch.tanh(xt) if y is None else 0.1 * y[:, None] + 0.2 * xt

    def combined(xt, t, y=None):
        return (1 - scale) * model(xt, t) + scale * model(xt, t, labels)

    labels = torch.tensor([0, 1, 2])
    diffusion, xT = Diffusion(60), torch.randn(3, 2, generator=seeded(11))
    guided = getattr(diffusion, loop)(model, xT, y=labels, guidance=scale, generator=seeded(12))
    plain = getattr(diffusion, loop)(combined, xT, generator=seeded(12))
    for a, b in zip(guided, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_samplers_build_no_graph():
    diffusion = Diffusion(21)
    net = NoisePredictor(diffusion, 0)
    xT = torch.randn(2, 2)
    for loop in (diffusion.p_sample_loop(net, xT), diffusion.ddim_sample_loop(net, xT, 5)):
        assert not any(x.requires_grad for x in loop)
    assert not diffusion.variational_bound(net, xT).requires_grad


# ----------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_terms_of_the_bound_are_divergences_of_gaussians(schedule):
    """Each term against torch.distributions, with Bayes' rule written out in float64."""
    T, model = 40, lambda xt, t, y=None: torch.sin(xt) + 0.1
    x0 = torch.randn(6, 2, generator=seeded(13))
    terms = Diffusion(T, schedule).variational_bound(model, x0, generator=seeded(14))
    beta, draws = beta_schedule(schedule, T), seeded(14)
    a, x0 = torch.cumprod(1 - beta, 0), x0.double()
    want = {T: kl_divergence(Normal(a[T].sqrt() * x0, (1 - a[T]).sqrt()), Normal(0.0, 1.0))}
    for t in range(T, 0, -1):
        xt = a[t].sqrt() * x0 + (1 - a[t]).sqrt() * torch.empty(6, 2).normal_(generator=draws)
        mu = (xt - beta[t] / (1 - a[t]).sqrt() * (torch.sin(xt) + 0.1)) / (1 - beta[t]).sqrt()
        if t == 1:
            want[0] = -Normal(mu, beta[1].sqrt()).log_prob(x0)
        else:
            precision = (1 - beta[t]) / beta[t] + 1 / (1 - a[t - 1])
            mean = (1 - beta[t]).sqrt() / beta[t] * xt + a[t - 1].sqrt() / (1 - a[t - 1]) * x0
            sd = precision.rsqrt()
            want[t - 1] = kl_divergence(Normal(mean / precision, sd), Normal(mu, sd))
    assert terms.shape == (T + 1,)
    for t, kl in want.items():
        assert terms[t].item() == pytest.approx(kl.sum(1).mean().item(), rel=3e-3, abs=1e-6), t


def test_bound_tells_the_model_the_labels():
    labels, x0 = torch.tensor([2, 0, 1]), torch.randn(3, 2, generator=seeded())
    told = lambda xt, t, y=None: 0.1 * y[:, None] + 0.5 * xt
    fixed = lambda xt, t, y=None: told(xt, t, labels)
    a = Diffusion(30).variational_bound(told, x0, labels, seeded(1))
    torch.testing.assert_close(a, Diffusion(30).variational_bound(fixed, x0, None, seeded(1)))


def test_prior_term_has_the_size_given_in_the_paper():
    """L_T is 2.91e-5 bits per dimension for unit variance data (Ho et al.: about 1e-5)."""
    x0 = torch.tensor([[1.0, -1.0]])
    terms = Diffusion().variational_bound(lambda xt, t, y=None: xt, x0)
    assert terms[-1].item() / 2 / math.log(2) == pytest.approx(2.91e-5, rel=0.01)


@pytest.mark.parametrize("name", ["8gaussians", "moons"])
def test_bound_of_the_ideal_model_lies_a_little_above_the_exact_entropy(name):
    data, _, _ = load_data(name)
    torch.manual_seed(0)
    x0, diffusion = data.sample(100)[0], Diffusion(1000)
    bound = diffusion.variational_bound(partial(data.ideal_eps, diffusion), x0).sum()
    gap = (bound + data.log_prob(x0).mean()).item()  # against the very same points
    assert 0.2 < gap < 1.2


def test_bound_prefers_the_ideal_model():
    data, _, _ = load_data("moons")
    torch.manual_seed(0)
    x0, diffusion = data.sample(200)[0], Diffusion(100)
    best = partial(data.ideal_eps, diffusion)
    bounds = [
        diffusion.variational_bound(model, x0, generator=seeded()).sum().item()
        for model in (best, lambda *a: 0.95 * best(*a), lambda *a: 1.05 * best(*a))
    ]
    assert bounds[0] < min(bounds[1:])


# --------------------------------------------------------------------------------- the network


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = NoisePredictor(Diffusion(100), classes=3)
    torch.nn.init.normal_(net.out.weight, std=0.1)
    return net


def test_untrained_network_is_the_best_linear_guess():
    diffusion = Diffusion(100)
    net, xt, t = NoisePredictor(diffusion, 3), torch.randn(9, 2), torch.arange(1, 10) * 11
    net.out.bias.data.zero_()
    torch.testing.assert_close(net(xt, t), diffusion.noise[t, None] * xt)


def test_network_depends_on_point_time_and_label(network):
    xt, t = torch.randn(4, 2), torch.tensor([5, 50, 70, 100])
    base = network(xt, t, torch.zeros_like(t))
    assert base.shape == (4, 2)
    for other in (
        network(xt + 0.1, t, torch.zeros_like(t)),
        network(xt, t - 1, torch.zeros_like(t)),
        network(xt, t, torch.ones_like(t)),
        network(xt, t),
    ):
        assert ((other - base).abs().sum(1) > 1e-4).all()
    assert torch.equal(network(xt, t), network(xt, t, torch.full_like(t, 3)))  # "not told"


def test_samples_of_a_batch_do_not_see_each_other(network):
    xt, t, y = torch.randn(6, 2), torch.arange(1, 7), torch.arange(6) % 3
    whole = network(xt, t, y)
    order = torch.randperm(6)
    torch.testing.assert_close(network(xt[order], t[order], y[order]), whole[order])
    torch.testing.assert_close(network(xt[2:3], t[2:3], y[2:3]), whole[2:3])


def test_layers_are_residual(network):
    """With every layer at 0 the output still knows point, time and label."""
    for layer in network.layers:
        torch.nn.init.zeros_(layer.weight)
    x, t, y = torch.randn(1, 2), torch.tensor([20]), torch.tensor([1])
    out = network(x, t, y)
    for other in (network(x, t + 1, y), network(x, t, y + 1)):
        assert (other - out).abs().max() > 1e-4


def test_time_embedding_covers_the_same_range_for_every_T():
    freq = [NoisePredictor(Diffusion(T), 2).freq * T for T in (50, 1000, 4000)]
    torch.testing.assert_close(freq[0], freq[1])
    torch.testing.assert_close(freq[2], freq[1])
    assert freq[1].max() <= 1000 and freq[1].min() < math.pi  # no two t look the same


def test_every_parameter_learns(network):
    y = torch.arange(64) % 4
    Diffusion(100).p_losses(network, torch.randn(64, 2), y).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_network_can_learn_one_batch_by_heart(network):
    diffusion = Diffusion(100)
    x0, eps = torch.randn(2, 16, 2, generator=seeded(15))
    t = torch.randint(1, 60, (16,), generator=seeded(16))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(400):
        loss = diffusion.p_losses(network, x0, None, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


# ------------------------------------------------------------------------------------ the data


@pytest.mark.parametrize("name", SETS)
def test_toy_sets_are_standardised_and_labelled(name):
    data, mean, std = load_data(name)
    second = data.centers.double().T @ data.centers.double() / len(data.centers)
    torch.testing.assert_close(data.centers.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    want = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(second.diagonal() + data.sigma**2, want, rtol=0, atol=1e-5)
    counts = torch.bincount(data.labels)
    assert len(counts) > 1 and (counts == counts[0]).all()
    torch.manual_seed(0)
    x, y = data.sample(200_000)
    assert x.shape == (200_000, 2) and y.shape == (200_000,)
    assert (x.mean(0).abs() < 6 / math.sqrt(200_000)).all()
    assert ((x.var(0) - 1).abs() < 6 * math.sqrt(2 / 200_000)).all()
    near = torch.cdist(x[:500], data.centers).argmin(1)
    assert (data.labels[near] == y[:500]).float().mean() > 0.9


@pytest.mark.parametrize("name", SETS)
def test_log_prob_is_the_density_of_the_mixture(name):
    data, _, _ = load_data(name)
    x = torch.randn(50, 2, generator=seeded(17))
    for label in (None, *data.labels.unique()):
        centers = data.centers if label is None else data.centers[data.labels == label]
        parts = Independent(Normal(centers, data.sigma), 1)
        want = MixtureSameFamily(Categorical(torch.ones(len(centers))), parts).log_prob(x)
        got = data.log_prob(x) if label is None else data.log_prob(x, label.expand(50))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
    assert data.centers.abs().max() + 6 * data.sigma < 4  # the grid of entropy() covers it
    axis = torch.arange(-4, 4, data.sigma)
    mass = data.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * data.sigma**2
    assert mass.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", SETS)
def test_entropy_is_minus_the_mean_log_density(name):
    data, _, _ = load_data(name)
    torch.manual_seed(1)
    log_p = torch.cat([data.log_prob(data.sample(5000)[0]) for _ in range(4)])
    assert abs(data.entropy().item() + log_p.mean().item()) < 6 * log_p.std().item() / 20_000**0.5
    x, y = data.sample(10_000)
    log_p = data.log_prob(x[y == 1], y[y == 1])
    error = 6 * log_p.std().item() / len(log_p) ** 0.5
    assert abs(data.entropy(torch.tensor([1])).item() + log_p.mean().item()) < error


def test_entropy_of_one_gaussian():
    data = ToyData(torch.zeros(1, 2), 0.3)
    assert data.entropy().item() == pytest.approx(math.log(2 * math.pi * math.e * 0.09), abs=1e-5)


@pytest.mark.parametrize("told", [False, True])
@given(t=st.integers(1, 100), name=st.sampled_from(SETS))
def test_ideal_eps_is_the_conditional_mean_of_the_noise(told, t, name):
    """Against E[eps | x_t, y] by Bayes' rule over the centers, one by one, in float64."""
    diffusion, (data, _, _) = Diffusion(100), load_data(name)
    torch.manual_seed(t)
    steps, (x0, y) = torch.full((5,), t), data.sample(5)
    xt = diffusion.q_sample(x0, steps, torch.randn(5, 2))
    a = torch.cumprod(1 - beta_schedule("linear", 100), 0)[t]
    centers, x, total = data.centers.double(), xt.double(), a * data.sigma**2 + 1 - a
    distance = ((x[:, None] - a.sqrt() * centers) ** 2).sum(2)
    if told:
        distance = torch.where(y[:, None] == data.labels, distance, math.inf)
    weight = torch.softmax(-distance / (2 * total), 1)
    # given its center, (eps, x_t) is Gaussian: E[eps | x_t, c] = sd(noise) (x_t - sqrt(a) c) / var
    each = (1 - a).sqrt() * (x[:, None] - a.sqrt() * centers) / total
    want = (weight[:, :, None] * each).sum(1).float()
    got = data.ideal_eps(diffusion, xt, steps, y if told else None)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert not got.requires_grad


def test_ideal_eps_is_the_best_prediction():
    data, diffusion = load_data("swissroll")[0], Diffusion(100)
    torch.manual_seed(2)
    x0, t, eps = data.sample(4000)[0], torch.randint(1, 101, (4000,)), torch.randn(4000, 2)
    xt = diffusion.q_sample(x0, t, eps)
    best = data.ideal_eps(diffusion, xt, t)
    error = (best - eps).square().mean()
    shift = torch.randn(4000, 2) * 0.1  # orthogonal to the error of a conditional mean
    for other in (best * 0.97, best * 1.03, best + 0.05, best + shift):
        assert (other - eps).square().mean() > error


def test_ideal_model_in_the_sampler_reproduces_the_data():
    data, diffusion = load_data("8gaussians")[0], Diffusion(200)
    torch.manual_seed(3)
    *_, x = diffusion.p_sample_loop(partial(data.ideal_eps, diffusion), torch.randn(20_000, 2))
    distance, nearest = torch.cdist(x, data.centers).min(1)
    counts = torch.bincount(nearest, minlength=8)
    assert (counts - 2500).abs().max() < 6 * 50
    assert distance.square().mean().item() / 2 == pytest.approx(data.sigma**2, rel=0.15)
    log_p, real = data.log_prob(x), data.log_prob(data.sample(20_000)[0])
    assert (log_p < real.quantile(0.001)).float().mean() < 0.01


# ------------------------------------------------------------------------- the script as a whole

TINY = ["--T", "21", "--steps", "20", "--batch-size", "64", "--n", "500"]
FILES = {
    "model.pt", "metrics.json", "log.csv", "samples.npy", "diffusion_process.png",
    "results.png", "training.png", "sampling.gif", "labels.npy",
}  # fmt: skip
KEYS = {
    "script", "seed", "device", "steps", "parameters", "train_seconds", "sample_seconds", "loss",
    "bound_nats", "swd_ratio",
}  # fmt: skip
TRUTH = {"ideal_bound_nats", "entropy_nats", "excess_loss", "off_support"}


PROGRAMS = {"run": [SCRIPT, *TINY]}  # with the default --out


@pytest.fixture(scope="session")
def run(program):
    folder, done = program(sys.modules[__name__], "run")
    return folder, folder / "runs" / "ddpm_2d", done


def test_script_leaves_every_file_and_key(run):
    folder, out, done = run
    assert {f.name for f in out.iterdir() if f.is_file()} == FILES | {"score.png"}
    assert os.listdir(folder) == ["runs"] and all(f.is_file() for f in out.iterdir())
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() >= KEYS | TRUTH | {"data", "T", "schedule", "lr", "torch"}
    assert metrics["script"] == "ddpm_2d" and metrics["steps"] == 20
    assert metrics["bound_nats"] > metrics["ideal_bound_nats"] > metrics["entropy_nats"] - 0.2
    assert "bound_nats" in done.stdout and "ddpm_2d" in done.stdout
    assert "train" in done.stderr and "sample" in done.stderr  # the two progress bars
    samples = np.load(out / "samples.npy")
    assert samples.dtype == np.float32 and samples.shape == (500, 2)
    labels = np.load(out / "labels.npy")
    assert np.isfinite(samples).all() and labels.shape == (500,) and set(labels) == set(range(8))
    log = (out / "log.csv").read_text().splitlines()
    assert log[0] == "step,loss,lr,seconds" and len(log) == 21
    assert float(log[1].split(",")[2]) == 0.005 and float(log[20].split(",")[2]) < 1e-4


def test_same_seed_gives_the_same_numbers_and_another_seed_others(run, tmp_path):
    want = json.loads((run[1] / "metrics.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the program
    again = ddpm_2d.main([*TINY, "--out", str(tmp_path / "a")])
    other = ddpm_2d.main([*TINY, "--out", str(tmp_path / "b"), "--seed", "1"])
    torch.set_num_threads(threads)
    for key in ("loss", "bound_nats", "swd_ratio", "off_support"):
        assert again[key] == pytest.approx(want[key], rel=1e-5)
    assert other["loss"] != again["loss"]


def test_load_gives_the_same_model_without_training(run, tmp_path):
    out = run[1]
    metrics = ddpm_2d.main(["--load", str(out / "model.pt"), *TINY, "--out", str(tmp_path)])
    want = json.loads((out / "metrics.json").read_text())
    assert metrics["T"] == 21 and metrics["steps"] == 20
    assert metrics["train_seconds"] == want["train_seconds"]  # of the run that made it
    assert metrics["bound_nats"] == pytest.approx(want["bound_nats"], abs=0.5)
    before, after = (torch.load(f / "model.pt", weights_only=True) for f in (out, tmp_path))
    assert all(torch.equal(before["ema"][key], after["ema"][key]) for key in before["ema"])
    assert (out / "log.csv").read_text() == (tmp_path / "log.csv").read_text()


def test_checkpoint_holds_the_config_and_the_average_of_the_weights(tmp_path, monkeypatch):
    """After 20 steps the average still remembers the start, so it differs from the weights."""
    nets, make = [], ddpm_2d.NoisePredictor
    monkeypatch.setattr(ddpm_2d, "NoisePredictor", lambda *a: nets.append(make(*a)) or nets[-1])
    torch.manual_seed(0)
    ddpm_2d.main([*TINY, "--out", str(tmp_path)])
    saved, now = torch.load(tmp_path / "model.pt", weights_only=True), nets[0].state_dict()
    moved = {key for key in now if not torch.equal(saved["ema"][key], now[key])}
    assert moved == {key for key, _ in nets[0].named_parameters()}
    assert saved["config"] == ["8gaussians", 21, "cosine"] and len(saved["log"]) == 20


def test_average_starts_from_the_weights_after_the_first_step(tmp_path, monkeypatch):
    nets, make = [], ddpm_2d.NoisePredictor
    monkeypatch.setattr(ddpm_2d, "NoisePredictor", lambda *a: nets.append(make(*a)) or nets[-1])
    ddpm_2d.main([*TINY, "--steps", "1", "--out", str(tmp_path)])
    saved, now = torch.load(tmp_path / "model.pt", weights_only=True), nets[0].state_dict()
    assert now["out.weight"].abs().max() > 0  # it was 0 before the step
    assert all(torch.equal(saved["ema"][key], now[key]) for key in now)


def test_training_hides_a_tenth_of_the_labels_and_keeps_the_others(tmp_path, monkeypatch):
    seen, losses = [], Diffusion.p_losses

    def spy(self, model, x0, y=None, t=None, eps=None):
        seen.append((x0, y))
        return losses(self, model, x0, y, t, eps)

    monkeypatch.setattr(Diffusion, "p_losses", spy)
    ddpm_2d.main([*TINY, "--steps", "10", "--batch-size", "2000", "--out", str(tmp_path)])
    x, y = (torch.cat(part) for part in zip(*seen, strict=True))
    assert abs((y == 8).float().mean() - 0.1) < 6 * math.sqrt(0.09 / 20_000)
    centers = load_data("8gaussians")[0].centers
    assert (torch.cdist(x, centers).argmin(1) == y)[y < 8].float().mean() > 0.95


def test_reported_loss_is_that_of_the_noise(tmp_path, monkeypatch):
    """A model that always says 0 has loss E[eps^2] = 1, whatever the weights of the bound are."""

    class Zero(NoisePredictor):
        def forward(self, xt, t, y=None):
            return 0 * xt + 0 * self.out.weight.sum()

    monkeypatch.setattr(ddpm_2d, "NoisePredictor", Zero)
    metrics = ddpm_2d.main([*TINY, "--T", "100", "--out", str(tmp_path)])
    assert abs(metrics["loss"] - 1) < 6 * math.sqrt(2 / (500 * 2 * 99))


def test_samples_of_the_exact_model_get_perfect_scores(tmp_path, monkeypatch):
    """main judges the exact model: no excess, distances as between two data sets."""
    data = load_data("8gaussians")[0]

    class Exact(NoisePredictor):
        def forward(self, xt, t, y=None):
            y = None if y is None or (y == 8).any() else y
            return data.ideal_eps(self.diffusion, xt, t, y) + 0 * self.out.weight.sum()

    monkeypatch.setattr(ddpm_2d, "NoisePredictor", Exact)
    flags = ["--T", "50", "--steps", "1", "--n", "1000", "--out", str(tmp_path)]
    metrics = ddpm_2d.main(flags)
    assert abs(metrics["excess_loss"]) < 1e-4
    assert metrics["bound_nats"] == pytest.approx(metrics["ideal_bound_nats"], abs=1e-3)
    assert 0.5 < metrics["swd_ratio"] < 2 and metrics["off_support"] < 0.01
    assert 0.5 < metrics["ddim_swd_ratio"] < 4
    x, y = (torch.from_numpy(np.load(tmp_path / f"{k}.npy")) for k in ("samples", "labels"))
    nearest = data.labels[torch.cdist(x, data.centers).argmin(1)]
    assert (nearest == y).float().mean() > 0.98  # a sample has the label that labels.npy says
    gap = metrics["ideal_bound_nats"] - metrics["entropy_nats"]
    assert 0.5 < gap < 3  # the price of T steps with fixed variances


def test_samples_of_a_useless_model_get_bad_scores(tmp_path, monkeypatch):
    """Its samples are N(0, I), or nearly: far from the data in distance and in density."""

    class Linear(NoisePredictor):
        def forward(self, xt, t, y=None):
            return self.diffusion.noise[t, None] * xt + 0 * self.out.weight.sum()

    monkeypatch.setattr(ddpm_2d, "NoisePredictor", Linear)
    metrics = ddpm_2d.main([*TINY, "--n", "2000", "--out", str(tmp_path)])
    assert metrics["off_support"] > 0.4
    assert metrics["swd_ratio"] > 3 and metrics["ddim_swd_ratio"] > 3


def test_short_training_gets_close_to_the_best_possible_loss(tmp_path):
    flags = ["--steps", "400", "--batch-size", "512", "--T", "100", "--out", str(tmp_path)]
    flags += ["--n", "1000"]
    metrics = ddpm_2d.main(flags)
    assert 0 < metrics["excess_loss"] < 0.4
    assert metrics["bound_nats"] - metrics["ideal_bound_nats"] < 1
    assert metrics["off_support"] < 0.15


@pytest.mark.parametrize("kind", ["npy", "csv", "labels"])
def test_own_points_come_back_in_their_own_units(kind, tmp_path):
    rng = np.random.default_rng(0)
    points = rng.normal([500, -3], [80, 0.01], (300, 2))
    rows = np.column_stack([points, np.arange(300) % 3]) if kind == "labels" else points
    path = tmp_path / f"points.{'npy' if kind == 'npy' else 'csv'}"
    np.save(path, rows) if kind == "npy" else np.savetxt(path, rows, delimiter=",")
    flags = ["--data", str(path), "--out", str(tmp_path / "out"), "--T", "30", "--steps", "150"]
    flags += ["--n", "500"]
    metrics = ddpm_2d.main([*flags, "--batch-size", "128"])
    samples = np.load(tmp_path / "out" / "samples.npy")
    np.testing.assert_allclose(samples.mean(0), [500, -3], atol=30, rtol=0.01)
    np.testing.assert_allclose(samples.std(0), [80, 0.01], rtol=0.4)
    assert not TRUTH & metrics.keys() and not (tmp_path / "out" / "score.png").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--T", 20], ["--T 20", "T 21 to 10000"]),
        (["--T", 10_001], ["--T 10001", "21 to 10000"]),
        (["--T", "x"], ["--T", "'x'"]),
        (["--schedule", "tanh"], ["--schedule", "'tanh'", "linear", "cosine", "sigmoid"]),
        (["--data", "nope"], ["--data nope", "No such file", "--help"]),
        (["--steps", 0], ["--steps 0", "use 1 or more"]),
        (["--batch-size", -3], ["--batch-size -3", "use 1 or more"]),
        (["--lr", 0], ["--lr 0", "use 1e-09 or more"]),
        (["--lr", "nan"], ["--lr nan", "use 1e-09 or more"]),
        (["--n", 1], ["--n 1", "use 2 or more"]),
        (["--seed", -1], ["--seed -1", "use 0 or more"]),
        (["--device", "cuda:99"], ["--device cuda:99", "--help"]),
        (["--device", "gpu"], ["--device gpu", "cpu, cuda"]),
        (["--load", "nope.pt"], ["--load nope.pt", "No such file"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_wrong_flags_get_one_line_that_tells_the_fix(argv, words, fails, tmp_path):
    fails([*argv, "--out", tmp_path / "out"], *words)
    assert not (tmp_path / "out" / "model.pt").exists()


BAD_POINTS = {
    "empty.csv": b"",
    "words.csv": b"a,b\n1,2\n",
    "ragged.csv": b"1,2\n3\n",
    "nan.csv": b"1,2\nnan,3\n5,6\n",
    "inf.csv": b"1,2\ninf,3\n5,6\n",
    "one_column.csv": b"1\n2\n3\n",
    "four.csv": b"1,2,3,4\n1,2,3,4\n",
    "negative_label.csv": b"1,2,-1\n2,3,0\n4,9,1\n",
    "fraction_label.csv": b"1,2,0.5\n2,3,0\n4,9,1\n",
    "binary.csv": bytes(range(256)),
    "text.npy": b"not an array",
}


@pytest.mark.parametrize("name", BAD_POINTS)
def test_unusable_points_are_refused(name, fails, tmp_path):
    path = tmp_path / name
    path.write_bytes(BAD_POINTS[name])
    fails(["--data", path, "--out", tmp_path / "out"], f"--data {path}", "--help")


def test_arrays_of_objects_or_wrong_shape_are_refused(fails, tmp_path):
    path = tmp_path / "x.npy"
    for array in (np.array([{}, []], dtype=object), np.zeros((3, 2, 2)), np.array(["a"])):
        np.save(path, array, allow_pickle=True)
        fails(["--data", path, "--out", tmp_path / "out"], f"--data {path}")


def test_checkpoints_that_do_not_fit_are_refused(run, fails, tmp_path):
    good, path = run[1] / "model.pt", tmp_path / "x.pt"
    whole = good.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-20]):
        path.write_bytes(content)
        fails(["--load", path, "--out", tmp_path / "out"], f"--load {path}", "--help")
    for other in ([1, 2], {"ddpm_mnist": {}}, {"ddpm_2d": {"config": {}, "log": [], "ema": {}}}):
        torch.save(other, path)
        fails(["--load", path, "--out", tmp_path / "out"], f"--load {path}", "--help")
    for flag, value in (("--T", 50), ("--schedule", "linear"), ("--data", "moons")):
        argv = ["--load", good, "--T", 21, flag, value, "--out", tmp_path / "out"]
        fails(argv, f"--load {good}", "8gaussians", "21", "cosine", "same flags")


def test_folder_that_cannot_be_written_is_refused(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "sub", "/proc/nope"):
        fails([*TINY, "--out", out], f"--out {out}", "--help")
    assert (tmp_path / "file").read_text() == "mine"


def test_loss_that_explodes_stops_and_keeps_the_last_good_model(run, fails, tmp_path):
    (tmp_path / "model.pt").write_bytes((run[1] / "model.pt").read_bytes())
    before = (tmp_path / "model.pt").read_bytes()
    argv = ["--lr", "1e15", "--steps", 50, "--out", tmp_path, "--T", 21]
    fails(argv, "--lr 1000000000000000.0", "at step", "lower")
    assert (tmp_path / "model.pt").read_bytes() == before


def start(folder, *flags):
    """The script in the background, returned once it trains."""
    command = [sys.executable, SCRIPT, "--T", "21", "--n", "500", "--out", folder, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    seen = b""
    while not re.search(rb" [1-9]\d*/100000", seen) and process.poll() is None:
        seen += os.read(process.stderr.fileno(), 4096)
    return process


def test_ctrl_c_keeps_what_was_trained_and_still_draws(tmp_path, ctrl_c, capsys):
    ctrl_c(Diffusion, "p_losses", 31)
    metrics = ddpm_2d.main([*TINY, "--steps", "200", "--out", str(tmp_path)])
    assert metrics["steps"] == 30 and "going on with what was learned" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 30
    assert {f.name for f in tmp_path.iterdir()} == FILES | {"score.png"}


def test_kill_leaves_the_old_files_whole(run, tmp_path):
    for name in ("model.pt", "metrics.json"):
        (tmp_path / name).write_bytes((run[1] / name).read_bytes())
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    process = start(tmp_path, "--steps", "100000", "--batch-size", "8")
    process.kill()
    process.communicate()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before
