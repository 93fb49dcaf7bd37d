"""ddpm_mnist.py as a specification: data, U-Net, training, checkpoints, samples, torchrun.

What it shares with ddpm_2d.py is in test_diffusion.py. Nothing here needs a network or a GPU.
"""

import gc
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from mnist_process import Small
from pretend_device import pretend_device
from torch.distributed.run import get_args_parser
from torch.nn.functional import interpolate, silu
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import ddpm_mnist
from ddpm_mnist import Diffusion, UNet, cosine_schedule, denoiser

SCRIPT = Path(ddpm_mnist.__file__)
FILES = {"labels.npy", "model.pt", "samples.npy", "samples.png"}
TINY = "--steps 1 --batch-size 4 --samples 3 --sample-steps 1".split()
RUN = "--steps 102 --batch-size 8 --lr 5e-3 --samples 8 --sample-steps 5".split()
leaves_files_open = pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy, urllib, failing


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
    losses = Diffusion.p_losses

    def spy(self, *args):
        if (folder / "whole" / "model.pt").exists() and not (folder / "killed").exists():
            shutil.copytree(folder / "whole", folder / "killed")
        return losses(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diffusion, "p_losses", spy)
        main("--data", data, *RUN, "--out", folder / "whole")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A folder with the model.pt of 100 steps of that run."""
    return shutil.copytree(trained / "killed", tmp_path / "copy")


def test_committed_digits_are_those_of_the_original_files():
    path = SCRIPT.parent / "data" / "mnist.npz"
    assert ddpm_mnist.MNIST == path and path.is_absolute()
    x, y, config = ddpm_mnist.load_images(path)
    with np.load(path) as arrays:
        originals = [arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    digest = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"
    assert hashlib.sha256(b"".join(map(bytes, originals))).hexdigest() == digest
    assert np.array_equal(x[:, 0], originals[0]) and np.array_equal(y, originals[1])
    assert config == {"shape": [1, 28, 28], "labels": list(range(10))}
    digest = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"  # Keras's file
    assert ddpm_mnist.SHA256 == digest and ddpm_mnist.URL.endswith("tf-keras-datasets/mnist.npz")


@pytest.fixture
def server(data, monkeypatch, tmp_path):
    """The address of a server that has what the script would download as sub/mnist.npz."""
    monkeypatch.chdir(data.parent)  # it serves the working folder
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{http.server_port}"
        monkeypatch.setattr(ddpm_mnist, "URL", f"{address}/{data.name}")
        monkeypatch.setattr(ddpm_mnist, "SHA256", hashlib.sha256(data.read_bytes()).hexdigest())
        monkeypatch.setattr(ddpm_mnist, "MNIST", tmp_path / "sub" / "mnist.npz")
        yield address
        http.shutdown()


def test_digits_are_downloaded_once(server, data, small, refuses, tmp_path, capsys, monkeypatch):
    for path in (tmp_path / "mnist.npz", tmp_path / "sub" / "mnits.npz"):  # not the default one
        refuses(ddpm_mnist.main, [*TINY, "--data", path, "--out", tmp_path / "out"], path)
    assert files(tmp_path) == {}
    main("--out", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()[0]
    assert str(ddpm_mnist.MNIST) in said and ddpm_mnist.URL in said
    assert ddpm_mnist.MNIST.read_bytes() == data.read_bytes()
    assert files(tmp_path).keys() == {"sub/mnist.npz", *(f"out/{name}" for name in FILES)}
    monkeypatch.setattr(ddpm_mnist, "URL", f"{server}/missing")
    main("--out", tmp_path / "out")  # now it is there
    assert "downloading" not in capsys.readouterr().out


@leaves_files_open
@pytest.mark.parametrize("url", ["{}/missing", "{}/", "http://127.0.0.1:1"])
def test_failed_download_leaves_one_line_alone(url, server, tmp_path, capsys, monkeypatch):
    """404, wrong bytes, no server."""
    monkeypatch.setattr(ddpm_mnist, "URL", url.format(server))
    with pytest.raises(SystemExit, match="^2$"):
        main("--out", tmp_path / "out")
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert "error: " in line and str(ddpm_mnist.MNIST) in line
    assert files(tmp_path) == {}
    gc.collect()


OWN = {
    "grey with a channel": (pixels(6, 8, 8, 1), range(6)),
    "colour 32 x 32": (pixels(6, 32, 32, 3), range(6)),
    "grey 64 x 64": (pixels(4, 64, 64), range(4)),
    "4 x 12": (pixels(6, 4, 12), [5] * 6),
    "one image": (pixels(1, 8, 8), [2]),
    "negative labels": (pixels(6, 8, 8), np.array([-3, 1] * 3, np.int8)),
    "uint64 labels": (pixels(6, 8, 8), np.array([9, 4, 4] * 2, np.uint64)),
    "letters 1..26": (pixels(52, 8, 8), np.arange(52) % 26 + 1),
    "no labels": (pixels(6, 8, 8), None),
}


@pytest.mark.parametrize(("x", "y"), OWN.values(), ids=OWN)
def test_own_images_are_trained_and_drawn(x, y, tmp_path):
    labels = [0] if y is None else sorted(set(map(int, y)))
    more = {} if y is None else {"y_train": y}
    path = npz(tmp_path / "d.npz", x_train=x, **more, x_test=[1.5], other="ignored")
    main("--data", path, "--samples", 30, "--out", tmp_path / "out")
    height, width, channels = [*x.shape[1:], 1][:3]
    want = {"shape": [channels, height, width], "labels": labels}
    assert saved(tmp_path / "out")["config"] == want
    images = np.load(tmp_path / "out" / "samples.npy")
    assert images.dtype == np.uint8 and images.shape == (30, height, width, channels)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == (30 * labels)[:30]
    sheet = imread(tmp_path / "out" / "samples.png")
    assert sheet.shape == (3 * height, 10 * width, 4)
    assert np.ptp(sheet[..., :3], axis=-1).any() == (channels == 3)  # in colour
    main("--load", tmp_path / "out" / "model.pt", "--label", labels[-1], "--out", tmp_path / "one")
    assert np.load(tmp_path / "one" / "labels.npy").tolist() == [labels[-1]] * 3


X = pixels(6, 8, 8)
Y = np.arange(6)
WRONG_SHAPES = [(6, 30, 8), (6, 8, 30), (6, 8, 8, 4), (6, 8, 8, 2), (6, 3, 8, 8), (6, 64)]
WRONG_SHAPES += [(6, 8, 8, 2, 2), (6, 8, 8, 3, 1), (), (0, 8, 8)]
WRONG = [(pixels(*shape), np.zeros(shape[:1], int), str([*shape])) for shape in WRONG_SHAPES]
WRONG += [(X / 255, Y, "float64"), (X.astype(np.uint16), Y, "uint16")]
WRONG += [(X, Y[:5], "[5]"), (X, Y / 1, "float64"), (X, Y[:, None], "[6, 1]")]


@leaves_files_open
def test_wrong_files_are_refused_with_what_was_found_and_is_wanted(data, refuses, tmp_path):
    whole = data.read_bytes()
    contents = {"empty": b"", "text": b"images\n", "cut": whole[: len(whole) // 2], "x": whole[:9]}
    for k in range(70, 900, 20):  # in the midst of x_train
        contents[f"byte {k}"] = whole[:k] + bytes([whole[k] ^ 85]) + whole[k + 1 :]
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.save(tmp_path / "a.npy", X)
    npz(tmp_path / "names.npz", images=X, labels=Y)
    np.savez(tmp_path / "objects.npz", x_train=np.array([X, None], dtype=object))
    (tmp_path / "folder.npz").mkdir()
    words = {path: [] for path in [*tmp_path.iterdir(), tmp_path / "missing.npz"]}
    words |= {tmp_path / name: ["array x_train"] for name in ("a.npy", "names.npz")}
    for k, (x, y, found) in enumerate(WRONG):
        path = npz(tmp_path / f"{k}.npz", x_train=x, y_train=y)
        words[path] = [found, "uint8 [n, H, W]", "by 4"]
    for path in words:
        flags = ["--data", path, "--out", tmp_path / "out"]
        refuses(ddpm_mnist.main, [*TINY, *flags], path, *words[path])
    assert files(tmp_path / "out") == {}
    gc.collect()


def unet():
    torch.manual_seed(0)
    net = UNet(Diffusion(cosine_schedule(50)))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))  # away from the zero-initialised output
    return net


def test_output_depends_on_every_parameter_and_image_time_and_label_alone():
    net = unet()
    x = torch.randn(5, 1, 28, 28)
    t = torch.tensor([1, 10, 20, 30, 40])
    y = torch.tensor([0, 1, 2, 9, 8])
    out = net(x, t, y)
    for other in (net(x + 0.1, t, y), net(x, t + 1, y), net(x, t, y + 1), net(x, t)):
        assert ((other - out).abs().amax((1, 2, 3)) > 1e-3).all()
    assert_close(net(x, t), net(x, t, torch.full((5,), 10)))  # "not told"
    assert_close(net(x[1:2], t[1:2], y[1:2]), out[1:2], rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_output_is_v_turned_into_the_noise():
    """v, at first constant, is made with skips and attention; eps is signal v + noise x_t."""
    net = unet()
    inputs = {}
    outputs = {}
    for name, block in net.named_children():
        block.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]}))
        block.register_forward_hook(lambda _, args, out, n=name: outputs.update({n: out}))
    x = torch.randn(50, 1, 12, 20)
    t = torch.arange(1, 51)
    eps = net(x, t)
    angle = t[:, None] * 10_000 ** (-torch.arange(32) / 32)
    assert_close(inputs["time"], torch.cat([angle.sin(), angle.cos()], 1))
    assert_close(inputs["down1"], torch.nn.AvgPool2d(2)(outputs["stem"]))
    assert_close(inputs["middle1"], outputs["down2"])
    attention = torch.nn.MultiheadAttention(128, 4, batch_first=True)
    attention.load_state_dict(net.attention.state_dict())
    h = net.norm(outputs["middle1"]).flatten(2).mT  # [50, 15, 128]
    mixed = attention(h, h, h)[0].mT.view(50, 128, 3, 5)
    assert_close(inputs["middle2"], outputs["middle1"] + mixed, rtol=1e-4, atol=1e-4)
    assert_close(inputs["up2"], outputs["middle2"] + outputs["down2"])
    assert_close(inputs["up1"], interpolate(outputs["up2"], scale_factor=2) + outputs["down1"])
    assert_close(inputs["up0"], interpolate(outputs["up1"], scale_factor=2) + outputs["stem"])
    a = torch.cumprod(1 - cosine_schedule(50), 0)[t].view(50, 1, 1, 1)
    want = a.sqrt() * outputs["head"] + (1 - a).sqrt() * x
    assert_close(eps.double(), want, rtol=1e-4, atol=1e-5)
    start = UNet(net.diffusion).head(outputs["up0"])
    assert_close(start, start[:1, :, :1, :1].expand_as(start))  # whatever the image


def test_block_begins_as_its_skip_and_is_scaled_and_shifted_by_the_embedding():
    block = ddpm_mnist.ResBlock(32, 64)
    x = torch.randn(2, 32, 8, 8)
    emb = torch.randn(2, 128)
    assert_close(block(x, emb), block.skip(x) + block.conv2.bias.view(64, 1, 1))
    block.conv2.reset_parameters()
    scale, shift = block.embed(emb).view(2, 2, 64, 1, 1).unbind(1)
    h = block.norm2(block.conv1(silu(block.norm1(x))))
    assert_close(block(x, emb), block.skip(x) + block.conv2(silu((1 + scale) * h + shift)))


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 4])
def test_denoiser_guides_by_eq_6_and_clips_x0(guidance):
    """(1 + w) eps(x, y) - w eps(x) of Ho & Salimans 2022, guidance = 1 + w, written in float64."""
    diffusion = Diffusion(cosine_schedule(50))

    def net(x, t, y=None):
        return 0.8 * x - 0.1 if y is None else 0.9 * x + 0.05 * y.view(-1, 1, 1, 1)

    torch.manual_seed(0)
    x = 2 * torch.randn(50, 1, 4, 4).double()
    t = torch.arange(1, 51)
    y = t % 10
    got = denoiser(net, diffusion, y, guidance)(x, t)
    eps = guidance * net(x, t, y) - (guidance - 1) * net(x, t)
    a = torch.tensor(diffusion.alpha_bar, dtype=torch.float64)[t].view(50, 1, 1, 1)
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    assert 0.2 < (x0.abs() < 1).double().mean() < 0.8  # both cases of the clipping
    want = (x - a.sqrt() * x0.clamp(-1, 1)) / (1 - a).sqrt()
    assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def batches(small, tmp_path, monkeypatch):
    """x0, t, eps, v and y of 40 steps of 100 images, and the losses. Image k of 50 has pixels 5 k
    and label (3, 7, 20)[k % 3]."""
    q_sample = Diffusion.q_sample
    calls = []

    def spy(self, x0, t, eps):
        calls.append((x0, t, eps))
        return q_sample(self, x0, t, eps)

    monkeypatch.setattr(Diffusion, "q_sample", spy)
    k = np.arange(50)
    x = np.full((50, 4, 4), 5 * k[:, None, None], np.uint8)
    path = npz(tmp_path / "d.npz", x_train=x, y_train=np.array([3, 7, 20])[k % 3])
    main("--data", path, "--steps", 40, "--batch-size", 100, "--out", tmp_path / "out")
    x0, t, eps = map(torch.stack, zip(*calls[:80:2]))  # makes x_t
    v, _, _ = map(torch.stack, zip(*calls[1:80:2]))  # makes the noise of v and x_t
    _, _, y = map(torch.stack, zip(*small))
    return x0, t, eps, v, y, saved(tmp_path / "out")["losses"]


def test_steps_are_drawn_with_p_2t_minus_1_and_evenly_in_a_batch(batches):
    """P(t <= m) = (m / T)^2: the 100 steps are ceil(T sqrt((k - r) / 100)) with one r in [0, 1]."""
    _, t, *_ = batches
    assert t.min() >= 1 and t.max() == 1000
    k = torch.arange(1, 101).double()
    least = (k - 100 * (t / 1000) ** 2).amax(1)  # of r, in each of the 40 batches
    most = (k - 100 * ((t - 1) / 1000) ** 2).amin(1)
    assert (least < most + 1e-3).all() and most.min() > 0 and least.max() < 1
    assert abs(least.mean() - 0.5) < 6 * math.sqrt(1 / 12 / 40) and least.std() > 0.2


def test_images_are_drawn_evenly_from_minus_1_to_1_and_a_tenth_without_label(batches):
    """80 of 4000 draws for each image, within six standard errors. Labels not hidden are right."""
    x0, _, _, _, y, _ = batches
    k = ((x0[:, :, 0, 0, 0] + 1) * 127.5 / 5).round().long()  # [40, 100]
    assert_close(x0, (5 * k / 127.5 - 1).view(40, 100, 1, 1, 1).expand_as(x0))
    counts = k.flatten().bincount(minlength=50)
    assert len(counts) == 50 and (counts - 80).abs().max() < 6 * math.sqrt(80)
    hidden = y == 3
    assert (hidden | (y == k % 3)).all()
    assert abs(hidden.double().mean() - 0.1) < 6 * math.sqrt(0.09 / 4000)


def test_loss_is_the_mean_squared_error_of_v(batches):
    """v = signal eps - noise x_0, against the output of the network, in float64."""
    x0, t, eps, v, _, losses = batches
    a = torch.cumprod(1 - cosine_schedule(1000), 0)[t].view(40, 100, 1, 1, 1)
    want = (a.sqrt() * eps - (1 - a).sqrt() * x0 - v).square().mean((1, 2, 3, 4))
    assert losses == pytest.approx(want.tolist(), rel=2e-3)


def test_rate_gradients_and_average_of_all_steps(data, small, tmp_path, monkeypatch):
    """The rate warms up over a twentieth and falls to 0, gradients longer than 1 are cut to 1, and
    ema <- 0.75 ema + 0.25 weights (60 / (60 + 20) is 0.75) begins with the first weights."""
    losses = Diffusion.p_losses
    step = torch.optim.AdamW.step
    scale = [1e-4, 1e4] * 30
    rows = []

    def watch(self):
        group = self.param_groups[0]
        gradient = parameters_to_vector(p.grad for p in group["params"])
        step(self)
        rows.append((group["lr"], gradient.norm(), parameters_to_vector(group["params"]).detach()))

    monkeypatch.setattr(Diffusion, "p_losses", lambda *args: losses(*args) * scale.pop())
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


def test_memory_of_the_average_grows_with_the_steps_up_to_0_995(data, small, tmp_path, monkeypatch):
    decays = []

    def stop(decay):
        decays.append(decay)
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm_mnist, "get_ema_multi_avg_fn", stop)
    for steps in (180, 4000, 20_000):
        with pytest.raises(KeyboardInterrupt):
            main("--data", data, "--steps", steps, "--out", tmp_path)
    assert decays == pytest.approx([0.9, 0.995, 0.995])


@pytest.mark.parametrize("fault", ["loss", "gradient", "disk", "Ctrl-C"])
def test_training_that_fails_leaves_a_checkpoint_that_resumes(fault, copy, data, monkeypatch):
    """NaN in the loss or only in its gradient, a full disk, or Ctrl-C in the midst of saving."""
    resume = ["--data", data, "--out", copy, "--resume", "--steps", 103]
    losses = Diffusion.p_losses
    before = files(copy)

    def broken(*args):
        error = losses(*args)
        faults = {"loss": error * math.nan, "gradient": error + (error - error.detach()).sqrt()}
        return faults.get(fault, error)

    def half(state, file):
        file.write_bytes((copy / "model.pt").read_bytes()[:1000])
        raise KeyboardInterrupt(file)

    errors = (SystemExit, KeyboardInterrupt)
    words = "copy/model.part" if fault in ("disk", "Ctrl-C") else "at step 100: .* --lr$"
    with monkeypatch.context() as patch, pytest.raises(errors, match=words) as error:
        patch.setattr(Diffusion, "p_losses", broken)
        if fault == "disk":
            (copy / "model.part").symlink_to("/dev/full")
        if fault == "Ctrl-C":
            patch.setattr(torch, "save", half)
        main(*resume)
    assert len(str(error.value).strip().splitlines()) == 1
    assert fault == "Ctrl-C" or os.listdir(copy) == ["model.pt"]
    assert files(copy)["model.pt"] == before["model.pt"]
    main(*resume)
    assert len(saved(copy)["losses"]) == 103 and files(copy).keys() == FILES


def test_resume_after_a_kill_equals_an_uninterrupted_run(trained, copy, data):
    """Then more steps go on from there, and no more only sample."""
    assert files(copy).keys() == {"model.pt"} and len(saved(copy)["losses"]) == 100
    resume = ["--data", data, *RUN, "--out", copy, "--resume"]
    main(*resume)
    whole = files(trained / "whole")
    assert files(copy) == whole and whole.keys() == FILES
    main(*resume, "--steps", 7)
    assert files(copy) == whole
    main(*resume, "--steps", 104)
    losses = saved(copy)["losses"]
    assert len(losses) == 104 and losses[:102] == saved(trained / "whole")["losses"]
    assert np.mean(losses[-20:]) < losses[0] / 2


def test_weights_alone_can_be_loaded_but_not_resumed(trained, data, refuses, tmp_path):
    """They draw what the run drew, without its data."""
    state = saved(trained / "whole")
    torch.save({"config": state["config"], "ema": state["ema"]}, tmp_path / "model.pt")
    flags = [*RUN, "--out", tmp_path]
    refuses(ddpm_mnist.main, [*flags, "--data", data, "--resume"], tmp_path / "model.pt")
    assert files(tmp_path).keys() == {"model.pt"}
    main("--load", tmp_path / "model.pt", *flags, "--data", tmp_path / "missing.npz")
    for name in FILES - {"model.pt"}:
        assert files(tmp_path)[name] == files(trained / "whole")[name]


def test_resume_names_data_that_contradict_the_checkpoint(copy, refuses, tmp_path):
    before = files(copy)
    path = tmp_path / "d.npz"
    for shape, labels in (((6, 8, 8, 3), [3, 7] * 3), ((6, 12, 8), [3, 7] * 3), ((6, 8, 8), Y)):
        npz(path, x_train=pixels(*shape), y_train=labels)
        words = [path, copy / "model.pt", "[1, 8, 8]", "[3, 7]", sorted(set(map(int, labels)))]
        refuses(ddpm_mnist.main, [*TINY, "--data", path, "--out", copy, "--resume"], *words)
    assert files(copy) == before


SPOIL = {  # what --load and --resume may be given by mistake
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "code": lambda path: path.write_text(f"cbuiltins\nopen\n(V{path}.run\nVw\ntR."),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100_000]),
    "an .npz": lambda path: npz(path.with_suffix(".npz"), x_train=X).rename(path),
    "whole module": lambda path: torch.save(torch.nn.Linear(1, 1), path),
    "list": lambda path: torch.save([1, 2], path),
    "of ddpm_2d.py": lambda path: torch.save({"net": {}, "data": "moons", "T": 50}, path),
    "state dict": lambda path: torch.save(saved(path.parent)["ema"], path),
    "other network": lambda path: torch.save(saved(path.parent) | {"ema": {}, "net": {}}, path),
    "other config": lambda path: torch.save(saved(path.parent) | {"config": ["moons"]}, path),
}


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
@pytest.mark.parametrize("flag", ["--load", "--resume"])
def test_what_is_no_checkpoint_is_refused(spoil, flag, copy, data, refuses):
    path = copy / "model.pt"
    spoil(path)
    before = files(copy)
    more = ["--load", path] if flag == "--load" else ["--resume", "--data", data, "--steps", 200]
    refuses(ddpm_mnist.main, [*TINY, *more, "--out", copy], path)
    assert files(copy) == before


def test_new_training_keeps_the_old_model_and_another_seed_is_another(data, tmp_path, capsys):
    main("--data", data, "--out", tmp_path)
    before = files(tmp_path)["model.pt"]
    old = saved(tmp_path)
    assert "model.old.pt" not in capsys.readouterr().out
    main("--data", data, "--out", tmp_path, "--seed", 1)
    assert "model.old.pt" in capsys.readouterr().out
    assert files(tmp_path)["model.old.pt"] == before
    new = saved(tmp_path)
    assert new["losses"] != old["losses"]  # of the first step, which no weight has changed yet
    assert not torch.equal(new["net"]["stem.weight"], old["net"]["stem.weight"])


@pytest.mark.parametrize("count", [1, 15, 101, 1001])
def test_any_number_is_drawn_as_asked_and_the_first_hundred_shown(count, data, small, tmp_path):
    """500 at a time, so that memory does not grow; each from its own noise of N(0, 1)."""
    flags = ["--samples", count, "--sample-steps", 7, "--eta", 0.3, "--guidance", 2.5, "--seed", 1]
    main("--data", data, *flags, "--out", tmp_path)
    net = Small(Diffusion(cosine_schedule(1000)), 1, 2)
    net.load_state_dict(saved(tmp_path)["ema"])
    want = []
    torch.manual_seed(1)
    for y in (torch.arange(count) % 2).split(500):
        model = denoiser(net, net.diffusion, y, 2.5)
        xT = torch.randn(len(y), 1, 8, 8)
        *_, x0 = net.diffusion.ddim_sample_loop(model, xT, 7, 0.3)
        want.append((x0 + 1) * 127.5)
    images = np.load(tmp_path / "samples.npy")
    np.testing.assert_allclose(images, torch.cat(want).view(count, 8, 8, 1), atol=0.51)
    assert np.load(tmp_path / "labels.npy").tolist() == [(3, 7)[k % 2] for k in range(count)]
    sheet = imread(tmp_path / "samples.png")[..., :3] * 255
    tiles = sheet.reshape(-1, 8, 10, 8, 3).swapaxes(1, 2).reshape(-1, 8, 8, 3)
    want = np.zeros((math.ceil(min(count, 100) / 10) * 10, 8, 8, 3))
    want[: min(count, 100)] = images[:100]
    np.testing.assert_allclose(tiles, want, atol=1e-3)


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


def test_wrong_flags_are_refused_before_training(data, copy, refuses):
    before = files(copy)
    wrong = {
        "--steps must be 1 to": ["--steps 0"],
        "--batch-size must be 1 to": ["--batch-size 0"],
        "--lr must be 0 to": ["--lr -1", "--lr nan", "--lr inf"],
        "--samples must be 1 to": ["--samples 0"],
        "--sample-steps must be 1 to 1000": ["--sample-steps 0", "--sample-steps 1001"],
        "--eta must be 0 to 1": ["--eta 1.1", "--eta -0.1", "--eta nan"],
        "--guidance must be 0 to": ["--guidance nan", "--guidance inf"],
        "--seed must be 0 to": ["--seed -1"],
        "--label 77: there are [3, 7]": ["--label 77"],
        "gpu": ["--device gpu"],
        "on cuda:99 in": ["--device cuda:99"],
        "unrecognized arguments: --nonsense": ["--nonsense"],
        "--resume: not allowed with argument --load": ["--load model.pt --resume"],
    }
    for words in wrong:
        for flags in wrong[words]:
            flags = ["--data", data, "--out", copy, *flags.split()]
            refuses(ddpm_mnist.main, [*TINY, *flags], words)
    assert files(copy) == before


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
    assert files(tmp_path).keys() == FILES


def test_everything_runs_where_cpu_tensors_are_refused(data, tmp_path):
    """Trains, resumes, loads and draws on a pretend GPU, with the numbers of the CPU."""
    with pretend_device() as name:
        for device in (name, "cpu"):
            out = tmp_path / device
            flags = ["--device", device, "--guidance", 2, "--sample-steps", 2]
            main("--data", data, *flags, "--steps", 2, "--out", out)
            main("--data", data, *flags, "--steps", 3, "--out", out, "--resume")
            main("--load", out / "model.pt", *flags, "--out", out / "new")
    assert files(tmp_path / name) == files(tmp_path / "cpu")


def program(folder, *command):
    """Runs Python in a folder, with one thread; returns what it printed."""
    command = [sys.executable, *map(str, command)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.check_output(command, cwd=folder, env=env, text=True, timeout=300)


def test_script_from_another_folder_trains_on_the_committed_digits(tmp_path):
    script = os.path.relpath(SCRIPT, tmp_path)
    said = program(tmp_path, "-W", "error", script, *TINY, "--samples", 11, "--device", "cpu")
    assert said == "files in runs/ddpm_mnist\n"
    assert files(tmp_path).keys() == {f"runs/ddpm_mnist/{name}" for name in FILES}
    assert np.load(tmp_path / "runs/ddpm_mnist/labels.npy").tolist() == [*range(10), 0]


def test_two_processes_share_weights_but_not_data_and_one_writes(data, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    flags = [*TINY, "--steps", 3, "--device", "cpu", "--data", data, "--out", "outRANK"]
    program(tmp_path, *torchrun, Path(__file__).with_name("mnist_process.py"), "none", *flags)
    assert files(tmp_path / "out0").keys() == FILES and files(tmp_path / "out1") == {}
    (a, seen_a), (b, seen_b) = (torch.load(tmp_path / f"rank{k}.pt") for k in (0, 1))
    assert_close(a, b, rtol=0, atol=0)
    assert_close(a, saved(tmp_path / "out0")["net"], rtol=0, atol=0)
    for (x, t, _), (other, u, _) in zip(seen_a, seen_b, strict=True):
        assert not torch.equal(x, other) and not torch.equal(t, u)
