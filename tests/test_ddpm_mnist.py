"""ddpm_mnist.py as a specification: data, U-Net, training, checkpoints, samples, torchrun.

What it shares with ddpm_2d.py is in test_diffusion.py. Nothing here needs a network or a GPU.
"""

import contextlib
import gc
import hashlib
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from mnist_process import Small
from pretend_device import pretend_device
from torch import nn
from torch.distributed.run import get_args_parser

import ddpm_mnist
from ddpm_mnist import Diffusion, UNet, cosine_schedule, denoiser

SCRIPT = Path(ddpm_mnist.__file__)
SAMPLED = ["labels.npy", "samples.npy", "samples.png"]
FILES = ["labels.npy", "model.pt", "samples.npy", "samples.png"]
TINY = "--steps 1 --batch-size 4 --samples 3 --sample-steps 1".split()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def main(*flags):
    ddpm_mnist.main([*TINY, *map(str, flags)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def files_left_open():
    """By numpy and urllib, if they fail: closed here, and not with a warning in a later test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def saved(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def same(a, b):
    """Nested dicts and lists with equal leaves."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def small(monkeypatch):
    """A network of one convolution, where the network does not matter."""
    monkeypatch.setattr(ddpm_mnist, "UNet", Small)
    monkeypatch.setattr(Small, "seen", [])
    return Small.seen


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twenty images, half of them dark with label 3, half of them bright with label 7."""
    x = pixels(20, 8, 8) // 8
    x[1::2] += 224
    return npz(tmp_path_factory.mktemp("data") / "mine.npz", x_train=x, y_train=[3, 7] * 10)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run of 102 steps, and its folder as a kill in the 102nd would have left it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "whole").mkdir()
    losses = Diffusion.p_losses
    calls = []

    def spy(self, *args):
        calls.append(1)
        if len(calls) == 102:
            shutil.copytree(folder / "whole", folder / "killed")
        return losses(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diffusion, "p_losses", spy)
        flags = ["--samples", 8, "--sample-steps", 5, "--batch-size", 8, "--lr", 5e-3]
        main("--data", data, "--steps", 102, *flags, "--out", folder / "whole")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A folder with the model.pt of that run."""
    (tmp_path / "copy").mkdir()
    shutil.copy(trained / "whole" / "model.pt", tmp_path / "copy")
    return tmp_path / "copy"


# ----------------------------------------------------------------------------- MNIST, the download

DIGESTS = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}


def test_committed_digits_are_those_of_the_original_files():
    path = SCRIPT.parent / "data" / "mnist.npz"
    assert ddpm_mnist.MNIST == path and path.is_absolute()
    with np.load(path) as arrays:
        digests = {name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in arrays}
        shapes = [arrays[name].shape for name in DIGESTS]
    assert digests == DIGESTS
    assert shapes == [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
    x, y, config = ddpm_mnist.load_images(path)
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest() == DIGESTS["x_train"]
    assert y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert config == {"shape": [1, 28, 28], "labels": list(range(10))}
    digest = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"  # Keras's file
    assert ddpm_mnist.SHA256 == digest and ddpm_mnist.URL.endswith("tf-keras-datasets/mnist.npz")


@pytest.fixture
def server(data, monkeypatch, tmp_path):
    """server(mode) serves the data set, as a file that was not downloaded yet; returns its path."""
    body = data.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            mode = self.path.strip("/")
            self.send_response(404 if mode == "404" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write({"cut": body[:500], "wrong": body[::-1]}.get(mode, body))

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()

    def start(mode):
        path = tmp_path / "sub" / "mnist.npz"
        port = 1 if mode == "refused" else http.server_port
        monkeypatch.setattr(ddpm_mnist, "URL", f"http://127.0.0.1:{port}/{mode}")
        monkeypatch.setattr(ddpm_mnist, "SHA256", hashlib.sha256(body).hexdigest())
        monkeypatch.setattr(ddpm_mnist, "MNIST", path)
        return path

    yield start
    http.shutdown()
    http.server_close()


def test_missing_digits_are_downloaded_once(server, data, small, tmp_path, capsys):
    path = server("good")
    main("--out", tmp_path / "out")
    assert path.read_bytes() == data.read_bytes() and names(path.parent) == ["mnist.npz"]
    said = capsys.readouterr().out.splitlines()[0]
    assert str(path) in said and ddpm_mnist.URL in said
    server("404")
    main("--out", tmp_path / "out")  # now it is there
    assert "downloading" not in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["404", "wrong", "cut", "refused"])
def test_a_failed_download_is_one_line_and_leaves_nothing(mode, server, tmp_path, capsys):
    path = server(mode)
    with files_left_open():
        try:
            main("--out", tmp_path / "out")
        except SystemExit as exit:
            assert exit.code == 2
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert "error: " in line and str(path) in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_only_the_default_path_is_ever_downloaded(server, refuses, tmp_path):
    server("good")
    for path in (tmp_path / "mnist.npz", tmp_path / "sub" / "mnits.npz"):
        refuses(ddpm_mnist.main, [*TINY, "--data", path, "--out", tmp_path / "out"], path)
    assert names(tmp_path) == ["out"]


# ---------------------------------------------------------------------------------- your own images

OWN = {
    "grey 8 x 8": (pixels(6, 8, 8), range(6)),
    "grey with a channel": (pixels(6, 8, 8, 1), range(6)),
    "colour 32 x 32": (pixels(6, 32, 32, 3), range(6)),
    "grey 64 x 64": (pixels(4, 64, 64), range(4)),
    "16 x 32": (pixels(6, 16, 32), [5] * 6),
    "one image": (pixels(1, 8, 8), [2]),
    "negative labels": (pixels(6, 8, 8), np.array([-3, 1] * 3, np.int8)),
    "uint64 labels": (pixels(6, 8, 8), np.array([9, 4, 4] * 2, np.uint64)),
    "letters 1..26": (pixels(52, 8, 8), np.arange(52) % 26 + 1),
    "no labels": (pixels(6, 8, 8), None),
}


@pytest.mark.parametrize("kind", OWN)
def test_own_images_are_trained_and_drawn(kind, tmp_path):
    x, y = OWN[kind]
    labels = [0] if y is None else sorted({int(label) for label in y})
    more = {} if y is None else {"y_train": np.asarray(y)}
    path = npz(tmp_path / "d.npz", x_train=x, **more, x_test=[1.5], other="ignored")
    main("--data", path, "--samples", 30, "--out", tmp_path / "out")
    height, width, *channels = x.shape[1:]
    shape = [*channels, 1][:1] + [height, width]
    assert saved(tmp_path / "out")["config"] == {"shape": shape, "labels": labels}
    images = np.load(tmp_path / "out" / "samples.npy")
    assert images.dtype == np.uint8 and images.shape == (30, height, width, shape[0])
    want = [labels[k % len(labels)] for k in range(30)]
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == want
    sheet = imread(tmp_path / "out" / "samples.png")
    colour = sheet.shape == (3 * height, 10 * width, 4) and np.ptp(sheet[..., :3], axis=-1).any()
    assert colour == (shape[0] == 3)
    main("--load", tmp_path / "out" / "model.pt", "--label", labels[-1], "--out", tmp_path / "one")
    assert np.load(tmp_path / "one" / "labels.npy").tolist() == [labels[-1]] * 3


X = pixels(6, 8, 8)
Y = np.arange(6)
WRONG = {
    "floats in [0, 1]": ({"x_train": X / 255, "y_train": Y}, "float64"),
    "uint16": ({"x_train": X.astype(np.uint16), "y_train": Y}, "uint16"),
    "30 x 30": ({"x_train": pixels(6, 30, 30), "y_train": Y}, "[6, 30, 30]"),
    "8 x 30": ({"x_train": pixels(6, 8, 30), "y_train": Y}, "[6, 8, 30]"),
    "RGBA": ({"x_train": pixels(6, 8, 8, 4), "y_train": Y}, "[6, 8, 8, 4]"),
    "two channels": ({"x_train": pixels(6, 8, 8, 2), "y_train": Y}, "[6, 8, 8, 2]"),
    "channels first": ({"x_train": pixels(6, 3, 8, 8), "y_train": Y}, "[6, 3, 8, 8]"),
    "flat": ({"x_train": X.reshape(6, 64), "y_train": Y}, "[6, 64]"),
    "five axes": ({"x_train": pixels(6, 8, 8, 2, 2), "y_train": Y}, "[6, 8, 8, 2, 2]"),
    "five axes with 3 values": (
        {"x_train": pixels(6, 8, 8, 3, 1), "y_train": Y},
        "[6, 8, 8, 3, 1]",
    ),
    "a number": ({"x_train": np.uint8(5)}, "[]"),
    "no images": ({"x_train": X[:0], "y_train": Y[:0]}, "[0, 8, 8]"),
    "a label too few": ({"x_train": X, "y_train": Y[:5]}, "[5]"),
    "labels as floats": ({"x_train": X, "y_train": Y / 1}, "float64"),
    "labels as a column": ({"x_train": X, "y_train": Y[:, None]}, "[6, 1]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arrays_are_refused_with_what_was_found_and_is_wanted(kind, refuses, tmp_path):
    arrays, found = WRONG[kind]
    flags = ["--data", npz(tmp_path / "d.npz", **arrays), "--out", tmp_path / "out"]
    with files_left_open():
        refuses(ddpm_mnist.main, [*TINY, *flags], "d.npz", found, "uint8 [n, H, W]", "by 4")
    assert names(tmp_path / "out") == []


def test_what_is_no_such_archive_is_refused_by_name(data, refuses, tmp_path):
    whole = data.read_bytes()
    np.save(tmp_path / "a.npy", X)
    npz(tmp_path / "names.npz", images=X, labels=Y)
    np.savez(tmp_path / "objects.npz", x_train=np.array([X, None], dtype=object))
    contents = {"empty": b"", "text": b"images\n", "cut": whole[: len(whole) // 2], "x": whole[:9]}
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    (tmp_path / "folder.npz").mkdir()
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "missing.npz"]:
        words = [path] + ["x_train"] * (path.name in ("a.npy", "names.npz"))
        with files_left_open():
            refuses(ddpm_mnist.main, [*TINY, "--data", path, "--out", tmp_path / "out"], *words)
    assert names(tmp_path / "out") == []


def test_a_damaged_byte_is_noticed(data, refuses, tmp_path):
    whole = bytearray(data.read_bytes())
    with zipfile.ZipFile(data) as file:
        entry = file.getinfo("x_train.npy")
    start = entry.header_offset + 30 + len(entry.filename) + 20  # header, name, zip64 sizes
    bad = tmp_path / "bad.npz"
    with files_left_open():
        for k in range(start, start + entry.compress_size, 20):
            bad.write_bytes(whole[:k] + bytes([whole[k] ^ 85]) + whole[k + 1 :])
            refuses(ddpm_mnist.main, [*TINY, "--data", bad, "--out", tmp_path / "out"], bad)


# ---------------------------------------------------------------------------------------- the U-Net


def unet(channels=1):
    torch.manual_seed(0)
    net = UNet(Diffusion(cosine_schedule(50)), channels)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))  # away from the zero-initialised output
    return net


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 64), (4, 12)])
def test_every_size_divisible_by_4_works(channels, size):
    x = torch.randn(2, channels, *size)
    out = unet(channels)(x, torch.tensor([3, 50]), torch.tensor([1, 9]))
    assert out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all()


