"""Known bugs, put in one at a time: the suite must fail for each of them.

  python tests/mutants.py                 all of them, 18 minutes on two cores
  python tests/mutants.py posterior       those whose file, text or origin contains the word

Each entry is one edit of one script: (file, old text, new text, where the bug was seen or what it is).
The edit is made in a copy of the project and the tests of that script run until the first failure. A
survivor means that a property is not tested. An entry whose old text is gone fails the run as well.
"""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
D2, ROLL, MNIST = "ddpm_2d.py", "ddpm_swissroll_2015.py", "ddpm_mnist.py"

MUTANTS = [
    # schedule
    (D2, " * 1000 / T])", "])", "tiny-diffusion: few steps with the betas of 1000"),
    (D2, "(u + 0.008) / 1.008", "u", "cosine without its offset"),
    (D2, ".clamp(max=0.999)", "", "cosine not clipped"),
    (D2, "torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2", "torch.cos((u + 0.008) / 1.008 * math.pi / 2)", "square missing"),
    (D2, "torch.sigmoid(3 - 6 * u)", "torch.sigmoid(6 - 12 * u)", "another sigmoid"),
    (D2, "torch.linspace(1e-4, 0.02, T", "torch.linspace(1e-4, 0.01, T", "wrong end of the schedule"),
    (D2, "torch.linspace(1e-4, 0.02, T", "torch.linspace(1e-3, 0.02, T", "wrong start of the schedule"),
    (D2, "not 21 <= T", "not 2 <= T", "beta reaches 1 (imagen-pytorch #161)"),
    (D2, "torch.cat([u[:1], torch.linspace", "torch.cat([u[:1] + 1e-4, torch.linspace", "minDiffusion: beta_0 in the product"),
    # forward process and posterior
    (D2, "nn.Buffer((1 - a).sqrt().float())", "nn.Buffer((1 - a.float()).sqrt())", "difference in float32"),
    (D2, "self.signal[t] * x0 + self.noise[t] * eps", "self.signal[t] * x0 + self.noise[t] ** 2 * eps", "hrbigelow: beta for sqrt(beta)"),
    (D2, "return self.signal[t] * x0 + ", "return self.alpha_bar[t] * x0 + ", "sqrt missing"),
    (D2, "self.signal[t] * x0 + self.noise[t] * eps", "self.signal[t] * x0 - self.noise[t] * eps", "sign"),
    (D2, "(self.noise[t - 1] / self.noise[t]) ** 2", "self.noise[t - 1] / self.noise[t]", "square missing in the posterior"),
    (D2, "(self.noise[t - 1] / self.noise[t]) ** 2", "(self.noise[t] / self.noise[t - 1].clamp(min=1e-9)) ** 2", "posterior upside down"),
    (D2, "gain = self.signal[t - 1]", "gain = self.signal[t]", "posterior, off by one"),
    (D2, "self.beta[t] / self.noise[t] ** 2\n        return gain", "self.beta[t] / self.noise[t]\n        return gain", "posterior, missing square"),
    (D2, "self.alpha[t].sqrt() * keep * xt", "self.alpha[t] * keep * xt", "posterior, sqrt missing"),
    (D2, "keep * xt, keep * self.beta[t]", "keep * xt, self.beta[t]", "beta for beta-tilde"),
    (D2, "return gain * x0 + self.alpha[t].sqrt() * keep * xt", "return gain * xt + self.alpha[t].sqrt() * keep * x0", "posterior, coefficients swapped"),
    (D2, "eps) / self.signal[t]", "eps) / self.alpha_bar[t]", "x0, sqrt missing"),
    (D2, "(xt - self.noise[t] * eps)", "(xt + self.noise[t] * eps)", "x0, sign"),
    # loss
    (D2, "torch.randint(1, self.T + 1,", "torch.randint(1, self.T,", "superminddpm: T is never trained"),
    (D2, "torch.randint(1, self.T + 1,", "torch.randint(0, self.T,", "t from 0"),
    (D2, "torch.randn_like(x0) if eps", "torch.rand_like(x0) if eps", "acids-ircam: uniform noise"),
    (D2, "t, eps), t, y)).square()", "t, eps), t, y)).abs()", "absolute error"),
    (D2, "t, eps), t, y)).square().flatten(1).mean(1)", "t, eps), t, y)).square().flatten(1).sum(1)", "sum for mean"),
    (D2, "(eps - model(self.q_sample(x0, t, eps), t, y))", "(eps - model(self.q_sample(x0, t, eps), t))", "label not passed on"),
    (D2, "(eps - model(self.q_sample", "(x0 - model(self.q_sample", "wrong target"),
    (D2, "(error / self.signal[t] ** gamma)", "(error * self.signal[t] ** gamma)", "weight upside down"),
    # samplers
    (D2, "torch.lerp(model(xt, t.expand(len(xt))), eps, guidance)", "torch.lerp(model(xt, t.expand(len(xt))), eps, guidance + 1)", "guidance off by one (TeaPearce PR #2)"),
    (D2, "torch.lerp(model(xt, t.expand(len(xt))), eps, guidance)", "torch.lerp(eps, model(xt, t.expand(len(xt))), guidance)", "guidance swapped"),
    (D2, "torch.arange(self.T, 0, -1, device=xT.device)", "torch.arange(self.T - 1, 0, -1, device=xT.device)", "sampling starts at T - 1"),
    (D2, "torch.arange(self.T, 0, -1, device=xT.device)", "torch.arange(self.T, 1, -1, device=xT.device)", "p100: last step missing"),
    (D2, "if t > 1 else 0", "if t > 0 else 0", "labml: noise in the last step"),
    (D2, '"small": beta_tilde, "large": self.beta[t]', '"small": self.beta[t], "large": beta_tilde', "variances swapped"),
    (D2, "mean + var.sqrt() * z", "mean + var * z", "variance for deviation"),
    (D2, "z = torch.empty_like(xt).normal_(generator=generator) if", "z = torch.empty_like(xt).uniform_(generator=generator) if", "uniform noise"),
    (D2, "z = torch.empty_like(xt).normal_(generator=generator) if", "z = torch.empty_like(xt).normal_() if", "generator ignored"),
    (D2, "[round(self.T * k / steps) for", "[(self.T - 1) * k // steps for", "diffusers #2585: T is never visited"),
    (D2, "range(steps, -1, -1)]", "range(steps, 0, -1)]", "DDIM ends before x_0"),
    (D2, "-self.beta[s + 1 : t + 1]", "-self.beta[s:t]", "DDIM, betas shifted"),
    (D2, "self.noise[t] * ratio.sqrt()", "self.noise[t] * ratio", "DDIM, sqrt missing"),
    (D2, "self.noise[s] * (eta / self.noise[t]", "self.noise[t] * (eta / self.noise[s].clamp(min=1e-9)", "DDIM, ratio upside down"),
    (D2, "ratio.sqrt()).clamp(max=1)", "ratio.sqrt())", "DDIM, nan if eta > 1"),
    (D2, "ratio.sqrt()).clamp(max=1)", "ratio.sqrt()).clamp(max=0.9)", "DDIM, noise never all new"),
    (D2, "(self.noise[s] ** 2 - sigma**2).sqrt()", "self.noise[s]", "DDIM, variance of z not subtracted"),
    (D2, "yield (xt := self.signal[s] * x0", "yield (xt := self.signal[t] * x0", "DDIM, wrong time"),
    (D2, "if not 1 <= steps <= self.T", "if not 1 <= steps", "more steps than T"),
    # bound
    (D2, "(end * x0**2 - end - torch.log1p(-end)).sum() / 2]", "(end * x0**2 - end - torch.log1p(-end)).sum()]", "L_T doubled"),
    (D2, "(end * x0**2 - end - ", "(end * x0**2 + end - ", "L_T, sign"),
    (D2, "(mean - mean_hat) ** 2 / (2 * var)", "(mean - mean_hat) ** 2 / var", "KL doubled"),
    (D2, "torch.stack(terms[::-1]) / len(x0)", "torch.stack(terms[::-1]) / x0.numel()", "mean for sum"),
    (D2, "torch.stack(terms[::-1])", "torch.stack(terms)", "terms in reverse"),
    (D2, "torch.log(2 * math.pi * self.beta[1])", "torch.log(math.pi * self.beta[1])", "L_0, constant"),
    (D2, "        terms[-1] = self.decoder_nll(x0, x0_hat).sum()\n", "        terms[-1] = 0 * terms[0]\n", "L_0 missing"),
    (D2, "self.guided_eps(model, xt, t, y, 1)", "self.guided_eps(model, xt, t, None, 1)", "bound without labels"),
    # network
    (D2, "torch.full_like(t, self.classes) if y is None", "torch.zeros_like(t) if y is None", "no label is label 0"),
    (D2, " + self.label(y)  # [B, width]", "  # [B, width]", "label ignored"),
    (D2, "t[:, None] * self.freq], 1)", "0 * t[:, None] * self.freq], 1)", "superminddpm: time ignored"),
    (D2, "nn.Buffer(1000 / diffusion.T * 10_000", "nn.Buffer(10_000", "embedding depends on T"),
    (D2, "h = h + layer(", "h = layer(", "no residual"),
    (D2, "        nn.init.zeros_(self.out.weight)\n", "", "output not zero at the start"),
    # data
    (D2, "torch.normal(self.centers[pick], self.sigma), self", "torch.normal(self.centers[pick], self.sigma**2), self", "variance for deviation in the data"),
    (D2, "(signal * self.sigma) ** 2 + noise**2", "signal * self.sigma**2 + noise**2", "density, square missing"),
    (D2, "@ self.centers.T - square / 2) / var", "@ self.centers.T - square) / var", "density, half missing"),
    (D2, "var.view(-1) * fits.sum(1))", "var.view(-1))", "density not normalised"),
    (D2, ".sum() * self.sigma**2\n", ".sum() * self.sigma\n", "entropy, area of a cell"),
    (D2, "return -noise * torch.autograd", "return noise * torch.autograd", "score, sign"),
    (D2, "return -noise * torch.autograd", "return -(noise**2) * torch.autograd", "score, wrong scale"),
    (D2, " * math.sqrt(1 - sigma**2)\n", "\n", "data not of unit variance"),
    (D2, "(rows[:, :2] - mean) / std", "rows[:, :2] / std", "data not centred"),
    (D2, "path[-1].cpu() * std + mean", "path[-1].cpu() + mean", "samples in the wrong units"),
    # training
    (D2, "device=device) < 0.1, net.classes)", "device=device) < 0.0, net.classes)", "labels never hidden"),
    (D2, "device=device) < 0.1, net.classes)", "device=device) < 1.0, net.classes)", "labels always hidden"),
    (D2, "            optimizer.step()\n            scheduler.step()\n            ema.update_parameters(net)  # after the step\n", "            ema.update_parameters(net)\n            optimizer.step()\n            scheduler.step()\n", "smalldiffusion: EMA before the step"),
    (D2, "model, ideal = ema.module,", "model, ideal = net,", "EMA not used"),
    (D2, "            optimizer.zero_grad()\n", "", "gradients pile up"),
    (D2, "            scheduler.step()\n", "", "constant learning rate"),
    (D2, "torch.manual_seed(args.seed)", "torch.manual_seed(0)", "seed ignored"),
    (D2, "            if not loss.isfinite():", "            if False:", "training goes on after NaN"),
    # judging
    (D2, "losses = bounds[:, 1:-1] / weight", "losses = bounds[:, 1:-1]", "loss with the weights of the bound"),
    (D2, "(data.log_prob(path[-1]) < rare)", "(data.log_prob(path[-1]) > rare)", "on support"),
    (D2, "losses[0].mean() / losses[1].mean() - 1", "losses[1].mean() / losses[0].mean() - 1", "excess upside down"),
    (D2, "if args.load and saved.get", "if False and saved.get", "checkpoint of another config accepted"),
    # the model of 2015
    (ROLL, "mean = torch.tensor([2, 2 / (3 * math.pi)]).double()", "mean = torch.zeros(2).double()", "roll not centred"),
    (ROLL, "(raw - mean) / var.sqrt() *", "(raw - mean) / 10 *", "p100: divided by 10, second moment not 1"),
    (ROLL, " * math.sqrt(1 - noise**2)", "", "noise adds to the variance"),
    (ROLL, "var = (1 - beta1) * noise**2 + beta1", "var = noise**2 + beta1 * 2", "ceiling, wrong variance"),
    (ROLL, "math.log(2 * math.pi * math.e * var) / 2) * BITS", "math.log(2 * math.pi * math.e * var) / 2)", "ceiling in nats"),
    (ROLL, "(torch.log(var2 / var1) +", "(torch.log(var1 / var2) +", "KL, log upside down"),
    (ROLL, "(var1 + (mu1 - mu2) ** 2) / var2 - 1", "(var1 + (mu1 - mu2) ** 2) / var1 - 1", "KL, wrong variance"),
    (ROLL, "/ var2 - 1) / 2", "/ var2 - 1)", "KL doubled"),
    (ROLL, "F.pad(F.logsigmoid(-logit).cumsum(0), (1, 0))", "F.pad(F.logsigmoid(logit).cumsum(0), (1, 0))", "alpha and beta swapped"),
    (ROLL, "self.logit_beta.cpu().double()", "self.logit_beta.cpu()", "schedule in float32"),
    (ROLL, "alpha_bar.sqrt() * x0 + var.sqrt() * eps", "alpha_bar.sqrt() * x0 + var * eps", "variance for deviation"),
    (ROLL, "s[:, t - 1, None, None]", "s[:, t, None, None]", "posterior, off by one"),
    (ROLL, "mean = alpha_bar.sqrt() * beta * x0 + (1 - beta).sqrt() * var_before * xt", "mean = alpha_bar.sqrt() * beta * xt + (1 - beta).sqrt() * var_before * x0", "posterior, swapped"),
    (ROLL, "return mean / var, beta * var_before / var", "return mean / var, beta", "beta for beta-tilde"),
    (ROLL, "@ self.readout[t - 2]", "@ self.readout[0 * t]", "one readout for all steps"),
    (ROLL, "torch.sigmoid(out[..., 2:4] + beta.logit())", "torch.sigmoid(out[..., 2:4])", "not a perturbation of the forward kernel"),
    (ROLL, "self.q_posterior(alpha_bar.sqrt() * xt + shift, xt, t, s)", "self.q_posterior(xt + shift, xt, t, s)", "zero readout is not the forward kernel"),
    (ROLL, "t, s = torch.arange(2, self.T + 1,", "t, s = torch.arange(2, self.T,", "last KL term missing"),
    (ROLL, "(1 + c**2) * var_q, 0, var2)", "var_q, 0, var2)", "full covariance, variance of the second axis"),
    (ROLL, "kl_normal(d2 - c * d1,", "kl_normal(d2,", "full covariance, slope ignored"),
    (ROLL, "kl = BITS * (kl + torch.log1p(c**2) / 2)", "kl = BITS * kl", "full covariance, determinant"),
    (ROLL, "BITS * (s[2, -1] / s[2, 1]).log() + L_NULL", "BITS * (s[2, 1] / s[2, -1]).log() + L_NULL", "entropies, sign"),
    (ROLL, "L_NULL - kl.sum(0), kl", "L_NULL - kl.mean(0), kl", "mean for sum in the bound"),
    (ROLL, "return BITS * (s[2, -1]", "return (s[2, -1]", "bits for nats"),
    (ROLL, "for step in range(self.T, 1, -1)", "for step in range(self.T - 1, 1, -1)", "sampling starts at T - 1"),
    (ROLL, "(var.sqrt() * z[step - 1])", "(var * z[step - 1])", "variance for deviation in the sampler"),
    (ROLL, "math.sqrt(1 - self.beta1) * x + math.sqrt(self.beta1) * z[0]", "x", "p100: the step from x_1 to x_0 missing"),
    (ROLL, "torch.stack([z1, z2 + c * z1], -1)", "torch.stack([z1, z2], -1)", "sampler ignores the covariance"),
    (ROLL, "return torch.softmax(d2 *", "return torch.exp(d2 *", "RBF not normalised"),
    (ROLL, "log_snr = torch.linspace(math.log(1 / beta1 - 1), -1, T", "log_snr = torch.linspace(math.log(1 / beta1 - 1), 1, T", "x_T keeps signal"),
    (ROLL, "nn.Parameter(beta.logit().float(), learn_schedule)", "nn.Parameter(beta.logit().float(), True)", "fixed schedule is learned"),
    # MNIST: what its own lines can get wrong
    (MNIST, "/ self.signal[t]).clamp(-1, 1)", "/ self.signal[t])", "pixels not clipped"),
    (MNIST, "eps = (xt - self.signal[t] * x0) / self.noise[t]", "eps = self.guided_eps(model, xt, t, y, guidance)", "lucidrains PR #84: noise not computed again"),
    (MNIST, "(x0 - 1 / 255 - mean) / sigma", "(x0 - mean) / sigma", "decoder, bin too narrow"),
    (MNIST, "torch.where(x0 < -0.999, -torch.inf, ", "torch.where(x0 < -9, -torch.inf, ", "decoder leaks at black"),
    (MNIST, "torch.where(x0 > 0.999, torch.inf, ", "torch.where(x0 > 9, torch.inf, ", "decoder leaks at white"),
    (MNIST, "self.beta[2].sqrt()", "self.beta[2]", "decoder, variance for deviation"),
    (MNIST, "return self.skip(x) + self.conv2", "return self.conv2", "no skip in a block"),
    (MNIST, "[angle.sin(), angle.cos()]", "[0 * angle.sin(), 0 * angle.cos()]", "time ignored"),
    (MNIST, " + self.label(y))", ")", "label ignored"),
    (MNIST, "torch.full_like(t, self.classes) if y is None", "torch.zeros_like(t) if y is None", "no label is label 0"),
    (MNIST, "return h + self.mix(", "return h + 0 * self.mix(", "no attention"),
    (MNIST, ".flatten(4).transpose(3, 4)", ".flatten(4)", "attention over the channels"),
    (MNIST, "            nn.init.zeros_(parameter)\n", "            pass\n", "output not zero at the start"),
    (MNIST, "if hashlib.sha256(gzip.decompress(packed)).hexdigest() != FILES[name]:", "if False:", "download not checked"),
    (MNIST, "if (magic, *found) != (0x801 + len(size), *size):", "if False:", "header not checked"),
    (MNIST, "if not len(images) == len(labels) > 0:", "if False:", "counts not checked"),
    (MNIST, "images[:, None] / 127.5 - 1", "images[:, None] / 255", "tea, labml: pixels in [0, 1]"),
    (MNIST, "images[:, None] / 127.5 - 1", "images[:, None] / 255 - 0.5", "superminddpm: pixels in [-0.5, 0.5]"),
    (MNIST, "x[:, 0].clamp(-1, 1) * 127.5 + 127.5", "x[:, 0].clamp(0, 1) * 255", "guided-diffusion #61: [-1, 1] saved as [0, 1]"),
    (MNIST, "len(pick), device=device) < 0.1", "len(pick), device=device) < 0.0", "labels never hidden"),
    (MNIST, "len(pick), device=device) < 0.1", "len(pick), device=device) < 1.0", "labels always hidden"),
    (MNIST, "(args.seed * world + rank) * 10**9 + len(log)", "(args.seed * world + rank) * 10**9", "the same noise in every step"),
    (MNIST, "(args.seed * world + rank) * 10**9", "(args.seed * world) * 10**9", "every rank has the same noise"),
    (MNIST, "x, y = x[rank::world], y[rank::world]", "x, y = x[::world], y[::world]", "every rank sees the same data"),
    (MNIST, "learner = nn.parallel.DistributedDataParallel(net)", "learner = net", "gradients not averaged"),
    (MNIST, "    if rank > 0:\n        return {}\n", "", "every rank writes"),
    (MNIST, "        del learner  # DDP", "        # DDP", "the end of a parallel run hangs now and then (seen here)"),
    (MNIST, "optimizer.load_state_dict(saved[\"optimizer\"])", "pass", "optimiser not resumed"),
    (MNIST, "ema.load_state_dict(saved[\"ema\"])", "pass", "EMA not resumed"),
    (MNIST, "/ math.log(2) / 784", "/ 784", "nats for bits"),
    (MNIST, "/ math.log(2) / 784", "/ math.log(2) / 1024", "padded pixels counted"),
    (MNIST, "torch.stack(bounds).sum(1) +", "torch.stack(bounds).mean(1) +", "mean for sum in the bound"),
    (MNIST, "variational_bound(model, test_x[part], test_y[part])", "variational_bound(model, x[part], y[part])", "bound on training images"),
    (MNIST, "variational_bound(model, test_x[part], test_y[part])", "variational_bound(model, test_x[part])", "bound without labels"),
    (MNIST, "args.device == \"auto\" else args.device", "args.device == \"\" else args.device", "auto is not a device"),
    # and what main gets wrong in silence
    (MNIST, "device=device)) % args.T + 1", "device=device)) % args.T", "t from 0 in the loop of training"),
    (MNIST, "device=device)) % args.T + 1", "device=device)) % (args.T - 1) + 1", "superminddpm: T is never trained"),
    (MNIST, "t = (spread + torch.randint", "t = (0 * spread + torch.randint", "one t for the whole batch"),
    (MNIST, "label, t, gamma=2)", "label, t)", "weight of the loss not passed on"),
    (MNIST, "            optimizer.param_groups[0][\"lr\"] = lr\n", "", "learning rate logged but never set"),
    (MNIST, "            optimizer.step()\n            ema.update_parameters(net)  # after the step\n", "            ema.update_parameters(net)\n            optimizer.step()\n", "smalldiffusion: EMA before the step"),
    (MNIST, "get_ema_multi_avg_fn(float(n / (20 + n)))", "get_ema_multi_avg_fn(0.9999)", "improved-diffusion #59: EMA slower than the run"),
    (MNIST, "clock(torch.eye(256).bfloat16()) <", "clock(torch.eye(256).bfloat16()) >", "bfloat16 where it is slower"),
    (MNIST, "\"cpu\": clock(torch.eye(256).bfloat16()) < clock(torch.eye(256))", "\"cpu\": \"avx512_bf16\" in torch.cpu.get_capabilities()", "bfloat16 wherever torch knows its name (seen here)"),
    (MNIST, "saved.get(\"amp\", amp) if args.resume else amp", "amp", "a resumed run measures anew, and may change its arithmetic"),
    (MNIST, "if vars(args)[flag] != value:", "if False:", "checkpoint of another config accepted"),
    (MNIST, "parser.set_defaults(test_images=0 if args.load else 64, **made)", "parser.set_defaults(test_images=64)", "checkpoint without the flags that made it"),
    (MNIST, "test_images=0 if args.load else 64", "test_images=64", "--load takes the minutes of a bound that nobody asked for"),
    (MNIST, "y=y, guidance=args.guidance)", "y=y)", "guidance ignored"),
    (MNIST, "loop(model, part, y=y, guidance", "loop(model, part, guidance", "samples without their labels"),
    (MNIST, "xT = torch.randn(args.n, 1", "xT = torch.rand(args.n, 1", "acids-ircam: sampling starts at uniform noise"),
    (MNIST, "loop = ddim if args.sample_steps else diffusion.p_sample_loop", "loop = ddim", "--sample-steps 0 is DDIM, not Algorithm 2"),
    (MNIST, "steps=args.sample_steps, eta=args.eta)", "steps=args.sample_steps)", "--eta ignored"),
    (MNIST, "            t[1::2] = (args.T", "            t[1::2] = 0 * (args.T", "t = 0, that is x_0, in the loop of training"),
    (MNIST, "** (1 / 3)).ceil().long()", ").ceil().long()", "every second t not pushed up"),
    (MNIST, "            t[8::16] = (args.T ** (t[8::16] / args.T)).floor().long()  # p ~ 1/t, as the bits\n", "", "no sixteenth for the smallest t"),
    (MNIST, "t[8::16] / args.T)).floor().long()", "t[8::16] / args.T)).ceil().long()", "t = 1 left out of the sixteenth"),
    (MNIST, " + math.log(net.classes)) / math.log(2)", ") / math.log(2)", "bound of p(x | y) given as that of p(x)"),
    (MNIST, "\"sample_seconds\": took}", "\"sample_seconds\": bar.format_dict[\"elapsed\"]}", "time of sampling with that of the bound (seen here)"),
    (MNIST, "bits.std().item() / 8**0.5", "bits.std().item() / 8", "standard error, sqrt missing"),
    (MNIST, "nn.Buffer(1000 / diffusion.T * 10_000", "nn.Buffer(10_000", "embedding depends on T"),
    (MNIST, "10_000 ** (-torch.arange(32) / 32)", "10_000 ** (torch.arange(32) / 32)", "embedding, sign of the exponent: all frequencies alias"),
    (MNIST, "F.interpolate(h, scale_factor=2) + h1", "F.interpolate(h, scale_factor=2)", "no skip connection at full size"),
    (MNIST, "F.interpolate(h, scale_factor=2) + h2", "F.interpolate(h, scale_factor=2)", "no skip connection at half size"),
    (MNIST, "fade * wave.sin(), fade * wave.cos()", "wave.sin(), wave.cos()", "Fourier features of noise alone"),
    (MNIST, ".view(-1, 1, 1, 1, 1)) ** 2) / 2)", ".view(-1, 1, 1, 1, 1)) ** 2))", "Fourier features, 2 missing in exp(-x^2 / 2)"),
    (MNIST, "nn.GroupNorm(8, inputs)", "nn.BatchNorm2d(inputs)", "superminddpm, tea: batch norm over mixed noise levels"),
    (D2, "device=device)).sort(1).values", "device=device))", "sliced distance without sorting: any samples score 1"),
    (D2, "diffusion.noise[1:-1] ** 2  # Eq. (12)", "diffusion.noise[2:] ** 2  # Eq. (12)", "weight of the loss, beta for beta-tilde"),
    (D2, "diffusion.p_sample_loop(model, *chunk)", "diffusion.p_sample_loop(model, chunk[0])", "samples without their labels"),
    (ROLL, ".amin(1) > 0.1)", ".amin(1) < 0.1)", "on the curve for off it"),
    (ROLL, "(math.sqrt(1 - self.beta1) * x + math", "(x + math", "last step of the sampler, signal not shrunk"),
    (ROLL, "rng = torch.Generator().manual_seed(args.seed)", "rng = torch.Generator().manual_seed(0)", "seed ignored in training"),
    (MNIST, "mixed.transpose(2, 3).reshape(h.shape)", "mixed.reshape(h.shape)", "attention, heads merged along the wrong axis"),
    (MNIST, "self.noise[1] / self.noise[2] * self.beta[2].sqrt()", "self.beta[1].sqrt()", "decoder, beta_1 for beta-tilde_2"),
    (MNIST, "learner, model, log = net, ema.module,", "learner, model, log = net, net,", "EMA not used"),
    (MNIST, "net.load_state_dict(saved[\"net\"])", "pass", "weights not resumed"),
    (D2, "xT = torch.randn(args.n, 2", "xT = torch.rand(args.n, 2", "acids-ircam: sampling starts at uniform noise"),
    (ROLL, "K.std().item() / 256", "K.std().item() / 65536", "standard error, sqrt missing"),
    (ROLL, "math.sqrt(self.beta1) * z[0]", "self.beta1 * z[0]", "hrbigelow: beta for sqrt(beta) in the last step"),
    (D2, "10_000 ** (-torch.arange(16) / 16)", "10_000 ** (torch.arange(16) / 16)", "embedding, sign of the exponent"),
]  # fmt: skip


