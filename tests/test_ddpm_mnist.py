"""ddpm_mnist.py as a specification: decoder, clipping, U-Net, files, downloads, resume, torchrun.

Diffusion and beta_schedule have the text of ddpm_2d.py (test_all_scripts.py), so what is proved in
test_ddpm_2d.py holds here too. Nothing here needs a network, a GPU or the real MNIST.
"""

import gzip
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import timeit
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

import ddpm_mnist
from ddpm_mnist import Diffusion, UNet, load_mnist

SCRIPT = Path(ddpm_mnist.__file__)
SMALL = SCRIPT.parent / "data" / "mnist5k"
NAMES = [f"{a}-{b}" for a in ("train", "t10k") for b in ("images-idx3-ubyte", "labels-idx1-ubyte")]
TINY = ["--steps", "2", "--batch-size", "8", "--T", "21", "--n", "10", "--sample-steps", "3"]
TINY += ["--test-images", "8"]


def idx(array):
    """The bytes of an IDX file, written from its description and not by our code."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


def digits(n=64, test=32):
    """Four arrays by file name: noisy bars whose column tells the label."""
    rng, arrays = np.random.default_rng(0), {}
    for part, count in (("train", n), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 40, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label + 3 : 2 * label + 6] = 220
        arrays |= {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": labels}
    return arrays


def write(folder, arrays, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        raw = idx(array)
        path = folder / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(raw) if packed else raw)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), digits())


# ------------------------------------------------------------------------------- bound and clipping


def grid():
    return (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)


@given(
    mean=st.floats(-1.3, 1.3), T=st.integers(21, 2000), name=st.sampled_from(["linear", "cosine"])
)
def test_decoder_is_a_distribution_over_the_256_values(mean, T, name):
    nll = Diffusion(T, name).decoder_nll(grid(), torch.full((256, 1, 1, 1), mean))
    assert (nll >= 0).all() and nll.isfinite().all()
    assert (-nll.double()).exp().sum().item() == pytest.approx(1, abs=1e-4)


@given(mean=st.floats(-1, 1), value=st.integers(0, 255))
def test_decoder_is_the_gaussian_mass_of_the_bin_of_eq_13(mean, value):
    diffusion = Diffusion(100)
    x = torch.full((1, 1, 1, 1), value / 127.5 - 1)
    _, var = diffusion.q_posterior(x, x, torch.tensor([2]))  # beta-tilde_2, as in the code of Ho
    law = Normal(torch.tensor(mean).double(), var.double().sqrt().view(()))
    high = 1 if value == 255 else law.cdf(x.double() + 1 / 255).item()
    low = 0 if value == 0 else law.cdf(x.double() - 1 / 255).item()
    nll = diffusion.decoder_nll(x, torch.full_like(x, mean)).item()
    if high - low > 1e-6:
        assert math.exp(-nll) == pytest.approx(high - low, rel=2e-3)
    else:
        assert nll > 10


def test_predicted_pixels_are_clipped():
    diffusion, t = Diffusion(100), torch.tensor([1, 50, 100])
    x = diffusion.predict_x0(5 * torch.randn(3, 1, 4, 4), t, torch.randn(3, 1, 4, 4))
    assert x.abs().max() == 1
    x0, eps = torch.rand(3, 1, 4, 4) * 1.8 - 0.9, torch.randn(3, 1, 4, 4)
    t = torch.tensor([1, 20, 40])
    got = diffusion.predict_x0(diffusion.q_sample(x0, t, eps), t, eps)
    torch.testing.assert_close(got, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 5])
def test_clipping_rederives_the_noise(steps):
    """Each state of DDIM is on the line from x0_hat to the noise that x_t and x0_hat imply."""
    diffusion, calls = Diffusion(60), []

    def model(xt, t, y=None):
        calls.append((xt, t))
        return -2 * xt  # far too little noise: x0_hat is clipped

    states = list(diffusion.ddim_sample_loop(model, torch.randn(2, 1, 4, 4), steps))
    times = [round(60 * k / steps) for k in range(steps, -1, -1)]
    for (xt, t), after, s in zip(calls, states[1:], times[1:], strict=True):
        x0 = diffusion.predict_x0(xt, t, -2 * xt)
        a, b = diffusion.alpha_bar.double()[t[0]], diffusion.alpha_bar.double()[s]
        eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
        want = b.sqrt() * x0 + (1 - b).sqrt() * eps
        torch.testing.assert_close(after.double(), want.double(), rtol=1e-3, atol=1e-3)
    assert states[-1].abs().max() <= 1 + 1e-6


def test_samples_stay_in_range_with_a_useless_model():
    *_, x0 = Diffusion(30).p_sample_loop(lambda xt, t, y=None: 0 * xt, torch.randn(4, 1, 4, 4))
    assert x0.abs().max() <= 1 + 1e-6


# --------------------------------------------------------------------------------------- the U-Net


def unet(channels=1, **more):
    torch.manual_seed(0)
    net = UNet(Diffusion(50), channels=channels, **more)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))  # away from the zero-initialised output
    return net  # in training mode, as main leaves it: there is nothing to switch off


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 32, 32), (1, 8, 12)])
def test_every_size_divisible_by_4_and_every_number_of_channels_works(channels, height, width):
    x, t = torch.randn(2, channels, height, width), torch.tensor([3, 50])
    out = unet(channels)(x, t, torch.tensor([1, 9]))
    assert out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all()


def test_untrained_network_is_the_best_linear_guess():
    diffusion = Diffusion(50)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 50])
    out = UNet(diffusion)(x, t)
    torch.testing.assert_close(out, diffusion.noise[t].view(2, 1, 1, 1) * x, rtol=1e-5, atol=1e-5)


def test_network_depends_on_image_time_and_label():
    net, x = unet(), torch.randn(1, 1, 28, 28)
    t, y = torch.tensor([20]), torch.tensor([4])
    out = net(x, t, y)
    outs = net(x + 0.1, t, y), net(x, t + 1, y), net(x, t, y + 1), net(x, t)
    assert all((other - out).abs().max() > 1e-4 for other in outs)
    torch.testing.assert_close(net(x, t), net(x, t, torch.tensor([10])))  # the last one is "none"


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
    blocks = {"deep": net.middle[1], "down0": net.stem, "down1": net.down[0], "down2": net.down[1]}
    for name, block in (blocks | {f"up{k}": net.up[k] for k in range(3)}).items():
        hook = lambda block, args, out, name=name: seen.update({name: (args[0], out)})
        block.register_forward_hook(hook)
    net(torch.randn(2, 1, 8, 12), torch.tensor([3, 40]))
    larger = torch.nn.Upsample(scale_factor=2)
    want = seen["deep"][1], larger(seen["up0"][1]), larger(seen["up1"][1])
    for k, below in enumerate(want):
        torch.testing.assert_close(seen[f"up{k}"][0], below + seen[f"down{2 - k}"][1])


def test_fourier_features_are_faded_by_the_noise():
    """exp(i w x) times its average over the noise, here of 200,000 draws; none is left at t = T."""
    torch.manual_seed(0)
    net, seen = UNet(Diffusion(1000, "cosine"), channels=2), []
    net.stem.register_forward_hook(lambda block, args, out: seen.append(args[0]))
    x, t = torch.rand(4, 2, 8, 8) * 2 - 1, torch.tensor([1, 3, 10, 1000])
    net(x, t)
    w, eps = math.pi * torch.tensor([4, 16, 64]), torch.randn(200_000)
    average = [[torch.cos(f * net.diffusion.noise[k] * eps).mean() for f in w] for k in t]
    fade = torch.tensor(average)[:, :, None, None, None]  # [B, 3, 1, 1, 1]
    wave = w[:, None, None, None] * x[:, None]  # [B, 3, 2, H, W]
    want = [x, *(fade * wave.sin()).unbind(1), *(fade * wave.cos()).unbind(1)]
    torch.testing.assert_close(seen[0], torch.cat(want, 1), rtol=0, atol=0.01)
    assert (fade[0] > 0.4).all() and fade[3].abs().max() < 0.01


def test_time_embedding_covers_the_same_range_for_every_T():
    freq = [UNet(Diffusion(T)).freq * T / 1000 for T in (50, 1000, 4000)]
    torch.testing.assert_close(freq[0], freq[1])
    torch.testing.assert_close(freq[2], freq[1])
    assert freq[1].max() <= 1 and freq[1].min() * 1000 < math.pi  # no two t look the same


def test_every_pixel_sees_the_whole_image():
    """Convolutions alone reach less far; attention at a quarter of the size does the rest."""
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    unet()(x, torch.tensor([20]))[0, 0, 0, 0].backward()
    assert x.grad[0, 0, -4:, -4:].abs().max() > 0


def test_attention_mixes_positions_by_softmax_of_q_k():
    """Against the formula of Vaswani et al. 2017 written out, four heads."""
    torch.manual_seed(0)
    net = UNet(Diffusion(100), widths=(16, 16, 32))
    h = torch.randn(2, 32, 3, 5)
    q, k, v = net.qkv(net.norm(h)).reshape(2, 3, 4, 8, 15).unbind(1)  # [B, heads, 8, positions]
    weight = torch.softmax(torch.einsum("bhdn,bhdm->bhnm", q, k) / math.sqrt(8), -1)
    mixed = torch.einsum("bhnm,bhdm->bhdn", weight, v).reshape(2, 32, 3, 5)
    torch.testing.assert_close(net.attend(h), h + net.mix(mixed), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns():
    net = unet()
    x, t = torch.randn(4, 1, 28, 28), torch.tensor([1, 10, 30, 50])
    loss = net(x, t, torch.tensor([0, 3, 10, 9])).square().mean()
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_bf16_and_float32_agree():
    net, x = unet(), torch.randn(8, 1, 28, 28)
    t = torch.arange(1, 49, 6)
    with torch.no_grad():
        full = net(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, t)
    assert half.dtype == torch.float32  # the sampler goes on in full precision
    assert (half - full).norm() / full.norm() < 0.02


def test_network_learns_one_batch_by_heart():
    torch.manual_seed(0)
    diffusion = Diffusion(50)
    net = UNet(diffusion, widths=(16, 32, 64))
    x0, y = torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4)
    t, eps = torch.tensor([5, 20, 35, 50]), torch.randn(4, 1, 8, 8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(120):
        loss = diffusion.p_losses(net, x0, y, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_come_back_as_written(packed, tmp_path):
    arrays = digits()
    x, y, test_x, test_y, *_ = load_mnist(write(tmp_path, arrays, packed))
    for got, name in zip((x, y, test_x, test_y), NAMES, strict=True):
        np.testing.assert_array_equal(np.asarray(got).reshape(arrays[name].shape), arrays[name])
    assert y.dtype == test_y.dtype == torch.int64


def test_committed_digits_are_real_and_balanced():
    x, y, test_x, test_y, *_ = load_mnist(SMALL)
    assert len(x) + len(test_x) == 5000 and x.shape[1:] == (28, 28)
    counts = torch.bincount(y) + torch.bincount(test_y)
    assert (counts == 500).all()
    mean = torch.stack([x[y == k].float().mean(0) for k in range(10)]).flatten(1)
    nearest = torch.cdist(test_x.flatten(1).float(), mean).argmin(1)
    assert (nearest == test_y).float().mean() > 0.75  # the nearest class mean gets about 80 %


def broken(raw):
    other = bytes([0, 0, 8, 3])
    return {
        "empty": b"",
        "text": b"<html>403 Forbidden</html>",
        "cut": raw[: len(raw) // 2],
        "too_long": raw + b"x",
        "magic": b"\x00\x00\x0d" + raw[3:],
        "more_axes": other + raw[4:],
        "cut_gzip": gzip.compress(raw)[:-30],
        "no_items": raw[:4] + bytes(4),
    }


@pytest.mark.parametrize("kind", list(broken(b"12345678")))
@pytest.mark.parametrize("name", NAMES[:2])
def test_broken_idx_files_are_named(name, kind, tmp_path, fails):
    folder = write(tmp_path / "d", digits(), packed=False)
    raw = (folder / name).read_bytes()
    bad = broken(raw)[kind]
    if kind == "more_axes" and name.startswith("train-images"):
        bad = bytes([0, 0, 8, 1]) + raw[4:]
    (folder / name).write_bytes(bad)
    fails(["--data", folder, "--out", tmp_path / "out", *TINY], f"--data {folder}", name[:5])
    assert not (tmp_path / "out" / "model.pt").exists()


def test_images_and_labels_must_be_as_many(tmp_path, fails):
    arrays = digits()
    arrays["train-labels-idx1-ubyte"] = arrays["train-labels-idx1-ubyte"][:-1]
    folder = write(tmp_path / "d", arrays)
    fails(["--data", folder, "--out", tmp_path / "o", *TINY], "63", "64", "train-labels")


# --------------------------------------------------------------------------------- the download


class Server(ThreadingHTTPServer):
    """Two mirrors, /a/ and /b/; `say` maps a path to (status, headers, body)."""

    def __init__(self, say):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.seen.append(self.path)
                status, length, body = say(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.seen = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def mirrors(monkeypatch):
    """Start a server; its mirror /a/ is tried first, then /b/. The files are our digits."""
    servers, arrays = [], digits()
    packed = {f"{name}.gz": gzip.compress(idx(array)) for name, array in arrays.items()}
    hashes = {name: hashlib.sha256(idx(array)).hexdigest() for name, array in arrays.items()}

    def start(a, b):
        def say(path):
            mirror, name = path.strip("/").split("/")
            return (a if mirror == "a" else b)(packed[name])

        servers.append(Server(say))
        root = f"http://127.0.0.1:{servers[-1].server_port}"
        monkeypatch.setattr(ddpm_mnist, "MIRRORS", (f"{root}/a/", f"{root}/b/"))
        monkeypatch.setattr(ddpm_mnist, "FILES", {name: hashes[name] for name in ddpm_mnist.FILES})
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def good(body):
    return 200, len(body), body


BAD = {
    "404": lambda body: (404, 9, b"not found"),
    "503": lambda body: (503, 0, b""),
    "html": lambda body: (200, 20, b"<html>moved</html>  "),
    "wrong_bytes": lambda body: good(gzip.compress(gzip.decompress(body)[:-1] + b"?")),
    "cut_half_way": lambda body: (200, len(body), body[: len(body) // 2]),
}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_missing_files_are_downloaded_once(mirrors, tmp_path):
    server = mirrors(good, good)
    for _ in range(2):  # the second time they are there
        x, *_ = load_mnist(tmp_path / "new")
    assert len(x) == 64 and server.seen == [f"/a/{name}.gz" for name in NAMES]
    assert names(tmp_path / "new") == sorted(f"{name}.gz" for name in NAMES)


def test_only_missing_files_are_downloaded(mirrors, tmp_path):
    server = mirrors(good, good)
    write(tmp_path, digits(), packed=False)
    (tmp_path / NAMES[2]).unlink()
    load_mnist(tmp_path)
    assert server.seen == [f"/a/{NAMES[2]}.gz"]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mirror_is_followed_by_the_next(kind, mirrors, tmp_path):
    server = mirrors(BAD[kind], good)
    x, *_ = load_mnist(tmp_path)
    assert len(x) == 64 and len(server.seen) == 8
    assert names(tmp_path) == sorted(f"{name}.gz" for name in NAMES)  # no temporary file is left


@pytest.mark.parametrize("kind", BAD)
def test_without_a_good_mirror_the_committed_digits_are_used(kind, mirrors, tmp_path, capsys):
    mirrors(BAD[kind], BAD["404"])
    x, *_ = load_mnist(tmp_path)
    assert len(x) + len(load_mnist(SMALL)[2]) == 5000
    lines = [k for k in capsys.readouterr().err.splitlines() if "mnist5k" in k]
    assert len(lines) == 1 and str(tmp_path) in lines[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_script_copied_alone_tells_which_files_to_put_where(
    mirrors, tmp_path, monkeypatch, fails
):
    mirrors(BAD["404"], BAD["503"])
    monkeypatch.setattr(ddpm_mnist, "__file__", str(tmp_path / "alone" / "ddpm_mnist.py"))
    folder = tmp_path / "nowhere"
    fails(["--data", folder, "--out", tmp_path / "out", *TINY], f"--data {folder}", *NAMES)


# ------------------------------------------------------------------------- the script as a whole

FILES = {
    "model.pt", "metrics.json", "log.csv", "samples.npy", "labels.npy", "diffusion_process.png",
    "results.png", "training.png",
}  # fmt: skip
KEYS = {
    "script", "seed", "device", "steps", "parameters", "train_seconds", "sample_seconds", "loss",
    "bits_per_dim", "images_per_second", "dataset", "train_images",
}  # fmt: skip


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
TORCHRUN += ["--standalone", "--", Path(__file__).with_name("two_processes.py")]
FLAGS = [*TINY, "--data", SMALL]  # with the default --out
PROGRAMS = {"run": [SCRIPT, *FLAGS], "two_processes": [*TORCHRUN, *FLAGS]}


@pytest.fixture(scope="session")
def run(program):
    folder, done = program(sys.modules[__name__], "run")
    return folder, folder / "runs" / "ddpm_mnist", done


@pytest.fixture
def small(monkeypatch):
    """The network of main with a quarter of the width, for tests that it does not matter to."""
    monkeypatch.setattr(UNet.__init__, "__defaults__", (1, 10, (8, 16, 32)))


@pytest.fixture
def bf16_takes(monkeypatch):
    """What main measures: bf16_takes(2) is a CPU on which bfloat16 takes twice as long."""

    def patch(ratio):
        seconds = lambda run, number, repeat: [ratio if run().dtype == torch.bfloat16 else 1] * 9
        monkeypatch.setattr(timeit, "repeat", seconds)

    return patch


def saved(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def same(a, b):
    """Nested dicts and lists with equal leaves."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_script_leaves_every_file_and_key(run):
    folder, out, done = run
    assert set(names(out)) == FILES and os.listdir(folder) == ["runs"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() >= KEYS and metrics["script"] == "ddpm_mnist"
    assert metrics["steps"] == 2 and metrics["train_images"] == 4000
    assert "bits_per_dim" in done.stdout and str(Path("runs") / "ddpm_mnist") in done.stdout
    samples, labels = np.load(out / "samples.npy"), np.load(out / "labels.npy")
    assert samples.dtype == np.uint8 and samples.shape == (10, 28, 28)
    assert labels.tolist() == list(range(10))
    assert (out / "log.csv").read_text().startswith("step,loss,lr,seconds\n")


def test_same_seed_gives_the_same_numbers_and_another_seed_others(data, small, tmp_path):
    flags = ["--data", str(data), *TINY, "--amp", "off", "--test-images", "8"]
    a, b = (ddpm_mnist.main([*flags, "--out", str(tmp_path / k)]) for k in "ab")
    more = ["--out", str(tmp_path / "c"), "--seed", "1", "--test-images", "0"]
    c = ddpm_mnist.main([*flags, *more])
    assert a["loss"] == b["loss"] != c["loss"] and a["bits_per_dim"] == b["bits_per_dim"]
    a, b, c = ((tmp_path / k / "samples.npy").read_bytes() for k in "abc")
    assert a == b != c


def test_saved_samples_undo_the_scaling_of_the_data():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(ddpm_mnist.to_bytes(pixels[:, None] / 127.5 - 1), pixels)
    extremes = torch.tensor([[[[-7.0, 7.0]]]])
    assert ddpm_mnist.to_bytes(extremes).tolist() == [[[0, 255]]]


def test_bits_per_dim_are_the_bound_in_bits_over_784_pixels(data, small, tmp_path, monkeypatch):
    """The label is given, and costs log 10 nats: -log p(x) <= -log p(x | y) - log p(y)."""
    sums = iter(range(1000, 1800, 100))  # nats of the eight groups
    bound = lambda self, *a, **k: torch.full((22,), next(sums) / 22)
    monkeypatch.setattr(Diffusion, "variational_bound", bound)
    metrics = ddpm_mnist.main(["--data", str(data), *TINY, "--out", str(tmp_path)])
    want = (np.arange(1000, 1800, 100) + math.log(10)) / math.log(2) / 784
    assert metrics["bits_per_dim"] == pytest.approx(want.mean(), rel=1e-5)
    error = want.std(ddof=1) / math.sqrt(8)  # of a mean of eight
    assert metrics["bits_per_dim_error"] == pytest.approx(error, rel=1e-4)


def test_seconds_of_sampling_are_without_those_of_the_bound(data, small, tmp_path, monkeypatch):
    slow = lambda *a, **k: time.sleep(0.1) or torch.ones(22)
    monkeypatch.setattr(Diffusion, "variational_bound", slow)
    metrics = ddpm_mnist.main(["--data", str(data), *TINY, "--out", str(tmp_path)])
    assert 0 < metrics["sample_seconds"] < 0.7  # the eight groups alone take 0.8


def test_bound_is_that_of_test_images_with_their_labels(data, small, tmp_path, monkeypatch):
    seen = []

    def spy(self, model, x0, y=None, generator=None):
        seen.append((x0, y))
        return torch.ones(22)

    monkeypatch.setattr(Diffusion, "variational_bound", spy)
    ddpm_mnist.main(["--data", str(data), *TINY, "--out", str(tmp_path)])
    images, labels = (torch.cat(part) for part in zip(*seen, strict=True))
    _, _, test_x, test_y, *_ = load_mnist(data)
    assert len(images) == 8
    for image, label in zip(((images[:, 0] + 1) * 127.5).round().byte(), labels, strict=True):
        assert any(
            torch.equal(image, x) and label == y for x, y in zip(test_x, test_y, strict=True)
        )


@pytest.fixture
def trained_on(data, small, tmp_path, monkeypatch):
    """What p_losses gets in 40 steps of 100 images: a list of (x0, y, t, gamma)."""
    seen = []

    def spy(self, model, x0, y=None, t=None, eps=None, gamma=0):
        seen.append((x0, y, t, gamma))
        return sum(p.sum() for p in model.parameters()) * 0

    monkeypatch.setattr(Diffusion, "p_losses", spy)
    flags = ["--data", str(data), *TINY, "--steps", "40", "--batch-size", "100"]
    ddpm_mnist.main([*flags, "--out", str(tmp_path), "--test-images", "0"])
    return seen


def test_training_hides_a_tenth_of_the_labels_and_keeps_the_others(data, trained_on):
    x, y, *_ = load_mnist(data)
    images, labels = (torch.cat(part) for part in list(zip(*trained_on, strict=True))[:2])
    hidden = labels == 10
    assert abs(hidden.float().mean() - 0.1) < 6 * math.sqrt(0.09 / 4000)
    assert images.min() >= -1 and images.max() <= 1 and images.shape == (4000, 1, 28, 28)
    lookup = {x[i].numpy().tobytes(): y[i].item() for i in range(len(x))}
    whole = ((images[:, 0] + 1) * 127.5).round().byte()
    for image, label, hide in zip(whole, labels, hidden, strict=True):
        assert hide or lookup[image.numpy().tobytes()] == label


def test_training_spreads_t_from_1_to_T_and_weighs_the_error_in_v(trained_on):
    """Image i of 100 is i T / 100 steps on, but for the odd ones and every sixteenth."""
    kept = [i for i in range(0, 100, 2) if i % 16 != 8]
    for _, _, t, gamma in trained_on:
        assert gamma == 2 and t.min() >= 1 and t.max() <= 21
        assert [(t[i] - t[0]).item() % 21 for i in kept] == [i * 21 // 100 for i in kept]
    assert len({tuple(t.tolist()) for _, _, t, _ in trained_on}) > 5  # and not always the same ones


def test_training_draws_every_second_t_with_density_3_t_squared(trained_on):
    """So P(t <= k) = (k / T)^3, up to the steps of both sides."""
    for _, _, t, _ in trained_on:
        assert t.min() >= 1 and t.max() <= 21 and t.shape == (100,)
        for k in range(1, 22):
            share = (t[1::2] <= k).double().mean().item()
            assert abs(share - (k / 21) ** 3) < 1 / 21 + 1 / 50


def test_training_draws_every_sixteenth_t_with_a_density_like_1_over_t(trained_on):
    """So P(t <= k) = log(k + 1) / log(T), up to one step of T and to 4 standard errors."""
    t = torch.cat([t[8::16] for _, _, t, _ in trained_on]).double()  # 240
    for k in range(1, 22):
        share = (t <= k).double().mean().item()
        expected = min(1, math.log(k + 1) / math.log(21))
        assert abs(share - expected) < 1 / 21 + 4 * math.sqrt(expected * (1 - expected) / len(t))


@pytest.fixture
def watched(small, monkeypatch):
    """Learning rates and weights at every step of the optimiser, as [(lr, state dict), ...]."""
    nets, steps, make, step = [], [], ddpm_mnist.UNet, torch.optim.AdamW.step

    def watch(self, *args, **more):
        result = step(self, *args, **more)
        state = {k: v.clone() for k, v in nets[0].state_dict().items()}
        steps.append((self.param_groups[0]["lr"], state))
        return result

    monkeypatch.setattr(ddpm_mnist, "UNet", lambda *a, **k: nets.append(make(*a, **k)) or nets[-1])
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    return steps


def average(folder):
    state = saved(folder)["ddpm_mnist"]["ema"]
    return {k.removeprefix("module."): v for k, v in state.items() if k.startswith("module.")}


def test_learning_rate_is_the_logged_one_and_rises_then_falls(data, tmp_path, watched):
    flags = ["--data", str(data), *TINY, "--steps", "21", "--test-images", "0", "--lr", "1e-3"]
    ddpm_mnist.main([*flags, "--out", str(tmp_path)])
    rates = [lr for lr, _ in watched]
    assert rates == [row[2] for row in saved(tmp_path)["ddpm_mnist"]["log"]]
    top = int(np.argmax(rates))
    assert top == 1 and 0.9e-3 < rates[top] <= 1e-3 and rates[-1] < 3e-5
    assert all(a < b for a, b in zip(rates[:top], rates[1:], strict=False))
    assert all(a > b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))


def test_average_starts_from_the_weights_after_the_first_step(data, tmp_path, watched):
    flags = ["--data", str(data), *TINY, "--steps", "1", "--test-images", "0"]
    ddpm_mnist.main([*flags, "--out", str(tmp_path)])
    assert watched[0][1]["head.2.weight"].abs().max() > 0  # it was 0 before the step
    assert same(average(tmp_path), watched[0][1])


def test_average_of_the_weights_covers_a_twentieth_of_the_steps(data, tmp_path, watched):
    """A weight that grows by 1 a step: the average is behind by n / 21 (Karras et al. 2024)."""
    flags = ["--data", str(data), *TINY, "--steps", "8", "--test-images", "0"]
    ddpm_mnist.main([*flags, "--out", str(tmp_path)])
    want = watched[0][1]["head.2.weight"]
    for n, (_, state) in enumerate(watched[1:], 1):
        want = want * n / (20 + n) + state["head.2.weight"] * 20 / (20 + n)
    torch.testing.assert_close(average(tmp_path)["head.2.weight"], want)
    ramp = 0.0
    for n in range(1, 10_000):
        ramp = ramp * n / (20 + n) + n * 20 / (20 + n)
    assert 9999 - ramp == pytest.approx(9999 / 21, rel=0.01)


@pytest.mark.parametrize("steps, eta", [(0, 2), (3, 2), (3, 0)])
def test_main_samples_as_asked(steps, eta, data, small, tmp_path, monkeypatch):
    """The loop that --sample-steps names gets noise, the labels in turn, --guidance and --eta."""
    calls = []

    def fake(name):
        def loop(self, model, xT, **more):
            calls.append((name, xT, more))
            yield from [xT.clamp(-1, 1)] * (more.get("steps", self.T) + 1)

        return loop

    for name in ("p_sample_loop", "ddim_sample_loop"):
        monkeypatch.setattr(Diffusion, name, fake(name))
    flags = ["--data", str(data), *TINY, "--n", "300", "--sample-steps", str(steps)]
    flags += ["--guidance", "2.5", "--test-images", "0", "--out", str(tmp_path)]
    flags += ["--eta", str(eta)] if eta != 2 else []
    ddpm_mnist.main(flags)
    name = "ddim_sample_loop" if steps else "p_sample_loop"
    assert [call[0] for call in calls] == [name, name]  # 300 images in two parts
    assert all(more["guidance"] == 2.5 for _, _, more in calls)
    assert all(more.get("steps", 0) == steps for _, _, more in calls)
    assert all(more.get("eta") == (eta if steps else None) for _, _, more in calls)
    labels = torch.cat([more["y"] for _, _, more in calls])
    assert labels.tolist() == [k % 10 for k in range(300)]
    assert np.load(tmp_path / "labels.npy").tolist() == labels.tolist()
    xT = torch.cat([xT for _, xT, _ in calls])
    assert xT.mean().abs() < 6 / math.sqrt(xT.numel())
    assert (xT.var() - 1).abs() < 6 * math.sqrt(2 / xT.numel())


@pytest.mark.parametrize(
    "ratio, amp, want",
    [(0.5, "auto", True), (2, "auto", False), (0.5, "off", False), (2, "on", True)],
)
def test_amp_auto_takes_bfloat16_where_it_is_faster(
    ratio, amp, want, data, small, tmp_path, bf16_takes, monkeypatch
):
    seen, network = set(), UNet.forward

    def spy(self, *inputs):
        seen.add(torch.is_autocast_enabled("cpu"))
        return network(self, *inputs)

    monkeypatch.setattr(UNet, "forward", spy)
    bf16_takes(ratio)
    flags = ["--data", str(data), *TINY, "--amp", amp, "--out", str(tmp_path)]
    assert ddpm_mnist.main([*flags, "--test-images", "8"])["amp"] is want
    assert seen == {want}  # in training, sampling and evaluation


def test_resume_equals_uninterrupted(data, small, tmp_path, ctrl_c, bf16_takes):
    """Even where bfloat16 was faster at the start, and no longer is."""
    bf16_takes(0.5)
    flags = ["--data", str(data), *TINY, "--steps", "6", "--test-images", "0", "--save-every", "1"]
    ddpm_mnist.main([*flags, "--out", str(tmp_path / "whole")])
    ctrl_c(Diffusion, "p_losses", 4)
    ddpm_mnist.main([*flags, "--out", str(tmp_path / "parts")])
    assert len(saved(tmp_path / "parts")["ddpm_mnist"]["log"]) == 3
    bf16_takes(2)
    ddpm_mnist.main([*flags, "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (saved(tmp_path / name)["ddpm_mnist"] for name in ("whole", "parts"))
    assert len(parts["log"]) == 6
    assert same(
        {k: v for k, v in whole.items() if k != "log"}, {k: parts[k] for k in whole if k != "log"}
    )
    assert [row[:3] for row in whole["log"]] == [row[:3] for row in parts["log"]]
    assert (tmp_path / "whole/samples.npy").read_bytes() == (
        tmp_path / "parts/samples.npy"
    ).read_bytes()


def test_load_samples_without_training(run, data, tmp_path):
    model = run[1] / "model.pt"
    flags = ["--data", str(data), *TINY, "--load", str(model), "--out", str(tmp_path)]
    metrics = ddpm_mnist.main(flags)
    assert not (tmp_path / "model.pt").exists() and metrics["parameters"] > 0
    a, b = (np.load(folder / "samples.npy").astype(int) for folder in (run[1], tmp_path))
    assert np.abs(a - b).mean() < 2  # the same start and the same weights


def test_checkpoint_brings_the_flags_that_made_it(data, small, tmp_path):
    """--resume all that must not change, --load what the model is made for, and neither more."""
    made = {"T": 21, "schedule": "linear", "batch_size": 8, "lr": 1e-3, "seed": 3}
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    flags = [word for key, value in made.items() for word in (f"--{key.replace('_', '-')}", value)]
    short = ["--data", data, "--n", 10, "--sample-steps", 3, "--out"]
    main = lambda *words: ddpm_mnist.main([str(word) for word in words])
    main(*short, old, *flags, "--steps", 2, "--test-images", 8)
    again = main(*short, old, "--steps", 3, "--resume")
    assert {key: again[key] for key in made} == made and again["steps"] == 3
    assert again["test_images"] == 64 and again["bits_per_dim"] > 0
    loaded = main(*short, new, "--load", Path(old) / "model.pt")
    assert (loaded["T"], loaded["schedule"], loaded["seed"]) == (21, "linear", 0)
    assert loaded["test_images"] == 0 and "bits_per_dim" not in loaded


def start(folder, data, *flags):
    """The script in the background, returned once it has trained a few steps."""
    command = [sys.executable, SCRIPT, *TINY, "--data", data, "--out", folder, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    seen = b""
    while not re.search(rb"[ |][1-9]\d*/100000", seen) and process.poll() is None:
        seen += os.read(process.stderr.fileno(), 4096)
    return process


def test_ctrl_c_keeps_what_was_trained_and_still_samples(data, small, tmp_path, ctrl_c, capsys):
    ctrl_c(Diffusion, "p_losses", 4)
    flags = [*TINY, "--data", str(data), "--steps", "200", "--out", str(tmp_path)]
    metrics = ddpm_mnist.main(flags)
    assert metrics["steps"] == 3 and "going on with what was learned" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 3
    assert set(names(tmp_path)) == FILES and len(saved(tmp_path)["ddpm_mnist"]["log"]) == 3


def test_kill_while_saving_leaves_a_checkpoint_that_loads(data, tmp_path):
    process = start(tmp_path, data, "--steps", "100000", "--save-every", "1")
    deadline = time.time() + 60
    while not (tmp_path / "model.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    for _ in range(40):  # until a temporary file shows that it is being written
        if any(name.startswith(".") for name in names(tmp_path)):
            break
        time.sleep(0.01)
    process.kill()
    process.communicate()
    steps = len(saved(tmp_path)["ddpm_mnist"]["log"])
    flags = ["--data", str(data), *TINY, "--steps", str(steps + 1), "--out", str(tmp_path)]
    metrics = ddpm_mnist.main([*flags, "--resume", "--test-images", "0"])
    assert metrics["steps"] == steps + 1


@pytest.fixture(scope="session")
def two_processes(program):
    return program(sys.modules[__name__], "two_processes")


def test_two_processes_share_weights_but_not_data_and_write_once(two_processes):
    folder, done = two_processes
    (a, seen_a, t_a), (b, seen_b, t_b) = (torch.load(folder / f"rank{k}.pt") for k in (0, 1))
    assert same(a, b) and not torch.equal(t_a, t_b)  # equal weights, different noise
    assert set(names(folder / "runs" / "ddpm_mnist")) == FILES
    assert done.stdout.count("bits_per_dim_error") == 1  # one process reports
    images = [{x.numpy().tobytes() for x in seen} for seen in (seen_a, seen_b)]
    assert not images[0] & images[1]  # each has its own part of the data


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--T", 20], ["--T", "20", "21"]),
        (["--T", "x"], ["--T", "'x'"]),
        (["--schedule", "tanh"], ["--schedule", "tanh", "cosine"]),
        (["--steps", 0], ["--steps", "0", "1"]),
        (["--batch-size", -3], ["--batch-size", "-3", "1"]),
        (["--lr", 0], ["--lr", "0"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--minutes", -1], ["--minutes", "-1"]),
        (["--sample-steps", 22], ["--sample-steps", "22", "21"]),
        (["--eta", -1], ["--eta", "-1", "0"]),
        (["--device", "gpu"], ["--device", "gpu", "cpu"]),
        (["--device", "cuda:99"], ["--device", "cuda:99"]),
        (["--amp", "maybe"], ["--amp", "maybe", "auto"]),
        (["--load", "nope.pt"], ["--load", "nope.pt"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_wrong_flags_get_one_line_that_tells_the_fix(argv, words, data, fails, tmp_path):
    fails([*TINY, "--data", data, *argv, "--out", tmp_path / "out"], *words)
    assert not (tmp_path / "out" / "model.pt").exists()


def test_checkpoints_that_do_not_fit_are_refused(run, data, fails, tmp_path):
    good, path = run[1] / "model.pt", tmp_path / "x.pt"
    whole, flags = good.read_bytes(), [*TINY, "--data", data, "--out", tmp_path / "out"]
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        fails([*flags, "--load", path], f"--load {path}")
    for other in ([1, 2], {"config": ["8gaussians", 21, "cosine"], "log": [], "ema": {}}):
        torch.save(other, path)
        fails([*flags, "--load", path], f"--load {path}")
    for flag, value in (("--T", 50), ("--schedule", "linear")):
        fails([*flags, "--load", good, flag, value], flag, value, "was made with")
    for flag, value in (("--batch-size", 9), ("--lr", 0.1), ("--seed", 5), ("--amp", "off")):
        again = ["--out", run[1], "--resume", flag, value]
        fails([*flags, *again], flag, value, "was made with")
    assert good.read_bytes() == whole


def test_folder_that_cannot_be_written_is_refused(data, fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    fails([*TINY, "--data", data, "--out", tmp_path / "file"], f"--out {tmp_path}")
    assert (tmp_path / "file").read_text() == "mine"


def test_loss_that_explodes_stops_and_keeps_the_last_good_model(run, data, fails, tmp_path):
    shutil.copy(run[1] / "model.pt", tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    broke = Diffusion.p_losses
    try:
        Diffusion.p_losses = lambda self, *a, **k: broke(self, *a, **k) * math.nan
        fails([*TINY, "--data", data, "--out", tmp_path], "--lr", "step 1", "lower")
    finally:
        Diffusion.p_losses = broke
    assert (tmp_path / "model.pt").read_bytes() == before
