"""ddpm_swissroll_2015.py against independent oracles (to six standard errors), then as a whole."""

import json
import math
import os
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ddpm_swissroll_2015 as m
from tests.pretend_device import pretend_device

both = pytest.mark.parametrize("full", [False, True], ids=["rbf", "mlp"])
number = st.floats(-3, 3)
CUBATURE = 2**0.5 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(full=False, T=40, beta1=1e-5):
    return m.DiffusionModel(m.MLP() if full else m.RBFNetwork(), full, T, beta1)


def shaken(model):
    """The model with every parameter moved at random, so that nothing is zero by accident."""
    for parameter in model.parameters():
        parameter.data += (0.02 if model.full else 0.3) * torch.randn_like(parameter)
    return model


def constant(outputs, t, beta1=1e-2):
    """A model whose readout at t (others: NaN) is outputs at any x_t: the RBFs sum to 1."""
    model = m.DiffusionModel(m.RBFNetwork(), len(outputs) == 5, 5, beta1).double()
    model.readout.data.fill_(math.nan)[t] = torch.tensor(outputs).double()
    return model.requires_grad_(False)


def schedule(model):
    return m.Schedule(model.beta1, model.logit_beta)


def bound(model, x0, eps):  # model.bound with this noise
    with mock.patch("torch.randn", lambda *shape, device: eps.expand(shape)):
        return model.bound(x0)


def covariance(var, slope):  # of a ~ N(0, v1) and b = slope a + N(0, v2)
    v1, v2 = var.unbind(-1)
    rows = [torch.stack([v1, slope * v1], -1), torch.stack([slope * v1, v2 + slope**2 * v1], -1)]
    return torch.stack(rows, -2)


# the roll, its ceiling and q
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
    n, var = 500, (1 - beta1) * noise**2 + beta1
    x1 = (1 - beta1) ** 0.5 * m.make_swiss_roll(n, noise) + beta1**0.5 * torch.randn(n, 2)
    curve = m.roll_curve((torch.arange(5000) + 0.5) / 5000, noise) * (1 - beta1) ** 0.5
    log_p = Normal(curve.double(), var**0.5).log_prob(x1[:, None].double()).sum(-1)
    log_q = (log_p.logsumexp(1) - math.log(5000)) / math.log(2)
    assert abs(m.ceiling_bits(noise, beta1) - log_q.mean()) < 6 * log_q.std() / n**0.5
    values = [m.ceiling_bits(0, beta1) - m.L_NULL for beta1 in (1e-2, 1e-4, 1e-5)]
    assert values == pytest.approx([1.7194, 5.0342, 6.6951], abs=2e-4)  # by hand


@pytest.mark.parametrize("T, beta1", [(2, 0.1), (40, 1e-5), (1000, 1e-7)])
def test_q_sample_equals_t_single_steps(T, beta1):
    """In double precision. At first log(alpha_bar / (1 - alpha_bar)) falls in equal steps."""
    model = build(False, T, beta1)
    log_snr = (schedule(model).alpha_bar / schedule(model).var)[1:].log().flatten()
    assert torch.allclose(log_snr, torch.linspace(math.log(1 / beta1 - 1), -1, T), atol=2e-3)
    s = schedule(shaken(model))
    betas = [beta1, *model.logit_beta.double().sigmoid().tolist()]
    signal, var = 1, 0
    for t, beta in enumerate(betas, 1):
        signal = math.sqrt(1 - beta) * signal
        var = (1 - beta) * var + beta
        xt = s.q_sample(torch.tensor([3.0, 0]), t, torch.tensor([0, 3.0]))
        assert xt[0].tolist() == pytest.approx([3 * signal, 3 * math.sqrt(var)], rel=3e-6)
        assert s.beta[t].item() == pytest.approx(beta) and s.beta.shape == (T + 1, 1, 1)


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
@given(*[number] * 5, st.integers(2, 5))
@example(3.0, -3.0, 3.0, -3.0, 3.0, 2)
def test_each_step_has_its_own_readout_and_each_column_of_it_one_meaning(x0, eps, a, b, slope, t):
    """0, 1: if the guess of x_0 (of -v if full) is right, so is the mean, that of q given x_0.
    2, 3: Eq. (64), the odds of a variance times e^output. 4: the slope."""
    s = schedule(constant([0.0] * 4, t))
    signal, noise = s.alpha_bar[t].sqrt(), s.var[t].sqrt()
    point = torch.tensor([[x0, 0.5]]).double()
    xt = s.q_sample(point, t, eps)
    exact, _ = s.q_posterior(point, xt, t)
    shift = point - signal * xt  # of the guess that is linear in x_t
    v = signal * eps - noise * point
    for outputs in ([*shift[0], a, b], [*-v[0], a, b, slope]):
        mean, var, c = constant(outputs, t).reverse(xt[None], torch.tensor([t]), s)
        assert torch.allclose(mean[0], exact, atol=1e-9)
        odds = var / (1 - var) / (s.beta[t] / (1 - s.beta[t]))
        assert odds.flatten().tolist() == pytest.approx([math.exp(a), math.exp(b)])
        assert c.item() == pytest.approx(slope if len(outputs) == 5 else 0)


