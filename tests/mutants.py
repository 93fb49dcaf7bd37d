"""Known bugs, put in one at a time: the tests must fail for each of them.

python tests/mutants.py              all of them, on all cores
python tests/mutants.py mnist EMA    those whose file, text or name contains all of these words

Each is one edit of a script: file, old text, new text, and what it is or where it was seen. The
edit is made in a copy, and the tests of that script run until one fails, the quickest first. An
edit that survives shows that a property is not tested; one whose old text is gone or not unique is
an error as well.
"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
D2 = "ddpm_2d.py"
ROLL = "ddpm_swissroll_2015.py"
MNIST = "ddpm_mnist.py"

MUTANTS = [
    # schedules
    (D2, "* 1000 / T, (1, 0)", ", (1, 0)", "tiny-diffusion: few steps with the betas of 1000 leave signal"),
    (D2, "torch.linspace(1e-4, 0.02, T", "torch.linspace(1e-4, 0.01, T", "linear schedule, wrong end"),
    (D2, "(u + 0.008) / 1.008", "u", "cosine schedule without its offset"),
    (D2, "* torch.pi / 2) ** 2  # alpha_bar", "* torch.pi / 2)  # alpha_bar", "cosine schedule, square missing"),
    (MNIST, ".clamp(max=0.999)", "", "cosine schedule not clipped"),
    (D2, "torch.linspace(0, 1, T + 1, dtype=torch.float64)", "torch.linspace(0, 1, T + 1)", "cosine schedule in float32"),
    (D2, "(max=0.999), (1, 0))", "(max=0.999), (0, 1))", "lucidrains #18: padded on the wrong side"),
    (D2, "* 1000 / T, (1, 0))", "* 1000 / T, (1, 0), value=1e-4)", "minDiffusion: beta_0 in the product"),
    # forward process, loss
    (D2, "(1 - alpha_bar).sqrt().float()", "(1 - alpha_bar.float()).sqrt()", "difference in float32"),
    (D2, "self.signal = nn.Buffer(alpha_bar.sqrt()", "self.signal = nn.Buffer(alpha_bar", "alpha_bar for its root"),
    (MNIST, "(1 - alpha_bar).sqrt().float()", "(1 - alpha_bar).float()", "hrbigelow: variance for deviation"),
    (D2, "self.signal[t] * x0 + self.noise[t] * eps", "self.signal[t] * x0 - self.noise[t] * eps", "q_sample, sign"),
    (D2, "self.signal[t] * x0 + self.noise[t] * eps", "self.signal[t - 1] * x0 + self.noise[t - 1] * eps", "q_sample, t off by one"),
    (D2, "torch.randint(1, self.T + 1,", "torch.randint(1, self.T,", "superminddpm, TeaPearce PR #4: T is never trained"),
    (MNIST, "torch.randint(1, self.T + 1,", "torch.randint(0, self.T,", "t from 0"),
    (D2, "torch.randint(1, self.T + 1, (len(x0),)", "torch.randint(1, self.T + 1, (1,)", "one t for the whole batch"),
    (D2, "eps = torch.randn_like(x0)", "eps = torch.rand_like(x0)", "acids-ircam: uniform noise"),
    (D2, "(eps - model(self.q_sample", "(x0 - model(self.q_sample", "wrong target"),
    (D2, "t)).square().flatten(1).mean(1)", "t)).abs().flatten(1).mean(1)", "absolute error"),
    (MNIST, "t)).square().flatten(1).mean(1)", "t)).square().flatten(1).sum(1)", "sum for mean"),
    (D2, "model(self.q_sample(x0, t, eps), t))", "model(self.q_sample(x0, t, torch.randn_like(eps)), t))", "lucidrains: x_t has other noise than the target"),
    (D2, "eps = torch.randn_like(x0) if eps is None else eps", "eps = torch.randn_like(x0)", "given noise ignored: the bound cannot be compared"),
    # Algorithm 2
    (D2, "for t in range(self.T, 0, -1):\n            eps", "for t in range(self.T - 1, 0, -1):\n            eps", "sampling starts at T - 1"),
    (D2, "for t in range(self.T, 0, -1):\n            eps", "for t in range(self.T, 1, -1):\n            eps", "p100: last step missing"),
    (D2, "mean + beta_tilde**0.5 * z)", "mean + beta_tilde**0.5 * z + (t == 1) * beta**0.5 * torch.randn_like(xt))", "labml: noise in the last step"),
    (D2, "beta / (1 - alpha_bar) ** 0.5 * eps", "beta / (1 - alpha_bar) * eps", "Eq. (11), root missing"),
    (D2, "* eps) / (1 - beta) ** 0.5  # Eq. (11)", "* eps) / (1 - beta)  # Eq. (11)", "Eq. (11), alpha for its root"),
    (D2, "(xt - beta / (1 - alpha_bar)", "(xt + beta / (1 - alpha_bar)", "Eq. (11), sign"),
    (D2, "(1 - self.alpha_bar[t - 1]) / (1 - alpha_bar) * beta", "beta", "beta for beta-tilde"),
    (D2, "mean + beta_tilde**0.5 * z", "mean + beta_tilde * z", "variance for deviation"),
    (D2, "normal_(generator=generator) if t > 1", "normal_() if t > 1", "generator ignored by Algorithm 2"),
    (D2, '"""Algorithm 2: yields x_T, ..., x_0, T + 1 states in all. sigma_t^2 is beta-tilde_t."""\n        yield (xt := xT)\n', '"""Algorithm 2."""\n        xt = xT\n', "x_T is not yielded"),
    # DDIM
    (D2, "if not (1 <= steps <= self.T and 0 <= eta <= 1)", "if not (1 <= steps and 0 <= eta <= 1)", "DDIM with more steps than T"),
    (D2, "and 0 <= eta <= 1)", "and 0 <= eta)", "eta above 1 gives NaN"),
    (D2, "[round(self.T * k / steps) for", "[(self.T - 1) * k // steps for", "diffusers #2585: T is never visited"),
    (D2, "for k in range(steps, -1, -1)]", "for k in range(steps, 0, -1)]", "DDIM ends before x_0"),
    (D2, "(xt - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "(xt - (1 - a_t) * eps) / a_t**0.5", "DDIM, root missing"),
    (D2, "((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5", "((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))", "Eq. (16), root missing"),
    (D2, "((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5", "(1 - a_t / a_s) ** 0.5", "Eq. (16), beta for beta-tilde"),
    (MNIST, "(1 - a_s - sigma**2) ** 0.5 * eps", "(1 - a_s) ** 0.5 * eps", "DDIM, variance of z not subtracted"),
    (MNIST, "yield (xt := a_s**0.5 * x0", "yield (xt := a_t**0.5 * x0", "DDIM, wrong time"),
    (MNIST, "z = torch.empty_like(xt).normal_(generator=generator)", "z = torch.empty_like(xt).normal_()", "generator ignored by DDIM"),
    (D2, "a_t = self.alpha_bar[t]\n            a_s = self.alpha_bar[s]", "a_t = self.signal[t] ** 2\n            a_s = self.signal[s] ** 2", "samples in float32: NaN at eta = 1"),
    (MNIST, "(len(xt),), t, device=xt.device)", "(len(xt),), t - 1, device=xt.device)", "network is told t - 1"),
    # bound
    (D2, "error[t] = d * self", "error[t] = self", "mean for sum over the coordinates"),
    (D2, "(1 - alpha_bar[1:-1]))  # Eq. (12)", "(1 - alpha_bar[2:]))  # Eq. (12)", "Eq. (12), beta for beta-tilde"),
    (D2, "(2 * (1 - beta[2:]) * (1", "(2 * (1", "Eq. (12), alpha missing"),
    (D2, "terms[1:-1] = weight * error[2:]", "terms[1:-1] = weight * error[1:-1]", "terms shifted by one"),
    (D2, "(2 * torch.pi * beta[1]).log()", "(torch.pi * beta[1]).log()", "L_0, constant"),
    (D2, "error[1] / (1 - beta[1])", "error[1] / beta[1]", "L_0, scale"),
    (D2, "+ torch.log1p(-end))) / 2", "+ torch.log1p(-end)))", "L_T doubled"),
    # network of points
    (D2, "nn.Buffer(1000 / diffusion.T * 10_000", "nn.Buffer(10_000", "embedding depends on T"),
    (D2, "10_000 ** (-torch.arange(16) / 16)", "10_000 ** (torch.arange(16) / 16)", "embedding, sign of the exponent: frequencies alias"),
    (D2, "t[:, None] * self.time_freq], 1)", "0 * t[:, None] * self.time_freq], 1)", "superminddpm: time ignored"),
    (D2, "h = h + layer(", "h = layer(", "no residual"),
    (D2, "        nn.init.zeros_(self.out.weight)\n", "", "output not zero at the start"),
    (D2, "return self.diffusion.q_sample(v, t, eps=xt)", "return v", "v given as eps"),
    (D2, "return self.diffusion.q_sample(v, t, eps=xt)", "return self.diffusion.q_sample(xt, t, eps=v)", "signal and noise swapped"),
    # exact density
    (D2, "torch.normal(self.centers[pick], self.sigma)", "torch.normal(self.centers[pick], self.sigma**2)", "variance for deviation in the data"),
    (D2, "log_p = -(torch.cdist(x, self.centers) ** 2) / (2 * self.sigma**2)", "log_p = -(torch.cdist(x, self.centers) ** 2) / (self.sigma**2)", "density, 2 missing"),
    (D2, "np.log(2 * np.pi * self.sigma**2 * len(self.centers))", "np.log(2 * np.pi * self.sigma**2)", "density not normalised"),
    (D2, "torch.cdist(x, self.centers)", "torch.cdist(x, self.centers.cpu())", "a CPU tensor in log_prob: crashed on every GPU (seen here)"),
    (D2, "(signal * self.sigma) ** 2 + noise**2", "signal * self.sigma**2 + noise**2", "variance of x_t, square missing"),
    (D2, "noise / var * (xt - signal * center)", "1 / noise * (xt - signal * center)", "ideal eps, as if the data were the centers"),
    # points of a file
    (D2, '(mark for mark in ";\\t,"', '(mark for mark in ",;\\t"', "decimal comma taken for two columns"),
    (D2, "if len(row.split(mark)) != 2:", "if False:", "three columns read as two"),
    (D2, 'strip("+-.e0123456789 ")', 'strip("+-.0123456789 ")', "first row 1e3,2 taken for a header"),
    (D2, 'letters <= {"", "nan", "inf"}', 'letters <= {""}', "first row nan,2 taken for a header"),
    (D2, "bad = np.flatnonzero(~np.isfinite(points).all(1))", "bad = np.flatnonzero(np.isnan(points).any(1))", "inf accepted"),
    (D2, "row = len(rows) - len(points) + bad[0]", "row = bad[0]", "wrong row named"),
    (D2, 'points.dtype.kind not in "iuf" or ', "", "an array of strings accepted"),
    (D2, "points.astype(np.float64)", "points.astype(np.float32)", "large numbers lose digits"),
    # training and judging points
    (D2, "        scheduler.step()\n", "", "constant learning rate"),
    (D2, "        if not loss.isfinite():", "        if False:", "training goes on after NaN"),
    (D2, '"loss": error.mean() / 2', '"loss": error.mean()', "loss is a sum over the axes"),
    (D2, "1 - (data.log_prob(samples) >= rare)", "1 - (data.log_prob(samples) < rare)", "on support for off it"),
    (D2, "1 - (data.log_prob(samples) >= rare).float().mean()", "(data.log_prob(samples) < rare).float().mean()", "NaN counted as good (seen here)"),
    (D2, "x.item() if x.isfinite() else None", "x.item()", "NaN in metrics.json is no JSON"),
    (D2, "* (1 - sigma**2) ** 0.5  # +", "# +", "data not of unit variance"),
    (D2, "(points - mean) / std * (1", "points / std * (1", "data not centred"),
    (D2, ".masked_fill(points.amin(0) == points.amax(0), 1)", "", "a column of one value divides by zero"),
    (D2, ".masked_fill(points.amin(0) == points.amax(0), 1)", ".clamp(min=1e-6)", "tiny data not standardised"),
    (D2, "xt.cpu().double() * std + mean", "xt.cpu().double()", "samples in the wrong units"),
    (D2, "xt.cpu().double() * std + mean", "xt.cpu() * std.float() + mean.float()", "samples in float32: points near 1.75e9 quantised (seen here)"),
    (D2, "xT = torch.randn(args.samples, 2", "xT = torch.rand(args.samples, 2", "acids-ircam: sampling starts at uniform noise"),
    (D2, "torch.manual_seed(args.seed)", "torch.manual_seed(0)", "seed ignored"),
    (D2, "states.append(xt[:4000].clone())", "states.append(xt[:4000])", "state kept as a view: memory grows"),
    (D2, '"T": 21, "samples"', '"T": 2, "samples"', "imagen-pytorch #161: beta reaches 1"),
    (D2, "        if not least <= getattr(args, name) <= 1e9:", "        if getattr(args, name) < least:", "NaN accepted as a flag"),
    (D2, "current_accelerator(check_available=True)", "current_accelerator()", "CUDA wheel on a machine without a GPU"),
    (D2, '"mean": mean, "std": std, ', "", "model.pt cannot give samples in the units of the file"),
    # the model of 2015
    (ROLL, "mean = torch.tensor([2, 2 / (3 * math.pi)])", "mean = torch.zeros(2)", "roll not centred"),
    (ROLL, "(spiral - mean) / (square - mean**2).sqrt()", "(spiral - mean) / 10", "p100: divided by 10, second moment not 1"),
    (ROLL, " * math.sqrt(1 - noise**2)", "", "noise adds to the variance"),
    (ROLL, "(torch.arange(n) + torch.rand(n)) / n", "torch.arange(n) / n", "the same points in every batch"),
    (ROLL, "- math.log2(2 * math.pi * math.e * across) / 2", "- math.log(2 * math.pi * math.e * across) / 2", "ceiling, nats for bits"),
    (ROLL, "curve = math.sqrt(1 - beta1) * roll_curve", "curve = roll_curve", "ceiling, signal not shrunk"),
    (ROLL, "(torch.log(var2 / var1) +", "(torch.log(var1 / var2) +", "KL, log upside down"),
    (ROLL, "/ var2 - 1) / 2\n", "/ var2 - 1)\n", "KL doubled"),
    (ROLL, "x[..., 1] + slope * x[..., 0]]", "x[..., 1] - slope * x[..., 0]]", "shear, sign"),
    (ROLL, "math.log(1 / beta1 - 1), -1, T", "math.log(1 / beta1 - 1), 1, T", "x_T keeps signal"),
    (ROLL, "beta.logit().float(), learn_schedule)", "beta.logit().float(), True)", "fixed schedule is learned"),
    (ROLL, "self.logit_beta.cpu().double()", "self.logit_beta.cpu()", "schedule in float32"),
    (ROLL, "s.alpha_bar[t].sqrt() * x0 + s.var[t].sqrt() * eps", "s.alpha_bar[t].sqrt() * x0 + s.var[t] * eps", "variance for deviation"),
    (ROLL, "from_x0 = s.alpha_bar[t - 1].sqrt()", "from_x0 = s.alpha_bar[t].sqrt()", "posterior, off by one"),
    (ROLL, "from_xt = (1 - s.beta[t]).sqrt()", "from_xt = (1 - s.beta[t])", "posterior, root missing"),
    (ROLL, "s.beta[t] * s.var[t - 1] / s.var[t]\n", "s.beta[t]\n", "beta for beta-tilde"),
    (ROLL, "@ self.readout[t - 2]", "@ self.readout[0 * t]", "one readout for all steps"),
    (ROLL, "s.alpha_bar[t].sqrt() * xt + scale", "xt + scale", "zero readout is not the forward kernel"),
    (ROLL, "out[..., 2:4] + s.beta[t].logit()", "out[..., 2:4]", "variance is no perturbation of beta"),
    (ROLL, "t = torch.arange(2, self.T + 1, d", "t = torch.arange(2, self.T, d", "last KL term missing"),
    (ROLL, "shear(mean_q - mean_p, -slope)", "shear(mean_q - mean_p, slope)", "full covariance, shear the wrong way"),
    (ROLL, "            kl = kl + slope**2 * var_q[..., 0] / var_p[..., 1] / (2 * math.log(2))\n", "", "full covariance, variance that the shear adds"),
    (ROLL, "torch.log2(s.var[-1] / s.var[1])", "torch.log2(s.var[1] / s.var[-1])", "entropies, sign"),
    (ROLL, "-kl.sum(0) + entropies", "-kl.mean(0) + entropies", "mean for sum in the bound"),
    (ROLL, "for t in range(self.T, 1, -1):", "for t in range(self.T - 1, 1, -1):", "sampling starts at T - 1"),
    (ROLL, "mean + shear(var.sqrt() * z, slope)", "mean + shear(var * z, slope)", "variance for deviation in the sampler"),
    (ROLL, "mean + shear(var.sqrt() * z, slope)", "mean + var.sqrt() * z", "sampler ignores the covariance"),
    (ROLL, "        yield (1 - s.beta[1]).sqrt() * xt + s.beta[1].sqrt() * torch.randn_like(xt)\n", "        yield xt\n", "p100: the step from x_1 to x_0 missing"),
    (ROLL, "s.beta[1].sqrt() * torch.randn_like(xt)", "s.beta[1] * torch.randn_like(xt)", "hrbigelow: beta for its root in the last step"),
    (ROLL, "torch.softmax(-square /", "torch.exp(-square /", "RBF not normalised"),
    (ROLL, "(2 * self.log_width.exp() ** 2)", "(2 * self.log_width.exp())", "RBF, width not squared"),
    (ROLL, "maximize=True", "maximize=False", "K is minimised"),
    (ROLL, "            scheduler.step()\n", "", "learning rate stays at its start"),
    (ROLL, "pct_start=0.15", "pct_start=0.1", "--steps 10 divides by zero"),
    (ROLL, "            if not K.isfinite():", "            if False:", "training goes on after NaN"),
    (ROLL, "(~(distance <= 0.1 + 3 * args.noise))", "(distance > 0.1 + 3 * args.noise)", "NaN counted as on the curve (seen here)"),
    (ROLL, "K_minus_null_bits=K - L_NULL", "K_minus_null_bits=K", "L_null not subtracted"),
    (ROLL, "bounds.std().item() / len(bounds) ** 0.5", "bounds.std().item() / len(bounds)", "standard error, root missing"),
    (ROLL, "current_accelerator(check_available=True)", "current_accelerator()", "CUDA wheel on a machine without a GPU"),
    (ROLL, "value if math.isfinite(value) else None", "value", "NaN in metrics.json is no JSON"),
    (ROLL, "states = [xt.cpu() for xt in", "states = [xt for xt in", "states stay on the GPU: the picture fails there"),
    # guidance, U-Net
    (MNIST, "torch.lerp(net(xt, t), eps, guidance)", "torch.lerp(net(xt, t), eps, guidance + 1)", "TeaPearce PR #2: guidance off by one"),
    (MNIST, "torch.lerp(net(xt, t), eps, guidance)", "torch.lerp(eps, net(xt, t), guidance)", "guidance swapped"),
    (MNIST, "eps = net(xt, t, y)\n", "eps = net(xt, t)\n", "samples without their labels"),
    (MNIST, "/ signal).clamp(-1, 1)", "/ signal)", "hojonathanho #5: x_0 not clipped"),
    (MNIST, "nn.GroupNorm(8, inputs)", "nn.BatchNorm2d(inputs)", "superminddpm, tea: batch norm over mixed noise levels"),
    (MNIST, "        nn.init.zeros_(self.conv2.weight)", "        pass", "block does not start as skip(x)"),
    (MNIST, "return self.skip(x) + self.conv2(F.silu(h))", "return self.conv2(F.silu(h))", "no residual"),
    (MNIST, "        nn.init.zeros_(self.head[-1].weight)\n", "", "output not zero at the start"),
    (MNIST, "torch.full_like(t, self.classes) if y is None", "torch.zeros_like(t) if y is None", "no label is label 0"),
    (MNIST, " + self.label(y))", ")", "label ignored"),
    (MNIST, "angle = t[:, None] *", "angle = 0 * t[:, None] *", "superminddpm: time ignored"),
    (MNIST, "10_000 ** (-torch.arange(32", "10_000 ** (torch.arange(32", "embedding, sign of the exponent: frequencies alias"),
    (MNIST, "F.interpolate(h, scale_factor=2) + h1", "F.interpolate(h, scale_factor=2)", "no skip connection at full size"),
    (MNIST, "F.interpolate(h, scale_factor=2) + h2", "F.interpolate(h, scale_factor=2)", "no skip connection at half size"),
    (MNIST, "h + attended.mT.reshape(h.shape)", "h", "no attention"),
    (MNIST, "h + attended.mT.reshape(h.shape)", "h + attended.reshape(h.shape)", "attention, axes mixed up"),
    (MNIST, "return self.diffusion.q_sample(v, t, eps=xt)", "return self.diffusion.q_sample(xt, t, eps=v)", "signal and noise swapped"),
    # images of a file
    (MNIST, "if path == MNIST and not path.exists():", "if not path.exists():", "a mistyped --data downloads MNIST"),
    (MNIST, "download_url_to_file(URL, path, SHA256)", "download_url_to_file(URL, path)", "download not checked"),
    (MNIST, "Path(__file__).resolve().parent", "Path()", "data found only from the script's own folder"),
    (MNIST, ' and y.dtype.kind in "iu"', "", "labels that are no integers accepted"),
    (MNIST, "(x.dtype, x.ndim, y.shape) == (np.uint8, 4, x.shape[:1])", "(x.dtype, x.ndim, len(y)) == (np.uint8, 4, len(x))", "labels [n, 1] accepted: broadcast to [B, B]"),
    (MNIST, "(x.dtype, x.ndim, y.shape) == (np.uint8, 4, x.shape[:1])", "(x.ndim, y.shape) == (4, x.shape[:1])", "lucidrains #20: images in [0, 1] accepted"),
    (MNIST, "x.shape[1] % 4 or", "", "height not divisible by 4 accepted"),
    (MNIST, "x.shape[3] not in (1, 3)", "x.shape[3] > 4", "RGBA accepted"),
    (MNIST, "labels, y = np.unique(y, return_inverse=True)", "labels = np.unique(y)", "labels by their value instead of their rank (seen here)"),
    (MNIST, "torch.from_numpy(x).permute(0, 3, 1, 2)", "torch.from_numpy(x).permute(0, 3, 2, 1)", "images lie on their side"),
    # training of images
    (MNIST, "decay = min(0.995, args.steps / (args.steps + 20))", "decay = 0.995", "improved-diffusion #59: EMA slower than a short run"),
    (MNIST, "decay = min(0.995, args.steps / (args.steps + 20))", "decay = args.steps / (args.steps + 20)", "EMA, no limit to its memory"),
    (MNIST, "    average.n_averaged += len(losses)", "    average.n_averaged += 0", "EMA starts again with --resume"),
    (MNIST, '"ema": average.module, "optimizer": optimizer}', '"ema": average.module}', "optimiser not resumed"),
    (MNIST, "for name, part in parts.items() if args.resume else ():", "for name, part in ():", "nothing resumed but the steps"),
    (MNIST, "nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net", "net", "gradients of the processes not averaged"),
    (MNIST, "(args.seed * WORLD + RANK) * 10**7 + step", "(args.seed * WORLD) * 10**7 + step", "every process has the same data and noise"),
    (MNIST, "* 10**7 + step)", "* 10**7)", "the same batch in every step"),
    (MNIST, "/ 127.5 - 1  # [B, C, H, W]", "/ 255  # [B, C, H, W]", "tea, labml: pixels in [0, 1]"),
    (MNIST, "/ 127.5 - 1  # [B, C, H, W]", "/ 255 - 0.5  # [B, C, H, W]", "superminddpm: pixels in [-0.5, 0.5]"),
    (MNIST, "torch.rand(len(pick)) < 0.1", "torch.rand(len(pick)) < 0.0", "labels never hidden"),
    (MNIST, "torch.rand(len(pick)) < 0.1", "torch.rand(len(pick)) < 1.0", "labels always hidden"),
    (MNIST, "(torch.arange(1, args.batch_size + 1) - torch.rand(1))", "(torch.arange(1, args.batch_size + 1) - torch.rand(args.batch_size))", "t not evenly spread"),
    (MNIST, "u.sqrt()).ceil()", "u).ceil()", "uniform t"),
    (MNIST, "u.sqrt()).ceil().long()", "u.sqrt()).floor().long()", "t = 0 trained, T never"),
    (MNIST, "(error / net.diffusion.signal[t] ** 2).mean()", "error.mean()", "error of eps for that of v"),
    (MNIST, "warmup = min(1, 20 * (step + 1) / args.steps)", "warmup = 1", "no warm-up"),
    (MNIST, "* (1 - step / args.steps)", "", "learning rate does not fall"),
    (MNIST, "        optimizer.zero_grad()\n", "", "gradients pile up"),
    (MNIST, "        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)\n", "        norm = nn.utils.clip_grad_norm_(net.parameters(), 1e9)\n", "gradients not clipped"),
    (MNIST, "if not (loss + norm).isfinite():", "if not loss.isfinite():", "NaN of the gradient saved while the loss is finite (seen here)"),
    (MNIST, "        optimizer.step()\n        average.update_parameters(net)\n", "        average.update_parameters(net)\n        optimizer.step()\n", "smalldiffusion: EMA before the step"),
    (MNIST, "(len(losses) % 100 == 0 or len(losses) == args.steps)", "(len(losses) % 100 == 0)", "the last steps are not saved"),
    (MNIST, "(len(losses) % 100 == 0 or len(losses) == args.steps)", "(len(losses) == args.steps)", "nothing is saved before the end"),
    (MNIST, 'if RANK == 0 and (len(losses)', 'if (len(losses)', "every process writes the checkpoint"),
    (MNIST, 'file = args.out / "model.part"', 'file = args.out / "model.pt"', "written in place: a kill loses it"),
    (MNIST, "                file.unlink(missing_ok=True)\n", "", "a temporary left on a full disk (seen here)"),
    (MNIST, "return average.module", "return net", "EMA not used"),
    # sampling of images, main
    (MNIST, "denoiser(net, net.diffusion, y, args.guidance)", "denoiser(net, net.diffusion, y)", "--guidance ignored"),
    (MNIST, "args.sample_steps, args.eta)", "args.sample_steps)", "--eta ignored"),
    (MNIST, "xT = torch.randn(len(y), *shape", "xT = torch.rand(len(y), *shape", "acids-ircam: sampling starts at uniform noise"),
    (MNIST, "((xt.clamp(-1, 1) + 1) * 127.5).round()", "(xt.clamp(0, 1) * 255).round()", "guided-diffusion #61: [-1, 1] saved as [0, 1]"),
    (MNIST, 'add("--samples",', 'add("--n", dest="samples",', "a flag that is the beginning of one of torchrun's (seen here)"),
    (MNIST, '"sample_steps": (1, 1e3), "eta": (0, 1)', '"sample_steps": (1, 1e9), "eta": (0, 1e9)', "--sample-steps above T fails after the training"),
    (MNIST, "    if WORLD > 1:\n        distributed.destroy_process_group()\n    if RANK > 0:\n        return\n", "    if WORLD > 1:\n        distributed.destroy_process_group()\n", "every process samples and writes"),
    (MNIST, "file = args.load or (checkpoint if args.resume else args.data)", "file = args.load or (checkpoint if args.resume or checkpoint.exists() else args.data)", "an old model.pt is resumed without being asked"),
    (MNIST, 'torch.load(file, "cpu", weights_only=True)', 'torch.load(file, "cpu", weights_only=False)', "a checkpoint may run code"),
    (MNIST, 'if saved.setdefault("config", config) != config:', "if False and config:", "--resume with other data"),
    (MNIST, "if args.label not in (None, *labels):", "if False:", "a label that is not there"),
    (MNIST, 'saved["net" if args.resume else "ema"]', 'saved["net"]', "--load samples from the raw weights"),
    (MNIST, "checkpoint.replace(args.out / 'model.old.pt')", "checkpoint", "forgetting --resume overwrites a long training (seen here)"),
    (MNIST, "np.searchsorted(labels, asked)", "asked", "--label by its value instead of its rank"),
    (MNIST, 'np.save(args.out / "labels.npy", asked)', 'np.save(args.out / "labels.npy", y.cpu())', "labels.npy holds the rank"),
    (MNIST, "y.split(500)", "y.split(10**9)", "all samples at once: memory"),
    (MNIST, "    torch.manual_seed(args.seed)\n    images", "    images", "samples depend on the training before"),
    (MNIST, "np.resize(labels if args.label is None else args.label, args.samples)", "np.resize(labels, args.samples)", "--label ignored"),
    (MNIST, "current_accelerator(check_available=True)", "current_accelerator()", "CUDA wheel on a machine without a GPU"),
]  # fmt: skip


def tests_of(script):
    """The files that test a script."""
    return [f"tests/test_{script}"] + ["tests/test_diffusion.py"] * (script != ROLL)


def run_pytest(tests, file=D2, old="", new="", flags=()):
    """Run tests in a copy of the project in which a text is replaced; whether they pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in (D2, ROLL, MNIST, "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "tests", copy / "tests")
        for name in ("data", "weights"):
            (copy / name).symlink_to(ROOT / name)
        (copy / file).write_text((ROOT / file).read_text().replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", *flags, *tests]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=copy, env=env, capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def quickest_first(script, folder):
    """The names of all tests of a script by the time they take; None if one of them fails."""
    report = Path(folder) / f"{script}.xml"
    if not run_pytest(tests_of(script), flags=[f"--junitxml={report}"]):
        return None
    cases = sorted(ElementTree.parse(report).iter("testcase"), key=lambda x: float(x.get("time")))
    return [f"{x.get('classname').replace('.', '/')}.py::{x.get('name')}" for x in cases]


def main(argv=None):
    """Run the chosen mutants; exit code 1 if one survives or does not apply."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants with all of these")
    words = parser.parse_args(argv).words
    chosen = [mutant for mutant in MUTANTS if all(word in " ".join(mutant) for word in words)]
    bad = [mutant for mutant in chosen if (ROOT / mutant[0]).read_text().count(mutant[1]) != 1]
    for file, old, _, name in bad:
        print(f"does not apply: {file}: {name}: {old!r}")
    chosen = [mutant for mutant in chosen if mutant not in bad]
    scripts = sorted({mutant[0] for mutant in chosen})
    alive = []
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        orders = pool.map(quickest_first, scripts, [folder] * len(scripts))
        orders = dict(zip(scripts, orders))
        if None in orders.values():
            print("tests fail without any mutant")
            return 1
        runs = {}
        for mutant in chosen:
            runs[pool.submit(run_pytest, orders[mutant[0]], *mutant[:3])] = mutant
        for run in tqdm(concurrent.futures.as_completed(runs), "mutants", len(runs)):
            if run.result():
                alive.append(runs[run])
                file, old, new, name = runs[run]
                tqdm.write(f"survived: {file}: {name}: {old!r} -> {new!r}")
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed")
    return 1 if alive or bad else 0


if __name__ == "__main__":
    sys.exit(main())
