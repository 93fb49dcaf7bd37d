"""ddpm_swissroll_2015.py against independent oracles (to six standard errors), then as a whole."""

import argparse
import json
import math
import os

import matplotlib.image
import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import ddpm_swissroll_2015 as m
from tests.pretend_device import pretend_device

both = pytest.mark.parametrize("full", [False, True], ids=["rbf", "mlp"])
sizes = pytest.mark.parametrize("T, beta1", [(2, 0.05), (5, 1e-6), (23, 1e-3), (40, 1e-5)])
# noise whose mean is exact for any quadratic function
CUBATURE = 2**0.5 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]).double()


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


@pytest.mark.parametrize("T, beta1", [(2, 0.1), (40, 1e-5), (1000, 1e-7)])
def test_the_schedule_is_that_of_exact_arithmetic_rounded_once(T, beta1):
    model = shaken(build(False, T, beta1), 0.5)
    fixed = torch.tensor([0, beta1], dtype=torch.float64)
    beta = torch.cat([fixed, model.logit_beta.double().sigmoid()])
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    for mine, exact in zip(model.schedule(), (beta, log_alpha_bar.exp(), -log_alpha_bar.expm1())):
        assert mine.shape == (T + 1, 1, 1)
        assert torch.allclose(mine.flatten().double(), exact, rtol=7e-8, atol=0)


def test_the_schedule_starts_with_equal_steps_of_the_signal_to_noise_ratio():
    s = build().schedule()
    log_snr = (s.alpha_bar / s.var)[1:].log().flatten()
    assert torch.allclose(log_snr, torch.linspace(math.log(1e5 - 1), -1, 40), atol=1e-3)


def test_q_sample_equals_t_single_steps():
    model = build(False, 40, 1e-2)
    s = model.schedule()
    x0, eps = torch.randn(2, 9, 2)
    signal, var = 1, 0
    for t in range(1, 41):
        signal = (1 - s.beta[t]).sqrt() * signal
        var = (1 - s.beta[t]) * var + s.beta[t]
        assert torch.allclose(model.q_sample(x0, t, eps, s), signal * x0 + var.sqrt() * eps)


@pytest.mark.parametrize("t, x0, xt", [(2, 0.9, 1.0), (3, -1.2, -1.0), (20, 2, -1), (40, 0, 1.5)])
def test_the_posterior_is_bayes_rule_on_a_grid(t, x0, xt):
    model = shaken(build(beta1=1e-3)).double()
    s = model.schedule()
    mean, variance = (x.item() for x in model.q_posterior(x0, xt, t, s))
    grid = mean + variance**0.5 * torch.linspace(-9, 9, 4001).double()
    before = Normal(s.alpha_bar[t - 1].sqrt() * x0, s.var[t - 1].sqrt()).log_prob(grid)
    step = Normal((1 - s.beta[t]).sqrt() * grid, s.beta[t].sqrt()).log_prob(torch.tensor(xt))
    weight = torch.softmax(before + step, 1)
    assert (weight @ grid).item() == pytest.approx(mean, abs=1e-3 * variance**0.5)
    assert (weight @ (grid - mean) ** 2).item() == pytest.approx(variance, rel=1e-3)


def test_kl_normal_is_that_of_torch_distributions_in_bits():
    mean1, mean2 = 3 * torch.randn(2, 1000).double()
    var1, var2 = torch.exp(3 * torch.randn(2, 1000).double())
    nats = kl_divergence(Normal(mean1, var1.sqrt()), Normal(mean2, var2.sqrt()))
    assert torch.allclose(m.kl_normal(mean1, var1, mean2, var2), nats / math.log(2))


@both
@sizes
def test_zero_readout_is_the_forward_kernel_exactly(full, T, beta1):
    model = build(full, T, beta1).double()
    model.logit_beta.data += torch.randn(T - 1)
    s = model.schedule()
    xt = 2 * torch.randn(T - 1, 50, 2).double()
    mean, var, slope = model.reverse(xt, torch.arange(2, T + 1), s)
    assert torch.allclose(mean, (1 - s.beta[2:]).sqrt() * xt, atol=1e-9)
    assert torch.allclose(var, s.beta[2:].expand_as(var)) and torch.all(torch.as_tensor(slope) == 0)


@both
@sizes
def test_bound_of_the_forward_kernel_is_L_null_for_any_data_of_unit_second_moment(full, T, beta1):
    """Detailed balance. With cubature there is no sampling error, so this is exact."""
    model = build(full, T, beta1).double()
    model.logit_beta.data += torch.randn(T - 1)
    x0 = 7**0.5 * torch.nn.functional.normalize(torch.randn(7, 2).double() ** 3, dim=0)
    K, _ = model.bound(x0.repeat_interleave(4, 0), CUBATURE.repeat(7, 1).expand(T - 1, 28, 2))
    assert K.mean().item() == pytest.approx(m.L_NULL, abs=1e-7)
    K, _ = model.bound(x0.repeat(100, 1))  # with noise of its own: standard normal
    assert abs(K.mean() - m.L_NULL) < 6 * K.std() / 700**0.5


