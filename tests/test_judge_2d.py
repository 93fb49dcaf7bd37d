"""benchmarks/judge_2d.py against closed forms, and tiny runs of ddpm_2d.py from end to end."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_2d
from benchmarks import judge_2d
from ddpm_2d import Diffusion, Mixture, NoisePredictor, linear_schedule

TINY = ["--steps", "20", "--T", "40", "--samples", "200", "--batch-size", "64"]
SMALL = ["--grid", "12", "--points", "64"]
PICTURES = {"process.png", "training.png", "score.png", "density.png"}


@pytest.fixture
def folder(tmp_path):
    ddpm_2d.main([*TINY, "--out", str(tmp_path)])
    return tmp_path


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    cloud = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    shifted = cloud + torch.tensor([3.0, 4.0])
    distance = judge_2d.sliced_wasserstein(cloud, shifted.flip(0))
    assert distance == pytest.approx(5 * 2 / math.pi, rel=1e-3)  # E|cos| around the circle
    assert judge_2d.sliced_wasserstein(cloud, cloud.flip(0)) < 1e-9


def test_swd_ratio_is_one_for_true_samples_in_the_units_of_the_file(folder):
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved |= {"mean": saved["mean"] + 100, "std": 7 * saved["std"]}
    torch.manual_seed(0)
    run = judge_2d.read_run(folder)
    torch.testing.assert_close(run.data.centers, judge_2d.toy_data("8gaussians").centers)
    true = run.data.sample(2000)
    torch.save(saved, folder / "model.pt")
    for x, low, high in ((true, 0.3, 3), (1.5 * true, 5, 100), (true + 0.5, 5, 100)):
        np.save(folder / "samples.npy", x.double() * saved["std"] + saved["mean"])
        run = judge_2d.read_run(folder)._replace(data=run.data)
        assert low < judge_2d.judge_samples(run)["swd_ratio"] < high


def test_coverage_sees_a_lost_mode_and_off_support_does_not():
    torch.manual_seed(0)
    data = judge_2d.toy_data("8gaussians")
    samples = data.sample(4000)
    assert judge_2d.scores(data, samples)["coverage"] == 1
    numbers = judge_2d.scores(data, samples[(samples - data.centers[3]).norm(dim=1) > 0.5])
    assert numbers["coverage"] == 7 / 8 and numbers["off_support"] < 0.01
    assert judge_2d.scores(data, samples * math.nan)["coverage"] == 0


def test_divergence_is_the_trace_of_the_jacobian_of_a_network():
    net = NoisePredictor(40)
    torch.nn.init.normal_(net.out.weight)
    x = torch.randn(9, 2)
    function = partial(judge_2d.velocity, Diffusion(linear_schedule(40)), net, 7)
    with torch.no_grad():  # as log_density calls it
        _, divergence = judge_2d.with_divergence(function, x)
    jacobian = torch.autograd.functional.jacobian(function, x)  # [9, 2, 9, 2]
    torch.testing.assert_close(divergence, torch.einsum("nini->n", jacobian))


@pytest.mark.parametrize("sigma, other, T", [(0.1, 0.1, 1000), (1.5, 1.2, 1000), (0.1, 0.15, 40)])
def test_kl_and_excess_loss_of_the_best_and_of_a_wrong_model(sigma, other, T, tmp_path):
    """A Gaussian of deviation sigma; the model is the best possible one of another."""
    torch.manual_seed(0)
    diffusion = Diffusion(linear_schedule(T))
    data = Mixture(torch.tensor([[0.4, -0.2]]), sigma)
    net = partial(data._replace(sigma=other).ideal_eps, diffusion)
    run = judge_2d.Run(diffusion, net, data, "one", [1.0], None)
    beta = diffusion.beta[1]
    ratio = ((1 - beta) * sigma**2 + beta) / ((1 - beta) * other**2 + beta)  # of variances of x_1
    want = ratio - 1 - math.log(ratio)  # of two round Gaussians in the plane
    kl, error = judge_2d.kl_nats(run, net, 3000)
    assert kl == pytest.approx(want, abs=4 * error + 0.01) and error < max(0.002, want / 10)
    numbers = judge_2d.draw_density(tmp_path / "x.png", run, 40, kl, error)
    assert numbers["model_mass"] == pytest.approx(1, abs=0.03)
    assert numbers["grid_kl_nats"] == pytest.approx(kl, abs=4 * error + 0.01)
    signal2 = diffusion.alpha_bar[T // 3]
    noise2 = 1 - signal2
    var = signal2 * sigma**2 + noise2
    best, excess = judge_2d.errors_at(run, T // 3)
    assert best == pytest.approx(1 - noise2 / var, rel=0.1)
    gap = noise2**0.5 / (signal2 * other**2 + noise2) - noise2**0.5 / var
    assert excess == pytest.approx(gap**2 * var, rel=0.1)


def test_a_tiny_run_has_all_pictures_and_a_sentence_for_every_number(folder, capsys):
    (numbers,) = judge_2d.main([str(folder), *SMALL]).values()
    text = capsys.readouterr().out
    for name in numbers.keys() & {*"swd_ratio coverage excess_loss kl_nats solver_kl_nats".split()}:
        assert f"{name}: {numbers[name]:.4g}" in text
    assert numbers["swd_ratio"] > 1 and numbers["kl_nats"] > 0.1  # hardly trained
    assert abs(numbers["solver_kl_nats"]) < numbers["kl_nats"] / 3
    assert {path.name for path in folder.glob("*.png")} == PICTURES
    with Image.open(folder / "sampling.gif") as film:
        assert 20 <= film.n_frames <= 41  # T = 40
        film.seek(film.n_frames - 1)
        assert film.info["duration"] >= 2900  # milliseconds


def test_what_is_not_finite_is_null_and_still_drawn(folder):
    np.save(folder / "samples.npy", np.full((200, 2), math.nan))
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["net"]["out.bias"][:] = math.nan
    torch.save(saved, folder / "model.pt")
    (numbers,) = judge_2d.main([str(folder), *SMALL]).values()
    for name in ("swd_ratio", "ddim_swd_ratio", "excess_loss", "kl_nats", "model_mass"):
        assert numbers[name] is None
    assert abs(numbers["solver_kl_nats"]) < 0.2
    assert {path.name for path in folder.glob("*.png")} == PICTURES


def test_own_points_get_two_pictures_and_a_sentence(tmp_path, capsys, refuses):
    np.save(tmp_path / "x.npy", np.ones((1, 2)))  # a single one has swd 0 from itself
    ddpm_2d.main([*TINY, "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path)])
    (numbers,) = judge_2d.main([str(tmp_path), *SMALL]).values()
    assert "not known" in capsys.readouterr().out
    assert not {"kl_nats", "excess_loss", "model_mass", "coverage"} & numbers.keys()
    assert {*tmp_path.glob("*.png")} == {tmp_path / "process.png", tmp_path / "training.png"}
    (tmp_path / "x.npy").unlink()
    refuses(judge_2d.main, [tmp_path], "x.npy")


def test_folders_that_are_no_run_are_refused(folder, refuses):
    refuses(judge_2d.main, [folder.parent / "nowhere"], "nowhere", "model.pt")
    refuses(judge_2d.main, [folder, "--points", 3], "--points")
    for samples in (np.zeros((5, 3)), np.zeros((5, 1)), np.zeros(2), np.array(["a"])):
        np.save(folder / "samples.npy", samples)
        refuses(judge_2d.main, [folder], "samples.npy")
    saved = torch.load(folder / "model.pt", weights_only=True)
    for other in ({"config": 1}, [1], saved | {"net": {}}, saved | {"T": None}):
        torch.save(other, folder / "model.pt")
        refuses(judge_2d.main, [folder], "model.pt")
    (folder / "model.pt").write_bytes(b"")
    refuses(judge_2d.main, [folder], "model.pt")
