"""The maths of ddpm_swissroll_2015.py against independent oracles, then the script as it is run.

Statistical checks allow six standard errors: a false alarm has a chance below 1e-8 each, so below
1e-6 a run, were there no seed. Means and variances come from 200,000 draws: 2 % would show.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

SCRIPT = Path(__file__).resolve().parents[1] / "ddpm_swissroll_2015.py"
sys.path.insert(0, str(SCRIPT.parent))
import ddpm_swissroll_2015 as m  # noqa: E402

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rbf(T=40, beta1=1e-5, **kwargs):
    return m.DiffusionModel(m.RBFNetwork(), 16, 4, T, beta1, **kwargs)


def mlp(T=40, beta1=1e-5, **kwargs):
    return m.DiffusionModel(m.MLP(), 128, 5, T, beta1, **kwargs)


def shaken(model, scale=None, schedule=True):
    """The model with every parameter moved at random, so that nothing is zero by accident."""
    scale = scale or (0.3 if isinstance(model.net, m.RBFNetwork) else 0.02)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if schedule or name != "logit_beta":
                p.add_(scale * torch.randn_like(p))
    return model


# ---- the data


def test_the_roll_is_that_of_scikit_learn_standardised():
    angle = 1.5 * math.pi * (1 + 2 * torch.linspace(0, 1, 50).double())
    raw = torch.stack([angle * angle.cos(), angle * angle.sin()], 1)
    u = (torch.arange(100_000) + 0.5) / 100_000
    curve = m.roll_curve(u)
    assert curve.mean(0).abs().max() < 1e-6
    assert (curve.square().mean(0) - 1).abs().max() < 1e-6
    mine = m.roll_curve(torch.linspace(0, 1, 50).double())
    for axis in range(2):  # the same up to a shift and a scale per axis
        assert np.corrcoef(raw[:, axis], mine[:, axis])[0, 1] > 1 - 1e-12
    angles = 1.5 * math.pi * (1 + 2 * torch.linspace(0, 1, 50).double())
    assert torch.all(angles.diff() > 0)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_data_have_unit_second_moment_and_are_stratified(noise):
    x = m.make_swiss_roll(40_000, noise, torch.Generator().manual_seed(1))
    assert x.shape == (40_000, 2) and x.dtype == torch.float32
    assert (x.square().mean(0) - 1).abs().max() < 0.02 * (noise + 0.01)
    again = m.make_swiss_roll(40_000, noise, torch.Generator().manual_seed(1))
    assert torch.equal(x, again)
    if not noise:
        u = (torch.arange(40_000) + 0.5) / 40_000
        assert (x - m.roll_curve(u)).norm(dim=1).max() < 1e-3  # point i lies in the i-th stretch


@pytest.mark.parametrize("noise, beta1", [(0.0, 1e-5), (0.01, 1e-4), (0.1, 1e-3)])
def test_the_ceiling_is_minus_the_entropy_of_x1(noise, beta1):
    """Against a plain Monte Carlo of log q(x_1) under Gaussians at 5,000 points of the curve."""
    n, var = 1000, (1 - beta1) * noise**2 + beta1
    x1 = (1 - beta1) ** 0.5 * m.make_swiss_roll(n, noise).double()
    x1 = x1 + beta1**0.5 * torch.randn(n, 2).double()
    curve = m.roll_curve((torch.arange(5_000) + 0.5) / 5_000, noise) * (1 - beta1) ** 0.5
    log_q = torch.cat(
        [
            torch.logsumexp(
                Normal(curve, var**0.5).log_prob(part[:, None]).sum(-1) - math.log(5_000), 1
            )
            for part in x1.split(100)
        ]
    )
    error = log_q.std() / n**0.5
    assert abs(m.ceiling_bits(noise, beta1) - log_q.mean() / math.log(2)) < 4 * error / math.log(2)


def test_the_ceiling_has_the_known_values_and_rises_as_beta1_falls():
    values = [m.ceiling_bits(0, beta1) - m.L_NULL for beta1 in (1e-3, 1e-4, 1e-5)]
    assert values == pytest.approx([3.37, 5.03, 6.70], abs=0.01)


# ---- the schedule and the forward process


@few
@given(st.integers(2, 60), st.floats(1e-7, 0.1), seeds)
def test_schedule_is_a_schedule_whatever_was_learned(T, beta1, seed):
    torch.manual_seed(seed)
    model = shaken(rbf(T, beta1), 3)
    beta, alpha_bar, var = model.schedule().detach()
    assert len(beta) == len(alpha_bar) == len(var) == T + 1
    assert beta[0] == 0 and alpha_bar[0] == 1 and var[0] == 0
    assert beta[1] == pytest.approx(beta1, rel=1e-5) and var[1] == pytest.approx(beta1, rel=1e-5)
    assert torch.all((beta[1:] > 0) & (beta[1:] < 1))
    assert torch.all(alpha_bar.diff() <= 0) and torch.all(var.diff() >= 0)
    exact = torch.cumprod(1 - beta.double(), 0)
    assert torch.allclose(alpha_bar.double(), exact, rtol=1e-4, atol=1e-9)
    assert torch.allclose(var.double(), 1 - exact, rtol=1e-4)


def test_schedule_starts_with_equal_steps_of_the_signal_to_noise_ratio():
    _, alpha_bar, var = rbf().schedule().detach().double()
    step = (alpha_bar / var)[1:].log().diff()
    assert torch.allclose(step, step.mean().expand_as(step), rtol=1e-3)
    assert alpha_bar[-1] < var[-1] / 2  # x_T is more noise than signal, even before training


def test_one_minus_alpha_bar_is_not_a_float32_difference():
    var = rbf().schedule()[2].detach()
    assert var[1].item() == pytest.approx(1e-5, rel=1e-6)
    assert 1 - (1 - var[1]).item() != pytest.approx(1e-5, rel=1e-4)  # what the shortcut would give


def test_the_schedule_is_that_of_float64_rounded_once():
    model = shaken(rbf(T=1000, beta1=1e-6), 0.5)
    beta = torch.cat([torch.tensor([1e-6]), model.logit_beta.detach().double().sigmoid()])
    log_alpha_bar = torch.log1p(-beta.double()).cumsum(0)
    _, alpha_bar, var = model.schedule().detach().double()[:, 1:]
    assert torch.allclose(alpha_bar, log_alpha_bar.exp(), rtol=2e-7, atol=0)
    assert torch.allclose(var[1:], -log_alpha_bar[1:].expm1(), rtol=2e-7, atol=0)


def test_q_sample_equals_t_single_steps():
    model, n = rbf(T=6, beta1=0.05), 200_000
    s = model.schedule().detach()
    x0 = torch.tensor([1.3, -0.7]).expand(n, 2)
    x = x0
    for t in range(1, 7):
        x = (1 - s[0, t]).sqrt() * x + s[0, t].sqrt() * torch.randn(n, 2)
        direct = model.q_sample(x0, torch.tensor([t]), torch.randn(1, n, 2), s)[0]
        assert torch.allclose(x.mean(0), direct.mean(0), atol=6 / n**0.5)
        assert torch.allclose(x.var(0), direct.var(0), atol=8.5 / n**0.5)


@few
@given(st.integers(2, 40), st.floats(-2, 2), st.floats(-2, 2), seeds)
def test_posterior_is_bayes_on_a_grid(t, x0, xt, seed):
    torch.manual_seed(seed)
    model = shaken(rbf(beta1=1e-3)).double()
    s = model.schedule().detach()
    beta, alpha_bar, var = s.double()
    mean, variance = model.q_posterior(
        torch.tensor([[x0, 0.0]]).double(),
        torch.tensor([[[xt, 0.0]]]).double(),
        torch.tensor([t]),
        s,
    )
    mean, std = mean[0, 0, 0].item(), variance.item() ** 0.5
    grid = mean + std * torch.linspace(-9, 9, 4001).double()
    before = Normal(alpha_bar[t - 1].sqrt() * x0, var[t - 1].sqrt()).log_prob(grid)
    step = Normal((1 - beta[t]).sqrt() * grid, beta[t].sqrt()).log_prob(torch.tensor(xt).double())
    weight = torch.softmax(before + step, 0)
    assert (weight @ grid).item() == pytest.approx(mean, abs=1e-3 * std)
    assert (weight @ (grid - mean) ** 2).item() == pytest.approx(std**2, rel=1e-3)


# ---- the bound


@few
@given(seeds)
def test_kl_normal_is_that_of_torch_distributions_and_never_negative(seed):
    torch.manual_seed(seed)
    mu1, mu2 = 3 * torch.randn(2, 100).double()
    var1, var2 = torch.exp(3 * torch.randn(2, 100).double())
    mine = m.kl_normal(mu1, var1, mu2, var2)
    torchs = kl_divergence(Normal(mu1, var1.sqrt()), Normal(mu2, var2.sqrt()))
    assert torch.allclose(mine, torchs) and torch.all(mine >= 0)
    assert torch.all(m.kl_normal(mu1, var1, mu1, var1) == 0)


@pytest.mark.parametrize("make", [rbf, mlp])
@few
@given(T=st.integers(2, 50), beta1=st.floats(1e-6, 0.05), seed=seeds)
def test_zero_readout_is_the_forward_kernel_exactly(make, T, beta1, seed):
    torch.manual_seed(seed)
    model = make(T, beta1).double()
    with torch.no_grad():
        model.logit_beta.add_(torch.randn(T - 1))
    s, t = model.schedule().detach(), torch.arange(2, T + 1)
    x = 2 * torch.randn(T - 1, 50, 2).double()
    mu, var, c = model.reverse(x, t, s)
    beta = s[0, 2:, None, None]
    assert torch.allclose(mu, (1 - beta).sqrt() * x, atol=1e-9)
    assert torch.allclose(var, beta.expand_as(var)) and torch.all(c == 0)


@pytest.mark.parametrize("make", [rbf, mlp])
@few
@given(T=st.integers(2, 40), beta1=st.floats(1e-6, 0.05), seed=seeds)
def test_bound_of_the_forward_kernel_is_L_null_for_any_data_of_unit_second_moment(
    make, T, beta1, seed
):
    """Detailed balance. Noise +-sqrt(2) e_i integrates the quadratic KL terms without an error."""
    torch.manual_seed(seed)
    model = make(T, beta1).double()
    with torch.no_grad():
        model.logit_beta.add_(torch.randn(T - 1))
    x0 = torch.randn(7, 2).double() ** 3
    x0 = x0 / x0.square().mean(0).sqrt()
    points = 2**0.5 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).double()
    eps = points.repeat(7, 1).expand(T - 1, 28, 2)
    K, kl = model.bound(x0.repeat_interleave(4, 0), eps)
    assert K.mean().item() == pytest.approx(m.L_NULL, abs=1e-7)
    assert kl.shape == (T - 1, 28) and torch.all(kl > 0)


def test_telescoping_identity_of_the_forward_kernel():
    """sum_{t=2..T} E[KL_t] = H_q(X_T | X_0) - H_q(X_1 | X_0), term by term."""
    model = rbf().double()
    beta, _, var = model.schedule().detach()
    points = 2**0.5 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).double()
    x0 = torch.tensor([[1.0, 1.0]]).double().repeat(4, 1)
    kl = model.bound(x0, points.expand(39, 4, 2))[1].mean(1) / m.BITS
    steps = (var[2:] / var[1:-1]).log()  # two axes, half a log each
    assert torch.allclose(kl, steps, atol=1e-9)


def test_L_null_is_minus_the_entropy_of_a_standard_normal_in_bits():
    normal = MultivariateNormal(torch.zeros(2), torch.eye(2))
    assert -normal.entropy().item() / math.log(2) == pytest.approx(m.L_NULL, abs=1e-6)


@pytest.mark.parametrize("make", [rbf, mlp])
def test_kl_terms_are_those_of_torch_distributions(make):
    """Also for a correlated f_Sigma, the matrix [[v1, c v1], [c v1, v2 + c^2 v1]]."""
    model = shaken(make(T=5, beta1=1e-2)).double()
    s, t, x0 = model.schedule().detach(), torch.arange(2, 6), torch.randn(20, 2).double()
    eps = torch.randn(4, 20, 2).double()
    xt = model.q_sample(x0, t, eps, s)
    mean, var_q = model.q_posterior(x0, xt, t, s)
    mu, var, c = model.reverse(xt, t, s)
    v1, v2 = var.unbind(-1)
    rows = torch.stack([v1, c * v1]), torch.stack([c * v1, v2 + c**2 * v1])
    sigma = torch.stack(rows).permute(2, 3, 0, 1)
    q = MultivariateNormal(mean, var_q[..., None] * torch.eye(2).double())
    exact = kl_divergence(q, MultivariateNormal(mu, sigma))
    assert torch.allclose(model.bound(x0, eps)[1] / m.BITS, exact, rtol=1e-6)
    if make is mlp:
        assert c.abs().max() > 0.01


def test_bound_is_eq_14_written_out():
    model = shaken(mlp(T=5, beta1=1e-2)).double()
    _, _, var = model.schedule().detach()
    x0, eps = torch.randn(9, 2).double(), torch.randn(4, 9, 2).double()
    K, kl = model.bound(x0, eps)

    def entropy(v):
        return MultivariateNormal(torch.zeros(2).double(), v * torch.eye(2).double()).entropy()

    nats = (
        -kl.sum(0) * math.log(2) + entropy(var[-1]) - entropy(var[1]) - entropy(torch.tensor(1.0))
    )
    assert torch.allclose(K * math.log(2), nats)


@few
@given(st.integers(2, 40), st.floats(1e-5, 0.05), seeds)
def test_entropy_bounds_of_eq_24(T, beta1, seed):
    """beta-tilde_t and beta_t enclose f_Sigma's optimum: H + H - H <= H_q(X_{t-1} | X_t) <= H."""
    torch.manual_seed(seed)
    model = shaken(rbf(T, beta1)).double()
    s, t = model.schedule().detach(), torch.arange(2, T + 1)
    beta, _, var = s
    half_log = (2 * math.pi * math.e * torch.stack([beta, var])).log() / 2
    lower = half_log[0, 2:] + half_log[1, 1:-1] - half_log[1, 2:]
    _, tilde = model.q_posterior(torch.zeros(1, 2), torch.zeros(T - 1, 1, 2), t, s)
    assert torch.allclose((2 * math.pi * math.e * tilde.flatten()).log() / 2, lower)
    assert torch.all(lower < half_log[0, 2:])
    for power in (0.5, 0.9):  # Gaussian data of that standard deviation: H_q is known
        marginal = power**2 * s[1] + var
        exact = (2 * math.pi * math.e * beta[2:] * marginal[1:-1] / marginal[2:]).log() / 2
        assert torch.all((lower <= exact) & (exact <= half_log[0, 2:]))