def test_output_is_v_turned_into_the_noise():
    """eps = signal v + noise x_t: where nearly no signal is left it is x_t, however bad v is."""
    net, heads = unet(), []
    net.head.register_forward_hook(lambda module, args, out: heads.append(out.double()))
    x = torch.randn(50, 1, 8, 8)
    t = torch.arange(1, 51)
    out = net(x, t)
    a = torch.tensor(net.diffusion.alpha_bar, dtype=torch.float64)[t].view(50, 1, 1, 1)
    torch.testing.assert_close(
        out.double(), a.sqrt() * heads[0] + (1 - a).sqrt() * x, rtol=1e-4, atol=1e-5
    )
    assert (out[-1] - x[-1]).abs().max() < 0.02 and (out[0] - x[0]).abs().mean() > 0.3


def test_network_depends_on_image_time_and_label():
    net, x = unet(), torch.randn(1, 1, 28, 28)
    t, y = torch.tensor([20]), torch.tensor([4])
    out = net(x, t, y)
    outs = net(x + 0.1, t, y), net(x, t + 1, y), net(x, t, y + 1), net(x, t)
    assert all((other - out).abs().max() > 1e-3 for other in outs)
    torch.testing.assert_close(net(x, t), net(x, t, torch.tensor([10])))  # "not told"


