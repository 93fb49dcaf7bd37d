"""What ddpm_2d.py has of its own: toy data with an exact density, the network, points from files,
and main from flags to files. (tests/test_diffusion.py holds what both DDPM scripts share.)

Statistical checks allow six standard errors and are seeded.
"""

import gzip
import json
import math
import subprocess
import sys
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
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
TRUTH = {"ideal_loss", "ideal_bound_nats", "excess_loss", "entropy_nats", "off_support"}
FLAGS = {"data", "steps", "batch_size", "lr", "T", "schedule", "samples", "seed", "device", "out"}
APART = ToyData(torch.tensor([[5.0, -3.0], [-4.0, 7.0], [9.0, 9.0]]), 0.3)  # not standardised
sets = pytest.mark.parametrize("name", [*TOYS, "apart"])


class Ready(Exception):
    """main has built what it trains."""


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """The six sets as main makes them, and one that is not standardised."""
    found = {"apart": APART}
    for name in TOYS:

        def stop(diffusion, net, data, *more):
            raise Ready(data)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Ready) as ready:
            patch.setattr(ddpm_2d, "train", stop)
            main(["--data", name, "--out", str(tmp_path_factory.mktemp(name))])
        found[name] = ready.value.args[0]
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags): main with a tiny budget and without the pictures; returns the metrics."""

    def small(*flags, out=tmp_path):
        monkeypatch.setattr(ddpm_2d, "draw", lambda *args: None)
        return main([*SMALL, "--out", str(out), *map(str, flags)])

    return small


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# ------------------------------------------------------------------------------------ the data


@sets
def test_samples_are_the_mixture_and_standardised(toys, name):
    data = toys[name]
    torch.manual_seed(0)
    x = data.sample(100_000)
    assert x.shape == (100_000, 2) and x.dtype == torch.float32
    nearest = torch.cdist(x, data.centers, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    if len(data.centers) < 20:  # they do not overlap
        counts = torch.bincount(nearest, minlength=len(data.centers))
        even = len(x) / len(data.centers)
        assert (counts - even).abs().max() < 6 * even**0.5
        residual = (x - data.centers[nearest]) / data.sigma
        assert residual.mean().abs() < 6 / 200_000**0.5
        assert (residual.var() - 1).abs() < 6 * (2 / 200_000) ** 0.5 + 1e-3
    if name != "apart":
        centers = data.centers.double()
        assert centers.mean(0).abs().max() < 1e-6 and data.sigma == 0.08
        variance = centers.square().mean(0) + data.sigma**2
        torch.testing.assert_close(variance, torch.ones(2).double(), rtol=0, atol=1e-6)
        assert x.mean(0).abs().max() < 6 / 100_000**0.5
        assert (x.var(0) - 1).abs().max() < 6 * (2 / 100_000) ** 0.5


@sets
def test_log_prob_is_the_density_of_the_mixture(toys, name):
    data = toys[name]
    torch.manual_seed(1)
    x = torch.cat([data.sample(50), data.centers.mean(0) + torch.randn(50, 2)])
    parts = Independent(Normal(data.centers.double(), data.sigma), 1)
    exact = MixtureSameFamily(Categorical(torch.ones(len(data.centers)).double()), parts)
    got = data.log_prob(x)
    torch.testing.assert_close(got.double(), exact.log_prob(x.double()), rtol=1e-4, atol=1e-2)
    step = 0.5 * data.sigma
    axis = torch.arange(-6, 11 if name == "apart" else 6, step)
    mass = data.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * step**2
    assert mass.item() == pytest.approx(1, abs=1e-3)
    log_p = data.log_prob(data.sample(20_000))
    if len(data.centers) < 20:  # far apart: entropy of the pick and of one Gaussian
        want = math.log(len(data.centers)) + math.log(2 * math.pi * math.e * data.sigma**2)
        assert abs(log_p.mean().item() + want) < 6 * log_p.std().item() / 20_000**0.5 + 1e-3


@sets
@given(t=st.integers(1, 100))
def test_ideal_eps_is_bayes_rule_over_the_centers(toys, name, t):
    data, diffusion = toys[name], Diffusion(cosine_schedule(100))
    torch.manual_seed(t)
    steps = torch.full((5,), t)
    xt = diffusion.q_sample(data.sample(5), steps, torch.randn(5, 2))
    got = data.ideal_eps(diffusion, xt, steps)
    a = diffusion.alpha_bar[t]
    total = a * data.sigma**2 + 1 - a
    apart = xt.double()[:, None] - a**0.5 * data.centers.double()  # [5, m, 2]
    weight = torch.softmax(-apart.square().sum(2) / (2 * total), 1)
    # given its center, (eps, x_t) is Gaussian: E[eps | x_t, c] = sd (x_t - sqrt(a) c) / var
    want = (weight[:, :, None] * (1 - a) ** 0.5 * apart / total).sum(1)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["swissroll", "apart"])
def test_ideal_eps_is_the_best_prediction(toys, name):
    data, diffusion = toys[name], Diffusion(cosine_schedule(100))
    torch.manual_seed(2)
    for t in (5, 30, 70):
        steps, eps = torch.full((10_000,), t), torch.randn(10_000, 2)
        xt = diffusion.q_sample(data.sample(10_000), steps, eps)
        best = data.ideal_eps(diffusion, xt, steps)
        shift = torch.randn(10_000, 2) * 0.1
        for other in (best * 0.9, best * 1.1, best + 0.1, best + shift):
            assert (other - eps).square().mean() > (best - eps).square().mean()


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_ideal_model_in_the_sampler_reproduces_the_data(toys, loop):
    data, diffusion = toys["8gaussians"], Diffusion(cosine_schedule(200))
    torch.manual_seed(3)
    model = partial(data.ideal_eps, diffusion)
    *_, x = getattr(diffusion, loop)(model, torch.randn(20_000, 2))
    distance, nearest = torch.cdist(x, data.centers).min(1)
    assert (torch.bincount(nearest, minlength=8) - 2500).abs().max() < 6 * 50
    assert distance.square().mean().item() / 2 == pytest.approx(data.sigma**2, rel=0.2)
    rare = data.log_prob(data.sample(20_000)).quantile(0.001)
    assert (data.log_prob(x) < rare).float().mean() < 0.01


def test_toys_have_the_shapes_of_their_names():
    ring = TOYS["8gaussians"]
    assert torch.allclose(ring**8, torch.ones_like(ring)) and len(ring) == 8
    gaps = (torch.cat([ring, ring[:1]]).diff()).abs()
    assert torch.allclose(gaps, gaps[:1])
    for radius in (1, 0.5):  # evenly and without a seam
        circle = TOYS["circles"][(TOYS["circles"].abs() - radius).abs() < 1e-9]
        gaps = torch.cat([circle, circle[:1]]).diff().abs()
        assert len(circle) == 600 and torch.allclose(gaps, gaps[:1])
    upper, lower = TOYS["moons"].chunk(2)
    assert torch.allclose(upper.abs(), upper.abs() * 0 + 1) and (upper.imag > 0).all()
    assert torch.allclose((lower - 1 - 0.5j).abs(), lower.abs() * 0 + 1)
    assert (lower.imag < 0.5).all() and lower.real.mean() == pytest.approx(1)
    roll = TOYS["swissroll"]
    turn = (roll[1:] / roll[:-1]).angle()  # always forwards, one and a half turns, ever farther out
    assert turn.min() > 0 and turn.sum() == pytest.approx(3 * math.pi, rel=0.01)
    assert torch.allclose(roll.abs().diff(), roll.abs().diff()[:1])
    arm, other = TOYS["spirals"].chunk(2)
    turn = (arm[1:] / arm[:-1]).angle()
    assert torch.allclose(arm, -other) and turn.sum() == pytest.approx(3 * math.pi, rel=0.05)
    assert (arm.abs().diff() > 0).all() and torch.allclose(
        arm.abs()[1:] / arm.abs()[0], 1 + turn.cumsum(0) / (3 * math.pi * arm.abs()[0])
    )
    board = torch.view_as_real(TOYS["checkerboard"]).floor().long()
    cells, counts = board.unique(dim=0, return_counts=True)
    assert len(cells) == 8 and (cells.sum(1) % 2 == 0).all() and (counts == 100).all()
    assert board.min() == 0 and board.max() == 3


# --------------------------------------------------------------------------------- the network


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = NoisePredictor(Diffusion(cosine_schedule(100)))
    torch.nn.init.normal_(net.out.weight, std=0.1)
    return net


def test_output_is_signal_v_plus_noise_xt():
    """Untrained, v is the last bias alone, and without it eps the best guess for N(0, I) data."""
    diffusion = Diffusion(cosine_schedule(100))
    net, xt, t = NoisePredictor(diffusion), torch.randn(9, 2), torch.arange(1, 10) * 11
    net.out.bias.data = torch.tensor([2.0, -1.0])
    want = diffusion.signal[t, None] * net.out.bias + diffusion.noise[t, None] * xt
    torch.testing.assert_close(net(xt, t), want)


def test_network_depends_on_point_and_time_and_on_no_other_row(network):
    xt, t = torch.randn(6, 2), torch.tensor([5, 20, 50, 70, 90, 100])
    whole = network(xt, t)
    for other in (network(xt + 0.1, t), network(xt, t - 1)):
        assert ((other - whole).abs().sum(1) > 1e-4).all()
    order = torch.randperm(6)
    torch.testing.assert_close(network(xt[order], t[order]), whole[order])
    torch.testing.assert_close(network(xt[2:3], t[2:3]), whole[2:3])


def test_network_sees_t_over_T():
    """Networks for 50 and 1000 steps with the same weights agree at the same fraction."""
    x, v = torch.randn(1, 2), []
    for T in (50, 1000):
        torch.manual_seed(0)
        diffusion = Diffusion(cosine_schedule(T))
        net = NoisePredictor(diffusion)
        torch.nn.init.normal_(net.out.weight)
        t = torch.tensor([T // 2])
        v.append((net(x, t) - diffusion.noise[t] * x) / diffusion.signal[t])
    torch.testing.assert_close(*v, rtol=1e-3, atol=1e-3)


def test_every_parameter_learns_until_one_batch_is_known_by_heart(network):
    torch.manual_seed(15)
    x0, eps, t = torch.randn(16, 2), torch.randn(16, 2), torch.randint(1, 60, (16,))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(300):
        loss = network.diffusion.p_losses(network, x0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3
    for name, parameter in network.named_parameters():
        assert not torch.equal(parameter, before[name]), name


# ------------------------------------------------------------------------------ points from files

POINTS = torch.tensor([[1.5, -2.0], [3e2, 4.0], [0.25, 6.0]], dtype=torch.float64)
GOOD = {
    "commas.csv": "1.5,-2\n300,4\n0.25,6\n",
    "header.csv": "x,y\n1.5,-2\n3e2,4\n0.25,6\n",
    "digit.csv": "1st,2nd\n1.5,-2\n3e2,4\n0.25,6\n",
    "quotes.csv": '"length, m"\n'.replace(", m", '","width') + '"1.5","-2"\n3e2,4\n0.25,6\n',
    "bom.csv": "\ufeff1.5,-2\n3e2,4\n0.25,6\n",
    "bom_header.csv": "\ufeffx,y\n1.5,-2\n3e2,4\n0.25,6\n",
    "semicolons.csv": "x;y\n1.5;-2\n3e2;4\n0.25;6\n",
    "tabs.tsv": "x\ty\n1.5\t-2\n3e2\t4\n0.25\t6",
    "blanks.txt": "  1.5   -2\n 3e2 4 \n0.25 6\n",
    "spaces.csv": "x, y\n1.5, -2\n3e2, 4\n0.25, 6\n",
    "windows.csv": "x,y\r\n1.5,-2\r\n3e2,4\r\n0.25,6\r\n\r\n",
    "ends.csv": "\n\n1.5,-2\n3e2,4\n\n0.25,6\n\n\n",
    "notes.txt": "# my points\n1.5 -2  # the first\n3e2 4\n#\n0.25 6\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_points_are_read_from_every_kind_of_text(name, tmp_path):
    (tmp_path / name).write_bytes(GOOD[name].encode())
    for path in (tmp_path / name, str(tmp_path / name)):
        points = read_points(path)
        assert points.dtype == torch.float64 and torch.equal(points, POINTS)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8"])
def test_points_are_read_from_every_kind_of_array(dtype, tmp_path):
    array = np.array([[1, 2], [250, 4]], dtype)
    np.save(tmp_path / "points.npy", array)
    points = read_points(tmp_path / "points.npy")
    assert points.dtype == torch.float64 and points.tolist() == [[1, 2], [250, 4]]


BAD = {  # content, and what the message says
    "empty.csv": (b"", ["[0, 2]"]),
    "notes.csv": (b"# nothing\n\n", ["[0, 2]"]),
    "header.csv": (b"x,y\n", ["[0, 2]"]),
    "words.csv": (b"a,b\nc,d\n", ["row 1", "'c,d'", "two finite numbers"]),
    "word.csv": (b"1,2\n3,x\n", ["row 2", "'3,x'", "two finite numbers"]),
    "nan.csv": (b"1,2\nnan,3\n5,6\n", ["row 2", "'nan,3'", "two finite numbers"]),
    "inf.csv": (b"inf,3\n5,6\n", ["row 1", "'inf,3'", "two finite numbers"]),
    "gap.csv": (b"1,2\n3,\n5,6\n", ["row 2", "'3,'", "two finite numbers"]),
    "ragged.csv": (b"1,2\n3\n", ["row 2", "'3'", "two columns"]),
    "ragged2.csv": (b"1,2\n3,4,5\n", ["row 2", "'3,4,5'", "two columns"]),
    "one.csv": (b"1\n2\n3\n", ["row 1", "'1'", "two columns"]),
    "four.csv": (b"1,2,3,4\n1,2,3,4\n", ["row 1", "'1,2,3,4'", "two columns"]),
    "index.csv": (b",x,y\n0,1,2\n1,3,4\n", ["row 1", "',x,y'", "index=False"]),
    "utf16.csv": ("x,y\n1,2\n".encode("utf-16"), ["UTF-8", r"\xff\xfe"]),
    "points.gz": (gzip.compress(b"1,2\n3,4\n", mtime=0), ["UTF-8", r"\x1f\x8b"]),
    "text.npy": (b"1,2\n3,4\n", []),
    "empty.npy": (b"", []),
    "cut.npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_or", []),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_files_are_refused_with_the_first_bad_row(name, tmp_path, refuses):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    refuses(main, ["--data", tmp_path / name, "--out", tmp_path / "out"], tmp_path / name, *words)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 5)), ["[2, 5]", "[n, 2]"]),
        (np.zeros((5, 3)), ["[5, 3]", "[n, 2]"]),
        (np.zeros((0, 2)), ["[0, 2]", "[n, 2]"]),
        (np.zeros((4, 2, 2)), ["[4, 2, 2]", "[n, 2]"]),
        (np.zeros(4), ["[4]", "[n, 2]"]),
        (np.float64(3), ["[]", "[n, 2]"]),
        (np.zeros((3, 2), complex), ["complex128", "numbers"]),
        (np.zeros((3, 2), bool), ["bool", "numbers"]),
        (np.array([["1", "2"]]), ["<U1", "numbers"]),
        (np.zeros(3, [("x", float), ("y", float)]), ["'x'", "numbers"]),
        (np.array([[1, None]]), ["allow_pickle"]),
        (np.array([[1, 2], [3, np.nan]]), ["row 2", "nan", "two finite numbers"]),
    ],
)
def test_unusable_arrays_are_refused_with_shape_and_type(array, words, tmp_path, refuses):
    path = tmp_path / "points.npy"
    np.save(path, array, allow_pickle=True)
    refuses(main, ["--data", path, "--out", tmp_path / "out"], path, *words)


def test_archives_folders_and_missing_files_are_refused(tmp_path, refuses):
    np.savez(tmp_path / "points.npz", POINTS)
    (tmp_path / "points.npz").with_name("renamed.npy").write_bytes(
        (tmp_path / "points.npz").read_bytes()
    )
    for name, word in {
        "points.npz": "UTF-8",
        "renamed.npy": "",
        ".": "directory",
        "moon": "No such file",
    }.items():
        refuses(main, ["--data", tmp_path / name, "--out", tmp_path / "out"], tmp_path / name, word)


@pytest.mark.parametrize(
    "points", [[[7, -3]], [[7, -3], [8, -5]], [[7, -3], [7, -5], [7, 0]]], ids=["1", "2", "column"]
)
def test_one_point_and_columns_of_one_value_are_trained(points, run, tmp_path):
    np.save(tmp_path / "points.npy", points)
    metrics = run("--data", tmp_path / "points.npy", "--steps", 100)
    samples = np.load(tmp_path / "samples.npy")
    constant = np.ptp(points, 0) == 0
    np.testing.assert_allclose(samples[:, constant].mean(0), np.mean(points, 0)[constant], atol=0.3)
    assert np.isfinite(samples).all() and 0 < metrics["loss"] < 1.5


def test_own_points_come_back_in_their_own_units(run, tmp_path):
    """Seconds since 1970 beside a small number: in float32 there would be one value in 128 s."""
    points = np.random.default_rng(0).normal([1.75e9, -3], [60, 0.01], (300, 2))
    np.savetxt(tmp_path / "points.csv", points, delimiter=",", header="time,value", comments="")
    metrics = run("--data", tmp_path / "points.csv", "--steps", 150, "--batch-size", 256)
    assert set(metrics) == {"loss", "bound_nats"} and not TRUTH & set(
        strict_json(tmp_path / "metrics.json")
    )
    samples = np.load(tmp_path / "samples.npy")
    assert samples.dtype == np.float64 and samples.shape == (300, 2)
    assert len(np.unique(samples[:, 0])) > 290
    np.testing.assert_allclose(samples.mean(0), [1.75e9, -3], rtol=0, atol=[30, 0.005])
    np.testing.assert_allclose(samples.std(0), [60, 0.01], rtol=0.4)


def test_tiny_and_huge_units_are_treated_alike(run, tmp_path):
    """By powers of two, 1e-12 and 1e12 nearly, so that the numbers are the very same."""
    points = np.random.default_rng(0).normal([1, -2], [3, 0.5], (100, 2))
    results = []
    for power in (0, -40, 40):
        np.save(tmp_path / "points.npy", points * 2.0**power)
        metrics = run("--data", tmp_path / "points.npy")
        results.append((metrics, np.load(tmp_path / "samples.npy") / 2.0**power))
    for metrics, samples in results[1:]:
        assert metrics == results[0][0] and np.array_equal(samples, results[0][1])


# ------------------------------------------------------------------------- the script as a whole


def test_program_leaves_its_files_in_an_empty_folder_and_needs_no_pyplot(tmp_path):
    command = [sys.executable, "-X", "importtime", ddpm_2d.__file__, *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "matplotlib.figure" in imported and "matplotlib.pyplot" not in imported
    out = tmp_path / "runs" / "ddpm_2d"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    files = {"model.pt", "samples.npy", "metrics.json", "process.png"}
    assert {path.name for path in out.iterdir()} == files
    metrics = strict_json(out / "metrics.json")
    assert set(metrics) == TRUTH | FLAGS | {"loss", "bound_nats"}
    assert metrics["T"] == 21 and metrics["data"] == "8gaussians" and metrics["samples"] == 300
    assert json.loads(done.stdout) == metrics and "train" in done.stderr
    assert np.load(out / "samples.npy").shape == (300, 2)


def test_same_seed_gives_the_same_numbers_and_another_seed_others(run, tmp_path):
    first = run("--seed", 3), np.load(tmp_path / "samples.npy")
    torch.randn(7)
    again = run("--seed", 3), np.load(tmp_path / "samples.npy")
    other = run("--seed", 4), np.load(tmp_path / "samples.npy")
    assert first[0] == again[0] and np.array_equal(first[1], again[1])
    assert first[0]["loss"] != other[0]["loss"] and not np.isclose(first[1], other[1]).any()


@pytest.fixture
def replaced(monkeypatch, toys, run):
    """replaced(function, *flags): metrics of main with function(net, xt, t) for a network."""

    def build(function, *flags):
        class Other(NoisePredictor):
            def forward(self, xt, t):
                return function(self, xt, t) + 0 * self.out.weight.sum()  # to have a gradient

        monkeypatch.setattr(ddpm_2d, "NoisePredictor", Other)
        return run(*flags)

    return build


def test_exact_model_gets_perfect_scores(replaced, toys):
    exact = lambda net, xt, t: toys["8gaussians"].ideal_eps(net.diffusion, xt, t)
    metrics = replaced(exact, "--T", 200, "--samples", 10_000, "--steps", 1)
    assert metrics["excess_loss"] == 0 and metrics["bound_nats"] == metrics["ideal_bound_nats"]
    assert metrics["off_support"] < 0.003
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.08**2)
    assert abs(metrics["entropy_nats"] - entropy) < 6 / 512**0.5  # sd of log p is 1 for d = 2
    assert 0 < metrics["bound_nats"] - metrics["entropy_nats"] < 2  # the price of fixed variances


def test_useless_model_gets_bad_scores(replaced):
    """eps = 0 has E[eps^2] = 1 and samples far off; the bound is the nats of a wide Gaussian."""
    metrics = replaced(lambda net, xt, t: 0 * xt)
    assert abs(metrics["loss"] - 1) < 6 * math.sqrt(2 / (512 * 2 * 21))
    assert metrics["excess_loss"] == pytest.approx(metrics["loss"] / metrics["ideal_loss"] - 1)
    assert metrics["excess_loss"] > 0.5 and metrics["off_support"] > 0.9
    metrics = replaced(lambda net, xt, t: net.diffusion.noise[t, None] * xt)  # samples are N(0, I)
    assert (
        0.5 < metrics["off_support"] < 0.95 and metrics["bound_nats"] > metrics["entropy_nats"] + 1
    )


def test_nan_counts_as_off_support_and_is_null_in_the_file(replaced, tmp_path):
    bad = lambda net, xt, t: xt if torch.is_grad_enabled() else xt * math.nan
    metrics = replaced(bad)
    saved = strict_json(tmp_path / "metrics.json")
    for result in (metrics, saved):
        assert result["off_support"] == 1 and result["ideal_loss"] > 0
        assert result["loss"] is result["bound_nats"] is result["excess_loss"] is None


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A short training: folder, metrics and what was drawn."""
    out, drawn = tmp_path_factory.mktemp("trained"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm_2d, "draw", lambda *args: drawn.extend(args))
        flags = ["--steps", "500", "--batch-size", "512", "--T", "100", "--samples", "5000"]
        return out, main([*flags, "--out", str(out)]), drawn