def ideal_kl(model, n=400):
    """Brute force: mean KL [bits] of the best Gaussian reverse step there is, for every t, with a
    full covariance and with a diagonal one, [T - 1, 2].

    Given x_t it matches the mean and covariance of q(x_{t-1} | x_t), weighing 8,000
    points of the curve. No network can do better with this schedule.
    """
    s = model.schedule().detach().double()
    curve = m.roll_curve((torch.arange(8000) + 0.5) / 8000)
    terms = []
    for t in range(2, model.T + 1):
        x0 = m.make_swiss_roll(n).double()
        xt = s[1, t].sqrt() * x0 + s[2, t].sqrt() * torch.randn(n, 2).double()
        w = torch.softmax(-torch.cdist(xt, s[1, t].sqrt() * curve).square() / (2 * s[2, t]), 1)
        mean = w @ curve
        square = (w @ (curve[:, :, None] * curve[:, None, :]).flatten(1)).view(n, 2, 2)
        cov = square - mean[:, :, None] * mean[:, None, :]
        tilde = s[0, t] * s[2, t - 1] / s[2, t]
        gain = s[1, t - 1].sqrt() * s[0, t] / s[2, t]
        sigma = tilde * torch.eye(2).double() + gain**2 * cov
        logdet = torch.stack([sigma.logdet(), sigma.diagonal(dim1=1, dim2=2).log().sum(1)], 1)
        terms.append((logdet - 2 * tilde.log()).mean(0) / 2 * m.BITS)
    return torch.stack(terms)


