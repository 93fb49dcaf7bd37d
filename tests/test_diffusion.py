"""What ddpm_2d.py and ddpm_mnist.py share, as one specification, against oracles not of our code.

Statistical checks allow six standard errors and are seeded. Exact ones run in float64: only the
buffers signal and noise are float32, and the samplers do not use them.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import ddpm_2d
import ddpm_mnist

SHAPES = [(2,), (1, 4, 4), (3, 4, 2)]  # points and images
NAMES = ["linear", "cosine"]


def schedule(name, T, script=ddpm_2d):
    """beta and alpha_bar, float64 [T + 1]."""
    beta = ddpm_2d.linear_schedule(T) if name == "linear" else script.cosine_schedule(T)
    return beta, torch.cumprod(1 - beta, 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def wave(xt, t):
    """A model that depends on x_t and t, for points and images."""
    return 0.9 * torch.tanh(xt) * (t.view(-1, *[1] * (xt.ndim - 1)) / 60) ** 0.3


def gaussian_eps(alpha_bar, m, s):
    """E[eps | x_t] for data N(m, s^2), from the joint Gaussian of (eps, x_t)."""

    def model(xt, t):
        a = alpha_bar[t].view(-1, *[1] * (xt.ndim - 1))
        return ((1 - a).sqrt() * (xt - a.sqrt() * m) / (a * s**2 + 1 - a)).to(xt.dtype)

    return model


def final_variance(beta, alpha_bar, c, last=0.0):
    """Of x_0 by Algorithm 2 with eps_theta = c_t x_t; last is that of the noise at t = 1."""
    var = 1.0  # of x_T
    for t in range(len(beta) - 1, 0, -1):
        a, b = alpha_bar[t], beta[t]
        sigma2 = b * (1 - alpha_bar[t - 1]) / (1 - a) if t > 1 else last
        var = (1 - b * c[t] / (1 - a).sqrt()) ** 2 / (1 - b) * var + sigma2
    return var.item()


def algorithm_2(beta, model, xT, generator=None):
    """All states, x_T to x_0; what DDIM with eta = 1 and T steps must give as well."""
    return list(ddpm_2d.Diffusion(beta).p_sample_loop(model, xT, generator))


def assert_law(x, mean, sd):
    assert abs(x.mean().item() - mean) < 6 * sd / x.numel() ** 0.5 + 1e-5
    assert abs(x.std().item() - sd) < 6 * sd / (2 * x.numel()) ** 0.5 + 1e-5


@pytest.fixture(scope="module", params=[ddpm_2d, ddpm_mnist], ids=lambda script: script.__name__)
def script(request):
    return request.param


@given(name=st.sampled_from(NAMES), T=st.integers(1, 5000))
def test_every_schedule_turns_data_into_noise_step_by_step(script, name, T):
    T += 20 if name == "linear" else 0
    beta, alpha_bar = schedule(name, T, script)
    assert beta.dtype == torch.float64 and beta[0] == 0
    assert (beta[1:] > 0).all() and (beta < 1).all() and (beta.diff() >= 0).all()
    assert (alpha_bar.diff() < 0).all() and alpha_bar[-1].sqrt() < 0.04
    assert beta[-1].item() == pytest.approx(20 / T if name == "linear" else 0.999)
    diffusion = script.Diffusion(beta)
    assert diffusion.T == len(beta) - 1 == T
    assert diffusion.alpha_bar == alpha_bar.tolist()
    assert not diffusion.state_dict()  # weights fit any schedule
    for buffer, want in ((diffusion.signal, alpha_bar), (diffusion.noise, 1 - alpha_bar)):
        assert buffer.dtype == torch.float32  # of differences in float64, which counts at t = 1
        torch.testing.assert_close(buffer.double() ** 2, want, rtol=3e-7, atol=0)


@given(name=st.sampled_from(NAMES), T=st.integers(21, 500), u=st.floats(0, 1), x0=st.floats(-3, 3))
def test_q_sample_has_the_mean_and_variance_of_eq_4(script, name, T, u, x0):
    beta, alpha_bar = schedule(name, T, script)
    t = 1 + round(u * (T - 1))
    eps = randn(20_000, 1, seed=t, dtype=torch.float32)
    steps = torch.full((20_000,), t)
    xt = script.Diffusion(beta).q_sample(torch.full((20_000, 1), x0), steps, eps)
    assert_law(xt, alpha_bar[t].item() ** 0.5 * x0, (1 - alpha_bar[t].item()) ** 0.5)


@given(name=st.sampled_from(NAMES), T=st.integers(21, 1000))
def test_q_sample_is_T_one_step_kernels_in_a_row(script, name, T):
    beta, _ = schedule(name, T, script)
    mean, var, path = 1.0, 0.0, []  # of x_t given x_0 = 1
    for b in beta.tolist():
        mean, var = math.sqrt(1 - b) * mean, (1 - b) * var + b
        path.append([mean, mean + 2 * math.sqrt(var)])
    ones = torch.ones(T + 1, 2)
    got = script.Diffusion(beta).q_sample(ones, torch.arange(T + 1), ones * torch.tensor([0, 2]))
    torch.testing.assert_close(got, torch.tensor(path), rtol=1e-5, atol=1e-6)


@given(shape=st.sampled_from(SHAPES), T=st.integers(1, 300), n=st.integers(1, 5), data=st.data())
def test_every_result_has_the_shape_of_the_points_or_images(script, shape, T, n, data):
    """DDIM visits T first, then evenly spaced steps; p_sample_loop visits them all."""
    diffusion = script.Diffusion(schedule("cosine", T)[0])
    x0 = randn(n, *shape, dtype=torch.float32)
    t = torch.randint(1, T + 1, (n,), generator=seeded(T))
    assert diffusion.q_sample(x0, t, x0).shape == x0.shape
    weight = torch.tensor(1.0, requires_grad=True)
    seen = []

    def model(xt, t):
        assert t.shape == (n,) and t.dtype == torch.long
        seen.append(t)
        return weight * wave(xt, t)

    assert diffusion.p_losses(model, x0).shape == (n,)
    steps = data.draw(st.integers(1, T))
    loops = [(steps, diffusion.ddim_sample_loop(model, x0, steps, 0.5))]
    if script is ddpm_2d:
        loops.append((T, diffusion.p_sample_loop(model, x0)))
    for number, loop in loops:
        seen.clear()
        for count, xt in enumerate(loop):
            assert xt.shape == x0.shape and xt.dtype == torch.float32 and not xt.requires_grad
            assert (weight * xt).requires_grad  # the caller may still differentiate
        assert len(seen) == count == number and (seen[0] == T).all()
        gaps = -torch.stack([*seen, 0 * t]).diff(dim=0)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("name", "first", "last"), [("linear", 0.9999, 4.0358e-5), ("cosine", 1 - 4.128e-5, 2.43e-9)]
)
def test_schedules_have_the_values_of_their_authors(script, name, first, last):
    _, alpha_bar = schedule(name, 1000, script)
    assert alpha_bar[1].item() == pytest.approx(first, rel=1e-8)
    assert alpha_bar[-1].item() == pytest.approx(last, rel=5e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_mean_squared_error_of_the_noise_and_has_its_gradient(script, shape):
    beta, alpha_bar = schedule("cosine", 100)
    t = torch.tensor([1, 40, 100])
    x0, eps = randn(2, 3, *shape)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = script.Diffusion(beta).p_losses(lambda xt, t: scale * wave(xt, t), x0, t, eps)
    loss.sum().backward()
    a = alpha_bar[t].view(-1, *[1] * len(shape))
    output = wave(a.sqrt() * x0 + (1 - a).sqrt() * eps, t)
    want = (eps - 0.3 * output).pow(2).reshape(3, -1).sum(1) / math.prod(shape)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    slope = (2 * (0.3 * output - eps) * output).sum() / math.prod(shape)
    torch.testing.assert_close(scale.grad, slope, rtol=1e-5, atol=1e-6)


def test_training_draws_t_from_1_to_T_and_fresh_gaussian_noise_which_is_the_target(script):
    """A model that returns what was added has no loss, and returned again, one of 2."""
    diffusion, n, seen = script.Diffusion(schedule("linear", 50)[0]), 200_000, []

    def perfect(xt, t):
        seen.append((xt / diffusion.noise[t, None], t))
        return seen[0][0]

    torch.manual_seed(0)
    assert diffusion.p_losses(perfect, torch.zeros(n, 2)).mean() < 1e-9
    eps, t = seen[0]
    counts = torch.bincount(t, minlength=51)
    assert counts[0] == 0 and len(counts) == 51
    assert (counts[1:] - n / 50).abs().max() < 6 * math.sqrt(n / 50)
    assert_law(eps, 0, 1)
    assert abs((eps**4).mean() - 3) < 6 * math.sqrt(96 / (2 * n))  # uniform noise has 1.8
    other = diffusion.p_losses(perfect, torch.zeros(n, 2)).mean()
    assert abs(other - 2) < 6 * math.sqrt(8 / (2 * n))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_sampler_is_algorithm_2_written_out(name, shape):
    """Eq. (11) and sigma_t^2 = beta-tilde_t, Eq. (7), in float64 with the same draws of z."""
    T = 60
    beta, a = schedule(name, T)
    x, draws = randn(7, *shape, seed=1), seeded(2)
    states = algorithm_2(beta, wave, x, seeded(2))
    for t in range(T, 0, -1):
        eps = wave(x, torch.tensor([t]))
        x = (x - beta[t] / (1 - a[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
        if t > 1:
            z = torch.empty_like(x).normal_(generator=draws)
            x = x + (beta[t] * (1 - a[t - 1]) / (1 - a[t])).sqrt() * z
        torch.testing.assert_close(states[T - t + 1], x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 2, 21, 50, 200, 800, 1000])
def test_ddim_with_eta_1_and_T_steps_is_algorithm_2(script, name, T):
    """The same states from the same noise, also for images, and in float32, as they are used. Had
    the schedule no more digits, 1 - alpha_bar_s - sigma^2 would be below 0: NaN at cosine, 800."""
    beta, alpha_bar = schedule("cosine" if T < 21 else name, T)
    model = gaussian_eps(alpha_bar, 0.5, 0.4)
    xT = randn(5, *SHAPES[T % 3], seed=7, dtype=torch.float32)
    ddpm = algorithm_2(beta, model, xT, seeded(8))
    ddim = script.Diffusion(beta).ddim_sample_loop(model, xT, T, 1.0, seeded(8))
    for a, b in zip(ddpm, ddim, strict=True):
        assert b.dtype == torch.float32 and b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@given(name=st.sampled_from(NAMES), t=st.integers(2, 100), x0=st.floats(-2, 2), z=st.floats(-2, 2))
def test_step_of_a_model_that_knows_x0_is_bayes_rule(name, t, x0, z):
    """q(x_{t-1} | x_t, x_0) on a grid. A schedule cut off at t makes step t the first one."""
    beta, alpha_bar = schedule(name, 100)
    a, b = alpha_bar[t - 1].item(), beta[t].item()
    xt = math.sqrt(a * (1 - b)) * x0 + math.sqrt(1 - a * (1 - b)) * z
    start = torch.full((2, 1), xt, dtype=torch.float64)
    step = algorithm_2(beta[: t + 1], gaussian_eps(alpha_bar, x0, 0), start, seeded())[1]
    noise = torch.empty_like(start).normal_(generator=seeded())
    sd = ((step[0] - step[1]) / (noise[0] - noise[1])).item()
    mean = (step[0] - sd * noise[0]).item()
    x = torch.linspace(mean - 12 * sd, mean + 12 * sd, 4001, dtype=torch.float64)
    log_p = Normal(math.sqrt(a) * x0, math.sqrt(1 - a)).log_prob(x)
    log_p += Normal(math.sqrt(1 - b) * x, math.sqrt(b)).log_prob(torch.tensor(xt))
    p = torch.softmax(log_p, 0)
    want = (p * x).sum().item()
    assert mean == pytest.approx(want, abs=1e-6)
    assert sd**2 == pytest.approx((p * (x - want) ** 2).sum().item(), rel=1e-6)


def test_exact_model_of_a_gaussian_gives_the_law_of_the_closed_recursion(script):
    s = 0.5
    beta, a = schedule("linear", 50)
    var = final_variance(beta, a, (1 - a).sqrt() / (a * s**2 + 1 - a))
    model = gaussian_eps(a, 0, s)
    xT = randn(200_000, 1, seed=3)
    torch.manual_seed(4)  # as no generator is given
    *_, by_ddim = script.Diffusion(beta).ddim_sample_loop(model, xT, 50, 1.0)
    for x0 in (algorithm_2(beta, model, xT)[-1], by_ddim):
        assert_law(x0, 0, var**0.5)


def test_last_step_adds_no_noise():
    """x_0 is what the model's last output says that it is."""
    beta, alpha_bar = schedule("linear", 30)
    *_, x1, x0 = algorithm_2(beta, wave, randn(50, 2), seeded())
    eps = wave(x1, torch.ones(50, dtype=torch.long))
    a = alpha_bar[1]
    torch.testing.assert_close(x0, (x1 - (1 - a).sqrt() * eps) / a.sqrt())


