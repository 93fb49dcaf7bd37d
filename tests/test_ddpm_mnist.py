"""ddpm_mnist.py as a specification: data, network, training, checkpoints, samples, processes.

Schedule, q_sample and sampler are in test_diffusion.py. Nothing here needs a network or a GPU. What
is random is seeded, and may be off by six standard errors: the docstring says what that lets pass.
"""

import gc
import hashlib
import io
import math
import os
import shutil
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.image import imread
from mnist_process import Small
from pretend_device import pretend_device
from torch.distributed.run import get_args_parser
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import ddpm_mnist
from ddpm_mnist import Diffusion, UNet, cosine_schedule, denoiser

DEFAULTS = {"data": ddpm_mnist.MNIST, "steps": 4000, "batch_size": 64, "width": 32, "lr": 2e-3}
DEFAULTS |= {"samples": 100, "label": None, "sample_steps": 50, "eta": 1.0, "guidance": 1.0}
DEFAULTS |= {"seed": 0, "device": "cpu", "out": Path("runs/ddpm_mnist"), "load": None}
DEFAULTS |= {"resume": False}

SCRIPT = Path(ddpm_mnist.__file__)
FILES = {"labels.npy", "model.pt", "samples.npy", "samples.png"}
TINY = "--steps 1 --batch-size 4 --samples 3 --sample-steps 1".split()
RUN = "--steps 102 --batch-size 8 --lr 5e-3 --samples 8 --sample-steps 5".split()
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy, urllib, failing


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def main(*flags):
    ddpm_mnist.main([*TINY, *map(str, flags)])


def files(folder):
    """A hash of the content of every file in it and below, by its path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hash(path.read_bytes()) for path in paths}


def saved(folder):
    return torch.load(folder / "model.pt", weights_only=True)


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
    """A run of 102 steps, and its folder as a kill in the 101st would have left it."""
    folder = tmp_path_factory.mktemp("trained")
    velocity = Diffusion.velocity

    def spy(*args):
        if (folder / "whole" / "model.pt").exists() and not (folder / "killed").exists():
            shutil.copytree(folder / "whole", folder / "killed")
        return velocity(*args)

    with mock.patch.object(Diffusion, "velocity", spy):
        main("--data", data, *RUN, "--out", folder / "whole")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A folder with the model.pt of 100 steps of that run."""
    return shutil.copytree(trained / "killed", tmp_path / "copy")


