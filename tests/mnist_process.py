"""ddpm_mnist.py in a process of its own, with a small network, a witness and, if asked, a fault.

python tests/mnist_process.py FAULT FLAGS ...
FAULT: none; kill (kill -9 in the midst of the second checkpoint); raise (in process 1 at its third
step); full (a disk with room for two kilobytes). In FLAGS, RANK is the number of the process.
Leaves pid0, pid1, ... and rank0.pt, ...: weights at the end, and what the network was trained on.
"""

import faulthandler
import os
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import ddpm_mnist  # noqa: E402


class Small(nn.Module):
    """Stands in for UNet where the network does not matter. seen: what it was trained on."""

    seen = []

    def __init__(self, diffusion, channels=1, classes=10):
        super().__init__()
        self.diffusion = diffusion
        self.classes = classes
        self.label = nn.Embedding(classes + 1, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, xt, t, y=None):
        y = torch.full_like(t, self.classes) if y is None else y
        if torch.is_grad_enabled():
            self.seen.append((xt.detach(), t, y))
        v = self.conv(xt) + self.label(y)[..., None, None]
        return self.diffusion.q_sample(v, t, xt)


def full():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def main(fault, *flags):
    faulthandler.dump_traceback_later(300, exit=True)  # tells where, should it ever hang
    rank = os.environ.get("RANK", "0")
    Path(f"pid{rank}").write_text(str(os.getpid()))
    save = torch.save
    saves = []
    nets = []

    def half(state, file):
        saves.append(file)
        save(state, file)
        if len(saves) == 2:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), 9)

    def network(*args):
        nets.append(Small(*args))
        return nets[0]

    def failing(self, *args):
        if rank == "1" and len(Small.seen) == 2:
            raise RuntimeError("process 1 fails")
        return losses(self, *args)

    losses = ddpm_mnist.Diffusion.p_losses
    ddpm_mnist.UNet = network
    if fault == "kill":
        torch.save = half
    elif fault == "raise":
        ddpm_mnist.Diffusion.p_losses = failing
    elif fault == "full":
        full()
    ddpm_mnist.main([flag.replace("RANK", rank) for flag in flags])
    assert "matplotlib.pyplot" not in sys.modules  # a notebook's figures and windows stay as is
    if fault != "full":
        save((nets[0].state_dict(), Small.seen), f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
