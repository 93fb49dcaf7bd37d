"""Every snippet of docs/recipes.md and README, run as it stands but for smaller budgets, and its
result."""

import gzip
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_2d
import ddpm_mnist

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text()
README = (ROOT / "README.md").read_text()
SECTIONS = {text.partition("\n")[0]: text for text in (README + PAGE).split("\n## ")[1:]}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(title, names, smaller): run a recipe in an empty folder with the committed data and
    weights; smaller are (old, new) budgets. Returns the names that it leaves."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "weights"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    torch.manual_seed(0)

    def run(title, names=None, smaller=()):
        names = {} if names is None else names
        assert all(old in SECTIONS[title] for old, _ in smaller), title
        for code in re.findall(r"```python\n(.*?)```", SECTIONS[title], re.S):
            for old, new in smaller:
                code = code.replace(old, new)
            exec(compile(code, title, "exec"), names)
        return names

    return run


def test_each_recipe_is_at_most_20_lines_and_has_a_test():
    tests = Path(__file__).read_text() + '"Several GPUs and machines"'  # in tests/slow
    for title in re.findall(r"\n## (.*)", PAGE):
        text = SECTIONS[title]
        blocks = re.findall(r"```\w+\n(.*?)```", text, re.S)
        assert blocks, title
        for block in blocks:
            assert sum(bool(line.strip()) for line in block.splitlines()) <= 20, title
        assert f'"{title}"' in tests, title


def test_recipe_schedule_of_your_own(recipe):
    names = recipe("A schedule of your own")
    beta = names["sigmoid_schedule"](1000)
    alpha_bar = torch.tensor(names["diffusion"].alpha_bar, dtype=torch.float64)
    assert beta.shape == (1001,) and beta[0] == 0
    assert ((beta[1:] > 0) & (beta[1:] < 1)).all()
    assert alpha_bar[500] == pytest.approx(0.5)  # it is symmetric
    quarter = (1 / (1 + np.exp(-1.5)) - 1 / (1 + np.exp(3))) / np.tanh(1.5)  # at u = 1 / 4
    assert alpha_bar[250] == pytest.approx(quarter)
    assert alpha_bar[-1] < 1e-5
    flat = names["sigmoid_schedule"](1000, tau=100)
    assert torch.cumprod(1 - flat, 0)[250] == pytest.approx(0.75, abs=1e-4)


def test_recipe_points_with_labels_and_guidance(recipe):
    smaller = [("range(1500)", "range(400)"), ("8, (512,)", "8, (128,)"), ("(512, 2)", "(128, 2)")]
    smaller += [("rand(512)", "rand(128)"), ("steps=50", "steps=10")]
    names = recipe("Points with labels, and guidance", smaller=smaller)
    nearest = torch.cdist(names["x0"], names["centers"]).argmin(1)
    assert (nearest == names["y"]).double().mean() > 0.95
    with torch.no_grad():
        xt = torch.randn(800, 2)
        t = torch.full((800,), 500)
        without = names["net"](xt, t, names["none"])
        with_label = names["net"](xt, t, names["y"])
        guided = names["guided"](xt, t)
    assert torch.allclose(guided, without + 1.5 * (with_label - without), atol=1e-5)
    assert not torch.allclose(without, with_label, atol=0.01)


@pytest.fixture
def points_model(recipe, tmp_path):
    """What "Load a model of points" leaves after a short training on three points."""
    (tmp_path / "far.csv").write_text("1000,5\n1002,5\n1001,6\n")
    argv = "--data far.csv --steps 20 --T 50 --batch-size 64 --samples 10 --out runs/ddpm_2d"
    ddpm_2d.main(argv.split())
    return recipe("Load a model of points", smaller=[("1000, 2", "200, 2")])


