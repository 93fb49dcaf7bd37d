"""What ddpm_2d.py has of its own: exact toy data, network, points of files, from flags to files."""

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pretend_device import pretend_device
from test_diffusion import within_six_errors
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import ddpm_2d
from ddpm_2d import TOYS, Diffusion, Mixture, NoisePredictor, linear_schedule, main, read_points

SMALL = "--T 21 --steps 20 --batch-size 64 --samples 300".split()
NO_PICTURE = {"draw": lambda *args: None}
every_set = pytest.mark.parametrize("name", TOYS)


def run(out, *flags, **stubs):
    """main with a small budget, and with some functions of the script replaced."""
    with mock.patch.dict(vars(ddpm_2d), stubs):
        metrics = main([*SMALL, "--out", str(out), *map(str, flags)])
    return metrics, np.load(out / "samples.npy")


def built(out, *flags):
    """What main hands to train: diffusion, net, data, steps, batch size, learning rate."""
    with pytest.raises(SystemExit) as exit:
        run(out, *flags, train=lambda *args: sys.exit(args))
    return exit.value.code


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("2d")


@pytest.fixture(scope="session")
def toys(folder):
    return {name: built(folder, "--data", name)[2] for name in TOYS}


def density(centers, sd):
    """The mixture by torch.distributions, in float64."""
    parts = Independent(Normal(centers.double(), sd), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(centers)).double()), parts)


# toy sets
@every_set
def test_toy_sets_are_standardised_mixtures_of_known_density(toys, name):
    data = toys[name]
    var = data.centers.var(0, correction=0) + data.sigma**2
    assert data.centers.mean(0).abs().max() < 1e-5 and (var - 1).abs().max() < 1e-5
    torch.manual_seed(0)
    x = data.sample(100_000)
    assert x.shape == (100_000, 2) and x.dtype == torch.float32 and data.sigma == 0.08
    assert within_six_errors(x, 0) and within_six_errors(x**2, 1)
    others = density(*data).sample((5000,)).float()
    assert within_six_errors(data.log_prob(x[:5000]) - data.log_prob(others), 0)
    x = torch.cat([x[:50], torch.randn(50, 2)])
    want = density(*data).log_prob(x.double()).float()
    torch.testing.assert_close(data.log_prob(x), want, rtol=1e-4, atol=1e-2)


@every_set
@given(st.integers(0, 999))
def test_ideal_eps_is_the_slope_of_the_density_of_xt_at_any_t(toys, name, seed):
    """Tweedie: E[eps | x_t] = -sd grad log q(x_t), and q(x_t) is a mixture as well."""
    data, diffusion = toys[name], Diffusion(linear_schedule(100))
    torch.manual_seed(seed)
    t = torch.randint(1, 101, (3,))
    xt = diffusion.q_sample(data.sample(3), t, torch.randn(3, 2)).double().requires_grad_()
    for k, a in enumerate([diffusion.alpha_bar[step] for step in t]):
        blurred = density(a**0.5 * data.centers, (a * data.sigma**2 + 1 - a) ** 0.5)
        (-blurred.log_prob(xt[k]) * (1 - a) ** 0.5).backward()
    got = data.ideal_eps(diffusion, xt.detach().float(), t)
    torch.testing.assert_close(got, xt.grad.float(), rtol=2e-3, atol=5e-3)


