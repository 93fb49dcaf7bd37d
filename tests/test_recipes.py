"""Every block of docs/recipes.md and README, run as it stands but for smaller budgets."""

import gzip
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

import ddpm_2d
import ddpm_mnist

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text()
TEXT = (ROOT / "README.md").read_text() + PAGE
SECTIONS = {text.partition("\n")[0]: text for text in TEXT.split("\n## ")[1:]}
TINY = '"2", "--batch-size", "4", "--samples", "2", "--sample-steps", "2"'  # of ddpm_mnist.main


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(title, names, smaller): run a recipe in an empty folder with the committed data and
    weights; smaller are (old, new) budgets. Returns the names that it leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm_mnist, "UNet", ddpm_mnist.UNet)  # is put back after the test
    pyplot.switch_backend("Agg")
    for folder in ("data", "weights"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    torch.manual_seed(0)

    def run(title, names=(), smaller=()):
        names = dict(names)
        assert all(old in SECTIONS[title] for old, _ in smaller), title
        for code in re.findall(r"```python\n(.*?)```", SECTIONS[title], re.S):
            for old, new in smaller:
                code = code.replace(old, new)
            exec(compile(code, title, "exec"), names)
        return names

    yield run
    pyplot.close("all")


def test_each_block_is_at_most_20_lines_and_has_a_test():
    tests = Path(__file__).read_text() + '"Several GPUs and machines"'  # in tests/slow
    for title in re.findall(r"\n## (.*)", PAGE):
        blocks = re.findall(r"```\w+\n(.*?)```", SECTIONS[title], re.S)
        assert blocks and f'"{title}"' in tests, title
        assert all(len(re.findall("^.*\\S", block, re.M)) <= 20 for block in blocks), title


@pytest.fixture
def points_model(recipe, tmp_path):
    """What "Load a model of points" leaves after a short training on three points."""
    (tmp_path / "far.csv").write_text("1000,5\n1200,5\n1100,6\n")
    argv = "--data far.csv --steps 20 --T 50 --batch-size 64 --samples 10 --out runs/ddpm_2d"
    ddpm_2d.main(argv.split())
    return recipe("Load a model of points", smaller=[("1000, 2", "200, 2")])


def test_recipe_load_a_model_of_points_and_ddim(recipe, points_model):
    """Both sample in the units of the file, by the saved network, with its schedule and T."""
    smaller = [("steps=50", "steps=10"), ("1000, 2", "200, 2")]
    second = recipe("DDIM in 50 steps for points", points_model, smaller)
    assert len(second["_"]) == 10
    assert not torch.equal(points_model["points"], second["points"])
    for names in (points_model, second):
        z = (names["points"] - torch.tensor([1100, 16 / 3])) / torch.tensor([81.65, 0.4714])
        assert z.shape == (200, 2) and (z.std(0) - 1).abs().max() < 0.5 > z.mean().abs()
        assert names["diffusion"].alpha_bar[50] == pytest.approx(7.68e-6, rel=0.01)


def check_moons(names):
    """Samples after a short training: most of them are likely, and each moon has its half."""
    assert (names["data"].log_prob(names["x0"]) < -6).float().mean() < 0.2  # of noise: 0.8
    nearest = torch.cdist(names["x0"], names["data"].centers).argmin(1)
    assert 700 < (nearest < 600).sum() < 1300


def test_recipe_v_for_points(recipe):
    smaller = [("range(1500)", "range(300)"), ("512", "128"), ("steps=50", "steps=20")]
    names = recipe("v for points", smaller=smaller)
    check_moons(names)
    t = torch.arange(1, 1001)
    x0, eps = torch.randn(2, 1000, 2)
    xt = names["diffusion"].q_sample(x0, t, eps)
    assert names["VelocityPredictor"](1000)(xt, t).std(0).max() < 1e-5  # before training
    names["net"] = lambda xt, t: names["diffusion"].velocity(x0, t, eps)
    assert torch.allclose(names["model"](xt, t), eps, atol=1e-5)


def test_recipe_schedule_of_your_own(recipe):
    smaller = [("steps=1500", "steps=300"), ("512", "128"), ("steps=50", "steps=20")]
    names = recipe("A schedule of your own", smaller=smaller)
    check_moons(names)
    diffusion = names["diffusion"]
    assert names["beta"].shape == (1000,) and names["beta"].dtype == torch.float64
    quarter = (1 / (1 + np.exp(-1.5)) - 1 / (1 + np.exp(3))) / np.tanh(1.5)  # at u = 1 / 4
    assert diffusion.alpha_bar[250] == pytest.approx(quarter)
    flat = names["sigmoid_schedule"](1000, tau=100)
    assert torch.cumprod(1 - flat, 0)[249] == pytest.approx(0.75, abs=1e-4)
    schedules = {"157": ddpm_2d.linear_schedule, "20,000": ddpm_mnist.cosine_schedule}
    for stated, schedule in (schedules | {"1,800": names["sigmoid_schedule"]}).items():
        factor = ddpm_mnist.Diffusion(schedule(1000)).alpha_bar[-1] ** -0.5
        assert float(stated.replace(",", "")) == pytest.approx(factor, rel=0.02)
        assert f" {stated} for" in " ".join(SECTIONS["A schedule of your own"].split())
    x0, eps = torch.randn(2, 1000, 2)
    for step, error, to in ((1000, 0.1, -3), (500, 0, x0.clamp(-3, 3))):  # 0.1 becomes 180
        t = torch.full((1000,), step)
        xt = diffusion.q_sample(x0, t, eps)
        names["net"] = lambda xt, t, error=error: eps + error
        again = diffusion.q_sample(torch.zeros(1000, 2) + to, t, names["clipped"](xt, t))
        assert torch.allclose(again, xt, atol=1e-4)  # to is the x_0 that belongs to clipped


def test_recipe_points_with_labels_and_guidance(recipe):
    smaller = [("range(1500)", "range(400)"), ("512", "128"), ("(1000", "(50")]
    names = recipe("Points with labels, and guidance", smaller=smaller)
    nearest = torch.cdist(names["x0"], names["centers"]).argmin(1)
    assert (nearest == names["y"]).double().mean() > 0.95
    names["net"] = lambda xt, t, y: y.double()  # 0, ..., 7 with a label, 8 without
    assert torch.allclose(names["guided"](None, None), 1.5 * names["y"].double() - 4)


def test_recipe_log_likelihood_of_a_point(recipe, points_model):
    """By the exact score of the spirals it is right to 0.05 nats at each point."""
    names = recipe("Log-likelihood of a point", points_model)
    diffusion = ddpm_2d.Diffusion(ddpm_2d.linear_schedule(1000))
    data = ddpm_2d.Mixture(1.6 * ddpm_2d.TOYS["spirals"].float(), 0.08)
    x = data.sample(50)
    found = names["log_likelihood"](diffusion, partial(data.ideal_eps, diffusion), x)
    assert (found - data.log_prob(x)).abs().max() < 0.05
    standardised = names["log_likelihood"](names["diffusion"], names["net"], names["x"])
    area = names["log_p"] - standardised + np.log(81.65 * 0.4714)  # std of the three points
    assert area.abs().max() < 1e-3


@pytest.fixture
def sevens(recipe):
    return recipe("Load a checkpoint and draw fifty sevens", smaller=[("steps=50", "steps=2")])


def test_recipe_fifty_sevens_are_those_of_the_command(sevens):
    argv = "--load weights/ddpm_mnist.pt --label 7 --samples 50 --sample-steps 2 --out out"
    ddpm_mnist.main(argv.split())
    assert np.array_equal(sevens["sevens"].permute(0, 2, 3, 1), np.load("out/samples.npy"))


def test_recipe_between_two_drawings(recipe, sevens):
    names = recipe("Between two drawings of a 3", sevens, [("steps=50", "steps=4")])
    assert (names["xT"].square().mean((1, 2, 3)) - 1).abs().max() < 6 * (2 / 784) ** 0.5
    model = ddpm_mnist.denoiser(names["net"], names["diffusion"], torch.tensor([3]))
    *_, alone = names["diffusion"].ddim_sample_loop(model, names["end"][None], 4)
    assert torch.allclose(names["between"][9:], alone, atol=1e-3)


def test_recipe_inpainting_the_other_half(recipe, sevens):
    names = recipe("Inpainting: the other half", sevens, [("steps=50", "steps=10")])
    left, right = (names["inpainted"] - names["given"][:, None]).square().split(14, dim=-1)
    assert left.mean((2, 3, 4)).diag().max() < 1e-9
    distance = right.mean((2, 3, 4))  # [10, 10], to each of the real right halves
    assert distance.min() > 0.01  # they were not handed over
    assert distance.diag().mean() < 0.7 * distance.mean()  # it goes on with the strokes


def test_recipe_film_of_the_sampling(recipe, sevens):
    smaller = [("steps=50", "steps=2"), ("(100", "(20"), ("w(10", "w(2"), ("(280, ", "(56, ")]
    names = recipe("A film of the sampling", sevens, smaller)
    with Image.open("film.gif") as film:
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("L")).astype(float)
    digits = [np.hstack(row) for row in names["xt"].clamp(-1, 1).view(2, 10, 28, 28).numpy()]
    assert np.abs(last - (np.vstack(digits) + 1) * 127.5).max() < 2