def test_images_of_a_batch_do_not_see_each_other():
    net, x = unet(), torch.randn(5, 1, 28, 28)
    t, y = torch.tensor([1, 10, 20, 30, 50]), torch.tensor([0, 1, 2, 10, 9])
    order = torch.tensor([3, 0, 4, 1, 2])
    out = net(x, t, y)
    torch.testing.assert_close(net(x[order], t[order], y[order]), out[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net(x[1:2], t[1:2], y[1:2]), out[1:2], rtol=1e-4, atol=1e-4)


def test_skips_bring_the_features_of_every_size_to_the_way_up():
    """What enters a block on the way up is what came from below plus what the way down had."""
    net, seen = unet(), {}
    for name in ("stem", "down1", "down2", "middle1", "middle2", "up2", "up1", "up0"):
        getattr(net, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0], out)})
        )
    net(torch.randn(2, 1, 8, 12), torch.tensor([3, 40]))
    larger = nn.Upsample(scale_factor=2)
    close = torch.testing.assert_close
    close(seen["up2"][0], seen["middle2"][1] + seen["middle1"][0])
    close(seen["up1"][0], larger(seen["up2"][1]) + seen["down1"][1])
    close(seen["up0"][0], larger(seen["up1"][1]) + seen["stem"][1])
    close(seen["down1"][0], nn.AvgPool2d(2)(seen["stem"][1]))
    close(seen["middle1"][0], seen["down2"][1])


def test_attention_adds_the_mean_of_all_positions_weighed_by_softmax_of_q_k():
    """Between the two blocks in the middle; Vaswani et al. 2017 written out, for four heads."""
    net, seen = unet(), []
    net.middle1.register_forward_hook(lambda module, args, out: seen.append(out))
    net.middle2.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    net(torch.randn(2, 1, 12, 20), torch.tensor([3, 40]))
    h = net.norm(seen[0]).flatten(2).mT  # [2, 15, 128]
    qkv = h @ net.attention.in_proj_weight.T + net.attention.in_proj_bias
    q, k, v = qkv.view(2, 15, 3, 4, 32).unbind(2)  # [2, positions, heads, 32]
    weight = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(32), -1)
    mixed = net.attention.out_proj(torch.einsum("bhnm,bmhd->bnhd", weight, v).reshape(2, 15, 128))
    torch.testing.assert_close(seen[1], seen[0] + mixed.mT.view(2, 128, 3, 5), rtol=1e-4, atol=1e-4)