def test_toys_have_the_shapes_of_their_names():
    """All but the board are curves, whose radius grows evenly with the angle, or not at all."""
    sets = {name: torch.view_as_complex(TOYS[name].contiguous()) for name in TOYS}
    ring, roll = sets["8gaussians"], sets["swissroll"]
    outer, inner = sets["circles"].chunk(2)
    upper, lower = sets["moons"].chunk(2)
    arm, opposite = sets["spirals"].chunk(2)
    curves = [(ring, 1, 1, 7 / 8), (outer, 1, 1, 599 / 600), (inner, 0.5, 0.5, 599 / 600)]
    curves += [(upper, 1, 1, 599 / 1200), (arm, 0.029, 1, 1.456), (roll, 1.002, 2.998, 599 / 400)]
    for curve, first, last, turns in curves:
        steps = (curve[1:] / curve[:-1]).angle() / (2 * torch.pi * turns)
        radius = first + (last - first) * steps.cumsum(0)
        torch.testing.assert_close(curve.abs()[1:], radius, rtol=0, atol=1e-3)
        assert steps.sum() == pytest.approx(1, abs=1e-3)
        assert curve is arm or steps.std() < 1e-9
    assert (upper.imag > 0).all()
    torch.testing.assert_close(lower, 1 + 0.5j - upper)
    torch.testing.assert_close(opposite, -arm)
    # t (cos t, sin t), as that of scikit-learn
    torch.testing.assert_close(roll, torch.polar(roll.abs(), 1.5 * torch.pi * roll.abs()))
    cells, counts = TOYS["checkerboard"].floor().unique(dim=0, return_counts=True)
    black = [[x, y] for x in range(4) for y in range(4) if (x + y) % 2 == 0]
    assert cells.tolist() == black and (counts == 100).all()


# network
def random_net(T, *size):
    """All weights random, also those that start at zero."""
    torch.manual_seed(0)
    net = NoisePredictor(T, *size)
    torch.nn.init.normal_(net.out.weight, std=0.1)
    return net


def test_network_depends_on_point_and_share_of_T_and_on_no_other_row():
    """Networks of 50 and of 1000 steps with the same weights agree at the same share of T. Where
    nothing is learned, all of x_t is noise; a path leads past the layers."""
    net = random_net(50)
    xt, t = torch.randn(6, 2), torch.tensor([2, 10, 25, 35, 45, 50])
    whole = net(xt, t)
    torch.testing.assert_close(random_net(1000)(xt, 20 * t), whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(net(xt[2:3], t[2:3]), whole[2:3])
    for p in net.layers.parameters():
        torch.nn.init.zeros_(p)
        for other in (net(xt + 0.1, t) - 0.1, net(xt, t - 1)):
            assert ((other - net(xt, t)).abs().sum(1) > 1e-4).all()
    untrained = NoisePredictor(50)
    torch.testing.assert_close(untrained(xt, t), xt + untrained.out.bias)


def test_features_are_sine_and_cosine_of_each_angle():
    """Two cosines cannot tell x from -x."""
    net, seen = random_net(100), []
    net.inp.register_forward_pre_hook(lambda module, args: seen.extend(args))
    xt, t = torch.randn(7, 2), torch.arange(1, 8)
    net(xt, t)
    _, sine, cosine = seen[0].split([2, 48, 48], 1)
    angle = torch.cat([xt @ net.point_freq, t[:, None] * net.time_freq], 1)
    turned = torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(torch.complex(cosine, sine), turned, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("width", "layers"), [(128, 3), (64, 5)])
def test_every_layer_is_one_of_its_own_and_gets_a_gradient(width, layers):
    net, diffusion = random_net(100, width, layers), Diffusion(linear_schedule(100))
    sizes = [99 * width, layers * (width + 1) * width, (width + 1) * 2]  # of 2 + 2 (32 + 16)
    assert sum(p.numel() for p in net.parameters()) == sum(sizes)
    diffusion.p_losses(net, torch.randn(16, 2)).mean().backward()
    assert all(p.grad.any() for p in net.parameters())


def test_each_layer_adds_to_what_it_gets_and_silu_lets_only_positive_numbers_through():
    """Each doubles the positive ones, and adds 20 to all: 50 becomes 120, 260, 540."""
    net = random_net(50)
    for p in net.parameters():
        torch.nn.init.zeros_(p)
    for layer in net.layers:
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.constant_(layer.bias, 20)
    torch.nn.init.constant_(net.out.weight, 1 / 128)  # the mean
    for start, end, slope in ((50, 540, 8), (-50, 10, 1), (-100, 0, 0)):
        torch.nn.init.constant_(net.inp.bias, start)
        net.inp.bias.grad = None
        got = net(torch.zeros(1, 2), torch.ones(1))[0, 0]
        got.backward()
        assert got.item() == pytest.approx(end, abs=0.01)
        assert net.inp.bias.grad.sum().item() == pytest.approx(slope, abs=0.01)


# points of files
numbers = st.floats(allow_nan=False, allow_infinity=False)
pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9)
separators = [",", ";", "\t", " ", "   ", ", ", " ; "]
headers = ["", "x{}y\n", '"length, mm"{}"width, mm"\n', "# made by hand\n", "1st{}2nd\n\n"]
forms = ["{!r}", "{:.17g}", "{:+.17E}", '"{!r}"', " {!r} "]
ends = ["\n", "\r\n", "\n\n", "\n   \n", "  # a note, 1\n", "\n#\n"]
choices = (separators, headers, forms, ends, ["utf-8", "utf-8-sig"])


