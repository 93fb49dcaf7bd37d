"""The moving picture of README, which benchmarks/animation.py draws."""

import numpy as np
import torch
from PIL import Image

import ddpm_2d
import ddpm_mnist
from benchmarks import animation


def test_both_sides_run_from_T_to_0_on_one_clock_and_stand_still(tmp_path):
    shares = torch.linspace(1, 0, animation.STEPS + 1)  # t / T
    clouds = [torch.tensor([[share - 0.5, 0.0]]) for share in shares]  # from right to left
    sheets = [np.full((280, 280), share) for share in shares]  # from black to white
    animation.draw(tmp_path / "x.gif", clouds, sheets, half=0.5, frames=15)
    with Image.open(tmp_path / "x.gif") as film:
        seen = []
        for number in range(film.n_frames):
            film.seek(number)
            pixels = np.asarray(film.convert("L"))[31:310]  # without the titles
            dot = (255.0 - pixels[:, :300]).sum(0)
            seen.append(1 - pixels[100, 450] / 255)
            assert abs((dot @ np.arange(300) / dot.sum() - 10) / 280 - seen[-1]) < 0.02
        assert seen[0] == 1 and seen[-1] == 0 and np.all(np.diff(seen) < 0)
        assert 2000 <= film.info["duration"] < 3000  # milliseconds, of the last frame


def test_a_run_and_weights_make_a_film_with_a_label_a_column(tmp_path, monkeypatch, refuses):
    def denoiser(net, diffusion, y, guidance):
        def model(xt, t):  # the x_0 of label 0 is white, that of label 9 black
            x0 = (y / 4.5 - 1)[:, None, None, None]
            return (xt - diffusion.signal[t[0]] * x0) / diffusion.noise[t[0]]

        assert guidance == 1.2
        return model

    refuses(animation.main, [tmp_path / "nowhere", tmp_path], "nowhere")
    monkeypatch.setattr(animation, "STEPS", 3)
    monkeypatch.setattr(animation, "FPS", 1)
    monkeypatch.setattr(animation, "denoiser", denoiser)
    ddpm_2d.main(["--steps", "1", "--T", "21", "--samples", "9", "--out", str(tmp_path)])
    config = {"shape": [1, 8, 8], "labels": [*range(10)], "width": 16}
    saved = {"config": config, "ema": ddpm_mnist.UNet(width=16).state_dict()}
    torch.save(saved, tmp_path / "w.pt")
    animation.main([str(tmp_path), str(tmp_path / "w.pt"), "--out", str(tmp_path / "x.gif")])
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 4 and film.size == (600, 320)
        noise = np.asarray(film.convert("L"))[30:310, 310:590]
        film.seek(3)
        pixels = np.asarray(film.convert("L"))[30:310, 310:590]
    assert noise.std(0).min() > 50 and pixels.std(0).max() == 0
    assert np.all(np.diff(pixels[0].astype(int)) <= 0) and len(np.unique(pixels)) == 8
