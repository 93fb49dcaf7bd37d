"""The maths of ddpm_swissroll_2015.py against independent oracles, then the script as it is run.

Statistical checks are seeded and allow six standard errors: a correct script fails one of them with
a chance below 1e-8, were there no seed. Means and variances are of 30,000 draws: 5 % would show.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import ddpm_swissroll_2015 as m
from tests.pretend_device import pretend_device

few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31)
both = pytest.mark.parametrize("full", [False, True], ids=["rbf", "mlp"])
N = 30_000


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(full=False, T=40, beta1=1e-5, **more):
    """The model of --net rbf, or of --net mlp if full."""
    return m.DiffusionModel(m.MLP() if full else m.RBFNetwork(), full, T, beta1, **more)


def shaken(model, scale=None):
    """The model with every parameter moved at random, so that nothing is zero by accident."""
    scale = scale or (0.02 if model.full else 0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def flat(s):
    """beta, alpha_bar and var of a schedule, each [T + 1]."""
    return (tensor.detach().flatten() for tensor in s)


def cubature(n, steps):
    """Noise +-sqrt(2) e_i: four points that integrate any quadratic function without an error."""
    points = 2**0.5 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).double()
    return points.repeat(n, 1).expand(steps, 4 * n, 2)


def test_the_roll_is_that_of_scikit_learn_standardised():
    u = torch.linspace(0, 1, 50).double()
    angle = 1.5 * math.pi * (1 + 2 * u)  # as in sklearn.datasets.make_swiss_roll
    raw = torch.stack([angle * angle.cos(), angle * angle.sin()], 1)
    for mine, theirs in zip(m.roll_curve(u).T, raw.T):  # up to a shift and a positive scale
        assert np.corrcoef(mine, theirs)[0, 1] > 1 - 1e-10
    curve = m.roll_curve((torch.arange(100_000) + 0.5) / 100_000)
    assert curve.mean(0).abs().max() < 1e-5
    assert (curve.square().mean(0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_data_have_second_moment_1_and_are_spread_evenly(noise):
    x0 = m.make_swiss_roll(40_000, noise)
    assert x0.shape == (40_000, 2) and x0.dtype == torch.float32
    assert (x0.square().mean(0) - 1).abs().max() < 0.06 * noise + 0.0002
    distance = (x0 - m.roll_curve((torch.arange(40_000) + 0.5) / 40_000, noise)).square().mean()
    assert distance.sqrt() == pytest.approx(noise, rel=0.02, abs=1e-3)  # each in its own n-th


@pytest.mark.parametrize("noise, beta1", [(0.0, 1e-5), (0.01, 1e-4), (0.1, 1e-3)])
def test_the_ceiling_is_minus_the_entropy_of_x1(noise, beta1):
    """Against a plain Monte Carlo of log q(x_1) under Gaussians at 5,000 points of the curve."""
    n = 500
    var = (1 - beta1) * noise**2 + beta1
    x1 = (1 - beta1) ** 0.5 * m.make_swiss_roll(n, noise) + beta1**0.5 * torch.randn(n, 2)
    curve = m.roll_curve((torch.arange(5000) + 0.5) / 5000, noise) * (1 - beta1) ** 0.5
    log_q = Normal(curve.double(), var**0.5).log_prob(x1[:, None].double()).sum(-1)
    log_q = (log_q.logsumexp(1) - math.log(5000)) / math.log(2)
    assert abs(m.ceiling_bits(noise, beta1) - log_q.mean()) < 6 * log_q.std() / n**0.5
    values = [m.ceiling_bits(0, beta1) - m.L_NULL for beta1 in (1e-3, 1e-4, 1e-5)]
    assert values == pytest.approx([3.372, 5.034, 6.695], abs=0.002)  # by hand


@few
@given(st.integers(2, 60), st.floats(1e-7, 0.1), seeds)
def test_the_schedule_is_one_whatever_was_learned(T, beta1, seed):
    torch.manual_seed(seed)
    s = shaken(build(False, T, beta1), 3).schedule()
    assert all(tensor.shape == (T + 1, 1, 1) for tensor in s)
    beta, alpha_bar, var = flat(s)
    assert beta[0] == 0 and alpha_bar[0] == 1 and var[0] == 0
    assert beta[1] == pytest.approx(beta1, rel=1e-6) and var[1] == pytest.approx(beta1, rel=1e-6)
    assert torch.all((beta[1:] > 0) & (beta[1:] < 1))
    assert torch.all(alpha_bar.diff() <= 0) and torch.all(var.diff() >= 0)


def test_the_schedule_starts_with_equal_steps_of_the_signal_to_noise_ratio():
    _, alpha_bar, var = flat(build().schedule())
    step = (alpha_bar / var)[1:].double().log().diff()
    assert torch.allclose(step, step.mean(), rtol=1e-3)
    assert alpha_bar[-1] < var[-1] / 2  # x_T is more noise than signal, even before training


def test_the_schedule_is_that_of_exact_arithmetic_rounded_once():
    model = shaken(build(False, 1000, 1e-6), 0.5)
    beta = torch.cat([torch.tensor([1e-6]), model.logit_beta.detach().double().sigmoid()])
    log_alpha_bar = torch.log1p(-beta.double()).cumsum(0)
    _, alpha_bar, var = (tensor[1:].double() for tensor in flat(model.schedule()))
    assert torch.allclose(alpha_bar, log_alpha_bar.exp(), rtol=2e-7, atol=0)
    assert torch.allclose(var, -log_alpha_bar.expm1(), rtol=2e-7, atol=0)


def test_q_sample_equals_t_single_steps():
    model = build(False, 4, 0.05)
    s = model.schedule()
    beta, _, _ = flat(s)
    x0 = torch.tensor([1.3, -0.7]).expand(N, 2)
    xt = x0
    for t in range(1, 5):
        xt = (1 - beta[t]).sqrt() * xt + beta[t].sqrt() * torch.randn(N, 2)
        direct = model.q_sample(x0, t, torch.randn(N, 2), s).detach()
        assert torch.allclose(xt.mean(0), direct.mean(0), atol=6 * (2 / N) ** 0.5)
        assert torch.allclose(xt.var(0), direct.var(0), atol=6 * (4 / N) ** 0.5)


@few
@given(st.integers(2, 40), st.floats(-2, 2), st.floats(-2, 2), seeds)
def test_the_posterior_is_bayes_rule_on_a_grid(t, x0, xt, seed):
    torch.manual_seed(seed)
    model = shaken(build(beta1=1e-3)).double()
    s = model.schedule()
    beta, alpha_bar, var = flat(s)
    mean, variance = model.q_posterior(torch.tensor([[x0, 9.0]]), torch.tensor([[xt, 9.0]]), t, s)
    mean, std = mean[0, 0].item(), variance.item() ** 0.5
    grid = mean + std * torch.linspace(-9, 9, 4001).double()
    before = Normal(alpha_bar[t - 1].sqrt() * x0, var[t - 1].sqrt()).log_prob(grid)
    step = Normal((1 - beta[t]).sqrt() * grid, beta[t].sqrt()).log_prob(torch.tensor(xt).double())
    weight = torch.softmax(before + step, 0)
    assert (weight @ grid).item() == pytest.approx(mean, abs=1e-3 * std)
    assert (weight @ (grid - mean) ** 2).item() == pytest.approx(std**2, rel=1e-3)


@few
@given(seeds)
def test_kl_normal_is_that_of_torch_distributions_in_bits(seed):
    torch.manual_seed(seed)
    mean1, mean2 = 3 * torch.randn(2, 100).double()
    var1, var2 = torch.exp(3 * torch.randn(2, 100).double())
    mine = m.kl_normal(mean1, var1, mean2, var2)
    nats = kl_divergence(Normal(mean1, var1.sqrt()), Normal(mean2, var2.sqrt()))
    assert torch.allclose(mine, nats / math.log(2)) and torch.all(mine >= 0)
    assert torch.all(m.kl_normal(mean1, var1, mean1, var1) == 0)


@both
@few
@given(T=st.integers(2, 50), beta1=st.floats(1e-6, 0.05), seed=seeds)
def test_zero_readout_is_the_forward_kernel_exactly(full, T, beta1, seed):
    torch.manual_seed(seed)
    model = build(full, T, beta1).double()
    with torch.no_grad():
        model.logit_beta.add_(torch.randn(T - 1))
    s = model.schedule()
    xt = 2 * torch.randn(T - 1, 50, 2).double()
    mean, var, slope = model.reverse(xt, torch.arange(2, T + 1), s)
    assert torch.allclose(mean, (1 - s.beta[2:]).sqrt() * xt, atol=1e-9)
    assert torch.allclose(var, s.beta[2:].expand_as(var)) and torch.all(torch.as_tensor(slope) == 0)


@both
@few
@given(T=st.integers(2, 40), beta1=st.floats(1e-6, 0.05), seed=seeds)
def test_bound_of_the_forward_kernel_is_L_null_for_any_data_of_unit_second_moment(
    full, T, beta1, seed
):
    """Detailed balance. With cubature there is no sampling error, so this is exact."""
    torch.manual_seed(seed)
    model = build(full, T, beta1).double()
    with torch.no_grad():
        model.logit_beta.add_(torch.randn(T - 1))
    x0 = torch.randn(7, 2).double() ** 3
    x0 = x0 / x0.square().mean(0).sqrt()
    K, kl = model.bound(x0.repeat_interleave(4, 0), cubature(7, T - 1))
    assert K.mean().item() == pytest.approx(m.L_NULL, abs=1e-7)
    assert kl.shape == (T - 1, 28) and torch.all(kl > 0)
    K, _ = model.bound(x0.repeat(100, 1))  # with noise of its own: standard normal
    assert abs(K.mean() - m.L_NULL) < 6 * K.std() / 700**0.5


def test_telescoping_identity_of_the_forward_kernel():
    """sum_{t=2..T} E[KL_t] = H_q(X_T | X_0) - H_q(X_1 | X_0), term by term."""
    model = build().double()
    _, _, var = flat(model.schedule())
    _, kl = model.bound(torch.ones(4, 2).double(), cubature(1, 39))
    assert torch.allclose(kl.mean(1), (var[2:] / var[1:-1]).log2())  # two axes, half a log each


@both
def test_kl_terms_are_those_of_torch_distributions(full):
    """Also for a full f_Sigma, the matrix [[v1, c v1], [c v1, v2 + c^2 v1]] of slope c."""
    model = shaken(build(full, 5, 1e-2)).double()
    s, t = model.schedule(), torch.arange(2, 6)
    x0, eps = torch.randn(20, 2).double(), torch.randn(4, 20, 2).double()
    xt = model.q_sample(x0, t, eps, s)
    mean_q, var_q = model.q_posterior(x0, xt, t, s)
    mean_p, var_p, slope = model.reverse(xt, t, s)
    v1, v2 = var_p.unbind(-1)
    rows = [torch.stack([v1, slope * v1], -1), torch.stack([slope * v1, v2 + slope**2 * v1], -1)]
    q = MultivariateNormal(mean_q, var_q[..., None] * torch.eye(2).double())
    exact = kl_divergence(q, MultivariateNormal(mean_p, torch.stack(rows, -2)))
    assert torch.allclose(model.bound(x0, eps)[1], exact / math.log(2), rtol=1e-6)
    assert not full or slope.abs().max() > 0.01


@both
def test_bound_is_eq_14_written_out(full):
    model = shaken(build(full, 5, 1e-2)).double()
    _, _, var = flat(model.schedule())
    K, kl = model.bound(torch.randn(9, 2).double())
    end, start, prior = (
        MultivariateNormal(torch.zeros(2).double(), v * torch.eye(2).double()).entropy()
        for v in (var[-1], var[1], 1)
    )
    assert torch.allclose(K, -kl.sum(0) + (end - start - prior) / math.log(2))


@few
@given(st.integers(2, 40), st.floats(1e-5, 0.05), seeds)
def test_entropy_bounds_of_eq_24(T, beta1, seed):
    """beta-tilde_t and beta_t enclose f_Sigma's optimum: H + H - H <= H_q(X_{t-1} | X_t) <= H."""
    torch.manual_seed(seed)
    model = shaken(build(False, T, beta1)).double()
    s, t = model.schedule(), torch.arange(2, T + 1)
    beta, alpha_bar, var = flat(s)
    entropy_beta, entropy_var = ((2 * math.pi * math.e * v).log() / 2 for v in (beta, var))
    lower = entropy_beta[2:] + entropy_var[1:-1] - entropy_var[2:]
    _, tilde = model.q_posterior(torch.zeros(1, 2), torch.zeros(T - 1, 1, 2), t, s)
    assert torch.allclose((2 * math.pi * math.e * tilde.flatten()).log() / 2, lower)
    for power in (0.5, 0.9):  # Gaussian data of that standard deviation: H_q is known
        marginal = power**2 * alpha_bar + var
        exact = (2 * math.pi * math.e * beta[2:] * marginal[1:-1] / marginal[2:]).log() / 2
        assert torch.all((lower <= exact) & (exact <= entropy_beta[2:]))