@given(pairs, st.tuples(*map(st.sampled_from, choices)))
@example([(1e3, 2.0)], (",", "", "{:.0E}", "\n", "utf-8"))  # 1E+03: a letter, and no header
def test_points_are_read_as_they_were_written(folder, points, choice):
    separator, header, form, end, code = choice
    rows = [separator.join(map(form.format, point)) for point in points]
    path = folder / "points.csv"
    path.write_bytes((header.format(separator) + end.join([*rows, ""])).encode(code))
    read = read_points(path)
    assert read.dtype == torch.float64 and read.tolist() == [list(point) for point in points]


BAD_LINES = [("nan,inf\n5,6", 1), ("\n\n# x\n5,6\n-inf,3", 5), ("x\ty\n1\t\t2", 2), ("1,2\n,", 2)]
BAD_LINES += [("x,y\n1,2\nx,y", 3), ("x,1\n1,2", 1)]  # no header
BAD_LINES += [("1,2\n3", 2), ("x,y,z\n1,2,3", 2), (",x,y\n0,1,2", 1)]  # one, three, an index
BAD_LINES += [("x;y\n1,5;2,5", 2), ("1,5 2,5", 1)]  # decimal commas
BAD = {  # content, and what the message says
    "header.csv": (b"x,y\n\n", "no points in"),
    "utf16.csv": ("x,y\n1,2\n".encode("utf-16"), "utf-8", "0xff"),
    "zip.npy": (b"PK\x03\x04 as of an .npz", "magic string"),
    "cut.npy": (b"\x93NUMPY", "EOF"),
    "objects.npy": (np.array([[1, None]]), "Python objects"),  # a pickle, which is not opened
    "none.npy": (np.zeros((0, 2)), "no points in"),
}
for k, (text, number) in enumerate(BAD_LINES):
    line = f"line {number} is {text.splitlines()[number - 1]!r}, not two finite numbers"
    BAD[f"line{k}.csv"] = text.encode(), line
ARRAYS = [np.zeros((5, 3)), np.zeros(4), np.eye(2)[None], np.array([[1, 2], [3, np.nan]])]
ARRAYS += [np.array([["1", "2"]]), np.ones((2, 2), bool), np.zeros((3, 2), complex)]
for k, array in enumerate(ARRAYS):
    BAD[f"array{k}.npy"] = array, f"{array.dtype} {array.shape}, not finite numbers [n, 2]"