def test_every_parameter_learns():
    net = unet()
    x, t = torch.randn(4, 1, 28, 28), torch.tensor([1, 10, 30, 50])
    net(x, t, torch.tensor([0, 3, 10, 9])).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 4])
def test_denoiser_guides_by_eq_6_and_clips_x0(guidance):
    """(1 + w) eps(x, y) - w eps(x) of Ho & Salimans 2022, guidance = 1 + w, written in float64."""
    T = 50
    diffusion = Diffusion(cosine_schedule(T))

    def net(x, t, y=None):
        return 0.8 * x - 0.1 if y is None else 0.9 * x + 0.05 * y.view(-1, 1, 1, 1)

    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(T, 1, 4, 4, generator=generator)
    t, y = torch.arange(1, T + 1), torch.arange(T) % 10
    got = denoiser(net, diffusion, y, guidance)(x, t)
    x, w = x.double(), guidance - 1
    eps = (1 + w) * net(x, t, y) - w * net(x, t)
    a = torch.tensor(diffusion.alpha_bar, dtype=torch.float64)[t].view(T, 1, 1, 1)
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    inside = x0.abs() < 1
    assert 0.2 < inside.double().mean() < 0.8
    want = (x - a.sqrt() * x0.clamp(-1, 1)) / (1 - a).sqrt()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.double()[inside], eps[inside], rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------- training


@pytest.fixture
def batches(small, tmp_path, monkeypatch):
    """x0, t, y of 40 steps of 100 images: image k of 50 has pixels 5 k, label (3, 7, 20)[k % 3]."""
    losses, images = Diffusion.p_losses, []

    def spy(self, model, x0, *args):
        images.append(x0)
        return losses(self, model, x0, *args)

    monkeypatch.setattr(Diffusion, "p_losses", spy)
    k = np.arange(50)
    x = np.broadcast_to(5 * k[:, None, None], (50, 4, 4)).astype(np.uint8)
    path = npz(tmp_path / "d.npz", x_train=x, y_train=np.array([3, 7, 20])[k % 3])
    main("--data", path, "--steps", 40, "--batch-size", 100, "--out", tmp_path / "out")
    assert len(images) == len(small) == 40
    return [(x0, t, y) for x0, (_, t, y) in zip(images, small)]


def test_steps_are_drawn_with_p_2t_minus_1_and_evenly_in_a_batch(batches):
    """P(t <= k) = (k / T)^2; of 100 draws, as near as whole numbers come: 100 (k / T)^2 of them."""
    want = 100 * (torch.arange(1, 1001).double() / 1000) ** 2
    drawn = torch.stack([t for _, t, _ in batches])
    assert drawn.min() >= 1 and drawn.max() == 1000
    counts = torch.stack([(t[:, None] <= torch.arange(1, 1001)).double().sum(0) for t in drawn])
    assert (counts > want - 1 - 1e-3).all() and (counts < want + 1 + 1e-3).all()
    part = want % 1
    error = 6 * (part * (1 - part) / 40).sqrt() + 0.01
    assert ((counts.mean(0) - want).abs() <= error).all()


def test_images_are_drawn_evenly_and_scaled_from_minus_1_to_1(batches):
    """Six standard errors around 80 of 4000 draws for each of the fifty images."""
    x0 = torch.cat([x0 for x0, _, _ in batches])
    k = (x0[:, 0, 0, 0] + 1) * 127.5 / 5
    assert (k - k.round()).abs().max() < 1e-4 and x0.dtype == torch.float32
    torch.testing.assert_close(x0, (5 * k.round() / 127.5 - 1).view(-1, 1, 1, 1).expand_as(x0))
    counts = k.round().long().bincount(minlength=50)
    assert len(counts) == 50 and (counts - 80).abs().max() < 6 * math.sqrt(80)
    assert len({tuple(x0[:, 0, 0, 0].tolist()) for x0, _, _ in batches}) == 40


def test_a_tenth_of_the_labels_is_hidden_and_the_others_are_right(batches):
    x0, y = (torch.cat(part) for part in list(zip(*batches))[::2])
    k = ((x0[:, 0, 0, 0] + 1) * 127.5 / 5).round().long()
    hidden = y == 3
    assert (hidden | (y == k % 3)).all()
    assert abs(hidden.double().mean() - 0.1) < 6 * math.sqrt(0.09 / 4000)
    shares = [hidden[k % 3 == label].double().mean() for label in range(3)]
    assert max(abs(share - 0.1) for share in shares) < 6 * math.sqrt(0.09 / 1300)