def test_forty_diagonal_steps_of_the_first_schedule_miss_the_bits_of_the_paper_full_ones_do_not():
    """At the schedule that training starts from; learning it gains little for either of them."""
    model = rbf()
    torch.manual_seed(1)
    full, diagonal = ideal_kl(model).sum(0)
    _, _, var = model.schedule().detach()
    entropies = (var[-1] / var[1]).log().item() * m.BITS  # K - L_null without the KL terms
    assert entropies - diagonal < 6.45 < entropies - full < 6.70


@few
@given(seeds, st.floats(0.001, 0.05))
def test_K_never_exceeds_its_ceiling(seed, scale):
    torch.manual_seed(seed)
    model = shaken(mlp(T=10, beta1=1e-3), scale, schedule=False)
    K = model.bound(m.make_swiss_roll(2000), torch.randn(9, 2000, 2))[0].detach()
    assert K.mean() - 4 * K.std() / 2000**0.5 < CEILING


CEILING = m.ceiling_bits(0.0, 1e-3)


def test_gradients_reach_beta_2_to_T_but_not_beta_1():
    model = shaken(mlp())
    model.bound(m.make_swiss_roll(64), torch.randn(39, 64, 2))[0].mean().backward()
    assert model.logit_beta.shape == (39,) and torch.all(model.logit_beta.grad != 0)
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, name
    before = model.schedule()[0].detach().clone()
    with torch.no_grad():
        model.logit_beta.add_(1)
    after = model.schedule()[0].detach()
    assert after[1] == before[1] and torch.all(after[2:] > before[2:])