def test_short_training_gets_near_the_best_possible_loss(trained):
    _, metrics, _ = trained
    assert 0 < metrics["excess_loss"] < 0.2
    assert 0 < metrics["bound_nats"] - metrics["ideal_bound_nats"] < 0.7
    assert metrics["off_support"] < 0.15


def test_saved_model_is_loaded_in_four_lines_and_draws_the_same_distribution(trained, toys):
    out, metrics, _ = trained
    saved = torch.load(out / "model.pt", weights_only=True)
    diffusion = Diffusion(cosine_schedule(saved["T"]))
    net = NoisePredictor(diffusion)
    net.load_state_dict(saved["net"])
    assert (saved["data"], saved["schedule"], len(saved["losses"])) == ("8gaussians", "cosine", 500)
    assert np.mean(saved["losses"][-50:]) == pytest.approx(metrics["loss"], rel=0.2)
    torch.manual_seed(5)
    *_, x = diffusion.p_sample_loop(net, torch.randn(5000, 2))
    mine, file = x.double() * saved["std"] + saved["mean"], np.load(out / "samples.npy")
    ring = TOYS["8gaussians"].numpy()  # both in the units of the table of centers
    counts = []
    for points in (mine.numpy(), file):
        distance = np.abs(points[:, :1] + 1j * points[:, 1:] - ring)
        assert np.median(distance.min(1)) < 0.1
        counts.append(np.bincount(distance.argmin(1), minlength=8) / 5000)
    np.testing.assert_allclose(*counts, atol=6 * (2 / 8 / 5000) ** 0.5)


