"""What ddpm_2d.py has of its own: exact toy data, network, points of files, from flags to files.

Statistical checks allow six standard errors and are seeded.
"""

import io
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretend_device import pretend_device
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import ddpm_2d
from ddpm_2d import TOYS, Diffusion, NoisePredictor, ToyData, cosine_schedule, main, read_points

SMALL = ["--T", "21", "--steps", "20", "--batch-size", "64", "--samples", "300"]
APART = ToyData(torch.tensor([[5.0, -3.0], [-4.0, 7.0], [9.0, 9.0]]), 0.3)  # not standardised
every_set = pytest.mark.parametrize("name", [*TOYS, "apart"])


def built(out, *flags):
    """What main hands to train: diffusion, net, data, steps, batch size, learning rate."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(ddpm_2d, "train", lambda *args: sys.exit(args))
        main([*flags, "--out", str(out)])
    return exit.value.code


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """The six sets as main makes them, and one that is not standardised."""
    out = tmp_path_factory.mktemp("toys")
    return {"apart": APART} | {name: built(out, "--data", name)[2] for name in TOYS}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags): main with a tiny budget, without pictures; returns the metrics and samples."""
    monkeypatch.setattr(ddpm_2d, "draw", lambda *args: None)

    def run(*flags):
        metrics = main([*SMALL, "--out", str(tmp_path), *map(str, flags)])
        return metrics, np.load(tmp_path / "samples.npy")

    return run


@every_set
def test_samples_have_the_moments_of_the_mixture_and_are_standardised(toys, name):
    data, n = toys[name], 100_000
    torch.manual_seed(0)
    x = data.sample(n)
    mean = data.centers.mean(0)
    var = data.centers.var(0, correction=0) + data.sigma**2
    assert x.shape == (n, 2) and x.dtype == torch.float32
    assert ((x.mean(0) - mean).abs() < 6 * (var / n) ** 0.5).all()
    assert ((x.var(0) / var - 1).abs() < 6 * (2 / n) ** 0.5).all()
    if name != "apart":
        assert data.sigma == 0.08 and mean.abs().max() < 1e-5 and (var - 1).abs().max() < 1e-5


@every_set
def test_log_prob_is_the_density_of_the_mixture(toys, name):
    data = toys[name]
    torch.manual_seed(1)
    x = torch.cat([data.sample(50), data.centers.mean(0) + torch.randn(50, 2)])
    parts = Independent(Normal(data.centers.double(), data.sigma), 1)
    exact = MixtureSameFamily(Categorical(torch.ones(len(data.centers)).double()), parts)
    want = exact.log_prob(x.double()).float()
    torch.testing.assert_close(data.log_prob(x), want, rtol=1e-4, atol=1e-2)