@given(number)
@example(3.0)
def test_the_sampler_draws_from_reverse_and_its_last_step_is_a_forward_step(slope):
    """The same noise, with the covariance of reverse by Cholesky, gives the same states."""
    model = constant([0.3, -0.2, 0.5, -0.4, slope], slice(None), beta1=0.3)
    model.readout[1] = 0
    xT = torch.randn(9, 2).double()
    torch.manual_seed(1)
    states = dict(model.p_sample_loop(xT))
    torch.manual_seed(1)
    assert list(states) == [5, 4, 3, 2, 1, 0] and torch.equal(states[5], xT)
    for t in range(5, 1, -1):
        mean, var, c = model.reverse(states[t], t, schedule(model))
        noise = torch.linalg.cholesky(covariance(var, c)) @ torch.randn_like(xT)[..., None]
        assert torch.allclose(states[t - 1], mean + noise[..., 0])
    assert torch.allclose(states[0], 0.7**0.5 * states[1] + 0.3**0.5 * torch.randn_like(xT))


def test_rbf_is_normalised_and_mlp_learns_in_100_steps_what_a_linear_one_does_not():
    net, x = shaken(build()).net, torch.randn(3, 5, 2)
    distance = (x[..., None, :] - net.center).norm(dim=-1)
    bump = torch.exp(-(distance**2) / (2 * net.log_width.exp() ** 2))
    assert torch.allclose(net(x), bump / bump.sum(-1, keepdim=True), atol=1e-5)
    model, other = build(True), m.MLP()
    assert 2.5 < np.mean(m.train(model, 0.0, 100, 64, 0.008)[-9:]) < 4.3  # linear: 0.8
    other.load_state_dict(model.net.state_dict())  # with its frequencies
    assert torch.equal(other(x), model.net(x))


