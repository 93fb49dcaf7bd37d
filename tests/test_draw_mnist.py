"""The pictures of MNIST runs that benchmarks/draw_mnist.py draws."""

import numpy as np
import pytest
from matplotlib.image import imread

import ddpm_mnist
from benchmarks import draw_mnist


def test_folders_without_a_run_are_refused(tmp_path, refuses):
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