@given(steps=st.integers(1, 60), eta=st.floats(0, 1), name=st.sampled_from(NAMES))
def test_ddim_step_is_eq_12_and_16(script, steps, eta, name):
    """The whole path in float64, with a_0 = 1."""
    beta, a = schedule(name, 60)
    x, draws = randn(5, *SHAPES[steps % 3], seed=steps), seeded(9)
    states = list(script.Diffusion(beta).ddim_sample_loop(wave, x, steps, eta, seeded(9)))
    times = [round(60 * k / steps) for k in range(steps, -1, -1)]
    for t, s, state in zip(times, times[1:], states[1:], strict=False):
        eps = wave(x, torch.tensor([t]))
        x0 = (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt()
        sigma = eta * ((1 - a[s]) / (1 - a[t])).sqrt() * (1 - a[t] / a[s]).sqrt()
        z = torch.empty_like(x).normal_(generator=draws)
        x = a[s].sqrt() * x0 + (1 - a[s] - sigma**2).sqrt() * eps + sigma * z
        torch.testing.assert_close(state, x, rtol=1e-7, atol=1e-7)


def test_ddim_without_noise_is_deterministic_and_follows_the_flow(script):
    """For N(m, s^2) the probability flow is affine: x_0 = m + s (x_T - sqrt(a) m) / sd(x_T)."""
    m, s = -0.4, 0.6
    beta, alpha_bar = schedule("linear", 1000)
    xT = randn(100, 2, seed=10)
    diffusion, model = script.Diffusion(beta), gaussian_eps(alpha_bar, m, s)
    runs = [list(diffusion.ddim_sample_loop(model, xT, 1000))[-1] for _ in range(2)]
    assert torch.equal(*runs)
    a = alpha_bar[-1]
    want = m + s * (xT - a.sqrt() * m) / (a * s**2 + 1 - a).sqrt()
    torch.testing.assert_close(runs[0], want, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("steps", "eta"), [(0, 0.0), (22, 0.0), (-1, 0.5), (5, -0.1), (5, 1.1), (5, math.nan)]
)
def test_impossible_steps_and_eta_are_refused(script, steps, eta):
    diffusion = script.Diffusion(schedule("cosine", 21)[0])
    with pytest.raises(ValueError, match=f"^{steps} steps, eta {eta}: .*T = 21 and 0 to 1"):
        next(diffusion.ddim_sample_loop(wave, torch.zeros(1, 2), steps, eta))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_terms_of_the_bound_are_divergences_of_gaussians(name, shape):
    """Each against torch.distributions, at the x_t the model saw, with Bayes' rule in float64."""
    T, seen = 40, {}
    beta, a = (x[: T + 1] for x in schedule(name, 2 * T))  # x_T keeps some signal
    x0 = randn(6, *shape, seed=13)
    terms, _ = ddpm_2d.Diffusion(beta).variational_bound(
        lambda xt, t: wave(seen.setdefault(t[0].item(), xt), t), x0
    )
    want = [0] * T + [kl_divergence(Normal(a[T].sqrt() * x0, (1 - a[T]).sqrt()), Normal(0.0, 1.0))]
    for t, xt in seen.items():
        eps = wave(xt, torch.tensor([t]))
        mu = (xt - beta[t] / (1 - a[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
        if t == 1:
            want[0] = -Normal(mu, beta[1].sqrt()).log_prob(x0)
        else:
            precision = (1 - beta[t]) / beta[t] + 1 / (1 - a[t - 1])
            mean = (1 - beta[t]).sqrt() / beta[t] * xt + a[t - 1].sqrt() / (1 - a[t - 1]) * x0
            sd = precision.rsqrt()
            want[t - 1] = kl_divergence(Normal(mean / precision, sd), Normal(mu, sd))
    want = torch.stack([kl.sum() / 6 for kl in want])
    torch.testing.assert_close(terms, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("gain", "s", "gap"), [(0.0, 0.5, 3), (0.7, 0.5, 2), (1.0, 0.5, 1.4), (1.0, 0.001, 0.001)]
)
def test_errors_and_bound_of_a_linear_model_are_those_of_closed_form(gain, s, gap):
    """Data N(0, s^2), eps_theta = c_t x_t: p_theta(x_0) is a chain of affine Gaussian steps. The
    terms sum to more than -log p_theta, and to no more if s -> 0, where beta-tilde is optimal."""
    n = 20_000
    beta, a = schedule("linear", 100)
    c = gain * (1 - a).sqrt() / (a * s**2 + 1 - a)
    x0 = s * randn(n, 1, seed=3)
    terms, error = ddpm_2d.Diffusion(beta).variational_bound(lambda xt, t: c[t, None] * xt, x0)
    want = (1 - c * (1 - a).sqrt()) ** 2 + c**2 * a * s**2
    assert ((error - want[1:]).abs() < 6 * want[1:] * math.sqrt(2 / n)).all()
    sd = final_variance(beta, a, c, last=beta[1]) ** 0.5
    nll = -Normal(0.0, sd).log_prob(x0).mean()
    assert 0 < terms.sum() - nll < gap


def test_weight_and_last_term_have_their_golden_values():
    """Eq. (12) at t = 2 with beta-tilde; L_T is 2.91e-5 bits a dimension for unit variance."""
    diffusion = ddpm_2d.Diffusion(schedule("linear", 1000)[0])
    terms, error = diffusion.variational_bound(wave, torch.tensor([[1.0, -1.0]]))
    assert (terms[1] / error[1]).item() == pytest.approx(0.599672, rel=1e-5)
    assert terms[-1].item() / 2 / math.log(2) == pytest.approx(2.91e-5, rel=0.01)


def test_two_models_are_judged_on_the_same_noise():
    seen = []
    diffusion, x0 = ddpm_2d.Diffusion(schedule("cosine", 30)[0]), randn(5, 2)
    for seed in (0, 0, 7):
        diffusion.variational_bound(lambda xt, t: seen.append(xt) or len(seen) * xt, x0, seed)
    first, second, other = torch.stack(seen).view(3, 30, 5, 2)
    assert torch.equal(first, second) and not torch.isclose(first, other).any()
    noise = first - diffusion.signal[1:, None, None] * x0
    assert noise.unique().numel() == 300  # fresh for every point and every t
