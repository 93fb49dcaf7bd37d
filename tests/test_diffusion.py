"""What ddpm_2d.py and ddpm_mnist.py have in common: one specification of a diffusion model.

Each property holds for any schedule, shape and number of steps; hypothesis looks for exceptions.
The oracles are not the code's formulas: q(x_t | x_{t-1}) step by step, Bayes' rule on a grid, KL by
torch.distributions, numbers of diffusers. Statistical checks are seeded and allow six standard
errors; others are in float64, but for signal and noise.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import ddpm_2d
import ddpm_mnist
from ddpm_2d import linear_schedule
from ddpm_mnist import cosine_schedule

both = pytest.mark.parametrize("script", [ddpm_2d, ddpm_mnist], ids=lambda script: script.__name__)
both_samplers = pytest.mark.parametrize("sampler", ["Algorithm 2", "DDIM"])
own = partial(torch.tensor, dtype=torch.float64)  # beta
own_schedules = st.lists(st.floats(1e-3, 0.95), min_size=1, max_size=25).map(own)
linear_schedules = st.integers(21, 300).map(linear_schedule)
schedules = own_schedules | linear_schedules | st.integers(1, 300).map(cosine_schedule)
L21, L1000 = map(linear_schedule, (21, 1000))
C1, C1000 = map(cosine_schedule, (1, 1000))
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
rows = st.integers(1, 5)
shares = st.floats(0, 1)
seeds = st.integers(0, 99)


def single_steps(beta):
    """Mean and variance of q(x_t | x_0 = 1) for t = 0, ..., T, one q(x_t | x_{t-1}) at a time."""
    path = [(1.0, 0.0)]
    for b in beta.tolist():
        mean, var = path[-1]
        path.append((math.sqrt(1 - b) * mean, (1 - b) * var + b))
    return torch.tensor(path, dtype=torch.float64).T


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def drawn(beta, shape, n, seed, dtype=torch.float64):
    """x_0 and eps [n, *shape], steps t from 0 to T [n]."""
    t = torch.randint(len(beta) + 1, (n,), generator=torch.Generator().manual_seed(seed))
    return *randn(2, n, *shape, seed=seed, dtype=dtype), t


def wave(xt, t):
    """A model that depends on x_t and t, for points and images."""
    return 0.9 * torch.tanh(xt) * (t.view(-1, *[1] * (xt.ndim - 1)) / 60) ** 0.3


def perfect(beta, center, s=0.0):
    """E[eps | x_t] for data N(center, s^2); s = 0: the model of one point."""
    mean, var = single_steps(beta)

    def model(xt, t):
        t = t.view(-1, *[1] * (xt.ndim - 1))
        return (var[t].sqrt() / (var[t] + (mean[t] * s) ** 2) * (xt - mean[t] * center)).to(xt)

    return model


def sample(sampler, beta, model, xT, share=1.0, eta=1.0, seed=0):
    """All states of Algorithm 2, or of DDIM in a share of the T steps; and t before each step."""
    times = []

    def ask(xt, t):
        assert t.shape == xT.shape[:1] and t.dtype == torch.long and (t == t[0]).all()
        times.append(t[0].item())
        return model(xt, t)

    torch.manual_seed(seed)
    steps = 1 + round(share * (len(beta) - 1))
    if sampler == "Algorithm 2":
        states = ddpm_2d.Diffusion(beta).p_sample_loop(ask, xT)
    else:
        states = ddpm_mnist.Diffusion(beta).ddim_sample_loop(ask, xT, steps, eta)
    return list(states), times


def within_six_errors(values, want):
    """Is the mean of values [n, ...] what is wanted, within six of its standard errors?"""
    error = values.std(0) / len(values) ** 0.5
    return bool(((values.mean(0) - want).abs() <= 6 * error + 1e-6).all())


# schedules
@given(st.integers(1, 5000))
@example(1)
@example(21)
def test_beta_is_in_0_1_and_alpha_bar_falls_strictly_for_every_T(T):
    for beta in [cosine_schedule(T)] + [linear_schedule(T)] * (T > 20):
        assert beta.shape == (T,) and beta.dtype == torch.float64
        assert (beta > 0).all() and (beta < 1).all() and (beta.diff() >= 0).all()
        for script in (ddpm_2d, ddpm_mnist):
            alpha_bar = script.Diffusion(beta).alpha_bar
            assert alpha_bar[0] == 1 and alpha_bar[-1] > 0
            assert all(a > b for a, b in zip(alpha_bar, alpha_bar[1:], strict=False))


@given(st.integers(1, 5000))
@example(21)
def test_x_T_is_noise_for_every_T(T):
    """Few steps with the betas of a thousand leave signal: 0.78 of x_0 with T = 50."""
    for beta in [cosine_schedule(T)] + [linear_schedule(T)] * (T > 20):
        assert single_steps(beta)[0][-1] < 0.04


@both
@given(schedules)
@example(C1000)
def test_index_t_of_all_that_is_stored_is_step_t(script, beta):
    """Padded twice or on the wrong side, it is another. In float32, 1 - alpha_bar_1 is inexact."""
    diffusion = script.Diffusion(beta)
    mean, var = single_steps(beta)
    assert diffusion.T == len(beta) and not diffusion.state_dict()  # weights fit any schedule
    assert diffusion.alpha_bar == pytest.approx(mean.square().tolist(), rel=1e-9)
    for buffer, want in ((diffusion.signal, mean), (diffusion.noise, var.sqrt())):
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer.double(), want, rtol=1e-6, atol=0)
    if script is ddpm_2d:
        assert diffusion.beta == [0, *beta.tolist()]


def test_schedules_have_the_values_of_their_authors():
    """Ho et al., Sec. 4; for Nichol & Dhariwal, betas_for_alpha_bar of diffusers 0.42."""
    assert linear_schedule(1000)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-12)
    cosine = [4.12842e-05, 0.00314589, 0.749999, 0.999]
    assert cosine_schedule(1000)[[0, 499, 998, 999]].tolist() == pytest.approx(cosine, rel=3e-6)


# q_sample
@both
@given(schedules, shapes, rows, seeds)
@example(C1, (2,), 1, 0)
@example(L1000, (2,), 2, 0)  # points [2, 2]
@example(L1000, (3, 3, 3), 3, 0)  # as many images as channels, and as rows of pixels
def test_q_sample_is_t_single_steps_for_any_batch_and_shape(script, beta, shape, n, seed):
    """Exactly, by the t of each row. Coefficients [B, 1] would lie along the pixels of images."""
    x0, eps, t = drawn(beta, shape, n, seed, torch.float32)
    xt = script.Diffusion(beta).q_sample(x0, t, eps)
    assert xt.shape == x0.shape and xt.dtype == torch.float32
    mean, var = single_steps(beta)
    want = [mean[t[k]] * x0[k].double() + var[t[k]].sqrt() * eps[k].double() for k in range(n)]
    torch.testing.assert_close(xt.double(), torch.stack(want), rtol=1e-5, atol=1e-5)


@both
@given(schedules, shares, st.floats(-3, 3), seeds)
@example(C1, 1, 3.0, 0)
def test_q_sample_has_the_mean_and_variance_of_a_random_walk(script, beta, share, x0, seed):
    """Of 10,000 walks, so that a variance may be 12 % off; the test above is exact."""
    t = round(share * len(beta))
    x0 = torch.full((10_000, 1), x0)
    torch.manual_seed(seed)
    walk = x0
    for b in beta[:t].tolist():
        walk = math.sqrt(1 - b) * walk + math.sqrt(b) * torch.randn_like(x0)
    xt = script.Diffusion(beta).q_sample(x0, torch.full((10_000,), t), torch.randn_like(x0))
    assert within_six_errors(xt - walk, 0)
    assert within_six_errors((xt - walk.mean()) ** 2 - (walk - walk.mean()) ** 2, 0)


@given(schedules, shapes, rows, seeds)
@example(C1000, (1, 4, 4), 4, 0)
def test_x0_and_eps_come_back_from_xt_and_v(beta, shape, n, seed):
    """(x_0, eps) is turned by the angle whose sine is noise: a wrong sign shears it."""
    diffusion = ddpm_mnist.Diffusion(beta)
    x0, eps, t = drawn(beta, shape, n, seed)
    turned = diffusion.q_sample(x0, t, eps), diffusion.velocity(x0, t, eps)
    mean, var = single_steps(beta)
    angle = torch.atan2(var.sqrt(), mean)[t].view(-1, *[1] * len(shape))
    back = torch.polar(torch.ones_like(angle), angle) * torch.complex(*turned)
    torch.testing.assert_close(back, torch.complex(x0, eps), rtol=1e-5, atol=1e-5)


# samplers
@both_samplers
@given(schedules, shapes, rows, shares, shares, st.sampled_from([torch.float32, torch.float64]))
@example(L21, (2,), 2, 1, 0, torch.float32)
@example(C1, (1, 4, 4), 4, 1, 1, torch.float32)
@example(L1000, (3, 4, 4), 4, 0, 1, torch.float32)
def test_samplers_yield_x_T_and_a_state_a_step(sampler, beta, shape, n, share, eta, dtype):
    """The model is asked at T first, then at evenly spaced steps, and never at 0."""
    weight = torch.tensor(1.0, requires_grad=True)
    model = perfect(beta, 0, 1)
    xT = randn(n, *shape, dtype=dtype)
    states, times = sample(sampler, beta, lambda *x: weight * model(*x), xT, share, eta)
    T = len(beta)
    assert len(times) == (T if sampler == "Algorithm 2" else 1 + round(share * (T - 1)))
    assert torch.equal(states[0], xT) and len(states) == len(times) + 1
    for xt in states:
        assert xt.shape == xT.shape and xt.dtype == dtype and xt.isfinite().all()
        assert not xt.requires_grad and (weight * xt).requires_grad  # the caller may go on
    gaps = -torch.tensor([*times, 0]).diff()
    assert times[0] == T and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@both_samplers
@given(schedules, seeds, shares, st.sampled_from([0, 0.5, 1]))
@example(L21, 0, 1, 1)
def test_the_same_seed_gives_the_same_samples_and_another_others(sampler, beta, seed, share, eta):
    """And no two rows have the same noise. Without noise (eta = 0, or one step) none matters."""
    start, model = torch.ones(2, 2, dtype=torch.float64), perfect(beta, 0, 1)
    runs = [sample(sampler, beta, model, start, share, eta, k) for k in (seed, seed, seed + 1)]
    first, again, other = [states[-1] for states, _ in runs]
    assert torch.equal(first, again)
    noisy = len(runs[0][1]) > 1 and (eta > 0 or sampler == "Algorithm 2")
    for a, b in ((first, other), first):
        assert not torch.isclose(a, b, rtol=0, atol=1e-9).any() if noisy else torch.equal(a, b)


@given(schedules, shapes, shares, seeds)
@example(C1, (2,), 1, 0)
@example(L1000, (2,), 1, 0)
@example(C1000, (2,), 0.049, 0)  # 50 steps
def test_ddim_with_eta_1_is_algorithm_2_on_the_steps_it_visits(beta, shape, share, seed):
    """The loop of ddpm_mnist against that of ddpm_2d, with the same noise. With T steps, that is
    Algorithm 2 itself; with fewer, all steps between two visited ones are merged."""
    xT = randn(3, *shape, seed=seed)
    ddim, times = sample("DDIM", beta, wave, xT, share, 1.0)
    visited = torch.tensor([0, *times[::-1]])
    kept = single_steps(beta)[0][visited]  # of x_0
    merged = beta if len(times) == len(beta) else 1 - (kept[1:] / kept[:-1]) ** 2
    ddpm, _ = sample("Algorithm 2", merged, lambda xt, t: wave(xt, visited[t]), xT)
    for a, b in zip(ddpm, ddim, strict=True):
        assert (a - b).abs().max() < 1e-6 * a.abs().max() + 1e-9


tiny = st.floats(-13, -1).map(lambda power: 10**power)


@given(st.lists(tiny | tiny.map(lambda b: 1 - b), min_size=1, max_size=8).map(own))
@example(own([4.1658930309395797e-14, 0.9999999999998351]))
def test_extreme_betas_give_no_complex_numbers(beta):
    """1 - alpha_bar_s - sigma^2 is nearly 0 where beta_t is nearly 1; it may be rounded to less."""
    states, _ = sample("DDIM", beta, perfect(beta, 0.5), randn(3, 2))
    assert all(xt.dtype == torch.float64 and xt.isfinite().all() for xt in states)


@both_samplers
@given(schedules, st.floats(-3, 3), shares, shares, seeds)
@example(L21, 1, 1, 0, 0)
@example(C1, -1, 1, 1, 0)
def test_perfect_model_of_one_point_samples_that_point(sampler, beta, point, share, eta, seed):
    """Exactly, as the last step adds no noise; and on the way each x_t is one of q(x_t | x_0). Of
    1,000 samples, so that a variance may be 27 % off; the next test is exact."""
    mean, var = single_steps(beta)
    xT = mean[-1] * point + var[-1].sqrt() * randn(1000, 1, seed=seed)
    states, times = sample(sampler, beta, perfect(beta, point), xT, share, eta, seed + 100)
    torch.testing.assert_close(states[-1], torch.full_like(xT, point), rtol=1e-6, atol=1e-6)
    visited = [*times, 0]
    away = torch.cat(states, 1) - mean[visited] * point  # [1000, steps + 1]
    assert within_six_errors(away, 0) and within_six_errors(away**2, var[visited])


@both_samplers
@given(own_schedules | linear_schedules, shares, shares, st.floats(-2, 2), st.floats(0.5, 2))
@example(L1000, 1, 1, 1, 1)
@example(L21, 1, 0, 1, 1)
def test_step_of_a_model_that_knows_x0_is_bayes_rule(sampler, beta, share, eta, x0, z):
    """q(x_s | x_t, x_0) on a grid. DDIM has eta times its deviation, and the variance of q(x_s)."""
    eta = 1.0 if sampler == "Algorithm 2" else eta
    mean, var = single_steps(beta)
    start = (mean[-1] * x0 + var[-1].sqrt() * z).expand(2, 1)
    states, times = sample(sampler, beta, perfect(beta, x0), start, share, eta)
    assume(len(times) > 1)
    s = times[1]
    torch.manual_seed(0)
    noise = torch.randn_like(start)
    sd = ((states[1][0] - states[1][1]) / (noise[0] - noise[1])).item()
    middle = (states[1][0] - sd * noise[0]).item()
    prior = Normal(mean[s] * x0, var[s].sqrt())
    kept = mean[-1] / mean[s]  # of x_s in x_t
    x = prior.mean + prior.stddev * torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    likelihood = Normal(kept * x, (var[-1] - kept**2 * var[s]).sqrt()).log_prob(start[0])
    p = torch.softmax(prior.log_prob(x) + likelihood, 0)
    want = (p * x).sum().item()
    assert sd == pytest.approx(eta * (p * (x - want) ** 2).sum().item() ** 0.5, rel=1e-4, abs=1e-9)
    if eta == 1:
        assert middle == pytest.approx(want, abs=1e-5)
    root = (middle - prior.mean.item()) / z  # the deviation that comes from eps
    assert root >= -1e-9 and root**2 + sd**2 == pytest.approx(var[s].item(), rel=1e-5)


# by diffusers 0.42, from x_T = 0.5 with eps = sin(3 x_t) t / 1000 and z = 1 in every step:
# x_t at t = 999, 500, 0 of DDPMScheduler, at 980, 500, 0 of DDIMScheduler with 50 trailing steps
GOLDEN = {
    (linear_schedule, "Algorithm 2", 1): (0.62634472, 656.23892, 2403.0918),
    (linear_schedule, "DDIM", 0): (0.38978927, 0.00128570, 0.00087179),
    (linear_schedule, "DDIM", 1): (0.78317713, 123.01099, 451.78647),
    (cosine_schedule, "Algorithm 2", 1): (-14.701232, -5626.1079, -7985.4675),
    (cosine_schedule, "DDIM", 0): (-313.59767, -7086.4794, -10084.045),
    (cosine_schedule, "DDIM", 1): (-313.59359, -7058.9398, -10040.530),
}


@pytest.mark.parametrize(("schedule", "sampler", "eta"), GOLDEN)
def test_samplers_go_where_those_of_diffusers_go(schedule, sampler, eta, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    start = torch.full((1, 1), 0.5, dtype=torch.float64)
    beta = schedule(1000)
    states, _ = sample(
        sampler, beta, lambda x, t: torch.sin(3 * x) * t / 1000, start, 49 / 999, eta
    )
    got = [states[k].item() for k in (1, len(states) // 2, -1)]
    assert got == pytest.approx(GOLDEN[schedule, sampler, eta], rel=3e-5)


# loss and bound: ddpm_2d
def test_training_draws_t_from_1_to_T_and_fresh_gaussian_noise_which_is_the_target():
    """A model that returns what was added has no loss; what was added before, one of 2."""
    diffusion, n, seen = ddpm_2d.Diffusion(linear_schedule(50)), 200_000, []

    def model(xt, t):
        seen.append((xt / diffusion.noise[t, None, None], t))
        return seen[0][0]

    torch.manual_seed(0)
    loss = diffusion.p_losses(model, torch.zeros(n, 2, 1))
    assert loss.shape == (n,) and loss.max() < 1e-9
    eps, t = seen[0]
    assert t.min() == 1 and t.max() == 50
    assert within_six_errors((t[:, None] == torch.arange(1, 51)).float(), 1 / 50)
    for power, moment in ((1, 0), (2, 1), (4, 3)):  # uniform noise has a fourth moment of 1.8
        assert within_six_errors(eps.flatten() ** power, moment)
    assert within_six_errors(diffusion.p_losses(model, torch.zeros(n, 2, 1)), 2)


@given(own_schedules, st.integers(1, 4), seeds)
@example(L21, 2, 0)
def test_terms_of_the_bound_are_divergences_of_gaussians(beta, d, seed):
    """Each against torch.distributions at the x_t the model saw, with Bayes' rule by precisions."""
    mean, var = single_steps(beta)
    x0, seen = randn(6, d, seed=seed), []
    judge = ddpm_2d.Diffusion(beta).variational_bound
    terms, _ = judge(lambda xt, t: seen.append(xt) or wave(xt, t), x0)
    want = []
    for t, xt in enumerate(seen, 1):
        kept, b = (1 - beta[t - 1]).sqrt(), beta[t - 1]
        guess = (xt - var[t].sqrt() * wave(xt, torch.tensor([t]))) / mean[t]  # of x_0
        if t == 1:
            want.append(-Normal(guess, b.sqrt()).log_prob(x0))
            continue
        precision = kept**2 / b + 1 / var[t - 1]
        middles = [kept / b * xt + mean[t - 1] / var[t - 1] * x for x in (x0, guess)]
        q, p = [Normal(x / precision, precision.rsqrt()) for x in middles]
        want.append(kl_divergence(q, p))
    want.append(kl_divergence(Normal(mean[-1] * x0, var[-1].sqrt()), Normal(0.0, 1.0)))
    want = torch.stack([kl.sum() / 6 for kl in want])
    torch.testing.assert_close(terms, want, rtol=1e-4, atol=1e-6)
    before = torch.get_rng_state()
    first, again, other = [judge(wave, x0, seed)[0][:-1] for seed in (0, 0, 1)]
    assert torch.equal(first, again) and not torch.isclose(first, other).any()
    assert torch.equal(before, torch.get_rng_state())  # the caller's noise goes on as it was
