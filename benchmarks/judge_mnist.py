"""Judge the digits of a run of ddpm_mnist.py by a classifier, and its model by bits per dimension.

python ddpm_mnist.py --samples 1000 --out runs/mine
python benchmarks/judge_mnist.py runs/mine              recognised as asked, Frechet ratio
python benchmarks/judge_mnist.py runs/mine --bits 64    bits per dimension besides

The classifier is trained once, on real digits, and kept. Copies of training digits please it too.
"""

import argparse
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ddpm_mnist import Diffusion, UNet, cosine_schedule, denoiser  # noqa: E402

RECOGNISED = """recognised as asked: {recognised:.1%} +- {recognised_error:.1%}
    is the share in which the classifier sees the digit that was asked for (of the real
    test digits: {recognised_real:.2%})."""
FRECHET = """Frechet ratio: {frechet_ratio:.2f}
    is how far the samples are from the test set, by the classifier's features, compared with as
    many random training digits. Less is better; 1,000 of these, classes even, have 0.7 to 1."""
NO_FRECHET = """Frechet ratio: none
    Fewer than 1,000 samples look too good; more than 60,000 cannot be compared."""
BITS = """bits per dimension: {bits:.3f} +- {bits_error:.3f}
    are enough to store a pixel of unseen digits, with their labels, without loss (a byte is 8,
    zipped MNIST 1.67). Less is better; the decoder alone takes 0.40 at T = 1000."""


class Classifier(nn.Module):
    """28 x 28 pixels in [-1, 1] -> 128 features -> 10 logits."""

    def __init__(self):
        super().__init__()
        layers = []
        for i, o, pool in ((1, 32, 0), (32, 32, 1), (32, 64, 0), (64, 64, 1), (64, 128, 1)):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * pool
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 128), nn.ReLU())
        self.last = nn.Linear(128, 10)

    def forward(self, x):
        return self.last(self.features(x))


def load(path):
    """What is in a model.pt, its diffusion and its network."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    config = saved["config"]
    net = UNet(config["shape"][0], len(config["labels"]), config["width"])
    net.load_state_dict(saved["ema"])
    return saved, Diffusion(cosine_schedule(1000)), net


def to_input(images):
    """uint8 [n, 28, 28] as float32 [n, 1, 28, 28] in [-1, 1]."""
    return torch.as_tensor(images)[:, None].float() / 127.5 - 1


def augment(x):
    """Random rotation (12 degrees), scale (10 %), shear and shift (2 pixels) of every image."""
    n = len(x)
    angle, shear = torch.rand(2, n).mul(2).sub(1).mul(math.radians(12))
    scale = 1 + 0.1 * (torch.rand(n) * 2 - 1)
    shift = (torch.rand(2, n) * 2 - 1) * 2 / 14
    rows = [scale * angle.cos(), shear - angle.sin(), shift[0]]
    rows += [angle.sin(), scale * angle.cos(), shift[1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train(model, x, y, epochs=6, batch=128):
    """AdamW with one cycle of the learning rate. x uint8 [n, 28, 28], y [n]."""
    used = len(x) // batch * batch  # images in an epoch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, epochs * used // batch)
    model.train()
    for epoch in range(epochs):
        for pick in tqdm(torch.randperm(len(x))[:used].split(batch), f"epoch {epoch + 1}"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(augment(to_input(x[pick])))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), y[pick], label_smoothing=0.05).backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.no_grad()
def predict(model, images):
    """Features [n, 128] and first choices [n] of uint8 images; no choice (-1) among NaNs."""
    parts = [model.features(to_input(part)) for part in torch.as_tensor(images).split(500)]
    features = torch.cat(parts)
    logits = model.last(features)
    guess = logits.argmax(1).masked_fill(~logits.isfinite().all(1), -1)
    return features.double(), guess


def make_classifier(path, x_train, y_train, x_test, y_test):
    """Train the classifier; keep it with the features of all real digits."""
    print(f"training the classifier, once: a few minutes on two cores; kept in {path}")
    torch.manual_seed(0)
    model = train(Classifier(), x_train, y_train)
    train_features, _ = predict(model, x_train)
    test_features, guess = predict(model, x_test)
    saved = {"classifier": model.state_dict(), "data": zlib.crc32(x_train.numpy())}
    saved |= {"train": train_features.float(), "labels": y_train, "test": test_features.float()}
    saved["accuracy"] = (guess == y_test).double().mean().item()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return saved


def frechet(a, b):
    """Squared Frechet distance of the Gaussians fitted to the rows of a and of b, each [n, d]."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return torch.tensor(math.nan, dtype=a.dtype)
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    # tr sqrt(A B) = sum of sqrt of the eigenvalues of A^(1/2) B A^(1/2), a symmetric matrix
    value, vector = torch.linalg.eigh(cov_a)
    root = vector * value.clamp(min=0).sqrt() @ vector.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def judge(model, samples, labels, saved):
    """Share recognised as asked with its standard error; Frechet ratio from 1,000 samples on."""
    n = len(samples)
    features, guess = predict(model, samples)
    share = (guess == labels).double().mean().item()
    row = {"samples": n, "recognised": share, "recognised_error": (share * (1 - share) / n) ** 0.5}
    if 1000 <= n <= len(saved["train"]):
        test = saved["test"].double()
        generator = torch.Generator().manual_seed(0)
        real = 0  # the mean distance of n training digits
        for _ in range(5):
            pick = torch.randperm(len(saved["train"]), generator=generator)[:n]
            real += frechet(saved["train"][pick].double(), test) / 5
        row["frechet_ratio"] = (frechet(features, test) / real).item()
    return row