def test_recipe_load_a_model_of_points(points_model):
    points = points_model["points"]
    assert points.shape == (200, 2)
    assert points.mean(0).sub(torch.tensor([1001, 16 / 3])).abs().max() < 1
    net = torch.load("runs/ddpm_2d/model.pt", weights_only=True)["net"]
    assert all(torch.equal(points_model["net"].state_dict()[key], net[key]) for key in net)


def test_recipe_log_likelihood_of_a_point(recipe, points_model):
    """Of a Gaussian, and of the spirals by their exact score: right to 0.05 nats at each point."""
    names = recipe("Log-likelihood of a point", points_model)
    log_likelihood = names["log_likelihood"]
    diffusion = ddpm_2d.Diffusion(ddpm_2d.cosine_schedule(1000))
    gaussian = ddpm_2d.ToyData(torch.tensor([[0.5, -0.3]]), 0.4)
    spirals = torch.view_as_real(ddpm_2d.TOYS["spirals"]).float()
    for data in (gaussian, ddpm_2d.ToyData(spirals / spirals.std(), 0.08)):
        x = data.sample(50)

        def model(xt, t, data=data):
            return data.ideal_eps(diffusion, xt, t)

        error = log_likelihood(diffusion, model, x) - data.log_prob(x)
        assert error.abs().max() < 0.05, (data.sigma, error)
    standardised = log_likelihood(names["net"].diffusion, names["net"], names["x"])
    shift = names["saved"]["std"].log().sum()  # units of 0.8 and 0.5: denser by 1 / (0.8 * 0.5)
    assert torch.allclose(names["log_p"], standardised - shift) and shift < -0.5


def test_recipe_fifty_sevens_are_those_of_the_command(recipe):
    names = recipe("Load a checkpoint and draw fifty sevens", smaller=[("steps=50", "steps=5")])
    argv = "--load weights/ddpm_mnist.pt --label 7 --samples 50 --sample-steps 5 --device cpu"
    ddpm_mnist.main([*argv.split(), "--out", "out"])
    samples = np.load("out/samples.npy")
    assert np.array_equal(names["sevens"].permute(0, 2, 3, 1).numpy(), samples)


@pytest.fixture
def loaded(recipe):
    """What the recipe of the fifty sevens leaves."""
    return recipe("Load a checkpoint and draw fifty sevens", smaller=[("steps=50", "steps=1")])


def test_recipe_between_two_drawings(recipe, loaded):
    names = recipe("Between two drawings of a 3", loaded, [("steps=50", "steps=5")])
    xT = names["xT"]
    assert xT.shape == (10, 1, 28, 28)
    assert torch.equal(xT[0], names["start"]) and torch.allclose(xT[-1], names["end"], atol=1e-6)
    assert (xT.square().mean((1, 2, 3)) - 1).abs().max() < 6 * (2 / 784) ** 0.5
    model = ddpm_mnist.denoiser(names["net"], names["diffusion"], torch.full((1,), 3))
    for k in (0, 9):
        *_, alone = names["diffusion"].ddim_sample_loop(model, xT[k : k + 1], 5)
        assert torch.allclose(names["between"][k], alone[0], atol=1e-3)
    step = names["between"].diff(dim=0).square().mean((1, 2, 3))
    ends = (names["between"][0] - names["between"][-1]).square().mean()
    assert step.max() < ends  # neighbours are closer than the ends


def test_recipe_inpainting_the_other_half(recipe, loaded):
    names = recipe("Inpainting: the other half", loaded, [("steps=50", "steps=10")])
    given = names["given"]
    inpainted = names["inpainted"]
    assert torch.allclose(inpainted[..., :14], given[..., :14], atol=1e-5)
    rest = (inpainted - given)[..., 14:].square().mean((1, 2, 3))
    assert rest.min() > 0.01  # it was not handed over
    # nearer to the real right half than to those of the other digits: it goes on with the strokes
    pairs = (inpainted[:, None] - given)[..., 14:].square().mean((2, 3, 4))
    assert rest.mean() < 0.7 * pairs.mean()


