"""ddpm_swissroll_2015.py against independent oracles (to six standard errors), then as a whole."""

import inspect
import json
import math
import os
import re
import sys
import weakref
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import ddpm_swissroll_2015 as m
from tests.pretend_device import pretend_device

both = pytest.mark.parametrize("full", [False, True], ids=["rbf", "mlp"])
sizes = pytest.mark.parametrize("T, beta1", [(2, 0.05), (5, 1e-6), (23, 1e-3), (40, 1e-5)])
number = st.floats(-3, 3)
log_var = st.floats(-12, 3)
# noise whose mean is exact for any quadratic function
CUBATURE = 2**0.5 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(full=False, T=40, beta1=1e-5):
    """The model of --net rbf, or of --net mlp if full."""
    return m.DiffusionModel(m.MLP() if full else m.RBFNetwork(), full, T, beta1)


def shaken(model, scale=None):
    """The model with every parameter moved at random, so that nothing is zero by accident."""
    scale = scale or (0.02 if model.full else 0.3)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return model


def constant(outputs, T=5, beta1=1e-2):
    """A model whose readout says outputs at each x_t and t: the features of the RBFs sum to 1."""
    model = m.DiffusionModel(m.RBFNetwork(), len(outputs) == 5, T, beta1).double()
    model.readout.data[:] = torch.tensor(outputs)
    return model.requires_grad_(False)


def schedule(model):
    return m.Schedule(model.beta1, model.logit_beta)


def bound(model, x0, eps):
    """model.bound with noise eps of our choice."""
    with mock.patch("torch.randn", lambda *shape, device: eps.expand(shape)):
        return model.bound(x0)


# the roll and its ceiling


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_roll_is_that_of_scikit_learn_standardised_and_its_points_are_spread_evenly(noise):
    n = 40_000
    u = (torch.arange(n).double() + 0.5) / n
    angle = 1.5 * math.pi * (1 + 2 * u)  # as in sklearn.datasets.make_swiss_roll
    raw = torch.stack([angle * angle.cos(), angle * angle.sin()], 1)
    curve = (raw - raw.mean(0)) / raw.std(0) * math.sqrt(1 - noise**2)
    assert torch.allclose(m.roll_curve(u, noise), curve, atol=5e-5)
    distance = (m.make_swiss_roll(n, noise) - curve).square().mean(0).sqrt()
    assert distance.tolist() == pytest.approx([noise] * 2, rel=0.03, abs=1e-3)  # each in its n-th
    assert not torch.equal(m.make_swiss_roll(9, noise), m.make_swiss_roll(9, noise))


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
    values = [m.ceiling_bits(0, beta1) - m.L_NULL for beta1 in (1e-2, 1e-4, 1e-5)]
    assert values == pytest.approx([1.7194, 5.0342, 6.6951], abs=2e-4)  # by hand


# q


@pytest.mark.parametrize("T, beta1", [(2, 0.1), (40, 1e-5), (1000, 1e-7)])
def test_the_schedule_is_that_of_float64_arithmetic(T, beta1):
    model = shaken(build(False, T, beta1), 0.5)
    s = schedule(model)
    fixed = torch.tensor([0, beta1], dtype=torch.float64)
    beta = torch.cat([fixed, model.logit_beta.double().sigmoid()])
    alpha_bar = torch.cumprod(1 - beta, 0)
    for mine, exact in ((s.beta, beta), (s.alpha_bar, alpha_bar), (s.var, 1 - alpha_bar)):
        assert mine.shape == (T + 1, 1, 1)
        assert torch.allclose(mine.flatten().double(), exact, rtol=3e-6, atol=1e-15)


def test_the_schedule_starts_with_equal_steps_of_the_signal_to_noise_ratio():
    s = schedule(build())
    log_snr = (s.alpha_bar / s.var)[1:].log().flatten()
    assert torch.allclose(log_snr, torch.linspace(math.log(1e5 - 1), -1, 40), atol=1e-3)


def test_q_sample_equals_t_single_steps():
    s = schedule(build(False, 40, 1e-2))
    x0, eps = torch.randn(2, 9, 2)
    signal, var = 1, 0
    for t in range(1, 41):
        signal = (1 - s.beta[t]).sqrt() * signal
        var = (1 - s.beta[t]) * var + s.beta[t]
        assert torch.allclose(s.q_sample(x0, t, eps), signal * x0 + var.sqrt() * eps)


@pytest.mark.parametrize("t, x0, xt", [(2, 0.9, 1.0), (3, -1.2, -1.0), (20, 2, -1), (40, 0, 1.5)])
def test_the_posterior_is_bayes_rule_on_a_grid(t, x0, xt):
    s = schedule(shaken(build(beta1=1e-3)).double())
    mean, variance = (x.item() for x in s.q_posterior(x0, xt, t))
    grid = mean + variance**0.5 * torch.linspace(-9, 9, 4001).double()
    before = Normal(s.alpha_bar[t - 1].sqrt() * x0, s.var[t - 1].sqrt()).log_prob(grid)
    step = Normal((1 - s.beta[t]).sqrt() * grid, s.beta[t].sqrt()).log_prob(torch.tensor(xt))
    weight = torch.softmax(before + step, 1)
    assert (weight @ grid).item() == pytest.approx(mean, abs=1e-3 * variance**0.5)
    assert (weight @ (grid - mean) ** 2).item() == pytest.approx(variance, rel=1e-3)