# K
@given(number, number, *[st.floats(-12, 3)] * 4, number)
@example(0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
@example(3.0, -3.0, -12.0, 3.0, 3.0, -12.0, 3.0)
def test_kl_is_not_negative_and_that_of_torch_distributions(a, b, q1, q2, p1, p2, slope):
    mean, slope = torch.tensor([a, b]).double(), torch.tensor(slope).double()
    var_q, var_p = torch.tensor([[q1, q2], [p1, p2]]).double().exp()
    kl = m.kl_bits(mean, var_q, 0 * mean, var_p, slope).item()
    p = MultivariateNormal(0 * mean, covariance(var_p, slope))
    exact = kl_divergence(MultivariateNormal(mean, var_q.diag()), p).item() / math.log(2)
    assert kl == pytest.approx(exact, rel=1e-6, abs=1e-9) and kl > -1e-12


@both
def test_bound_is_eq_14_written_out_and_has_its_gradient(full):
    """Frozen noise (Sec. 2.4.1): the gradient in every parameter is the slope of K."""
    model = shaken(build(full, 5, 1e-2)).double()
    s, t = schedule(model), torch.arange(2, 6)
    x0, eps = torch.randn(20, 2).double(), torch.randn(4, 20, 2).double()
    xt = s.q_sample(x0, t, eps)
    kl = m.kl_bits(*s.q_posterior(x0, xt, t), *model.reverse(xt, t, s))
    end, start, prior = (2 * Normal(0, v**0.5).entropy() for v in (*s.var[[5, 1]].flatten(), 1))
    K, terms = bound(model, x0, eps)
    assert torch.allclose(terms, kl)
    assert torch.allclose(K, (end - start - prior) / math.log(2) - kl.sum(0))
    K.mean().backward()
    for name, parameter in model.named_parameters():
        step, K = 1e-5 * torch.randn_like(parameter), []
        for move in (-step, 2 * step, -step):
            parameter.data += move
            K.append(bound(model, x0, eps)[0].mean().item())
        slope = (parameter.grad * step).sum().item()
        assert slope != 0 and (K[1] - K[0]) / 2 == pytest.approx(slope, rel=1e-4), name


@both
@pytest.mark.parametrize("T, beta1", [(2, 0.05), (5, 1e-6), (23, 1e-3), (40, 1e-5)])
def test_bound_of_the_forward_kernel_is_L_null_for_any_data_of_unit_second_moment(full, T, beta1):
    """Detailed balance. The mean over CUBATURE is exact for any quadratic function."""
    model = build(full, T, beta1).double()
    model.logit_beta.data += torch.randn(T - 1)
    x0 = 7**0.5 * torch.nn.functional.normalize(torch.randn(7, 2).double() ** 3, dim=0)
    K, _ = bound(model, x0.repeat_interleave(4, 0), CUBATURE.repeat(7, 1))
    assert K.mean().item() == pytest.approx(m.L_NULL, abs=1e-7)


@pytest.mark.parametrize("full, beta1, n", [(1, 1e-3, 4000), (1, 1e-5, 1500), (0, 1e-5, 1500)])
def test_K_never_exceeds_its_ceiling(full, beta1, n):
    """The best f_mu and f_Sigma, mean and covariance of q(x_{t-1} | x_t) by weighing points of the
    curve, come within 0.1 bits of it. Diagonal (full = 0), they miss the 6.45 bits of the paper."""
    model = build(beta1=beta1).double().requires_grad_(False)
    curve = m.roll_curve((torch.arange(4000).double() + 0.5) / 4000)

    def reverse(xt, t, s):
        results = []
        for x, k in zip(xt, t.tolist()):
            c = curve[:: max(1, min(40, int(300 * s.var[k].sqrt())))]  # finer than the noise
            w = torch.softmax(-(torch.cdist(x, s.alpha_bar[k].sqrt() * c) ** 2) / (2 * s.var[k]), 1)
            x0 = w @ c  # E[x_0 | x_t]
            mean, tilde = s.q_posterior(x0, x, k)
            gain = s.alpha_bar[k - 1][0] * (s.beta[k] / s.var[k])[0] ** 2
            v1, v2 = (tilde + gain * (w @ c**2 - x0**2)).unbind(1)
            slope = full * gain * (w @ c.prod(1) - x0.prod(1)) / v1
            results.append((mean, torch.stack([v1, v2 - slope**2 * v1], 1), slope))
        return [torch.stack(x) for x in zip(*results)]

    model.reverse = reverse
    K, _ = model.bound(m.make_swiss_roll(n).double())
    ceiling = m.ceiling_bits(0.0, beta1) if full else 6.45 + m.L_NULL
    assert K.std() / n**0.5 < 0.06 and ceiling - 0.1 < K.mean() < ceiling


# the whole script
# 10 steps: with the first tenth of them for the warm-up, OneCycleLR divides by zero
TINY = "--T 5 --beta1 1e-3 --steps 10 --samples 50 --device cpu".split()


def test_a_short_run_learns_and_leaves_files_that_agree(tmp_path, monkeypatch, capsys):
    """All defaults but the budget. No tensor may be handed to numpy or matplotlib."""
    out = tmp_path / "made" / "for it"
    monkeypatch.setattr(torch.Tensor, "__array__", lambda *args, **more: pytest.fail("a tensor"))
    m.main(["--steps", "200", "--samples", "2000", "--device", "cpu", "--out", str(out)])
    assert len(os.listdir(out)) == 5 and "Table 1 has 6.45" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert 1.5 < metrics["K_minus_null_bits"] < metrics["ceiling_minus_null_bits"] < 6.697
    samples = torch.from_numpy(np.load(out / "samples.npy"))
    assert samples.shape == (2000, 2) and samples.dtype == torch.float32
    assert m.evaluate(build(T=2), 0.0, samples)["off_curve"] == metrics["off_curve"] > 0
    saved = torch.load(out / "model.pt", weights_only=True)
    assert saved["flags"].items() <= metrics.items() and metrics["steps"] == 200
    model = build()
    model.load_state_dict(saved["model"])
    assert metrics["alpha_bar_T"] == pytest.approx(schedule(model).alpha_bar[-1].item())
    K, _ = model.requires_grad_(False).bound(m.make_swiss_roll(10_000))
    assert abs(K.mean() - m.L_NULL - metrics["K_minus_null_bits"]) < 6 * K.std() / 100


@pytest.mark.parametrize("noise, b, limit", [(0, 1e-5, 0.1134), (0, 0.01, 0.5243), (0.1, 0, 0.4)])
def test_off_curve_counts_none_of_a_perfect_model(noise, b, limit):
    """The limit, by hand, is 0.1 and three standard deviations. b is beta_1."""
    model = build(False, 2, b or 1e-7).requires_grad_(False)
    x0 = m.make_swiss_roll(20_000, noise)
    for _ in range(2):  # x_1, and the last step back
        x0 = (1 - b) ** 0.5 * x0 + b**0.5 * torch.randn(20_000, 2)
    assert m.evaluate(model, noise, x0)["off_curve"] < 0.002
    curve = m.roll_curve(torch.linspace(0, 1, 5000), noise)
    right = curve[curve[:, 0].argmax()]  # the roll lies to the left of it
    points = right + torch.tensor([[limit - 0.001, 0], [limit + 0.001, 0]])
    assert m.evaluate(model, noise, points)["off_curve"] == 0.5


def test_the_pictures_show_each_state_in_its_place_and_the_drift(monkeypatch):
    figures, states = {}, {t: torch.randn(9, 2) for t in (8, 4, 0)}
    monkeypatch.setattr(m.Figure, "savefig", lambda self, path, dpi: figures.update({path: self}))
    model = shaken(build(False, 8, 1e-3)).requires_grad_(False)
    m.draw("out", model, 0.0, states, [1.0, 2.0])
    for t, q, p, drift in zip((0, 4, 8), *np.reshape(figures["out/process.png"].axes, (3, 3))):
        assert np.array_equal(p.collections[0].get_offsets(), states[t].numpy())
        assert (q.collections[0].get_offsets()[:, 0].max() < 1.7) == (t == 0)  # the roll's end
        arrows, step = drift.collections[1], max(t, 2)
        x = torch.tensor(arrows.get_offsets()).float()
        mean, _, _ = model.reverse(x, step, schedule(model))
        assert np.allclose(np.stack([arrows.U, arrows.V], 1), (mean - x).numpy(), atol=1e-5)
        assert f"= {t}" in p.get_title() and f"= {step}" in drift.get_title()
    K, beta, terms = figures["out/training.png"].axes
    assert [list(line.get_ydata())[0] for line in K.lines] == pytest.approx([1, 3.37384])
    assert beta.lines[0].get_ydata()[0] == pytest.approx(1e-3) and len(terms.patches) == 7


def test_the_defaults(monkeypatch, capsys):
    """Of main() in a notebook, too, where sys.argv belongs to the kernel."""
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    monkeypatch.setattr(m.Path, "mkdir", lambda *args, **more: None)
    monkeypatch.setattr(m, "train", lambda model, *args: sys.exit(f"{model.T}, {args}"))
    with pytest.raises(SystemExit, match=re.escape("40, (0.0, 10000, 256, 0.04)")):
        m.main()
    with pytest.raises(SystemExit, match=re.escape("40, (0.0, 2500, 256, 0.008)")):
        m.main(["--net", "mlp"])
    with pytest.raises(SystemExit, match="^0$"):
        m.main(["--help"])
    shown = re.findall(r"\(default:([^)]*)\)", " ".join(capsys.readouterr().out.split()))
    first = ["rbf", "0.0", "1e-05", "False", "10000, mlp: 2500", "256", "0.04, mlp: 0.008"]
    last = ["40", "10000", "0", mock.ANY, "runs/ddpm_swissroll_2015"]
    assert [default.strip() for default in shown] == first + last


def test_the_flags_reach_training_and_the_bar_shows_K_minus_L_null(tmp_path, monkeypatch):
    texts, batches, rates, drawn, roll = [], set(), [], [], m.make_swiss_roll
    monkeypatch.setattr(m, "make_swiss_roll", lambda *args: batches.add(args) or roll(*args))
    monkeypatch.setattr(m.tqdm, "set_postfix_str", lambda bar, text, refresh: texts.append(text))
    monkeypatch.setattr(m, "evaluate", lambda *args: {})
    monkeypatch.setattr(m, "draw", lambda *args: drawn.append(args))
    hook = register_optimizer_step_pre_hook(lambda x, *_: rates.append(x.param_groups[0]["lr"]))
    fixed = "--net mlp --noise 0.1 --fixed-schedule --batch-size 77 --lr 1e-4 --steps 150".split()
    m.main([*TINY, *fixed, "--out", str(tmp_path)])
    hook.remove()
    states, history = drawn[0][-2:]
    assert list(states) == [5, 2, 0] and batches == {(77, 0.1)}  # other states take memory
    assert max(rates) == pytest.approx(1e-4, rel=0.01)
    assert texts[-1] == f"K - L_null {sum(history[-100:]) / 100:.3f}" and len(texts) == 150
    first = torch.load(tmp_path / "model.pt")["model"]
    assert torch.equal(first["logit_beta"], build(False, 5, 1e-3).logit_beta)
    m.main([*TINY, "--out", str(tmp_path)])
    learned = torch.load(tmp_path / "model.pt")["model"]
    assert torch.all(learned["logit_beta"] != first["logit_beta"])
    for readout, columns in ((first["readout"], 5), (learned["readout"], 4)):
        assert readout.shape[2] == columns and torch.all(readout[:2] == 0)  # a forward step
        assert torch.all(readout[2:].abs().amax(1) > 0)


@pytest.mark.parametrize("net", ["rbf", "mlp"])
def test_same_seed_same_numbers_also_on_another_device_which_is_found(net, tmp_path):
    flags = ["--net", net, "--out", str(tmp_path)]
    metrics = m.main([*TINY, *flags])
    samples = np.load(tmp_path / "samples.npy")
    with pretend_device() as device:
        assert m.main([*TINY[:-2], *flags]) == pytest.approx(metrics, rel=1e-4)
    assert np.allclose(np.load(tmp_path / "samples.npy"), samples, atol=1e-4)
    saved = torch.load(tmp_path / "model.pt")  # on the CPU, so that it loads anywhere
    places = {tensor.device.type for tensor in saved["model"].values()}
    assert saved["flags"]["device"] == device and places == {"cpu"}


def test_a_loss_that_is_not_finite_ends_with_one_line_of_its_own(tmp_path, monkeypatch, capsys):
    batches = iter([torch.randn(8, 2), torch.randn(8, 2), torch.full((8, 2), math.nan)])
    monkeypatch.setattr(m, "make_swiss_roll", lambda n, noise: next(batches))
    with pytest.raises(SystemExit, match="^K is nan at step 3: choose --lr below 0.04$"):
        m.main([*TINY, "--steps", "9", "--out", str(tmp_path)])
    assert capsys.readouterr().err.endswith("\n") and not os.listdir(tmp_path)  # bar is finished


def test_first_is_written_what_cannot_be_made_again(tmp_path, monkeypatch):
    order = ["model.pt", "samples.npy", "metrics.json"]
    for name in ("draw", "evaluate", "DiffusionModel.p_sample_loop"):
        monkeypatch.setattr(f"{m.__name__}.{name}", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            m.main([*TINY, "--out", str(tmp_path / name)])
        assert sorted(os.listdir(tmp_path / name)) == sorted(order)
        order.pop()


MISTAKES = ["--steps 0", "--samples 0", "--batch-size 0", "--T 1", "--T 1001", "--lr inf"]
MISTAKES += ["--beta1 nan", "--noise -0.1", "--seed -1", "--net unet", "--device cuda:99"]


@pytest.mark.parametrize("flag", [*MISTAKES, "--out file/x"])
def test_a_mistake_gives_one_line_and_exit_code_2(flag, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    wanted = "choose " if flag in MISTAKES else ""
    refuses(m.main, [*TINY, "--out", "new", *flag.split()], *flag.split(), wanted)
    assert os.listdir(tmp_path) == ["file"]