def test_committed_digits_are_those_of_the_original_files():
    path = SCRIPT.parent / "data" / "mnist.npz"
    assert ddpm_mnist.MNIST == path and path.is_absolute()
    x, y, labels = ddpm_mnist.load_images(path)
    with np.load(path) as arrays:
        originals = [arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    digest = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"
    assert hashlib.sha256(b"".join(map(bytes, originals))).hexdigest() == digest
    assert np.array_equal(x[:, 0], originals[0]) and np.array_equal(y, originals[1])
    assert labels == list(range(10))
    assert ddpm_mnist.SHA256.startswith("731c5ac602752760c8e48fbf")  # of Keras's file


def test_digits_are_downloaded_once_or_refused_in_one_line(
    server, data, small, refuses, tmp_path, capsys, monkeypatch
):
    """Refused: 404, other bytes, cut off, no server; and any other file is not downloaded."""
    monkeypatch.chdir(data.parent)  # this is served
    monkeypatch.setattr(ddpm_mnist, "SHA256", hashlib.sha256(data.read_bytes()).hexdigest())
    monkeypatch.setattr(ddpm_mnist, "MNIST", tmp_path / "sub" / "mnist.npz")
    for url in (f"{server}/no", f"{server}/", f"{server}/cut/mine.npz", "http://127.0.0.1:1"):
        monkeypatch.setattr(ddpm_mnist, "URL", url)
        with pytest.raises(SystemExit, match="^2$"):
            main("--out", tmp_path / "out")
        line = capsys.readouterr().err.rstrip().splitlines()[-1]
        assert "error: " in line and str(ddpm_mnist.MNIST) in line
    monkeypatch.setattr(ddpm_mnist, "URL", f"{server}/mine.npz")
    other = tmp_path / "sub" / "mnits.npz"
    refuses(ddpm_mnist.main, [*TINY, "--data", other, "--out", tmp_path / "out"], other)
    assert files(tmp_path) == {} and not (tmp_path / "out").exists()
    for times in (1, 0):
        main("--out", tmp_path / "out")
        assert capsys.readouterr().out.count(f"{ddpm_mnist.MNIST} is missing: downl") == times
    assert ddpm_mnist.MNIST.read_bytes() == data.read_bytes()
    assert files(tmp_path).keys() == {"sub/mnist.npz", *(f"out/{name}" for name in FILES)}
    gc.collect()


@given(
    st.sampled_from([(4, 4), (8, 4, 1), (4, 12, 3)]),
    st.lists(st.integers(-99, 99), min_size=1) | st.lists(st.text("bcé猫 _0"), min_size=1),
    st.booleans(),
)
@example((4, 4), [2**63 - 1, -(2**63), 0], False)
def test_every_image_keeps_its_pixels_and_its_label(shape, words, column):
    """Labels may be any integers or words, [n] or [n, 1]. Training gets the same x and k by other
    names for the same labels, so it gives the same images."""
    images = pixels(len(words), *shape)
    loaded = []
    for y in (words, [f"class {sorted(set(words)).index(word):04}" for word in words]):
        y = np.array(y)[:, None] if column else np.array(y)
        file = npz(io.BytesIO(), x_train=images, y_train=y)
        file.seek(0)
        loaded.append(ddpm_mnist.load_images(file))
    (x, k, labels), (same_x, same_k, _) = loaded
    assert torch.equal(x, same_x) and torch.equal(k, same_k)
    assert x.dtype == torch.uint8 and x.shape == (len(words), *[*shape, 1][2:3], *shape[:2])
    assert np.array_equal(x.permute(0, 2, 3, 1).reshape(images.shape), images)
    assert [labels[i] for i in k] == words and labels == sorted(set(words))


OWN = {
    "photos": (pixels(4, 32, 32, 3), range(4), 64),
    "one, 4 x 12": (pixels(1, 4, 12), [5], 32),
    "words": (pixels(6, 8, 8, 1), ["dog", "cat", "black cat"] * 2, 32),
    "no labels": (pixels(6, 8, 8), None, 32),
}


@pytest.mark.parametrize(("x", "y", "width"), OWN.values(), ids=OWN)
def test_own_images_are_trained_and_drawn(x, y, width, tmp_path):
    """And drawn again, of one label, without being told the data and the width."""
    labels = [0] if y is None else np.unique(y).tolist()
    more = {} if y is None else {"y_train": y}
    path = npz(tmp_path / "d.npz", x_train=x, **more, x_test=[1.5], other="ignored")
    main("--data", path, "--width", width, "--samples", 30, "--out", tmp_path / "out")
    H, W, C = [*x.shape[1:], 1][:3]
    state = saved(tmp_path / "out")
    flags = {"steps": 1, "batch_size": 4, "lr": 2e-3, "seed": 0, "width": width, "processes": 1}
    assert state["config"] == flags | {"shape": [C, H, W], "labels": labels}
    assert len(state["net"]["stem.weight"]) == width
    images = np.load(tmp_path / "out" / "samples.npy")
    assert images.dtype == np.uint8 and images.shape == (30, H, W, C)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == (30 * labels)[:30]
    sheet = imread(tmp_path / "out" / "samples.png")
    assert sheet.shape == (3 * H, 10 * W, 4) and np.ptp(sheet[..., :3], axis=-1).any() == (C == 3)
    main("--load", tmp_path / "out" / "model.pt", "--label", labels[0], "--out", tmp_path / "one")
    assert np.load(tmp_path / "one" / "labels.npy").tolist() == [labels[0]] * 3


X = pixels(6, 8, 8)
Y = np.arange(6)
SHAPES = [(), (6, 64), (6, 30, 8), (6, 8, 30), (6, 8, 8, 4), (6, 8, 8, 3, 1), (6, 0, 8), (0, 8, 8)]
WRONG = [(pixels(*shape), np.zeros(shape[:1], int), str(shape)[:-1]) for shape in SHAPES]
WRONG += [(X / 255, Y, "float64"), (X.astype(np.uint16), Y, "uint16"), (X, Y[:5], "(5,)")]
WRONG += [(X, Y / 1, "float64"), (X, X[:, :2, 0], "(6, 2)"), (X, Y > 2, "bool")]


def test_wrong_files_are_refused_with_what_was_found_and_is_wanted(data, refuses, tmp_path):
    whole = data.read_bytes()
    contents = {"empty": b"", "text": b"images\n", "cut": whole[: len(whole) // 2]}
    contents["other byte"] = whole[:300] + bytes([whole[300] ^ 85]) + whole[301:]  # of x_train
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    npz(tmp_path / "names.npz", images=X, labels=Y)
    np.savez(tmp_path / "objects.npz", x_train=np.array([X, None], dtype=object))
    words = {path: [] for path in [*tmp_path.iterdir(), tmp_path / "missing.npz"]}
    words[tmp_path / "objects.npz"] = ["allow_pickle"]  # refused before any code is run
    for k, (x, y, found) in enumerate(WRONG):
        path = npz(tmp_path / f"{k}.npz", x_train=x, y_train=y)
        words[path] = [found, "uint8 [n, H, W]", "by 4"]
    for path in words:
        flags = ["--data", path, "--out", tmp_path / "out"]
        refuses(ddpm_mnist.main, [*TINY, *flags], f"--data {path}, an .npz file: ", *words[path])
    assert not (tmp_path / "out").exists()
    gc.collect()


def test_output_depends_on_every_parameter_and_image_time_and_label_alone():
    torch.manual_seed(0)
    net = UNet()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))  # away from its beginning with zeros
    x = torch.randn(5, 1, 28, 28)
    t = torch.tensor([1, 10, 20, 30, 40])
    y = torch.tensor([0, 1, 2, 9, 8])
    out = net(x, t, y)
    for other in (net(x + 0.1, t, y), net(x, t + 1, y), net(x, t, y + 1), net(x, t)):
        assert ((other - out).abs().amax((1, 2, 3)) > 1e-3).all()
    assert_close(net(x, t), net(x, t, torch.full((5,), 10)))  # no label
    assert_close(net(x[1:2], t[1:2], y[1:2]), out[1:2], rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_network_begins_with_blocks_that_are_their_skips_and_one_v_for_all_images():
    x = torch.randn(4, 64, 8, 8)
    block = ddpm_mnist.ResBlock(64, 128)
    added = block(x, x.view(-1, 128)[:4]) - block.skip(x)
    for out in (added, UNet(3, 10, 64).head(x)):
        assert_close(out, out[:1, :, :1, :1].expand_as(out), rtol=0, atol=1e-5)


def test_committed_weights_have_the_error_they_were_published_with():
    """On 64 test digits, at t where they take shape. Within 0.5 %, so that no part of the network
    can go: without the skip connection from h3 it is off by 2.6 %, without attention by 3.8 %."""
    net = UNet()
    net.load_state_dict(torch.load(SCRIPT.parent / "weights" / "ddpm_mnist.pt")["ema"])
    with np.load(ddpm_mnist.MNIST) as arrays:
        x0 = torch.from_numpy(arrays["x_test"][:64, None]) / 127.5 - 1
        y = torch.from_numpy(arrays["y_test"][:64]).long()
    diffusion = Diffusion(cosine_schedule(1000))
    t = torch.linspace(400, 700, 64).long()
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = net(diffusion.q_sample(x0, t, eps), t, y)
    error = mse_loss(v, diffusion.velocity(x0, t, eps))
    assert error.item() == pytest.approx(0.06447, rel=0.005)


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 4])
def test_denoiser_guides_by_eq_6_and_clips_x0(guidance):
    """(1 + w) eps(x, y) - w eps(x) of Ho & Salimans 2022, guidance = 1 + w, written in float64 with
    eps, of which the network gives v. Without guidance it is called once."""
    diffusion = Diffusion(cosine_schedule(50))
    x = 2 * torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    t = torch.arange(1, 51)
    a = torch.tensor(diffusion.alpha_bar, dtype=torch.float64)[t].view(50, 1, 1, 1)
    told = 0.9 * x + 0.05 * (t % 10).view(-1, 1, 1, 1)
    not_told = 0.8 * x - 0.1
    calls = []

    def net(xt, t, y=None):
        calls.append(y)
        return ((not_told if y is None else told) - (1 - a).sqrt() * xt) / a.sqrt()

    got = denoiser(net, diffusion, t % 10, guidance)(x, t)
    eps = guidance * told - (guidance - 1) * not_told
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    assert 0.2 < (x0.abs() < 1).double().mean() < 0.8  # both cases of the clipping
    want = (x - a.sqrt() * x0.clamp(-1, 1)) / (1 - a).sqrt()
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(calls) == (1 if guidance == 1 else 2)


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=30), st.integers(0, 99))
@example([0.5, 1.0], 0)  # no signal is left at t = 2, by which an x_0 of eps would be divided
def test_exact_v_gives_the_noise_back_for_any_schedule(beta, seed):
    diffusion = Diffusion(torch.tensor(beta, dtype=torch.float64))
    t = torch.arange(1, len(beta) + 1)
    x0, eps = torch.randn(2, len(beta), 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    x0 = x0.clamp(-1, 1)
    model = denoiser(lambda xt, t, y: diffusion.velocity(x0, t, eps), diffusion, None)
    assert_close(model(diffusion.q_sample(x0, t, eps), t), eps, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """x0, eps, x_t, t, y and v of 40 steps of 10,000 images, and the losses. Image k of 50 has
    pixels 5 k and label (3, 7, 20)[k % 3]."""
    folder = tmp_path_factory.mktemp("batches")
    q_sample = Diffusion.q_sample
    calls = []

    def spy(self, x0, t, eps):
        calls.append((x0, eps))
        return q_sample(self, x0, t, eps)

    k = np.arange(50)
    x = np.full((50, 4, 4), 5 * k[:, None, None], np.uint8)
    path = npz(folder / "d.npz", x_train=x, y_train=np.array([3, 7, 20])[k % 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diffusion, "q_sample", spy)
        patch.setattr(ddpm_mnist, "UNet", Small)
        patch.setattr(Small, "seen", [])
        main("--data", path, "--steps", 40, "--batch-size", 10_000, "--out", folder / "out")
        calls = [(*call, *seen) for call, seen in zip(calls, Small.seen, strict=True)]
    return *map(torch.stack, zip(*calls)), saved(folder / "out")["losses"]


def test_steps_are_drawn_with_p_2t_minus_1_and_evenly_in_a_batch(batches):
    """P(t <= m) = (m / T)^2: the steps of n images are ceil(T sqrt((k - r) / n)) with one r."""
    _, _, _, t, *_ = batches
    assert t.min() >= 1 and t.max() == 1000
    k = torch.arange(1, 10_001).double()
    least = (k - 10_000 * (t / 1000) ** 2).amax(1)  # of r, in each of the 40 batches
    most = (k - 10_000 * ((t - 1) / 1000) ** 2).amin(1)
    assert (least < most + 5e-3).all() and most.min() > 0 and least.max() < 1
    assert abs(least.mean() - 0.5) < 6 * math.sqrt(1 / 12 / 40) and least.std() > 0.2


def test_images_are_drawn_evenly_from_minus_1_to_1_and_a_tenth_without_label(batches):
    """8,000 draws of each image. Of each label 0.095 to 0.105 may be hidden; the rest is right."""
    x0, _, _, _, y, *_ = batches
    k = ((x0[:, :, 0, 0, 0] + 1) * 127.5 / 5).round().long()  # [40, 10000]
    assert_close(x0, (5 * k / 127.5 - 1).view(40, -1, 1, 1, 1).expand_as(x0))
    counts = k.flatten().bincount(minlength=50)
    assert len(counts) == 50 and (counts - 8000).abs().max() < 6 * math.sqrt(8000)
    hidden = y == 3
    assert (hidden | (y == k % 3)).all()
    for label in range(3):
        assert abs(hidden[k % 3 == label].double().mean() - 0.1) < 0.005


def test_loss_is_the_mean_squared_error_of_v(batches):
    """v = (signal x_t - x_0) / noise, against the output of the network, in float64. The noise is
    fresh in each step and gaussian: mean, variance and fourth moment of 6.4 million numbers."""
    x0, eps, xt, t, _, v, losses = batches
    a = torch.cumprod(1 - cosine_schedule(1000), 0)[t - 1].view(40, -1, 1, 1, 1)
    want = ((a.sqrt() * xt - x0) / (1 - a).sqrt() - v).square().mean((1, 2, 3, 4))
    assert losses == pytest.approx(want.tolist(), rel=1e-4)
    assert_close((xt - a.sqrt() * x0) / (1 - a).sqrt(), eps.double(), rtol=1e-4, atol=1e-4)
    for power, moment, var in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs((eps**power).mean() - moment) < 6 * math.sqrt(var / eps.numel())
    assert eps.flatten(1)[:, 0].unique().numel() == 40


def test_rate_gradients_and_average_of_all_steps(data, small, tmp_path, monkeypatch):
    """The rate warms up over a twentieth and falls to 0, gradients longer than 1 are cut to 1, and
    ema <- 0.75 ema + 0.25 weights (60 / (60 + 20) is 0.75) begins with the first weights."""
    step = torch.optim.AdamW.step
    scale = [1e-4, 1e4] * 30
    rows = []

    def watch(self):
        group = self.param_groups[0]
        assert group["betas"] == (0.9, 0.99) and group["weight_decay"] == 0.01
        gradient = parameters_to_vector(p.grad for p in group["params"])
        step(self)
        rows.append((group["lr"], gradient.norm(), parameters_to_vector(group["params"]).detach()))

    monkeypatch.setattr(ddpm_mnist.F, "mse_loss", lambda *args: mse_loss(*args) * scale.pop())
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    main("--data", data, "--steps", 60, "--lr", 0.1, "--out", tmp_path)
    rates, norms, weights = zip(*rows)
    assert rates == pytest.approx([0.1 * min(1, (k + 1) / 3) * (1 - k / 60) for k in range(60)])
    assert norms[::2] == pytest.approx([1] * 30, rel=1e-4)
    assert 1e-6 < min(norms[1::2]) and max(norms[1::2]) < 1e-2
    want = weights[0].double()
    for vector in weights[1:]:
        want = 0.75 * want + 0.25 * vector.double()
    net, ema = (parameters_to_vector(saved(tmp_path)[name].values()) for name in ("net", "ema"))
    assert torch.equal(net, weights[-1]) and (net - ema).abs().max() > 0.003
    assert_close(ema.double(), want, rtol=1e-5, atol=1e-6)


def test_memory_of_the_average_is_a_twentieth_of_any_run(data, small, tmp_path, monkeypatch):
    decay = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(ddpm_mnist, "get_ema_multi_avg_fn", decay)
    with pytest.raises(KeyboardInterrupt):
        main("--data", data, "--steps", 99_980, "--out", tmp_path)
    assert decay.call_args.args[0] == pytest.approx(0.9998, abs=1e-9)


def test_bar_shows_the_mean_of_the_last_100_losses(data, small, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(ddpm_mnist.tqdm, "set_postfix_str", lambda bar, s, **_: said.append(s))
    main("--data", data, "--steps", 130, "--lr", 0.1, "--out", tmp_path)
    losses = saved(tmp_path)["losses"]
    assert said == [f"loss {np.mean(losses[max(0, k - 99) : k + 1]):.3f}" for k in range(130)]
    assert len({f"{x:.3f}" for x in (losses[-1], np.mean(losses), np.mean(losses[-100:]))}) == 3


def test_gradient_of_nan_ends_the_run_and_leaves_the_checkpoint(copy, data, monkeypatch):
    def finite(*args):
        loss = mse_loss(*args)
        return loss + (loss - loss.detach()).sqrt()  # + 0

    before = files(copy)
    monkeypatch.setattr(ddpm_mnist.F, "mse_loss", finite)
    with pytest.raises(SystemExit, match="^loss 0[^\n]* at step 100: [^\n]* --lr$"):
        main(*RUN, "--data", data, "--out", copy, "--resume")
    assert files(copy) == before


def test_save_that_fails_is_tried_again_and_only_the_last_ends_the_run(
    data, small, tmp_path, monkeypatch, capsys
):
    """250 steps: at 100 the disk is full, at 200 a file in use, which Windows neither replaces nor
    removes. Then 102 steps that cannot be saved: the old file is whole and alone."""
    full = OSError(28, "no space")
    in_use = PermissionError(13, "in use")
    saves = [full, mock.DEFAULT, mock.DEFAULT, mock.DEFAULT, RuntimeError("no space")]
    monkeypatch.setattr(torch, "save", mock.Mock(wraps=torch.save, side_effect=saves))
    moves = [in_use, mock.DEFAULT, in_use]
    monkeypatch.setattr(os, "replace", mock.Mock(wraps=os.replace, side_effect=moves))
    with mock.patch.object(Path, "unlink", side_effect=in_use):
        main("--data", data, "--steps", 250, "--out", tmp_path)
    before = files(tmp_path)
    assert before.keys() == FILES and len(saved(tmp_path)["losses"]) == 250
    with pytest.raises(SystemExit, match="^[^\n]*model.part cannot be written: no space$"):
        main("--data", data, "--steps", 102, "--out", tmp_path)
    assert files(tmp_path) == before
    again = f"{tmp_path / 'model.part'} cannot be written, next try in 100 steps: "
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{again}{error}" for error in (full, in_use, in_use)]


def test_resume_after_a_kill_equals_an_uninterrupted_run(trained, copy, data, tmp_path):
    """A run that is over only draws again, and so do its weights alone, without the data. The files
    are used without a GPU, but say that they are of one."""
    state = saved(trained / "whole")
    weights = tmp_path / "weights.pt"
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save(saved(copy), copy / "model.pt")
        torch.save({"config": state["config"], "ema": state["ema"]}, weights)
    whole = files(trained / "whole")
    resume = ["--data", data, "--resume"]
    for more in (resume, resume, ["--load", weights, "--data", tmp_path / "missing.npz"]):
        assert files(copy).keys() == {"model.pt"}
        main(*RUN, *more, "--out", copy)
        assert files(copy) == whole and whole.keys() == FILES
        for name in FILES - {"model.pt"}:
            (copy / name).unlink()
    assert np.mean(state["losses"][-20:]) < state["losses"][0] / 2


def test_resume_names_what_is_not_as_it_was(two, data, copy, refuses, tmp_path, monkeypatch):
    torch.save({name: saved(copy)[name] for name in ("config", "ema")}, tmp_path / "model.pt")
    wide = npz(tmp_path / "wide.npz", x_train=pixels(2, 8, 12), y_train=["3", "7"])
    flags = {"shape, labels": f"--data {wide}", "width": "--width 16", "processes": ""}
    flags |= {"lr, seed": "--seed 1 --lr 1e-3", "steps": "--steps 103"}
    flags |= {"batch_size": "--batch-size 9", "": f"--out {tmp_path}"}  # weights alone
    before = files(tmp_path)
    for names, more in flags.items():
        argv = ["--data", data, *RUN, "--resume", "--out", copy, *more.split()]
        monkeypatch.setattr(ddpm_mnist, "WORLD", 2 if names == "processes" else 1)
        refuses(ddpm_mnist.main, argv, "--resume", f"not the same run: {names or 'only weights'}")
    assert files(tmp_path) == before


SPOIL = {  # what --load and --resume may be given by mistake
    "missing": Path.unlink,
    "code": lambda path: path.write_text(f"cbuiltins\nopen\n(V{path}.run\nVw\ntR."),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100_000]),
    "other config": lambda path: torch.save(saved(path.parent) | {"config": ["moons"]}, path),
    "net alone": lambda path: torch.save({"config": saved(path.parent)["config"]}, path),
}


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
@pytest.mark.parametrize("flag", ["--load", "--resume"])
def test_what_is_no_checkpoint_is_refused(spoil, flag, copy, data, refuses):
    path = copy / "model.pt"
    spoil(path)
    before = files(copy)
    more = ["--load", path] if flag == "--load" else ["--resume", "--data", data, *RUN]
    refuses(ddpm_mnist.main, [*TINY, *more, "--out", copy], f"{flag} {path}")
    assert files(copy) == before


@pytest.mark.parametrize("count", [1, 15, 101, 1001])
def test_any_number_is_drawn_as_asked_and_the_first_hundred_shown(count, data, small, tmp_path):
    """--batch-size at a time, so that memory does not grow; each from its own noise of N(0, 1)."""
    flags = ["--samples", count, "--sample-steps", 7, "--eta", 0.3, "--guidance", 2.5, "--seed", 1]
    main("--data", data, *flags, "--batch-size", 40, "--out", tmp_path)
    net = Small(1, 2)
    net.load_state_dict(saved(tmp_path)["ema"])
    diffusion = Diffusion(cosine_schedule(1000))
    want = []
    torch.manual_seed(1)
    for y in (torch.arange(count) % 2).split(40):
        xT = torch.randn(len(y), 1, 8, 8)
        *_, x0 = diffusion.ddim_sample_loop(denoiser(net, diffusion, y, 2.5), xT, 7, 0.3)
        want.append((x0 + 1) * 127.5)
    images = np.load(tmp_path / "samples.npy")
    np.testing.assert_allclose(images, torch.cat(want).view(count, 8, 8, 1), atol=0.51)
    assert np.load(tmp_path / "labels.npy").tolist() == [(3, 7)[k % 2] for k in range(count)]
    sheet = imread(tmp_path / "samples.png")[..., :3] * 255
    tiles = sheet.reshape(-1, 8, 10, 8, 3).swapaxes(1, 2).reshape(-1, 8, 8, 3)
    shown = min(count, 100)
    np.testing.assert_allclose(tiles[:shown], images[:shown] + np.zeros(3), atol=1e-3)
    assert len(tiles) == math.ceil(shown / 10) * 10 and not tiles[shown:].any()


def test_pixels_are_rounded_and_clipped_and_states_are_not_kept(data, small, tmp_path, monkeypatch):
    """-1, 0, 1 become 0, 128, 255; every pixel of the data comes back."""
    values = torch.tensor([*(np.arange(256) / 127.5 - 1), -7, 7, 0, math.nextafter(-1, 0)])
    states = []

    def loop(*_):
        for _ in range(51):
            x = values.float().view(1, 1, 4, 65).clone()
            states.append(weakref.ref(x))
            yield x
            assert sum(state() is not None for state in states) <= 2

    monkeypatch.setattr(Diffusion, "ddim_sample_loop", loop)
    main("--data", data, "--samples", 1, "--out", tmp_path)
    got = np.load(tmp_path / "samples.npy").flatten().tolist()
    assert len(states) == 51 and got == [*range(256), 0, 255, 128, 0]


WRONG_FLAGS = """--steps 0, --batch-size 0, --lr -1, --lr nan, --lr inf, --samples 0, --seed -1,
--sample-steps 0, --sample-steps 1001, --eta 1.1, --eta -0.1, --eta nan, --guidance nan,
--guidance inf, --width 12, --label 77, --device gpu, --device cuda:0, --non x, --out DATA"""
WANTED = {"--steps": "1 to", "--sample-steps": "1 to 1000", "--eta": "0 to 1", "--lr": "0 to 1000"}
WANTED |= {"--width": "16, 32, 64, 128", "--label": "of [3, 7]", "--device": "choose from 'cpu'"}


@pytest.mark.parametrize("flag", WRONG_FLAGS.replace("\n", " ").split(", "))
def test_wrong_flags_are_refused_before_training(flag, data, refuses, tmp_path):
    name, value = flag.replace("DATA", str(data)).split(" ", 1)
    argv = ["--data", data, "--out", tmp_path / "out", name, value]
    refuses(ddpm_mnist.main, [*TINY, *argv], name, value, WANTED.get(name, ""))
    assert files(tmp_path) == {} and not (tmp_path / "out").exists()


def test_main_in_a_notebook_runs_the_defaults_which_help_shows(tmp_path, monkeypatch, capsys):
    """On a machine without a GPU, but with the ordinary wheel, which is built for cuda."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    train = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(ddpm_mnist, "train", train)
    wheel = mock.Mock(side_effect=lambda check_available=False: None if check_available else "cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", wheel)
    with pytest.raises(KeyboardInterrupt):
        ddpm_mnist.main()
    assert vars(train.call_args.args[0]) == DEFAULTS
    with pytest.raises(SystemExit, match="^0$"):
        main("--help")
    said = [" ".join(flag.split()) for flag in capsys.readouterr().out.split("\n  --")[1:]]
    assert len(said) == len(DEFAULTS)
    for text, (name, default) in zip(said, DEFAULTS.items()):
        assert text.startswith(name.replace("_", "-")) and text.endswith(f"(default: {default})")


def test_no_flag_is_the_beginning_of_one_of_torchrun():
    theirs = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    ours = {f"--{name.replace('_', '-')}" for name in DEFAULTS}
    assert len(theirs) > 20 and not [a for a in ours for b in theirs if b.startswith(a)]


def test_everything_runs_where_cpu_tensors_are_refused(trained, copy, data, tmp_path):
    """On a pretend GPU, the default there: trains, draws and resumes as on the CPU."""
    flags = ["--data", data, "--steps", 2, "--guidance", 2, "--sample-steps", 2, "--out"]
    with pretend_device():
        main(*flags, tmp_path / "device")
        main(*flags, tmp_path / "cpu", "--device", "cpu")
        main(*RUN, "--data", data, "--out", copy, "--resume")
    assert files(tmp_path / "device") == files(tmp_path / "cpu")
    assert files(copy) == files(trained / "whole")


@pytest.fixture
def two(monkeypatch):
    """As if torchrun had started two processes, on a machine with GPUs."""
    monkeypatch.setattr(ddpm_mnist, "WORLD", 2)
    monkeypatch.setattr(ddpm_mnist, "distributed", mock.Mock())
    monkeypatch.setattr(torch.nn, "parallel", mock.Mock())
    torch.nn.parallel.DistributedDataParallel.side_effect = lambda net: net
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # asked by Adam
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock())
    monkeypatch.setenv("LOCAL_RANK", "3")


def test_processes_have_random_numbers_of_their_own_and_the_first_alone_writes(
    two, data, small, tmp_path, monkeypatch, capsys
):
    """Process 1 of --seed 0 is not process 0 of --seed 1, whatever the step. Each takes the GPU
    that torchrun gives it; the first alone shows a bar. (tests/slow has processes that are.)"""
    seeds = []
    calls = []
    monkeypatch.setattr(torch, "manual_seed", calls.append)
    for rank, seed in product((0, 1), (0, 1, 2, 10**9)):
        monkeypatch.setattr(ddpm_mnist, "RANK", rank)
        main("--data", data, "--seed", seed, "--out", tmp_path / f"{rank} {seed}")
        first, step, *last = calls
        calls.clear()
        assert {first, *last} == {seed}  # of the weights, and of what process 0 draws
        seeds.append(step)
        torch.cuda.set_device.assert_called_with(3)
        assert torch.nn.parallel.DistributedDataParallel.call_count == len(seeds)
        assert files(tmp_path / f"{rank} {seed}").keys() == (set() if rank else FILES)
        assert ("loss" in capsys.readouterr().err) == (rank == 0)
    assert np.diff(sorted(seeds)).min() >= 1e7  # the most that --steps may be


def test_script_from_another_folder_trains_on_the_committed_digits(tmp_path):
    script = [sys.executable, "-W", "error", os.path.relpath(SCRIPT, tmp_path), "--device", "cpu"]
    subprocess.run([*script, *TINY], cwd=tmp_path, check=True, timeout=300)
    assert files(tmp_path).keys() == {f"runs/ddpm_mnist/{name}" for name in FILES}
    assert np.load(tmp_path / "runs/ddpm_mnist/labels.npy").tolist() == [0, 1, 2]
