"""Known bugs, put in one at a time: the tests must fail for each of them.

python tests/mutants.py              all of them, on all cores
python tests/mutants.py mnist EMA    those whose file, text or name contains all of these words
python tests/mutants.py --list       runs no tests: does each still apply?

Each is one edit of a script: file, old text, new text, and what goes wrong or where it was seen.
The edit is made in a copy, and the tests of that script run until one fails, the quickest first. A
bug is killed if a test failed, not if the script cannot be imported or the tests do not end. An
edit that survives shows that a property is not tested.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
D2 = "ddpm_2d.py"
ROLL = "ddpm_swissroll_2015.py"
MNIST = "ddpm_mnist.py"

MUTANTS = [
    # schedules
    (D2, "dtype=torch.float64) * 1000 / T", "dtype=torch.float64)", "tiny-diffusion: few steps with the betas of 1000 leave signal in x_T"),
    (MNIST, ".clamp(max=0.999)", "", "cosine schedule not clipped: alpha_bar_T is 0"),
    (MNIST, "torch.linspace(0, 1, T + 1, dtype=torch.float64)", "torch.linspace(0, 1, T + 1)", "cosine schedule in float32"),
    (D2, "beta = F.pad(beta, (1, 0))", "beta = F.pad(beta, (2, 0))", "beta padded twice"),
    (D2, "beta = F.pad(beta, (1, 0))", "beta = F.pad(beta, (0, 1))", "lucidrains #18: padded on the wrong side"),
    (D2, "beta = F.pad(beta, (1, 0))", "beta = F.pad(beta, (1, 0), value=1e-4)", "minDiffusion: beta_0 in the product"),
    # forward process
    (D2, "(1 - alpha_bar).sqrt().float()", "(1 - alpha_bar.float()).sqrt()", "1 - alpha_bar in float32"),
    (MNIST, "(1 - alpha_bar).sqrt().float()", "(1 - alpha_bar).float()", "hrbigelow: variance for deviation"),
    (MNIST, "(1 - alpha_bar).sqrt().float(), persistent=False)", "(1 - alpha_bar).sqrt().float())", "lucidrains #136: the schedule is a part of the weights"),
    (D2, "self.signal[t] * x0 + self.noise[t] * eps", "self.signal[t - 1] * x0 + self.noise[t - 1] * eps", "q_sample, t off by one"),
    (D2, "t = t.view(-1, *[1] * (x0.ndim - 1))", "t = t[:, None]", "coefficients of points lie along the rows of an image"),
    (MNIST, "t = t.view(-1, *[1] * (x0.ndim - 1))  # [B, 1, ...]\n        return self.signal[t] * x0", "t = t[:, None, None, None]\n        return self.signal[t] * x0", "coefficients of images on points: [B, 1, B, d]"),
    (MNIST, "self.signal[t] * eps - self.noise[t] * x0", "self.signal[t] * eps + self.noise[t] * x0", "v with a wrong sign"),
    # loss of points
    (D2, "torch.randint(1, self.T + 1,", "torch.randint(1, self.T,", "superminddpm, TeaPearce PR #4: T is never trained"),
    (D2, "torch.randint(1, self.T + 1, (len(x0),)", "torch.randint(1, self.T + 1, (1,)", "one t for the whole batch"),
    (D2, "eps = torch.randn_like(x0)", "eps = torch.rand_like(x0)", "acids-ircam: uniform noise"),
    (D2, "t)).square().flatten(1).mean(1)", "t)).square().flatten(1).sum(1)", "sum for mean over the coordinates"),
    (D2, "model(self.q_sample(x0, t, eps), t))", "model(self.q_sample(x0, t, torch.randn_like(eps)), t))", "lucidrains: x_t has other noise than the target"),
    # Algorithm 2
    (D2, "for t in range(self.T, 0, -1):", "for t in range(self.T - 1, 0, -1):", "sampling starts at T - 1"),
    (D2, "for t in range(self.T, 0, -1):", "for t in range(self.T, 1, -1):", "p100: last step missing"),
    (D2, "torch.full((len(xt),), t, device", "torch.full((len(xt),), t - 1, device", "network is told t - 1"),
    (D2, "xt = mean + beta_tilde**0.5 * z", "xt = mean + (beta_tilde or beta) ** 0.5 * torch.randn_like(xt)", "labml: noise in the last step"),
    (D2, "beta / (1 - alpha_bar) ** 0.5 * eps", "beta / (1 - alpha_bar) * eps", "Eq. (11), root missing"),
    (D2, "(1 - self.alpha_bar[t - 1]) / (1 - alpha_bar) * beta", "beta if t > 1 else 0", "beta for beta-tilde"),
    (D2, "mean + beta_tilde**0.5 * z", "mean + beta_tilde * z", "Algorithm 2, variance for deviation"),
    (D2, "torch.randn_like(xt) if t > 1", "torch.randn_like(xt[:1]) if t > 1", "all samples get the same noise"),
    (D2, "h + layer(F.silu(h))", "h + layer(h)", "layers without what is not linear"),
    (D2, "h + layer(F.silu(h))", "h.detach() + layer(F.silu(h))", "no gradient past the layers"),
    (D2, "xt + self.out(F.silu(h))", "xt + self.out(h)", "the last layer without SiLU"),
    (D2, "    @torch.no_grad()  # in here, not in the loop over its states\n", "", "the sampler keeps all gradients"),
    # DDIM
    (MNIST, "[round(self.T * k / steps) for", "[(self.T - 1) * k // steps for", "diffusers #2585: T is never visited"),
    (MNIST, "for k in range(steps, -1, -1)]", "for k in range(steps, 0, -1)]", "smalldiffusion: DDIM ends before x_0"),
    (MNIST, "a_t = self.alpha_bar[t]", "a_t = self.signal[t].item() ** 2", "DDIM in float32"),
    (MNIST, "max(0, 1 - a_s - sigma**2) ** 0.5 * eps", "(1 - a_s - sigma**2) ** 0.5 * eps", "rounding gives complex numbers at eta = 1 (seen here)"),
    (MNIST, "max(0, 1 - a_s - sigma**2) ** 0.5 * eps", "(1 - a_s) ** 0.5 * eps", "Eq. (12), variance of z not subtracted"),
    # bound
    (D2, "(1 - alpha_bar[1:-1]) / (1 - alpha_bar[2:]) * beta[2:]", "beta[2:]", "Eq. (12), beta for beta-tilde"),
    (D2, "steps = torch.full((len(x0),), t, device", "steps = torch.full((len(x0),), 1, device", "tqch #20: every term of the bound at one t"),
    (D2, "x0).normal_(generator=generator)", "x0).normal_()", "bounds of two models have other noise"),
    # network of points
    (D2, "t[:, None] * self.time_freq]", "0 * t[:, None] * self.time_freq]", "superminddpm: time ignored"),
    (D2, "angle.sin(), angle.cos()", "angle.cos(), angle.cos()", "features cannot tell x from -x"),
    (D2, "nn.ModuleList(nn.Linear(width, width) for _ in range(layers))", "nn.ModuleList([nn.Linear(width, width)] * layers)", "the layers are one layer"),
    (D2, "return xt + self.out", "return self.out", "network without x_t"),
    # toy sets, exact density
    (D2, "torch.cdist(x, self.centers)", "torch.cdist(x, self.centers.cpu())", "a CPU tensor in log_prob: crashed on every GPU (seen here)"),
    (D2, "return noise / var * (xt", "return 1 / noise * (xt", "ideal eps as if the data were the centers"),
    (D2, "polar(1 + 2 * u, 0.75", "polar(1 + u, 0.75", "swiss roll, radii"),
    # points of a file
    (D2, 'read_text("utf-8-sig")', 'read_text("utf-8")', "a byte order mark is no number"),
    (D2, "splitlines(), 1)", "splitlines())", "lines counted from 0"),
    (D2, 're.split("[,;\\t]", row)', 're.split("[,;\\t]+", row)', "an empty cell is skipped: a later column is read"),
    (D2, "not points and not point and all(", "not points and all(", "first row nan,inf taken for a header"),
    (D2, "not point and all(any(map(str.isalpha, cell)) for cell in cells)\n            if len(point) == 2 and", "all(any(map(str.isalpha, cell)) for cell in cells)\n            if not header and len(point) == 2 and", "first row 1E3,2E3 taken for a header"),
    (D2, "if len(point) == 2 and", "if len(point) >= 2 and", "three columns, or decimal commas, read as two"),
    (D2, "and all(abs(value) < np.inf for value in point)", "", "NaN in a text accepted"),
    (D2, "elif cells and not header", "elif not header", "a line of blanks is refused"),
    (D2, 'np.lib.format.open_memmap(path, mode="r")', "np.load(path, allow_pickle=True)", "a file of points may run code"),
    (D2, 'points.dtype.kind not in "iuf" or ', "", "an array of words or of complex numbers accepted"),
    (D2, "points.astype(np.float64)", "points.astype(np.float32)", "large numbers lose digits"),
    # training and judging points
    (D2, "data.sample(batch_size)", "data.sample(1024)", "--batch-size ignored"),
    (D2, "            if not loss.isfinite():", "            if False:", "training goes on after NaN"),
    (D2, "np.mean(losses[-100:])", "losses[-1]", "the loss of the last step alone on the bar"),
    (D2, 'metrics["loss"] / metrics["ideal_loss"] - 1', 'metrics["loss"] - metrics["ideal_loss"]', "excess loss is a difference"),
    (D2, '"bound_nats": terms.sum()}\n', '"bound_nats": terms.sum() / np.log(2)}\n', "bits for nats"),
    (D2, "data.ideal_eps, diffusion), x0)", "data.ideal_eps, diffusion), data.sample(512))", "best loss on other points"),
    (D2, "1 - (log_p >= rare).float().mean()", "(log_p < rare).float().mean()", "NaN counted as good (seen here)"),
    (D2, "x.item(), 4) if x.isfinite() else None", "x.item(), 4)", "NaN in metrics.json is no JSON"),
    (D2, "states[diffusion.T - t]", "states[t]", "process.png shows p the wrong way round"),
    (D2, "xlim=(-2.7, 2.7)", "xlim=(-1.7, 1.7)", "process.png cuts the roll"),
    (D2, "def main(argv=()):", "def main(argv=None):", "main() in a notebook reads the flags of the kernel"),
    (D2, '"--lr", type=float, default=5e-3', '"--lr", type=float, default=1e-3', "another default of --lr than the pages"),
    (D2, '"T": 21, "samples"', '"T": 2, "samples"', "imagen-pytorch #161: beta reaches 1"),
    (D2, "        if not least <= getattr(args, name) <= 1e9:", "        if getattr(args, name) < least:", "NaN accepted as a flag"),
    (D2, "points = TOYS[args.data] if sigma", "args.out.mkdir(parents=True, exist_ok=True)\n        points = TOYS[args.data] if sigma", "a folder is left by a mistyped --data"),
    (D2, "    torch.manual_seed(args.seed)\n", "    torch.manual_seed(0)\n", "--seed ignored"),
    (D2, "std = std / (1 - sigma**2) ** 0.5", "std = std * 1.0", "data not of unit variance"),
    (D2, ".masked_fill(points.amin(0) == points.amax(0), 1)", "", "a column of one value divides by zero"),
    (D2, "xT = torch.randn(args.samples, 2", "xT = torch.rand(args.samples, 2", "acids-ircam: sampling starts at uniform noise"),
    (D2, "min(args.samples, 4000), 2)", "args.samples, 2)", "all points of all states kept: memory grows"),
    (D2, "xt.cpu().double() * std + mean", "xt.cpu() * std.float() + mean.float()", "samples in float32: points near 1.75e9 quantised (seen here)"),
    (D2, "xt.cpu().double() * std + mean", "states[-1].double() * std + mean", "at most 4,000 samples are saved"),
    (D2, '"mean": mean, "std": std, ', "", "model.pt cannot give samples in the units of the file"),
    # guidance
    (MNIST, "torch.lerp(net(xt, t), v, guidance)", "torch.lerp(net(xt, t), v, guidance + 1)", "guidance off by one"),
    (MNIST, "v if guidance == 1 else torch.lerp", "torch.lerp", "two calls of the network where one is enough"),
    (MNIST, "v = net(xt, t, y)\n", "v = net(xt, t)\n", "samples without their labels"),
    (MNIST, "noise * v).clamp(-1, 1)", "noise * v)", "hojonathanho #5: x_0 not clipped"),
    (MNIST, "x0 = (signal * xt - noise * v)", "x0 = (xt - noise * (signal * v + noise * xt)) / signal", "v divided by signal, 5e-5 at T"),
    # U-Net
    (MNIST, "nn.GroupNorm(8, inputs)", "nn.BatchNorm2d(inputs)", "superminddpm, tea: batch norm over mixed noise levels"),
    (MNIST, "torch.full_like(t, self.classes) if y is None", "torch.zeros_like(t) if y is None", "no label is label 0"),
    (MNIST, "emb = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(y))", "emb = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1))) + self.label(y)", "SiLU before the label is added"),
    (MNIST, "self.up2(h + h3, emb)", "self.up2(h, emb)", "no skip connection at a quarter of the size"),
    (MNIST, "self.middle2(h + attended.mT.reshape(h.shape), emb)", "self.middle2(h, emb)", "no attention"),
    (MNIST, "h + attended.mT.reshape(h.shape)", "h3 + attended.mT.reshape(h.shape)", "middle2 gets the input of middle1"),
    # images of a file
    (MNIST, "if path == MNIST and not path.exists():", "if not path.exists():", "a mistyped --data downloads MNIST"),
    (MNIST, "download_url_to_file(URL, path, SHA256)", "download_url_to_file(URL, path)", "dffml #1042: download not checked"),
    (MNIST, "Path(__file__).resolve().parent", "Path()", "tiny-diffusion: data found only from the script's own folder"),
    (MNIST, "y = y[:, 0] if y.shape[1:] == (1,) else y", "y = y", "labels [n, 1] of Keras are refused"),
    (MNIST, "x.dtype == np.uint8 and x.ndim", "x.ndim", "lucidrains #20: images in [0, 1] accepted"),
    (MNIST, "labels, y = np.unique(y, return_inverse=True)", "labels = np.unique(y)", "labels by their value instead of their number (seen here)"),
    (MNIST, "labels.tolist()\n", "sorted(labels.tolist(), key=str)\n", "labels sorted otherwise than they are numbered"),
    (MNIST, "torch.from_numpy(x).permute(0, 3, 1, 2)", "torch.from_numpy(x).permute(0, 3, 2, 1)", "images lie on their side"),
    # training of images
    (MNIST, "1 - 1 / (1 + args.steps / 20)", "0.995", "improved-diffusion #59: average slower than a short run"),
    (MNIST, "net.parameters(), betas=(0.9, 0.99))", "net.parameters())", "Adam remembers ten times as long"),
    (MNIST, "1 - 1 / (1 + args.steps / 20)", "min(0.995, 1 - 1 / (1 + args.steps / 20))", "average with a limit to its memory"),
    (MNIST, "        average.n_averaged += len(losses)", "        average.n_averaged += 0", "average starts again with --resume"),
    (MNIST, '"ema": average.module, "optimizer": optimizer}', '"ema": average.module}', "optimiser not in the checkpoint"),
    (MNIST, "nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net", "net", "gradients of the processes not averaged"),
    (MNIST, "initial=len(losses), disable=RANK > 0)", "initial=len(losses))", "every process shows a bar"),
    (MNIST, "(args.seed * WORLD + RANK) * 10**7", "(args.seed * WORLD) * 10**7", "every process has the same data and noise"),
    (MNIST, "(args.seed * WORLD + RANK) * 10**7", "(args.seed + RANK) * 10**7", "process 1 of --seed 0 is process 0 of --seed 1"),
    (MNIST, "* 10**7 + step)", "* 10**7)", "the same batch in every step"),
    (MNIST, "/ 127.5 - 1  # [B, C, H, W]", "/ 255  # [B, C, H, W]", "tea, labml: pixels in [0, 1]"),
    (MNIST, "/ 127.5 - 1  # [B, C, H, W]", "/ 255 - 0.5  # [B, C, H, W]", "superminddpm: pixels in [-0.5, 0.5]"),
    (MNIST, "torch.rand(len(pick)) < 0.1", "torch.rand(len(pick)) < 0.0", "label never hidden"),
    (MNIST, "- torch.rand(1))", "- torch.rand(len(x0)))", "t not evenly spread"),
    (MNIST, "u.sqrt()).ceil()", "u.sqrt()).floor()", "t = 0 trained, T never"),
    (MNIST, "F.mse_loss(v, diffusion.velocity(x0, t, eps))", "F.mse_loss(v, eps)", "eps as the target of v"),
    (MNIST, " * (1 - step / args.steps)", "", "learning rate does not fall"),
    (MNIST, "            optimizer.zero_grad()\n", "", "gradients of images pile up"),
    (MNIST, "if not (loss + norm).isfinite():", "if not loss.isfinite():", "NaN of the gradient saved while the loss is finite (seen here)"),
    (MNIST, "            optimizer.step()\n            average.update_parameters(net)\n", "            average.update_parameters(net)\n            optimizer.step()\n", "smalldiffusion: average before the step"),
    (MNIST, "np.mean(losses[-100:])", "losses[-1]", "the loss of the last step alone on the bar"),
    (MNIST, "(len(losses) % 100 == 0 or len(losses) == args.steps)", "len(losses) % 100 == 0", "the last steps are not saved"),
    (MNIST, "if RANK == 0 and (len(losses)", "if (len(losses)", "every process writes the checkpoint"),
    (MNIST, 'file = args.out / "model.part"', 'file = args.out / "model.pt"', "written in place: a kill loses it"),
    (MNIST, "                    if len(losses) == args.steps:\n", "                    if True:\n", "a failed save ends the run (seen here)"),
    (MNIST, "except (OSError, RuntimeError) as error:  # a full", "except OSError as error:  # a full", "a full disk ends the run: torch raises RuntimeError (seen here)"),
    (MNIST, "                        file.unlink(missing_ok=True)\n", "", "model.part left on a full disk (seen here)"),
    (MNIST, "return average.module.state_dict()", "return net.state_dict()", "average not used"),
    # images drawn, main
    (MNIST, ".split(args.batch_size), \"sample\")", ".split(10**9), \"sample\")", "all samples at once: memory"),
    (MNIST, "denoiser(net, diffusion, label, args.guidance)", "denoiser(net, diffusion, label)", "--guidance ignored"),
    (MNIST, "((xt.clamp(-1, 1) + 1) * 127.5).round()", "(xt.clamp(0, 1) * 255).round()", "guided-diffusion #61: [-1, 1] saved as [0, 1]"),
    (MNIST, 'np.save(args.out / "labels.npy", np.array(labels)[y])', 'np.save(args.out / "labels.npy", y)', "labels.npy holds the numbers"),
    (MNIST, 'add("--samples",', 'add("--n", dest="samples",', "a flag that is the beginning of one of torchrun's (seen here)"),
    (MNIST, "current_accelerator(check_available=True)", "current_accelerator()", "CUDA wheel on a machine without a GPU"),
    (MNIST, 'os.environ["LOCAL_RANK"]', 'os.environ.get("RANK", 0)', "GPU by the number among all machines"),
    (MNIST, 'torch.load(args.load, map_location="cpu")', "torch.load(args.load)", "weights of a GPU do not load without one"),
    (MNIST, 'torch.load(args.load, map_location="cpu")', 'torch.load(args.load, map_location="cpu", weights_only=False)', "a checkpoint may run code"),
    (MNIST, 'weights = saved["ema"]', 'weights = saved["net"]', "--load draws with the weights of the last step"),
    (MNIST, "width=args.width, processes=WORLD", "width=32, processes=WORLD", "width not in config"),
    (MNIST, "        args.out.mkdir(parents=True, exist_ok=True)\n", "", "TeaPearce: the folder for the results is not made"),
    (MNIST, "                if changed or ", "                if ", "--resume accepts other flags and data"),
    # the roll of 2015, its ceiling
    (ROLL, "mean = torch.tensor([2, 2 / (3 * math.pi)])", "mean = torch.zeros(2)", "roll not centred"),
    (ROLL, "(spiral - mean) / (square - mean**2).sqrt()", "(spiral - mean) / 10", "p100: divided by 10, second moment not 1"),
    (ROLL, "(torch.arange(n) + torch.rand(n)) / n", "torch.arange(n) / n", "the same points in every batch"),
    # q and K
    (ROLL, "self.var = -log_alpha_bar.expm1()", "self.var = 1 - log_alpha_bar.exp()", "1 - alpha_bar rounded"),
    (ROLL, "+ self.var[t].sqrt() * eps", "+ self.var[t] * eps", "variance for deviation"),
    (ROLL, "from_x0 = self.alpha_bar[t - 1].sqrt()", "from_x0 = self.alpha_bar[t].sqrt()", "posterior, off by one"),
    (ROLL, "self.beta[t] * self.var[t - 1] / self.var[t]\n", "self.beta[t]\n", "beta for beta-tilde"),
    (ROLL, "requires_grad=learn_schedule", "requires_grad=True", "fixed schedule is learned"),
    (ROLL, "(db - slope * da) ** 2", "(db + slope * da) ** 2", "KL, slope the wrong way"),
    (ROLL, " + slope**2 * var_q[..., 0]", "", "KL, variance that the slope adds"),
    (ROLL, "t = torch.arange(2, self.T + 1, d", "t = torch.arange(2, self.T, d", "last KL term missing"),
    (ROLL, "torch.log2(s.var[-1] / s.var[1])", "torch.log2(s.var[1] / s.var[-1])", "entropies, sign"),
    (ROLL, "x0 + self.var[t].sqrt() * eps", "x0 + self.var[t].sqrt().detach() * eps", "K has not all of its gradient in beta"),
    # p
    (ROLL, "@ self.readout[t]", "@ self.readout[0 * t + 2]", "one readout for all steps"),
    (ROLL, "out[..., 2:4] +", "out[..., 1:3] +", "a column moves mean and variance"),
    (ROLL, "scale = s.var[t].sqrt() if self.full else 1", "scale = 1", "output for x_0 not scaled"),
    (ROLL, "out[..., 2:4] + s.beta[t].logit()", "out[..., 2:4]", "variance is no perturbation of beta"),
    (ROLL, "for t in range(self.T, 0, -1):", "for t in range(self.T, 1, -1):", "p100: the step from x_1 to x_0 missing"),
    (ROLL, "noise = var.sqrt() * torch.randn_like(xt)", "noise = var * torch.randn_like(xt)", "hrbigelow: variance for deviation in the sampler"),
    (ROLL, "noise[:, 1] += slope * noise[:, 0]", "noise[:, 1] -= slope * noise[:, 0]", "sampler, slope the wrong way"),
    (ROLL, "torch.softmax(-square /", "torch.exp(-square /", "RBF not normalised"),
    (ROLL, "silu, nn.Linear(128, 128), silu, nn.Linear(128, 128), silu]", "nn.Linear(128, 128), nn.Linear(128, 128)]", "--net mlp is linear"),
    (ROLL, "nn.Buffer(torch.randn(2, 32))", "nn.Buffer(torch.randn(2, 32), persistent=False)", "frequencies not saved"),
    # training and judging the roll
    (ROLL, "maximize=True", "maximize=False", "K is minimised"),
    (ROLL, "pct_start=0.15", "pct_start=0.1", "--steps 10 divides by zero"),
    (ROLL, "            if not K.isfinite():", "            if False:", "training goes on after NaN"),
    (ROLL, "make_swiss_roll(batch_size, noise).to", "make_swiss_roll(256, noise).to", "--batch-size ignored"),
    (ROLL, "OneCycleLR(optimizer, lr,", "OneCycleLR(optimizer, 0.04,", "--lr ignored"),
    (ROLL, "history.append(K.item() - L_NULL)", "history.append(K.item())", "history less L_null"),
    (ROLL, "np.mean(history[-100:])", "history[-1]", "K of the last step alone on the bar"),
    (ROLL, "noise**2 + 2 * model.beta1", "noise**2", "off_curve without beta_1: half of a perfect model is off (seen here)"),
    (ROLL, "noise**2 + 2 * model.beta1", "2 * model.beta1", "off_curve without noise"),
    (ROLL, "*states[t][:5000].numpy().T", "*states[model.T - t][:5000].numpy().T", "p the wrong way round"),
    (ROLL, "*(mean - near).numpy().T", "*mean.numpy().T", "arrows of the mean, not of the drift"),
    (ROLL, "has 6.45 bits", "has 6.54 bits", "the number of the paper"),
    (ROLL, "model.cpu().requires_grad_(False)", "model.requires_grad_(False)", "states stay on the GPU: the picture fails there"),
    (ROLL, "if t in (args.T, args.T // 2, 0)}", "}", "all states kept: memory"),
]  # fmt: skip


def fault(file, old, new, name):
    """Why this edit cannot be made; None if it can."""
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        return f"the old text is there {text.count(old)} times"
    try:
        compile(text.replace(old, new), file, "exec")
    except SyntaxError as error:
        return f"the new text does not compile: {error}"


def run_pytest(tests, *flags, edit=(D2, "", "", "")):
    """What the tests say to an edit of a script, made in a copy of the project."""
    file, old, new, _ = edit
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in (D2, ROLL, MNIST, "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "tests", copy / "tests")
        for name in ("data", "weights"):
            (copy / name).symlink_to(ROOT / name)
        (copy / file).write_text((ROOT / file).read_text().replace(old, new))
        env = os.environ | {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick"}
        settings = {"cwd": copy, "env": env, "capture_output": True, "timeout": 300}
        for stop in (["-x"], []):  # [] if it stopped at a fixture, which is no test
            command = [sys.executable, "-m", "pytest", "-q", "--tb=no", *stop, *flags, *tests]
            try:
                done = subprocess.run(command, **settings)
            except subprocess.TimeoutExpired:
                return "timed out"
            if done.returncode == 0:
                return "survived"
            if done.returncode == 1 and re.search(rb"^FAILED ", done.stdout, re.MULTILINE):
                return "killed"
    return f"no test failed, exit code {done.returncode}"


def quickest_first(script):
    """The names of all tests of a script by the time they take. They must pass."""
    tests = [f"tests/test_{script}"] + ["tests/test_diffusion.py"] * (script != ROLL)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "times.xml")
        result = run_pytest(tests, f"--junitxml={report}")
        if result != "survived":
            raise SystemExit(f"{script}, not edited: {result}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    cases.sort(key=lambda case: float(case.get("time")))
    return [f"{x.get('classname').replace('.', '/')}.py::{x.get('name')}" for x in cases]


def main(argv=None):
    """Run the chosen mutants; exit code 1 if not all are killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants with all of these")
    parser.add_argument("--list", action="store_true", help="list them and run no tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    args = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if all(word in " ".join(mutant) for word in args.words)]
    faults = {mutant: fault(*mutant) for mutant in chosen}
    for mutant in chosen:
        if args.list or faults[mutant]:
            print(f"{mutant[0]}: {mutant[3]}: {faults[mutant] or 'applies'}")
    if args.list or any(faults.values()):
        return int(any(faults.values()))
    scripts = sorted({mutant[0] for mutant in chosen})
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        orders = dict(zip(scripts, pool.map(quickest_first, scripts)))
        runs = {pool.submit(run_pytest, orders[edit[0]], edit=edit): edit for edit in chosen}
        for run in tqdm(as_completed(runs), "mutants", len(runs)):
            file, old, new, name = runs[run]
            results.append(run.result())
            if results[-1] != "killed":
                tqdm.write(f"{results[-1]}: {file}: {name}: {old!r} -> {new!r}")
    print(", ".join(f"{results.count(kind)} {kind}" for kind in sorted(set(results))))
    return int(set(results) != {"killed"})


if __name__ == "__main__":
    sys.exit(main())
