"""The judges and pictures in benchmarks/ against closed forms, and tiny runs from end to end."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import ddpm_2d
import ddpm_mnist
from benchmarks import draw_mnist, judge_2d


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    cloud = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    shifted = cloud + torch.tensor([3.0, 4.0])
    mean = 5 * 2 / math.pi  # E|cos| around the circle
    assert judge_2d.sliced_wasserstein(cloud, shifted) == pytest.approx(mean, rel=1e-3)
    assert judge_2d.sliced_wasserstein(cloud, cloud[torch.randperm(500)]) < 1e-9
    shifted[7, 0] = math.nan
    assert math.isnan(judge_2d.sliced_wasserstein(cloud, shifted))


def test_divergence_is_the_trace_of_the_jacobian():
    def function(x):
        return torch.stack([x[:, 0] ** 2 * x[:, 1], torch.sin(x[:, 0]) + x[:, 1] ** 3], 1)

    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    values, divergence = judge_2d.with_divergence(function, x)
    torch.testing.assert_close(values, function(x))
    torch.testing.assert_close(divergence, 2 * x[:, 0] * x[:, 1] + 3 * x[:, 1] ** 2)


@pytest.mark.parametrize("sigma", [0.3, 1.5])
def test_flow_of_the_exact_score_has_the_density_of_a_gaussian(sigma):
    diffusion = ddpm_2d.Diffusion(ddpm_2d.cosine_schedule(1000))
    data = ddpm_2d.ToyData(torch.tensor([[0.4, -0.2]]), sigma)
    torch.manual_seed(0)
    x1 = data.sample(200)
    got = judge_2d.log_density(diffusion, partial(data.ideal_eps, diffusion), x1)
    width = math.hypot(diffusion.signal[1] * sigma, diffusion.noise[1])
    mean = diffusion.signal[1] * data.centers[0]
    want = torch.distributions.Normal(mean, width).log_prob(x1).sum(1)
    torch.testing.assert_close(got, want, rtol=0, atol=0.02)


def small(tmp_path, *flags):
    argv = ["--steps", "20", "--T", "40", "--samples", "200", "--batch-size", "64"]
    ddpm_2d.main([*argv, *flags, "--out", str(tmp_path)])
    (numbers,) = judge_2d.main([str(tmp_path), "--grid", "12", "--points", "64"]).values()
    return numbers, {path.name for path in tmp_path.glob("*.[pg][ni][gf]")}


def test_judge_of_a_toy_set_gives_all_numbers_and_pictures(tmp_path, capsys):
    numbers, pictures = small(tmp_path)
    drawn = {"training.png", "score.png", "density.png", "sampling.gif"}
    assert pictures == drawn | {"process.png"}
    assert numbers["swd_ratio"] > 1 and numbers["ddim_swd_ratio"] > 1 and numbers["kl_nats"] > 0
    assert "swd_ratio" in capsys.readouterr().out


def test_judge_of_own_points_says_what_is_not_known(tmp_path, capsys):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(50, 2)))
    numbers, pictures = small(tmp_path, "--data", str(tmp_path / "points.npy"))
    assert pictures == {"process.png", "training.png", "sampling.gif"}
    assert "kl_nats" not in numbers and "not known" in capsys.readouterr().out


def test_folders_without_a_run_are_refused(tmp_path, refuses):
    refuses(judge_2d.main, [tmp_path / "nowhere"], "nowhere")
    refuses(draw_mnist.main, [tmp_path / "nowhere"], "nowhere")


@pytest.mark.parametrize("shape", [[8, 8], [8, 16, 3]])
def test_process_goes_from_noise_to_the_images_and_the_losses_are_drawn(shape, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=np.arange(20) % 4)
    argv = ["--data", tmp_path / "x.npz", "--steps", 3, "--samples", 10, "--batch-size", 4]
    ddpm_mnist.main([str(arg) for arg in [*argv, "--out", tmp_path]])
    draw_mnist.main([str(tmp_path)])
    picture = imread(tmp_path / "process.png")[..., :3]
    height, width = shape[:2]
    assert picture.shape == (10 * height, 10 * width, 3)
    noise = picture[:, :width]
    extreme = ((noise == 0) | (noise == 1)).mean()
    assert 0.2 < extreme < 0.45  # P(|N(0, 1)| > 1) = 0.32: x_T is at the left
    assert (tmp_path / "training.png").exists()
