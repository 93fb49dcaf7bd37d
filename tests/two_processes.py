"""One of the processes of torchrun: main of ddpm_mnist.py on 32 digits, with witnesses.

Leaves rank0.pt or rank1.pt in its folder: the weights, the images and the steps t it trained on.
"""

import faulthandler
import gc
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ddpm_mnist  # noqa: E402

faulthandler.dump_traceback_later(60, exit=True)  # tells where, should it ever hang
make, losses = ddpm_mnist.UNet, ddpm_mnist.Diffusion.p_losses
load, destroy = ddpm_mnist.load_mnist, torch.distributed.destroy_process_group
nets, seen, times = [], [], []


def few_digits(path):
    """So few that two processes which draw from the same ones would draw the same ones."""
    x, y, *rest = load(path)
    return x[:32], y[:32], *rest


def unet(*args, **more):
    nets.append(make(*args, **more))
    return nets[-1]


def p_losses(self, model, x0, *args, **more):
    seen.append(x0)
    times.append(args[1])
    return losses(self, model, x0, *args, **more)


def destroy_process_group():
    """DDP must be gone by now: as the last owner of the group it may wait for ever (the GIL)."""
    parallel = torch.nn.parallel.DistributedDataParallel
    assert not any(issubclass(type(thing), parallel) for thing in gc.get_objects())
    destroy()


ddpm_mnist.load_mnist, ddpm_mnist.UNet = few_digits, unet
ddpm_mnist.Diffusion.p_losses = p_losses
torch.distributed.destroy_process_group = destroy_process_group
rank = os.environ["RANK"]
ddpm_mnist.main(sys.argv[1:])
torch.save([nets[0].state_dict(), torch.cat(seen), torch.cat(times)], f"rank{rank}.pt")