def ideal_kl(model, n=300):
    """Brute force: mean KL [bits] of the best Gaussian reverse step there is, for every t, with a
    full covariance and with a diagonal one, [T - 1, 2].

    Given x_t it matches the mean and covariance of q(x_{t-1} | x_t), weighing 4,000 points of the
    curve. No network can do better with this schedule.
    """
    beta, alpha_bar, var = (tensor.double() for tensor in flat(model.schedule()))
    curve = m.roll_curve((torch.arange(4000) + 0.5) / 4000).double()
    terms = []
    for t in range(2, model.T + 1):
        x0 = m.make_swiss_roll(n)
        xt = alpha_bar[t].sqrt() * x0 + var[t].sqrt() * torch.randn(n, 2).double()
        square = torch.cdist(xt, alpha_bar[t].sqrt() * curve).square()
        w = torch.softmax(-square / (2 * var[t]), 1)
        mean = w @ curve
        second = (w @ (curve[:, :, None] * curve[:, None, :]).flatten(1)).view(n, 2, 2)
        cov = second - mean[:, :, None] * mean[:, None, :]
        tilde = beta[t] * var[t - 1] / var[t]
        gain = alpha_bar[t - 1].sqrt() * beta[t] / var[t]
        sigma = tilde * torch.eye(2).double() + gain**2 * cov
        logdet = torch.stack([sigma.logdet(), sigma.diagonal(dim1=1, dim2=2).log().sum(1)], 1)
        terms.append((logdet - 2 * tilde.log()).mean(0) / 2 / math.log(2))
    return torch.stack(terms)