def test_telescoping_identity_of_the_forward_kernel():
    """sum_{t=2..T} E[KL_t] = H_q(X_T | X_0) - H_q(X_1 | X_0), term by term."""
    model = build().double()
    var = model.schedule().var.flatten()
    _, kl = model.bound(torch.ones(4, 2).double(), CUBATURE.expand(39, 4, 2))
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


@both
def test_bound_is_eq_14_written_out(full):
    model = shaken(build(full, 5, 1e-2)).double()
    var = model.schedule().var.flatten()
    K, kl = model.bound(torch.randn(9, 2).double())
    end, start, prior = (2 * Normal(0, v**0.5).entropy() for v in (var[-1], var[1], 1))  # two axes
    assert torch.allclose(K, -kl.sum(0) + (end - start - prior) / math.log(2))


@sizes
def test_entropy_bounds_of_eq_24(T, beta1):
    """beta-tilde_t and beta_t enclose the best f_Sigma: H + H - H <= H_q(X_{t-1} | X_t) <= H."""
    model = shaken(build(False, T, beta1)).double()
    s = model.schedule()
    _, tilde = model.q_posterior(0, torch.zeros(T - 1, 1, 2), torch.arange(2, T + 1), s)
    lower = s.beta[2:] * s.var[1:-1] / s.var[2:]  # variances: the entropies are half their logs
    assert torch.allclose(tilde, lower)
    for power in (0.5, 0.9):  # Gaussian data of that standard deviation: H_q is known
        marginal = power**2 * s.alpha_bar + s.var
        exact = s.beta[2:] * marginal[1:-1] / marginal[2:]
        assert torch.all((lower <= exact) & (exact <= s.beta[2:]))


def test_forty_diagonal_steps_of_the_first_schedule_miss_the_bits_of_the_paper():
    """Brute force: K - L_null if each step has the mean and variances of q(x_{t-1} | x_t), the best
    there are, by weighing 4,000 points of the curve. Learning the schedule gains little."""
    model = build()
    s = model.schedule()
    curve = m.roll_curve((torch.arange(4000).double() + 0.5) / 4000)
    bits = (s.var[-1] / s.var[1]).log2()
    for t in range(2, 41):
        xt = model.q_sample(m.make_swiss_roll(300), t, torch.randn(300, 2), s)
        square = torch.cdist(xt.double(), s.alpha_bar[t].sqrt() * curve).square()
        w = torch.softmax(-square / (2 * s.var[t]), 1)
        spread = w @ curve**2 - (w @ curve) ** 2  # variances of x_0, given x_t
        gain = s.alpha_bar[t - 1] * s.beta[t] / (s.var[t - 1] * s.var[t])
        bits = bits - (1 + gain * spread).log2().sum(1).mean() / 2
    assert 6 < bits < m.PAPER


@pytest.mark.parametrize("scale", [0.001, 0.01, 0.05])
def test_K_never_exceeds_its_ceiling(scale):
    K, _ = shaken(build(True, 10, 1e-3), scale).bound(m.make_swiss_roll(2000))
    assert K.mean() - 6 * K.std() / 2000**0.5 < m.ceiling_bits(0.0, 1e-3)


@both
def test_the_gradient_of_every_parameter_is_the_slope_of_K(full):
    """Central difference with the same frozen noise (Sec. 2.4.1)."""
    model = shaken(build(full, 6, 1e-2)).double()
    x0, eps = torch.randn(30, 2).double(), torch.randn(5, 30, 2).double()
    model.bound(x0, eps)[0].mean().backward()
    for name, parameter in model.named_parameters():
        step = 1e-5 * torch.randn_like(parameter)
        parameter.data += step
        above = model.bound(x0, eps)[0].mean().item()
        parameter.data -= 2 * step
        below = model.bound(x0, eps)[0].mean().item()
        parameter.data += step
        slope = (parameter.grad * step).sum().item()
        assert slope != 0 and (above - below) / 2 == pytest.approx(slope, rel=1e-4), name