def test_recipe_folder_of_images_as_an_npz_file(recipe, tmp_path):
    """Upper half white, lower half a colour; the camera of dog/3.jpeg was held upside down."""
    colors = {"cat/1.png": "red", "cat/2.JPG": "red", "dog/3.jpeg": "blue", "dog/no.gif": "red"}
    for name, color in colors.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (60, 40), color)
        image.paste("white", (0, 0, 60, 20))
        image.getexif()[0x0112] = 3 if "dog" in name else 1
        image.save(tmp_path / "photos" / name, exif=image.getexif())
    recipe("A folder of images as an .npz file")
    x, y, labels = ddpm_mnist.load_images(Path("photos.npz"))
    assert y.tolist() == [0, 0, 1] and labels == ["cat", "dog"]
    white, red, blue = torch.tensor([[255, 255, 255], [255, 0, 0], [0, 0, 255]])
    for row, expected in ((4, (white, white, blue)), (27, (red, red, white))):
        assert (x[:, :, row, 5].int() - torch.stack(expected)).abs().max() < 5


def test_recipe_idx_files(recipe, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 4), np.uint8)
    head = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 8, 0, 0, 0, 4])
    Path("train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    Path("train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\3\t\0\t"))
    recipe("IDX files: Fashion-MNIST, KMNIST")
    x, y, labels = ddpm_mnist.load_images(Path("fashion.npz"))
    assert np.array_equal(x[:, 0], images) and np.array(labels)[y].tolist() == [9, 0, 9]


def test_recipe_go_on_from_the_committed_weights(recipe):
    with np.load("data/mnist.npz") as arrays:
        np.savez("mine.npz", x_train=arrays["x_train"], y_train=arrays["y_train"] // 4)
    names = recipe("Go on from the included weights", smaller=[('"1000"', TINY)])
    assert torch.load("runs/mine/model.pt")["losses"][0] < 0.4  # random weights: 1
    old = torch.load("weights/ddpm_mnist.pt")["ema"]
    three = names["StartedUNet"](1, 3, 32).state_dict()
    assert torch.equal(three["label.weight"][3], old["label.weight"][10])
    assert all(torch.equal(three[key], old[key]) for key in old if key != "label.weight")
    color = names["StartedUNet"](3, 10, 32).state_dict()
    other = {key for key in old if not torch.equal(color[key], old[key])}
    assert other == {"stem.weight", "head.2.weight", "head.2.bias"}
    ddpm_mnist.UNet(1, 3, 32).load_state_dict(torch.load("runs/mine/model.pt")["ema"])


def test_recipe_of_the_readme_trains_on_points(recipe):
    smaller = [("steps=1000", "steps=600"), ("batch_size=512", "batch_size=128")]
    names = recipe("Use it in your own code", smaller=smaller)
    check_moons(names)
    assert len(names["pyplot"].gca().collections[0].get_offsets()) == 2000


def test_recipe_in_a_notebook(recipe):
    smaller = [('"4000", "--batch-size", "256"', TINY)]
    smaller += [('"1000"', '"20", "--T", "30", "--samples", "50", "--batch-size", "32"')]
    names = recipe("In a notebook, on a GPU if there is one", smaller=smaller)
    digits, points = [names["plt"].figure(n).gca() for n in (1, 2)]
    drawn = np.hstack(np.load("runs/notebook/samples.npy"))[..., 0]  # [28, 56]
    assert np.abs(digits.images[0].get_array()[:, :56, 0] * 255 - drawn).max() < 1
    assert np.allclose(points.collections[0].get_offsets(), np.load("runs/moons/samples.npy"))


def test_recipe_train_in_bfloat16(recipe):
    names = recipe("Train in bfloat16", smaller=[('"4000"', TINY)])
    weights = torch.load("runs/bfloat16/model.pt")["net"].values()
    assert all(w.dtype == torch.float32 for w in weights)
    kinds = []
    net = names["Bfloat16UNet"]()
    net.stem.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    v = net(torch.randn(2, 1, 28, 28), torch.tensor([1, 10]))
    assert kinds == [torch.bfloat16] and v.dtype == torch.float32
