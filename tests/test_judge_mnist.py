"""benchmarks/judge_mnist.py against closed forms, and what it must not count as good."""

import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import judge_mnist
from ddpm_mnist import Diffusion, UNet, cosine_schedule


def test_frechet_distance_of_gaussians():
    """2 x 2 matrices have tr sqrt(A B) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    x = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.linalg.solve_triangular(
        torch.linalg.cholesky(x.T.cov()), (x - x.mean(0)).T, upper=False
    )
    root_a = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    root_b = torch.tensor([[1.0, 0.0], [-3.0, 0.5]], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    a = root_a @ root_a.T
    b = root_b @ root_b.T
    cross = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    wanted = mean.square().sum() + a.trace() + b.trace() - 2 * cross
    found = judge_mnist.frechet((root_a @ x).T + mean, (root_b @ x).T)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert judge_mnist.frechet(a, a).item() == pytest.approx(0, abs=1e-6)


def test_decoder_is_a_distribution_over_256_values():
    x0 = torch.arange(256, dtype=torch.float64)[:, None] / 127.5 - 1
    mean = torch.tensor([-1.2, -1.0, -0.999, -0.3, 0.0, 0.5, 1.0, 1.1], dtype=torch.float64)
    for sigma in (0.0047, 0.1, 1.0):
        nll = judge_mnist.decoder_nll(x0, mean, sigma)  # [256, 8]
        assert nll.isfinite().all()  # the far tails, too
        torch.testing.assert_close((-nll).exp().sum(0), torch.ones_like(mean))
        half = math.erf(1 / 255 / sigma / 2**0.5) / 2  # from the middle of a bin to its end
        for value in (0, 255):  # nothing is lost below black and above white
            edge = judge_mnist.decoder_nll(x0[value], x0[value], sigma).item()
            assert math.exp(-edge) == pytest.approx(0.5 + half)


def test_bound_of_a_model_that_knows_the_image():
    diffusion = Diffusion(cosine_schedule(1000))
    x0 = torch.tensor([0.0, 100.0, 200.0, 255.0]).expand(2, 1, 8, 4) / 127.5 - 1

    def knows(xt, t):
        signal = diffusion.signal[t].view(-1, 1, 1, 1)
        return (xt - signal * x0) / diffusion.noise[t].view(-1, 1, 1, 1)

    bound = judge_mnist.variational_bound(diffusion, knows, x0)
    assert bound.shape == (2, 1001)
    assert bound[:, 1:].max() < 1e-5
    beta = cosine_schedule(1000)
    variance = beta[1] / (1 - (1 - beta[1]) * (1 - beta[2])) * beta[2]  # beta-tilde_2
    half = math.erf(1 / 255 / (2 * variance.item()) ** 0.5) / 2
    wanted = -16 * math.log(2 * half) - 16 * math.log(0.5 + half)
    assert bound[:, 0].tolist() == pytest.approx([wanted, wanted], rel=1e-3)


def test_bound_of_the_best_model_of_gaussian_pixels():
    """x_0 ~ N(0, s^2): var(x_0 | x_t) is known, and L_{t-1} the KL of two q(x_{t-1} | x_t, x_0)
    of Eq. (7) whose x_0 differ by it."""
    beta = torch.cat([torch.zeros(1), torch.linspace(1e-3, 0.2, 40)]).double()
    diffusion = Diffusion(beta)
    generator = torch.Generator().manual_seed(0)
    s = 0.5
    x0 = s * torch.randn(50, 1, 28, 28, generator=generator)
    a = torch.cumprod(1 - beta, 0)

    def best(xt, t):
        a_t = a[t].view(-1, 1, 1, 1)
        return ((1 - a_t).sqrt() * xt / (s**2 * a_t + 1 - a_t)).float()

    bound = judge_mnist.variational_bound(diffusion, best, x0, generator).mean(0) / 784
    for t in range(2, 41):
        variance = s**2 * (1 - a[t]) / (s**2 * a[t] + 1 - a[t])
        gain = a[t - 1].sqrt() * beta[t] / (1 - a[t])
        beta_tilde = (1 - a[t - 1]) / (1 - a[t]) * beta[t]
        wanted = gain**2 * variance / (2 * beta_tilde)
        assert bound[t - 1].item() == pytest.approx(wanted.item(), rel=0.04)
    prior = (a[40] * s**2 - a[40] - torch.log(1 - a[40])) / 2
    assert bound[40].item() == pytest.approx(prior.item(), rel=0.04)


class Network(nn.Module):
    """Knows nothing: eps = number."""

    def __init__(self, number):
        super().__init__()
        self.diffusion = Diffusion(cosine_schedule(21))
        self.classes = 10
        self.number = number

    def forward(self, xt, t, y=None):
        return torch.full_like(xt, self.number)


def test_bits_are_per_pixel_with_the_label_and_nan_stays(monkeypatch):
    images = torch.arange(200, dtype=torch.uint8)[:, None, None].expand(200, 28, 28)
    y = torch.arange(200) % 10
    assert math.isnan(judge_mnist.bits_per_dimension(Network(math.nan), images, y, 4)["bits"])

    def bound(diffusion, model, x0, generator):  # 0 to 199 bits a pixel, one number an image
        value = (x0[:, :1, 0, 0].double() + 1) * 127.5
        return 784 * math.log(2) * torch.cat([value / 4, value * 3 / 4], 1)

    monkeypatch.setattr(judge_mnist, "variational_bound", bound)
    row = judge_mnist.bits_per_dimension(Network(0.0), images, y, 200)
    assert row["bits"] == pytest.approx(99.5 + math.log2(10) / 784)
    assert row["bits_error"] == pytest.approx(np.arange(200).std(ddof=1) / 200**0.5)


class Stub(nn.Module):
    """Sees the digit that the first pixel is; features are two other pixels."""

    def features(self, x):
        return x.flatten(1)[:, [0, 1, 2]]

    def last(self, features):
        value = ((features[:, :1] + 1) * 127.5).round()
        return torch.where(value > 9, math.nan, -(value - torch.arange(10)).abs())


def test_share_recognised_and_frechet_ratio():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(10, (9000, 28, 28), dtype=torch.uint8, generator=generator)
    features, guess = judge_mnist.predict(Stub(), real)
    torch.testing.assert_close(guess, real[:, 0, 0].long())
    saved = {"train": features[:6000].float(), "test": features[6000:].float()}
    saved["labels"] = guess[:6000]
    samples = real[:1000].clone()
    labels = samples[:, 0, 0].long()
    row = judge_mnist.judge(Stub(), samples, labels, saved)
    assert row["recognised"] == 1 and row["recognised_error"] == 0
    assert 0.3 < row["frechet_ratio"] < 3  # they are real
    samples[:100, 0, 0] = 99  # the logits of these are NaN, whose argmax is 0
    row = judge_mnist.judge(Stub(), samples, labels, saved)
    assert row["recognised"] == pytest.approx(0.9)
    assert row["recognised_error"] == pytest.approx(0.3 / 1000**0.5)
    assert row["frechet_ratio"] > 100
    saved["test"][0] = math.nan
    assert math.isnan(judge_mnist.judge(Stub(), samples, labels, saved)["frechet_ratio"])
    assert "frechet_ratio" not in judge_mnist.judge(Stub(), samples[:999], labels[:999], saved)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder of noise and an untrained network, beside small real data and a classifier."""
    monkeypatch.setattr(judge_mnist, "cosine_schedule", lambda T: cosine_schedule(21))
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 28, 28), np.uint8)
    y = np.arange(40, dtype=np.uint8) % 10
    np.savez(tmp_path / "data.npz", x_train=images, y_train=y, x_test=images, y_test=y)
    saved = {"classifier": judge_mnist.Classifier().state_dict(), "data": zlib.crc32(images)}
    saved |= {"train": torch.randn(40, 128), "test": torch.randn(40, 128), "accuracy": 0.99}
    saved["labels"] = torch.from_numpy(y)
    torch.save(saved, tmp_path / "classifier.pt")
    folder = tmp_path / "run"
    folder.mkdir()
    np.save(folder / "samples.npy", images[..., None])
    np.save(folder / "labels.npy", y)
    net = UNet(Diffusion(cosine_schedule(21)))
    config = {"shape": [1, 28, 28], "labels": list(range(10))}
    torch.save({"config": config, "ema": net.state_dict()}, folder / "model.pt")
    return folder