def test_forty_diagonal_steps_of_the_first_schedule_miss_the_bits_of_the_paper_full_ones_do_not():
    """At the schedule that training starts from; learning it gains little for either of them."""
    model = build()
    full, diagonal = ideal_kl(model).sum(0)
    _, _, var = flat(model.schedule())
    entropies = (var[-1] / var[1]).log2().item()  # K - L_null without the KL terms
    assert entropies - diagonal < 6.45 < entropies - full < 6.70


@few
@given(seeds, st.floats(0.001, 0.05))
def test_K_never_exceeds_its_ceiling(seed, scale):
    torch.manual_seed(seed)
    K, _ = shaken(build(True, 10, 1e-3), scale).bound(m.make_swiss_roll(2000))
    assert K.mean() - 6 * K.std() / 2000**0.5 < m.ceiling_bits(0.0, 1e-3)


@both
def test_gradients_reach_all_parameters_and_beta_2_to_T_but_not_beta_1(full):
    model = shaken(build(full))
    model.bound(m.make_swiss_roll(64))[0].mean().backward()
    assert model.logit_beta.shape == (39,) and torch.all(model.logit_beta.grad != 0)
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    before = model.schedule().beta
    with torch.no_grad():
        model.logit_beta.add_(1)
    after = model.schedule().beta
    assert after[1] == before[1] and torch.all(after[2:] > before[2:])