def test_the_gradient_of_the_schedule_is_the_slope_of_K():
    """Central difference with the same frozen noise (Sec. 2.4.1)."""
    model = shaken(mlp(T=6, beta1=1e-2)).double()
    x0, eps = torch.randn(30, 2).double(), torch.randn(5, 30, 2).double()
    model.bound(x0, eps)[0].mean().backward()
    for i in (0, 2, 4):
        K = []
        for shift in (1e-5, -2e-5):
            with torch.no_grad():
                model.logit_beta[i] += shift
                K.append(model.bound(x0, eps)[0].mean().item())
        assert model.logit_beta.grad[i].item() == pytest.approx((K[0] - K[1]) / 2e-5, rel=1e-4)
        with torch.no_grad():
            model.logit_beta[i] += 1e-5


def test_a_fixed_schedule_stays():
    model = rbf(learn_schedule=False)
    assert not model.logit_beta.requires_grad


# ---- the networks


def test_rbf_network_is_the_normalised_one_of_the_paper():
    net = shaken(rbf()).net
    x = torch.randn(3, 5, 2)
    h = net(x)
    bump = torch.exp(
        -(x[..., None, :] - net.center).square().sum(-1) / (2 * net.log_width.exp() ** 2)
    )
    assert h.shape == (3, 5, 16)
    assert torch.allclose(h, bump / bump.sum(-1, keepdim=True), atol=1e-5)
    parameters = sum(p.numel() for p in rbf().parameters())
    assert parameters == 39 * 16 * 4 + 16 * 3 + 39