@every_set
@given(t=st.integers(1, 100))
def test_ideal_eps_is_bayes_rule_over_the_centers(toys, name, t):
    data, diffusion = toys[name], Diffusion(cosine_schedule(100))
    torch.manual_seed(t)
    steps = torch.full((5,), t)
    xt = diffusion.q_sample(data.sample(5), steps, torch.randn(5, 2))
    a = diffusion.alpha_bar[t]
    var = a * data.sigma**2 + 1 - a
    apart = xt.double()[:, None] - a**0.5 * data.centers.double()  # [5, m, 2]
    weight = torch.softmax(-apart.square().sum(2) / (2 * var), 1)
    # given its center, (eps, x_t) is Gaussian: E[eps | x_t, c] = sd (x_t - sqrt(a) c) / var
    want = (weight[:, :, None] * (1 - a) ** 0.5 * apart / var).sum(1).float()
    torch.testing.assert_close(data.ideal_eps(diffusion, xt, steps), want, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize(("name", "t"), [("swissroll", 5), ("moons", 30), ("apart", 70)])
def test_ideal_eps_is_the_best_prediction(toys, name, t):
    data, diffusion = toys[name], Diffusion(cosine_schedule(100))
    torch.manual_seed(2)
    steps, eps = torch.full((10_000,), t), torch.randn(10_000, 2)
    best = data.ideal_eps(diffusion, diffusion.q_sample(data.sample(10_000), steps, eps), steps)
    for other in (best * 0.9, best * 1.1, best + 0.1, best + torch.randn(10_000, 2) * 0.1):
        assert (other - eps).square().mean() > (best - eps).square().mean()


def turns(curve):
    """By what angle a curve in the complex plane turns around 0 from each point to the next."""
    return (curve[1:] / curve[:-1]).angle() / (2 * torch.pi)


def test_toys_have_the_shapes_of_their_names():
    for name, count, radius in (("8gaussians", 8, 1), ("circles", 600, 1), ("circles", 600, 0.5)):
        ring = TOYS[name][(TOYS[name].abs() - radius).abs() < 1e-9]
        around = turns(torch.cat([ring, ring[:1]]))  # evenly, and without a seam
        torch.testing.assert_close(around, torch.full_like(around, 1 / count))
    upper, lower = TOYS["moons"].chunk(2)
    torch.testing.assert_close(lower, 1 + 0.5j - upper)
    assert (upper.imag > 0).all() and turns(upper).sum() == pytest.approx(0.5, rel=0.01)
    torch.testing.assert_close(upper.abs(), torch.ones(600).double())
    arm, opposite = TOYS["spirals"].chunk(2)
    torch.testing.assert_close(opposite, -arm)
    for spiral in (arm, TOYS["swissroll"]):  # one and a half turns, evenly farther out
        slope = spiral.abs().diff() / turns(spiral)
        torch.testing.assert_close(slope, slope[:1].expand(len(slope)))
        assert slope[0] > 0 and turns(spiral).sum() == pytest.approx(1.5, rel=0.05)
    cells = torch.view_as_real(TOYS["checkerboard"]).floor().unique(dim=0, return_counts=True)
    black = [[x, y] for x in range(4) for y in range(4) if (x + y) % 2 == 0]
    assert cells[0].tolist() == black and (cells[1] == 100).all()


def test_output_is_signal_v_plus_noise_xt_and_v_a_function_of_t_over_T():
    """Networks for 50 and 1000 steps with the same weights give one v at the same fraction."""
    x, v = torch.randn(9, 2), []
    for T in (50, 1000):
        torch.manual_seed(0)
        diffusion = Diffusion(cosine_schedule(T))
        net, t = NoisePredictor(diffusion), torch.full((9,), T // 2)
        untrained = diffusion.q_sample(net.out.bias.expand(9, 2), t, x)  # v is the last bias
        torch.testing.assert_close(net(x, t), untrained)
        torch.nn.init.normal_(net.out.weight)
        v.append((net(x, t) - diffusion.noise[t, None] * x) / diffusion.signal[t, None])
    torch.testing.assert_close(*v, rtol=1e-3, atol=1e-3)


def test_network_depends_on_point_and_time_and_on_no_other_row():
    torch.manual_seed(0)
    net = NoisePredictor(Diffusion(cosine_schedule(100)))
    torch.nn.init.normal_(net.out.weight, std=0.1)
    xt, t = torch.randn(6, 2), torch.tensor([5, 20, 50, 70, 90, 100])
    whole = net(xt, t)
    for other in (net(xt + 0.1, t), net(xt, t - 1)):
        assert ((other - whole).abs().sum(1) > 1e-4).all()
    torch.testing.assert_close(net(xt[2:3], t[2:3]), whole[2:3])
    for p in net.layers.parameters():
        torch.nn.init.zeros_(p)
    net(xt, t).sum().backward()
    assert net.inp.weight.grad.any()  # a path leads past the layers


def test_every_parameter_learns_until_one_batch_is_known_by_heart():
    torch.manual_seed(15)
    net = NoisePredictor(Diffusion(cosine_schedule(100)))
    x0, eps, t = torch.randn(16, 2), torch.randn(16, 2), torch.randint(1, 60, (16,))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(300):
        loss = net.diffusion.p_losses(net, x0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3
    assert all(p.grad.any() for p in net.parameters())


def npy(array, save=np.save, **more):
    """The bytes of a .npy file."""
    save(file := io.BytesIO(), array, **more)
    return file.getvalue()


ARRAY = np.array([[1, -2], [300, 4], [25, 6]])
GOOD = {
    "digit.csv": b"1st,2nd\n1,-2\n3e2,4\n25,6\n",
    "quotes.csv": b'"length","width"\n"1","-2"\n3e2,4\n25,6\n',
    "bom.csv": b"\xef\xbb\xbf1,-2\n3e2,4\n25,6\n",
    "semicolons.csv": b"x, mm;y, mm\n1;-2\n3e2;4\n25;6\n",
    "tabs.tsv": b"x\ty\n1\t-2\n3e2\t4\n25\t6",
    "windows.csv": b"x, y\r\n1, -2\r\n3e2, 4\r\n25, 6\r\n\r\n",
    "ends.csv": b"\n\n1e0,-2\n3e2,4\n\n25,6\n\n\n",
    "notes.txt": b"# my points\n 1   -2  # the first\n3e2 4\n#\n25 6\n",
    "columns.npy": npy(np.asfortranarray(ARRAY.astype(np.int16))),
}


@pytest.mark.parametrize("name", GOOD)
def test_points_are_read_from_every_kind_of_file(name, tmp_path):
    (tmp_path / name).write_bytes(GOOD[name])
    for path in (tmp_path / name, str(tmp_path / name)):
        points = read_points(path)
        assert points.dtype == torch.float64 and points.tolist() == ARRAY.tolist()


FINITE, COLUMNS, NUMBERS = "two finite numbers", "two columns", "numbers [n, 2]"
BAD = {  # content, and what the message says
    "missing.csv": (None, "No such file"),
    "empty.csv": (b"", "[0, 2]", NUMBERS),
    "header.csv": (b"x,y\n", "[0, 2]", NUMBERS),
    "nan_first.csv": (b"nan,3\n5,6\n", "row 1", "'nan,3'", FINITE),
    "gap_first.csv": (b"1,\n5,6\n", "row 1", "'1,'", FINITE),
    "inf.csv": (b"inf,3\n5,6\n", "row 1", "'inf,3'", FINITE),
    "header_word.csv": (b"x,y\n1,2\n3,x\n", "row 3", "'3,x'", FINITE),
    "header_ragged.csv": (b"x,y\n1,2\n3\n", "row 3", "'3'", COLUMNS),
    "index.csv": (b",x,y\n0,1,2\n1,3,4\n", "row 1", "',x,y'", "index=False"),
    "utf16.csv": ("x,y\n1,2\n".encode("utf-16"), "UTF-8", r"\xff\xfe"),
    "points.npz": (npy(ARRAY, np.savez), "UTF-8", "PK"),
    "points_npz.npy": (npy(ARRAY, np.savez), ""),
    "empty.npy": (b"", ""),
    "objects.npy": (npy(np.array([[1, None]]), allow_pickle=True), "bject"),
    "nan.npy": (npy(np.array([[1, 2], [3, np.nan]])), "row 2", "nan", FINITE),
}
ARRAYS = [np.zeros((5, 3)), np.zeros((0, 2)), np.zeros(4), np.float64(3)]
ARRAYS += [np.zeros((3, 2), complex), np.array([["1", "2"]])]
for k, array in enumerate(ARRAYS):
    BAD[f"array{k}.npy"] = (npy(array), str(list(array.shape)), str(array.dtype), NUMBERS)


@pytest.mark.parametrize("name", BAD)
def test_unusable_files_are_refused_with_what_they_hold(name, tmp_path, refuses):
    path, (content, *words) = tmp_path / name, BAD[name]
    if content is not None:
        path.write_bytes(content)
    refuses(main, [*SMALL, "--data", path, "--out", tmp_path / "out"], path, *words)


@pytest.mark.parametrize("points", [[[7, -3]], [[7, -3], [8, -5]], [[7, -3], [7, -5], [7, 0]]])
def test_one_point_and_columns_of_one_value_are_trained(points, run, tmp_path):
    np.save(tmp_path / "points.npy", points)
    metrics, samples = run("--data", tmp_path / "points.npy", "--steps", 100)
    assert np.isfinite(samples).all() and 0 < metrics["loss"] < 1.5
    np.testing.assert_allclose(samples.mean(0), np.mean(points, 0), atol=1)


def test_own_points_come_back_in_their_own_units(run, tmp_path):
    """Seconds since 1970 beside a small number: in float32 there would be one value in 128 s."""
    points = np.random.default_rng(0).normal([1.75e9, -3], [60, 0.01], (300, 2))
    np.savetxt(tmp_path / "points.csv", points, delimiter=",", header="time,value", comments="")
    metrics, samples = run("--data", tmp_path / "points.csv", "--steps", 150, "--batch-size", 256)
    assert set(metrics) == {"loss", "bound_nats"}
    assert samples.dtype == np.float64 and samples.shape == (300, 2)
    assert len(np.unique(samples[:, 0])) > 290
    np.testing.assert_allclose((samples.mean(0) - [1.75e9, -3]) / [60, 0.01], 0, atol=0.5)
    np.testing.assert_allclose(samples.std(0), [60, 0.01], rtol=0.4)


def test_same_seed_gives_the_same_numbers_in_tiny_and_huge_units_and_another_others(run, tmp_path):
    """Units of powers of two, 1e-12 and 1e12 nearly, so that the numbers are the very same."""
    points = np.random.default_rng(0).normal([1, -2], [3, 0.5], (100, 2))
    results = []
    for scale, seed in ((1, 3), (2.0**-40, 3), (2.0**40, 3), (1, 4)):
        np.save(tmp_path / "points.npy", points * scale)
        metrics, samples = run("--data", tmp_path / "points.npy", "--seed", seed)
        results.append((metrics, (samples / scale).tolist()))
    assert results[0] == results[1] == results[2]
    assert results[0][0]["loss"] != results[3][0]["loss"]
    assert not np.isclose(results[0][1], results[3][1]).all(1).any()


def judged(data, diffusion, model):
    """The scores of a model and of its samples."""
    torch.manual_seed(0)
    *_, samples = diffusion.p_sample_loop(model, torch.randn(1000, 2))
    return ddpm_2d.evaluate(diffusion, model, data, samples)


def test_exact_model_gets_perfect_scores(toys):
    data, diffusion = toys["8gaussians"], Diffusion(cosine_schedule(200))
    model = partial(data.ideal_eps, diffusion)
    metrics = judged(data, diffusion, model)
    assert metrics["excess_loss"] == 0 and metrics["bound_nats"] == metrics["ideal_bound_nats"]
    assert metrics["off_support"] < 0.01
    metrics = ddpm_2d.evaluate(diffusion, model, data, data.sample(10_000))
    assert 0 < metrics["off_support"] < 0.004  # 0.001 is perfect
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.08**2)
    assert abs(metrics["entropy_nats"] - entropy) < 6 / 512**0.5  # sd of log p is 1 for d = 2
    assert 0 < metrics["bound_nats"] - metrics["entropy_nats"] < 2  # the price of fixed variances


def test_useless_models_get_bad_scores(toys):
    """eps = 0 has E[eps^2] = 1 and samples far off; eps = noise x_t draws from N(0, I)."""
    data, diffusion = toys["8gaussians"], Diffusion(cosine_schedule(21))
    metrics = judged(data, diffusion, lambda xt, t: 0 * xt)
    assert abs(metrics["loss"] - 1) < 6 * math.sqrt(2 / (512 * 2 * 21))
    assert metrics["excess_loss"] > 0.5 and metrics["off_support"] > 0.9
    metrics = judged(data, diffusion, lambda xt, t: diffusion.noise[t, None] * xt)
    assert 0.5 < metrics["off_support"] < 0.95
    assert metrics["bound_nats"] > metrics["ideal_bound_nats"] + 1
    metrics = judged(data, diffusion, lambda xt, t: xt * math.nan)
    assert metrics["off_support"] == 1 and metrics["ideal_loss"] > 0
    assert metrics["loss"] is metrics["bound_nats"] is metrics["excess_loss"] is None


def test_flags_of_training_are_obeyed_and_the_learning_rate_falls_to_nothing(tmp_path):
    """A weight whose gradient always has one sign moves by the learning rate at each step."""
    seen = []

    class Probe(torch.nn.Linear):
        def forward(self, xt, t):
            seen.append((len(xt), self.bias[0].item()))
            return self.bias + 1000 + 0 * xt

    flags = "--steps 40 --batch-size 7 --lr 0.3 --schedule linear --T 50"
    diffusion, _, data, *budget = built(tmp_path, *flags.split())
    assert diffusion.beta == ddpm_2d.linear_schedule(50).tolist()
    ddpm_2d.train(diffusion, Probe(2, 2), data, *budget)
    sizes, bias = zip(*seen, strict=True)
    moves = -np.diff(bias)
    assert sizes == (7,) * 40 and moves[0] == pytest.approx(0.3, rel=0.05)
    assert (np.diff(moves) < 0).all() and 0 < moves[-1] < 0.01


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A short training: folder, metrics and what was drawn."""
    out, drawn = tmp_path_factory.mktemp("trained"), []
    flags = ["--steps", "400", "--batch-size", "512", "--T", "100", "--samples", "5000"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm_2d, "draw", lambda *args: drawn.extend(args))
        return out, main([*flags, "--out", str(out)]), drawn


def test_short_training_gets_near_the_best_possible_loss(trained):
    _, metrics, (_, _, data, states, fast) = trained
    assert 0 < metrics["excess_loss"] < 0.2
    assert 0 < metrics["bound_nats"] - metrics["ideal_bound_nats"] < 0.7
    assert metrics["off_support"] < 0.15
    assert len(states) == 101 and len(fast) == 51
    assert abs(states[0].mean()) < 6 / 8000**0.5 and abs(states[0].std() - 1) < 6 / 16_000**0.5
    for state in states:  # of the pictures: no more memory than they show
        assert state.shape == (4000, 2) and state.untyped_storage().nbytes() == 4000 * 2 * 4
    assert torch.cdist(fast[-1], data.centers).min(1).values.median() < 2 * data.sigma


def test_saved_model_is_loaded_in_four_lines_and_gives_the_same_samples(trained):
    out, metrics, (*_, states, fast) = trained
    saved = torch.load(out / "model.pt", weights_only=True)
    diffusion = Diffusion(cosine_schedule(saved["T"]))
    net = NoisePredictor(diffusion)
    net.load_state_dict(saved["net"])
    assert (saved["data"], saved["schedule"], len(saved["losses"])) == ("8gaussians", "cosine", 400)
    assert np.mean(saved["losses"][-50:]) == pytest.approx(metrics["loss"], rel=0.2)
    *_, x = diffusion.ddim_sample_loop(net, states[0])
    torch.testing.assert_close(x, fast[-1])
    samples = torch.from_numpy(np.load(out / "samples.npy"))
    assert torch.equal(samples[:4000], states[-1].double() * saved["std"] + saved["mean"])


@pytest.mark.parametrize("T", [21, 1000])
def test_every_panel_shows_the_state_of_its_title(T, tmp_path, monkeypatch):
    figure = ddpm_2d.Figure(figsize=(13, 7), layout="constrained")
    monkeypatch.setattr(ddpm_2d, "Figure", lambda **more: figure)
    data, steps = ToyData(torch.tensor([[5.0, 5.0]]), 0.0), min(50, T)
    diffusion = Diffusion(cosine_schedule(T))
    states = [torch.full((9, 2), float(t)) for t in range(T, -1, -1)]
    fast = [torch.full((9, 2), T * k / steps) for k in range(steps, -1, -1)]
    ddpm_2d.draw(tmp_path / "process.png", diffusion, data, states, fast)
    seen = set()
    for ax in figure.axes:
        name, t = ax.get_title().split(", t = ")
        seen.add((name, t := int(t)))
        points = torch.tensor(np.asarray(ax.collections[0].get_offsets())).float()
        want = 5 * diffusion.signal[t] if name == "q" else t
        slack = {"q": 0.1, "DDPM": 0, "DDIM": T / steps}[name]
        assert (points.mean(0) - want).abs().max() <= slack
    assert seen >= {(name, t) for name in ("q", "DDPM", "DDIM") for t in (0, T // 2, T)}


WRONG = ["--T 20", "--T 10000000000", "--steps 0", "--batch-size -3", "--samples 0", "--seed -1"]
WRONG += ["--lr -1", "--lr nan", "--lr inf", "--schedule tanh", "--device gpu", "--device cuda:99"]
WRONG += ["--out /dev/null"]  # a file
HINTS = {"--T 20": "21", "--schedule tanh": "cosine", "--device gpu": "cpu, cuda"}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_flags_are_refused_in_one_line(flag, refuses, tmp_path):
    argv = ["--out", tmp_path / "out", *flag.split()]
    refuses(main, argv, argv[2], HINTS.get(flag, ""))


def test_loss_that_is_not_finite_ends_and_keeps_the_old_model(run, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"old")
    with pytest.raises(SystemExit, match=r"loss .* at step \d+: .* lower --lr"):
        run("--lr", 1e9, "--steps", 50)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model.pt": b"old"}


def test_program_leaves_its_files_and_a_device_gives_the_same_numbers(tmp_path, monkeypatch):
    """A pretend device, which refuses CPU tensors: all of main, with its pictures."""
    command = [sys.executable, ddpm_2d.__file__, *SMALL, "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    here = tmp_path / "runs" / "ddpm_2d"
    files = {here / name for name in ("metrics.json", "model.pt", "process.png", "samples.npy")}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files
    written = json.loads((here / "metrics.json").read_text())
    assert json.loads(done.stdout) == written
    with pretend_device() as device:
        built_for = {True: torch.device(device), False: torch.device("cuda")}  # is it there?
        find = "torch.accelerator.current_accelerator"
        monkeypatch.setattr(find, lambda check_available=False: built_for[check_available])
        metrics = main([*SMALL, "--out", str(tmp_path)])
    there = json.loads((tmp_path / "metrics.json").read_text())
    assert there["device"] == device and there.keys() == written.keys()
    assert {key: written[key] for key in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-4)
    samples = [np.load(folder / "samples.npy") for folder in (here, tmp_path)]
    np.testing.assert_allclose(*samples, rtol=1e-3, atol=1e-3)


def test_centers_left_on_the_cpu_are_noticed(toys):
    """A fault of the first edition, which crashed on every GPU."""
    with pretend_device() as device, pytest.raises(RuntimeError, match="same device"):
        toys["moons"].log_prob(torch.zeros(5, 2, device=device))