def test_the_gradient_of_the_schedule_is_the_slope_of_K():
    """Central difference with the same frozen noise (Sec. 2.4.1)."""
    model = shaken(build(True, 6, 1e-2)).double()
    x0, eps = torch.randn(30, 2).double(), torch.randn(5, 30, 2).double()
    model.bound(x0, eps)[0].mean().backward()
    model.requires_grad_(False)
    for i in (0, 2, 4):
        model.logit_beta[i] += 1e-5
        above = model.bound(x0, eps)[0].mean().item()
        model.logit_beta[i] -= 2e-5
        below = model.bound(x0, eps)[0].mean().item()
        model.logit_beta[i] += 1e-5
        assert model.logit_beta.grad[i].item() == pytest.approx((above - below) / 2e-5, rel=1e-4)


def test_rbf_network_is_the_normalised_one_of_the_paper():
    model = shaken(build())
    net, x = model.net, torch.randn(3, 5, 2)
    distance = (x[..., None, :] - net.center).norm(dim=-1)
    bump = torch.exp(-(distance**2) / (2 * net.log_width.exp() ** 2))
    assert net(x).shape == (3, 5, 16)
    assert torch.allclose(net(x), bump / bump.sum(-1, keepdim=True), atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == 39 * 16 * 4 + 16 * 3 + 39


@both
def test_each_step_has_its_own_readout_and_each_point_its_own_result(full):
    """One point [1, 2] at one step t gives what it gives among all steps, [T - 1, B, 2]."""
    model = shaken(build(full, 8)).requires_grad_(False)
    s, t, xt = model.schedule(), torch.arange(2, 9), torch.randn(7, 4, 2)
    mean, var, slope = model.reverse(xt, t, s)
    assert torch.all((var > 0) & (var < 1)) and torch.is_tensor(slope) == full
    for k in range(7):
        alone = model.reverse(xt[k, 1:2], k + 2, s)
        assert torch.allclose(alone[0], mean[k, 1:2], atol=1e-6)
        assert torch.allclose(alone[1], var[k, 1:2], atol=1e-6)
        model.readout[k] += 1
        changed = (model.reverse(xt, t, s)[1] != var).flatten(1).any(1)
        assert changed.tolist() == [True] * (k + 1) + [False] * (6 - k)


@both
def test_each_step_of_the_sampler_has_the_law_of_reverse_and_the_last_of_the_forward_kernel(full):
    """Undone step by step, the samples must be standard normal noise, independent of x_t."""
    model = shaken(build(full, 6, 0.3), 0.1 if full else None).requires_grad_(False)
    s = model.schedule()
    states = list(model.p_sample_loop(N))
    assert len(states) == 7 and all(x.shape == (N, 2) and x.isfinite().all() for x in states)
    noises = [states[0]]
    for t in range(6, 1, -1):
        mean, var, slope = model.reverse(states[6 - t], t, s)
        x1, x2 = (states[7 - t] - mean).unbind(1)
        noises.append(torch.stack([x1, x2 - slope * x1], 1) / var.sqrt())
        assert not full or slope.abs().mean() > 0.1
    noises.append((states[6] - 0.7**0.5 * states[5]) / 0.3**0.5)
    z = torch.cat(noises, 1)
    assert z.mean(0).abs().max() < 6 / N**0.5
    assert (z.T.cov() - torch.eye(14)).abs().max() < 6 * (2 / N) ** 0.5


FILES = {"model.pt", "samples.npy", "metrics.json", "process.png", "training.png"}
TINY = ["--T", "5", "--beta1", "1e-3", "--steps", "2", "--samples", "50", "--device", "cpu"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """tiny(*flags): what main leaves in 2 steps without pictures: its metrics and its folder."""
    monkeypatch.setattr(m, "draw", lambda *args: None)

    def run(*flags, out=tmp_path / "run"):
        m.main([*TINY, "--out", str(out), *flags])
        return json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail), out

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with all defaults but the budget. No tensor may be handed to numpy or matplotlib."""
    out = tmp_path_factory.mktemp("run") / "made" / "for it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__array__", lambda *args, **more: pytest.fail("a tensor"))
        m.main(["--steps", "200", "--samples", "2000", "--device", "cpu", "--out", str(out)])
    return out, json.loads((out / "metrics.json").read_text())


def test_a_short_training_raises_K_and_stays_below_the_ceiling(run):
    out, metrics = run
    assert 1.5 < metrics["K_minus_null_bits"] < metrics["ceiling_minus_null_bits"]
    assert metrics["K_bits"] - metrics["K_minus_null_bits"] == pytest.approx(m.L_NULL)
    assert metrics["ceiling_minus_null_bits"] == pytest.approx(6.695, abs=0.002)
    gap = metrics["ceiling_minus_null_bits"] - metrics["K_minus_null_bits"]
    assert metrics["gap_bits"] == pytest.approx(gap)
    assert 0.003 < metrics["K_error_bits"] < 0.03  # of 65,536 points


def test_a_run_leaves_its_files_and_no_others_and_they_agree(run):
    out, metrics = run
    assert "pyplot" not in Path(m.__file__).read_text()  # so the user's figures stay as they are
    assert {path.name for path in out.iterdir()} == FILES
    samples = np.load(out / "samples.npy")
    assert samples.shape == (2000, 2) and samples.dtype == np.float32
    curve = m.roll_curve(torch.linspace(0, 1, 2000)).numpy()
    far = np.sqrt(((samples[:, None] - curve) ** 2).sum(-1)).min(1) > 0.1
    assert metrics["off_curve"] == pytest.approx(far.mean(), abs=0.002)
    saved = torch.load(out / "model.pt", weights_only=True)
    assert saved["flags"].items() <= metrics.items() and metrics["steps"] == 200
    model = build()
    model.load_state_dict(saved["model"])
    K, _ = model.requires_grad_(False).bound(m.make_swiss_roll(10_000))
    assert abs(K.mean() - metrics["K_bits"]) < 6 * K.std() / 100
    for name, colours in (("process.png", 4), ("training.png", 2)):
        picture = matplotlib.image.imread(out / name)[..., :3].reshape(-1, 3)
        found, counts = np.unique((picture * 8).round(), axis=0, return_counts=True)
        assert sum(counts > 1000) >= colours, name  # white, black, blue, ...


def test_same_seed_same_numbers_and_the_flags_reach_the_model(tiny, tmp_path, monkeypatch):
    roll, noises = m.make_swiss_roll, set()
    monkeypatch.setattr(m, "make_swiss_roll", lambda n, s=0: noises.add(s) or roll(n, s))
    first, out = tiny("--net", "mlp", "--noise", "0.1", "--fixed-schedule", "--seed", "1")
    weights = torch.load(out / "model.pt")["model"]
    samples = np.load(out / "samples.npy")
    again, _ = tiny("--net", "mlp", "--noise", "0.1", "--fixed-schedule", "--seed", "1")
    assert first == again and np.array_equal(samples, np.load(out / "samples.npy"))
    other, _ = tiny("--net", "mlp", "--noise", "0.1", "--fixed-schedule", "--seed", "2")
    assert noises == {0.1}  # in training and evaluation
    assert other["K_bits"] != first["K_bits"] and samples.shape == (50, 2)
    assert torch.equal(weights["logit_beta"], build(True, 5, 1e-3).logit_beta.detach())
    units = sum(weights[name].numel() for name in weights if name.startswith("net.layers"))
    assert units == 66 * 128 + 2 * 128 * 128 + 3 * 128 and weights["readout"].shape == (4, 128, 5)
    ceiling = m.ceiling_bits(0.1, 1e-3) - m.L_NULL
    assert first["ceiling_minus_null_bits"] == pytest.approx(ceiling)
    learned, out = tiny(out=tmp_path / "rbf")
    assert (learned["steps"], learned["lr"], first["lr"]) == (2, 0.04, 0.008)
    weights = torch.load(out / "model.pt")["model"]
    assert torch.all(weights["logit_beta"] != build(False, 5, 1e-3).logit_beta.detach())


def test_any_number_of_steps_trains(tmp_path):
    """--steps 10 divided by zero."""
    for steps in (*range(1, 25), 40):
        args = argparse.Namespace(steps=steps, lr=0.01, batch_size=8, noise=0.0, device="cpu")
        history = m.train(build(False, 3, 1e-2), args)
        assert len(history) == steps and history[0] == pytest.approx(0, abs=6)


@both
def test_main_runs_on_a_device_that_is_not_the_cpu_and_finds_it(full, tiny, tmp_path, monkeypatch):
    """The default asks what is there now, not what torch was built for. Numbers are the CPU's."""
    flags = [*TINY[:-2], "--net", "mlp" if full else "rbf", "--out", str(tmp_path)]
    on_cpu = m.main([*flags, "--device", "cpu"])
    weights = {}
    if not full:
        monkeypatch.undo()  # with pictures
    with pretend_device() as device, pytest.MonkeyPatch.context() as patch:
        here = {True: torch.device(device), False: torch.device("cuda")}
        find = "torch.accelerator.current_accelerator"
        patch.setattr(find, lambda check_available=False: here[check_available])
        patch.setattr(torch, "save", lambda saved, path: weights.update(saved["model"]))
        metrics = m.main(flags)
    assert json.loads((tmp_path / "metrics.json").read_text())["device"] == device
    assert metrics == pytest.approx(on_cpu, rel=1e-4)
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}  # loads anywhere