# p


@given(st.integers(0, 4), number, st.integers(2, 5))
@example(0, 3.0, 2)
@example(4, -3.0, 5)
def test_each_column_of_the_readout_moves_one_of_mean_variance_and_slope(column, value, t):
    outputs = [0.3, -0.2, 0.5, -0.4, 0.7]
    before = constant(outputs)
    s = schedule(before)
    xt = torch.ones(1, 2, dtype=torch.float64)
    old = torch.cat([x.flatten() for x in before.reverse(xt, t, s)])
    outputs[column] += value
    new = torch.cat([x.flatten() for x in constant(outputs).reverse(xt, t, s)])
    moved = (new - old).abs() > 1e-9 * abs(value)
    assert moved.tolist() == [value != 0 and k == column for k in range(5)]
    odds = (new / (1 - new) / (old / (1 - old)))[2:4]  # Eq. (64)
    change = math.exp(value) if column in (2, 3) else 1
    assert odds.max().item() == pytest.approx(max(change, 1))
    assert odds.min().item() == pytest.approx(min(change, 1))
    assert new[4].item() == pytest.approx(outputs[4])


@given(number, number, st.integers(2, 5))
@example(3.0, -3.0, 2)
def test_the_readout_of_rbf_guesses_x0_and_that_of_mlp_v(x0, eps, t):
    """If it is right, the mean is that of q(x_{t-1} | x_t, x_0): scale belongs to full."""
    s = schedule(constant([0.0] * 4))
    signal, noise = s.alpha_bar[t].sqrt().item(), s.var[t].sqrt().item()
    point = torch.tensor([[x0, 0.5]], dtype=torch.float64)
    xt = s.q_sample(point, t, eps)
    exact, _ = s.q_posterior(point, xt, t)
    shift = (point - signal * xt)[0].tolist()  # of the guess that is linear in x_t
    v = [signal * eps - noise * x for x in (x0, 0.5)]
    for model in (constant([*shift, 0.0, 0.0]), constant([-v[0], -v[1], 0.0, 0.0, 0.0])):
        assert torch.allclose(model.reverse(xt, t, s)[0], exact)


@both
@sizes
def test_zero_readout_is_the_forward_kernel_exactly(full, T, beta1):
    model = build(full, T, beta1).double()
    model.logit_beta.data += torch.randn(T - 1)
    s = schedule(model)
    xt = 2 * torch.randn(T, 50, 2).double()
    mean, var, slope = model.reverse(xt, torch.arange(1, T + 1), s)
    assert torch.allclose(mean, (1 - s.beta[1:]).sqrt() * xt, atol=1e-9)
    assert torch.allclose(var, s.beta[1:].expand_as(var)) and torch.all(slope == 0)


@both
def test_each_step_has_its_own_readout_and_each_point_its_own_result(full):
    """One point [1, 2] at one step t gives what it gives among all steps, [T - 1, B, 2]."""
    model = shaken(build(full, 8)).requires_grad_(False)
    s, t, xt = schedule(model), torch.arange(2, 9), torch.randn(7, 4, 2)
    mean, var, _ = model.reverse(xt, t, s)
    assert torch.all((var > 0) & (var < 1))
    for k in range(7):
        alone = model.reverse(xt[k, 1:2], k + 2, s)[:2]
        torch.testing.assert_close(alone, (mean[k, 1:2], var[k, 1:2]))
        model.readout[k + 2] += 1  # has no effect on the next ones


@both
def test_each_step_of_the_sampler_has_the_law_of_reverse_and_the_last_of_the_forward_kernel(full):
    """Undone step by step, the samples must be standard normal noise, independent of x_t."""
    model = build(full, 6, 0.3)
    before = m.make_swiss_roll(9)
    m.train(model, 0.0, 3, 8, 0.01)  # does not move the readout of t = 1
    shaken(model, 0.1 if full else None).requires_grad_(False).readout[2:] += 0.1
    model.readout[:2] -= model.readout[:2]
    s = schedule(model)
    steps, states = zip(*model.p_sample_loop(torch.randn(30_000, 2)))
    assert steps == (6, 5, 4, 3, 2, 1, 0) and before.shape == (9, 2)
    noises = [states[0]]
    for t in range(6, 1, -1):
        mean, var, slope = model.reverse(states[6 - t], t, s)
        x1, x2 = (states[7 - t] - mean).unbind(1)
        noises.append(torch.stack([x1, x2 - slope * x1], 1) / var.sqrt())
    noises.append((states[6] - 0.7**0.5 * states[5]) / 0.3**0.5)
    z = torch.cat(noises, 1)
    assert z.mean(0).abs().max() < 6 / 30_000**0.5
    assert (z.T.cov() - torch.eye(14)).abs().max() < 6 * (2 / 30_000) ** 0.5