def test_loss_is_the_mean_squared_error_of_v(tmp_path, monkeypatch):
    """v = signal eps - noise x_0, against what the head of the U-Net gave for it, in float64."""
    losses, want, heads = Diffusion.p_losses, [], []

    def spy(self, model, x0, t):
        eps = torch.randn_like(x0)
        result = losses(self, model, x0, t, eps)
        a = torch.tensor(self.alpha_bar, dtype=torch.float64)[t].view(-1, 1, 1, 1)
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        want.append((v - heads[-1]).square().mean().item())
        return result

    class Hooked(UNet):
        def __init__(self, *args):
            super().__init__(*args)
            self.head.register_forward_hook(lambda module, args, out: heads.append(out.double()))

    monkeypatch.setattr(Diffusion, "p_losses", spy)
    monkeypatch.setattr(ddpm_mnist, "UNet", Hooked)
    path = npz(tmp_path / "d.npz", x_train=pixels(20, 8, 8, 3))
    main("--data", path, "--steps", 3, "--batch-size", 16, "--out", tmp_path)
    assert saved(tmp_path)["losses"] == pytest.approx(want, rel=2e-3)


@pytest.fixture
def watched(data, small, tmp_path, monkeypatch):
    """watched(factor, *flags): learning rates, gradients, weights at every step of the optimiser,
    with the loss multiplied by factor."""
    step, losses, rows = torch.optim.AdamW.step, Diffusion.p_losses, []

    def watch(self, *args, **more):
        group = self.param_groups[0]
        gradients = torch.cat([p.grad.flatten() for p in group["params"]])
        result = step(self, *args, **more)
        rows.append((group["lr"], gradients, [p.detach().clone() for p in group["params"]]))
        return result

    def run(factor, *flags):
        monkeypatch.setattr(Diffusion, "p_losses", lambda *args: factor * losses(*args))
        monkeypatch.setattr(torch.optim.AdamW, "step", watch)
        main("--data", data, "--out", tmp_path, *flags)
        return list(zip(*rows))

    return run