@pytest.mark.parametrize("name", BAD)
def test_unusable_files_are_refused_with_what_they_hold(name, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    content, *words = BAD[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(name, content)
    refuses(main, [*SMALL, "--data", name, "--out", tmp_path / "out"], f"--data {name} (", *words)
    assert [*tmp_path.iterdir()] == [tmp_path / name]


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e9), st.sampled_from([[0, 1], [1, 0]]))
@example(1.75e9, 1.0, [1, 0])  # seconds since 1970
@example(0.0, 1e-12, [0, 1])
def test_shift_scale_and_exchange_of_the_axes_go_to_the_samples(folder, shift, scale, order):
    """The network sees the same points, or exchanged; its samples come back in the new units."""
    points = np.random.default_rng(0).normal([1, -2], [3, 0.5], (20, 2))
    moved = ((points + [shift, -shift]) * [scale, 2 * scale])[:, order]
    seen, stubs = [], {"evaluate": lambda *args: {}, **NO_PICTURE}
    stubs["train"] = lambda diffusion, net, data, *_: seen.append(data.centers) or [0.0]
    for data in (points, moved):
        np.save(folder / "points.npy", data)
        _, samples = run(folder, "--samples", 5, "--data", folder / "points.npy", **stubs)
        seen.append((samples - data.mean(0)) / data.std(0))
    centers, samples, others, back = seen
    torch.testing.assert_close(others, centers[:, order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(back, samples, rtol=0, atol=1e-5)


@pytest.mark.parametrize("points", [[[7, -3]], [[7, -3], [8, -5]], [[7, -3], [7, -5], [7, 0]]])
def test_few_points_and_columns_of_one_value_are_trained(points, tmp_path):
    np.save(tmp_path / "points.npy", points)
    flags = ["--data", tmp_path / "points.npy", "--steps", 100]
    metrics, samples = run(tmp_path, *flags, **NO_PICTURE)
    assert metrics.keys() == {"loss", "bound_nats"} and 0 < metrics["loss"] < 1.5
    assert samples.dtype == np.float64 and np.isfinite(samples).all()
    np.testing.assert_allclose(samples.mean(0), np.mean(points, 0), atol=1)


# evaluation
def judged(data, diffusion, model, samples=None):
    """The scores of a model and of samples, its own if none are given."""
    torch.manual_seed(0)
    if samples is None:
        *_, samples = diffusion.p_sample_loop(model, torch.randn(1000, 2))
    torch.manual_seed(1)
    return ddpm_2d.evaluate(diffusion, model, data, samples)


def test_exact_model_gets_perfect_scores(toys):
    """excess_loss is 0 only if both are judged on the same x_0 and noise. The unit is a nat."""
    data, diffusion = toys["8gaussians"], Diffusion(linear_schedule(200))
    model = partial(data.ideal_eps, diffusion)
    metrics = judged(data, diffusion, model)
    assert metrics["excess_loss"] == 0 and metrics["bound_nats"] == metrics["ideal_bound_nats"]
    torch.manual_seed(1)
    entropy = -density(*data).log_prob(data.sample(512).double()).mean().item()
    assert metrics["entropy_nats"] == pytest.approx(entropy, abs=2e-4)
    assert metrics["bound_nats"] - entropy == pytest.approx(1.04, abs=0.1)  # 0.24 with T = 1000
    assert metrics["off_support"] < 0.01
    metrics = judged(data, diffusion, model, data.sample(100_000))
    assert metrics["off_support"] == pytest.approx(0.001, abs=0.001)


def test_useless_models_get_bad_scores(toys):
    """eps = 0 has E[eps^2] = 1 and samples far off; eps = noise x_t draws from N(0, I)."""
    data, diffusion = toys["8gaussians"], Diffusion(linear_schedule(21))
    metrics = judged(data, diffusion, lambda xt, t: 0 * xt)
    assert abs(metrics["loss"] - 1) < 6 * math.sqrt(2 / (512 * 2 * 21))
    relative = metrics["loss"] / metrics["ideal_loss"] - 1  # the difference is below 1
    assert metrics["excess_loss"] == pytest.approx(relative, abs=2e-3) and relative > 2
    assert metrics["off_support"] > 0.9
    metrics = judged(data, diffusion, lambda xt, t: diffusion.noise[t, None] * xt)
    assert 0.5 < metrics["off_support"] < 0.95
    assert metrics["bound_nats"] > metrics["ideal_bound_nats"] + 1
    metrics = judged(data, diffusion, lambda xt, t: xt * math.nan)
    assert metrics["loss"] is metrics["bound_nats"] is metrics["excess_loss"] is None  # null
    assert metrics["off_support"] == 1 and metrics["ideal_loss"] > 0


# from flags to files
def test_training_obeys_its_flags_and_shows_the_mean_of_the_last_100_losses(tmp_path, monkeypatch):
    """A weight whose gradient always has one sign moves by the learning rate at each step, which
    falls to nothing. On the bar: neither the last loss, nor the mean of all."""
    seen, texts = [], []
    monkeypatch.setattr(ddpm_2d.tqdm, "set_postfix_str", lambda bar, text, **_: texts.append(text))

    class Probe(torch.nn.Linear):
        def forward(self, xt, t):
            seen.append((len(xt), self.bias[0].item()))
            return self.bias + 1000 + 0 * xt

    flags = "--steps 130 --batch-size 7 --lr 0.3 --T 50".split()
    diffusion, _, data, *budget = built(tmp_path, *flags)
    assert diffusion.beta[1:] == linear_schedule(50).tolist()
    losses = ddpm_2d.train(diffusion, Probe(2, 2), data, *budget)
    sizes, bias = zip(*seen, strict=True)
    moves = -np.diff(bias)
    assert sizes == (7,) * 130 and moves[0] == pytest.approx(0.3, rel=0.05)
    assert (np.diff(moves) < 0).all() and 0 < moves[-1] < 0.01
    assert [texts[0], texts[129]] == [f"loss {losses[0]:.3f}", f"loss {sum(losses[30:]) / 100:.3f}"]


def test_help_shows_the_defaults_which_run_in_a_notebook(tmp_path, monkeypatch, capsys):
    """All numbers of the pages rest on them. In a notebook, sys.argv is that of the kernel."""
    defaults = {"data": "8gaussians", "steps": "4000", "batch-size": "1024", "lr": "0.005"}
    defaults |= dict(T="1000", samples="10000", seed="0", device="cpu", out="runs/ddpm_2d")
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.partition("--help ")[2].split())
    assert dict(re.findall(r" --([\w-]+)(?: \S+)+? \(default: (.*?)\)", text)) == defaults
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(ddpm_2d, "train", lambda *args: sys.exit("trains"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^trains$"):
        main()


def test_short_training_comes_near_the_best_loss_and_its_files_hold_what_was_judged(tmp_path):
    """Every sample, in the units of the data; the picture gets no more points than it shows."""
    drawn, judged, evaluate = [], [], ddpm_2d.evaluate
    stubs = {"draw": lambda *args: drawn.extend(args)}
    stubs["evaluate"] = lambda *args: judged.extend(args) or evaluate(*args)
    flags = "--steps 400 --batch-size 512 --T 100 --samples 5000".split()
    metrics, samples = run(tmp_path, *flags, **stubs)
    assert 0 < metrics["excess_loss"] < 0.2 and metrics["off_support"] < 0.15
    assert 0 < metrics["bound_nats"] - metrics["ideal_bound_nats"] < 0.7
    states = drawn[3]
    assert within_six_errors(states[0], 0) and within_six_errors(states[0] ** 2, 1)
    _, net, data, x0 = judged
    assert states.shape == (101, 4000, 2) and torch.equal(states[-1], x0[:4000])
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    again = NoisePredictor(saved["T"])
    again.load_state_dict(saved["net"])
    t = torch.randint(1, 101, (5000,))
    assert torch.equal(again(x0, t), net(x0, t))
    assert saved["T"] == 100 and len(saved["losses"]) == 400
    centers = (TOYS[saved["data"]] - saved["mean"]) / saved["std"]
    assert torch.equal(centers.float(), data.centers) and saved["sigma"] == data.sigma
    assert torch.equal(torch.from_numpy(samples), x0.double() * saved["std"] + saved["mean"])


@pytest.mark.parametrize("T", [21, 1000])
def test_every_panel_shows_the_state_of_its_title_and_has_room(T, toys, folder, monkeypatch):
    figure = ddpm_2d.Figure(figsize=(13, 5), layout="constrained")
    monkeypatch.setattr(ddpm_2d, "Figure", lambda **more: figure)
    data, diffusion = Mixture(torch.tensor([[5.0, 5.0]]), 0.0), Diffusion(linear_schedule(T))
    states = [torch.full((9, 2), float(t)) for t in range(T, -1, -1)]
    ddpm_2d.draw(folder / "process.png", diffusion, data, states)
    seen = {"q": [], "p": []}
    for ax in figure.axes:
        name, t = ax.get_title().split(", t = ")
        seen[name].append(int(t))
        points = torch.tensor(np.asarray(ax.collections[0].get_offsets())).float()
        want = 5 * diffusion.signal[int(t)] if name == "q" else int(t)
        assert (points.mean(0) - want).abs().max() <= (0.1 if name == "q" else 0)
        assert ax.get_xlim() == ax.get_ylim() == (-2.7, 2.7) and ax.get_aspect() == 1
    assert seen["q"] == seen["p"] and (len(seen["p"]), min(seen["p"]), max(seen["p"])) == (6, 0, T)
    assert all(data.centers.abs().max() < 2.7 - 3 * 0.08 for data in toys.values())


WRONG = ["--T 20", "--T 10000000000", "--steps 0", "--batch-size -3", "--samples 0", "--seed -1"]
WRONG += ["--lr -1", "--lr nan", "--device gpu", "--steps x", "--data moon", "--out file"]
WRONG += [f"--out {Path('file', 'below')}"]
HINTS = {"--T 20": "21", "--device gpu": "cpu", "--data moon": "toy sets: 8gaussians, moons"}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_flags_are_refused_in_one_line_that_names_them(flag, refuses, tmp_path, monkeypatch):
    """And nothing is left on disk."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    argv = [*SMALL, "--out", "new/out", *flag.split()]
    line = refuses(main, argv, *flag.split(), HINTS.get(flag, ""))
    assert set(re.findall(r" --[\w-]+", line)) <= {f" {flag.split()[0]}"}
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_loss_that_is_not_finite_ends_and_keeps_the_old_model(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"old")
    with pytest.raises(SystemExit, match=r"^loss .* at step \d+: .* lower --lr$"):
        run(tmp_path, "--lr", 1e9, "--steps", 50)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model.pt": b"old"}


def test_scores_of_many_samples_need_little_memory(toys):
    """All densities of 30,000 samples and 1,200 centers at once are 36 million numbers."""
    samples = torch.randn(30_000, 2)
    with mock.patch("torch.cdist", wraps=torch.cdist) as cdist:
        judged(toys["moons"], Diffusion(linear_schedule(21)), lambda xt, t: xt, samples)
    sizes = [len(x) * len(centers) for (x, centers), _ in cdist.call_args_list]
    assert 1e6 < max(sizes) < 2e7


def test_program_leaves_its_files_and_a_device_gives_the_same_numbers(tmp_path):
    """A pretend device, which refuses CPU tensors: all of main, with its pictures."""
    command = [sys.executable, ddpm_2d.__file__, *SMALL, "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    here = tmp_path / "runs" / "ddpm_2d"
    files = {here / name for name in ("metrics.json", "model.pt", "process.png", "samples.npy")}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files
    strict = partial(json.loads, parse_constant=pytest.fail)  # NaN is no JSON
    written = strict((here / "metrics.json").read_text())
    assert strict(done.stdout) == written
    with pretend_device() as device:
        metrics, samples = run(tmp_path)
    there = strict((tmp_path / "metrics.json").read_text())
    assert there["device"] == device and there.keys() == written.keys()
    assert {key: written[key] for key in metrics} == pytest.approx(metrics, rel=1e-4, abs=2e-4)
    np.testing.assert_allclose(np.load(here / "samples.npy"), samples, rtol=1e-3, atol=1e-3)
    another, other = run(tmp_path, "--seed", 1, **NO_PICTURE)
    assert metrics["loss"] != another["loss"] and not np.isclose(samples, other).all(1).any()