def test_pictures_get_the_states_of_both_samplers_and_no_more_memory_than_they_show(trained):
    out, _, (_, diffusion, data, states, fast) = trained
    assert len(states) == 101 and len(fast) == 51
    samples = np.load(out / "samples.npy")[:4000]
    saved = torch.load(out / "model.pt", weights_only=True)
    last = states[-1].double() * saved["std"] + saved["mean"]
    np.testing.assert_array_equal(samples, last)
    assert torch.equal(states[0], fast[0])
    for state in states:
        assert state.shape == (4000, 2) and state.untyped_storage().nbytes() == 4000 * 2 * 4
    near = torch.cdist(fast[-1], data.centers).min(1).values
    assert near.median() < 2 * data.sigma  # DDIM gives data, too


@pytest.mark.parametrize("T", [21, 100, 1000])
def test_every_panel_shows_the_state_of_its_title(T, toys, tmp_path, monkeypatch):
    figures = []

    class Kept(ddpm_2d.Figure):
        def savefig(self, *args, **more):
            figures.append(self)

    monkeypatch.setattr(ddpm_2d, "Figure", Kept)
    data, diffusion = toys["moons"], Diffusion(cosine_schedule(T))
    steps = min(50, T)
    states = [torch.full((9, 2), float(t)) for t in range(T, -1, -1)]
    fast = [torch.full((9, 2), T * k / steps) for k in range(steps, -1, -1)]
    ddpm_2d.draw(tmp_path / "x.png", diffusion, data, states, fast)
    seen = set()
    for ax in figures[0].axes:
        name, t = ax.get_title().split(", t = ")
        points = torch.tensor(np.asarray(ax.collections[0].get_offsets()), dtype=torch.float32)
        seen.add((name, int(t)))
        if name == "q":
            noise = (points.var(0) - 1).abs().max() < 0.3 and len(points) == 4000
            near = torch.cdist(points, data.centers).min(1).values.max() < 6 * data.sigma
            assert noise and near == (t == "0")
        else:
            assert (points - int(t)).abs().max() <= (T / steps if name == "DDIM" else 0)
    assert len(seen) == 18 and {(name, t) for name in ("q", "DDPM", "DDIM") for t in (0, T)} <= seen