def decoder_nll(x0, mean, sigma):
    """-log p(x_0 | x_1) of each pixel in nats, one of 256 values: Eq. (13). float64, on the CPU."""
    low = torch.where(x0 < -0.999, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
    high = torch.where(x0 > 0.999, torch.inf, (x0 + 1 / 255 - mean) / sigma)
    above = x0 > mean  # then the mass between -high and -low, the same, has more digits
    log_low = torch.special.log_ndtr(torch.where(above, -high, low))
    log_high = torch.special.log_ndtr(torch.where(above, -low, high))
    return -log_high - torch.log(-torch.expm1(log_low - log_high))


@torch.no_grad()
def variational_bound(diffusion, model, x0, generator=None):
    """L_0, ..., L_T of Eq. (5) for every image, float64 [B, T + 1] in nats, sigma^2 = beta-tilde.
    The schedule and the sums are in double precision on the CPU, the model where x0 is."""
    a = diffusion.alpha_bar  # Python floats
    exact = x0.cpu().double()  # in this order: some devices have no float64
    bound = torch.zeros(len(x0), diffusion.T + 1, dtype=torch.float64)
    prior = (a[-1] * exact**2 - a[-1] - math.log1p(-a[-1])) / 2
    bound[:, -1] = prior.flatten(1).sum(1)  # L_T: KL(q(x_T | x_0) || N(0, I))
    for t in tqdm(range(diffusion.T, 0, -1), f"bits of {len(x0)} images"):
        times = torch.full((len(x0),), t, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        xt = diffusion.q_sample(x0, times, eps)
        eps_theta = model(xt, times)
        if t > 1:
            alpha = a[t] / a[t - 1]
            weight = (1 - alpha) / (2 * alpha * (1 - a[t - 1]))  # Eq. (12), sigma^2 = beta-tilde
            error = (eps - eps_theta).cpu().double().square()
            bound[:, t - 1] = weight * error.flatten(1).sum(1)
    x1 = xt.cpu().double()
    mean = (x1 - (1 - a[1]) ** 0.5 * eps_theta.cpu().double()) / a[1] ** 0.5  # Eq. (11)
    beta_tilde = (1 - a[1]) / (1 - a[2]) * (1 - a[2] / a[1])  # at t = 2: it is 0 at t = 1
    bound[:, 0] = decoder_nll(exact, mean, beta_tilde**0.5).flatten(1).sum(1)
    return bound


def bits_per_dimension(diffusion, net, x, y, n):
    """Bound of -log2 p(x, y) over the pixels, for n random images uint8 [N, 28, 28], labels y."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    net.to(device)
    diffusion.to(device)
    generator = torch.Generator().manual_seed(0)  # the same images and noise for every model
    nats = []
    for pick in torch.randperm(len(x), generator=generator)[:n].split(128):
        model = denoiser(net, diffusion, y[pick].to(device))
        x0 = to_input(x[pick]).to(device)
        nats.append(variational_bound(diffusion, model, x0, generator).sum(1))
    bits = (torch.cat(nats) + math.log(net.classes)) / math.log(2) / x[0].numel()
    return {"bits": bits.mean().item(), "bits_error": bits.std().item() / n**0.5}


def check(images, labels):
    """As tensors [n, 28, 28] and [n]: uint8 images [n, 28, 28, 1], integers 0 to 9. ValueError."""
    n = len(images)
    if images.dtype != np.uint8 or images.shape != (n, 28, 28, 1) or n == 0:
        raise ValueError(f"{images.dtype} {list(images.shape)} is not uint8 [n, 28, 28, 1]")
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise ValueError(f"labels {labels.dtype} {list(labels.shape)} are not {n} integers")
    if not 0 <= labels.min() <= labels.max() <= 9:
        raise ValueError(
            f"labels {labels.min()} to {labels.max()}, but the classifier knows 0 to 9"
        )
    return torch.from_numpy(images[..., 0]), torch.from_numpy(labels.astype(np.int64))


def read_data(path):
    """Images and labels to train on, and those to test on, of an .npz file like MNIST's."""
    with np.load(path) as arrays:
        train_set = check(arrays["x_train"][..., None], arrays["y_train"])
        test_set = check(arrays["x_test"][..., None], arrays["y_test"])
    return *train_set, *test_set


def read_model(path):
    """Diffusion and network of a model.pt."""
    saved, diffusion, net = load(path)
    config = saved["config"]
    if config["shape"] != [1, 28, 28] or config["labels"] != list(range(10)):
        raise ValueError(f"{config['shape']} with labels {config['labels']} is no model of MNIST")
    return diffusion, net


def report(row):
    """Print the numbers of one run, with a sentence on each."""
    print("\n{run}, {samples:,} samples".format(**row))
    print(RECOGNISED.format(**row))
    print(FRECHET.format(**row) if "frechet_ratio" in row else NO_FRECHET)
    if "bits" in row:
        print(BITS.format(**row))


def main(argv=None):
    """Judge the runs. Returns a list of one {name: number} each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folder of samples.npy, labels.npy")
    add("--bits", type=int, default=0, metavar="N", help="of model.pt, on N test images")
    add("--data", type=Path, default=ROOT / "data" / "mnist.npz", help="real digits")
    add("--classifier", type=Path, default=ROOT / "runs" / "judge_mnist.pt", help="is kept here")
    args = parser.parse_args(argv)
    samples = []
    models = []
    saved = None
    try:
        file = args.data
        data = read_data(file)
        for run in args.runs:
            file = run / "samples.npy"
            images = np.load(file)
            file = run / "labels.npy"
            labels = np.load(file)
            file = run
            samples.append(check(images, labels))
        for file in [run / "model.pt" for run in args.runs if args.bits]:
            models.append(read_model(file))
        file = args.classifier
        if file.exists():
            saved = torch.load(file, weights_only=True)
            if saved["data"] != zlib.crc32(data[0].numpy()):
                raise ValueError("was trained on other --data; name another file by --classifier")
    except Exception as error:  # a damaged file can raise nearly anything
        parser.error(f"{file}: {error!r:.400}")
    if args.bits and not 2 <= args.bits <= len(data[2]):
        parser.error(f"--bits must be 0 or 2 to {len(data[2])}")

    saved = saved or make_classifier(args.classifier, *data)
    classifier = Classifier().eval()
    classifier.load_state_dict(saved["classifier"])
    rows = []
    for i, run in enumerate(args.runs):
        row = judge(classifier, *samples[i], saved)
        if args.bits:
            row |= bits_per_dimension(*models[i], *data[2:], args.bits)
        row |= {"run": str(run), "recognised_real": saved["accuracy"]}
        report(row)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