@pytest.mark.parametrize("make", [rbf, mlp])
def test_each_step_has_its_own_readout_and_each_point_its_own_result(make):
    model = shaken(make())
    s, x = model.schedule().detach(), torch.randn(1, 4, 2)
    t = torch.tensor([7])
    mu, var, c = model.reverse(x, t, s)
    assert not torch.allclose(mu, model.reverse(x, t + 1, s)[0])
    moved = x.clone()
    moved[0, 2] += 1
    changed = (model.reverse(moved, t, s)[0] != mu).any(-1)[0]
    assert changed.tolist() == [False, False, True, False]
    assert torch.all((var > 0) & (var < 1)) and (c.abs().max() > 0) == (make is mlp)
    with torch.no_grad():
        model.readout[7 - 2] += 1  # t = 7 has the sixth readout, for t starts at 2
    assert not torch.allclose(mu, model.reverse(x, t, s)[0])
    assert torch.equal(model.reverse(x, t + 1, s)[0], model.reverse(x, t + 1, s)[0])


# ---- sampling


def test_the_sampler_takes_every_step_once_and_the_last_one_is_the_forward_kernel():
    model, visited = shaken(rbf(T=12, beta1=0.3)), []
    reverse = model.reverse
    model.reverse = lambda x, t, s: visited.append(t.item()) or reverse(x, t, s)
    states = list(model.sample(200_000, torch.Generator().manual_seed(0)))
    assert visited == list(range(12, 1, -1)) and len(states) == 13
    assert all(x.shape == (200_000, 2) and x.isfinite().all() for x in states)
    noise = states[-1] - (1 - 0.3) ** 0.5 * states[-2]
    assert noise.var(0).tolist() == pytest.approx([0.3, 0.3], rel=0.02)
    again = list(model.sample(200_000, torch.Generator().manual_seed(0)))
    assert torch.equal(states[-1], again[-1])


def test_samples_of_the_forward_kernel_are_standard_normal():
    x = list(rbf(beta1=1e-3).sample(200_000))[-1]
    assert x.mean(0).abs().max() < 0.0135 and (x.T.cov() - torch.eye(2)).abs().max() < 0.02