def test_average_of_the_weights_is_that_after_each_step(watched, tmp_path):
    """ema <- 0.995 ema + 0.005 weights, from the weights after the first step, in float64."""
    _, _, weights = watched(1, "--steps", 60, "--lr", 0.1)
    want = [p.double() for p in weights[0]]
    for step in weights[1:]:
        want = [0.995 * e + 0.005 * p.double() for e, p in zip(want, step)]
    state = saved(tmp_path)
    for got, last, mean, p in zip(state["ema"].values(), state["net"].values(), want, weights[-1]):
        torch.testing.assert_close(got.double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(last, p) and (mean - p).abs().max() > 0.01


def test_learning_rate_warms_up_over_a_twentieth_and_falls_to_0(watched):
    rates, _, _ = watched(1, "--steps", 80, "--lr", 0.01)
    want = [0.01 * min(1, (k + 1) / 4) * (1 - k / 80) for k in range(80)]
    assert rates == pytest.approx(want)


@pytest.mark.parametrize("factor", [1e4, 1e-4])
def test_gradients_longer_than_1_are_cut_to_1_and_others_kept(watched, factor):
    _, gradients, _ = watched(factor, "--steps", 3, "--lr", 1e-6)
    norms = torch.stack([g.norm() for g in gradients])
    if factor > 1:
        torch.testing.assert_close(norms, torch.ones(3), rtol=1e-4, atol=1e-4)
    else:
        assert 1e-6 < norms.min() and norms.max() < 1e-2


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_training_that_explodes_ends_in_one_line_and_keeps_the_checkpoint(
    fault, copy, data, monkeypatch
):
    losses = Diffusion.p_losses
    before = (copy / "model.pt").read_bytes()

    def broken(self, *args):
        error = losses(self, *args)
        return error * math.nan if fault == "loss" else error + (error - error.detach()).sqrt()

    monkeypatch.setattr(Diffusion, "p_losses", broken)
    with pytest.raises(SystemExit) as exit:
        main("--data", data, "--out", copy, "--resume", "--steps", 103)
    assert len(exit.value.code.strip().splitlines()) == 1  # a string: exit code 1
    assert "step 102" in exit.value.code and "--lr" in exit.value.code
    assert (copy / "model.pt").read_bytes() == before and names(copy) == ["model.pt"]


def test_same_seed_gives_the_same_numbers_and_another_seed_others(data, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.rand(ord(name))  # what was drawn before does not matter
        main("--data", data, "--steps", 2, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (saved(tmp_path / name) for name in "abc")
    assert same(a, b) and a["losses"] != c["losses"]
    assert not torch.equal(a["net"]["stem.weight"], c["net"]["stem.weight"])
    a, b, c = ((tmp_path / name / "samples.npy").read_bytes() for name in "abc")
    assert a == b != c


def test_what_is_learned_is_drawn_as_asked(trained):
    """After 102 steps the dark images of label 3 and the bright ones of label 7 are told apart."""
    net = saved_net(trained / "whole" / "model.pt", "net")
    torch.manual_seed(0)
    model = denoiser(net, net.diffusion, torch.tensor([0, 1] * 10))
    *_, x0 = net.diffusion.ddim_sample_loop(model, torch.randn(20, 1, 8, 8), 20)
    mean = x0.mean((1, 2, 3))
    assert mean[::2].max() < -0.3 and mean[1::2].min() > 0.3


# -------------------------------------------------------------------------------------- checkpoints


def saved_net(path, weights="ema"):
    """A model.pt in one's own code."""
    state = torch.load(path, weights_only=True)
    channels, classes = state["config"]["shape"][0], len(state["config"]["labels"])
    net = UNet(Diffusion(cosine_schedule(1000)), channels, classes)
    net.load_state_dict(state[weights])
    return net


def test_checkpoint_rebuilds_the_network_in_three_lines(trained):
    state = saved(trained / "whole")
    assert state["config"] == {"shape": [1, 8, 8], "labels": [3, 7]}
    assert len(state["losses"]) == 102 and names(trained / "whole") == FILES
    net = saved_net(trained / "whole" / "model.pt")
    out = net(torch.randn(2, 1, 8, 8), torch.tensor([1, 1000]), torch.tensor([0, 1]))
    assert out.isfinite().all() and same(dict(net.state_dict()), dict(state["ema"]))


def test_load_draws_what_the_run_drew_without_its_data(trained, tmp_path):
    flags = ["--samples", 8, "--sample-steps", 5, "--data", tmp_path / "gone.npz"]
    main("--load", trained / "whole" / "model.pt", *flags, "--out", tmp_path / "new")
    assert names(tmp_path / "new") == SAMPLED
    for name in SAMPLED:
        assert (tmp_path / "new" / name).read_bytes() == (trained / "whole" / name).read_bytes()


def test_resume_after_a_kill_equals_an_uninterrupted_run(trained, data, tmp_path):
    shutil.copytree(trained / "killed", tmp_path / "out")
    assert names(tmp_path / "out") == ["model.pt"] and len(saved(tmp_path / "out")["losses"]) == 100
    flags = ["--steps", 102, "--batch-size", 8, "--lr", 5e-3, "--samples", 8, "--sample-steps", 5]
    main("--data", data, *flags, "--out", tmp_path / "out", "--resume")
    assert same(saved(tmp_path / "out"), saved(trained / "whole"))
    assert names(tmp_path / "out") == FILES
    for name in SAMPLED:
        assert (tmp_path / "out" / name).read_bytes() == (trained / "whole" / name).read_bytes()


def test_resume_goes_on_to_more_steps_and_with_fewer_only_samples(copy, data):
    before = (copy / "model.pt").read_bytes()
    old = saved(copy)
    for steps in (102, 7):
        main("--data", data, "--out", copy, "--resume", "--steps", steps)
        assert (copy / "model.pt").read_bytes() == before and names(copy) == FILES
    main("--data", data, "--out", copy, "--resume", "--steps", 104)
    new = saved(copy)
    assert len(new["losses"]) == 104 and new["losses"][:102] == old["losses"]


def test_resume_names_data_that_contradict_the_checkpoint(copy, refuses, tmp_path):
    before = (copy / "model.pt").read_bytes()
    for shape, labels in (((6, 8, 8, 3), [3, 7] * 3), ((6, 12, 8), [3, 7] * 3), (X.shape, Y)):
        path = npz(tmp_path / "d.npz", x_train=pixels(*shape), y_train=labels)
        words = [path, copy / "model.pt", "[1, 8, 8]", "[3, 7]", sorted(set(map(int, labels)))]
        refuses(ddpm_mnist.main, [*TINY, "--data", path, "--out", copy, "--resume"], *words)
    assert (copy / "model.pt").read_bytes() == before and names(copy) == ["model.pt"]


POINTS = {"net": {"stem.weight": torch.ones(2)}, "mean": torch.ones(2), "data": "moons", "T": 50}
BAD_CHECKPOINTS = {  # what --load and --resume may be given by mistake: bytes, or from a good one
    "missing": None,
    "empty": b"",
    "text": b"weights\n" * 9,
    "random": pixels(999).tobytes(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100_000]),
    "an .npz": lambda path: npz(path.with_suffix(".npz"), x_train=pixels(2, 8, 8)).rename(path),
    "whole module": lambda path: torch.save(nn.Linear(1, 1), path),
    "list": lambda path: torch.save([1, 2], path),
    "of ddpm_2d.py": lambda path: torch.save(POINTS, path),
    "state dict": lambda path: torch.save(saved(path.parent)["ema"], path),
    "other network": lambda path: torch.save(saved(path.parent) | {"ema": {}, "net": {}}, path),
    "other config": lambda path: torch.save(saved(path.parent) | {"config": ["moons"]}, path),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
@pytest.mark.parametrize("flag", ["--load", "--resume"])
def test_what_is_no_checkpoint_is_refused(kind, flag, copy, data, refuses):
    path, bad = copy / "model.pt", BAD_CHECKPOINTS[kind]
    bad(path) if callable(bad) else path.unlink() if bad is None else path.write_bytes(bad)
    files = {file: file.read_bytes() for file in copy.iterdir()}
    more = ["--load", path] if flag == "--load" else ["--resume", "--data", data, "--steps", 200]
    refuses(ddpm_mnist.main, [*TINY, *more, "--out", copy], path)
    assert {file: file.read_bytes() for file in copy.iterdir()} == files


def test_weights_alone_can_be_loaded_but_not_resumed(trained, data, refuses, tmp_path):
    state = saved(trained / "whole")
    torch.save({name: state[name] for name in ("config", "ema")}, tmp_path / "model.pt")
    more = ["--data", data, "--out", tmp_path, "--resume"]
    refuses(ddpm_mnist.main, [*TINY, *more], tmp_path / "model.pt")
    assert names(tmp_path) == ["model.pt"]
    main("--load", tmp_path / "model.pt", "--out", tmp_path)
    assert names(tmp_path) == FILES


def test_a_new_training_keeps_the_old_model(data, small, tmp_path, capsys):
    main("--data", data, "--out", tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    assert "model.old.pt" not in capsys.readouterr().out
    main("--data", data, "--out", tmp_path, "--seed", 1)
    assert (
        (tmp_path / "model.old.pt").read_bytes() == before != (tmp_path / "model.pt").read_bytes()
    )
    assert "model.old.pt" in capsys.readouterr().out


def test_a_full_disk_ends_in_one_line_and_keeps_the_checkpoint(copy, data):
    before = (copy / "model.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            main("--data", data, "--out", copy, "--resume", "--steps", 103)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(exit.value.code.strip().splitlines()) == 1 and str(copy) in exit.value.code
    assert (copy / "model.pt").read_bytes() == before and names(copy) == ["model.pt"]


def test_ctrl_c_while_saving_keeps_the_checkpoint(copy, data, monkeypatch):
    before = (copy / "model.pt").read_bytes()

    def half(state, file):
        file.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        main("--data", data, "--out", copy, "--resume", "--steps", 103)
    assert (copy / "model.pt").read_bytes() == before
    main("--data", data, "--out", copy, "--resume", "--steps", 103)
    assert len(saved(copy)["losses"]) == 103 and names(copy) == FILES


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("count", [1, 15, 101, 501])
def test_any_number_is_drawn_and_the_first_hundred_shown(count, data, small, tmp_path):
    main("--data", data, "--samples", count, "--seed", 1, "--out", tmp_path)
    images = np.load(tmp_path / "samples.npy")
    assert images.shape == (count, 8, 8, 1)
    assert len({image.tobytes() for image in images}) == count  # each from its own noise
    assert np.load(tmp_path / "labels.npy").tolist() == [(3, 7)[k % 2] for k in range(count)]
    sheet = imread(tmp_path / "samples.png")[..., :3] * 255
    want = np.zeros((8 * math.ceil(min(count, 100) / 10), 80, 3))
    for k, image in enumerate(images[:100]):
        row, column = divmod(k, 10)
        want[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = image
    np.testing.assert_allclose(sheet, want, atol=1e-3)


def test_main_samples_as_asked(data, small, tmp_path, monkeypatch):
    """Noise of N(0, 1) in batches of at most 500, each with its labels; guidance, steps and eta."""
    calls = []

    def loop(self, model, xT, steps, eta):
        calls.append((xT, steps, eta, model(xT, torch.full((len(xT),), 500))))
        yield from [0 * xT] * (steps + 1)

    monkeypatch.setattr(Diffusion, "ddim_sample_loop", loop)
    flags = ["--samples", 1201, "--sample-steps", 7, "--eta", 0.3, "--guidance", 2.5]
    main("--data", data, *flags, "--out", tmp_path)
    assert max(len(xT) for xT, *_ in calls) <= 500
    assert {call[1:3] for call in calls} == {(7, 0.3)}
    xT, eps = (torch.cat(part) for part in list(zip(*calls))[::3])
    assert xT.shape == (1201, 1, 8, 8) and abs(xT.mean()) < 6 / math.sqrt(xT.numel())
    assert abs(xT.var() - 1) < 6 * math.sqrt(2 / xT.numel())
    net = Small(Diffusion(cosine_schedule(1000)), 1, 2)
    net.load_state_dict(saved(tmp_path)["ema"])
    model = denoiser(net, net.diffusion, torch.arange(1201) % 2, 2.5)
    torch.testing.assert_close(eps, model(xT, torch.full((1201,), 500)))
    assert (np.load(tmp_path / "samples.npy") == 128).all()


def test_pixels_are_rounded_and_clipped_and_states_are_not_kept(data, small, tmp_path, monkeypatch):
    """-1, 0, 1 become 0, 128, 255, and every pixel of the data comes back; memory does not grow
    with the number of steps."""
    values = [*(np.arange(256) / 127.5 - 1), -7.0, 7.0, 0.0, math.nextafter(-1, 0)]
    alive = []

    def loop(self, model, xT, steps, eta):
        refs = []
        for _ in range(steps + 1):
            x = torch.tensor(values, dtype=torch.float32).view(1, 1, 4, 65).clone()
            refs.append(weakref.ref(x))
            yield x
            alive.append(sum(ref() is not None for ref in refs))

    monkeypatch.setattr(Diffusion, "ddim_sample_loop", loop)
    main("--data", data, "--samples", 1, "--sample-steps", 50, "--out", tmp_path)
    got = np.load(tmp_path / "samples.npy").flatten().tolist()
    assert got == [*range(256), 0, 255, 128, 0]
    assert len(alive) == 51 and max(alive) <= 2


# -------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--steps 0", ["--steps", "1 to"]),
        ("--steps 1.5", ["--steps", "1.5"]),
        ("--batch-size 0", ["--batch-size", "1 to"]),
        ("--lr -1", ["--lr", "0 to"]),
        ("--lr nan", ["--lr", "0 to"]),
        ("--lr inf", ["--lr", "0 to"]),
        ("--samples 0", ["--samples", "1 to"]),
        ("--sample-steps 0", ["--sample-steps", "1 to 1000"]),
        ("--sample-steps 1001", ["--sample-steps", "1 to 1000"]),
        ("--eta 1.1", ["--eta", "0 to 1"]),
        ("--eta -0.1", ["--eta", "0 to 1"]),
        ("--eta nan", ["--eta", "0 to 1"]),
        ("--guidance nan", ["--guidance", "0 to"]),
        ("--guidance inf", ["--guidance", "0 to"]),
        ("--seed -1", ["--seed", "0 to"]),
        ("--label 77", ["--label", "77", "[3, 7]"]),
        ("--label x", ["--label", "x"]),
        ("--device gpu", ["gpu"]),
        ("--device cuda:99", ["CUDA"]),
        ("--nonsense", ["--nonsense"]),
        ("--load model.pt --resume", ["--load", "--resume"]),
    ],
)
def test_wrong_flags_are_refused_before_training(argv, words, data, copy, refuses):
    before = (copy / "model.pt").read_bytes()
    flags = [*TINY, "--data", data, "--out", copy, *argv.split()]
    refuses(ddpm_mnist.main, flags, *words)
    assert (copy / "model.pt").read_bytes() == before and names(copy) == ["model.pt"]


def test_no_flag_is_the_beginning_of_one_of_torchrun(capsys):
    with pytest.raises(SystemExit):
        main("--help")
    ours = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    theirs = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    assert len(ours) > 10 and "--nnodes" in theirs
    assert not [(a, b) for a in ours - {"--help"} for b in theirs if b.startswith(a)]


def test_default_device_is_one_that_is_there(data, small, tmp_path, monkeypatch):
    """The ordinary wheel on a machine without a GPU: built for cuda, but there is none."""

    def built_for(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    main("--data", data, "--out", tmp_path)
    assert names(tmp_path) == FILES


def test_everything_runs_where_cpu_tensors_are_refused(data, tmp_path):
    """Trains, resumes, loads and draws on a pretend GPU, with the numbers of the CPU."""

    def everything(device):
        flags = ["--device", device, "--guidance", 2, "--sample-steps", 2]
        main("--data", data, *flags, "--steps", 2, "--out", tmp_path / device)
        main("--data", data, *flags, "--steps", 3, "--out", tmp_path / device, "--resume")
        main("--load", tmp_path / device / "model.pt", *flags, "--out", tmp_path / f"new {device}")

    with pretend_device() as device:
        everything(device)
    everything("cpu")
    assert same(saved(tmp_path / device), saved(tmp_path / "cpu"))
    for name in SAMPLED:
        for new in ("", "new "):
            a, b = (tmp_path / f"{new}{where}" / name for where in (device, "cpu"))
            assert a.read_bytes() == b.read_bytes()


# ------------------------------------------------------------------------------- as a user runs it


def program(folder, *command):
    """Runs Python in a folder, with one thread; returns what it printed."""
    more = {"capture_output": True, "text": True, "timeout": 300}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_script_from_another_folder_trains_on_the_committed_digits(tmp_path):
    script = os.path.relpath(SCRIPT, tmp_path)
    said = program(tmp_path, "-W", "error", script, *TINY, "--samples", 11, "--device", "cpu")
    assert said == f"files in {Path('runs', 'ddpm_mnist')}\n"
    assert names(tmp_path) == ["runs"] and names(tmp_path / "runs" / "ddpm_mnist") == FILES
    assert np.load(tmp_path / "runs/ddpm_mnist/samples.npy").shape == (11, 28, 28, 1)
    assert np.load(tmp_path / "runs/ddpm_mnist/labels.npy").tolist() == [*range(10), 0]


def test_two_processes_share_weights_but_not_data_and_one_writes(data, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    process = [Path(__file__).with_name("mnist_process.py"), "none", *TINY]
    flags = ["--steps", 3, "--device", "cpu", "--data", data, "--out", "outRANK"]
    program(tmp_path, *torchrun, *process, *flags)
    assert names(tmp_path / "out0") == FILES and names(tmp_path / "out1") == []
    (a, seen_a), (b, seen_b) = (torch.load(tmp_path / f"rank{k}.pt") for k in (0, 1))
    assert same(dict(a), dict(b)) and same(dict(a), dict(saved(tmp_path / "out0")["net"]))
    for (x, t, _), (other, u, _) in zip(seen_a, seen_b, strict=True):
        assert not torch.equal(x, other) and not torch.equal(t, u)