def judged(run, *flags):
    files = ["--data", run.parent / "data.npz", "--classifier", run.parent / "classifier.pt"]
    return judge_mnist.main([str(word) for word in (run, *files, *flags)])


def test_the_numbers_printed_are_those_returned(run, capsys):
    (row,) = judged(run, "--bits", 2)
    printed = capsys.readouterr().out
    assert printed.count(f"{row['bits']:.3f} +- {row['bits_error']:.3f}") == 1
    assert printed.count(f"{row['recognised']:.1%} +- {row['recognised_error']:.1%}") == 1
    assert "none" in printed and "frechet_ratio" not in row  # only 40 samples
    assert row["run"] == str(run) and row["samples"] == 40 and 0 < row["bits"] < math.inf


def test_what_cannot_be_judged_is_refused_in_one_line(run, capsys):
    images = np.load(run / "samples.npy")
    labels = np.load(run / "labels.npy")
    state = torch.load(run / "model.pt")

    def refused(*flags):
        with pytest.raises(SystemExit) as stop:
            judged(run, *flags)
        message = capsys.readouterr().err.partition("error: ")[2]
        assert stop.value.code == 2 and len(message.splitlines()) == 1
        return message

    for flags in (["--bits", 1], ["--bits", -3], ["--bits", 41], ["--data", run / "labels.npy"]):
        assert refused(*flags)
    other = 255 - images[..., 0]
    np.savez(run / "other.npz", x_train=other, y_train=labels, x_test=other, y_test=labels)
    assert "--classifier" in refused("--data", run / "other.npz")
    config = state["config"]
    for change in ({"ema": {}}, {"config": config | {"labels": [0, 1]}}, {"config": None}):
        torch.save(state | change, run / "model.pt")
        assert "model.pt" in refused("--bits", 2)
    for content in (b"", b"text", b"PK\x03\x04", b"\x80\x02."):
        (run / "model.pt").write_bytes(content)
        assert "model.pt" in refused("--bits", 2)
    for content in (b"", b"text", b"\x80\x02."):  # numpy leaves half a zip file open
        (run / "samples.npy").write_bytes(content)
        assert "samples.npy" in refused()
    nan = np.full(images.shape, math.nan, np.float32)
    for wrong in (nan, images[..., 0], images[:, :14], images.repeat(3, 3), images[:5], images[:0]):
        np.save(run / "samples.npy", wrong)
        assert str(run) in refused()
    np.save(run / "samples.npy", images)
    for wrong in (labels + 1, labels / 1, labels[:, None], labels.astype(str), np.uint8(3)):
        np.save(run / "labels.npy", wrong)
        assert str(run) in refused()
    np.save(run / "labels.npy", labels)
    for name in ("model.pt", "samples.npy", "labels.npy"):
        (run / name).rename(run / "away")
        assert name in refused("--bits", 2)
        (run / "away").rename(run / name)