def test_one_step_of_the_sampler_has_the_moments_of_reverse():
    """For a correlated f_Sigma, where the noise of the second axis must follow the first."""
    model = mlp(T=2, beta1=1e-3)
    with torch.no_grad():
        model.readout.zero_()
        h = model.net(torch.zeros(1, 1, 2))[0, 0]
        model.net.forward = lambda x: h.expand(*x.shape[:-1], 128)
        model.readout[0, :, 4] = 1.5 * h / h.square().sum()  # c = 1.5 everywhere
        model.readout[0, :, 2] = -h / h.square().sum()
    g = torch.Generator().manual_seed(0)
    states = list(model.sample(200_000, g))
    s, t = model.schedule().detach(), torch.tensor([2])
    mu, var, c = model.reverse(states[0][None], t, s)
    v1, v2, c = var[0, 0, 0].item(), var[0, 0, 1].item(), c[0, 0].item()
    cov = (states[1] - mu[0]).T.cov()
    assert c == pytest.approx(1.5, rel=1e-4)
    assert cov[0, 0].item() == pytest.approx(v1, rel=0.02)
    assert cov[0, 1].item() == pytest.approx(c * v1, rel=0.02)
    assert cov[1, 1].item() == pytest.approx(v2 + c**2 * v1, rel=0.02)


# ---- the script


# no flag but the budget
PROGRAMS = {"run": ["-W", "error::UserWarning", SCRIPT, "--steps", "200", "--device", "cpu"]}


@pytest.fixture(scope="session")
def run(program):
    folder, done = program(sys.modules[__name__], "run")
    return folder / "runs" / "ddpm_swissroll_2015", done


def test_a_short_training_raises_K_by_a_bit_and_a_half_and_stays_below_the_ceiling(run):
    metrics = json.loads((run[0] / "metrics.json").read_text())
    assert 1.5 < metrics["K_minus_null_bits"] < metrics["ceiling_minus_null_bits"]
    assert metrics["K_bits"] - metrics["K_minus_null_bits"] == pytest.approx(m.L_NULL)
    assert metrics["ceiling_minus_null_bits"] == pytest.approx(6.695, abs=0.002)
    gap = metrics["ceiling_minus_null_bits"] - metrics["K_minus_null_bits"]
    assert metrics["gap_bits"] == pytest.approx(gap) and metrics["loss"] == -metrics["K_bits"]
    assert 0.003 < metrics["K_error_bits"] < 0.03  # of 65,536 points
    curve = m.roll_curve(torch.linspace(0, 1, 3000, dtype=torch.float64), 0.0)
    samples = torch.from_numpy(np.load(run[0] / "samples.npy")).double()
    far = (torch.cdist(samples, curve).amin(1) > 0.1).double().mean().item()
    assert metrics["off_curve"] == pytest.approx(far, abs=0.01)


def test_the_run_leaves_all_its_files(run):
    out, result = run
    names = {p.name for p in out.iterdir()}
    figures = {"diffusion_process.png", "results.png", "training.png", "sampling.gif"}
    assert names == figures | {"model.pt", "metrics.json", "log.csv", "samples.npy"}
    samples = np.load(out / "samples.npy")
    assert samples.dtype == np.float32 and samples.ndim == 2 and samples.shape[1] == 2
    log = np.loadtxt(out / "log.csv", delimiter=",", skiprows=1)
    assert (out / "log.csv").read_text().startswith("step,loss,lr,seconds\n")
    assert log[-1, 0] == 200 and log[:50, 1].mean() - log[-50:, 1].mean() > 1
    metrics = json.loads((out / "metrics.json").read_text())
    keys = "script seed device steps parameters train_seconds sample_seconds loss K_bits"
    assert set(keys.split()) <= set(metrics) and metrics["script"] == "ddpm_swissroll_2015"
    assert "K_minus_null_bits" in result.stdout and "runs/ddpm_swissroll_2015" in result.stdout


def test_load_gives_the_numbers_of_the_run_that_saved_it(run, tmp_path):
    metrics = json.loads((run[0] / "metrics.json").read_text())
    loaded = m.main(["--load", str(run[0] / "model.pt"), "--out", str(tmp_path)])
    assert loaded["K_bits"] == pytest.approx(metrics["K_bits"], abs=1e-4)
    assert loaded["train_seconds"] == 0
    assert np.allclose(
        np.load(tmp_path / "samples.npy"), np.load(run[0] / "samples.npy"), atol=1e-3
    )