def test_rbf_network_is_the_normalised_one_of_the_paper():
    model = shaken(build())
    net, x = model.net, torch.randn(3, 5, 2)
    distance = (x[..., None, :] - net.center).norm(dim=-1)
    bump = torch.exp(-(distance**2) / (2 * net.log_width.exp() ** 2))
    assert torch.allclose(net(x), bump / bump.sum(-1, keepdim=True), atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == 39 * 16 * 4 + 16 * 3 + 39


@both
def test_each_step_has_its_own_readout_and_each_point_its_own_result(full):
    """One point [1, 2] at one step t gives what it gives among all steps, [T - 1, B, 2]."""
    model = shaken(build(full, 8)).requires_grad_(False)
    s, t, xt = model.schedule(), torch.arange(2, 9), torch.randn(7, 4, 2)
    mean, var, _ = model.reverse(xt, t, s)
    assert torch.all((var > 0) & (var < 1))
    for k in range(7):
        alone = model.reverse(xt[k, 1:2], k + 2, s)[:2]
        torch.testing.assert_close(alone, (mean[k, 1:2], var[k, 1:2]))
        model.readout[k] += 1  # has no effect on the next ones


@both
def test_each_step_of_the_sampler_has_the_law_of_reverse_and_the_last_of_the_forward_kernel(full):
    """Undone step by step, the samples must be standard normal noise, independent of x_t."""
    model = shaken(build(full, 6, 0.3), 0.1 if full else None).requires_grad_(False)
    s = model.schedule()
    states = list(model.p_sample_loop(30_000))
    assert len(states) == 7 and all(x.shape == (30_000, 2) and x.isfinite().all() for x in states)
    noises = [states[0]]
    for t in range(6, 1, -1):
        mean, var, slope = model.reverse(states[6 - t], t, s)
        x1, x2 = (states[7 - t] - mean).unbind(1)
        noises.append(torch.stack([x1, x2 - slope * x1], 1) / var.sqrt())
    noises.append((states[6] - 0.7**0.5 * states[5]) / 0.3**0.5)
    z = torch.cat(noises, 1)
    assert z.mean(0).abs().max() < 6 / 30_000**0.5
    assert (z.T.cov() - torch.eye(14)).abs().max() < 6 * (2 / 30_000) ** 0.5


FILES = {"model.pt", "samples.npy", "metrics.json", "process.png", "training.png"}
TINY = ["--T", "5", "--beta1", "1e-3", "--steps", "2", "--samples", "50"]
CPU = ["--device", "cpu"]


def test_a_short_run_learns_and_leaves_files_that_agree(tmp_path, monkeypatch):
    """All defaults but the budget. No tensor may be handed to numpy or matplotlib."""
    out = tmp_path / "made" / "for it"
    monkeypatch.setattr(torch.Tensor, "__array__", lambda *args, **more: pytest.fail("a tensor"))
    m.main(["--steps", "200", "--samples", "2000", *CPU, "--out", str(out)])
    assert set(os.listdir(out)) == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    K, ceiling = metrics["K_minus_null_bits"], metrics["ceiling_minus_null_bits"]
    assert 1.5 < K < ceiling == pytest.approx(6.695, abs=0.002)
    assert metrics["K_bits"] - K == pytest.approx(m.L_NULL)
    assert metrics["gap_bits"] == pytest.approx(ceiling - K)
    assert 0.003 < metrics["K_error_bits"] < 0.03  # of 65,536 points
    samples = np.load(out / "samples.npy")
    assert samples.shape == (2000, 2) and samples.dtype == np.float32
    curve = m.roll_curve(torch.linspace(0, 1, 2000))
    far = torch.cdist(torch.from_numpy(samples), curve).amin(1) > 0.1
    assert metrics["off_curve"] == pytest.approx(far.double().mean().item(), abs=0.002)
    saved = torch.load(out / "model.pt", weights_only=True)
    assert saved["flags"].items() <= metrics.items() and metrics["steps"] == 200
    model = build()
    model.load_state_dict(saved["model"])
    bounds, _ = model.requires_grad_(False).bound(m.make_swiss_roll(10_000))
    assert abs(bounds.mean() - metrics["K_bits"]) < 6 * bounds.std() / 100

    for name, colours in (("process.png", 4), ("training.png", 2)):
        picture = matplotlib.image.imread(out / name)[..., :3].reshape(-1, 3)
        found, counts = np.unique((picture * 8).round(), axis=0, return_counts=True)
        assert sum(counts > 1000) >= colours, name  # white, black, blue, ...


def test_the_flags_reach_the_model_and_the_data(tmp_path, monkeypatch):
    roll, noises = m.make_swiss_roll, set()
    monkeypatch.setattr(m, "make_swiss_roll", lambda n, s=0: noises.add(s) or roll(n, s))
    monkeypatch.setattr(m, "draw", lambda *args: None)

    def run(*flags):
        metrics = m.main([*TINY, *CPU, "--out", str(tmp_path), *flags])
        return metrics | torch.load(tmp_path / "model.pt")

    flags = ["--net", "mlp", "--noise", "0.1", "--fixed-schedule", "--seed"]
    mlp, other = run(*flags, "1"), run(*flags, "2")
    assert noises == {0.1}  # in training and evaluation
    assert mlp["K_bits"] != other["K_bits"]
    assert mlp["ceiling_minus_null_bits"] == pytest.approx(m.ceiling_bits(0.1, 1e-3) - m.L_NULL)
    assert mlp["model"]["net.layers.2.weight"].shape == (128, 128)
    assert mlp["model"]["readout"].shape == (4, 128, 5)
    rbf = run()
    assert (rbf["flags"]["lr"], mlp["flags"]["lr"]) == (0.04, 0.008)
    first = build(False, 5, 1e-3).logit_beta.detach()
    assert torch.equal(mlp["model"]["logit_beta"], first)
    assert torch.all(rbf["model"]["logit_beta"] != first)


def test_any_number_of_steps_trains():
    for steps in (*range(1, 25), 40):  # 10 divided by zero
        args = argparse.Namespace(steps=steps, lr=0.01, batch_size=8, noise=0.0, device="cpu")
        assert len(m.train(build(False, 3, 1e-2), args)) == steps


@pytest.mark.parametrize("net", ["rbf", "mlp"])
def test_same_seed_same_numbers_also_on_another_device_which_is_found(net, tmp_path, monkeypatch):
    """The default asks what is there now, not what torch was built for."""
    flags = [*TINY, "--net", net, "--out", str(tmp_path)]
    metrics = m.main([*flags, *CPU])
    samples = np.load(tmp_path / "samples.npy")
    saved = {}
    with pretend_device() as device:
        here = {True: torch.device(device), False: torch.device("cuda")}
        find = "torch.accelerator.current_accelerator"
        monkeypatch.setattr(find, lambda check_available=False: here[check_available])
        monkeypatch.setattr(torch, "save", lambda content, path: saved.update(content))
        assert m.main(flags) == pytest.approx(metrics, rel=1e-4)
    assert np.allclose(np.load(tmp_path / "samples.npy"), samples, atol=1e-4)
    assert saved["flags"]["device"] == device
    assert {tensor.device.type for tensor in saved["model"].values()} == {"cpu"}  # loads anywhere


def test_nan_is_off_the_curve_and_null_in_the_json_and_can_be_drawn(tmp_path, monkeypatch):
    def broken(model, args):
        model.readout.data.fill_(math.nan)
        return [0.0] * args.steps

    monkeypatch.setattr(m, "train", broken)
    m.main([*TINY, *CPU, "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["K_bits"] is None and metrics["off_curve"] == 1.0
    assert set(os.listdir(tmp_path)) == FILES


def test_a_loss_that_is_not_finite_ends_with_one_line_of_its_own(tmp_path, monkeypatch, capsys):
    batches = iter([torch.randn(8, 2), torch.randn(8, 2), torch.full((8, 2), math.nan)])
    monkeypatch.setattr(m, "make_swiss_roll", lambda n, noise: next(batches))
    with pytest.raises(SystemExit, match="^K is nan at step 3: choose --lr below 0.04$"):
        m.main([*TINY, *CPU, "--steps", "9", "--out", str(tmp_path)])
    assert capsys.readouterr().err.endswith("\n")  # the progress bar is finished
    assert not os.listdir(tmp_path)


def test_first_is_written_what_cannot_be_made_again(tmp_path, monkeypatch):
    order = ["model.pt", "samples.npy", "metrics.json"]
    for name in ("draw", "evaluate", "DiffusionModel.p_sample_loop"):
        monkeypatch.setattr(f"{m.__name__}.{name}", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            m.main([*TINY, *CPU, "--out", str(tmp_path / name)])
        assert sorted(os.listdir(tmp_path / name)) == sorted(order)
        order.pop()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "--steps 0: choose 1 to"),
        ("--samples 0", "--samples 0: choose 1 to"),
        ("--T 1", "--T 1: choose 2 to 1000"),
        ("--lr 0", "--lr 0.0: choose"),
        ("--beta1 nan", "--beta1 nan: choose 1e-07 to 0.01"),
        ("--noise -0.1", "--noise -0.1: choose 0 to 0.1"),
        ("--seed -1", "--seed -1: choose 0 to"),
        ("--net unet", "--net: invalid choice: 'unet' (choose from"),
        ("--device toaster", "--device toaster: "),
        ("--device cuda:99", "--device cuda:99: "),
        ("--out file/below", "--out file/below: "),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    refuses(m.main, ["--out", "new", *flags.split()], message)