def run_tests(file, old="", new="", **more):
    """Run the tests of a script in a copy, with text replaced in it; whether they pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in (D2, ROLL, MNIST, "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        for name in ("tests", "data/mnist5k"):
            shutil.copytree(ROOT / name, copy / name)
        (copy / file).write_text((ROOT / file).read_text().replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q"]
        command += [str(copy / "tests" / f"test_{file}"), *more.pop("flags", ())]
        env = os.environ | {"TEST_THREADS": "1", "OMP_NUM_THREADS": "1"} | more
        return subprocess.run(command, cwd=copy, env=env, capture_output=True).returncode == 0


def main():
    """Run the chosen mutants on all cores; exit code 1 if one survives or no longer applies."""
    chosen = [m for m in MUTANTS if all(word in " ".join(m) for word in sys.argv[1:])]
    bad = [m for m in chosen if (ROOT / m[0]).read_text().count(m[1]) != 1]
    for file, old, _, origin in bad:
        print(f"no longer applies: {file}: {origin}: {old!r}")
    chosen = [m for m in chosen if m not in bad]
    files, alive = sorted({m[0] for m in chosen}), []
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder, pool:
        # without a bug all pass; what they take gives the order, the quickest first
        times = {file: f"{folder}/{file}.xml" for file in files}
        whole = [pool.submit(run_tests, f, flags=[f"--junitxml={times[f]}"]) for f in files]
        if not all(run.result() for run in whole):
            print("tests fail without any bug put in")
            return 1
        runs = {pool.submit(run_tests, *m[:3], TEST_ORDER=times[m[0]]): m for m in chosen}
        for done in tqdm(concurrent.futures.as_completed(runs), "mutants", len(runs)):
            if done.result():
                alive.append(runs[done])
                file, old, new, origin = runs[done]
                tqdm.write(f"survived: {file}: {origin}: {old!r} -> {new!r}")
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed")
    return 1 if alive or bad else 0


if __name__ == "__main__":
    sys.exit(main())