def test_recipe_film_of_the_sampling(recipe, loaded):
    smaller = [("steps=50", "steps=4"), ("(100) // 10", "(20) // 2"), ("(100, 1", "(20, 1")]
    smaller += [("view(10, 10, 28", "view(2, 10, 28"), ("(280, 280)", "(56, 280)")]
    names = recipe("A film of the sampling", loaded, smaller)
    with Image.open("film.gif") as film:
        assert film.size == (280, 56)
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("L")).astype(float)
    digits = names["xt"][:, 0].clamp(-1, 1)
    assert np.abs(last[:28, 28:56] - (digits[1].numpy() + 1) * 127.5).max() < 2
    assert np.abs(last[28:, :28] - (digits[10].numpy() + 1) * 127.5).max() < 2


def test_recipe_folder_of_images_as_an_npz_file(recipe, tmp_path):
    for name, color, size in (("cat", "red", (50, 40)), ("dog", "blue", (32, 64))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", size, color).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("no picture")
    recipe("A folder of images as an .npz file")
    x, y, config = ddpm_mnist.load_images(Path("photos.npz"))
    assert config == {"shape": [3, 32, 32], "labels": [0, 1]}
    assert y.tolist() == [0, 0, 1, 1]
    assert x[0, :, 3, 5].tolist() == [255, 0, 0] and x[3, :, 3, 5].tolist() == [0, 0, 255]


def test_recipe_idx_files(recipe, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 4), np.uint8)
    head = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 8, 0, 0, 0, 4])
    with gzip.open("train-images-idx3-ubyte.gz", "wb") as file:
        file.write(head + images.tobytes())
    with gzip.open("train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 1, 0, 0, 0, 3, 9, 0, 9]))
    recipe("IDX files: Fashion-MNIST, KMNIST")
    x, y, config = ddpm_mnist.load_images(Path("fashion.npz"))
    assert np.array_equal(x[:, 0], images) and config["shape"] == [1, 8, 4]
    assert y.tolist() == [1, 0, 1] and config["labels"] == [0, 9]


def test_recipe_of_the_readme_trains_on_points(recipe):
    matplotlib.use("Agg")
    smaller = [("steps=1000", "steps=300"), ("batch_size=512", "batch_size=128")]
    names = recipe("Use it in your own code", smaller=smaller)
    off = names["data"].log_prob(names["x0"]) < -6  # true points: one in a thousand
    assert names["x0"].shape == (2000, 2) and off.double().mean() < 0.2
    assert len(names["pyplot"].gca().collections[0].get_offsets()) == 2000
    names["pyplot"].close("all")


def test_recipe_notebook_cell(recipe):
    matplotlib.use("Agg")
    smaller = [('"1000"', '"20", "--T", "30", "--samples", "50", "--batch-size", "32"')]
    names = recipe("A notebook cell", smaller=smaller)
    axes = names["plt"].gca()
    assert np.allclose(axes.collections[0].get_offsets(), np.stack([names["x"], names["y"]], 1))
    assert axes.get_title().startswith("loss ")
    names["plt"].close("all")


def test_recipe_train_in_bfloat16(recipe, monkeypatch):
    monkeypatch.setattr(ddpm_mnist, "UNet", ddpm_mnist.UNet)  # is put back after the test
    small = '"2", "--batch-size", "4", "--samples", "2", "--sample-steps", "2", "--device", "cpu"'
    names = recipe("Train in bfloat16", smaller=[('"4000"', small)])
    saved = torch.load("runs/bfloat16/model.pt", weights_only=True)
    assert saved["net"]["stem.weight"].dtype == torch.float32
    assert np.isfinite(saved["losses"]).all()
    kinds = []
    net = names["Bfloat16UNet"](ddpm_mnist.Diffusion(ddpm_mnist.cosine_schedule(10)))
    net.stem.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    eps = net(torch.randn(2, 1, 28, 28), torch.tensor([1, 10]))
    assert kinds == [torch.bfloat16] and eps.dtype == torch.float32
