"""benchmarks/judge_mnist.py against closed forms, and what it must not count as good."""

import math
import zlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import judge_mnist
from ddpm_mnist import Diffusion, UNet, cosine_schedule


def test_frechet_distance_of_gaussians():
    """2 x 2 matrices have tr sqrt(A B) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    x = 1.5**0.5 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]).double()  # covariance I
    root_a, root_b = torch.tensor([[[2, 1], [0, 1]], [[1, 0], [-3, 0.5]]]).double()
    mean = torch.tensor([1.0, -2.0])
    a, b = root_a @ root_a.T, root_b @ root_b.T
    cross = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    wanted = mean.square().sum() + a.trace() + b.trace() - 2 * cross
    torch.testing.assert_close(judge_mnist.frechet(x @ root_a.T + mean, x @ root_b.T), wanted)
    assert judge_mnist.frechet(a, a).item() == pytest.approx(0, abs=1e-6)


def test_decoder_is_a_distribution_over_256_values():
    x0 = torch.arange(256, dtype=torch.float64)[:, None] / 127.5 - 1
    mean = torch.tensor([-1.2, -1.0, -0.999, -0.3, 0.0, 0.5, 1.0, 1.1], dtype=torch.float64)
    for sigma in (0.0047, 0.1, 1.0):
        nll = judge_mnist.decoder_nll(x0, mean, sigma)  # [256, 8]
        assert nll.isfinite().all()  # the far tails, too
        torch.testing.assert_close((-nll).exp().sum(0), torch.ones_like(mean))
        half = math.erf(1 / 255 / sigma / 2**0.5) / 2  # from the middle of a bin to its end
        edge = judge_mnist.decoder_nll(x0[[0, 255]], x0[[0, 255]], sigma)  # black and white
        torch.testing.assert_close((-edge).exp(), torch.full_like(edge, 0.5 + half))


@pytest.mark.parametrize("T, last, s", [(1000, 0.02, 0), (40, 0.2, 0.5)])
def test_bound_of_the_best_model_of_an_image_with_noise(T, last, s):
    """L_{t-1} is var(x_0 | x_t) by half of what the signal-to-noise ratio loses."""
    torch.manual_seed(0)
    beta = torch.linspace(1e-4, last, T).double()
    a = torch.cumprod(1 - torch.cat([torch.zeros(1), beta]), 0)  # from t = 0 on
    image = torch.arange(784).view(28, 28) % 256 / 127.5 - 1
    x0 = image + s * torch.randn(50, 1, 28, 28)
    total = s**2 * a + 1 - a  # the variance of x_t

    def best(xt, t):
        return ((xt - a[t[0]].sqrt() * image) * (1 - a[t[0]]).sqrt() / total[t[0]]).float()

    bound = judge_mnist.variational_bound(Diffusion(beta), best, x0)
    snr = a / (1 - a)
    kl = 784 * (snr[1:-1] - snr[2:]) / 2 * s**2 * (1 - a[2:]) / total[2:]
    prior = (a[-1] * x0.square().sum() / 50 - 784 * (a[-1] + torch.log(1 - a[-1]))) / 2
    _, *terms = bound.mean(0).tolist()
    assert terms == pytest.approx([*kl.tolist(), prior.item()], rel=0.04, abs=1e-4)
    if s == 0:
        sigma = (beta[0] / (1 - a[2]) * beta[1]).sqrt()  # root of beta-tilde_2
        wanted = judge_mnist.decoder_nll(image.double(), image.double(), sigma).sum()
        torch.testing.assert_close(bound[:, 0], wanted.expand(50), rtol=1e-3, atol=0)


def test_bits_are_per_pixel_with_the_label_and_nan_stays(monkeypatch):
    images = torch.arange(200, dtype=torch.uint8)[:, None, None].expand(200, 28, 28)
    y = torch.arange(200) % 10
    net = UNet()
    diffusion = Diffusion(cosine_schedule(21))
    torch.nn.init.constant_(net.head[-1].bias, math.nan)
    assert math.isnan(judge_mnist.bits_per_dimension(diffusion, net, images, y, 4)["bits"])

    def bound(diffusion, model, x0, generator):  # 0 to 199 bits a pixel, one number an image
        value = (x0[:, :1, 0, 0].double() + 1) * 127.5
        return 784 * math.log(2) * torch.cat([value / 4, value * 3 / 4], 1)

    monkeypatch.setattr(judge_mnist, "variational_bound", bound)
    row = judge_mnist.bits_per_dimension(diffusion, net, images, y, 200)
    assert row["bits"] == pytest.approx(99.5 + math.log2(10) / 784)
    assert row["bits_error"] == pytest.approx(np.arange(200).std(ddof=1) / 200**0.5)


def test_share_recognised_and_frechet_ratio():
    def last(features):  # sees the digit that the first pixel is
        value = ((features[:, :1] + 1) * 127.5).round()
        return torch.where(value > 9, math.nan, -(value - torch.arange(10)).abs())

    model = SimpleNamespace(features=lambda x: x.flatten(1)[:, :3], last=last)
    real = torch.from_numpy(np.random.default_rng(0).integers(0, 10, (9000, 28, 28), np.uint8))
    labels = real[:, 0, 0].long()
    features, _ = judge_mnist.predict(model, real)
    saved = {"train": features[:6000].float(), "test": features[6000:].float()}
    args = (model, real[:1000], labels[:1000], saved)
    assert 0.3 < judge_mnist.judge(*args)["frechet_ratio"] < 3  # they are real
    assert "frechet_ratio" not in judge_mnist.judge(model, real[:999], labels[:999], saved)
    real[:100, 0, 0] = 99  # the logits of these are NaN, whose argmax is 0
    row = judge_mnist.judge(*args)
    assert row["recognised"] == pytest.approx(0.9)
    assert row["recognised_error"] == pytest.approx(0.3 / 1000**0.5)
    assert row["frechet_ratio"] > 100
    saved["test"][0] = math.nan
    assert math.isnan(judge_mnist.judge(*args)["frechet_ratio"])


@pytest.fixture
def argv(tmp_path, monkeypatch):
    """A folder of noise and an untrained network, beside small real data and a classifier."""
    monkeypatch.setattr(judge_mnist, "cosine_schedule", lambda T: cosine_schedule(21))
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    y = np.arange(40, dtype=np.uint8) % 10
    np.savez(tmp_path / "data.npz", x_train=images, y_train=y, x_test=images, y_test=y)
    saved = {"classifier": judge_mnist.Classifier().state_dict(), "data": zlib.crc32(images)}
    saved |= {"train": torch.randn(40, 128), "test": torch.randn(40, 128), "accuracy": 0.99}
    torch.save(saved, tmp_path / "classifier.pt")
    np.save(tmp_path / "samples.npy", images[..., None])
    np.save(tmp_path / "labels.npy", y)
    config = {"shape": [1, 28, 28], "labels": list(range(10)), "width": 16}
    torch.save({"config": config, "ema": UNet(width=16).state_dict()}, tmp_path / "model.pt")
    files = ["--data", tmp_path / "data.npz", "--classifier", tmp_path / "classifier.pt"]
    return [str(arg) for arg in (tmp_path, *files)]


def test_the_numbers_printed_are_those_returned(argv, tmp_path, capsys):
    (row,) = judge_mnist.main([*argv, "--bits", "2"])
    printed = capsys.readouterr().out
    assert printed.count(f"{row['bits']:.3f} +- {row['bits_error']:.3f}") == 1
    assert printed.count(f"{row['recognised']:.1%} +- {row['recognised_error']:.1%}") == 1
    assert "none" in printed and "frechet_ratio" not in row  # only 40 samples
    assert row["run"] == str(tmp_path) and row["samples"] == 40 and 0 < row["bits"] < math.inf


def test_what_cannot_be_judged_is_refused_in_one_line(argv, tmp_path, refuses):
    images, labels = (np.load(tmp_path / f"{name}.npy") for name in ("samples", "labels"))
    model = torch.load(tmp_path / "model.pt")
    refused = partial(refuses, judge_mnist.main)
    for bits in (1, -3, 41):
        refused([*argv, "--bits", bits], "--bits must be")
    refused([*argv, "--data", tmp_path / "labels.npy"], "labels.npy")
    other = 255 - images[..., 0]
    np.savez(tmp_path / "other.npz", x_train=other, y_train=labels, x_test=other, y_test=labels)
    refused([*argv, "--data", tmp_path / "other.npz"], "--classifier")
    for wrong in (images / 1, images[..., 0], images[:, :14], images.repeat(3, 3), images[:0]):
        np.save(tmp_path / "samples.npy", wrong)
        refused(argv, tmp_path)
    np.save(tmp_path / "samples.npy", images)
    for wrong in (labels + 1, labels / 1, labels[:, None], labels.astype(str), labels[:5]):
        np.save(tmp_path / "labels.npy", wrong)
        refused(argv, tmp_path)
    np.save(tmp_path / "labels.npy", labels)
    other = model["config"] | {"labels": [0, 1]}
    for change in ({"ema": {}}, {"config": other}, {"config": None}):
        torch.save(model | change, tmp_path / "model.pt")
        refused([*argv, "--bits", 2], "model.pt")
    for name in ("model.pt", "labels.npy", "samples.npy"):
        (tmp_path / name).write_bytes(b"")
        refused([*argv, "--bits", 2], name)
        (tmp_path / name).unlink()
        refused([*argv, "--bits", 2], name)