def test_figures_of_the_user_stay_as_they_are(toys, tmp_path):
    backend, settings = matplotlib.get_backend(), dict(matplotlib.rcParams)
    mine = plt.figure()
    try:
        states = [torch.randn(9, 2)] * 22
        diffusion = Diffusion(cosine_schedule(21))
        ddpm_2d.draw(tmp_path / "process.png", diffusion, toys["moons"], states, states)
        assert plt.get_fignums() == [mine.number] and plt.gcf() is mine and not mine.axes
        assert matplotlib.get_backend() == backend and dict(matplotlib.rcParams) == settings
        picture = plt.imread(tmp_path / "process.png")
        assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.05  # it is not empty
    finally:
        plt.close(mine)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--T", 20], ["--T", "21"]),
        (["--T", "x"], ["--T", "'x'"]),
        (["--T", 10**10], ["--T", "1e9"]),
        (["--schedule", "tanh"], ["--schedule", "'tanh'", "linear", "cosine"]),
        (["--steps", 0], ["--steps", "1"]),
        (["--batch-size", -3], ["--batch-size", "1"]),
        (["--lr", -1], ["--lr", "0"]),
        (["--lr", "nan"], ["--lr"]),
        (["--lr", "inf"], ["--lr"]),
        (["--samples", 0], ["--samples", "1"]),
        (["--seed", -1], ["--seed", "0"]),
        (["--device", "cuda:99"], ["CUDA" if not torch.cuda.is_available() else "cuda:99"]),
        (["--device", "gpu"], ["gpu", "cpu, cuda"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_wrong_flags_are_refused_in_one_line(argv, words, refuses, tmp_path):
    refuses(main, [*argv, "--out", tmp_path / "out"], *words)
    assert not (tmp_path / "out" / "model.pt").exists()


def test_out_that_is_a_file_is_refused_and_left_alone(tmp_path, refuses):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "sub"):
        refuses(main, [*SMALL, "--out", out], out)
    assert file.read_text() == "mine"


def test_loss_that_is_not_finite_ends_and_keeps_the_old_model(run, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"of another run")
    with pytest.raises(SystemExit, match=r"loss .* at step \d+: .* lower --lr") as exit:
        run("--lr", 1e9, "--steps", 50)
    assert isinstance(exit.value.code, str)  # which makes python print it and end with 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == b"of another run"


def test_default_device_is_what_is_there_and_gives_the_numbers_of_the_cpu(tmp_path, monkeypatch):
    """On the pretend device, which refuses CPU tensors: all of main, its pictures included."""

    def accelerator(device):  # torch may be built for one that is not there
        return lambda check_available=False: device if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator(None))
    here = main([*SMALL, "--out", str(tmp_path / "cpu")])
    assert strict_json(tmp_path / "cpu" / "metrics.json")["device"] == "cpu"
    with pretend_device() as device:
        there = accelerator(torch.device(device))
        monkeypatch.setattr(torch.accelerator, "current_accelerator", there)
        metrics = main([*SMALL, "--out", str(tmp_path / "there")])
    assert strict_json(tmp_path / "there" / "metrics.json")["device"] == device
    assert metrics == pytest.approx(here, rel=1e-4, abs=1e-4)
    samples = [np.load(tmp_path / name / "samples.npy") for name in ("cpu", "there")]
    np.testing.assert_allclose(*samples, rtol=1e-3, atol=1e-3)
    saved = torch.load(tmp_path / "there" / "model.pt", weights_only=True)  # also without it


def test_centers_left_on_the_cpu_are_noticed(toys):
    """A fault of the first edition, which crashed on every GPU."""
    data = toys["moons"]
    with pretend_device() as device:
        x = torch.zeros(5, 2, device=device)
        with pytest.raises(RuntimeError, match="same device"):
            data.log_prob(x)
        there = data._replace(centers=data.centers.to(device))
        assert there.log_prob(x).device.type == there.sample(5).device.type == device