def test_nan_is_off_the_curve_and_null_in_the_json_and_can_be_drawn(tmp_path, monkeypatch):
    samples = m.roll_curve(torch.linspace(0, 1, 8))
    samples[1:4] = torch.tensor([[math.nan, 0], [0, math.inf], [9, 9]])
    args = argparse.Namespace(noise=0.0, beta1=1e-2, device="cpu")
    assert m.evaluate(build(False, 3, 1e-2), args, samples)["off_curve"] == 3 / 8

    def broken(model, args):
        model.readout.data.fill_(math.nan)
        return [0.0] * args.steps

    monkeypatch.setattr(m, "train", broken)
    m.main([*TINY, "--out", str(tmp_path)])
    text = (tmp_path / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=pytest.fail)
    assert metrics["K_bits"] is None and metrics["off_curve"] == 1.0
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_loss_that_is_not_finite_ends_with_one_line_of_its_own(tiny, monkeypatch, capsys):
    _, out = tiny()
    before = (out / "model.pt").read_bytes()
    roll = m.make_swiss_roll
    batches = iter([roll(8), roll(8), roll(8) * math.nan])
    monkeypatch.setattr(m, "make_swiss_roll", lambda n, noise: next(batches))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        tiny("--steps", "9")
    line = stop.value.code  # a text: python prints it to stderr, and the exit code is 1
    assert line == "K is nan at step 3: choose --lr below 0.04"
    assert capsys.readouterr().err.endswith("\n")  # the progress bar is finished
    assert (out / "model.pt").read_bytes() == before


