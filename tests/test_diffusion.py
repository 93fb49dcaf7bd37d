"""What ddpm_2d.py and ddpm_mnist.py share, as one specification: each closed form stands against an
oracle that is not our code.

Statistical checks allow six standard errors and are seeded. Exact ones run in float64: only the
buffers signal and noise are float32, and the samplers do not use them.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_device import pretend_device
from torch.distributions import Normal, kl_divergence

import ddpm_2d
import ddpm_mnist

SHAPES = [(2,), (1, 4, 4), (3, 4, 2)]  # points and images
some_schedule = st.sampled_from(["linear", "cosine", "sigmoid"])


def sigmoid_schedule(T):
    """A user's own (Jabri et al. 2022)."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    f = torch.sigmoid(3 - 6 * u)
    alpha_bar = (f - f[-1]) / (f[0] - f[-1])
    beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return torch.cat([torch.zeros(1, dtype=torch.float64), beta])


def schedule(name, T, script=ddpm_2d):
    """beta and alpha_bar, float64 [T + 1]."""
    makers = {"linear": ddpm_2d.linear_schedule, "sigmoid": sigmoid_schedule}
    beta = makers.get(name, script.cosine_schedule)(T)
    return beta, torch.cumprod(1 - beta, 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def gaussian_eps(alpha_bar, m, s):
    """E[eps | x_t] for data N(m, s^2), from the joint Gaussian of (eps, x_t)."""

    def model(xt, t):
        a = alpha_bar[t].view(-1, *[1] * (xt.ndim - 1))
        return ((1 - a).sqrt() * (xt - a.sqrt() * m) / (a * s**2 + 1 - a)).to(xt.dtype)

    return model


def assert_law(x, mean, sd):
    """The draws x of one Gaussian have this mean and standard deviation."""
    assert abs(x.mean().item() - mean) < 6 * sd / x.numel() ** 0.5 + 1e-5
    assert abs(x.std().item() - sd) < 6 * sd / (2 * x.numel()) ** 0.5 + 1e-5


@pytest.fixture(scope="module", params=[ddpm_2d, ddpm_mnist], ids=lambda script: script.__name__)
def script(request):
    return request.param


def by_ddpm(diffusion, model, xT, generator=None):
    return list(diffusion.p_sample_loop(model, xT, generator))


def by_ddim(diffusion, model, xT, generator=None):
    return list(diffusion.ddim_sample_loop(model, xT, diffusion.T, 1.0, generator))


@pytest.fixture(
    scope="module",
    params=[(ddpm_2d, by_ddpm), (ddpm_2d, by_ddim), (ddpm_mnist, by_ddim)],
    ids=["ddpm_2d-p_sample_loop", "ddpm_2d-ddim", "ddpm_mnist-ddim"],
)
def algorithm_2(request):
    """The three samplers that are Algorithm 2: (beta, model, xT, generator) -> T + 1 states."""
    module, loop = request.param
    return lambda beta, *more: loop(module.Diffusion(beta), *more)


# ------------------------------------------------------------------------------ the schedule


@given(name=some_schedule, T=st.integers(21, 5000))
def test_every_schedule_turns_data_into_noise_step_by_step(script, name, T):
    beta, alpha_bar = schedule(name, T, script)
    assert beta.dtype == torch.float64 and beta.shape == (T + 1,)
    assert beta[0] == 0 and (beta[1:] > 0).all() and (beta < 1).all()
    assert (alpha_bar.diff() < 0).all() and alpha_bar[-1].sqrt() < 0.02
    if name != "sigmoid":
        assert (beta[1:].diff() >= 0).all()


@given(T=st.integers(1, 60))
def test_cosine_schedule_works_for_few_steps_too(script, T):
    beta, alpha_bar = schedule("cosine", T, script)
    assert beta[0] == 0 and (beta[1:] > 0).all() and (beta < 1).all() and alpha_bar[-1] < 0.002


def test_linear_schedule_has_the_values_of_the_paper():
    beta, alpha_bar = schedule("linear", 1000)
    for t, value in {1: 0.9999, 2: 0.99978009, 500: 0.0785872, 1000: 4.0358e-5}.items():
        assert alpha_bar[t].item() == pytest.approx(value, rel=1e-4 if t > 2 else 1e-8)
    assert beta[[1, 1000]].tolist() == pytest.approx([1e-4, 0.02])
    for T, end in {500: 3.8e-5, 200: 3.0e-5, 100: 2.0e-5, 50: 7.7e-6}.items():
        assert schedule("linear", T)[1][-1].item() == pytest.approx(end, rel=0.02)


@pytest.mark.parametrize(("T", "end"), [(1000, 2.43e-9), (200, 6.1e-8), (50, 9.7e-7)])
def test_cosine_schedule_has_the_values_of_its_authors(script, T, end):
    beta, alpha_bar = schedule("cosine", T, script)
    assert alpha_bar[-1].item() == pytest.approx(end, rel=0.01)
    assert (beta == 0.999).sum() == 1 and beta[-1] == 0.999
    if T == 1000:
        assert beta[1].item() == pytest.approx(4.128e-5, rel=1e-3)


@given(name=some_schedule, T=st.integers(21, 2000))
def test_diffusion_keeps_the_schedule_in_double_precision_and_for_batches(script, name, T):
    beta, alpha_bar = schedule(name, T, script)
    diffusion = script.Diffusion(beta)
    assert diffusion.T == T and diffusion.alpha_bar == alpha_bar.tolist()
    for buffer, want in ((diffusion.signal, alpha_bar), (diffusion.noise, 1 - alpha_bar)):
        assert buffer.dtype == torch.float32 and buffer.shape == (T + 1,)
        torch.testing.assert_close(buffer.double() ** 2, want, rtol=3e-7, atol=0)  # also at t = 1


def test_schedule_moves_with_the_module_and_stays_out_of_checkpoints(script):
    diffusion = script.Diffusion(schedule("cosine", 50)[0])
    assert not diffusion.state_dict() and not list(diffusion.parameters())
    diffusion.to("meta")
    assert diffusion.signal.is_meta and diffusion.noise.is_meta


# ----------------------------------------------------------------------- the forward process


@given(name=some_schedule, T=st.integers(21, 500), part=st.floats(0, 1), x0=st.floats(-3, 3))
def test_q_sample_has_the_mean_and_variance_of_eq_4(script, name, T, part, x0):
    beta, alpha_bar = schedule(name, T, script)
    t = 1 + round(part * (T - 1))
    eps = randn(20_000, 1, seed=t, dtype=torch.float32)
    steps = torch.full((20_000,), t)
    xt = script.Diffusion(beta).q_sample(torch.full((20_000, 1), x0), steps, eps)
    assert_law(xt, alpha_bar[t].item() ** 0.5 * x0, (1 - alpha_bar[t].item()) ** 0.5)


@given(name=some_schedule, T=st.integers(21, 1000))
def test_q_sample_is_T_one_step_kernels_in_a_row(script, name, T):
    beta, _ = schedule(name, T, script)
    mean, var, path = 1.0, 0.0, []  # of x_t given x_0 = 1
    for b in beta.tolist():
        mean, var = math.sqrt(1 - b) * mean, (1 - b) * var + b
        path.append([mean, mean + 2 * math.sqrt(var)])
    ones = torch.ones(T + 1, 2)
    got = script.Diffusion(beta).q_sample(ones, torch.arange(T + 1), ones * torch.tensor([0, 2]))
    torch.testing.assert_close(got, torch.tensor(path), rtol=1e-5, atol=1e-6)
    assert torch.equal(got[0], ones[0])  # nothing happens at t = 0


@given(shape=st.sampled_from(SHAPES), T=st.integers(1, 50), n=st.integers(1, 5), data=st.data())
def test_every_result_has_the_shape_of_the_points_or_images(script, shape, T, n, data):
    diffusion = script.Diffusion(schedule("cosine", T)[0])
    x0 = randn(n, *shape, dtype=torch.float32)
    t = torch.randint(1, T + 1, (n,), generator=seeded(T))
    assert diffusion.q_sample(x0, t, x0).shape == x0.shape
    assert diffusion.p_losses(lambda xt, t: xt, x0).shape == (n,)
    steps = data.draw(st.integers(1, T))
    loops = {steps: diffusion.ddim_sample_loop(lambda xt, t: xt, x0, steps, 0.5)}
    if script is ddpm_2d:
        loops[T] = diffusion.p_sample_loop(lambda xt, t: xt, x0)
    for number, loop in loops.items():
        states = list(loop)
        assert len(states) == number + 1 and torch.equal(states[0], x0)
        assert all(x.shape == x0.shape and x.dtype == torch.float32 for x in states)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_of_a_batch_gets_its_own_t(script, shape):
    diffusion, t = script.Diffusion(schedule("linear", 100)[0]), torch.tensor([1, 40, 100])
    x0, eps = randn(2, 3, *shape)
    model = lambda xt, t: torch.sin(xt) + t.view(-1, *[1] * len(shape)) / 100
    whole = diffusion.q_sample(x0, t, eps), diffusion.p_losses(model, x0, t, eps)
    for i in range(3):
        row = x0[i, None], t[i, None], eps[i, None]
        torch.testing.assert_close(diffusion.q_sample(*row)[0], whole[0][i])
        torch.testing.assert_close(diffusion.p_losses(model, *row)[0], whole[1][i])


# ---------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_mean_squared_error_of_the_noise(script, shape):
    beta, alpha_bar = schedule("cosine", 100)
    diffusion, t = script.Diffusion(beta), torch.tensor([1, 40, 100])
    x0, eps = randn(2, 3, *shape)
    a = alpha_bar[t].view(-1, *[1] * len(shape))
    error = eps - torch.sin(a.sqrt() * x0 + (1 - a).sqrt() * eps)
    loss = diffusion.p_losses(lambda xt, t: torch.sin(xt), x0, t, eps)
    want = error.pow(2).reshape(3, -1).sum(1) / math.prod(shape)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def test_training_draws_every_t_from_1_to_T_equally_often(script):
    seen, n = [], 200_000
    torch.manual_seed(0)
    diffusion = script.Diffusion(schedule("linear", 50)[0])
    diffusion.p_losses(lambda xt, t: seen.append(t) or xt, torch.zeros(n, 2))
    counts = torch.bincount(seen[0], minlength=51)
    assert counts[0] == 0 and len(counts) == 51
    assert (counts[1:] - n / 50).abs().max() < 6 * math.sqrt(n / 50)


def test_fresh_gaussian_noise_is_the_target(script):
    """A model that returns what was added has no loss; one that returns 0 has E[eps^2] = 1."""
    diffusion = script.Diffusion(schedule("linear", 50)[0])
    seen = []

    def perfect(xt, t):
        seen.append(xt / diffusion.noise[t, None])
        return seen[-1]

    torch.manual_seed(0)
    assert diffusion.p_losses(perfect, torch.zeros(200_000, 2)).mean() < 1e-9
    assert_law(seen[0], 0, 1)
    assert abs((seen[0] ** 4).mean() - 3) < 6 * math.sqrt(96 / 400_000)  # uniform noise has 1.8
    zero = diffusion.p_losses(lambda xt, t: 0 * xt, torch.zeros(200_000, 2)).mean()
    assert abs(zero - 1) < 6 * math.sqrt(2 / 400_000)


def test_gradient_reaches_the_model_and_is_that_of_the_square(script):
    diffusion, t = script.Diffusion(schedule("cosine", 100)[0]), torch.tensor([3, 60])
    x0, eps = randn(2, 2, 2)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    diffusion.p_losses(lambda xt, t: scale * xt, x0, t, eps).sum().backward()
    xt = diffusion.q_sample(x0, t, eps)
    want = (2 * (0.3 * xt - eps) * xt).mean(1).sum()
    torch.testing.assert_close(scale.grad, want)


# ------------------------------------------------------------------------------- Algorithm 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_sampler_is_algorithm_2_written_out(algorithm_2, name, shape):
    """Eq. (11) and sigma_t^2 = beta-tilde_t, Eq. (7), in float64 with the same draws of z."""
    T = 60
    beta, a = schedule(name, T)
    predict = lambda xt, t: 0.9 * torch.tanh(xt) * (t.view(-1, *[1] * len(shape)) / T) ** 0.3
    x, draws = randn(7, *shape, seed=1), seeded(2)
    states = algorithm_2(beta, predict, x, seeded(2))
    assert len(states) == T + 1
    for t in range(T, 0, -1):
        eps = predict(x, torch.tensor([t]))
        x = (x - beta[t] / (1 - a[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
        if t > 1:
            z = torch.empty_like(x).normal_(generator=draws)
            x = x + (beta[t] * (1 - a[t - 1]) / (1 - a[t])).sqrt() * z
        torch.testing.assert_close(states[T - t + 1], x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [1, 2, 21, 100, 300])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_with_eta_1_and_T_steps_is_algorithm_2(script, name, T, shape):
    """The same states from the same noise, in float32, as they are used."""
    beta, alpha_bar = schedule(name, T) if T > 20 else schedule("cosine", T)
    model = gaussian_eps(alpha_bar, 0.5, 0.4)
    xT = randn(5, *shape, seed=7, dtype=torch.float32)
    ddpm = by_ddpm(ddpm_2d.Diffusion(beta), model, xT, seeded(8))
    ddim = by_ddim(script.Diffusion(beta), model, xT, seeded(8))
    for a, b in zip(ddpm, ddim, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@settings(max_examples=100)
@given(name=some_schedule, t=st.integers(2, 100), x0=st.floats(-2, 2), z=st.floats(-2, 2))
def test_step_of_a_model_that_knows_x0_is_bayes_rule(algorithm_2, name, t, x0, z):
    """q(x_{t-1} | x_t, x_0) on a grid. A schedule cut off at t makes step t the first one."""
    beta, alpha_bar = schedule(name, 100)
    a, b = alpha_bar[t - 1], beta[t]
    xt = math.sqrt(a * (1 - b)) * x0 + math.sqrt(1 - a * (1 - b)) * z
    know = lambda x, t: (x - alpha_bar[t].sqrt()[:, None] * x0) / (1 - alpha_bar[t]).sqrt()[:, None]
    start = torch.full((9, 1), xt, dtype=torch.float64)
    step = algorithm_2(beta[: t + 1], know, start, seeded())[1]
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


def test_beta_tilde_has_its_golden_value(algorithm_2):
    """Algorithm 2 of zeros with eps = 0, cut off at t = 2, where beta-tilde is 5.45319e-5."""
    beta, _ = schedule("linear", 1000)
    zeros = torch.zeros(9, 2, dtype=torch.float64)
    states = algorithm_2(beta[:3], lambda xt, t: 0 * xt, zeros, seeded())
    var = (states[1] / torch.empty_like(zeros).normal_(generator=seeded())) ** 2
    torch.testing.assert_close(var, torch.full_like(var, 5.45319e-5), rtol=1e-5, atol=0)


def test_exact_model_of_a_gaussian_gives_the_law_of_the_closed_recursion(algorithm_2):
    T, m, s, n = 50, 0.7, 0.5, 200_000
    beta, alpha_bar = schedule("linear", T)
    mean, var = 0.0, 1.0  # of x_T
    for t in range(T, 0, -1):
        a, b = alpha_bar[t].item(), beta[t].item()
        gain = (1 - a) ** 0.5 / (a * s**2 + 1 - a)  # eps = gain (x - sqrt(a) m)
        c = b / (1 - a) ** 0.5
        slope = (1 - c * gain) / (1 - b) ** 0.5
        mean = slope * mean + c * gain * a**0.5 * m / (1 - b) ** 0.5
        var = slope**2 * var + b * (1 - alpha_bar[t - 1].item()) / (1 - a)
    xT = randn(n, 1, seed=3, dtype=torch.float32)
    x0 = algorithm_2(beta, gaussian_eps(alpha_bar, m, s), xT, seeded(4))[-1]
    assert_law(x0, mean, var**0.5)


def test_single_point_as_data_is_met_exactly_through_the_right_laws(algorithm_2):
    """beta-tilde is the optimal choice here (Sec. 3.2): each x_t is q(x_t | x_0)."""
    beta, alpha_bar = schedule("linear", 100)
    xT = randn(20_000, 1, seed=5, dtype=torch.float32)
    xT = alpha_bar[-1].sqrt().float() * 0.8 + (1 - alpha_bar[-1]).sqrt().float() * xT
    states = algorithm_2(beta, gaussian_eps(alpha_bar, 0.8, 0.0), xT, seeded(6))
    for t in range(0, 101, 10):
        a = alpha_bar[t].item()
        assert_law(states[100 - t], a**0.5 * 0.8, (1 - a) ** 0.5)
    torch.testing.assert_close(states[-1], torch.full_like(xT, 0.8), rtol=0, atol=1e-5)


def test_last_step_adds_no_noise(algorithm_2):
    """x_0 is what the model's last output says that it is, and all seeds agree if T = 1."""
    beta, alpha_bar = schedule("linear", 30)
    model = lambda xt, t: torch.tanh(xt)
    *_, x1, x0 = algorithm_2(beta, model, randn(50, 2), seeded())
    a = alpha_bar[1]
    torch.testing.assert_close(x0, (x1 - (1 - a).sqrt() * torch.tanh(x1)) / a.sqrt())
    alone = [algorithm_2(beta[:2], model, randn(50, 2), seeded(k))[-1] for k in (1, 2)]
    assert torch.equal(*alone)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("T", [21, 50, 200, 800, 1000])
def test_all_steps_with_all_noise_stay_finite(algorithm_2, name, T):
    """In float32, 1 - alpha_bar_s - sigma^2 falls below 0: NaN at cosine, T = 800."""
    beta, alpha_bar = schedule(name, T)
    states = algorithm_2(beta, gaussian_eps(alpha_bar, 0, 1), randn(4, 2, dtype=torch.float32))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in states)
    assert states[-1].abs().max() < 6


@given(T=st.integers(1, 60))
def test_algorithm_2_visits_T_to_1_once_each(algorithm_2, T):
    seen = []

    def spy(xt, t):
        assert t.shape == (3,) and t.dtype == torch.long and (t == t[0]).all()
        seen.append(t[0].item())
        return 0 * xt

    assert len(algorithm_2(schedule("cosine", T)[0], spy, randn(3, 2))) == T + 1
    assert seen == list(range(T, 0, -1))


def test_generator_decides_the_noise_alone(algorithm_2):
    beta, _ = schedule("cosine", 30)
    runs = []
    for world, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(world)
        runs.append(algorithm_2(beta, lambda xt, t: xt, randn(3, 2), seeded(seed))[-1])
    assert torch.equal(*runs[:2]) and not torch.isclose(*runs[1:]).any()
    torch.manual_seed(1)
    free = algorithm_2(beta, lambda xt, t: xt, randn(200, 2))[-2]
    assert free.unique().numel() == 400  # without one, every coordinate gets its own noise


# -------------------------------------------------------------------------------------- DDIM


@given(T=st.integers(1, 300), data=st.data())
def test_ddim_visits_T_first_and_ends_at_x0_for_every_number_of_steps(script, T, data):
    steps, seen = data.draw(st.integers(1, T)), []
    beta, alpha_bar = schedule("cosine", T)
    xT = randn(3, 2)
    loop = script.Diffusion(beta).ddim_sample_loop(lambda x, t: seen.append(t) or 0 * x, xT, steps)
    states = list(loop)
    visited = [t[0].item() for t in seen]
    assert all(t.shape == (3,) and t.dtype == torch.long and (t == t[0]).all() for t in seen)
    assert visited[0] == T and visited == sorted(set(visited), reverse=True) and visited[-1] >= 1
    gaps = -torch.tensor([*visited, 0]).diff()
    assert len(states) == steps + 1 and gaps.max() - gaps.min() <= 1  # evenly spaced
    # with eps = 0, all states of the path have one x_0
    torch.testing.assert_close(states[-1], xT / alpha_bar[T].sqrt())


@settings(max_examples=60)
@given(
    name=some_schedule, steps=st.integers(1, 60), eta=st.floats(0, 1), shape=st.sampled_from(SHAPES)
)
def test_ddim_step_is_eq_12_and_16(script, name, steps, eta, shape):
    """The whole path in float64, with a_0 = 1."""
    beta, a = schedule(name, 60)
    model = lambda xt, t: torch.cos(xt) * 0.3
    x, draws = randn(5, *shape, seed=steps), seeded(9)
    loop = script.Diffusion(beta).ddim_sample_loop(model, x, steps, eta, seeded(9))
    times = [round(60 * k / steps) for k in range(steps, -1, -1)]
    for i, state in enumerate(loop):
        torch.testing.assert_close(state, x, rtol=1e-7, atol=1e-7)
        if i < steps:
            t, s = times[i], times[i + 1]
            x0 = (x - (1 - a[t]).sqrt() * model(x, t)) / a[t].sqrt()
            sigma = eta * ((1 - a[s]) / (1 - a[t])).sqrt() * (1 - a[t] / a[s]).sqrt()
            z = torch.empty_like(x).normal_(generator=draws)
            x = a[s].sqrt() * x0 + (1 - a[s] - sigma**2).sqrt() * model(x, t) + sigma * z


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals_for_every_eta(script, eta):
    """Song et al., Lemma 1: if the model knows x_0, every x_s is N(sqrt(a_s) x_0, 1 - a_s)."""
    beta, alpha_bar = schedule("linear", 100)
    xT = alpha_bar[-1].sqrt() * 0.5 + (1 - alpha_bar[-1]).sqrt() * randn(20_000, 1, seed=4)
    model = gaussian_eps(alpha_bar, 0.5, 0.0)
    loop = script.Diffusion(beta).ddim_sample_loop(model, xT, 10, eta, seeded(5))
    for s, xs in zip(range(100, -1, -10), loop, strict=True):
        assert_law(xs, alpha_bar[s].item() ** 0.5 * 0.5, (1 - alpha_bar[s].item()) ** 0.5)


def test_ddim_without_noise_is_deterministic_and_follows_the_flow(script):
    """For N(m, s^2) the probability flow is affine: x_0 = m + s (x_T - sqrt(a) m) / sd(x_T)."""
    m, s = -0.4, 0.6
    beta, alpha_bar = schedule("linear", 1000)
    xT = randn(100, 2, seed=10)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = gaussian_eps(alpha_bar, m, s)
        runs.append(list(script.Diffusion(beta).ddim_sample_loop(model, xT, 1000))[-1])
    assert torch.equal(*runs)
    a = alpha_bar[-1]
    want = m + s * (xT - a.sqrt() * m) / (a * s**2 + 1 - a).sqrt()
    torch.testing.assert_close(runs[0], want, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("steps", "eta"),
    [(0, 0.0), (22, 0.0), (-1, 0.5), (5, -0.1), (5, 1.1), (5, math.nan), (5, math.inf)],
)
def test_impossible_steps_and_eta_are_refused(script, steps, eta):
    diffusion = script.Diffusion(schedule("cosine", 21)[0])
    with pytest.raises(ValueError, match=f"^{steps} steps, eta {eta}: .*T = 21 and 0 to 1"):
        next(diffusion.ddim_sample_loop(lambda xt, t: xt, torch.zeros(1, 2), steps, eta))


def test_samplers_build_no_graph_and_leave_the_callers_alone(script):
    diffusion = script.Diffusion(schedule("cosine", 21)[0])
    net = torch.nn.Linear(2, 2)
    loops = [diffusion.ddim_sample_loop(lambda xt, t: net(xt), torch.randn(2, 2), 5, 1.0)]
    if script is ddpm_2d:
        loops.append(diffusion.p_sample_loop(lambda xt, t: net(xt), torch.randn(2, 2)))
    for loop in loops:
        for xt in loop:
            assert not xt.requires_grad and net(xt).requires_grad


def test_every_method_runs_where_cpu_tensors_are_refused(script):
    beta, _ = schedule("cosine", 21)
    with pretend_device() as device:
        diffusion = script.Diffusion(beta).to(device)
        results = []
        for shape in SHAPES:
            x0 = torch.randn(4, *shape, device=device)
            results += [diffusion.p_losses(lambda xt, t: diffusion.q_sample(xt, t, xt), x0)]
            results += list(diffusion.ddim_sample_loop(lambda xt, t: xt, x0, 5, 1.0))
            if script is ddpm_2d:
                results += list(diffusion.p_sample_loop(lambda xt, t: xt, x0))
                terms, error = diffusion.variational_bound(lambda xt, t: xt, x0)
                assert terms.isfinite().all() and error.isfinite().all()
        assert all(x.device.type == device and x.isfinite().all() for x in results)


# ------------------------------------------------------------------------- the bound (2-D only)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_terms_of_the_bound_are_divergences_of_gaussians(name, shape):
    """Each against torch.distributions, at the x_t the model saw, with Bayes' rule in float64."""
    T, seen = 40, {}
    beta, a = schedule(name, T)
    x0 = randn(6, *shape, seed=13)
    model = lambda xt, t: torch.sin(seen.setdefault(t[0].item(), xt)) + 0.1
    terms, error = ddpm_2d.Diffusion(beta).variational_bound(model, x0)
    total = lambda x: x.reshape(6, -1).sum(1).mean().item()
    want = {T: kl_divergence(Normal(a[T].sqrt() * x0, (1 - a[T]).sqrt()), Normal(0.0, 1.0))}
    for t in range(1, T + 1):
        xt = seen[t]
        eps = (xt - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
        square = (eps - torch.sin(xt) - 0.1) ** 2
        assert error[t - 1].item() == pytest.approx(total(square), rel=1e-4)
        mu = (xt - beta[t] / (1 - a[t]).sqrt() * (torch.sin(xt) + 0.1)) / (1 - beta[t]).sqrt()
        if t == 1:
            want[0] = -Normal(mu, beta[1].sqrt()).log_prob(x0)
        else:
            precision = (1 - beta[t]) / beta[t] + 1 / (1 - a[t - 1])
            mean = (1 - beta[t]).sqrt() / beta[t] * xt + a[t - 1].sqrt() / (1 - a[t - 1]) * x0
            sd = precision.rsqrt()
            want[t - 1] = kl_divergence(Normal(mean / precision, sd), Normal(mu, sd))
    assert terms.shape == (T + 1,) and error.shape == (T,)
    for t, kl in want.items():
        assert terms[t].item() == pytest.approx(total(kl), rel=1e-4, abs=1e-7), t


@pytest.mark.parametrize(
    ("gain", "s", "gap"), [(0.0, 0.5, 3), (0.7, 0.5, 2), (1.0, 0.5, 1.4), (1.0, 0.001, 0.001)]
)
def test_errors_and_bound_of_a_linear_model_are_those_of_closed_form(gain, s, gap):
    """Data N(0, s^2) and eps_theta = c_t x_t. The errors are known, and so is p_theta(x_0), as a
    chain of affine Gaussian steps is Gaussian: the sum of the terms lies above -log p_theta, and
    upon it if s -> 0, where beta-tilde is optimal."""
    T, n = 100, 20_000
    beta, a = schedule("linear", T)
    c = gain * (1 - a).sqrt() / (a * s**2 + 1 - a)
    x0 = s * randn(n, 1, seed=3)
    model = lambda xt, t: c[t][:, None] * xt
    terms, error = ddpm_2d.Diffusion(beta).variational_bound(model, x0)
    want = (1 - c * (1 - a).sqrt()) ** 2 + c**2 * a * s**2
    assert ((error - want[1:]).abs() < 6 * want[1:] * math.sqrt(2 / n)).all()
    var = 1.0
    for t in range(T, 0, -1):
        sigma2 = beta[t] * (1 - a[t - 1]) / (1 - a[t]) if t > 1 else beta[1]
        var = (1 - beta[t] * c[t] / (1 - a[t]).sqrt()) ** 2 / (1 - beta[t]) * var + sigma2
    nll = -Normal(0.0, var.sqrt()).log_prob(x0).mean()
    assert 0 < terms.sum() - nll < gap


def test_weight_and_last_term_have_their_golden_values():
    """Eq. (12) at t = 2 with beta-tilde; L_T is 2.91e-5 bits a dimension for unit variance."""
    diffusion = ddpm_2d.Diffusion(schedule("linear", 1000)[0])
    terms, error = diffusion.variational_bound(lambda xt, t: xt, torch.tensor([[1.0, -1.0]]))
    assert (terms[1] / error[1]).item() == pytest.approx(0.599672, rel=1e-5)
    assert terms[-1].item() / 2 / math.log(2) == pytest.approx(2.91e-5, rel=0.01)


def test_bound_of_a_single_point_is_its_two_ends():
    """The model knows x_0: all errors vanish, L_0 is a Gaussian of variance beta_1 at its mean."""
    beta, a = schedule("linear", 100)
    diffusion = ddpm_2d.Diffusion(beta)
    terms, error = diffusion.variational_bound(gaussian_eps(a, 1.0, 0.0), torch.ones(9, 2))
    assert error.max() < 1e-5 and terms[1:-1].max() < 1e-5
    assert terms[0].item() == pytest.approx(math.log(2 * math.pi * beta[1]), abs=1e-4)


def test_two_models_are_judged_on_the_same_noise():
    seen = []
    diffusion, x0 = ddpm_2d.Diffusion(schedule("cosine", 30)[0]), randn(5, 2)
    for world, seed in ((0, 0), (1, 0), (2, 7)):
        torch.manual_seed(world)
        model = lambda xt, t: seen.append(xt) or world * xt
        diffusion.variational_bound(model, x0, **({"seed": seed} if seed else {}))
    first, second, other = torch.stack(seen).view(3, 30, 5, 2)
    assert torch.equal(first, second) and not torch.isclose(first, other).any()
    noise = torch.stack(list(first)) - diffusion.signal[1:, None, None] * x0
    assert noise.unique().numel() == 300  # fresh for every point and every t