def test_same_seed_same_numbers_and_mlp_and_noise_and_fixed_schedule_run(tmp_path):
    flags = ["--net", "mlp", "--noise", "0.1", "--fixed-schedule", "--T", "5", "--steps", "3"]
    runs = [m.main([*flags, "--seed", seed, "--out", str(tmp_path)]) for seed in ("1", "1")]
    assert runs[0]["K_bits"] == runs[1]["K_bits"]
    other = ["--T", "5", "--steps", "3", "--beta1", "1e-3", "--out", str(tmp_path), "--seed"]
    weights = []
    for seed in ("1", "2"):
        m.main([*other, seed])
        weights.append(torch.load(tmp_path / "model.pt", weights_only=True)["model"]["readout"])
    assert not torch.equal(*weights)  # the network of the paper starts alike for every seed
    assert runs[0]["parameters"] == 66 * 128 + 2 * 128 * 128 + 3 * 128 + 4 * 128 * 5 + 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "--steps 0: choose 1 to"),
        (["--batch-size", "-1"], "--batch-size -1: choose 1 to"),
        (["--T", "1"], "--T 1: choose 2 to 1000"),
        (["--T", "forty"], "--T: invalid int value: 'forty'"),
        (["--lr", "nan"], "--lr nan: choose"),
        (["--lr", "0"], "--lr 0.0: choose"),
        (["--beta1", "1"], "--beta1 1.0: choose 1e-07 to 0.01"),
        (["--noise", "-0.1"], "--noise -0.1: choose 0 to 0.1"),
        (["--seed", "-1"], "--seed -1: choose 0 to"),
        (["--net", "unet"], "--net: invalid choice: 'unet' (choose from"),
        (["--device", "toaster"], "--device toaster: "),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--load", "absent.pt"], "--load absent.pt: "),
        (["--load", "text.pt"], "--load text.pt: "),
        (["--load", "short.pt"], "--load short.pt: "),
        (["--load", "other.pt"], "--load other.pt: "),
        (["--load", "good.pt", "--net", "mlp"], "--load good.pt: it was made with {'net': 'rbf'"),
        (["--load", "good.pt", "--beta1", "1e-4"], "give the same flags"),
        (["--out", "text.pt"], "--out text.pt: "),
        (["--out", "text.pt/below"], "--out text.pt/below: "),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(
    flags, message, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    good = (run[0] / "model.pt").read_bytes()
    Path("good.pt").write_bytes(good)
    Path("short.pt").write_bytes(good[: len(good) // 2])
    Path("text.pt").write_text("not a checkpoint")
    torch.save({"model": {}}, "other.pt")
    with pytest.raises(SystemExit) as stop:
        m.main([*flags, *([] if "--out" in flags else ["--out", "new"])])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not Path("new/metrics.json").exists() and Path("text.pt").read_text().startswith("not")


def test_a_device_that_is_not_there(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(SystemExit):
        m.main(["--device", "cuda", "--out", str(tmp_path)])
    assert "--device cuda: " in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_advice_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    m.main(["--steps", "2", "--T", "5", "--beta1", "1e-3", "--out", str(tmp_path)])
    before = (tmp_path / "model.pt").read_bytes()
    bound, calls = m.DiffusionModel.bound, []

    def broken(self, x0, eps):
        calls.append(1)
        K, kl = bound(self, x0, eps)
        return (K * math.nan if len(calls) == 3 else K), kl

    monkeypatch.setattr(m.DiffusionModel, "bound", broken)
    with pytest.raises(SystemExit) as stop:
        m.main(["--steps", "9", "--T", "5", "--beta1", "1e-3", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "--lr 0.04: loss is nan at step 3; use a lower one" in capsys.readouterr().err
    assert (tmp_path / "model.pt").read_bytes() == before


def test_ctrl_c_keeps_what_was_trained_and_still_draws(tmp_path, ctrl_c, capsys):
    ctrl_c(m.DiffusionModel, "bound", 8)
    flags = ["--steps", "200", "--T", "5", "--beta1", "1e-3", "--out", str(tmp_path)]
    metrics = m.main(flags)
    assert metrics["steps"] == 7 and "stopped after step 7" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 7
    assert (tmp_path / "sampling.gif").exists() and (tmp_path / "model.pt").exists()


def test_files_are_replaced_not_rewritten(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def killed(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        m.save(path, killed)
    assert path.read_text() == "old"
    m.save(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