def test_first_is_written_what_cannot_be_made_again(tmp_path, monkeypatch):
    order = ["model.pt", "samples.npy", "metrics.json"]
    for kept, name in enumerate(["draw", "evaluate", "DiffusionModel.p_sample_loop"]):
        out = tmp_path / name
        monkeypatch.setattr(f"{m.__name__}.{name}", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            m.main([*TINY, "--out", str(out)])
        assert {path.name for path in out.iterdir()} == set(order[: 3 - kept])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "--steps 0: choose 1 to"),
        ("--samples 0", "--samples 0: choose 1 to"),
        ("--T 1", "--T 1: choose 2 to 1000"),
        ("--T forty", "--T: invalid int value: 'forty'"),
        ("--lr nan", "--lr nan: choose"),
        ("--lr 0", "--lr 0.0: choose"),
        ("--beta1 nan", "--beta1 nan: choose 1e-07 to 0.01"),
        ("--noise -0.1", "--noise -0.1: choose 0 to 0.1"),
        ("--seed -1", "--seed -1: choose 0 to"),
        ("--net unet", "--net: invalid choice: 'unet' (choose from"),
        ("--device toaster", "--device toaster: "),
        ("--device cuda:99", "--device cuda:99: "),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--out file/below", "--out file/below: "),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit) as stop:
        m.main(["--out", "new", *flags.split()])
    *usage, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "error: " + message in line.replace("argument ", "")
    assert all(row.startswith(("usage:", " ")) for row in usage)
    assert not (tmp_path / "new" / "model.pt").exists()
    assert (tmp_path / "file").read_text() == "not a folder"
